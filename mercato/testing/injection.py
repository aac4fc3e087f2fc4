"""Faults that tests inject at the fault points of the product, and some that many tests need."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Generator
from typing import Final

from mercato.chassis.observability import faults
from mercato.chassis.observability.faults import Fault

from .tables import BLOCKED_STATEMENTS, connected
from .waiting import until

Inject = Callable[[str, Fault], Callable[[], None]]
"""Injects a fault at a point; gives what removes it. The point must be declared, or KeyError is raised."""

POWER_FAILS: Final = "the power fails here"


@contextlib.contextmanager
def injecting() -> Generator[Inject]:
    """Faults for the time of a block: at its end all are removed, and what waits at a `Pause` goes on.

    A test that fails while it holds a task there would otherwise end when the deadline of that task has passed.
    """
    with contextlib.ExitStack() as removals:

        def inject(point: str, fault: Fault) -> Callable[[], None]:
            remove = faults.inject(point, fault)
            removals.callback(remove)
            if isinstance(fault, Pause):
                removals.callback(fault.resume.set)
            return remove

        yield inject


async def fail(_point: str) -> None:
    """A fault: the task fails at the point."""
    raise RuntimeError(POWER_FAILS)


class FailAt:
    """A fault: of the tasks that reach the point, those with these numbers fail, from 1 on; `arrived` counts all."""

    def __init__(self, *numbers: int) -> None:
        self._numbers = numbers
        self.arrived = 0

    async def __call__(self, point: str) -> None:
        self.arrived += 1
        if self.arrived in self._numbers:
            await fail(point)


class Pause:
    """A fault: tasks that reach the point, or only the first of them, wait there until the test sets `resume`."""

    def __init__(self, *, first_only: bool = False) -> None:
        self._first_only = first_only
        self.reached = asyncio.Event()
        self.resume = asyncio.Event()

    async def __call__(self, _point: str) -> None:
        if not (self._first_only and self.reached.is_set()):
            self.reached.set()
            await self.resume.wait()


class Overlap:
    """A fault for a `before_commit` point: two transactions overlap.

    The first waits before its commit until the second reaches the point too, or waits for a lock. `arrived` is 2 where
    no lock stopped the second.
    """

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self.arrived = 0

    async def __call__(self, _point: str) -> None:
        self.arrived += 1
        if self.arrived > 1:
            return
        async with connected(self._dsn) as connection:

            async def is_second_there() -> bool:
                return self.arrived > 1 or await connection.fetchval(BLOCKED_STATEMENTS) > 0

            await until(is_second_there, "the second transaction does not begin")
