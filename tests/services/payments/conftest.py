"""Payments and the bank, each on a fresh database. The loops sleep: a test runs a round when it wants one."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator

import pytest
import pytest_asyncio

from mercato.chassis.observability import faults
from mercato.chassis.observability.faults import Fault
from mercato.testing.harness import Rig
from services.payments.world import World


@pytest_asyncio.fixture
async def world(rig: Rig) -> AsyncGenerator[World]:
    made = World(rig)
    await made.open()
    with made.calling():
        yield made
    await made.close()
    assert await made.violations() == {}


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
