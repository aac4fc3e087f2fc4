"""Event logs and consumers that a restore has parted: who was restored alone goes on with the others.

A source that was restored does not have the row in which its consumers stand, and refuses them (`LogReplaced`). What it
has, they have read: so its outbox goes on behind the ids that they know, and their cursors go to its last row. What its
events of the lost time have done stays, and the audit reports it (E3).

Where the feed was restored, its cursors are behind what it has acknowledged. It reads those rows again, for which its
sources keep them, and gives their events positions that no reader outside of the shop has seen.
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
# `is_parted`: the log ends before the cursor, and has nothing that is younger than what the consumer has read. Where
# services have written to it since its restore, a person has to look.
_LAST_ROW: Final = """
    SELECT last.id, last.at,
           coalesce(last.id, 0) < $1 AND NOT EXISTS (SELECT FROM outbox WHERE at > $2) AS is_parted
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
    """A consumer and a source of which one was restored."""

    consumer: str
    source: str
    is_source: bool
    """Whether it was the source; else the consumer."""


async def rejoin(dsns: Mapping[str, str]) -> tuple[Rejoined, ...]:
    """Lets sources and consumers of the services in `dsns` go on; gives and logs those that were parted.

    For services that do not run. Raises the errors of the driver.
    """
    found: list[Rejoined] = []
    async with contextlib.AsyncExitStack() as stack:
        connections: dict[str, Any] = {}

        async def of(service: str) -> Any:
            if service not in connections:
                connections[service] = await stack.enter_async_context(connection_to(dsns[service]))
            return connections[service]

        for service in CONSUMING:
            if service not in dsns:
                continue
            consuming = await of(service)
            for cursor in await consuming.fetch(_CURSORS):
                if cursor["source"] in dsns:
                    source = await of(cursor["source"])
                    if await _source_rejoined(consuming, source, cursor):
                        found.append(Rejoined(cursor["consumer"], cursor["source"], is_source=True))
                    elif cursor["consumer"] == FEED and await _is_behind(source, cursor):
                        found.append(Rejoined(FEED, cursor["source"], is_source=False))
        if any(not each.is_source for each in found):
            feed = await of("events")
            async with feed.transaction():
                await move_past(feed, FEED_POSITIONS, await feed.fetchval(_NEXT_FEED_POSITION))
    for each in found:
        event = "cursor_moved" if each.is_source else "feed_positions_moved"
        log.warning(event, consumer=each.consumer, source=each.source)
    return tuple(found)


async def _source_rejoined(consuming: Any, source: Any, cursor: Mapping[str, Any]) -> bool:
    position: int = cursor["position"]
    at: datetime.datetime = cursor["at"]
    row_id, _ = outbox_row.place_of(position)
    last = await source.fetchrow(_LAST_ROW, row_id, at)
    if not last["is_parted"]:
        return False
    async with source.transaction():
        await move_past(source, OUTBOX_IDS, row_id)
    to = 0 if last["id"] is None else outbox_row.end_of_row(last["id"])
    await consuming.execute(_MOVE_CURSOR, cursor["consumer"], cursor["source"], position, to, last["at"])
    return True


async def _is_behind(source: Any, cursor: Mapping[str, Any]) -> bool:
    acknowledged = await source.fetchval(_ACKNOWLEDGED, cursor["consumer"])
    return acknowledged is not None and acknowledged > cursor["position"]
