"""The security log: what is written in it, by which transaction, and who reads it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest

from mercato import topology
from mercato.chassis.contract import Actor, Forbidden, Internal, ServiceError
from mercato.contracts.users import (
    ChangePassword,
    EndOtherSessions,
    EndSession,
    EraseAccount,
    ListSecurityLog,
    ListSessions,
    Register,
    SecurityEntry,
    SetPassword,
    SetRole,
    SignIn,
    UpdateProfile,
    Users,
    WrongCredentials,
)
from mercato.services.users import log_store
from mercato.testing.harness import ServiceHarness
from mercato.testing.injection import Inject, fail
from mercato.testing.tables import connected
from mercato.testing.waiting import until

Q = TypeVar("Q")
A = TypeVar("A")
ANONYMOUS = Actor("anonymous")
EMAIL, PASSWORD, NEW_PASSWORD, ADDRESS = "alice@example.com", "correct horse", "battery staple", "192.0.2.7"


async def as_shop(harness: ServiceHarness, call: Callable[[Q], Awaitable[A]], request: Q) -> A:
    return await topology.as_the_shop(harness.host, lambda: call(request))


async def registered(harness: ServiceHarness, users: Users, email: str = EMAIL) -> int:
    with harness.acting(ANONYMOUS):
        return (await users.register(Register(email=email, name="Alice", password=PASSWORD))).id


async def sign_in(harness: ServiceHarness, users: Users, password: str = PASSWORD, email: str = EMAIL) -> None:
    with harness.acting(ANONYMOUS):
        await users.sign_in(SignIn(email=email, password=password, address=ADDRESS))


async def entries(harness: ServiceHarness, users: Users, account_id: int | None = None) -> list[SecurityEntry]:
    """The oldest first."""
    page = await as_shop(harness, users.security_log, ListSecurityLog(account_id=account_id, limit=200))
    return list(reversed(page.entries))


async def logged(harness: ServiceHarness, users: Users, account_id: int | None = None) -> list[tuple[object, ...]]:
    found = await entries(harness, users, account_id)
    return [(e.kind, e.account_id, e.actor_role, e.actor_id, e.address, e.detail) for e in found]


async def test_sign_ins_are_written_whether_they_succeed_or_not(harness: ServiceHarness, users: Users):
    alice = await registered(harness, users)
    await sign_in(harness, users)
    for email, password in ((EMAIL, "a wrong password"), ("unknown@example.com", PASSWORD)):
        with pytest.raises(WrongCredentials):
            await sign_in(harness, users, password, email)
    assert await logged(harness, users) == [
        ("signed_in", alice, "customer", alice, ADDRESS, ""),
        ("sign_in_failed", alice, "anonymous", 0, ADDRESS, ""),
        ("sign_in_failed", 0, "anonymous", 0, ADDRESS, ""),
    ]


async def test_what_an_owner_changes_is_written(harness: ServiceHarness, users: Users):
    alice = await registered(harness, users)
    for _ in range(4):
        await sign_in(harness, users)
    with harness.acting(Actor("customer", alice)):
        sids = [s.id for s in (await users.sessions(ListSessions(user_id=alice))).sessions]
        await users.end_session(EndSession(user_id=alice, id=sids[3], address=ADDRESS))
        await users.end_other_sessions(EndOtherSessions(user_id=alice, id=sids[0], address=ADDRESS))
        await users.end_other_sessions(EndOtherSessions(user_id=alice, id=sids[0], address=ADDRESS))
        await users.update_profile(UpdateProfile(id=alice, name="Al", address=ADDRESS))
        change = UpdateProfile(id=alice, email="al@example.com", current_password=PASSWORD, address=ADDRESS)
        await users.update_profile(change)
        for password in ("a wrong password", PASSWORD):
            request = ChangePassword(id=alice, current_password=password, new_password=NEW_PASSWORD, address=ADDRESS)
            try:
                await users.change_password(request)
            except WrongCredentials:
                assert password != PASSWORD
    await sign_in(harness, users, NEW_PASSWORD, "al@example.com")
    with harness.acting(Actor("customer", alice)):
        sid = (await users.sessions(ListSessions(user_id=alice))).sessions[0].id
        for password in ("a wrong password", NEW_PASSWORD, NEW_PASSWORD):
            try:
                await users.erase(EraseAccount(id=alice, password=password, session_id=sid, address=ADDRESS))
            except WrongCredentials:
                assert password != NEW_PASSWORD
    about = [("customer", alice, ADDRESS)]
    assert {(e[2], e[3], e[4]) for e in await logged(harness, users, alice)} == set(about)
    assert [(e[0], e[5]) for e in await logged(harness, users, alice)][4:] == [
        ("sessions_ended", "1"),
        ("sessions_ended", "2"),
        ("email_changed", ""),
        ("wrong_password", "change_password"),
        ("password_changed", ""),
        ("signed_in", ""),
        ("wrong_password", "erase"),
        ("erased", ""),
    ]


async def test_what_staff_change_is_found_by_the_account_and_by_the_member(harness: ServiceHarness, users: Users):
    alice, member = await registered(harness, users), await registered(harness, users, "staff@example.com")
    await as_shop(harness, users.set_role, SetRole(id=member, role="staff"))
    with harness.acting(Actor("staff", member)):
        for _ in range(2):  # the second is no change
            await users.set_role(SetRole(id=alice, role="staff", address=ADDRESS))
        await users.update_profile(UpdateProfile(id=alice, email="al@example.com", address=ADDRESS))
    await as_shop(harness, users.set_password, SetPassword(id=alice, new_password=NEW_PASSWORD))
    by_member = [
        ("role_changed", alice, "staff", member, ADDRESS, "customer to staff"),
        ("email_changed", alice, "staff", member, ADDRESS, ""),
    ]
    assert await logged(harness, users, alice) == [*by_member, ("password_changed", alice, "service", 0, "", "set")]
    assert (await logged(harness, users, member))[1:] == by_member


@pytest.mark.parametrize("point", ["before_commit", "after_commit"])
async def test_a_change_and_its_entry_are_one(harness: ServiceHarness, users: Users, inject: Inject, point: str):
    alice = await registered(harness, users)
    erasing = EraseAccount(id=alice)
    remove = inject(f"users.erase.{point}", fail)
    with pytest.raises(Internal):
        await as_shop(harness, users.erase, erasing)
    remove()
    assert len(await entries(harness, users)) == (point == "after_commit")
    await as_shop(harness, users.erase, erasing)
    assert [e[0] for e in await logged(harness, users)] == ["erased"]


async def test_nothing_secret_is_written(harness: ServiceHarness, users: Users):
    alice = await registered(harness, users)
    await sign_in(harness, users)
    with pytest.raises(WrongCredentials):
        await sign_in(harness, users, "a wrong password")
    with harness.acting(Actor("customer", alice)):
        await users.update_profile(UpdateProfile(id=alice, email="al@example.com", current_password=PASSWORD))
    found = await harness.values("SELECT l::text FROM security_log l", of="users")
    assert len(found) == 3
    assert not [row for row in found for text in (EMAIL, "al@", "Alice", PASSWORD, "wrong", "argon") if text in row]


async def test_pages_follow_each_other(harness: ServiceHarness, users: Users):
    alice = await registered(harness, users)
    for _ in range(3):
        await sign_in(harness, users)
    for account_id in (None, alice):
        first = await as_shop(harness, users.security_log, ListSecurityLog(account_id=account_id, limit=2))
        rest = ListSecurityLog(account_id=account_id, limit=2, before=first.next_before)
        second = await as_shop(harness, users.security_log, rest)
        ids = [e.id for e in (*first.entries, *second.entries)]
        assert (len(ids), ids, second.next_before) == (3, sorted(ids, reverse=True), None)


async def test_staff_alone_read_it(harness: ServiceHarness, users: Users):
    alice = await registered(harness, users)
    refused: ServiceError
    for actor in (ANONYMOUS, Actor("customer", alice), Actor("staff", alice)):  # the last is no member any more
        with harness.acting(actor), pytest.raises(Forbidden) as refusal:
            await users.security_log(ListSecurityLog(account_id=alice))
        refused = refusal.value
        assert refused.code == "forbidden"


async def test_old_entries_are_deleted_in_batches(harness: ServiceHarness, users: Users):
    await registered(harness, users)
    await sign_in(harness, users)
    async with connected(harness.dsns["users"]) as connection:
        await connection.execute(
            "INSERT INTO security_log (at, kind, account_id, actor_role, actor_id, address, subject, detail)"
            " SELECT now() - interval '91 days', 'signed_in', 1, 'customer', 1, '', '', '' FROM generate_series(1, 3)"
        )
    async with harness.host.services["users"].database.transaction() as tx:
        assert await log_store.delete_old_entries(tx, limit=2) == 2

    async def is_clean() -> bool:
        async with harness.host.services["users"].database.transaction() as tx:
            await log_store.delete_old_entries(tx, limit=2)
        return len(await entries(harness, users)) == 1

    await until(is_clean, "old entries are deleted")
