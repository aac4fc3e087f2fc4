"""The bank on a fresh database, which lists an operation at once."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator

import pytest
import pytest_asyncio

from mercato.chassis.observability import faults
from mercato.chassis.observability.faults import Fault
from mercato.testing.harness import Rig
from simulators.bank.world import Bank


@pytest_asyncio.fixture
async def bank(rig: Rig) -> AsyncGenerator[Bank]:
    rig.options["MERCATO_SANDBOX_STATEMENT_DELAY_SECONDS"] = "0"
    made = await Bank(rig).open()
    with made.calling():
        yield made
    await made.close()


@pytest.fixture
def plant() -> Iterator[Callable[[str, Fault], None]]:
    """Plants faults for the time of a test."""
    removals: list[Callable[[], None]] = []
    yield lambda point, fault: removals.append(faults.plant(point, fault))
    for remove in removals:
        remove()
