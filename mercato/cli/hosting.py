"""Opening and closing the services of a process within the time that its end may take."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import AsyncGenerator
from typing import Final

from mercato.chassis.hosting.host import Host

CLOSE_SECONDS: Final = 1.0
"""Requests have been answered or given up by then: who still waits for a statement waits for nobody.

With the drain before it, a stop stays below five seconds; PostgreSQL may take longer as long as it writes.
"""

YOUNG_OBJECTS: Final = 50_000
"""New objects after which the collector looks for cycles among them. Messages and rows are trees: with Python's own
number (700) it looked many times in every batch, found nothing, and took a twelfth of the process's time for it."""


def tune_garbage_collection() -> None:
    """At the end of the start: what is there by now is for good, and need not be looked at again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, 20, 100)


@contextlib.asynccontextmanager
async def hosted(host: Host) -> AsyncGenerator[Host]:
    """The services of `host`, open for the time of the block. Raises `Unavailable`."""
    await host.open()
    try:
        yield host
    finally:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                await host.close()
