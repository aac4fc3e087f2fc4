"""Erasing an account: what is known of the person goes, and its id stays a number that leads to no account."""

from __future__ import annotations

import asyncio

import pytest

from mercato import topology
from mercato.chassis.contract import Actor, Forbidden, Internal
from mercato.contracts.users import (
    EndedSessionsAfter,
    EraseAccount,
    ForgotPassword,
    GetUser,
    LastStaffMember,
    ListSessions,
    Refresh,
    Register,
    SessionEnded,
    SetRole,
    SignIn,
    UserNotFound,
    Users,
    WrongCredentials,
)
from mercato.testing.harness import ServiceHarness
from mercato.testing.injection import Inject, fail
from mercato.testing.tables import connected

ANONYMOUS = Actor("anonymous")
EMAIL, PASSWORD = "alice@example.com", "correct horse"


class Account:
    """An account with a session, and what its owner sends to have it erased."""

    def __init__(self, user_id: int, session_id: str, refresh_token: str) -> None:
        self.id = user_id
        self.actor = Actor("customer", user_id)
        self.refresh_token = refresh_token
        self.request = EraseAccount(id=user_id, password=PASSWORD, session_id=session_id)


async def account(harness: ServiceHarness, users: Users, email: str = EMAIL) -> Account:
    with harness.acting(ANONYMOUS):
        user = await users.register(Register(email=email, name="Alice", password=PASSWORD))
        tokens = await users.sign_in(SignIn(email=email, password=PASSWORD))
    with harness.acting(Actor("customer", user.id)):
        page = await users.sessions(ListSessions(user_id=user.id))
    return Account(user.id, page.sessions[0].id, tokens.refresh_token)


async def erase(harness: ServiceHarness, users: Users, who: Account) -> None:
    with harness.acting(who.actor):
        await users.erase(who.request)


async def rows_with(harness: ServiceHarness, *texts: str) -> list[str]:
    """The tables of the service that hold one of these texts anywhere."""
    async with connected(harness.dsns["users"]) as connection:
        tables = await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = current_schema()")
        return [
            table
            for (table,) in tables
            for text in texts
            if await connection.fetchval(
                f"SELECT count(*) FROM {table} AS t WHERE t::text ILIKE '%' || $1 || '%'",
                text,
            )
        ]


async def test_nothing_of_the_person_is_kept_and_the_address_gets_another_account(
    harness: ServiceHarness, users: Users
):
    with harness.acting(ANONYMOUS):  # one letter before there is an account, one behind it
        await users.forgot_password(ForgotPassword(email=EMAIL))
    alice = await account(harness, users)
    with harness.acting(ANONYMOUS):
        await users.forgot_password(ForgotPassword(email=EMAIL))
    assert set(await rows_with(harness, EMAIL)) == {"users", "letters"}

    await erase(harness, users, alice)

    assert await rows_with(harness, EMAIL, "Alice", "argon2") == []
    with harness.acting(ANONYMOUS):
        with pytest.raises(WrongCredentials):
            await users.sign_in(SignIn(email=EMAIL, password=PASSWORD))
        again = await users.register(Register(email=EMAIL, name="Alice", password=PASSWORD))
    assert again.id > alice.id
    with harness.acting(Actor("customer", again.id)), pytest.raises(UserNotFound):
        await users.get(GetUser(id=alice.id))


async def test_all_sessions_end_and_other_processes_read_it(harness: ServiceHarness, users: Users):
    alice = await account(harness, users)
    await erase(harness, users, alice)
    with harness.acting(ANONYMOUS):
        with pytest.raises(SessionEnded):
            await users.refresh(Refresh(refresh_token=alice.refresh_token))
        ended = await users.ended_sessions(EndedSessionsAfter())
    assert ended.session_ids == (alice.request.session_id,)


async def test_a_repeated_request_gets_the_same_answer(harness: ServiceHarness, users: Users):
    alice = await account(harness, users)
    for _ in range(2):
        await erase(harness, users, alice)
    await topology.as_the_shop(harness.host, lambda: users.erase(EraseAccount(id=alice.id)))


async def test_requests_at_the_same_time_erase_once(harness: ServiceHarness, users: Users):
    alice = await account(harness, users)
    await asyncio.gather(*(erase(harness, users, alice) for _ in range(4)))
    with harness.acting(ANONYMOUS):
        assert (await users.ended_sessions(EndedSessionsAfter())).position == 1


@pytest.mark.parametrize("point", ["before_commit", "after_commit"])
async def test_an_erasure_that_fails_anywhere_is_finished_by_a_repetition(
    harness: ServiceHarness, users: Users, inject: Inject, point: str
):
    alice = await account(harness, users)
    remove = inject(f"users.erase.{point}", fail)
    with pytest.raises(Internal):
        await erase(harness, users, alice)
    remove()
    assert ("users" in await rows_with(harness, EMAIL)) == (point == "before_commit")
    await erase(harness, users, alice)
    assert await rows_with(harness, EMAIL) == []


async def test_a_wrong_password_and_an_ended_session_erase_nothing(harness: ServiceHarness, users: Users):
    alice = await account(harness, users)
    with harness.acting(alice.actor):
        for password in (None, "wrong password"):
            with pytest.raises(WrongCredentials):
                await users.erase(EraseAccount(id=alice.id, password=password, session_id=alice.request.session_id))
        for session_id in (None, "0" * 32):
            with pytest.raises(SessionEnded):
                await users.erase(EraseAccount(id=alice.id, password=PASSWORD, session_id=session_id))
        assert (await users.get(GetUser(id=alice.id))).email == EMAIL


async def test_others_erase_no_account(harness: ServiceHarness, users: Users):
    alice = await account(harness, users)
    for actor, refusal in ((Actor("customer", alice.id + 1), UserNotFound), (Actor("staff", alice.id + 1), Forbidden)):
        with harness.acting(actor), pytest.raises(refusal):
            await users.erase(alice.request)


async def test_the_last_member_of_staff_stays(harness: ServiceHarness, users: Users):
    one, other = await account(harness, users), await account(harness, users, "bob@example.com")
    for member in (one, other):
        await topology.as_the_shop(harness.host, lambda id_=member.id: users.set_role(SetRole(id=id_, role="staff")))
    answers = await asyncio.gather(
        *(
            topology.as_the_shop(harness.host, lambda id_=member.id: users.erase(EraseAccount(id=id_)))
            for member in (one, other)
        ),
        return_exceptions=True,
    )
    assert sorted(type(answer).__name__ for answer in answers) == ["Empty", LastStaffMember.__name__]


async def test_an_account_that_never_was_is_not_found(harness: ServiceHarness, users: Users):
    with pytest.raises(UserNotFound):
        await topology.as_the_shop(harness.host, lambda: users.erase(EraseAccount(id=999)))
