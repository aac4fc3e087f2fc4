"""After a restore of one database: sources and consumers of events continue together.

A restored source lacks the row of its consumers' cursors, and refuses them (`LogReplaced`). They have read all rows
that it has: so its outbox continues after the ids that they know, and their cursors move to its last row. The effects
of its events of the lost time stay, and the audit reports them (E3).

A restored feed has cursors behind the rows that it has acknowledged. It reads those rows again, which its sources keep
for this, and gives their events positions that no reader outside of the shop has seen.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Mapping
from typing import Any, Final

import msgspec
import structlog

from mercato.chassis.postgres import outbox_row
from mercato.chassis.postgres.sequences import move_past
from mercato.operations.ids import connection_to

log: Any = structlog.get_logger()

CONSUMING: Final = ("users", "products", "events")
"""The services that have cursors."""
FEED: Final = "events.feed"
OUTBOX_IDS: Final = "outbox_id_seq"
FEED_POSITIONS: Final = "feed_position_seq"

_CURSORS: Final = "SELECT consumer, source, position, at FROM cursors WHERE at IS NOT NULL ORDER BY consumer, source"
# `was_restored`: the log ends before the cursor, and has no row that is younger than what the consumer has read. Where
# services have written to it since its restore, an operator has to decide.
_LAST_ROW: Final = """
    SELECT last.id, last.at,
           coalesce(last.id, 0) < $1 AND NOT EXISTS (SELECT FROM outbox WHERE at > $2) AS was_restored
      FROM (SELECT 1) AS always
      LEFT JOIN LATERAL (
        SELECT id, at
          FROM ((SELECT id, at FROM outbox ORDER BY id DESC LIMIT 1)
                UNION ALL SELECT id, at FROM outbox_purged) AS ends
         ORDER BY id DESC
         LIMIT 1
      ) last ON true
"""
_MOVE_CURSOR: Final = """
    UPDATE cursors SET position = $4, at = $5 WHERE consumer = $1 AND source = $2 AND position = $3
"""
_ACKNOWLEDGED: Final = "SELECT position FROM outbox_readers WHERE consumer = $1"
_NEXT_FEED_POSITION: Final = "SELECT last_value + is_called::integer FROM feed_position_seq"


class Rejoined(msgspec.Struct, frozen=True):
    """A consumer and a source, one of which was restored."""

    consumer: str
    source: str
    is_source: bool
    """Whether the source was restored; else the consumer."""


async def rejoin(dsns: Mapping[str, str]) -> tuple[Rejoined, ...]:
    """Lets sources and consumers of the services in `dsns` continue; gives and logs the pairs with a restored one.

    For services that do not run. Raises the errors of the driver.
    """
    found: list[Rejoined] = []
    async with contextlib.AsyncExitStack() as stack:
        connections = _Connections(dsns, stack)
        for service in CONSUMING:
            if service in dsns:
                found += await _rejoin_consumers(connections, service)
        if any(not each.is_source for each in found):
            feed = await connections.of("events")
            async with feed.transaction():
                await move_past(feed, FEED_POSITIONS, await feed.fetchval(_NEXT_FEED_POSITION))
    for each in found:
        event = "cursor_moved" if each.is_source else "feed_positions_moved"
        log.warning(event, consumer=each.consumer, source=each.source)
    return tuple(found)


class _Connections:
    """A connection to each service that is asked for, until `stack` is closed."""

    def __init__(self, dsns: Mapping[str, str], stack: contextlib.AsyncExitStack) -> None:
        self.dsns = dsns
        self._stack = stack
        self._open: dict[str, Any] = {}

    async def of(self, service: str) -> Any:
        if service not in self._open:
            self._open[service] = await self._stack.enter_async_context(connection_to(self.dsns[service]))
        return self._open[service]


async def _rejoin_consumers(connections: _Connections, service: str) -> list[Rejoined]:
    """Compares the cursors of a service with their sources, and moves those of restored sources."""
    consuming = await connections.of(service)
    found: list[Rejoined] = []
    for cursor in await consuming.fetch(_CURSORS):
        if cursor["source"] not in connections.dsns:
            continue
        source = await connections.of(cursor["source"])
        if await _source_rejoined(consuming, source, cursor):
            found.append(Rejoined(cursor["consumer"], cursor["source"], is_source=True))
        elif cursor["consumer"] == FEED and await _is_behind(source, cursor):
            found.append(Rejoined(FEED, cursor["source"], is_source=False))
    return found


async def _source_rejoined(consuming: Any, source: Any, cursor: Mapping[str, Any]) -> bool:
    position: int = cursor["position"]
    at: datetime.datetime = cursor["at"]
    row_id, _ = outbox_row.place_of(position)
    last = await source.fetchrow(_LAST_ROW, row_id, at)
    if not last["was_restored"]:
        return False
    async with source.transaction():
        await move_past(source, OUTBOX_IDS, row_id)
    to = 0 if last["id"] is None else outbox_row.end_of_row(last["id"])
    await consuming.execute(_MOVE_CURSOR, cursor["consumer"], cursor["source"], position, to, last["at"])
    return True


async def _is_behind(source: Any, cursor: Mapping[str, Any]) -> bool:
    acknowledged = await source.fetchval(_ACKNOWLEDGED, cursor["consumer"])
    return acknowledged is not None and acknowledged > cursor["position"]
