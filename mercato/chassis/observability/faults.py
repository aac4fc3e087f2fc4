"""Named fault points: places where a test lets the power fail.

`await faults.point("orders.place.after_commit")` does nothing unless a test, or `MERCATO_FAULTS` at the start of the
process, has planted a fault there. What was planted is a dictionary that is empty in production, so a point costs one
look at it. Points are declared at import with `declare`, so that a crash test can enumerate them and fail for a
point that nothing reaches.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from typing import Final

Fault = Callable[[str], Awaitable[None]]

POINTS: Final[set[str]] = set()
"""Every declared point."""

_planted: Final[dict[str, Fault]] = {}


def declare(*names: str) -> None:
    """Makes points known; each name belongs to one place in the code."""
    POINTS.update(names)


async def point(name: str) -> None:
    """Lets the fault planted at `name` happen, if there is one."""
    if _planted and (fault := _planted.get(name)) is not None:
        await fault(name)


def plant(name: str, fault: Fault) -> Callable[[], None]:
    """Plants a fault and returns what removes it. Raises KeyError for a point that nobody declared."""
    if name not in POINTS:
        raise KeyError(f"no fault point is called {name!r}")
    _planted[name] = fault

    def remove() -> None:
        _planted.pop(name, None)

    return remove


async def kill(_: str) -> None:
    """Ends this process as `kill -9` does: no handler, no `finally`, no flush."""
    os.kill(os.getpid(), signal.SIGKILL)


async def hang(_: str) -> None:
    await asyncio.sleep(3_600)


def plant_from_environment(value: str) -> None:
    """Plants what `MERCATO_FAULTS` says: `point=kill,other.point=hang`. Raises ValueError for anything else."""
    known = {"kill": kill, "hang": hang}
    for part in filter(None, value.split(",")):
        name, _, what = part.partition("=")
        if what not in known or name not in POINTS:
            raise ValueError(f"MERCATO_FAULTS: {part!r} is not point=kill or point=hang of a declared point")
        plant(name, known[what])
