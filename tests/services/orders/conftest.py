"""The orders service on a fresh database, with buyers and a catalogue that the test owns."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator

import pytest
import pytest_asyncio

from mercato.chassis.observability import faults
from mercato.chassis.observability.faults import Fault
from mercato.testing.harness import Cluster, Rig
from services.orders.world import World, opened


@pytest_asyncio.fixture
async def world(rig: Rig) -> AsyncGenerator[World]:
    async with opened(rig) as made:
        yield made


@pytest_asyncio.fixture(scope="session", loop_scope="session", params=["local", "loopback"])
async def busy_world(cluster: Cluster, request: pytest.FixtureRequest) -> AsyncGenerator[World]:
    """A world that many tests share, each with products and orders of its own: opening one takes longer than a test.

    Tests that use it run in the session's event loop: `pytestmark = pytest.mark.asyncio(loop_scope="session")`.
    """
    rig = Rig(cluster, request.param)
    try:
        async with opened(rig, orders_lease_seconds=1.0, orders_sweep_seconds=0.1) as made:
            yield made
    finally:
        await rig.close()


@pytest.fixture
def plant() -> Iterator[Callable[[str, Fault], Callable[[], None]]]:
    """Plants faults for the time of a test; gives what removes them earlier."""
    removals: list[Callable[[], None]] = []

    def plant(point: str, fault: Fault) -> Callable[[], None]:
        removals.append(faults.plant(point, fault))
        return removals[-1]

    yield plant
    for remove in removals:
        remove()
