"""The products service on a fresh database, and somebody who may do everything in it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator

import pytest
import pytest_asyncio

from mercato.chassis.contract import Actor
from mercato.chassis.observability import faults
from mercato.chassis.observability.faults import Fault
from mercato.chassis.postgres.database import Database
from mercato.contracts.products import Products
from mercato.services.products.app import build
from mercato.testing.harness import Rig

POLLS = 5_000
POLL_SECONDS = 0.01


@pytest.fixture
def staff() -> Actor:
    return Actor("staff", 1)


@pytest_asyncio.fixture
async def products(rig: Rig) -> Products:
    return (await rig.open(products=build)).client(Products)


@pytest.fixture
def database(rig: Rig, products: Products) -> Database:
    return rig.host.services["products"].database


@pytest.fixture
def plant() -> Iterator[Callable[[str, Fault], None]]:
    """Plants faults for the time of a test."""
    removals: list[Callable[[], None]] = []
    yield lambda point, fault: removals.append(faults.plant(point, fault))
    for remove in removals:
        remove()


@pytest.fixture
def until_somebody_waits(database: Database) -> Callable[[], Awaitable[None]]:
    """Waits until a statement in this database waits for a lock that another transaction holds."""

    async def wait() -> None:
        for _ in range(POLLS):
            async with database.read() as tx:
                if await tx.fetch_values(
                    int,
                    """
                    SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'
                    """,
                ):
                    return
            await asyncio.sleep(POLL_SECONDS)
        pytest.fail("nobody waits for a lock")

    return wait
