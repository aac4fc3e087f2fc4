"""Reading databases in tests: over connections of their own, without the service that owns the database."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any, Final, cast

import asyncpg  # pyright: ignore[reportMissingTypeStubs]  # it has no types

from mercato.chassis.postgres.sessions import WHOLE_TABLES

EVENTS: Final = """(
    SELECT r.id << 12 | e.n - 1 AS id, e.type, e.subject, e.subject_id, e.version, e.data, r.at
      FROM outbox r
     CROSS JOIN LATERAL ROWS FROM (
        json_to_recordset(r.events::json)
            AS (type text, subject text, subject_id bigint, version bigint, data json)
     ) WITH ORDINALITY AS e (type, subject, subject_id, version, data, n)
) AS events"""
"""A FROM clause: a row for each event of an outbox, with its position as `id`."""

BLOCKED_STATEMENTS: Final = """
    SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'
"""


async def connect(dsn: str) -> Any:
    """A connection of the driver; the caller closes it. It caches no plans, because tests alter tables."""
    return await cast(Any, asyncpg).connect(dsn, statement_cache_size=0, server_settings=WHOLE_TABLES)


@contextlib.asynccontextmanager
async def connected(dsn: str) -> AsyncGenerator[Any]:
    connection = await connect(dsn)
    try:
        yield connection
    finally:
        await connection.close()


async def rows(dsn: str, sql: str, *values: object) -> list[tuple[Any, ...]]:
    """The rows of one statement, which commits by itself."""
    async with connected(dsn) as connection:
        return [tuple(row) for row in await connection.fetch(sql, *values)]


class TableReader:
    """A connection to a database that stays open; concurrent statements run one after the other."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._connection: Any = None
        self._turn = asyncio.Lock()

    async def rows(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        """See `rows`."""
        async with self._turn:
            if self._connection is None or self._connection.is_closed():
                self._connection = await connect(self._dsn)
            return [tuple(row) for row in await self._connection.fetch(sql, *values)]

    async def close(self) -> None:
        if self._connection is not None:
            await self._connection.close()
