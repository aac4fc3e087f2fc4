"""Every SQL statement of a relay: the publisher's side of events. Tables and words are in `events.py`.

Three states of an outbox row: fresh (nobody has been offered it), owed (not everybody has taken it, `outbox_retries`
says who has not), published (all have). Only the holder of the lease changes states, in a transaction that begins with
`renew`: that statement locks the row of the lease, so that these transactions run one after the other, and a process
that has lost the lease without noticing changes nothing.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Final

import msgspec

from .db import Row, Tx
from .events import KEPT_DAYS, Event

LEASE_SECONDS: Final = 5.0
BATCH: Final = 500
REAPED_AT_ONCE: Final = 1_000
LAG_COUNT_LIMIT: Final = 10_000


class Debt(msgspec.Struct, frozen=True, gc=False):
    """An event that a consumer has not taken. `wait_s` until the next try; None: held back behind an earlier one."""

    event: Event
    consumer: str
    tries: int
    wait_s: float | None
    error: str

    @property
    def line(self) -> Line:
        """Whom it waits in one line with."""
        return self.consumer, self.event.subject, self.event.subject_id


Line = tuple[str, str, int]
"""A consumer, and the subject whose events it gets one after the other."""


class LineRow(Row):
    consumer: str
    subject: str
    subject_id: int

    @property
    def line(self) -> Line:
        return self.consumer, self.subject, self.subject_id


class HeadRow(Row):
    """The first event of a line."""

    consumer: str
    subject: str
    subject_id: int
    event_id: int


class DueRow(Row):
    """An event that is owed, and to whom."""

    consumer: str
    tries: int
    source: str
    id: int
    type: str
    subject: str
    subject_id: int
    version: int
    data: str
    at: datetime.datetime

    def event(self) -> Event:
        return Event(
            self.source, self.id, self.type, self.subject, self.subject_id, self.version, self.data, self.at
        )  # fmt: skip


class StrangerRow(Row):
    """A debt to a consumer that nobody has any more."""

    event_id: int
    consumer: str


class LagRow(Row):
    count: int
    """At most `LAG_COUNT_LIMIT`."""
    age_s: float


# ------------------------------------------------------------------------------------------------------------ lease


async def is_led_by_another(tx: Tx, holder: str) -> bool:
    """A look that locks nothing, for those who wait: taking the lease is tried only when it can be had."""
    return bool(
        await tx.fetch_values(
            str,
            """
            SELECT name
              FROM relays
             WHERE holder <> $1
               AND leased_until BETWEEN clock_timestamp() AND clock_timestamp() + make_interval(secs => 2 * $2)
            """,
            holder,
            LEASE_SECONDS,
        )
    )


async def take_lead(tx: Tx, holder: str) -> bool:
    """Takes the lease, or renews it. The database's clock judges, the same for all who want it.

    One that would last for longer than any is given was written before that clock was set back: nobody waits for it.
    """
    # No wait for the disk, here and in `renew`: a lease or mark that a power failure takes back costs duplicates only.
    await tx.execute("SET LOCAL synchronous_commit = off")
    taken = await tx.execute(
        """
        INSERT INTO relays (name, holder, leased_until)
        VALUES ('outbox', $1, clock_timestamp() + make_interval(secs => $2))
            ON CONFLICT ON CONSTRAINT relays_pkey DO UPDATE
           SET holder = excluded.holder, leased_until = excluded.leased_until
         WHERE relays.holder = excluded.holder
            OR relays.leased_until NOT BETWEEN clock_timestamp()
                                           AND clock_timestamp() + make_interval(secs => 2 * $2)
        """,
        holder,
        LEASE_SECONDS,
    )
    return taken == 1


async def renew(tx: Tx, holder: str) -> bool:
    """Makes sure that the lease is still ours, and stays ours until this transaction ends. False: it is not."""
    held = await tx.fetch_values(
        str,
        """
        UPDATE relays
           SET leased_until = clock_timestamp() + make_interval(secs => $2)
         WHERE name = 'outbox' AND holder = $1
        RETURNING set_config('synchronous_commit', 'off', true)
        """,
        holder,
        LEASE_SECONDS,
    )
    return bool(held)


async def release(tx: Tx, holder: str) -> None:
    """Gives the lease back, so that the next process need not wait for its end."""
    await tx.execute("DELETE FROM relays WHERE holder = $1", holder)


# ---------------------------------------------------------------------------------------------------------- reading


async def plan_for_backlog(tx: Tx) -> None:
    """First in a transaction that reads what waits: takes it from an index that has its order, up to the limit.

    There is seldom anything, so that reading all of it and sorting looks cheapest; the plan is then kept, and a backlog
    of a million events would be read for each batch of it.
    """
    await tx.execute(
        "SELECT set_config('enable_sort', 'off', true), set_config('enable_incremental_sort', 'off', true)"
    )


async def fresh(tx: Tx, source: str) -> list[Event]:
    """Up to `BATCH` events that nobody has been offered, the oldest first."""
    return await tx.fetch(
        Event,
        """
        SELECT $1::text AS source, id, type, subject, subject_id, version, data, at
          FROM outbox
         WHERE published_at IS NULL AND NOT owed
         ORDER BY owed, id
         LIMIT $2
        """,
        source,
        BATCH,
    )


async def is_indebted(tx: Tx) -> bool:
    """Whether anything is owed to anybody."""
    return (await tx.fetch_values(bool, "SELECT EXISTS (SELECT FROM outbox_retries)"))[0]


async def waiting_lines(tx: Tx, events: Sequence[Event], consumers: Sequence[str]) -> set[Line]:
    """The consumers that have not taken an earlier event of a subject of these."""
    subjects = list({(event.subject, event.subject_id) for event in events})
    rows = await tx.fetch(
        LineRow,
        """
        SELECT c.consumer, s.subject, s.subject_id
          FROM unnest($1::text[], $2::bigint[]) AS s (subject, subject_id)
         CROSS JOIN unnest($3::text[]) AS c (consumer)
         CROSS JOIN LATERAL (
            SELECT event_id
              FROM outbox_retries
             WHERE consumer = c.consumer AND subject = s.subject AND subject_id = s.subject_id
             ORDER BY event_id
             LIMIT 1
         ) owed
        """,
        [subject for subject, _ in subjects],
        [subject_id for _, subject_id in subjects],
        consumers,
    )
    return {row.line for row in rows}


async def due_heads(tx: Tx, consumers: Sequence[str]) -> list[HeadRow]:
    """Up to `BATCH` lines of each consumer whose first event is due: one that is down must not take all the room."""
    # Not `clock_timestamp()`, with which all that is held back would be read to find that it is not due.
    return await tx.fetch(
        HeadRow,
        """
        SELECT h.consumer, h.subject, h.subject_id, h.event_id
          FROM unnest($1::text[]) AS c (consumer)
         CROSS JOIN LATERAL (
            SELECT consumer, subject, subject_id, event_id
              FROM outbox_retries
             WHERE consumer = c.consumer AND retry_at <= now()
             ORDER BY retry_at
             LIMIT $2
         ) h
        """,
        consumers,
        BATCH,
    )


async def due(tx: Tx, source: str, heads: Sequence[HeadRow]) -> list[DueRow]:
    """The events at the heads of lines with those that are held back behind them, by id. Few lines go further."""
    # Sorted here: asked for an order, the planner might read the whole outbox in that order.
    rows = await tx.fetch(
        DueRow,
        """
        SELECT r.consumer, r.tries, $1::text AS source, o.id, o.type, o.subject, o.subject_id, o.version, o.data, o.at
          FROM unnest($2::text[], $3::text[], $4::bigint[], $5::bigint[]) AS h (consumer, subject, subject_id, event_id)
         CROSS JOIN LATERAL (
            SELECT event_id, consumer, tries
              FROM outbox_retries
             WHERE consumer = h.consumer AND subject = h.subject AND subject_id = h.subject_id
               AND event_id >= h.event_id
             ORDER BY event_id
             LIMIT $6
         ) r
         CROSS JOIN LATERAL (
            SELECT id, type, subject, subject_id, version, data, at FROM outbox WHERE id = r.event_id LIMIT 1
         ) o
        """,
        source,
        [head.consumer for head in heads],
        [head.subject for head in heads],
        [head.subject_id for head in heads],
        [head.event_id for head in heads],
        max(1, BATCH // len(heads)),
    )
    return sorted(rows, key=lambda row: row.id)


async def lag(tx: Tx) -> LagRow:
    """How many events are not published, and the age of the oldest in seconds."""
    rows = await tx.fetch(
        LagRow,
        """
        WITH waiting AS (
            (SELECT id FROM outbox WHERE published_at IS NULL AND NOT owed ORDER BY owed, id LIMIT $1)
            UNION ALL
            (SELECT id FROM outbox WHERE published_at IS NULL AND owed ORDER BY owed, id LIMIT $1)
        )
        SELECT least(count(*), $1) AS count,
               coalesce(
                   extract(epoch FROM clock_timestamp() - (SELECT at FROM outbox WHERE id = min(waiting.id))), 0
               )::float8 AS age_s
          FROM waiting
        """,
        LAG_COUNT_LIMIT,
    )
    return rows[0]


# --------------------------------------------------------------------------------------------------------- settling


async def publish(tx: Tx, ids: Sequence[int]) -> None:
    """Marks events that everybody has taken at once."""
    await tx.execute("UPDATE outbox SET published_at = clock_timestamp() WHERE id = ANY($1::bigint[])", ids)


async def owe(tx: Tx, debts: Sequence[Debt]) -> None:
    """Writes down who has not taken what; of a debt that is known already, the new try. `debts` in the order of ids."""
    # Whether something is before it in its line is asked here, not when the event was read: what was before it may have
    # been taken since, and then nobody would come back to give this one its turn.
    await tx.execute(
        """
        INSERT INTO outbox_retries (event_id, consumer, subject, subject_id, tries, retry_at, error)
        SELECT d.event_id, d.consumer, d.subject, d.subject_id, d.tries,
               CASE WHEN d.is_first AND NOT EXISTS (
                   SELECT FROM outbox_retries r
                    WHERE r.consumer = d.consumer AND r.subject = d.subject AND r.subject_id = d.subject_id
                      AND r.event_id < d.event_id
               ) THEN clock_timestamp() + make_interval(secs => coalesce(d.wait_s, 0)) ELSE 'infinity' END,
               d.error
          FROM unnest($1::bigint[], $2::text[], $3::text[], $4::bigint[], $5::integer[], $6::boolean[], $7::float8[],
                      $8::text[])
               AS d (event_id, consumer, subject, subject_id, tries, is_first, wait_s, error)
            ON CONFLICT ON CONSTRAINT outbox_retries_pkey DO UPDATE
           SET tries = excluded.tries, retry_at = excluded.retry_at, error = excluded.error
        """,
        [d.event.id for d in debts],
        [d.consumer for d in debts],
        [d.event.subject for d in debts],
        [d.event.subject_id for d in debts],
        [d.tries for d in debts],
        _firsts(debts),
        [d.wait_s for d in debts],
        [d.error for d in debts],
    )
    await tx.execute(
        "UPDATE outbox SET owed = true WHERE id = ANY($1::bigint[]) AND NOT owed", list({d.event.id for d in debts})
    )


def _firsts(debts: Sequence[Debt]) -> list[bool]:
    """For each, whether no other of its line is before it in `debts`: a statement does not see its own rows."""
    seen: set[Line] = set()
    return [debt.line not in seen and not seen.add(debt.line) for debt in debts]


async def strike_out(tx: Tx, paid: Sequence[tuple[Event, str]]) -> None:
    """Takes off the list what consumers have taken."""
    await tx.execute(
        """
        DELETE FROM outbox_retries r
         USING unnest($1::text[], $2::text[], $3::bigint[], $4::bigint[]) AS p (consumer, subject, subject_id, event_id)
         WHERE r.consumer = p.consumer AND r.subject = p.subject AND r.subject_id = p.subject_id
           AND r.event_id = p.event_id
        """,
        [consumer for _, consumer in paid],
        [event.subject for event, _ in paid],
        [event.subject_id for event, _ in paid],
        [event.id for event, _ in paid],
    )


async def give_turns(tx: Tx, paid: Sequence[tuple[Event, str]]) -> None:
    """Lets the next of each line that has moved be due."""
    lines = list({(consumer, event.subject, event.subject_id) for event, consumer in paid})
    await tx.execute(
        """
        UPDATE outbox_retries r
           SET retry_at = clock_timestamp()
          FROM unnest($1::text[], $2::text[], $3::bigint[]) AS l (consumer, subject, subject_id)
         CROSS JOIN LATERAL (
            SELECT ctid, retry_at
              FROM outbox_retries
             WHERE consumer = l.consumer AND subject = l.subject AND subject_id = l.subject_id
             ORDER BY event_id
             LIMIT 1
         ) next
         WHERE r.ctid = next.ctid AND next.retry_at = 'infinity'
        """,
        [consumer for consumer, _, _ in lines],
        [subject for _, subject, _ in lines],
        [subject_id for _, _, subject_id in lines],
    )


async def publish_paid(tx: Tx, ids: Sequence[int]) -> None:
    """Marks those of the events that are owed to nobody any more."""
    await tx.execute(
        """
        UPDATE outbox o
           SET published_at = clock_timestamp()
         WHERE id = ANY($1::bigint[]) AND NOT EXISTS (SELECT FROM outbox_retries r WHERE r.event_id = o.id)
        """,
        ids,
    )


async def strike_out_strangers(tx: Tx, consumers: Sequence[str]) -> list[StrangerRow]:
    """Takes a bounded number of old debts off the list that are owed to none of these consumers; gives them.

    Old is what is past the days of the outbox: while a shop is being updated, a process of the version before leads now
    and then, and does not know a consumer that the next one has.
    """
    # The names that stand in the list are looked up one after the other in the order of the key: there may be a million
    # debts, and a handful of names.
    return await tx.fetch(
        StrangerRow,
        """
        WITH RECURSIVE names AS (
            (SELECT consumer FROM outbox_retries ORDER BY consumer LIMIT 1)
            UNION ALL
            SELECT (SELECT consumer FROM outbox_retries WHERE consumer > n.consumer ORDER BY consumer LIMIT 1)
              FROM names n
             WHERE n.consumer IS NOT NULL
        )
        DELETE FROM outbox_retries r
         USING (
            SELECT o.consumer, o.subject, o.subject_id, o.event_id
              FROM names n
             CROSS JOIN LATERAL (
                SELECT r.consumer, r.subject, r.subject_id, r.event_id
                  FROM outbox_retries r
                 CROSS JOIN LATERAL (SELECT at FROM outbox WHERE id = r.event_id LIMIT 1) told
                 WHERE r.consumer = n.consumer AND told.at < now() - make_interval(days => $3)
                 LIMIT $2
             ) o
             WHERE n.consumer <> ALL($1::text[])
             LIMIT $2
         ) owed
         WHERE r.consumer = owed.consumer AND r.subject = owed.subject AND r.subject_id = owed.subject_id
           AND r.event_id = owed.event_id
        RETURNING r.event_id, r.consumer
        """,
        consumers,
        BATCH,
        KEPT_DAYS,
    )


# -------------------------------------------------------------------------------------------------------- retention


async def reap(tx: Tx) -> int:
    """Deletes a bounded number of events that were published long ago; gives how many.

    It looks at the oldest alone: what nobody could publish for as long stays, and everything behind it with it.
    """
    return await tx.execute(
        """
        DELETE FROM outbox
         WHERE id IN (SELECT id FROM outbox ORDER BY id LIMIT $1)
           AND published_at < now() - make_interval(days => $2)
        """,
        REAPED_AT_ONCE,
        KEPT_DAYS,
    )
