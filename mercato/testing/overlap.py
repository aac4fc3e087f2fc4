"""Two transactions that meet: the first waits before its commit until the second is as far, or waits for a lock."""

from __future__ import annotations

import asyncio
from typing import Any, Final, cast

import asyncpg

POLLS: Final = 5_000
POLL_SECONDS: Final = 0.01


class Overlap:
    """A fault for a `before_commit` point. Who comes second without having waited would have been let in by no lock."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self.arrived = 0

    async def __call__(self, _point: str) -> None:
        self.arrived += 1
        if self.arrived > 1:
            return
        connection = await cast(Any, asyncpg).connect(self._dsn)
        try:
            for _ in range(POLLS):
                if self.arrived > 1 or await connection.fetchval(
                    """
                    SELECT count(*) FROM pg_stat_activity
                     WHERE datname = current_database() AND wait_event_type = 'Lock'
                    """
                ):
                    return
                await asyncio.sleep(POLL_SECONDS)
        finally:
            await connection.close()
        raise AssertionError("the second transaction never came")
