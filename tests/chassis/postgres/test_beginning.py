"""BEGIN goes with the first statement of a transaction, whatever that is and however it ends."""

# What fails stands inside a transaction, which is a block.
# ruff: noqa: PT012

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import pytest_asyncio

from mercato import topology
from mercato.chassis.contract import Empty
from mercato.chassis.postgres.database import Database, RolledBackError, Row, Tx
from mercato.chassis.postgres.outbox_row import Outgoing
from mercato.testing.cluster import Cluster
from mercato.testing.databases import fresh_dsn, opened
from mercato.testing.waiting import until_true
from pgbouncer.pooler import Pooler, needs_new_pgbouncer

MIGRATIONS = Path(__file__).with_name("migrations_for_tests")
LONGER_THAN_THE_DRIVER_NAMES = " " * 16 * 1024
"""A statement that is not cached has no name, and is parsed again with each use."""


class ThingRow(Row, frozen=True, gc=False):
    id: int
    name: str


@pytest_asyncio.fixture(params=["the server", pytest.param("a pooler", marks=needs_new_pgbouncer)])
async def database(cluster: Cluster, request: pytest.FixtureRequest) -> AsyncGenerator[Database]:
    """With one connection, so that what one transaction leaves behind meets the next."""
    async with fresh_dsn(cluster, "things", MIGRATIONS) as dsn:
        with Pooler(dsn) if request.param == "a pooler" else contextlib.nullcontext() as pooler:
            async with opened(pooler.dsn(dsn) if pooler else dsn, size=1) as made:
                yield made


async def ids(database: Database) -> list[int]:
    async with database.read() as tx:
        return await tx.fetch_values(int, "SELECT id FROM things ORDER BY id")


async def in_one_transaction(tx: Tx) -> bool:
    """Whether a transaction is open: the same for two statements that each see the time at which theirs began."""
    times = [await tx.fetch_values(str, "SELECT now()::text") for _ in range(2)]
    return times[0] == times[1]


INSERT = "INSERT INTO things (id, name) VALUES (1, 'thing')"
FIRST: dict[str, Callable[[Tx], Awaitable[Any]]] = {
    "no values": lambda tx: tx.execute(INSERT),
    "values": lambda tx: tx.execute("INSERT INTO things (id, name) VALUES ($1, 'thing')", 1),
    "rows": lambda tx: tx.fetch(ThingRow, f"{INSERT} RETURNING id, name"),
    "a row": lambda tx: tx.fetch_one(ThingRow, f"{INSERT} RETURNING id, name"),
    "one column": lambda tx: tx.fetch_values(int, f"{INSERT} RETURNING id"),
    "no name": lambda tx: tx.fetch_values(int, f"{INSERT} RETURNING id{LONGER_THAN_THE_DRIVER_NAMES}"),
    "a setting": lambda tx: tx.execute("SET LOCAL lock_timeout = '1s'"),
    "nothing found": lambda tx: tx.fetch_one(ThingRow, "SELECT id, name FROM things WHERE id = $1", 7),
}
WITHOUT_EFFECT = (FIRST["a setting"], FIRST["nothing found"])


@pytest.mark.parametrize("first", FIRST.values(), ids=FIRST)
@pytest.mark.parametrize("times", [1, 2], ids=["prepared", "known"])
async def test_the_first_statement_is_in_the_transaction(
    database: Database, first: Callable[[Tx], Awaitable[Any]], times: int
):
    for _ in range(times):
        with pytest.raises(KeyError):
            async with database.transaction() as tx:
                await first(tx)
                assert await in_one_transaction(tx)
                raise KeyError
        assert await ids(database) == []

    async with database.transaction() as tx:
        await first(tx)
        inside = await tx.fetch_values(int, "SELECT id FROM things")
    async with database.read() as tx:
        assert not await in_one_transaction(tx)
    assert await ids(database) == inside == ([] if first in WITHOUT_EFFECT else [1])


async def test_a_first_statement_whose_types_the_driver_must_look_up_is_in_the_transaction(database: Database):
    """It does so with statements of its own."""
    async with database.transaction() as tx:
        await tx.execute("CREATE TYPE pair AS (a integer, b text)")
    with pytest.raises(KeyError):
        async with database.transaction() as tx:
            rows = await tx.fetch_values(object, "INSERT INTO things VALUES (1, 'x') RETURNING (id::int, name)::pair")
            assert len(rows) == 1
            raise KeyError
    assert await ids(database) == []
    async with database.transaction() as tx:
        await tx.execute("DROP TYPE pair")


async def test_the_answer_is_that_of_the_statement(database: Database):
    async with database.transaction() as tx:
        assert await tx.execute("INSERT INTO things SELECT n, 'x' FROM generate_series($1::int, 3) AS n", 1) == 3
    async with database.transaction() as tx:
        assert await tx.fetch_values(int, "SELECT id FROM things ORDER BY id") == [1, 2, 3]
    async with database.transaction() as tx:
        assert await tx.execute("DELETE FROM things") == 3


FAILING: dict[str, tuple[str, tuple[object, ...], type[Exception]]] = {
    "of the statement": ("INSERT INTO things (id, name) VALUES ($1, NULL)", (1,), asyncpg.NotNullViolationError),
    "without values": ("INSERT INTO nothing VALUES (1)", (), asyncpg.UndefinedTableError),
    "of its text": ("INSERT INTO things VALUES ($1", (1,), asyncpg.PostgresSyntaxError),
    "of a value": ("DELETE FROM things WHERE id = $1", ("one",), asyncpg.DataError),
}


@pytest.mark.parametrize(("sql", "values", "error"), FAILING.values(), ids=FAILING)
@pytest.mark.parametrize("is_caught", [False, True], ids=["raised", "caught inside"])
async def test_a_first_statement_that_fails_leaves_a_clean_connection(
    database: Database, sql: str, values: tuple[object, ...], error: type[Exception], *, is_caught: bool
):
    reported: list[Any] = []  # the driver would say so if it found an open transaction, and end it itself
    asyncio.get_running_loop().set_exception_handler(lambda _loop, problem: reported.append(problem))
    for _ in range(2):
        with pytest.raises(RolledBackError if is_caught and error is not asyncpg.DataError else error):
            async with database.transaction() as tx:
                with contextlib.suppress(*[error] if is_caught else []):
                    await tx.execute(sql, *values)
                if is_caught and error is asyncpg.DataError:
                    raise error
    async with database.read() as tx:
        assert not await in_one_transaction(tx)
    async with database.transaction() as tx:
        await tx.execute(INSERT)
    assert await ids(database) == [1]
    assert reported == []


async def test_a_transaction_without_a_statement_asks_the_server_nothing(database: Database):
    for fails in (False, True, False):
        try:
            async with database.transaction():
                if fails:
                    raise KeyError
        except KeyError:
            pass
        async with database.read() as tx:
            assert not await in_one_transaction(tx)


async def test_a_transaction_that_only_emits_events_commits_them(cluster: Cluster):
    """With the first of a connection, and with the later ones, whose statement is prepared."""
    migrations = topology.migrations("products")
    async with fresh_dsn(cluster, "products", migrations) as dsn, opened(dsn, size=1) as database:
        for n in range(3):
            async with database.transaction() as tx:
                tx.emit([Outgoing("product.updated", "product", n, 1, Empty())])
        async with database.read() as tx:
            assert await tx.fetch_values(int, "SELECT count(*) FROM outbox") == [3]
            assert not await in_one_transaction(tx)


async def test_a_first_statement_that_is_cancelled_is_rolled_back(database: Database):
    for sql in ("SELECT pg_sleep(60)", "SELECT pg_sleep($1)"):
        inside = asyncio.Event()

        async def wait(sql: str = sql, inside: asyncio.Event = inside) -> None:
            async with database.transaction() as tx:
                inside.set()
                await tx.execute(sql, *([60] if "$" in sql else []))

        task = asyncio.create_task(wait())
        await until_true(inside.is_set)
        await asyncio.sleep(0.05)  # the statement may be on its way, or run
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with database.read() as tx:
            assert not await in_one_transaction(tx)
