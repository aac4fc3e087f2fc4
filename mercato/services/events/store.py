"""Every SQL statement of the feed."""

from __future__ import annotations

import datetime
from collections.abc import Collection, Sequence
from typing import Final

import msgspec

from mercato.chassis.messaging.events import KEPT_DAYS
from mercato.chassis.postgres.database import Row, Tx

WRITE_LOCK: Final = 0x66656564  # "feed"
PURGED_AT_ONCE: Final = 1_000
SCANNED_ROWS: Final = 1_000
SCANNED_EVENTS: Final = 20_000
"""So much of the feed is read for one page of a subject: some ten megabytes. No index knows the subjects of a row: it
would have an entry for each order, for readers that hardly ever read more than the last seconds."""


class Entry(msgspec.Struct, frozen=True, gc=False):
    """A row to append: the events of an outbox row from `place` on. `types` are those of its events, in order."""

    source: str
    outbox_id: int
    place: int
    at: datetime.datetime
    events: str
    types: Sequence[str]


class FeedRow(Row):
    position: int
    source: str
    outbox_id: int
    place: int
    at: datetime.datetime
    events: str


# ---------------------------------------------------------------------------------------------------------- writing


async def append(tx: Tx, entries: Sequence[Entry]) -> None:
    """Writes rows after all others, in the given order."""
    # A statement of its own, before the one that draws positions. The writer has this lock until the commit, so
    # positions become visible in their order. Without it a later position could commit first, and a reader that
    # continues from there would miss the earlier one.
    await tx.execute("SELECT pg_advisory_xact_lock($1)", WRITE_LOCK)
    types = [_types_of(entry.types) for entry in entries]
    await tx.execute(
        """
        WITH entries AS MATERIALIZED (
            SELECT nextval('feed_position_seq') AS position, e.*
              FROM unnest($1::text[], $2::bigint[], $3::integer[], $4::integer[], $5::timestamptz[], $6::text[],
                          $7::text[])
                   AS e (source, outbox_id, place, count, at, events, types)
        ),
        appended AS (
            INSERT INTO feed (position, source, outbox_id, place, count, at, events)
            SELECT position, source, outbox_id, place, count, at, events FROM entries
        )
        INSERT INTO feed_types (type, position, count, last)
        SELECT split_part(t.type, ' ', 1), e.position, split_part(t.type, ' ', 2)::integer,
               split_part(t.type, ' ', 3)::integer
          FROM entries e
         CROSS JOIN LATERAL unnest(string_to_array(e.types, ',')) AS t (type)
        """,
        [entry.source for entry in entries],
        [entry.outbox_id for entry in entries],
        [entry.place for entry in entries],
        [len(entry.types) for entry in entries],
        [entry.at for entry in entries],
        [entry.events for entry in entries],
        types,
    )


def _types_of(types: Sequence[str]) -> str:
    """Each type with how many events have it, and the place of the last: `order.paid 3 7,order.placed 5 6`."""
    count: dict[str, int] = {}
    last: dict[str, int] = {}
    for place, type_ in enumerate(types):
        count[type_] = count.get(type_, 0) + 1
        last[type_] = place
    return ",".join([f"{type_} {count[type_]} {last[type_]}" for type_ in count])


# ---------------------------------------------------------------------------------------------------------- reading


async def page(tx: Tx, position: int, wanted: int) -> list[FeedRow]:
    """The rows from a position on, as many as contain `wanted` events."""
    return await tx.fetch(
        FeedRow,
        """
        SELECT f.position, f.source, f.outbox_id, f.place, f.at, f.events
          FROM (
            SELECT position, sum(count) OVER (ORDER BY position) - count AS before
              FROM (SELECT position, count FROM feed WHERE position >= $1 ORDER BY position LIMIT $2) AS next
          ) n
         CROSS JOIN LATERAL (
            SELECT position, source, outbox_id, place, at, events FROM feed WHERE position = n.position LIMIT 1
         ) f
         WHERE n.before < $2
         ORDER BY n.position
        """,
        position,
        wanted,
    )


async def page_of_types(tx: Tx, position: int, wanted: int, types: Sequence[str]) -> list[FeedRow]:
    """The rows from a position on, as many as contain `wanted` events of some types."""
    # Reads a page of each type from the index, and takes the first of all. The condition is a range of the index, from
    # (type, position) to the end of the type: with `type = w.type` the planner may estimate that a type is frequent,
    # and read all rows in the order of positions until it has found a page of it.
    return await tx.fetch(
        FeedRow,
        """
        SELECT f.position, f.source, f.outbox_id, f.place, f.at, f.events
          FROM (
            SELECT position, sum(count) OVER (ORDER BY position) - count AS before
              FROM (
                SELECT t.position, sum(t.count) AS count
                  FROM unnest($3::text[]) AS w (type)
                 CROSS JOIN LATERAL (
                    SELECT position, count
                      FROM feed_types
                     WHERE (type, position) >= (w.type, $1) AND type <= w.type
                     ORDER BY type, position
                     LIMIT $2
                 ) t
                 GROUP BY t.position
                 ORDER BY t.position
                 LIMIT $2
              ) AS next
          ) n
         CROSS JOIN LATERAL (
            SELECT position, source, outbox_id, place, at, events FROM feed WHERE position = n.position LIMIT 1
         ) f
         WHERE n.before < $2
         ORDER BY n.position
        """,
        position,
        wanted,
        types,
    )


async def scanned_to(tx: Tx, position: int) -> int:
    """The last of the rows from a position on that one page of a subject reads; 0: there are none."""
    found = await tx.fetch_values(
        int,
        """
        SELECT coalesce(max(position), 0)
          FROM (
            SELECT position, sum(count) OVER (ORDER BY position) - count AS before
              FROM (SELECT position, count FROM feed WHERE position >= $1 ORDER BY position LIMIT $2) AS next
          ) n
         WHERE before < $3
        """,
        position,
        SCANNED_ROWS,
        SCANNED_EVENTS,
    )
    return found[0]


async def rows_with(tx: Tx, first: int, last: int, text: str) -> list[FeedRow]:
    """The rows between two positions, these included, whose events contain a text."""
    return await tx.fetch(
        FeedRow,
        """
        SELECT position, source, outbox_id, place, at, events
          FROM feed
         WHERE position BETWEEN $1 AND $2 AND strpos(events, $3) > 0
         ORDER BY position
        """,
        first,
        last,
        text,
    )


async def last_rows(tx: Tx, wanted: int) -> list[FeedRow]:
    """The last rows, the newest first, as many as contain `wanted` events."""
    return await tx.fetch(
        FeedRow,
        """
        SELECT position, source, outbox_id, place, at, events FROM feed ORDER BY position DESC LIMIT $1
        """,
        wanted,
    )


async def last_rows_of_types(tx: Tx, wanted: int, types: Sequence[str]) -> list[FeedRow]:
    """The last rows with an event of some types, the newest first; `wanted` of them."""
    return await tx.fetch(
        FeedRow,
        """
        SELECT f.position, f.source, f.outbox_id, f.place, f.at, f.events
          FROM (
            SELECT DISTINCT t.position
              FROM unnest($2::text[]) AS w (type)
             CROSS JOIN LATERAL (
                SELECT position
                  FROM feed_types
                 WHERE type >= w.type AND type <= w.type
                 ORDER BY type DESC, position DESC
                 LIMIT $1
             ) t
             ORDER BY t.position DESC
             LIMIT $1
          ) n
         CROSS JOIN LATERAL (
            SELECT position, source, outbox_id, place, at, events FROM feed WHERE position = n.position LIMIT 1
         ) f
         ORDER BY f.position DESC
        """,
        wanted,
        types,
    )


async def last_position(tx: Tx) -> int:
    """The position of the last row, also where it was purged; 0 where there never was one."""
    found = await tx.fetch_values(
        int,
        """
        SELECT greatest(
            (SELECT position FROM feed ORDER BY position DESC LIMIT 1),
            (SELECT max(position) >> 12 FROM feed_purged),
            0)
        """,
    )
    return found[0]


async def last_purged(tx: Tx, types: Collection[str]) -> int:
    """The position of the last deleted event, of some types or (where none are named) of all; 0: none."""
    found = await tx.fetch_values(
        int,
        """
        SELECT coalesce(max(position), 0) FROM feed_purged WHERE type = ANY($1::text[]) OR cardinality($1::text[]) = 0
        """,
        list(types),
    )
    return found[0]


# -------------------------------------------------------------------------------------------------------- retention


async def purge(tx: Tx) -> int:
    """Deletes up to `PURGED_AT_ONCE` rows older than `KEPT_DAYS`, and stores their last position; gives how many."""
    deleted = await tx.fetch_values(
        int,
        """
        WITH deleted AS (
            DELETE FROM feed
             WHERE position IN (SELECT position FROM feed ORDER BY position LIMIT $1)
               AND received_at < now() - make_interval(days => $2)
            RETURNING position, events
        ),
        types AS (
            SELECT DISTINCT d.position, e.event ->> 'type' AS type
              FROM deleted d
             CROSS JOIN LATERAL json_array_elements(d.events::json) AS e (event)
        ),
        deleted_types AS (
            DELETE FROM feed_types t
             USING types d
             WHERE t.type = d.type AND t.position = d.position
            RETURNING t.type, t.position << 12 | t.last AS position
        ),
        noted AS (
            INSERT INTO feed_purged AS purged (type, position)
            SELECT type, max(position) FROM deleted_types GROUP BY type ORDER BY type
                ON CONFLICT ON CONSTRAINT feed_purged_pkey DO UPDATE
               SET position = greatest(purged.position, excluded.position)
        )
        SELECT count(*) FROM deleted
        """,
        PURGED_AT_ONCE,
        KEPT_DAYS,
    )
    return deleted[0]
