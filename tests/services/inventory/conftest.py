"""The inventory service on a fresh database, with a catalogue that the test owns."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator

import pytest
import pytest_asyncio

from mercato.chassis.observability import faults
from mercato.chassis.observability.faults import Fault
from mercato.testing.harness import Rig
from services.inventory.world import World, opened


@pytest_asyncio.fixture
async def world(rig: Rig) -> AsyncGenerator[World]:
    """Whatever a test does, what holds at every moment holds at its end."""
    async with opened(rig) as made:
        yield made


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
