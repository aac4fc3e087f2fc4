"""The relay: from the outbox of a service to the consumers of its events.

Three loops, each of which never gives up:

    lead       Holds the lease of this outbox, so that of many processes one relays. It only saves work: two that relay
               at once deliver twice, which the inbox drops, and of the two only the holder of the lease can change what
               the outbox says (`outbox.py`). Who begins to lead strikes out what has long been owed to consumers that
               this version of the shop does not have: nobody would ever take it, and it would be kept for ever.
    offer      Takes fresh events in the order of their ids, offers each to every consumer that wants its type, and
               marks it published; or owed, with a debt for each consumer that has not taken it.
    collect    Offers again what is owed, when its time has come.

So a consumer that fails, or is down, keeps nobody else waiting: what it has not taken becomes a debt, at once, and the
others go on. Of a consumer and a subject (a line) the debts are paid one after the other, and while there is one, new
events of the line are held back behind it: the order stays.

What it costs to die at any point: before the mark, everything is offered again, and dropped by those who have it.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import itertools
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, Final, Literal, Protocol, TypeVar

import msgspec
import structlog

from . import faults, outbox
from .contract import DeadlineExceeded, Overloaded, Unavailable
from .db import Database, LockTimeout
from .events import TRIES, Event
from .outbox import Debt
from .telemetry import Telemetry

BEFORE_DELIVER: Final = "relay.before_deliver"
AFTER_DELIVER: Final = "relay.after_deliver"
BEFORE_MARK_COMMIT: Final = "relay.before_mark_commit"
AFTER_MARK_COMMIT: Final = "relay.after_mark_commit"
faults.declare(BEFORE_DELIVER, AFTER_DELIVER, BEFORE_MARK_COMMIT, AFTER_MARK_COMMIT)

RETRY_SECONDS: Final = (1.0, 5.0, 30.0, 120.0)
"""How long an event waits after each try but the last, after which it is dead."""
REAPED_WORTHWHILE: Final = outbox.REAPED_AT_ONCE // 10
"""After fewer, the next look is not at once: in a busy shop there are always a few that have just become old enough."""
RELEASE_SECONDS: Final = 0.3
"""The end of a process has not more time than that for a courtesy."""
assert len(RETRY_SECONDS) == TRIES - 1

NOT_ITS_FAULT: Final = (Unavailable, Overloaded, DeadlineExceeded, LockTimeout)
"""What no event is to blame for: the database is not there, or busy."""

T = TypeVar("T")

log = structlog.stdlib.get_logger("mercato.relay")


class Delivery(msgspec.Struct, frozen=True, gc=False):
    """An event on its way to a consumer, which has failed to take it `tries` times."""

    event: Event
    tries: int = 0


class Outcome(msgspec.Struct, frozen=True, gc=False):
    """What became of a delivery.

    taken: it will not be delivered again; `dead`: the same, but as a dead letter. failed: that was a try.
    held: not tried, because an earlier event of its subject failed. down: the consumer cannot take anything now.
    """

    kind: Literal["taken", "dead", "failed", "held", "down"]
    reason: str = ""

    @property
    def is_done(self) -> bool:
        return self.kind in ("taken", "dead")


class Recipient(msgspec.Struct, frozen=True):
    """A consumer, or whoever passes events on to some. `types`: what it wants; None: all."""

    name: str
    types: frozenset[str] | None = None


class Bus(Protocol):
    """How events reach consumers: in this process (`LocalBus`), or through a broker, which is then one recipient."""

    @property
    def recipients(self) -> Sequence[Recipient]: ...

    async def deliver(self, consumer: str, deliveries: Sequence[Delivery]) -> Sequence[Outcome]:
        """One outcome for each, in the order given, which is that of ids. Never raises because of an event."""
        ...


class Pace(msgspec.Struct, frozen=True):
    """How often a relay looks, in seconds. After a full batch it looks at once."""

    idle_s: float = 0.2
    gather_s: float = 0.15
    """After a batch that was not full: so that under load a few large batches go out, not many small ones."""
    failed_s: float = 1.0
    """After a round that failed, and between two attempts on a consumer that is down."""
    lead_s: float = 1.0
    reap_s: float = 60.0


class LeaseLostError(Exception):
    """Another process relays this outbox by now. Nothing was marked."""


class Relay:
    """Relays the outbox in `database`, whose service is called `source`. `run` until cancelled, then `release`."""

    def __init__(
        self,
        source: str,
        database: Database,
        bus: Bus,
        telemetry: Telemetry,
        *,
        pace: Pace | None = None,
        retry_seconds: Sequence[float] = RETRY_SECONDS,
    ) -> None:
        self._source = source
        self._database = database
        self._bus = bus
        self._pace = pace or Pace()
        self._retry_seconds = retry_seconds
        self._holder = secrets.token_hex(16)
        self._leads = asyncio.Event()
        self._down: set[str] = set()
        """Consumers that could not take anything the last time; only `collect` tries them again."""
        self._lag_seconds = telemetry.outbox_lag_seconds.labels(source)
        self._lag_events = telemetry.outbox_lag_events.labels(source)

    async def run(self) -> None:
        """Never returns."""
        async with asyncio.TaskGroup() as loops:
            loops.create_task(self._for_ever(self._lead))
            loops.create_task(self._for_ever(self._reap, when_leading=True))
            loops.create_task(self._for_ever(self._offer, when_leading=True))
            loops.create_task(self._for_ever(self._collect, when_leading=True))

    async def release(self) -> None:
        """Gives the lease to whoever comes next, if it can be done at once. After `run` has ended."""
        if self._leads.is_set():
            self._leads.clear()
            with contextlib.suppress(*NOT_ITS_FAULT, TimeoutError):  # it ends by itself, too
                async with asyncio.timeout(RELEASE_SECONDS), self._database.transaction() as tx:
                    await outbox.release(tx, self._holder)

    async def _for_ever(self, round_: Callable[[], Awaitable[float]], *, when_leading: bool = False) -> None:
        """Runs rounds, each of which says how many seconds to wait for the next."""
        while True:
            if when_leading:
                await self._leads.wait()
            try:
                wait_s = await round_()
            except LeaseLostError:
                self._leads.clear()
                continue
            except NOT_ITS_FAULT as error:
                log.warning("relay_waits", service=self._source, reason=str(error) or type(error).__name__)
                wait_s = self._pace.failed_s
            except Exception:  # an edge: a relay never gives up
                log.exception("relay_failed", service=self._source)
                wait_s = self._pace.failed_s
            await asyncio.sleep(wait_s)

    # ------------------------------------------------------------------------------------------------------------ lead

    async def _lead(self) -> float:
        """Takes or renews the lease; while it is ours, measures how far behind the outbox is."""
        async with self._database.read() as tx:
            mine = not await outbox.is_led_by_another(tx, self._holder)
        if mine:
            async with self._database.transaction() as tx:
                mine = await outbox.take_lead(tx, self._holder)
        if not mine:
            self._leads.clear()
            self._show_lag(outbox.LagRow(0, 0.0))  # whoever leads tells
            return self._pace.lead_s
        if not self._leads.is_set():
            await self._forget_strangers()
        self._leads.set()
        async with self._database.transaction() as tx:
            await outbox.plan_for_backlog(tx)
            self._show_lag(await outbox.lag(tx))
        return self._pace.lead_s

    async def _forget_strangers(self) -> None:
        """Strikes out debts to consumers that nobody has any more. What is owed to nobody else is then published."""
        names = [recipient.name for recipient in self._bus.recipients]
        forgotten: collections.Counter[str] = collections.Counter()
        while True:
            async with self._database.transaction() as tx:
                if not await outbox.renew(tx, self._holder):
                    raise LeaseLostError
                struck = await outbox.strike_out_strangers(tx, names)
                if struck:
                    await outbox.publish_paid(tx, list({debt.event_id for debt in struck}))
            forgotten.update(debt.consumer for debt in struck)
            if len(struck) < outbox.BATCH:
                break
        for name, count in sorted(forgotten.items()):
            log.warning("consumer_is_gone", service=self._source, consumer=name, debts=count)

    def _show_lag(self, lag: outbox.LagRow) -> None:
        self._lag_seconds.set(lag.age_s)
        self._lag_events.set(lag.count)

    # ----------------------------------------------------------------------------------------------------------- offer

    async def _offer(self) -> float:
        """Offers the next fresh events to everybody who wants them."""
        async with self._database.transaction() as tx:
            await outbox.plan_for_backlog(tx)
            events = await outbox.fresh(tx, self._source)
            if not events:
                return self._pace.idle_s
            names = [recipient.name for recipient in self._bus.recipients]
            waiting: set[outbox.Line] = set()
            if await outbox.is_indebted(tx):
                waiting = await outbox.waiting_lines(tx, events, names)
        await faults.point(BEFORE_DELIVER)
        debts = await _all([self._offered(recipient, events, waiting) for recipient in self._bus.recipients])
        await faults.point(AFTER_DELIVER)
        await self._mark(events, sorted(itertools.chain(*debts), key=lambda debt: debt.event.id))
        return 0.0 if len(events) == outbox.BATCH else self._pace.gather_s

    async def _offered(self, recipient: Recipient, events: Sequence[Event], waiting: set[outbox.Line]) -> list[Debt]:
        """What a recipient has not taken of fresh events."""
        name, types = recipient.name, recipient.types
        wanted = events if types is None else [event for event in events if event.type in types]
        if name in self._down:
            return [Debt(event, name, 0, 0.0, "it was down") for event in wanted]
        free, debts = wanted, list[Debt]()
        if waiting:
            free = [event for event in wanted if (name, event.subject, event.subject_id) not in waiting]
            taken = set(map(id, free))
            debts = [Debt(e, name, 0, None, "an earlier event waits") for e in wanted if id(e) not in taken]
        deliveries = [Delivery(event) for event in free]
        return debts + self._unpaid(name, deliveries, await self._deliver(name, deliveries))

    async def _mark(self, events: Sequence[Event], debts: Sequence[Debt]) -> None:
        owed = {debt.event.id for debt in debts}
        async with self._database.transaction() as tx:
            if not await outbox.renew(tx, self._holder):
                raise LeaseLostError
            if debts:
                await outbox.owe(tx, debts)
            await outbox.publish(tx, [event.id for event in events if event.id not in owed])
            await faults.point(BEFORE_MARK_COMMIT)
        await faults.point(AFTER_MARK_COMMIT)

    # --------------------------------------------------------------------------------------------------------- collect

    async def _collect(self) -> float:
        """Offers again what is due."""
        names = [recipient.name for recipient in self._bus.recipients]
        async with self._database.transaction() as tx:
            await outbox.plan_for_backlog(tx)
            heads = await outbox.due_heads(tx, names)
            if not heads:
                return self._pace.idle_s
            due = await outbox.due(tx, self._source, heads)
        by_consumer: dict[str, list[Delivery]] = {}
        for row in due:
            by_consumer.setdefault(row.consumer, []).append(Delivery(row.event(), row.tries))
        await faults.point(BEFORE_DELIVER)
        outcomes = await _all([self._deliver(name, owed) for name, owed in by_consumer.items()])
        await faults.point(AFTER_DELIVER)
        is_moving = await self._settle(by_consumer, dict(zip(by_consumer, outcomes, strict=True)))
        if self._down:
            return self._pace.failed_s
        return 0.0 if is_moving else self._pace.gather_s

    async def _settle(self, owed: Mapping[str, Sequence[Delivery]], outcomes: Mapping[str, Sequence[Outcome]]) -> bool:
        """Writes down what became of debts. True where one was paid: its line can go on at once."""
        paid: list[tuple[Event, str]] = []
        failed: list[Debt] = []
        for name, deliveries in owed.items():
            pairs = list(zip(deliveries, outcomes[name], strict=True))
            paid += [(delivery.event, name) for delivery, outcome in pairs if outcome.is_done]
            # Who was held back, or met a consumer that is down, is owed as before.
            tried = [delivery for delivery, outcome in pairs if outcome.kind == "failed"]
            failed += self._unpaid(name, tried, [outcome for _, outcome in pairs if outcome.kind == "failed"])
        if not paid and not failed:
            return False
        async with self._database.transaction() as tx:
            if not await outbox.renew(tx, self._holder):
                raise LeaseLostError
            # In this order: one that failed is the first of its line only when those before it are paid.
            if paid:
                await outbox.strike_out(tx, paid)
            if failed:
                await outbox.owe(tx, failed)
            if paid:
                await outbox.give_turns(tx, paid)
                await outbox.publish_paid(tx, [event.id for event, _ in paid])
            await faults.point(BEFORE_MARK_COMMIT)
        await faults.point(AFTER_MARK_COMMIT)
        return bool(paid)

    # --------------------------------------------------------------------------------------------------------- deliver

    async def _deliver(self, name: str, deliveries: Sequence[Delivery]) -> Sequence[Outcome]:
        if not deliveries:
            return ()
        outcomes = await self._bus.deliver(name, deliveries)
        assert len(outcomes) == len(deliveries), f"{len(outcomes)} outcomes of {len(deliveries)} deliveries"
        if any(outcome.kind == "down" for outcome in outcomes):
            self._down.add(name)
        else:
            self._down.discard(name)
        return outcomes

    def _unpaid(self, name: str, deliveries: Sequence[Delivery], outcomes: Sequence[Outcome]) -> list[Debt]:
        debts: list[Debt] = []
        for delivery, outcome in zip(deliveries, outcomes, strict=True):
            if outcome.is_done:
                continue
            failed = outcome.kind == "failed"
            debts.append(
                Debt(delivery.event, name, delivery.tries + failed, self._wait_s(delivery, outcome), outcome.reason)
            )
        return debts

    def _wait_s(self, delivery: Delivery, outcome: Outcome) -> float | None:
        if outcome.kind == "failed":
            return self._retry_seconds[min(delivery.tries, len(self._retry_seconds) - 1)]
        return None if outcome.kind == "held" else 0.0

    # ------------------------------------------------------------------------------------------------------- retention

    async def _reap(self) -> float:
        """Deletes what was published long ago, a bounded number a transaction."""
        async with self._database.transaction() as tx:
            deleted = await outbox.reap(tx)
        # Not only after a full round: of the oldest, some may be there because nobody could publish them.
        return 0.0 if deleted >= REAPED_WORTHWHILE else self._pace.reap_s


async def _all(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The results, in order. The work goes on at the same time, each in a database of its own."""
    if len(work) == 1:
        return [await work[0]]
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(each) for each in work]
    return [task.result() for task in tasks]
