"""A consumer of one source: reads the event log, and has the effect of each event once.

Two periodic tasks, which run in every process that hosts the consumer:

    follow    Reads the rows behind the cursor, and moves the cursor in the transaction of their effects, by
              compare-and-set: of two processes that read the same rows, one rolls back. A batch that fails is processed
              again event by event. The event that fails is parked, and so are later events of its subject, each in the
              transaction that moves the cursor over it.
    retry     Processes parked events again, with growing pauses, in order for each subject. After `TRIES` an event is
              dead, and the next of its subject is released.

Every transaction of a consumer and source locks the row of the cursor first: batch, retry, death and replay run one
after the other. So no event is parked behind one that a retry has just removed.

An infrastructure failure (a database that is away or busy) does not count as a try.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncGenerator, Sequence
from typing import Final

import msgspec
import structlog

from mercato.chassis.contract import (
    DeadlineExceeded,
    OutcomeUnknown,
    Overloaded,
    Span,
    Unavailable,
    within,
)
from mercato.chassis.contract.context import CONSUMER
from mercato.chassis.contract.places import read
from mercato.chassis.observability import faults
from mercato.chassis.observability.clock import Clock
from mercato.chassis.observability.telemetry import Telemetry
from mercato.chassis.postgres import outbox_row
from mercato.chassis.postgres.database import Database, LockTimeout, Tx

from . import parking
from .events import TRIES, Event, SourceRow, Subscription
from .outbox import EventLog, LogPage, LogPurged, LogReplaced, ReadLog
from .parking import Cursor, CursorMovedError, Key

for _what in ("batch", "park", "retry", "dead", "replay"):
    faults.declare(f"consumer.{_what}.before_commit", f"consumer.{_what}.after_commit")

RETRY_SECONDS: Final = (1.0, 5.0, 30.0, 120.0)
"""How long an event waits after each failed try; after the last try it is dead."""
assert len(RETRY_SECONDS) == TRIES - 1

INFRASTRUCTURE: Final = (Unavailable, Overloaded, DeadlineExceeded, OutcomeUnknown, LockTimeout)
"""Failures that no event causes: a database or another service is unavailable, or busy."""

READ_SECONDS: Final = 5.0
REASON_LENGTH: Final = 1_000

log = structlog.stdlib.get_logger("mercato.consumer")


class Pace(msgspec.Struct, frozen=True):
    """How often a consumer reads, in seconds. After a full page it reads at once."""

    gather_s: float = 0.15
    """After a page that was not full: so that under load a few large batches are taken, not many small ones."""
    poll_s: float = 0.2
    """After the first empty page; each further one doubles it up to `idle_s`. A wake-up ends the pause."""
    idle_s: float = 3.0
    """The longest pause. Such reads are most of the load of an idle shop."""


class Consumer:
    """Consumes the events of `source`: `follow` and `retry` again and again, side by side.

    `wake` ends the pause of `follow`: there may be new events.
    """

    def __init__(
        self,
        subscription: Subscription,
        source: str,
        database: Database,
        event_log: EventLog,
        clock: Clock,
        telemetry: Telemetry,
        *,
        pace: Pace | None = None,
        retry_seconds: Sequence[float] = RETRY_SECONDS,
    ) -> None:
        self.key: Key = (subscription.consumer, source)
        self._subscription = subscription
        self._database = database
        self._event_log = event_log
        self._clock = clock
        self._tracing = telemetry.tracing
        self.pace = pace or Pace()
        self._pause_s = self.pace.poll_s
        self._retry_seconds = retry_seconds
        self._woken = asyncio.Event()
        self._cursor: Cursor | None = None
        """The cursor as this process moved it last; None: to be read."""
        self._is_refused = False
        self._delivered, self._retried, self._dead = (
            telemetry.counter(f"mercato_events_{name}", about, ["consumer"]).labels(subscription.consumer)
            for name, about in (
                ("delivered", "Events that had their effect."),
                ("retried", "Tries that failed, and will be repeated."),
                ("dead", "Events that were given up; they can be replayed."),
            )
        )
        lag = "Age of the oldest event of a source that a consumer had not processed when it last read."
        refused = "1 while a source refuses a consumer: its log was restored, or rows were deleted unread."
        by = ("consumer", "source")
        self._lag_seconds = telemetry.gauge("mercato_events_lag_seconds", lag, by, workers="livemostrecent")
        self._lag_seconds = self._lag_seconds.labels(*self.key)
        self._refused = telemetry.gauge("mercato_events_refused", refused, by, workers="livemax").labels(*self.key)

    def wake(self) -> None:
        self._woken.set()

    def note_failed_round(self, error: Exception) -> None:
        """Handles the failure of a round; the next round reads the stored cursor."""
        self._cursor = None
        about = {"consumer": self.key[0], "source": self.key[1], "reason": _reason(error)}
        if isinstance(error, (LogPurged, LogReplaced)):
            if not self._is_refused:
                log.error("log_refuses_consumer", **about)
            self._is_refused = True
            self._refused.set(1)
        elif isinstance(error, INFRASTRUCTURE):
            log.warning("consumer_waits", **about)
        else:
            log.error("consumer_failed", **about, exc_info=error)

    # --------------------------------------------------------------------------------------------------------- follow

    async def follow(self) -> int:
        """Processes one page, then pauses; gives the number of its rows."""
        self._woken.clear()
        cursor = self._cursor or await self._look_up()
        page = await self._read(cursor)
        if cursor is None:
            async with self._database.transaction() as tx:
                await parking.begin_cursor(tx, self.key, page.start)
            return 0
        if not page.rows:
            await self._idle()
            return 0
        self._pause_s = self.pace.poll_s
        try:
            self._cursor = await self._process(cursor, page.rows)
        except CursorMovedError:
            # Another process consumes: wait for as long as it may run.
            self._cursor = None
            await asyncio.sleep(self.pace.idle_s * random.uniform(0.5, 1.0))
            return 0
        await asyncio.sleep(0 if page.is_full else self.pace.gather_s)
        return len(page.rows)

    async def _look_up(self) -> Cursor | None:
        async with self._database.read() as tx:
            return await parking.cursor_of(tx, self.key)

    async def _read(self, cursor: Cursor | None) -> LogPage:
        after, at = (cursor.position, cursor.at) if cursor else (None, None)
        page = await self._event_log.read(ReadLog(consumer=self.key[0], after=after, at=at))
        if self._is_refused:
            self._is_refused = False
            self._refused.set(0)
        self._lag_seconds.set(max(0.0, (self._clock.now() - page.rows[0].at).total_seconds()) if page.rows else 0)
        return page

    async def _idle(self) -> None:
        """Waits for a wake-up, with a bound: it may be lost, or another process may have moved the cursor."""
        try:
            async with asyncio.timeout(self._pause_s):
                await self._woken.wait()
        except TimeoutError:
            self._pause_s = min(2 * self._pause_s, self.pace.idle_s)
            self._cursor = None

    async def _process(self, cursor: Cursor, page: Sequence[SourceRow]) -> Cursor:
        """Has the effects of a page, and moves the cursor behind it. Raises `CursorMovedError`."""
        with within(self._span(page)):
            return await self._process_page(cursor, page)

    def _span(self, page: Sequence[SourceRow]) -> Span | None:
        """The span of a page, below one for each of its events whose trace is recorded. None: there is none."""
        if not self._tracing.is_on:
            return None
        consumer, source = self.key
        types, service = self._subscription.types, consumer.partition(".")[0]
        traced = [
            Span(f"{event.type} to {consumer}", service, CONSUMER, self._tracing, read(event.trace))
            for row in page
            for event in outbox_row.traces(row.events)
            if types is None or event.type in types
        ]
        if not traced:
            return None
        span = self._tracing.batch(f"{consumer} from {source}", service, traced, CONSUMER)
        for event in traced:
            event.end()
        return span

    async def _process_page(self, cursor: Cursor, page: Sequence[SourceRow]) -> Cursor:
        end = Cursor(outbox_row.end_of_row(page[-1].id), page[-1].at)
        try:
            async with _transaction(self._database, "batch") as tx:
                has_parked = await parking.move_cursor(tx, self.key, cursor, end)
                is_whole = outbox_row.place_of(cursor.position)[1] == outbox_row.LAST_PLACE and not has_parked
                if is_whole and self._subscription.handle_rows:
                    count = await self._subscription.handle_rows(tx, page)
                else:
                    count = await self._handle(tx, self._wanted(cursor, page), has_parked=has_parked)
            self._delivered.inc(count)
        except (CursorMovedError, *INFRASTRUCTURE):
            raise
        except Exception as error:  # an edge: a consumer's handler failed
            log.warning(
                "events_processed_one_by_one", consumer=self.key[0], source=self.key[1], reason=_reason(error),
                exc_info=error,
            )  # fmt: skip
            for event in self._wanted(cursor, page):
                cursor = await self._process_alone(cursor, event)
            async with self._database.transaction() as tx:
                await parking.move_cursor(tx, self.key, cursor, end)
        return end

    def _wanted(self, cursor: Cursor, page: Sequence[SourceRow]) -> list[Event]:
        types = self._subscription.types
        if types is not None:  # JSON has each type as it is: most rows have none, and are not decoded
            page = [row for row in page if any(type_ in row.events for type_ in types)]
        events = [event for row in page for event in row.unpack() if event.id > cursor.position]
        return events if types is None else [event for event in events if event.type in types]

    async def _process_alone(self, cursor: Cursor, event: Event) -> Cursor:
        """Moves the cursor to the event, in the transaction that has its effect or parks it."""
        to = Cursor(event.id, event.at)
        try:
            async with _transaction(self._database, "batch") as tx:
                has_parked = await parking.move_cursor(tx, self.key, cursor, to)
                count = await self._handle(tx, [event], has_parked=has_parked)
            self._delivered.inc(count)
        except (CursorMovedError, *INFRASTRUCTURE):
            raise
        except Exception as error:  # an edge: a consumer's handler failed; logged by _note_failure
            async with _transaction(self._database, "park") as tx:
                await parking.move_cursor(tx, self.key, cursor, to)
                await parking.park(tx, self.key, [event], 1, self._retry_seconds[0], _reason(error))
            self._note_failure(event, 1, error)
        return to

    async def _handle(self, tx: Tx, events: list[Event], *, has_parked: bool) -> int:
        """Has the effects of events, and parks those whose subject has parked ones; gives how many had an effect."""
        if has_parked and events:
            parked = await parking.park(tx, self.key, events, 0, None, "an earlier event of its subject is parked")
            events = [event for event in events if event.id not in parked]
        if events:
            await self._subscription.handle(tx, events)
        return len(events)

    # ---------------------------------------------------------------------------------------------------------- retry

    async def retry(self) -> int:
        """Processes the parked events that are due; gives how many there were."""
        async with self._database.read() as tx:
            due = await parking.due(tx, self.key)
        for first in due:
            event: Event | None = first
            while event:
                event = await self._retry_one(event)
        return len(due)

    async def _retry_one(self, event: Event) -> Event | None:
        """Processes a parked event; gives the next event of its subject, which waited for this one."""
        try:
            async with _transaction(self._database, "retry") as tx:
                await parking.lock_cursor(tx, self.key)
                if not await parking.remove(tx, self.key, event.id, event.tries):
                    return None  # another process was faster
                await self._subscription.handle(tx, [event])
                following = await parking.release_next(tx, self.key, event)
            self._delivered.inc()
        except INFRASTRUCTURE:
            raise
        except Exception as error:  # an edge: a consumer's handler failed; logged by _note_failure
            await self._fail_again(event, event.tries + 1, error)
            return None
        return following

    async def _fail_again(self, event: Event, tries: int, error: Exception) -> None:
        is_dead = tries >= TRIES
        wait_s = 0.0 if is_dead else self._retry_seconds[tries - 1]
        async with _transaction(self._database, "dead" if is_dead else "park") as tx:
            await parking.lock_cursor(tx, self.key)
            if not await parking.note_failure(tx, self.key, event.id, tries, wait_s, _reason(error), is_dead):
                return  # another process was faster
            if is_dead:
                await parking.release_next(tx, self.key, event)
        self._note_failure(event, tries, error)

    def _note_failure(self, event: Event, tries: int, error: Exception) -> None:
        # The traceback is logged with the first try and the last: in between it is the same.
        is_dead, cause = tries >= TRIES, error if tries in (1, TRIES) else None
        (self._dead if is_dead else self._retried).inc()
        log.log(
            logging.ERROR if is_dead else logging.WARNING,
            "event_dead" if is_dead else "event_failed",
            consumer=self.key[0], event_id=f"{event.source}:{event.id}", type=event.type, tries=tries,
            reason=_reason(error), exc_info=cause,
        )  # fmt: skip


@contextlib.asynccontextmanager
async def _transaction(database: Database, what: str) -> AsyncGenerator[Tx]:
    async with database.transaction() as tx:
        yield tx
        await faults.point(f"consumer.{what}.before_commit")
    await faults.point(f"consumer.{what}.after_commit")


def _reason(error: Exception) -> str:
    """The text of an error as PostgreSQL can store it: no NUL, no lone surrogates, not too long."""
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return text[:REASON_LENGTH].replace("\0", "").encode(errors="replace").decode()


class ReplayFailed(Exception):
    """The consumer still cannot process the event, which stays dead. The cause is the handler's error."""


async def replay(database: Database, subscription: Subscription, source: str, position: int) -> bool:
    """Has the effect of a dead event. False: there is none, perhaps because another replay was faster.

    It comes out of order: later events of its subject have been processed. Raises `ReplayFailed`, or `Unavailable`.
    """
    try:
        async with _transaction(database, "replay") as tx:
            key = (subscription.consumer, source)
            await parking.lock_cursor(tx, key)
            event = await parking.mark_replayed(tx, key, position)
            if event is None:
                return False
            await subscription.handle(tx, [event])
    except INFRASTRUCTURE:
        raise
    except Exception as error:  # an edge: a consumer's handler failed
        raise ReplayFailed(_reason(error)) from error
    return True
