"""Opens and closes the services of a process within the time that its end may take."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import AsyncGenerator
from typing import Final

from mercato.chassis.hosting.host import Host

CLOSE_SECONDS: Final = 1.0
"""Requests have been answered or abandoned before: no client waits for a statement that still runs.

With the drain before it, a stop takes less than five seconds; PostgreSQL may take longer while it writes.
"""

YOUNG_OBJECTS: Final = 50_000
"""New objects after which the collector looks for cycles. Messages and rows are trees: with Python's default (700) it
ran many times in every batch, found nothing, and took a twelfth of the process's time."""


def tune_garbage_collection() -> None:
    """Called at the end of the start: existing objects are permanent, and the collector need not scan them again."""
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
