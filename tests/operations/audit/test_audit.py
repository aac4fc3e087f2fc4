"""The audit as a whole, on real databases: what it reads, what it leaves, what it does beside others."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import asyncpg
import msgspec
import pytest
import pytest_asyncio

from mercato.chassis.postgres.dsn import NO_SECRETS, shown, with_database
from mercato.operations.audit.checking import audit, check
from mercato.operations.audit.invariants import SHOP
from mercato.operations.audit.tables import WANTED, prepare
from mercato.operations.copying import SCRATCH, CopyError, Table, begin_together, copied, located, one_moment
from mercato.testing.cluster import Cluster
from mercato.testing.tables import connected
from operations.audit.sample_shop import THEN, build, client_history

SECONDS_AHEAD = datetime.timedelta(seconds=600)


@pytest_asyncio.fixture
async def dsns(cluster: Cluster) -> AsyncGenerator[Mapping[str, str]]:
    made = await build(cluster)
    yield made
    for dsn in made.values():
        await cluster.release_database(dsn)


async def schemas(cluster: Cluster) -> set[str]:
    """Of the scratch database, but for PostgreSQL's own."""
    async with connected(with_database(cluster.server.admin_dsn, SCRATCH)) as connection:
        names = await connection.fetch("SELECT nspname FROM pg_namespace WHERE nspname !~ '^pg_'")
    return {row["nspname"] for row in names} - {"information_schema", "public"}


async def violated(cluster: Cluster, dsns: Mapping[str, str], **options: Any) -> list[str]:
    report = await audit(cluster.server.admin_dsn, dsns, **options)
    return [finding.name for finding in report.violated]


async def test_a_right_shop_passes_and_nothing_is_left(cluster: Cluster, dsns: Mapping[str, str]):
    lines: list[str] = []

    report = await audit(cluster.server.admin_dsn, dsns, history=client_history(), progress=lines.append)

    assert report.violated == ()
    assert report.copied_rows > 100
    assert {finding.group for finding in report.findings} == {
        "money", "stock", "orders", "idempotency", "events", "clients"
    }  # fmt: skip
    assert "copying orders" in lines
    assert await schemas(cluster) == set()


async def test_a_violation_in_the_real_databases_is_found(cluster: Cluster, dsns: Mapping[str, str]):
    async with connected(dsns["inventory"]) as connection:
        await connection.execute("UPDATE levels SET on_hand = on_hand + 1 WHERE product_id = 1")

    assert await violated(cluster, dsns) == ["S2"]


async def test_without_the_clients_only_the_databases_are_asked(cluster: Cluster, dsns: Mapping[str, str]):
    report = await audit(cluster.server.admin_dsn, dsns)

    assert "clients" not in {finding.group for finding in report.findings}


async def test_rows_that_changed_just_now_are_checked_without_a_time_to_settle(
    cluster: Cluster, dsns: Mapping[str, str]
):
    async with connected(dsns["orders"]) as connection:
        await connection.execute("UPDATE orders SET refunded_minor = 50, updated_at = now() WHERE id = 5")

    assert await violated(cluster, dsns, settled_seconds=60) == []
    assert await violated(cluster, dsns, settled_seconds=0) == ["M5"]


UNDER_WAY_AN_HOUR_AGO = """
    UPDATE sagas SET step = 'reserve', wake_at = updated_at WHERE subject_id = 4;
"""


async def test_a_stopped_shop_is_checked_as_of_its_last_activity(cluster: Cluster, dsns: Mapping[str, str]):
    async with connected(dsns["orders"]) as connection:
        await connection.execute(UNDER_WAY_AN_HOUR_AGO)
    async with connected(dsns["events"]) as connection:
        await connection.execute("UPDATE cursors SET position = 1 << 12 WHERE source = 'orders'")

    assert await violated(cluster, dsns) == ["O4", "E1"]
    report = await audit(cluster.server.admin_dsn, dsns, is_stopped=True)

    assert report.violated == ()
    assert report.as_of == THEN


async def test_a_wait_that_has_ended_since_the_shop_was_stopped_is_no_violation(
    cluster: Cluster, dsns: Mapping[str, str]
):
    async with connected(dsns["orders"]) as connection:
        await connection.execute("UPDATE sagas SET wake_at = updated_at + interval '1 s' WHERE step = 'awaiting'")

    assert await violated(cluster, dsns) == ["O4"]
    assert await violated(cluster, dsns, is_stopped=True) == []
    assert await violated(cluster, dsns, is_stopped=True, settled_seconds=0) == []


async def test_work_that_was_overdue_at_the_last_sign_of_life_is_a_violation(cluster: Cluster, dsns: Mapping[str, str]):
    """The shop sold nothing any more, but its consumers went on reading for a while."""
    async with connected(dsns["orders"]) as connection:
        await connection.execute(UNDER_WAY_AN_HOUR_AGO)
    async with connected(dsns["events"]) as connection:
        await connection.execute("UPDATE cursors SET position = 1 << 12 WHERE source = 'orders'")
    async with connected(dsns["payments"]) as connection:
        await connection.execute("INSERT INTO outbox_readers VALUES ('events.feed', 1, now() - interval '10 min')")

    assert await violated(cluster, dsns, is_stopped=True) == ["O4", "E1"]


async def test_a_restored_shop_is_checked_as_of_its_backup_where_the_clock_of_one_server_was_ahead(
    cluster: Cluster, dsns: Mapping[str, str]
):
    async with connected(dsns["orders"]) as connection:
        await connection.execute(UNDER_WAY_AN_HOUR_AGO)
    async with connected(dsns["payments"]) as connection:
        await connection.execute("INSERT INTO outbox_readers VALUES ('events.feed', 1, $1)", THEN + SECONDS_AHEAD)

    assert await violated(cluster, dsns, is_stopped=True) == ["O4"]
    report = await audit(cluster.server.admin_dsn, dsns, is_stopped=True, stopped_at=THEN)

    assert (report.violated, report.as_of) == ((), THEN)


async def test_the_reference_time_is_that_of_the_clock_which_is_behind(cluster: Cluster, dsns: Mapping[str, str]):
    """What was changed on the other servers is settled later, and is not checked too early."""
    lines: list[str] = []
    async with one_moment(dsns, progress=print) as moment:
        snapshots = {**moment.snapshots}
        connection, clock = snapshots["users"]
        snapshots["users"] = connection, clock - SECONDS_AHEAD
        skewed = msgspec.structs.replace(moment, snapshots=snapshots)
        report = await audit(cluster.server.admin_dsn, dsns, moment=skewed, progress=lines.append)

    assert report.as_of == report.taken_at == clock - SECONDS_AHEAD
    assert SECONDS_AHEAD.total_seconds() <= report.clock_difference_seconds
    [notice] = [line for line in lines if "clocks" in line]
    assert notice.endswith("work counts as finished so much later; synchronize them")


class RecordedConnection:
    """Records what is executed. Its server is slow to tell the time: it answers `before` other queries first."""

    def __init__(self, connection: Any, done: list[str], before: int = 0) -> None:
        self._connection = connection
        self._done = done
        self._before = before

    async def fetchval(self, query: str) -> Any:
        for _ in range(self._before):
            await self._connection.fetchval("SELECT 1")
        found = await self._connection.fetchval(query)
        self._done.append("clock")
        return found

    async def execute(self, query: str) -> None:
        self._done.append("snapshot")
        await self._connection.execute(query)


async def test_no_snapshot_is_taken_before_the_clock_of_each_server_was_read(dsns: Mapping[str, str]):
    """Else an event could be in the feed by a time of one server, and not in the outbox of another."""
    done: list[str] = []
    async with connected(dsns["orders"]) as slow, connected(dsns["events"]) as fast:
        opened = {"orders": RecordedConnection(slow, done, before=50), "events": RecordedConnection(fast, done)}
        clocks = await begin_together(opened)
        assert {await connection.fetchval("SELECT now()") > clocks["orders"] for connection in (slow, fast)} == {True}

    assert done == ["clock", "clock", *["snapshot"] * 4]


async def test_of_two_audits_at_once_the_second_waits_until_the_copies_of_the_first_are_gone(
    cluster: Cluster, dsns: Mapping[str, str]
):
    lines: asyncio.Queue[str] = asyncio.Queue()
    async with copied(cluster.server.admin_dsn, dsns, WANTED, progress=print):
        second = asyncio.create_task(audit(cluster.server.admin_dsn, dsns, progress=lines.put_nowait))
        first_line = await lines.get()
    report = await second

    assert first_line == "waiting for others to finish with their copies"
    assert report.violated == ()


async def test_a_cancelled_audit_leaves_nothing_and_delays_no_other(cluster: Cluster, dsns: Mapping[str, str]):
    copying = asyncio.Event()

    def progress(line: str) -> None:
        if line == "copying payments":
            copying.set()

    running = asyncio.create_task(audit(cluster.server.admin_dsn, dsns, progress=progress))
    await copying.wait()
    running.cancel()
    await asyncio.wait({running})

    assert running.cancelled()
    assert await violated(cluster, dsns) == []
    assert await schemas(cluster) == set()


OURS = "SELECT pid FROM pg_stat_activity WHERE application_name = 'mercato-copying' AND datname = $1"


async def test_an_audit_that_is_cancelled_during_a_query_ends_it_on_the_server(
    cluster: Cluster, dsns: Mapping[str, str]
):
    """It would hold the lock of the copies until the question is answered: every other audit waits for that."""
    async with connected(cluster.server.admin_dsn) as admin:
        running = asyncio.create_task(ask_for_ever(cluster, dsns))
        while not await admin.fetch(f"{OURS} AND query LIKE '%pg_sleep%' AND state = 'active'", SCRATCH):
            await asyncio.sleep(0.05)
        running.cancel()
        await asyncio.wait({running})

        async with asyncio.timeout(60):
            while await admin.fetch(OURS, SCRATCH):
                await asyncio.sleep(0.05)


async def ask_for_ever(cluster: Cluster, dsns: Mapping[str, str]) -> None:
    async with copied(cluster.server.admin_dsn, dsns, WANTED, progress=print) as copies:
        await copies.fetch("SELECT pg_sleep(3600)")


async def test_a_server_that_goes_away_while_it_is_asked_is_a_sentence(cluster: Cluster, dsns: Mapping[str, str]):
    async with copied(cluster.server.admin_dsn, dsns, WANTED, progress=print) as copies:
        await prepare(copies, settled_seconds=60, history=None)
        async with connected(cluster.server.admin_dsn) as admin:
            await admin.fetch(f"SELECT pg_terminate_backend(pid) FROM ({OURS}) ours", SCRATCH)
        with pytest.raises(CopyError, match="the copies cannot be used"):
            await check(copies, SHOP)


async def test_a_wrong_query_raises(cluster: Cluster, dsns: Mapping[str, str]):
    async with copied(cluster.server.admin_dsn, dsns, WANTED, progress=print) as copies:
        with pytest.raises(asyncpg.UndefinedTableError):
            await copies.fetch("SELECT * FROM nothing")


async def test_a_database_of_another_version_is_named(cluster: Cluster, dsns: Mapping[str, str]):
    async with connected(dsns["orders"]) as connection:
        await connection.execute("ALTER TABLE sagas RENAME COLUMN tries TO attempts")

    with pytest.raises(CopyError, match="the database of orders is of another version"):
        await audit(cluster.server.admin_dsn, dsns)


async def test_a_server_that_is_not_there_is_named_without_its_password(tmp_path: Any):
    dsn = f"postgresql://admin:hunter2@/postgres?host={tmp_path}&port=5432"

    with pytest.raises(CopyError, match="cannot be reached") as refusal:
        await located(dsn, ["orders"])

    assert "hunter2" not in str(refusal.value)


@pytest.mark.parametrize(
    ("dsn", "seen"),
    [
        ("postgresql://admin:hunter2@shop.example:5432/postgres", "shop.example:5432/postgres"),
        ("postgres://shop.example/postgres?user=admin&password=hunter2", "shop.example/postgres"),
        ("postgresql://admin@/postgres?host=/run/pg&port=5432&password=hunter2", "/run/pg:5432/postgres"),
        ("postgresql:///postgres", "localhost/postgres"),
        ("host=shop.example user=admin password=hunter2", NO_SECRETS),
        ("postgresql://[bad/hunter2", NO_SECRETS),
        ("postgresql://admin:hun/ter2@shop.example/postgres", NO_SECRETS),
        ("postgresql://admin:5432/hunter2@shop.example/postgres", NO_SECRETS),
        ("postgresql://admin:5432?hunter2@shop.example/postgres", NO_SECRETS),
        ("postgresql://admin:5432#hunter2@shop.example/postgres", NO_SECRETS),
        ("postgresql://shop.example/postgres?password=hunter2@home", NO_SECRETS),
    ],
)
async def test_of_a_dsn_only_host_port_and_database_are_shown(dsn: str, seen: str):
    assert shown(dsn) == seen


@pytest.mark.parametrize(
    "dsn", ["postgresql://admin:hunter2/x@h/y", "host=h password=hunter2", "postgresql://[hunter2/"]
)
async def test_what_is_no_dsn_is_refused_without_its_password(dsn: str):
    with pytest.raises(CopyError, match="a DSN has the form") as refusal:
        await located(dsn, ["orders"])

    assert "hunter2" not in str(refusal.value)


async def test_a_server_without_the_shop_is_named(cluster: Cluster):
    with pytest.raises(CopyError, match=r"has no database unknown_orders: start a shop on that server once") as refusal:
        await located(cluster.server.admin_dsn, ["orders"], prefix="unknown_")

    assert "test-password" not in str(refusal.value)


async def test_copies_of_one_database_are_one_snapshot_while_others_write(cluster: Cluster, dsns: Mapping[str, str]):
    """A writer moves pieces from one table to the other all the time; in each copy they add up."""
    async with connected(dsns["inventory"]) as connection:
        await connection.execute("CREATE TABLE here AS SELECT 0 AS pieces FROM generate_series(1, 20000)")
        await connection.execute("CREATE TABLE there AS SELECT 0 AS pieces FROM generate_series(1, 20000)")
        moved = await move_until_copied(cluster, dsns["inventory"], rounds=3)
        await connection.execute("DROP TABLE here, there")

    assert moved


async def move_until_copied(cluster: Cluster, dsn: str, rounds: int) -> int:
    moves, done = 0, asyncio.Event()

    async def move() -> None:
        nonlocal moves
        async with connected(dsn) as writer:
            while not done.is_set():
                async with writer.transaction():
                    await writer.execute("INSERT INTO here VALUES (1)")
                    await writer.execute("INSERT INTO there VALUES (-1)")
                moves += 1

    writing = asyncio.create_task(move())
    try:
        for _ in range(rounds):
            await copy_and_add(cluster, dsn)
    finally:
        done.set()
        await writing
    return moves


async def copy_and_add(cluster: Cluster, dsn: str) -> None:
    tables = (Table("here", ("pieces",)), Table("there", ("pieces",)))
    async with copied(cluster.server.admin_dsn, {"stock": dsn}, {"stock": tables}, progress=print) as copies:
        [row] = await copies.fetch(
            "SELECT (SELECT sum(pieces) FROM stock.here) + (SELECT sum(pieces) FROM stock.there) AS sum"
        )
        assert row["sum"] == 0
