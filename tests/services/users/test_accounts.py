"""Accounts: registering, reading, changing, roles."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import Sequence

import pytest

from mercato.chassis.contract import Actor, Forbidden, InvalidRequest, StaleVersion
from mercato.chassis.observability import faults
from mercato.contracts.users import (
    EmailTaken,
    GetUser,
    LastStaffMember,
    ListUsers,
    Register,
    SetRole,
    SignIn,
    UpdateProfile,
    User,
    UserNotFound,
    Users,
    WrongCredentials,
)
from mercato.services.users.demo import DEMO_PASSWORD
from mercato.testing.harness import ServiceHarness
from mercato.testing.tables import connect

ANONYMOUS = Actor("anonymous")
STAFF = Actor("staff")
"""Without an account, such as the operator: its role is in no database."""
SERVICE = Actor("service")
PASSWORD = "correct horse"


def customer(user: User) -> Actor:
    return Actor("customer", user.id)


async def registered(harness: ServiceHarness, users: Users, *names: str) -> Sequence[User]:
    with harness.acting(ANONYMOUS):
        return [
            await users.register(Register(email=f"{name.lower()}@example.com", name=name, password=PASSWORD))
            for name in names
        ]


# --------------------------------------------------------------------------------------------------------- registering


async def test_a_registered_account_is_a_customer(harness: ServiceHarness, users: Users):
    with harness.acting(ANONYMOUS):
        user = await users.register(Register(email=" Ju\u0308rgen@Example.com ", name=" Jürgen ", password=PASSWORD))
    with harness.acting(customer(user)):
        read = await users.get(GetUser(id=user.id))

    assert (user.email, user.name, user.role, user.version) == ("Jürgen@example.com", "Jürgen", "customer", 1)
    assert user.id > 1000
    assert user.created_at.utcoffset() == datetime.timedelta(0)
    assert read == user


async def test_an_address_has_one_account_however_it_is_spelled(harness: ServiceHarness, users: Users):
    await registered(harness, users, "Alice")
    with harness.acting(ANONYMOUS), pytest.raises(EmailTaken):
        await users.register(Register(email="ALICE@Example.COM", name="Alice", password=PASSWORD))


async def test_a_domain_in_letters_and_as_it_travels_are_one_address(harness: ServiceHarness, users: Users):
    with harness.acting(ANONYMOUS):
        user = await users.register(Register(email="Carol@XN--mnchen-3ya.DE", name="Carol", password=PASSWORD))
        assert user.email == "Carol@münchen.de"
        for email in ("carol@MÜNCHEN.de", "carol@xn--mnchen-3ya.de"):
            with pytest.raises(EmailTaken):
                await users.register(Register(email=email, name="Carol", password=PASSWORD))
            assert (await users.sign_in(SignIn(email=email, password=PASSWORD))).user == user


@pytest.mark.parametrize("stored", ["carol@xn--mnchen-3ya.de", "Carol@München.de", "carol..c@example.com"])
async def test_an_account_of_an_earlier_version_is_found_as_it_was_spelled(
    harness: ServiceHarness, users: Users, stored: str
):
    """An earlier version stored addresses as they were written, and took some that are refused today."""
    [carol, _dave] = await registered(harness, users, "Carol", "Dave")
    await harness.rows("UPDATE users SET email = $2 WHERE id = $1 RETURNING id", carol.id, stored, of="users")
    with harness.acting(ANONYMOUS):
        assert (await users.sign_in(SignIn(email=stored, password=PASSWORD))).user.id == carol.id


async def test_of_simultaneous_registrations_of_an_address_one_succeeds(harness: ServiceHarness, users: Users):
    spellings = ["alice@example.com", "Alice@example.com", "ALICE@EXAMPLE.COM"]
    with harness.acting(ANONYMOUS):
        outcomes = await asyncio.gather(
            *(users.register(Register(email=email, name="Alice", password=PASSWORD)) for email in spellings),
            return_exceptions=True,
        )

    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["EmailTaken", "EmailTaken", "User"]


async def test_every_wrong_field_of_a_registration_is_named_at_once(harness: ServiceHarness, users: Users):
    with harness.acting(ANONYMOUS), pytest.raises(InvalidRequest) as refused:
        await users.register(Register(email="alice", name=" ", password="short"))

    assert [error.field for error in refused.value.errors] == ["email", "name", "password"]


@pytest.mark.parametrize("bad", ["\x00", "\x1b", "\n", "\u2028", "\x85"])
async def test_what_cannot_be_stored_is_refused_and_never_reaches_the_database(
    harness: ServiceHarness, users: Users, bad: str
):
    with harness.acting(ANONYMOUS), pytest.raises(InvalidRequest) as refused:
        await users.register(Register(email=f"al{bad}ice@example.com", name=f"Al{bad}ice", password=f"{bad}{PASSWORD}"))

    fields = [error.field for error in refused.value.errors]
    assert fields == ["email", "name", "password"]


async def test_a_lost_answer_to_a_registration_leaves_an_account_that_can_be_used(
    harness: ServiceHarness, users: Users
):
    async def crash(_: str) -> None:
        raise RuntimeError("the power fails")

    remove = faults.inject("users.register.after_commit", crash)
    request = Register(email="alice@example.com", name="Alice", password=PASSWORD)
    with harness.acting(ANONYMOUS):
        with pytest.raises(Exception, match="failed"):
            await users.register(request)
        remove()
        with pytest.raises(EmailTaken):
            await users.register(request)
        assert (await users.sign_in(SignIn(email=request.email, password=PASSWORD))).user.name == "Alice"


# ------------------------------------------------------------------------------------------------------------- reading


async def test_to_a_customer_another_answers_like_one_who_does_not_exist(harness: ServiceHarness, users: Users):
    alice, bob = await registered(harness, users, "Alice", "Bob")
    with harness.acting(customer(alice)):
        others, unknown, own = await users.get.many([GetUser(id=bob.id), GetUser(id=4711), GetUser(id=alice.id)])

    assert (type(others), type(unknown), own) == (UserNotFound, UserNotFound, alice)
    assert isinstance(others, UserNotFound)
    assert others.details == {"user_id": bob.id}


async def test_a_batch_is_answered_in_its_order_each_for_its_own_actor(harness: ServiceHarness, users: Users):
    alice, bob = await registered(harness, users, "Alice", "Bob")

    async def get(actor: Actor, user_id: int) -> object:
        with harness.acting(actor):
            future = users.get(GetUser(id=user_id))
        return (await asyncio.gather(future, return_exceptions=True))[0]

    seen = await asyncio.gather(
        get(customer(alice), bob.id),
        get(customer(bob), bob.id),
        get(STAFF, bob.id),
        get(STAFF, 4711),
        get(SERVICE, alice.id),
    )

    assert isinstance(seen[0], UserNotFound)
    assert isinstance(seen[3], UserNotFound)
    assert [seen[1], seen[2], seen[4]] == [bob, bob, alice]


async def test_an_anonymous_caller_reads_no_account(harness: ServiceHarness, users: Users):
    (alice,) = await registered(harness, users, "Alice")
    with harness.acting(ANONYMOUS), pytest.raises(Forbidden):
        await users.get(GetUser(id=alice.id))


async def test_staff_page_through_all_accounts(harness: ServiceHarness, users: Users):
    all_three = await registered(harness, users, "Alice", "Bob", "Carol")
    with harness.acting(STAFF):
        first = await users.list(ListUsers(limit=2))
        assert first.next_after is not None
        second = await users.list(ListUsers(limit=2, after=first.next_after))
        exact = await users.list(ListUsers(limit=3))

    assert [*first.users, *second.users] == all_three
    assert second.next_after is None
    assert (len(exact.users), exact.next_after) == (3, None)


async def test_staff_list_by_role(harness: ServiceHarness, users: Users):
    alice, bob, carol = await registered(harness, users, "Alice", "Bob", "Carol")
    with harness.acting(STAFF):
        bob = await users.set_role(SetRole(id=bob.id, role="staff"))
        staff = await users.list(ListUsers(role="staff"))
        customers = await users.list(ListUsers(role="customer", limit=1))
        more = await users.list(ListUsers(role="customer", limit=1, after=customers.next_after or 0))

    assert staff.users == (bob,)
    assert [*customers.users, *more.users] == [alice, carol]
    assert more.next_after is None


async def test_customers_do_not_list(harness: ServiceHarness, users: Users):
    (alice,) = await registered(harness, users, "Alice")
    with harness.acting(customer(alice)), pytest.raises(Forbidden):
        await users.list(ListUsers())


# ------------------------------------------------------------------------------------------------------------ changing


async def test_a_customer_changes_what_is_given(harness: ServiceHarness, users: Users):
    (alice,) = await registered(harness, users, "Alice")
    with harness.acting(customer(alice)):
        renamed = await users.update_profile(UpdateProfile(id=alice.id, name=" Alice L. ", version=1))
        moved = await users.update_profile(
            UpdateProfile(id=alice.id, email="Alice@Example.com", current_password=PASSWORD)
        )

    assert (renamed.name, renamed.email, renamed.version) == ("Alice L.", alice.email, 2)
    assert (moved.name, moved.email, moved.version) == ("Alice L.", "Alice@example.com", 3)
    assert moved.updated_at > moved.created_at


async def test_staff_change_others_and_customers_do_not(harness: ServiceHarness, users: Users):
    alice, bob = await registered(harness, users, "Alice", "Bob")
    with harness.acting(customer(alice)), pytest.raises(UserNotFound):
        await users.update_profile(UpdateProfile(id=bob.id, name="Robert"))
    with harness.acting(STAFF):
        assert (await users.update_profile(UpdateProfile(id=bob.id, name="Robert"))).name == "Robert"
        with pytest.raises(UserNotFound):
            await users.update_profile(UpdateProfile(id=4711, name="Robert"))


async def test_of_two_changes_of_the_same_version_one_succeeds(harness: ServiceHarness, users: Users):
    (alice,) = await registered(harness, users, "Alice")
    with harness.acting(customer(alice)):
        outcomes = await asyncio.gather(
            *(users.update_profile(UpdateProfile(id=alice.id, name=name, version=1)) for name in ("Ada", "Eve")),
            return_exceptions=True,
        )

    stale = [o for o in outcomes if isinstance(o, StaleVersion)]
    assert [s.details for s in stale] == [{"expected": 1, "actual": 2}]
    assert sum(isinstance(o, User) for o in outcomes) == 1


async def test_a_change_of_nothing_gives_the_user_as_it_is(harness: ServiceHarness, users: Users):
    (alice,) = await registered(harness, users, "Alice")
    with harness.acting(customer(alice)):
        assert await users.update_profile(UpdateProfile(id=alice.id)) == alice
        with pytest.raises(StaleVersion):
            await users.update_profile(UpdateProfile(id=alice.id, version=7))


async def test_an_address_of_another_account_is_refused(harness: ServiceHarness, users: Users):
    _, bob = await registered(harness, users, "Alice", "Bob")
    with harness.acting(customer(bob)):
        with pytest.raises(EmailTaken):
            await users.update_profile(
                UpdateProfile(id=bob.id, email="ALICE@example.com", name="Robert", current_password=PASSWORD)
            )
        assert await users.get(GetUser(id=bob.id)) == bob


async def test_another_address_of_ones_own_needs_the_password(harness: ServiceHarness, users: Users):
    (alice,) = await registered(harness, users, "Alice")
    new = "alice@elsewhere.example"
    with harness.acting(customer(alice)):
        with pytest.raises(InvalidRequest) as refused:
            await users.update_profile(UpdateProfile(id=alice.id, email=new, name="Ada"))
        assert [error.field for error in refused.value.errors] == ["current_password"]
        for wrong in ("wrong password", ""):
            with pytest.raises(WrongCredentials):
                await users.update_profile(UpdateProfile(id=alice.id, email=new, current_password=wrong))
        assert await users.get(GetUser(id=alice.id)) == alice
        assert (await users.update_profile(UpdateProfile(id=alice.id, email=alice.email))).email == alice.email
        changed = await users.update_profile(UpdateProfile(id=alice.id, email=new, current_password=PASSWORD))
        assert changed.email == new


async def test_staff_change_the_address_of_another_without_a_password_and_their_own_with_it(
    harness: ServiceHarness, users: Users
):
    alice, bob = await registered(harness, users, "Alice", "Bob")
    with harness.acting(await member_of_staff(harness, users, alice)):
        assert (await users.update_profile(UpdateProfile(id=bob.id, email="bob@elsewhere.example"))).id == bob.id
        with pytest.raises(InvalidRequest):
            await users.update_profile(UpdateProfile(id=alice.id, email="alice@elsewhere.example"))


async def test_a_password_that_is_changed_meanwhile_changes_no_address(harness: ServiceHarness, users: Users):
    """It was right when it was checked."""
    (alice,) = await registered(harness, users, "Alice")
    connection = await connect(harness.dsns["users"])
    harness.closing.push_async_callback(connection.close)
    transaction = connection.transaction()
    await transaction.start()
    await connection.execute("UPDATE credentials SET version = version + 1 WHERE user_id = $1", alice.id)
    with harness.acting(customer(alice)):
        request = UpdateProfile(id=alice.id, email="alice@elsewhere.example", current_password=PASSWORD)
        changing = asyncio.ensure_future(users.update_profile(request))
    await harness.until_blocked(of="users", by=[changing])
    await transaction.commit()

    with pytest.raises(WrongCredentials):
        await changing
    with harness.acting(SERVICE):
        assert (await users.get(GetUser(id=alice.id))).email == alice.email


async def test_every_wrong_field_of_a_change_is_named_at_once(harness: ServiceHarness, users: Users):
    (alice,) = await registered(harness, users, "Alice")
    with harness.acting(customer(alice)), pytest.raises(InvalidRequest) as refused:
        await users.update_profile(UpdateProfile(id=alice.id, email="a\x00b@example.com", name="\x00"))

    assert [error.field for error in refused.value.errors] == ["email", "name"]


# --------------------------------------------------------------------------------------------------------------- roles


async def test_staff_give_and_take_roles(harness: ServiceHarness, users: Users):
    (alice,) = await registered(harness, users, "Alice")
    with harness.acting(STAFF):
        promoted = await users.set_role(SetRole(id=alice.id, role="staff", version=1))
        with pytest.raises(StaleVersion):
            await users.set_role(SetRole(id=alice.id, role="customer", version=1))
        with pytest.raises(UserNotFound):
            await users.set_role(SetRole(id=4711, role="staff"))

    assert (promoted.role, promoted.version) == ("staff", 2)


async def test_customers_do_not_give_roles(harness: ServiceHarness, users: Users):
    (alice,) = await registered(harness, users, "Alice")
    with harness.acting(customer(alice)), pytest.raises(Forbidden):
        await users.set_role(SetRole(id=alice.id, role="staff"))


async def test_the_last_member_of_staff_stays(harness: ServiceHarness, users: Users):
    (alice,) = await registered(harness, users, "Alice")
    with harness.acting(SERVICE):
        await users.set_role(SetRole(id=alice.id, role="staff"))
    with harness.acting(Actor("staff", alice.id)):
        with pytest.raises(LastStaffMember):
            await users.set_role(SetRole(id=alice.id, role="customer"))
        assert (await users.get(GetUser(id=alice.id))).role == "staff"
    with harness.acting(SERVICE):
        assert (await users.set_role(SetRole(id=alice.id, role="customer"))).role == "customer"


async def test_two_members_of_staff_who_take_the_role_from_each_other_leave_one(harness: ServiceHarness, users: Users):
    alice, bob = await registered(harness, users, "Alice", "Bob")
    with harness.acting(SERVICE):
        await asyncio.gather(*(users.set_role(SetRole(id=user.id, role="staff")) for user in (alice, bob)))

    async def demote(by: User, whom: User) -> User:
        with harness.acting(Actor("staff", by.id)):
            return await users.set_role(SetRole(id=whom.id, role="customer"))

    outcomes = await asyncio.gather(demote(alice, bob), demote(bob, alice), return_exceptions=True)

    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["Forbidden", "User"]
    with harness.acting(SERVICE):
        assert len((await users.list(ListUsers(role="staff"))).users) == 1


async def test_of_two_members_of_staff_who_give_up_the_role_at_once_one_keeps_it(harness: ServiceHarness, users: Users):
    alice, bob = await registered(harness, users, "Alice", "Bob")
    with harness.acting(SERVICE):
        await asyncio.gather(*(users.set_role(SetRole(id=user.id, role="staff")) for user in (alice, bob)))

    async def give_up(user: User) -> User:
        with harness.acting(Actor("staff", user.id)):
            return await users.set_role(SetRole(id=user.id, role="customer"))

    outcomes = await asyncio.gather(give_up(alice), give_up(bob), return_exceptions=True)

    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["LastStaffMember", "User"]


# -------------------------------------------------------------------------------------------------------- former staff


async def member_of_staff(harness: ServiceHarness, users: Users, user: User) -> Actor:
    """`user`, who is staff, as their access token says."""
    with harness.acting(SERVICE):
        await users.set_role(SetRole(id=user.id, role="staff"))
    return Actor("staff", user.id)


async def test_a_member_of_staff_may_do_what_staff_may(harness: ServiceHarness, users: Users):
    alice, bob = await registered(harness, users, "Alice", "Bob")
    with harness.acting(await member_of_staff(harness, users, alice)):
        renamed = await users.update_profile(UpdateProfile(id=bob.id, name="Robert"))
        assert await users.get(GetUser(id=bob.id)) == renamed
        assert len((await users.list(ListUsers())).users) == 2
        assert (await users.set_role(SetRole(id=bob.id, role="staff"))).role == "staff"
        carol = Register(email="carol@example.com", name="Carol", password=PASSWORD, role="staff")
        assert (await users.register(carol)).role == "staff"


async def test_a_former_member_of_staff_is_a_customer_whatever_the_token_says(harness: ServiceHarness, users: Users):
    alice, bob, carol = await registered(harness, users, "Alice", "Bob", "Carol")
    former = await member_of_staff(harness, users, alice)
    await member_of_staff(harness, users, bob)
    with harness.acting(SERVICE):
        await users.set_role(SetRole(id=alice.id, role="customer"))

    with harness.acting(former):
        for role in ("staff", "customer"):
            for user in (alice, bob, carol):
                with pytest.raises(Forbidden) as refused:
                    await users.set_role(SetRole(id=user.id, role=role))
                assert refused.value.details == {"operation": "users.set_role", "role": "customer"}
        with pytest.raises(Forbidden):
            await users.list(ListUsers())
        with pytest.raises(Forbidden):
            await users.register(Register(email="d@example.com", name="Dan", password=PASSWORD, role="staff"))
        with pytest.raises(UserNotFound):
            await users.update_profile(UpdateProfile(id=carol.id, name="Eve"))
        others, own = await users.get.many([GetUser(id=carol.id), GetUser(id=alice.id)])
        assert (type(others), getattr(own, "role", None)) == (UserNotFound, "customer")
        assert (await users.update_profile(UpdateProfile(id=alice.id, name="Ada"))).name == "Ada"


async def test_an_account_that_is_gone_is_not_staff(harness: ServiceHarness, users: Users):
    (alice,) = await registered(harness, users, "Alice")
    with harness.acting(Actor("staff", 4711)):
        with pytest.raises(Forbidden) as refused:
            await users.set_role(SetRole(id=alice.id, role="staff"))
        assert refused.value.details["role"] == "anonymous"
        with pytest.raises(UserNotFound):
            await users.get(GetUser(id=alice.id))


@pytest.mark.parametrize("again", ["role", "profile"])
async def test_a_member_of_staff_who_loses_the_role_meanwhile_is_refused(
    harness: ServiceHarness, users: Users, again: str
):
    """The role is taken, and the transaction that does so has not ended, when its former owner wants to use it."""
    alice, bob = await registered(harness, users, "Alice", "Bob")
    former = await member_of_staff(harness, users, alice)
    await member_of_staff(harness, users, bob)
    demoting = await connect(harness.dsns["users"])
    harness.closing.push_async_callback(demoting.close)
    transaction = demoting.transaction()
    await transaction.start()
    await demoting.execute("UPDATE users SET role = 'customer' WHERE id = $1", alice.id)
    with harness.acting(former):
        request = SetRole(id=alice.id, role="staff") if again == "role" else UpdateProfile(id=bob.id, name="Eve")
        call = users.set_role(request) if isinstance(request, SetRole) else users.update_profile(request)
        using = asyncio.ensure_future(call)
    await harness.until_blocked(of="users", by=[using])
    await transaction.commit()

    with pytest.raises((Forbidden, UserNotFound)):
        await using
    with harness.acting(SERVICE):
        assert [u.role for u in (await users.list(ListUsers())).users] == ["customer", "staff"]
        assert (await users.get(GetUser(id=bob.id))).name == "Bob"


# ----------------------------------------------------------------------------------------------------------- demo data


async def test_the_demo_has_alice_and_bob(harness: ServiceHarness, users: Users):
    seed = harness.host.services["users"].seed_demo
    assert seed
    assert sorted(await asyncio.gather(seed(), seed())) == [False, True]
    assert await seed() is False

    with harness.acting(STAFF):
        listed = (await users.list(ListUsers())).users
    assert [(u.id, u.email, u.name, u.role) for u in listed] == [
        (1, "alice@example.com", "Alice", "customer"),
        (2, "bob@example.com", "Bob", "customer"),
    ]
    with harness.acting(ANONYMOUS):
        assert (await users.sign_in(SignIn(email="alice@example.com", password=DEMO_PASSWORD))).user.id == 1


async def test_the_demo_changes_nothing_in_a_shop_with_an_account(harness: ServiceHarness, users: Users):
    await registered(harness, users, "Carol")
    seed = harness.host.services["users"].seed_demo
    assert seed
    assert await seed() is False


async def test_the_demo_waits_for_a_concurrent_registration_and_then_changes_nothing(
    harness: ServiceHarness, users: Users
):
    service = harness.host.services["users"]
    assert service.seed_demo
    async with service.database.transaction() as tx:
        await tx.execute("INSERT INTO users (email, name) VALUES ('carol@example.com', 'Carol')")
        seeding = asyncio.ensure_future(service.seed_demo())
        while not seeding.done():
            if await tx.fetch_values(int, "SELECT 1 FROM pg_locks WHERE NOT granted AND relation = 'users'::regclass"):
                break
            await asyncio.wait([seeding], timeout=0.01)

    assert await seeding is False
    with harness.acting(STAFF):
        assert [user.name for user in (await users.list(ListUsers())).users] == ["Carol"]


async def test_people_who_register_come_after_the_demo(harness: ServiceHarness, users: Users):
    seed = harness.host.services["users"].seed_demo
    assert seed
    await seed()
    (carol,) = await registered(harness, users, "Carol")
    assert carol.id > 1000
