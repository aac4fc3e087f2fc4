"""The events service on a fresh database, and a feed that the test writes itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import pytest_asyncio

from mercato.chassis.observability import faults
from mercato.chassis.observability.faults import Fault
from mercato.services.events.app import build
from mercato.testing.harness import Rig
from services.events.world import Feed


@pytest_asyncio.fixture
async def feed(rig: Rig) -> Feed:
    return Feed(await rig.open(events=build))


@pytest.fixture
def plant() -> Iterator[Callable[[str, Fault], None]]:
    """Plants faults for the time of a test."""
    removals: list[Callable[[], None]] = []
    yield lambda point, fault: removals.append(faults.plant(point, fault))
    for remove in removals:
        remove()
