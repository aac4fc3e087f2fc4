"""Why a database takes no writes now, as `/health/ready` says it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
import pytest_asyncio

from mercato.chassis.contract import Unavailable
from mercato.chassis.postgres import database as module
from mercato.chassis.postgres.database import Database
from mercato.testing.cluster import Cluster, database_name
from mercato.testing.databases import fresh_dsn, opened

MIGRATIONS = Path(__file__).with_name("migrations_for_tests")
FULL_DISK = (
    "CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS "
    "$$ BEGIN RAISE EXCEPTION 'could not extend file' USING ERRCODE = 'disk_full'; END $$",
    "CREATE TRIGGER full_disk BEFORE INSERT ON things FOR EACH ROW WHEN (NEW.id < 0) EXECUTE FUNCTION full_disk()",
)
"""The server says of negative numbers what it says of a full disk."""


@pytest_asyncio.fixture
async def dsn(cluster: Cluster) -> AsyncGenerator[str]:
    async with fresh_dsn(cluster, "things", MIGRATIONS) as made:
        yield made


async def add(database: Database, number: int) -> None:
    async with database.transaction() as tx:
        await tx.execute("INSERT INTO things (id, name) VALUES ($1, 'thing')", number)


async def test_a_server_that_takes_writes_has_no_problem(dsn: str):
    async with opened(dsn) as database:
        assert await database.problem() == ""


async def test_a_read_only_server_is_named_as_the_problem(cluster: Cluster, dsn: str):
    await cluster.execute(f'ALTER DATABASE "{database_name(dsn)}" SET default_transaction_read_only = on')
    try:
        async with opened(dsn) as database:
            assert await database.problem() == "its database is read-only"
    finally:
        await cluster.execute(f'ALTER DATABASE "{database_name(dsn)}" RESET default_transaction_read_only')


async def test_a_server_that_has_stopped_is_named_as_not_answering(cluster: Cluster, dsn: str):
    async with opened(dsn) as database:
        await cluster.execute(f'DROP DATABASE "{database_name(dsn)}" WITH (FORCE)')
        assert await database.problem() == "its database does not answer"


async def test_a_full_disk_is_the_problem_until_the_server_stores_again(dsn: str, monkeypatch: pytest.MonkeyPatch):
    async with opened(dsn) as database:
        async with database.transaction() as tx:
            for statement in FULL_DISK:
                await tx.execute(statement)

        with pytest.raises(Unavailable):
            await add(database, -1)
        assert await database.problem() == "its database has no space for what it is to store"
        await add(database, 1)
        assert await database.problem() == ""

        with pytest.raises(Unavailable):
            await add(database, -2)
        monkeypatch.setattr(module, "REFUSED_SECONDS", 0.0)
        assert await database.problem() == "", "without requests, nothing else would show that there is space again"
