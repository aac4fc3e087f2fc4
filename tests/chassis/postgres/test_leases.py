"""Of all processes that want a turn, one has it, until the lease ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest_asyncio

from mercato.chassis.postgres.database import Database
from mercato.chassis.postgres.leases import Lease
from mercato.testing import databases
from mercato.testing.cluster import Cluster
from mercato.testing.tables import connected

TURN = Lease("turns")
HOUR = 3_600.0


@pytest_asyncio.fixture
async def database(cluster: Cluster) -> AsyncGenerator[Database]:
    name = "leases_of_a_test"
    await cluster.execute(f"CREATE DATABASE {name}")
    try:
        async with databases.opened(cluster.server.admin_dsn.replace("/postgres?", f"/{name}?"), "shop") as made:
            async with made.transaction() as tx:
                await tx.execute(
                    "CREATE TABLE turns (name text PRIMARY KEY, leased_until timestamptz NOT NULL, place int DEFAULT 7)"
                )
            yield made
    finally:
        await cluster.execute(f"DROP DATABASE {name} WITH (FORCE)")


async def take(database: Database, name: str = "audit", seconds: float = HOUR) -> bool:
    async with database.transaction() as tx:
        return await TURN.take(tx, name, seconds)


async def shift(database: Database, interval: str) -> None:
    async with database.transaction() as tx:
        await tx.execute(f"UPDATE turns SET leased_until = leased_until + interval '{interval}'")


async def test_one_of_many_processes_gets_the_lease(database: Database):
    taken = await asyncio.gather(*(take(database) for _ in range(5)))

    assert sorted(taken) == [False] * 4 + [True]
    assert not await take(database)


async def test_each_name_has_a_lease_of_its_own(database: Database):
    assert [await take(database, name) for name in ("audit", "bank", "audit")] == [True, True, False]


async def test_an_expired_lease_can_be_taken(database: Database):
    assert await take(database)
    await shift(database, "-59 minutes")
    assert not await take(database)
    await shift(database, "-2 minutes")

    assert [await take(database), await take(database)] == [True, False]


async def test_a_lease_from_before_the_clock_was_set_back_has_expired(database: Database):
    assert await take(database)
    await shift(database, "59 minutes")
    assert not await take(database)
    await shift(database, "2 minutes")

    assert await take(database)


async def test_a_lease_whose_transaction_rolls_back_was_not_taken(database: Database):
    class Died(Exception):
        pass

    try:
        async with database.transaction() as tx:
            assert await TURN.take(tx, "audit", HOUR)
            raise Died
    except Died:
        pass

    assert await take(database)


async def test_taking_a_lease_keeps_the_other_columns_of_its_row(database: Database, cluster: Cluster):
    assert await take(database)
    async with connected(database._dsn) as connection:
        await connection.execute("UPDATE turns SET place = 8, leased_until = now() - interval '1 s'")

    assert await take(database)

    async with database.read() as tx:
        assert await tx.fetch_values(int, "SELECT place FROM turns") == [8]
