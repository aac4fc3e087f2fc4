"""Taking events: the consumers' side, and the bus between those that live in one process.

    together       One transaction in the consumer's own database: its inbox rows, the effect, the commit. What was
                   taken before, the inbox does not let through. The relay hears "taken" after the commit, never before.
    alone          A batch that fails has not happened. Its events are then taken one by one, so that the one that
                   cannot be taken fails alone, and holds back only the later ones of its subject.
    dead letter    After the last try, in the transaction of its inbox row: it does not come again by itself.
    replay         One transaction too: the dead letter is marked and the effect comes. Whoever dies, both or neither.

A database that is not there is no event's fault: it costs none a try, however long it lasts.
"""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final

import structlog

from . import faults
from .db import Database, Row, Tx
from .events import INBOX_KEPT_DAYS, TRIES, Event, Subscription
from .relay import NOT_ITS_FAULT, Delivery, Outcome, Recipient
from .telemetry import Telemetry

BEFORE_COMMIT: Final = "inbox.before_commit"
AFTER_COMMIT: Final = "inbox.after_commit"
DEAD_BEFORE_COMMIT: Final = "inbox.dead.before_commit"
DEAD_AFTER_COMMIT: Final = "inbox.dead.after_commit"
REPLAY_BEFORE_COMMIT: Final = "inbox.replay.before_commit"
REPLAY_AFTER_COMMIT: Final = "inbox.replay.after_commit"
faults.declare(
    BEFORE_COMMIT,
    AFTER_COMMIT,
    DEAD_BEFORE_COMMIT,
    DEAD_AFTER_COMMIT,
    REPLAY_BEFORE_COMMIT,
    REPLAY_AFTER_COMMIT,
)

REASON_LENGTH: Final = 1_000
DEAD_LISTED: Final = 1_000
REAPED_AT_ONCE: Final = 1_000
REAP_EVERY_SECONDS: Final = 60.0

TAKEN: Final = Outcome("taken")
DEAD: Final = Outcome("dead")
HELD: Final = Outcome("held", "an earlier event of its subject waits")

log = structlog.stdlib.get_logger("mercato.inbox")


class LocalBus:
    """Hands events to the consumers of this process. Their names are their own in the whole shop."""

    def __init__(self, subscribers: Sequence[tuple[Subscription, Database]], telemetry: Telemetry) -> None:
        consumers = [Consumer(subscription, database, telemetry) for subscription, database in subscribers]
        self._consumers: Mapping[str, Consumer] = {consumer.name: consumer for consumer in consumers}
        assert len(self._consumers) == len(consumers), "two consumers have the same name: they would share an inbox"
        self.recipients: Sequence[Recipient] = [Recipient(s.consumer, s.types) for s, _ in subscribers]

    async def deliver(self, consumer: str, deliveries: Sequence[Delivery]) -> Sequence[Outcome]:
        """See `relay.Bus`."""
        return await self._consumers[consumer].take(deliveries)


class Consumer:
    """A subscription, and the database in which its effects are."""

    def __init__(self, subscription: Subscription, database: Database, telemetry: Telemetry) -> None:
        self.name = subscription.consumer
        self._subscription = subscription
        self._database = database
        self._taken = telemetry.events_delivered.labels(self.name)
        self._retried = telemetry.events_retried.labels(self.name)
        self._dead = telemetry.events_dead.labels(self.name)

    async def take(self, deliveries: Sequence[Delivery]) -> list[Outcome]:
        """One outcome for each. Raises nothing but the end of this task."""
        progress = _Progress()
        # One that has failed before would only spoil the batch again. It may overtake the others: it is the first of
        # its subject, or it would not have been tried before.
        for delivery in deliveries:
            if delivery.tries:
                await self._take_alone(delivery, progress)
        fresh = [delivery for delivery in deliveries if not delivery.tries and progress.is_free(delivery)]
        if len(fresh) == 1 or not await self._take_together(fresh, progress):
            for delivery in fresh:
                await self._take_alone(delivery, progress)
        return [progress.outcome(delivery) for delivery in deliveries]

    async def _take_together(self, deliveries: Sequence[Delivery], progress: _Progress) -> bool:
        """False: one of them failed, and nothing has happened."""
        if not deliveries:
            return True
        try:
            await self._take([delivery.event for delivery in deliveries])
        except NOT_ITS_FAULT as error:
            progress.down = Outcome("down", _reason(error))
        except Exception as error:  # an edge: a consumer's handler failed
            log.warning("events_taken_one_by_one", consumer=self.name, count=len(deliveries), reason=_reason(error))
            return False
        else:
            for delivery in deliveries:
                progress.note(delivery, TAKEN)
        return True

    async def _take_alone(self, delivery: Delivery, progress: _Progress) -> None:
        if not progress.is_free(delivery):
            return
        try:
            await self._take([delivery.event])
        except NOT_ITS_FAULT as error:
            progress.down = Outcome("down", _reason(error))
        except Exception as error:  # an edge: a consumer's handler failed
            await self._note_failure(delivery, error, progress)
        else:
            progress.note(delivery, TAKEN)

    async def _take(self, events: Sequence[Event]) -> None:
        """The effect of those that are new, once."""
        subscription = self._subscription
        async with self._database.transaction() as tx:
            new = await enter(tx, self.name, events) if subscription.has_inbox else events
            if new:
                await subscription.handle(tx, new)
            await faults.point(BEFORE_COMMIT)
        await faults.point(AFTER_COMMIT)
        self._taken.inc(len(new))

    async def _note_failure(self, delivery: Delivery, error: Exception, progress: _Progress) -> None:
        event, tries, reason = delivery.event, delivery.tries + 1, _reason(error)
        # Where it failed is told at the first try and at the last: in between it is the same.
        cause = error if tries in (1, TRIES) else None
        log.warning(
            "event_failed",
            consumer=self.name,
            event_id=f"{event.source}:{event.id}",
            tries=tries,
            reason=reason,
            exc_info=cause,
        )
        if tries < TRIES:
            self._retried.inc()
            progress.note(delivery, Outcome("failed", reason))
            return
        try:
            progress.note(delivery, DEAD if await self._bury(event, reason, tries) else TAKEN)
        except NOT_ITS_FAULT as busy:
            progress.down = Outcome("down", _reason(busy))

    async def _bury(self, event: Event, reason: str, tries: int) -> bool:
        """Makes a dead letter of an event. False: it was taken meanwhile, by a delivery that we know nothing of."""
        async with self._database.transaction() as tx:
            if self._subscription.has_inbox and not await enter(tx, self.name, [event]):
                return False
            await write_dead_letter(tx, self.name, event, reason, tries)
            await faults.point(DEAD_BEFORE_COMMIT)
        await faults.point(DEAD_AFTER_COMMIT)
        self._dead.inc()
        log.error("event_dead", consumer=self.name, event_id=f"{event.source}:{event.id}", type=event.type)
        return True


class _Progress:
    """What has become of the deliveries of one call."""

    def __init__(self) -> None:
        self.down: Outcome | None = None
        """Set when the consumer's database does not answer: nothing more is tried."""
        self._outcomes: dict[int, Outcome] = {}
        self._held: set[tuple[str, int]] = set()

    def is_free(self, delivery: Delivery) -> bool:
        return self.down is None and (delivery.event.subject, delivery.event.subject_id) not in self._held

    def note(self, delivery: Delivery, outcome: Outcome) -> None:
        self._outcomes[delivery.event.id] = outcome
        if not outcome.is_done:
            self._held.add((delivery.event.subject, delivery.event.subject_id))

    def outcome(self, delivery: Delivery) -> Outcome:
        return self._outcomes.get(delivery.event.id) or self.down or HELD


def _reason(error: Exception) -> str:
    """What PostgreSQL can store of an error: no NUL, no half characters, not too long."""
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return text[:REASON_LENGTH].replace("\0", "").encode(errors="replace").decode()


# ----------------------------------------------------------------------------------------------------------- replay


class ReplayFailed(Exception):
    """The consumer still cannot take the event; its dead letter is where it was. The cause is the handler's error."""


async def replay(database: Database, subscription: Subscription, source: str, event_id: int) -> bool:
    """Lets a consumer take its dead letter. False: there is none, perhaps because somebody else is faster.

    Its inbox row stays, so that the relay never brings the event again. It comes out of order: what happened to its
    subject since, the consumer knows already. Raises `ReplayFailed`, or `Unavailable`.
    """
    try:
        async with database.transaction() as tx:
            # Of two who replay the same, the second waits here, and then finds nothing.
            event = await mark_replayed(tx, subscription.consumer, source, event_id)
            if event is None:
                return False
            await subscription.handle(tx, [event])
            await faults.point(REPLAY_BEFORE_COMMIT)
    except NOT_ITS_FAULT:
        raise
    except Exception as error:  # an edge: a consumer's handler failed
        raise ReplayFailed(_reason(error)) from error
    await faults.point(REPLAY_AFTER_COMMIT)
    return True


# ------------------------------------------------------------------------------------------------------- statements


class DeadLetter(Row):
    """An event that a consumer could not take. `at` is when it was given up, `event_at` when it became true."""

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


async def enter(tx: Tx, consumer: str, events: Sequence[Event]) -> list[Event]:
    """Writes the inbox rows of events of one source; gives those that had none, in order.

    Who delivers the same at the same moment waits here until we are done, and then gets nothing.
    """
    entered = set(
        await tx.fetch_values(
            int,
            """
            INSERT INTO inbox (consumer, source, event_id, subject, subject_id, version)
            SELECT $1, $2, e.id, e.subject, e.subject_id, e.version
              FROM unnest($3::bigint[], $4::text[], $5::bigint[], $6::bigint[]) WITH ORDINALITY
                   AS e (id, subject, subject_id, version, n)
             ORDER BY e.n
                ON CONFLICT ON CONSTRAINT inbox_pkey DO NOTHING
            RETURNING event_id
            """,
            consumer,
            events[0].source,
            [event.id for event in events],
            [event.subject for event in events],
            [event.subject_id for event in events],
            [event.version for event in events],
        )
    )
    return [event for event in events if event.id in entered]


async def write_dead_letter(tx: Tx, consumer: str, event: Event, error: str, tries: int) -> None:
    # One without an inbox may be given up again after its first dead letter, if the relay died in between: also when
    # that was replayed meanwhile, and then it has had its effect.
    await tx.execute(
        """
        INSERT INTO dead_letters (
            consumer, source, event_id, type, subject, subject_id, version, data, event_at, error, tries)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)
            ON CONFLICT ON CONSTRAINT dead_letters_pkey DO NOTHING
        """,
        consumer,
        event.source,
        event.id,
        event.type,
        event.subject,
        event.subject_id,
        event.version,
        event.data,
        event.at,
        error,
        tries,
    )


async def mark_replayed(tx: Tx, consumer: str, source: str, event_id: int) -> Event | None:
    """The event of a dead letter, which is none from now on; None: there is none."""
    # Whoever replays the same at the same moment waits for this row, looks at the clause again, and gets nothing.
    return await tx.fetch_one(
        Event,
        """
        UPDATE dead_letters
           SET replayed_at = now()
         WHERE consumer = $1 AND source = $2 AND event_id = $3 AND replayed_at IS NULL
        RETURNING source, event_id AS id, type, subject, subject_id, version, data, event_at AS at
        """,
        consumer,
        source,
        event_id,
    )


async def dead_letters(tx: Tx, consumer: str, after: tuple[str, int] = ("", 0)) -> list[DeadLetter]:
    """The dead letters of a consumer by source and event id, those behind `after`; at most `DEAD_LISTED`."""
    return await tx.fetch(
        DeadLetter,
        """
        SELECT consumer, source, event_id, type, subject, subject_id, version, error, tries, event_at, at
          FROM dead_letters
         WHERE consumer = $1 AND (source, event_id) > ($2, $3) AND replayed_at IS NULL
         ORDER BY source, event_id
         LIMIT $4
        """,
        consumer,
        *after,
        DEAD_LISTED,
    )


async def reap(tx: Tx, consumer: str) -> int:
    """Deletes a bounded number of inbox rows of events that cannot come again; gives how many."""
    # For each source the lowest ids, which are its oldest: no index is kept just for this.
    return await tx.execute(
        """
        WITH RECURSIVE sources AS (
            (SELECT source FROM inbox WHERE consumer = $1 ORDER BY source LIMIT 1)
            UNION ALL
            SELECT (SELECT source FROM inbox WHERE consumer = $1 AND source > s.source ORDER BY source LIMIT 1)
              FROM sources s
             WHERE s.source IS NOT NULL
        )
        DELETE FROM inbox i
         USING sources s
         CROSS JOIN LATERAL (
            SELECT event_id FROM inbox WHERE consumer = $1 AND source = s.source ORDER BY event_id LIMIT $2
         ) oldest
         WHERE i.consumer = $1 AND i.source = s.source AND i.event_id = oldest.event_id
           AND i.at < now() - make_interval(days => $3)
        """,
        consumer,
        REAPED_AT_ONCE,
        INBOX_KEPT_DAYS,
    )


async def reap_replayed(tx: Tx, consumer: str) -> int:
    """Deletes a bounded number of dead letters that were replayed long ago; gives how many."""
    return await tx.execute(
        """
        DELETE FROM dead_letters
         WHERE (consumer, source, event_id) IN (
            SELECT consumer, source, event_id
              FROM dead_letters
             WHERE consumer = $1 AND replayed_at < now() - make_interval(days => $2)
             LIMIT $3
         )
        """,
        consumer,
        INBOX_KEPT_DAYS,
        REAPED_AT_ONCE,
    )


async def reap_forever(database: Database, consumers: Sequence[str]) -> None:
    """The loop of a service that has inboxes."""
    while True:
        for consumer in consumers:
            await _reap_all(database, reap, consumer)
            await _reap_all(database, reap_replayed, consumer)
        await asyncio.sleep(REAP_EVERY_SECONDS)


async def _reap_all(database: Database, reap_some: Callable[[Tx, str], Awaitable[int]], consumer: str) -> None:
    deleted = REAPED_AT_ONCE
    while deleted >= REAPED_AT_ONCE:
        async with database.transaction() as tx:
            deleted = await reap_some(tx, consumer)
