"""A COMMIT whose answer does not come: it is never cancelled at the server, and its caller learns that it is unknown.

The server replicates synchronously and has no standby, so that a COMMIT waits for ever. It waits when the transaction
is on the disk already: a cancelled wait would show it to other sessions, although no standby has it.
"""

# What fails stands inside a transaction, which is a block.
# ruff: noqa: PT012

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest
import pytest_asyncio

from mercato.chassis.contract import HandlerRun, Message, Unavailable, handler_run
from mercato.chassis.postgres import connections
from mercato.chassis.postgres.connections import OUTBOX_LOCK
from mercato.chassis.postgres.database import Database
from mercato.chassis.postgres.dsn import with_settings
from mercato.chassis.postgres.outbox_row import Outgoing
from mercato.testing.databases import opened
from mercato.testing.foreign_server import ForeignServer
from mercato.testing.tables import connected, rows
from mercato.testing.waiting import until, until_true

WAITING = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND query LIKE '%COMMIT%'"
OUTBOX = "CREATE TABLE outbox (id bigserial, events text)"
LOCAL = {"synchronous_commit": "local"}
WAITS = {"synchronous_commit": "on"}
"""Only sessions of the tested `Database` wait for a standby."""


class Noted(Message, frozen=True):
    text: str


@pytest.fixture(scope="module")
def server() -> Iterator[ForeignServer]:
    with ForeignServer(LOCAL, version=18) as made:
        yield made


@pytest_asyncio.fixture
async def dsn(server: ForeignServer) -> AsyncIterator[str]:
    await rows(server.admin_dsn, "CREATE TABLE things (id bigint PRIMARY KEY)")
    await rows(server.admin_dsn, OUTBOX)
    await wait_for_standby(server.admin_dsn, "a_standby")
    yield server.admin_dsn
    await wait_for_standby(server.admin_dsn, "")
    await rows(server.admin_dsn, "DROP TABLE things, outbox")


async def wait_for_standby(dsn: str, name: str) -> None:
    """From now on a COMMIT waits for the standby of this name; empty: for none, as when an operator gives it up."""
    await rows(dsn, f"ALTER SYSTEM SET synchronous_standby_names = '{name}'")
    await rows(dsn, "SELECT pg_reload_conf()")

    async def is_so() -> object:
        return await rows(dsn, "SHOW synchronous_standby_names") == [(name,)] and (name or await waiting(dsn) == 0)

    await until(is_so)


async def waiting(dsn: str) -> int:
    """How many COMMITs wait."""
    return (await rows(dsn, WAITING))[0][0]


@pytest_asyncio.fixture
async def database(dsn: str) -> AsyncGenerator[Database]:
    async with opened(with_settings(dsn, WAITS), size=2) as made:
        yield made


@pytest_asyncio.fixture
async def hasty(dsn: str, monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[Database]:
    """A database whose statements may take half a second, and which looks for stalled COMMITs often."""
    monkeypatch.setattr(connections, "STATEMENT_SECONDS", 0.5)
    monkeypatch.setattr(connections, "STALLED_SECONDS", 0.25)
    monkeypatch.setattr(connections, "STALLED_LOOK_SECONDS", 0.05)
    async with opened(with_settings(dsn, WAITS), size=2) as made:
        yield made


@pytest.fixture
def made() -> Iterator[HandlerRun]:
    """The running attempt of a handler."""
    run = HandlerRun()
    token = handler_run.set(run)
    yield run
    handler_run.reset(token)


def noted() -> list[Outgoing]:
    return [Outgoing("thing.noted", "thing", 1, 1, Noted("x"))]


async def add(database: Database, number: int, events: list[Outgoing] | None = None) -> None:
    async with database.transaction() as tx:
        await tx.execute("INSERT INTO things (id) VALUES ($1)", number)
        tx.emit(events or [])


async def until_it_waits(dsn: str) -> None:
    async def waits() -> bool:
        return await waiting(dsn) > 0

    await until(waits)


async def until_added(database: Database, number: int) -> None:
    async def is_added() -> bool:
        try:
            await add(database, number)
        except Unavailable:
            return False
        return True

    await until(is_added)


async def ids(database: Database) -> list[int]:
    async with database.read() as tx:
        return await tx.fetch_values(int, "SELECT id FROM things ORDER BY id")


@pytest.mark.parametrize("has_events", [False, True], ids=["alone", "with events"])
async def test_a_commit_that_takes_too_long_stays_unseen(
    dsn: str, database: Database, made: HandlerRun, monkeypatch: pytest.MonkeyPatch, *, has_events: bool
):
    monkeypatch.setattr(connections, "STATEMENT_SECONDS", 0.5)
    async with opened(with_settings(dsn, WAITS), size=2) as hasty:
        with pytest.raises(Unavailable):
            await add(hasty, 1, noted() if has_events else None)
    assert made.committed, "nothing says that it has not"
    assert await ids(database) == []
    assert await waiting(dsn) == 1


async def test_a_commit_whose_caller_has_left_stays_unseen(dsn: str, database: Database):
    task = asyncio.create_task(add(database, 1))
    await until_it_waits(dsn)
    task.cancel()
    await asyncio.sleep(0.1)
    assert await ids(database) == []
    assert await waiting(dsn) == 1
    await wait_for_standby(dsn, "")
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await ids(database) == [1]


async def test_while_a_commit_is_stalled_no_transaction_begins_and_reads_work(dsn: str, hasty: Database):
    with pytest.raises(Unavailable):
        await add(hasty, 1)
    for number in range(2, 8):
        with pytest.raises(Unavailable):
            await add(hasty, number)
        assert await ids(hasty) == []
    assert await waiting(dsn) == 1
    assert await hasty.problem() == "its database waits for a standby that does not answer"


async def test_once_no_commit_is_stalled_transactions_begin_again(dsn: str, hasty: Database):
    with pytest.raises(Unavailable):
        await add(hasty, 1)
    await wait_for_standby(dsn, "")
    await until_added(hasty, 2)
    assert await ids(hasty) == [1, 2]
    assert await hasty.problem() == ""


async def test_a_shop_without_writes_notices_that_no_commit_is_stalled_any_more(dsn: str, hasty: Database):
    with pytest.raises(Unavailable):
        await add(hasty, 1)
    assert await hasty.problem() != ""
    await wait_for_standby(dsn, "")

    async def is_well() -> bool:
        return await hasty.problem() == ""

    await until(is_well)


async def test_a_commit_whose_caller_has_left_and_that_is_not_answered_is_stalled(dsn: str, hasty: Database):
    task = asyncio.create_task(add(hasty, 1))
    await until_it_waits(dsn)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(Unavailable):
        await add(hasty, 2)
    assert await waiting(dsn) == 1


@pytest.mark.parametrize("leaves", [False, True], ids=["takes too long", "caller has left"])
async def test_after_a_stalled_commit_another_server_that_takes_writes_is_used(
    server: ForeignServer, dsn: str, monkeypatch: pytest.MonkeyPatch, *, leaves: bool
):
    """The first one stands for a primary that does not know that the second was promoted."""
    monkeypatch.setattr(connections, "STATEMENT_SECONDS", 0.5)
    with ForeignServer(LOCAL, version=18) as promoted:
        await rows(promoted.admin_dsn, "CREATE TABLE things (id bigint PRIMARY KEY)")
        both = f"{dsn.partition('?')[0]}?{urlencode({'host': f'{folder(dsn)},{folder(promoted.admin_dsn)}'})}"
        async with opened(with_settings(both, WAITS), size=2) as hasty:
            task = asyncio.create_task(add(hasty, 1))
            await until_it_waits(dsn)
            if leaves:
                task.cancel()
            with pytest.raises((asyncio.CancelledError, Unavailable)):
                await task
            await add(hasty, 2)
        assert await rows(promoted.admin_dsn, "SELECT id FROM things") == [(2,)]


def folder(dsn: str) -> str:
    """Of the socket of a server."""
    return parse_qs(urlsplit(dsn).query)["host"][0]


async def test_a_commit_that_is_answered_late_leaves_its_connection_clean(dsn: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(connections, "STATEMENT_SECONDS", 0.5)
    async with opened(with_settings(dsn, WAITS), size=1) as hasty:
        task = asyncio.create_task(add(hasty, 1))
        await until_it_waits(dsn)
        await asyncio.sleep(0.7)
        await wait_for_standby(dsn, "")
        with pytest.raises(Unavailable):
            await task
        assert await ids(hasty) == [1]


async def test_a_lock_of_the_outbox_that_is_not_free_in_time_is_no_commit(
    dsn: str, made: HandlerRun, monkeypatch: pytest.MonkeyPatch
):
    """The server ends that wait, which comes before the COMMIT in the same message."""
    monkeypatch.setattr(connections, "OUTBOX_LOCK_SECONDS", 1)
    async with opened(dsn, size=1) as database, connected(dsn) as other:
        await other.execute("BEGIN")
        await other.execute("SELECT pg_advisory_xact_lock($1)", OUTBOX_LOCK)
        with pytest.raises(Unavailable):
            await add(database, 1, noted())
        assert not made.committed
        await other.execute("COMMIT")
        assert await ids(database) == []
        await add(database, 2, noted())
        assert await ids(database) == [2]


@pytest.mark.parametrize("has_events", [False, True], ids=["alone", "with events"])
async def test_a_connection_that_is_lost_before_the_commit_is_unavailable(dsn: str, *, has_events: bool):
    async with opened(dsn, size=1) as database:
        with pytest.raises(Unavailable):
            async with database.transaction() as tx:
                await tx.execute("INSERT INTO things (id) VALUES (1)")
                connection: Any = tx._lease.connection
                await rows(dsn, f"SELECT pg_terminate_backend({connection.get_server_pid()}, 5000)")
                await until_true(lambda: connection._con is None)  # the pool has noticed it
                tx.emit(noted() if has_events else [])
        assert await ids(database) == []
