"""Every SQL statement of the feed."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Final

from mercato.chassis.db import Row, Tx
from mercato.chassis.events import KEPT_DAYS, Event

WRITE_LOCK: Final = 0x66656564  # "feed"
REAPED_AT_ONCE: Final = 1_000


class FeedRow(Row):
    position: int
    source: str
    event_id: int
    type: str
    subject: str
    subject_id: int
    version: int
    data: str
    at: datetime.datetime


# ---------------------------------------------------------------------------------------------------------- writing


async def append(tx: Tx, events: Sequence[Event]) -> None:
    """Writes those of the events that are not there yet behind all others, in the order given."""
    # A statement of its own, before the one that takes positions. Whoever takes a position has this lock until the
    # commit: so positions become visible in their order, and a reader that has seen one will never find a lower one
    # that is new. Without it a later position could commit first, and who reads on from there would miss the earlier.
    await tx.execute("SELECT pg_advisory_xact_lock($1)", WRITE_LOCK)
    await tx.execute(
        """
        INSERT INTO feed (source, event_id, type, subject, subject_id, version, data, at)
        SELECT e.source, e.id, e.type, e.subject, e.subject_id, e.version, e.data, e.at
          FROM unnest($1::text[], $2::bigint[], $3::text[], $4::text[], $5::bigint[], $6::bigint[], $7::text[],
                      $8::timestamptz[]) WITH ORDINALITY
               AS e (source, id, type, subject, subject_id, version, data, at, n)
         ORDER BY e.n
            ON CONFLICT ON CONSTRAINT feed_source_event_id_key DO NOTHING
        """,
        [event.source for event in events],
        [event.id for event in events],
        [event.type for event in events],
        [event.subject for event in events],
        [event.subject_id for event in events],
        [event.version for event in events],
        [event.data for event in events],
        [event.at for event in events],
    )


# ---------------------------------------------------------------------------------------------------------- reading


async def page(tx: Tx, after: int, limit: int) -> list[FeedRow]:
    """Up to `limit` entries behind a position."""
    return await tx.fetch(
        FeedRow,
        """
        SELECT position, source, event_id, type, subject, subject_id, version, data, at
          FROM feed
         WHERE position > $1
         ORDER BY position
         LIMIT $2
        """,
        after,
        limit,
    )


async def page_of_types(tx: Tx, after: int, limit: int, types: Sequence[str]) -> list[FeedRow]:
    """The same, of some types."""
    # A page of each type from the index, of which the first make the page: with `type = ANY($3)` everything of a
    # frequent type would be sorted, or everything read where a type is rare. Asked for as a part of the index's order,
    # from (type, after) to the end of the type: with `type = w.type` the planner may think that a type is frequent, and
    # read all entries in the order of positions until it has found a page of it.
    return await tx.fetch(
        FeedRow,
        """
        SELECT f.position, f.source, f.event_id, f.type, f.subject, f.subject_id, f.version, f.data, f.at
          FROM unnest($3::text[]) AS w (type)
         CROSS JOIN LATERAL (
            SELECT position, source, event_id, type, subject, subject_id, version, data, at
              FROM feed
             WHERE (type, position) > (w.type, $1) AND type <= w.type
             ORDER BY type, position
             LIMIT $2
         ) f
         ORDER BY f.position
         LIMIT $2
        """,
        after,
        limit,
        types,
    )


async def last_reaped(tx: Tx) -> int:
    """The position of the last entry that was deleted; 0 where none was."""
    return (await tx.fetch_values(int, "SELECT coalesce(max(position), 0) FROM feed_reaped"))[0]


async def last_reaped_of_types(tx: Tx, types: Sequence[str]) -> int:
    """The same, of some types."""
    found = await tx.fetch_values(
        int, "SELECT coalesce(max(position), 0) FROM feed_reaped WHERE type = ANY($1::text[])", types
    )
    return found[0]


async def before_last(tx: Tx, count: int) -> int:
    """The position behind which the last `count` entries are; 0 where there are fewer."""
    found = await tx.fetch_values(int, "SELECT position FROM feed ORDER BY position DESC OFFSET $1 LIMIT 1", count)
    return found[0] if found else 0


async def before_last_of_types(tx: Tx, count: int, types: Sequence[str]) -> int:
    """The same, of some types."""
    found = await tx.fetch_values(
        int,
        """
        SELECT f.position
          FROM unnest($2::text[]) AS w (type)
         CROSS JOIN LATERAL (
            SELECT position
              FROM feed
             WHERE type >= w.type AND type <= w.type
             ORDER BY type DESC, position DESC
             LIMIT $1 + 1
         ) f
         ORDER BY f.position DESC
        OFFSET $1
         LIMIT 1
        """,
        count,
        types,
    )
    return found[0] if found else 0


# -------------------------------------------------------------------------------------------------------- retention


async def reap(tx: Tx) -> int:
    """Deletes a bounded number of the oldest entries, where they are past their days, and notes how far; how many."""
    deleted = await tx.fetch_values(
        int,
        """
        WITH deleted AS (
            DELETE FROM feed
             WHERE position IN (SELECT position FROM feed ORDER BY position LIMIT $1)
               AND received_at < now() - make_interval(days => $2)
            RETURNING type, position
        ),
        noted AS (
            INSERT INTO feed_reaped AS reaped (type, position)
            SELECT type, max(position) FROM deleted GROUP BY type ORDER BY type
                ON CONFLICT ON CONSTRAINT feed_reaped_pkey DO UPDATE
               SET position = greatest(reaped.position, excluded.position)
        )
        SELECT count(*) FROM deleted
        """,
        REAPED_AT_ONCE,
        KEPT_DAYS,
    )
    return deleted[0]
