"""Named fault points: places in the code where a test injects a fault.

`await faults.point("orders.place.after_commit")` does nothing unless a test, or `MERCATO_FAULTS` at the start of the
process, has injected a fault there. The injected faults are a dictionary that is empty in production, so a point costs
one lookup. Points are declared at import with `declare`, so that a crash test can list them, and fail for a point that
it does not reach.
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

_injected: Final[dict[str, Fault]] = {}


def declare(*names: str) -> None:
    """Declares points; each name belongs to one place in the code."""
    POINTS.update(names)


async def point(name: str) -> None:
    """Runs the fault injected at `name`, if there is one."""
    if _injected and (fault := _injected.get(name)) is not None:
        await fault(name)


def inject(name: str, fault: Fault) -> Callable[[], None]:
    """Injects a fault and returns a function that removes it. Raises KeyError for a point that is not declared."""
    if name not in POINTS:
        raise KeyError(f"no fault point is called {name!r}")
    _injected[name] = fault

    def remove() -> None:
        _injected.pop(name, None)

    return remove


async def kill(_: str) -> None:
    """Ends this process as `kill -9` does: no handler, no `finally`, no flush."""
    os.kill(os.getpid(), signal.SIGKILL)


async def hang(_: str) -> None:
    await asyncio.sleep(3_600)


def inject_from_environment(value: str) -> None:
    """Injects the faults that `MERCATO_FAULTS` lists: `point=kill,other.point=hang`. ValueError: it is malformed."""
    known = {"kill": kill, "hang": hang}
    for part in filter(None, value.split(",")):
        name, _, what = part.partition("=")
        if what not in known or name not in POINTS:
            raise ValueError(f"MERCATO_FAULTS: {part!r} is not point=kill or point=hang of a declared point")
        inject(name, known[what])
