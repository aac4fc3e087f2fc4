"""The seam to PostgreSQL: what commits, what is translated, what is left behind, and what survives a bad day."""

# What fails stands inside a transaction, which is a block.
# ruff: noqa: PT012

from __future__ import annotations

import ast
import asyncio
import contextlib
import functools
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any, cast

import asyncpg
import pytest
import pytest_asyncio
from asyncpg.protocol import protocol

import mercato
from mercato.chassis.contract import Actor, Contract, HandlerRun, Message, Unavailable, current, handler_run, single
from mercato.chassis.observability.telemetry import Telemetry
from mercato.chassis.postgres import connections
from mercato.chassis.postgres.database import (
    COUNTS_WAITING,
    Database,
    LockTimeout,
    RolledBackError,
    Row,
    Tx,
    UniqueViolation,
)
from mercato.chassis.rpc.batching import RemoteCallInTransactionError
from mercato.chassis.rpc.client import Connector, acting
from mercato.chassis.rpc.server import LocalTransport, Server
from mercato.embedded_postgres import EmbeddedPostgres, remove_cluster
from mercato.testing import databases
from mercato.testing.cluster import Cluster
from mercato.testing.waiting import until_true

PACKAGE = Path(mercato.__file__).parent
MIGRATIONS = Path(__file__).with_name("migrations_for_tests")


class ThingRow(Row, frozen=True, gc=False):
    id: int
    name: str


opened = functools.partial(databases.opened, name="things")


@pytest_asyncio.fixture
async def dsn(cluster: Cluster) -> AsyncGenerator[str]:
    async with databases.fresh_dsn(cluster, "things", MIGRATIONS) as made:
        yield made


@pytest_asyncio.fixture
async def database(dsn: str) -> AsyncGenerator[Database]:
    async with opened(dsn) as made:
        yield made


@pytest.fixture
def made() -> Any:
    """The running attempt of a handler."""
    token = handler_run.set(HandlerRun())
    yield handler_run.get()
    handler_run.reset(token)


async def add(tx: Tx, number: int, name: str = "thing") -> int:
    return await tx.execute("INSERT INTO things (id, name) VALUES ($1, $2)", number, name)


async def ids(database: Database) -> list[int]:
    async with database.read() as tx:
        return await tx.fetch_values(int, "SELECT id FROM things ORDER BY id")


async def backends(cluster: Cluster, dsn: str, statement: str) -> Any:
    """Does something to the backends of a database, as the administrator."""
    connection = await asyncpg.connect(cluster.server.admin_dsn)
    try:
        return await connection.fetchval(statement, dsn.partition("?")[0].rpartition("/")[2])
    finally:
        await connection.close()


async def kill_backends(cluster: Cluster, dsn: str) -> int:
    return await backends(
        cluster, dsn, "SELECT count(pg_terminate_backend(pid, 5000)) FROM pg_stat_activity WHERE datname = $1"
    )


def end_backend(tx: Tx) -> None:
    """Ends the backend of a transaction, while the event loop cannot notice that the connection is lost."""
    pid = tx._lease.connection.get_server_pid()
    os.kill(pid, signal.SIGTERM)
    while Path(f"/proc/{pid}").exists():
        time.sleep(0.01)


class TestTurns:
    async def test_slow_reads_leave_a_connection_for_writes(self, database: Database):
        """More reads than there are connections, none of which ends before the write has been made."""
        release, reading = asyncio.Event(), 0
        await fill(database)

        async def read_slowly() -> list[int]:
            nonlocal reading
            async with database.read() as tx:
                reading += 1
                await release.wait()
                return await tx.fetch_values(int, "SELECT id FROM things")

        reads = [asyncio.create_task(read_slowly()) for _ in range(database.size * 2)]
        await until_true(lambda: reading >= database.size - 1)
        assert reading == database.size - 1
        async with database.transaction() as tx:
            await add(tx, 1)
        release.set()

        assert await asyncio.gather(*reads) == [[1]] * len(reads)
        assert reading == len(reads)

    async def test_a_read_without_a_free_connection_is_unavailable_and_delays_no_other(
        self, database: Database, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr("mercato.chassis.postgres.database.ACQUIRE_SECONDS", 0.01)
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(database.size - 1):
                await stack.enter_async_context(database.read())
            for _ in range(3):
                with pytest.raises(Unavailable):
                    await ids(database)
        assert await asyncio.gather(*(ids(database) for _ in range(database.size - 1)))

    async def test_a_count_that_takes_too_long_is_given_up_and_ended_on_the_server(self, dsn: str, database: Database):
        async def slow(tx: Tx) -> int:
            return (await tx.fetch_values(int, "SELECT 1 FROM pg_sleep(3600)"))[0]

        async def fast(tx: Tx) -> int:
            return (await tx.fetch_values(int, "SELECT count(*) FROM things"))[0]

        await fill(database)
        counted = await asyncio.gather(database.count(slow, seconds=0.2), database.count(fast, seconds=600))
        await until_none_sleeps(dsn)

        assert counted == [None, len(await ids(database))]

    async def test_counts_leave_the_connections_to_other_reads(self, database: Database):
        """However many are asked for, one is made at a time."""
        release, counting = asyncio.Event(), 0

        async def count(_: Tx) -> int:
            nonlocal counting
            counting += 1
            await release.wait()
            return counting

        counts = [asyncio.create_task(database.count(count, seconds=600)) for _ in range(COUNTS_WAITING + 4)]
        await until_true(lambda: counting > 0)
        assert await asyncio.gather(*(ids(database) for _ in range(2 * database.size))) == [[]] * (2 * database.size)
        assert counting == 1
        assert [task.result() for task in counts if task.done()] == [None] * 3  # as many wait as may
        release.set()
        assert [n for n in await asyncio.gather(*counts) if n] == list(range(1, COUNTS_WAITING + 2))


class TestStatements:
    async def test_rows_values_and_counts(self, database: Database):
        async with database.transaction() as tx:
            assert await tx.execute("INSERT INTO things SELECT n, 'n' || n FROM generate_series(1, 3) AS n") == 3
            assert await tx.fetch(ThingRow, "SELECT id, name FROM things WHERE id < 3 ORDER BY id") == [
                ThingRow(1, "n1"),
                ThingRow(2, "n2"),
            ]
            assert await tx.fetch_one(ThingRow, "SELECT id, name FROM things WHERE id = $1", 3) == ThingRow(3, "n3")
            assert await tx.fetch_one(ThingRow, "SELECT id, name FROM things WHERE id = $1", 4) is None
            assert await tx.execute("SET LOCAL lock_timeout = '1s'") == 0

    @pytest.mark.parametrize(
        "statement",
        [
            "INSERT INTO things (id, name) VALUES (1, 'x')",
            "update things set name = 'x'",
            "WITH gone AS (DELETE FROM things RETURNING id) SELECT id FROM gone",
            "SELECT nextval('things_number')",
            "SELECT id FROM things FOR UPDATE",
            "SELECT id FROM things FOR NO KEY UPDATE",
            "LOCK TABLE things",
            "SET lock_timeout = 5",
            "SELECT id INTO more FROM things",
        ],
    )
    async def test_a_read_refuses_what_changes_or_locks(self, database: Database, statement: str):
        async with database.read() as tx:
            with pytest.raises(AssertionError, match="does not change"):
                await tx.execute(statement)

    async def test_a_read_takes_what_only_looks_like_a_change(self, database: Database):
        async with database.read() as tx:
            sql = "SELECT 'please UPDATE me' AS a, \"name\" AS updated_at -- DELETE\n FROM things"
            assert await tx.fetch_values(str, sql) == []


class TestTransactions:
    async def test_a_block_that_ends_commits_and_notes_it(self, database: Database, made: HandlerRun):
        async with database.transaction() as tx:
            await add(tx, 1)
            assert made.in_transaction
            assert not made.committed
        assert made.committed
        assert not made.in_transaction
        assert await ids(database) == [1]

    async def test_a_block_that_raises_rolls_back(self, database: Database, made: HandlerRun):
        reported: list[Any] = []  # the driver would say so if it found an open transaction, and end it itself
        asyncio.get_running_loop().set_exception_handler(lambda _loop, problem: reported.append(problem))
        with pytest.raises(KeyError):
            async with database.transaction() as tx:
                await add(tx, 1)
                raise KeyError
        assert not made.committed
        assert not made.in_transaction
        assert await ids(database) == []
        assert reported == []

    async def test_reading_notes_no_commit(self, database: Database, made: HandlerRun):
        await ids(database)
        assert not made.committed

    async def test_an_error_caught_inside_the_block_is_not_taken_for_a_commit(
        self, database: Database, made: HandlerRun
    ):
        """PostgreSQL answers such a COMMIT with a roll-back, and no error."""
        with pytest.raises(RolledBackError):
            async with database.transaction() as tx:
                await add(tx, 1)
                with contextlib.suppress(UniqueViolation):
                    await add(tx, 1)
        assert not made.committed
        assert await ids(database) == []

    async def test_a_commit_that_the_server_refuses_is_no_commit(self, database: Database, made: HandlerRun):
        with pytest.raises(UniqueViolation) as caught:
            async with database.transaction() as tx:
                await tx.execute("INSERT INTO things (id, name, rank) VALUES (1, 'a', 1), (2, 'b', 1)")
        assert caught.value.constraint == "things_rank_key"  # deferred: it speaks at the end
        assert not made.committed

    async def test_a_commit_whose_answer_is_lost_counts_as_one(self, cluster: Cluster, dsn: str, made: HandlerRun):
        async with opened(dsn) as database:
            with pytest.raises(Unavailable):
                async with database.transaction() as tx:
                    await add(tx, 1)
                    await kill_backends(cluster, dsn)
            assert made.committed

    async def test_a_first_commit_is_not_forgotten_when_the_second_fails(self, database: Database, made: HandlerRun):
        async with database.transaction() as tx:
            await add(tx, 1)
        with pytest.raises(UniqueViolation):
            async with database.transaction() as tx:
                await add(tx, 1)
        assert made.committed

    @pytest.mark.parametrize("inside_handler", [True, False], ids=["handler", "loop"])
    async def test_no_remote_call_inside_a_transaction(self, database: Database, inside_handler: bool):
        token = handler_run.set(HandlerRun() if inside_handler else None)
        connector, things = remote_things()
        context = current.set(acting(Actor("service"), clock=connector._clock, seconds=5))
        try:
            async with database.transaction():
                with pytest.raises(RemoteCallInTransactionError):
                    things.look(Look())
                async with database.transaction():
                    pass
                with pytest.raises(RemoteCallInTransactionError):  # the outer one is still open
                    things.look(Look())
            await things.look(Look())
        finally:
            current.reset(context)
            handler_run.reset(token)
            await connector.close()

    async def test_a_cancelled_transaction_rolls_back_and_gives_its_connection_back(self, dsn: str):
        async with opened(dsn, size=1) as database:
            for statement in ("SELECT pg_sleep(60)", "SELECT 1"):
                inside = asyncio.Event()
                task = asyncio.create_task(hold(database, inside, statement))
                await reached(inside, task)
                if "pg_sleep" in statement:
                    await until_it_sleeps(dsn)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert await ids(database) == []  # the only connection is there again, and is in no transaction
            assert await server_pids(database) == 1

    async def test_a_transaction_cancelled_at_any_moment_leaves_a_clean_connection(self, dsn: str):
        """Cancelled after each number of turns in turn: while BEGIN, a statement, COMMIT or ROLLBACK is on its way."""
        problems: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _loop, problem: problems.append(problem["message"]))
        async with opened(dsn, size=1) as database:
            for turns in range(40):
                task = asyncio.create_task(add_and_fail(database, turns))
                for _ in range(turns):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                async with database.transaction() as tx:
                    await tx.execute("DELETE FROM things")
                assert await ids(database) == []
        assert problems == []

    async def test_a_transaction_whose_rollback_is_cancelled_too_leaves_a_clean_connection(self, dsn: str):
        async with opened(dsn, size=1) as database:
            for again in range(12):
                inside = asyncio.Event()
                task = asyncio.create_task(hold(database, inside, "SELECT pg_sleep(60)"))
                await reached(inside, task)
                await until_it_sleeps(dsn)
                task.cancel()
                for _ in range(again):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                async with database.read() as tx:
                    # Within a transaction that was left open, both times would be the same.
                    times = [await tx.fetch_values(str, "SELECT now()::text") for _ in range(2)]
                assert times[0] != times[1]
                assert await ids(database) == []


class Look(Message):
    pass


class Things(Contract, name="test_db_things"):
    look = single(Look, Look, allow=frozenset())


def remote_things() -> tuple[Connector, Things]:
    from mercato.chassis.observability.clock import SystemClock

    async def look(request: Look) -> Look:
        return request

    clock = SystemClock()
    server = Server(Things, clock)
    server.register(Things.look, look)
    connector = Connector(clock, Telemetry())
    return connector, connector.client(Things, LocalTransport({"test_db_things": server}))


async def reached(inside: asyncio.Event, task: asyncio.Task[None]) -> None:
    """Returns when the task has set the event. Raises what has ended the task before."""
    waiting = asyncio.create_task(inside.wait())
    await asyncio.wait({waiting, task}, return_when=asyncio.FIRST_COMPLETED)
    if not inside.is_set():
        waiting.cancel()
        await task
    assert inside.is_set()


async def until_it_sleeps(dsn: str) -> None:
    """Returns when a statement runs on the server: a request to cancel that comes before it has no effect."""
    connection = await cast(Any, asyncpg).connect(dsn)
    try:
        async with asyncio.timeout(60):
            while not await connection.fetchval(
                """
                SELECT count(*) FROM pg_stat_activity
                 WHERE datname = current_database() AND wait_event = 'PgSleep'
                """
            ):
                await asyncio.sleep(0.01)
    finally:
        await connection.close()


async def until_none_sleeps(dsn: str) -> None:
    connection = await cast(Any, asyncpg).connect(dsn)
    try:
        async with asyncio.timeout(60):
            while await connection.fetchval(
                """
                SELECT count(*) FROM pg_stat_activity
                 WHERE datname = current_database() AND wait_event = 'PgSleep'
                """
            ):
                await asyncio.sleep(0.01)
    finally:
        await connection.close()


async def hold(database: Database, inside: asyncio.Event, statement: str) -> None:
    async with database.transaction() as tx:
        await add(tx, 1)
        inside.set()
        await tx.execute(statement)
        await asyncio.sleep(3_600)


async def add_and_fail(database: Database, number: int) -> None:
    async with database.transaction() as tx:
        await add(tx, number)
        if number % 2:
            raise KeyError


async def server_pids(database: Database) -> int:
    """How many connections the pool has open."""
    assert database._connections
    return database._connections._pool.get_size()


async def backend_of(tx: Tx) -> int:
    return (await tx.fetch_values(int, "SELECT pg_backend_pid()"))[0]


async def backend_of_a_read(database: Database) -> int:
    async with database.read() as tx:
        return await backend_of(tx)


class TestErrors:
    async def test_a_unique_key_is_named(self, database: Database):
        async with database.transaction() as tx:
            await add(tx, 1)
        with pytest.raises(UniqueViolation) as caught:
            async with database.transaction() as tx:
                await add(tx, 1)
        assert caught.value.constraint == "things_pkey"

    async def test_a_lock_that_is_held_is_not_waited_for_longer_than_wanted(self, database: Database):
        async with database.transaction() as tx:
            await add(tx, 1)
            with pytest.raises(LockTimeout):
                async with database.transaction() as other:
                    await other.execute("SET LOCAL lock_timeout = '10ms'")
                    await add(other, 1)

    @pytest.mark.parametrize("value", [2**70, "closed", None.__class__], ids=["too large", "a word", "a class"])
    async def test_a_value_of_the_wrong_type_is_a_bug_and_not_an_outage(self, database: Database, value: Any):
        """As an outage it would fail the whole batch, which is not run again for those."""
        async with database.read() as tx:
            with pytest.raises(asyncpg.DataError, match="invalid input"):
                await tx.fetch_values(int, "SELECT id FROM things WHERE id = $1", value)

    async def test_two_statements_at_once_are_a_bug_and_not_an_outage(self, database: Database):
        async with database.read() as tx:
            first, second = await asyncio.gather(
                tx.execute("SELECT pg_sleep(0.05)"), tx.execute("SELECT 1"), return_exceptions=True
            )
        assert isinstance(first, int)
        assert isinstance(second, asyncpg.InterfaceError)

    async def test_an_error_of_a_statement_is_raised_as_it_is(self, database: Database):
        async with database.read() as tx:
            with pytest.raises(asyncpg.UndefinedTableError) as caught:
                await tx.execute("SELECT 1 FROM nothing")
        assert caught.value.__cause__ is None


class TestOutages:
    async def test_after_all_backends_have_died_the_next_batch_works(self, cluster: Cluster, dsn: str):
        async with opened(dsn) as database:
            await fill(database)
            assert await kill_backends(cluster, dsn) == 4
            assert await ids(database) == []
            await kill_backends(cluster, dsn)
            async with database.transaction() as tx:
                await add(tx, 1)
            assert await ids(database) == [1]

    async def test_a_backend_that_dies_unnoticed_is_replaced_where_nothing_was_done(self, cluster: Cluster, dsn: str):
        """The connection is taken from the pool while it is alive, and dies before its first statement."""
        async with opened(dsn) as database:
            async with database.read() as tx:
                await kill_backends(cluster, dsn)
                assert await tx.fetch_values(int, "SELECT 1") == [1]
                await kill_backends(cluster, dsn)
                with pytest.raises(Unavailable):  # once: a server that goes on dying is not hidden
                    await tx.fetch_values(int, "SELECT 1")
            assert await ids(database) == []

    @pytest.mark.parametrize("values", [(), (1,)], ids=["without values", "with values"])
    async def test_a_backend_that_dies_as_a_transaction_begins_is_replaced(self, dsn: str, values: tuple[int, ...]):
        """Its first statement finds it dead: nothing can have been committed."""
        async with opened(dsn, size=1) as database:
            async with database.transaction() as tx:
                end_backend(tx)
                await tx.execute(f"INSERT INTO things (id, name) VALUES ({'$1' if values else 1}, 'thing')", *values)
            assert await ids(database) == [1]

    async def test_a_backend_that_dies_as_a_transaction_begins_and_cannot_be_replaced_is_unavailable(
        self, cluster: Cluster, dsn: str
    ):
        name = dsn.partition("?")[0].rpartition("/")[2]
        async with opened(dsn, size=1) as database:
            with pytest.raises(Unavailable):
                async with database.transaction() as tx:
                    await cluster.execute(f'ALTER DATABASE "{name}" WITH ALLOW_CONNECTIONS false')
                    end_backend(tx)
                    await add(tx, 1)
            await cluster.execute(f'ALTER DATABASE "{name}" WITH ALLOW_CONNECTIONS true')
            assert await ids(database) == []

    async def test_a_backend_that_dies_inside_a_transaction_fails_it(
        self, cluster: Cluster, dsn: str, made: HandlerRun
    ):
        async with opened(dsn) as database:
            with pytest.raises(Unavailable):
                async with database.transaction() as tx:
                    await add(tx, 1)
                    await kill_backends(cluster, dsn)
                    await add(tx, 2)
            assert not made.committed
            assert await ids(database) == []

    async def test_a_database_that_takes_no_connections_is_unavailable_until_it_does(self, cluster: Cluster, dsn: str):
        name = dsn.partition("?")[0].rpartition("/")[2]
        async with opened(dsn) as database:
            await cluster.execute(f'ALTER DATABASE "{name}" WITH ALLOW_CONNECTIONS false')
            await kill_backends(cluster, dsn)
            for _ in range(2):
                with pytest.raises(Unavailable):
                    await ids(database)
                with pytest.raises(Unavailable):
                    async with database.transaction() as tx:
                        await add(tx, 1)
            with pytest.raises(Unavailable):
                async with opened(dsn):
                    pass
            await cluster.execute(f'ALTER DATABASE "{name}" WITH ALLOW_CONNECTIONS true')
            assert await ids(database) == []

    async def test_a_role_that_may_not_connect_is_unavailable(self, cluster: Cluster, dsn: str):
        with pytest.raises(Unavailable):
            async with opened(dsn.replace("password", "wrong")):
                pass

    async def test_a_pool_that_is_exhausted_is_waited_for_a_bounded_time(
        self, dsn: str, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(connections, "ACQUIRE_SECONDS", 0.05)
        async with opened(dsn, size=1) as database:
            async with database.read():
                with pytest.raises(Unavailable):
                    await ids(database)
            assert await ids(database) == []

    async def test_close_waits_for_what_runs(self, dsn: str):
        database = Database(dsn, "things", Telemetry(), size=2)
        await database.open()
        inside, done = asyncio.Event(), []

        async def slow() -> None:
            async with database.transaction() as tx:
                inside.set()
                await tx.execute("SELECT pg_sleep(0.1)")
                await add(tx, 1)
            done.append(True)

        task = asyncio.create_task(slow())
        await reached(inside, task)
        started = asyncio.get_running_loop().time()
        await database.close()
        assert done == [True]
        assert asyncio.get_running_loop().time() - started < connections.CLOSE_SECONDS  # it did not wait in vain either
        await task
        with pytest.raises(Unavailable):
            await ids(database)
        await database.close()

    async def test_a_server_that_is_stopped_and_started_again(self):
        folder = Path(tempfile.mkdtemp(prefix="mercato-test-"))
        os.chmod(folder, 0o755)  # the account that PostgreSQL runs as under root must be able to pass through
        data = folder / "data"
        os.mkdir(data, 0o755)
        server = await EmbeddedPostgres.start(data, password="p", progress=lambda line: None)
        try:
            async with opened(server.admin_dsn) as database:
                await fill(database)
                await server.stop()
                for _ in range(2):
                    with pytest.raises(Unavailable):
                        async with database.read() as tx:
                            await tx.fetch_values(int, "SELECT 1")
                server = await EmbeddedPostgres.start(data, password="p", progress=lambda line: None)
                async with database.transaction() as tx:
                    assert await tx.fetch_values(int, "SELECT 1") == [1]
        finally:
            await server.stop()
            remove_cluster(data)
            shutil.rmtree(folder)


async def fill(database: Database) -> None:
    """Opens every connection of the pool."""
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(database.transaction())
        for _ in range(database.size - 1):
            await stack.enter_async_context(database.read())


class TestConnections:
    async def test_the_connection_that_was_used_last_is_used_next(self, dsn: str):
        async with opened(dsn) as database:
            async with database.read() as one, database.read() as two:
                pids = {await backend_of(one), await backend_of(two)}
            used = [await backend_of_a_read(database) for _ in range(5)]
            assert await server_pids(database) == len(pids) == 2
            assert len(set(used)) == 1
            assert set(used) <= pids

    async def test_a_released_connection_goes_to_a_waiting_caller(self, dsn: str):
        async with opened(dsn, size=1) as database:
            async with database.read():
                waiting = [asyncio.create_task(ids(database)) for _ in range(20)]
                await asyncio.sleep(0)
            assert await asyncio.gather(*waiting) == [[]] * 20

    async def test_many_transactions_that_commit_fail_or_are_cancelled_share_a_few_connections(self, dsn: str):
        async with opened(dsn, size=3) as database:
            for turns in range(30):
                tasks = [asyncio.create_task(add_and_fail(database, 100 * turns + n)) for n in range(12)]
                for _ in range(turns):
                    await asyncio.sleep(0)
                tasks[turns % 12].cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                assert await server_pids(database) <= 3
            async with database.read() as one, database.read() as two, database.transaction() as three:
                pids = [await backend_of(tx) for tx in (one, two, three)]
            assert len(set(pids)) == 3
            assert all(number % 2 == 0 for number in await ids(database))

    async def test_connections_that_were_idle_when_the_server_went_away_are_replaced(self, cluster: Cluster, dsn: str):
        async with opened(dsn, size=3) as database:
            async with database.read(), database.read(), database.transaction():
                pass
            assert await kill_backends(cluster, dsn) >= 1
            found = await asyncio.gather(*(ids(database) for _ in range(12)))
            assert found == [[]] * 12
            assert await server_pids(database) <= 3

    async def test_close_closes_idle_connections_and_those_that_are_released_later(self, cluster: Cluster, dsn: str):
        database = Database(dsn, "things", Telemetry(), size=3)
        await database.open()
        async with database.read() as busy:
            async with database.read():
                pass
            closing = asyncio.create_task(database.close())
            await asyncio.sleep(0)
            assert await busy.fetch_values(int, "SELECT 1") == [1]
        await closing
        assert await kill_backends(cluster, dsn) == 0


class TestNothingIsLeftOnAConnection:
    async def test_settings_of_a_transaction_end_with_it(self, dsn: str):
        async with opened(dsn, size=1) as database:
            async with database.read() as tx:
                before = await tx.fetch(SettingRow, SETTINGS)
            for fails in (False, True):
                with contextlib.suppress(KeyError):
                    async with database.transaction() as tx:
                        await tx.execute("SET LOCAL lock_timeout = '2s'")
                        await tx.execute("SET LOCAL statement_timeout = '3s'")
                        assert await tx.fetch(SettingRow, SETTINGS) != before
                        if fails:
                            raise KeyError
                async with database.read() as tx:
                    assert await tx.fetch(SettingRow, SETTINGS) == before

    def test_the_code_sets_nothing_for_a_session_and_takes_no_lock_of_one(self):
        found = {
            f"{path.relative_to(PACKAGE)}:{line}": text
            for path in PACKAGE.rglob("*.py")
            if path.name not in CONNECTIONS_OF_THEIR_OWN
            for line, text in session_state(path.read_text())
        }
        assert {key: text for key, text in found.items() if text != PREPARED_ONCE} == {}

    @pytest.mark.parametrize(
        "injected",
        [
            'await tx.execute("SET lock_timeout = 1")',
            'await tx.execute("  set search_path to x")',
            'await tx.execute("SET SESSION x = 1")',
            'await tx.fetch(X, "SELECT pg_advisory_lock(1)")',
            'await tx.fetch(X, "SELECT pg_try_advisory_lock(1)")',
            'await tx.execute("SELECT set_config($1, $2, false)")',
            'await tx.execute("LISTEN x")',
            'await tx.execute("PREPARE x AS SELECT 1")',
            'await tx.execute("CREATE TEMP TABLE x (y int)")',
            'await tx.execute("DECLARE x CURSOR WITH HOLD FOR SELECT 1")',
        ],
    )
    def test_a_statement_that_changes_the_session_is_found(self, injected: str):
        assert len(list(session_state(injected))) == 1

    def test_a_setting_that_ends_with_the_transaction_is_not_reported(self):
        source = '["SET LOCAL x = 1", "SELECT pg_advisory_xact_lock(1)", "UPDATE x\\n   SET y = 1", "SET_ROLE"]'
        assert list(session_state(source)) == []


class TestTheDriversTypes:
    def test_the_driver_looks_at_the_type_of_a_value_alone(self):
        driver: Any = protocol
        assert driver.IterableABC == driver.SizedABC == (list, tuple)
        assert driver.MappingABC is dict

    async def test_lists_and_tuples_are_arrays_and_a_set_is_none(self, database: Database):
        sql = "SELECT n FROM unnest($1::bigint[]) AS n"
        async with database.read() as tx:
            assert await tx.fetch_values(int, sql, [1, 2]) == await tx.fetch_values(int, sql, (1, 2)) == [1, 2]
            assert await tx.fetch_values(int, "SELECT cardinality($1::text[])", ["it", "is"]) == [2]
            with pytest.raises(asyncpg.DataError):
                await tx.fetch_values(int, sql, {1, 2})

    def test_a_driver_without_these_names_is_left_as_it_is(self):
        class Newer:
            IterableABC = object

        assert not connections.check_containers_by_type(Newer)
        assert Newer.IterableABC is object

    def test_the_version_is_pinned(self):
        for name in ("runtime", "dev"):
            pinned = (PACKAGE.parent / "requirements" / f"{name}.txt").read_text()
            assert f"asyncpg=={asyncpg.__version__} " in pinned


class SettingRow(Row, frozen=True, gc=False):
    name: str
    setting: str


SETTINGS = "SELECT name, setting FROM pg_settings ORDER BY name"

# Migrating, provisioning and copying use connections that are not used after them.
CONNECTIONS_OF_THEIR_OWN = {"migrations.py", "provisioning.py", "new_databases.py", "cluster.py", "copying.py"}

PREPARED_ONCE = "PREPARE mercato_events_"
"""The statement that writes events: the next user of the connection wants the same."""

SESSION_STATE = re.compile(
    r"^\s*(SET\s+(?!LOCAL\b)\w+|LISTEN\s|PREPARE\s|LOAD\s)|pg_(try_)?advisory_lock"
    r"|set_config(?!\([^)]*, true\))|CREATE\s+(TEMP|TEMPORARY)\b"
    r"|WITH\s+HOLD",
    re.IGNORECASE,
)


def session_state(source: str) -> Iterator[tuple[int, str]]:
    """Strings of a module that would change a connection for its next user; docstrings left out."""
    tree = ast.parse(source)
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str) or id(node) in prose:
            continue
        if SESSION_STATE.search(node.value):
            yield node.lineno, node.value
