"""That a piece of work waits for no lock: seen in the database, not by time."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Final, TypeVar, cast

import asyncpg

T = TypeVar("T")

BOUND_SECONDS: Final = 60.0
POLL_SECONDS: Final = 0.01

WAITING: Final = """
    SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'
"""


async def without_waiting(dsn: str, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. Fails as soon as a statement in its database waits for a lock: it might wait for ever."""
    task = asyncio.ensure_future(work)
    connection = await cast(Any, asyncpg).connect(dsn)
    try:
        async with asyncio.timeout(BOUND_SECONDS):
            while not task.done():
                assert not await connection.fetchval(WAITING), "it waits for a lock that another transaction has"
                await asyncio.wait([task], timeout=POLL_SECONDS)
        return task.result()
    finally:
        task.cancel()
        await asyncio.wait([task])
        await connection.close()
