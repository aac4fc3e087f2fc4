"""What a session of a service has, at the server itself and behind a pooler in transaction mode."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from urllib.parse import unquote, urlsplit

import asyncpg  # pyright: ignore[reportMissingTypeStubs]  # it has no types
import msgspec
import pytest
import pytest_asyncio

from mercato import topology
from mercato.chassis.contract import Message
from mercato.chassis.postgres import sessions
from mercato.chassis.postgres.database import Database, Row
from mercato.chassis.postgres.dsn import with_server
from mercato.chassis.postgres.outbox_row import Outgoing, unpack
from mercato.chassis.postgres.provisioning import ProvisionError, provision
from mercato.testing.cluster import Cluster
from mercato.testing.databases import fresh_dsn, opened
from mercato.testing.proxy import TcpProxy
from mercato.testing.tables import connected
from pgbouncer.pooler import Pooler, needs_new_pgbouncer, needs_pgbouncer

WRITERS = 12
TURNS = 20


class OutboxRow(Row, frozen=True, gc=False):
    id: int
    events: str


class Noted(Message, frozen=True):
    text: str


@pytest_asyncio.fixture
async def dsn(cluster: Cluster) -> AsyncGenerator[str]:
    async with fresh_dsn(cluster, "orders", topology.migrations("orders")) as made:
        yield made


def role_of(dsn: str) -> str:
    return urlsplit(dsn).username or ""


async def test_the_role_has_the_settings(dsn: str):
    assert await sessions.problem(dsn) == ""
    async with opened(dsn) as database, database.read() as tx:
        for name, value in sessions.SETTINGS.items():
            assert await tx.fetch_values(str, "SELECT current_setting($1)", name) == [value]


async def test_a_server_that_recovers_is_waited_for(dsn: str, monkeypatch: pytest.MonkeyPatch):
    proxy = TcpProxy(dsn)
    await proxy.open()
    try:
        proxy.refusals = 3
        connection = await sessions.connect(proxy.dsn)
        assert await connection.fetchval("SELECT current_setting('jit')") == "off"
        connection.terminate()
        assert proxy.refused == 3
        proxy.refusals = 1_000
        monkeypatch.setattr(sessions, "CONNECT_SECONDS", 0.2)
        with pytest.raises(asyncpg.CannotConnectNowError, match="in recovery mode"):
            await sessions.connect(proxy.dsn)
    finally:
        await proxy.close()


async def test_a_role_with_another_setting_is_found_and_mended(cluster: Cluster, dsn: str):
    role = role_of(dsn)
    await cluster.execute(f"ALTER ROLE {role} RESET jit; ALTER ROLE {role} SET plan_cache_mode = 'auto'")
    try:
        assert "(jit, plan_cache_mode)" in await sessions.problem(dsn)
    finally:
        password = unquote(urlsplit(dsn).password or "")
        made = await provision(cluster.server.admin_dsn, ["orders"], lambda _: password, prefix="test_")
    assert await sessions.problem(dsn) == ""
    assert role_of(made["orders"]) == role


async def test_a_connection_that_reads_whole_tables_resets_the_settings_of_its_role(dsn: str):
    async with connected(dsn) as connection:
        for name, value in sessions.WHOLE_TABLES.items():
            assert await connection.fetchval("SELECT current_setting($1)", name) == value


@pytest.mark.parametrize(
    ("dsn", "expected"),
    [
        ("postgresql://r:p%40@old:5432/d?sslmode=require", "postgresql://r:p%40@new:6432/d?sslmode=require"),
        ("postgresql://r:p@/d?host=/run/x&port=5433", "postgresql://r:p@new:6432/d"),
        ("postgresql://old/d", "postgresql://new:6432/d"),
    ],
)
def test_another_address_leaves_the_rest_of_a_dsn(dsn: str, expected: str):
    assert with_server(dsn, "new", 6432) == expected


def test_an_ipv6_address_stands_in_brackets():
    assert with_server("postgresql://r:p@old/d", "::1", 6432) == "postgresql://r:p@[::1]:6432/d"


# ------------------------------------------------------------------------------------------------------------ pooler


async def write(database: Database, writer: int) -> None:
    for turn in range(TURNS):
        async with database.transaction() as tx:
            seen = await tx.fetch_values(int, "SELECT $1::int", turn)
            noted = Noted(f"it's {writer}\\{seen[0]}")
            tx.emit([Outgoing("user.noted", "user", writer, turn + 1, noted)])
        async with database.read() as tx:
            assert await tx.fetch_values(bool, "SELECT count(*) > $1 FROM outbox", turn) == [True]


@needs_new_pgbouncer
async def test_transactions_meet_changing_sessions_and_lose_nothing(dsn: str):
    with Pooler(dsn) as pooler:
        through = pooler.dsn(dsn)
        assert await sessions.problem(through) == ""
        async with opened(through, size=6) as one, opened(through, size=6) as other:
            await asyncio.gather(*(write((one, other)[writer % 2], writer) for writer in range(WRITERS)))
            async with one.read() as tx:
                rows = await tx.fetch(OutboxRow, "SELECT id, events::text FROM outbox ORDER BY id")
    assert [row.id for row in rows] == list(range(rows[0].id, rows[0].id + WRITERS * TURNS))
    events = [event for row in rows for event in unpack(row.events.encode())]
    for writer in range(WRITERS):
        own = [event for event in events if event.subject_id == writer]
        assert [event.version for event in own] == list(range(1, TURNS + 1))
        assert [msgspec.json.decode(e.data) for e in own] == [{"text": f"it's {writer}\\{n}"} for n in range(TURNS)]


@needs_pgbouncer
async def test_a_pooler_that_keeps_no_statements_is_refused(dsn: str):
    """Whatever its version: one before 1.21, or a later one that is configured to keep none."""
    with Pooler(dsn, max_prepared_statements=0) as pooler:
        for _ in range(3):
            assert "needs PgBouncer 1.21 or newer" in await sessions.problem(pooler.dsn(dsn))


@needs_pgbouncer
async def test_databases_are_not_made_through_a_pooler(cluster: Cluster):
    with Pooler(cluster.server.admin_dsn) as pooler, pytest.raises(ProvisionError, match="goes through a pooler"):
        await provision(pooler.dsn(cluster.server.admin_dsn), ["users"], str, prefix="pooled_")
