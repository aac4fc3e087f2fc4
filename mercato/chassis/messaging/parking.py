"""Every SQL statement of a consumer: its cursor, and the events that it could not process."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Final

from mercato.chassis.contract.context import Overtaken
from mercato.chassis.postgres.database import Row, Tx

from .events import REPLAYED_KEPT_DAYS, Event

AT_ONCE: Final = 100
LISTED: Final = 1_000

Key = tuple[str, str]
"""The consumer and the source."""


class Cursor(Row):
    """Every event up to `position` has had its effect, or is parked. `at`: the time of the row at that position."""

    position: int
    at: datetime.datetime | None


class CursorMovedError(Overtaken):
    """Another process has moved the cursor. The transaction rolls back."""


class DeadLetter(Row):
    """An event that a consumer could not process. `at` is when it died, `event_at` when it was emitted."""

    consumer: str
    source: str
    event_id: int
    type: str
    subject: str
    subject_id: int
    version: int
    error: str
    tries: int
    event_at: datetime.datetime
    at: datetime.datetime


async def cursor_of(tx: Tx, key: Key) -> Cursor | None:
    return await tx.fetch_one(Cursor, "SELECT position, at FROM cursors WHERE consumer = $1 AND source = $2", *key)


async def begin_cursor(tx: Tx, key: Key, position: int) -> None:
    """Inserts a cursor, unless another process has done so at the same time."""
    await tx.execute(
        "INSERT INTO cursors (consumer, source, position) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING", *key, position
    )


async def move_cursor(tx: Tx, key: Key, cursor: Cursor, to: Cursor) -> bool:
    """Moves the cursor; gives whether any event is parked that is not dead. Raises `CursorMovedError`."""
    # Only a batch parks events, and it moves the cursor: if this statement has waited for the lock and the cursor has
    # not moved, no event was parked meanwhile that the statement does not see.
    moved = await tx.fetch_values(
        bool,
        """
        UPDATE cursors
           SET position = $4, at = $5
         WHERE consumer = $1 AND source = $2 AND position = $3
        RETURNING EXISTS (SELECT FROM parked WHERE consumer = $1 AND source = $2 AND dead_at IS NULL)
        """,
        *(*key, cursor.position, to.position, to.at),
    )
    if not moved:
        raise CursorMovedError
    return moved[0]


async def lock_cursor(tx: Tx, key: Key) -> None:
    """The next statements of the transaction see what every earlier holder of the lock has committed."""
    await tx.fetch_values(int, "SELECT position FROM cursors WHERE consumer = $1 AND source = $2 FOR UPDATE", *key)


async def park(tx: Tx, key: Key, events: Sequence[Event], tries: int, wait_s: float | None, error: str) -> set[int]:
    """Parks events, `wait_s` until their retry; without tries only those behind a parked event of their subject."""
    columns = zip(*((e.id, e.type, e.subject, e.subject_id, e.version, e.data, e.at) for e in events), strict=True)
    parked = await tx.fetch_values(
        int,
        """
        INSERT INTO parked (
            consumer, source, position, type, subject, subject_id, version, data, event_at, tries, retry_at, error)
        SELECT $1, $2, e.*, $3, coalesce(now() + make_interval(secs => $4), 'infinity'), $5
          FROM unnest($6::bigint[], $7::text[], $8::text[], $9::bigint[], $10::bigint[], $11::text[],
                      $12::timestamptz[]) AS e (position, type, subject, subject_id, version, data, at)
         WHERE $3 > 0 OR EXISTS (
            SELECT FROM parked p
             WHERE p.consumer = $1 AND p.source = $2 AND p.subject = e.subject AND p.subject_id = e.subject_id
               AND p.dead_at IS NULL)
        RETURNING position
        """,
        *(*key, tries, wait_s, error, *columns),
    )
    return set(parked)


async def due(tx: Tx, key: Key) -> list[Event]:
    """The parked events whose retry is due, up to a limit. Each is the first of its subject."""
    return await tx.fetch(
        Event,
        """
        SELECT source, position AS id, type, subject, subject_id, version, data, event_at AS at, tries, '' AS trace
          FROM parked
         WHERE consumer = $1 AND source = $2 AND dead_at IS NULL AND retry_at <= now()
         ORDER BY retry_at LIMIT $3
        """,
        *(*key, AT_ONCE),
    )


async def remove(tx: Tx, key: Key, position: int, tries: int) -> bool:
    """Deletes a parked event. False: another process has tried it meanwhile."""
    removed = await tx.execute(
        """
        DELETE FROM parked
         WHERE consumer = $1 AND source = $2 AND position = $3 AND tries = $4 AND dead_at IS NULL
        """,
        *(*key, position, tries),
    )
    return removed == 1


async def release_next(tx: Tx, key: Key, event: Event) -> Event | None:
    """Makes the next event of the subject due, after one that has had its effect or is dead; gives it."""
    return await tx.fetch_one(
        Event,
        """
        UPDATE parked SET retry_at = now()
         WHERE consumer = $1 AND source = $2 AND position = (
            SELECT position FROM parked
             WHERE consumer = $1 AND source = $2 AND subject = $3 AND subject_id = $4 AND position > $5
               AND dead_at IS NULL
             ORDER BY position LIMIT 1)
        RETURNING source, position AS id, type, subject, subject_id, version, data, event_at AS at, tries, '' AS trace
        """,
        *(*key, event.subject, event.subject_id, event.id),
    )


async def note_failure(tx: Tx, key: Key, position: int, tries: int, wait_s: float, error: str, is_dead: bool) -> bool:
    """Notes a try of a parked event. False: another process has noted that try, or the event is no longer parked."""
    noted = await tx.execute(
        """
        UPDATE parked
           SET tries = $4, retry_at = now() + make_interval(secs => $5), error = $6,
               dead_at = CASE WHEN $7 THEN now() END
         WHERE consumer = $1 AND source = $2 AND position = $3 AND tries = $4 - 1 AND dead_at IS NULL
        """,
        *(*key, position, tries, wait_s, error, is_dead),
    )
    return noted == 1


async def mark_replayed(tx: Tx, key: Key, position: int) -> Event | None:
    """Marks a dead event as replayed and gives it; None: there is none. Deletes events that were replayed long ago."""
    await tx.execute(
        """
        DELETE FROM parked
         WHERE consumer = $1 AND source = $2 AND dead_at IS NOT NULL
           AND replayed_at < now() - make_interval(days => $3)
        """,
        *(*key, REPLAYED_KEPT_DAYS),
    )
    return await tx.fetch_one(
        Event,
        """
        UPDATE parked SET replayed_at = now()
         WHERE consumer = $1 AND source = $2 AND position = $3 AND dead_at IS NOT NULL AND replayed_at IS NULL
        RETURNING source, position AS id, type, subject, subject_id, version, data, event_at AS at, tries, '' AS trace
        """,
        *(*key, position),
    )


async def dead_letters(tx: Tx, consumer: str, after: tuple[str, int] = ("", 0)) -> list[DeadLetter]:
    """The dead events of a consumer behind `after`, by source and position; at most `LISTED`."""
    return await tx.fetch(
        DeadLetter,
        """
        SELECT consumer, source, position AS event_id, type, subject, subject_id, version, error, tries, event_at,
               dead_at AS at
          FROM parked
         WHERE consumer = $1 AND (source, position) > ($2, $3) AND dead_at IS NOT NULL AND replayed_at IS NULL
         ORDER BY source, position
         LIMIT $4
        """,
        *(consumer, *after, LISTED),
    )
