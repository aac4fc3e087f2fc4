"""Drives the sagas of one process. What a saga is, who drives it and what is guaranteed: `store.py`.

drive      sagas join a queue; the lanes take up to `BATCH_SIZE` of them at a time
a lane     runs its batch step by step, until each saga is finished, waits, or was taken over by another process
the sweep  renews the lease of this process, and takes over sagas that are due or whose driver's lease has ended
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import itertools
import random
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import Final

import msgspec
import structlog

from mercato.chassis.contract import (
    SERVICE_ROLE,
    Actor,
    Context,
    Place,
    ServiceError,
    Span,
    Unavailable,
    current,
)
from mercato.chassis.contract.context import INTERNAL, NO_SPAN
from mercato.chassis.contract.places import read
from mercato.chassis.observability.clock import Clock
from mercato.chassis.observability.telemetry import Telemetry
from mercato.chassis.postgres.database import Database, Tx

from .store import Key, Next, Saga, expired_drivers, is_running, reclaim, renew_lease, save, stale, take_over

BATCH_SIZE: Final = 256
LANES: Final = 2
"""Batches that a process drives at once. A batch spends its time waiting for one database after another."""
GATHER_SECONDS: Final = 0.02
"""The shortest time from the start of one batch to that of the next, unless the next is full. A single saga starts at
once; those that follow it closely share a batch, and leave the cores to the requests that start them."""
BACKLOG_LIMIT: Final = 2_000
"""Sagas that one process has started and not finished. A request that starts more waits (`Runner.acquire_slot`)."""
STEP_SECONDS: Final = 4.0
"""The deadline of the calls of one step. The lease may end meanwhile: then another process runs the same step."""
SWEPT_AT_ONCE: Final = 1_000
FIRST_PAUSE_SECONDS: Final = 0.1
LONGEST_PAUSE_SECONDS: Final = 30.0
POLL_SECONDS: Final = 0.1
LONGEST_POLL_SECONDS: Final = 1.0
"""A request that waits for a saga of another process, or for one that waits, reads its row with growing pauses."""

log = structlog.stdlib.get_logger("mercato.saga")

Step = Callable[[Sequence[Saga]], Awaitable[None]]
"""Runs sagas that are at the same step, and saves their outcomes by `Runner.saving`."""

Decided = Sequence[tuple[Saga, Next]]


class Runner:
    """Drives the sagas of one service in this process: `LANES` times at once `drive_next`, and `sweep` now and then.

    Sagas are started with `driver` as their driver, after `acquire_slot`.
    """

    def __init__(
        self,
        database: Database,
        *,
        clock: Clock,
        telemetry: Telemetry,
        lease_seconds: float = 5.0,
    ) -> None:
        self.lease_seconds = lease_seconds
        self._database = database
        self._steps: dict[tuple[str, str], Step] = {}
        self._clock = clock
        self._tracing = telemetry.tracing
        self._queue: deque[Saga] = deque()
        self._busy: dict[Key, Saga] = {}
        """The sagas of this process, queued or in a lane."""
        self._lanes: deque[asyncio.Future[None]] = deque()
        """Idle lanes."""
        self._next_start = 0.0
        """When the next batch may start if it is not full, by the clock of the event loop."""
        self._wanting: deque[asyncio.Future[None]] = deque()
        """Callers that wait in `acquire_slot`."""
        self._waiters: dict[Key, list[asyncio.Future[Next | None]]] = {}
        """Callers that wait until this process ends its work on a saga: its outcome, or None if it was lost."""
        self._ending = asyncio.Event()
        """The process is about to end: it drives no sagas, and ends all waiting."""
        self._is_draining = False
        self.driver: Final = random.getrandbits(62)
        """The name of this process among the drivers of sagas."""
        self._renewed_at: float | None = None
        self._checked_at = clock.monotonic()
        fenced = "Saves of a driver that were refused because another process had taken its saga over."
        self._fenced, self._taken, self._retried = (
            telemetry.counter(f"mercato_saga_{name}", about, ["service"]).labels(database.service)
            for name, about in (
                ("fenced", fenced),
                ("taken_over", "Sagas that a sweep has continued."),
                ("retried", "Steps that have to be tried again."),
            )
        )

    def register(self, kind: str, steps: Mapping[str, Step]) -> None:
        """Registers the code of each step of a kind of saga, by name. A step without code is never woken."""
        self._steps.update({(kind, step): code for step, code in steps.items()})

    async def acquire_slot(self) -> None:
        """Returns when this process has its lease and may start more sagas: its backlog is bounded."""
        if self._renewed_at is None:
            await self._renew()
        while len(self._busy) >= BACKLOG_LIMIT:
            waiting = asyncio.get_running_loop().create_future()
            self._wanting.append(waiting)
            await waiting

    def drive(self, sagas: Sequence[Saga]) -> None:
        """Drives sagas whose rows are committed with this driver, as soon as a lane is free."""
        for saga in sagas:
            self._busy[saga.key] = saga
        self._queue.extend(sagas)
        for _ in range(min(len(self._lanes), -(-len(self._queue) // BATCH_SIZE))):
            _wake(self._lanes)

    def drain(self) -> None:
        """Ends long waits: the process was asked to stop, and ends when all calls are answered."""
        self._is_draining = True
        self._release_waiters()

    def _release_waiters(self) -> None:
        for waiter in itertools.chain.from_iterable(self._waiters.values()):
            if not waiter.done():
                waiter.set_result(None)

    async def wait_until_idle(
        self, key: Key, resting: Sequence[str], seconds: float, *, until_drained: bool = False
    ) -> None:
        """Returns when no process works on a saga, when the time is over, or when this process is about to end.

        An idle saga is finished, parked, or waits at one of the steps in `resting`. `until_drained`, for a long wait:
        raises `Unavailable` once this process is asked to stop, so that the caller asks another process.
        """
        end, pause = self._clock.monotonic() + seconds, POLL_SECONDS
        while (left := end - self._clock.monotonic()) > 0 and not self._ending.is_set():
            longest = left
            if key not in self._busy:  # it is idle, another process drives it, or it waits for its next try
                async with self._database.read() as tx:
                    if not await is_running(tx, key, resting):
                        return
                longest, pause = min(left, pause), min(2 * pause, LONGEST_POLL_SECONDS)
            if until_drained and self._is_draining:
                raise Unavailable(service=self._database.service)
            if _rests(await self._outcome(key, longest), resting):
                return

    async def _outcome(self, key: Key, seconds: float) -> Next | None:
        """The outcome of a saga when this process ends its work on it; None if it was lost, or the time is over."""
        waiter: asyncio.Future[Next | None] = asyncio.get_running_loop().create_future()
        waiters = self._waiters.setdefault(key, [])
        waiters.append(waiter)
        await asyncio.wait([waiter], timeout=seconds)
        if waiter.done():
            return waiter.result()
        waiters.remove(waiter)
        if not waiters and self._waiters.get(key) is waiters:
            del self._waiters[key]
        return None

    @contextlib.asynccontextmanager
    async def saving(self, decided: Decided) -> AsyncGenerator[tuple[Tx, Decided]]:
        """A transaction in which outcomes of steps are saved; gives the sagas whose change the caller makes in it.

        The others were taken over meanwhile. After the commit, each saga is at its next step.
        """
        async with self._database.transaction() as tx:
            kept = await save(tx, decided)
            yield tx, [(saga, outcome) for saga, outcome in decided if (saga.key, saga.epoch) in kept]
        for saga, outcome in decided:
            if (saga.key, saga.epoch) in kept:
                saga.advance(outcome)
                if not saga.live:
                    self._release(saga, outcome)
            else:
                saga.live = False
                self._release(saga, None)
        if fenced := len(decided) - len(kept):
            self._fenced.inc(fenced)
            log.warning("saga_fenced", service=self._database.service, count=fenced)

    # ------------------------------------------------------------------------------------------------- periodic tasks

    async def drive_next(self) -> int:
        """Waits for sagas, and drives up to `BATCH_SIZE` of them until none can continue; gives how many."""
        try:
            return await self._drive_next()
        except asyncio.CancelledError:  # the process is about to end
            self._ending.set()
            self._release_waiters()
            raise

    async def _drive_next(self) -> int:
        batch = await self._next_batch()
        for saga in batch:
            # This process may have taken over its own saga, whose lease ended in the queue; it is then queued twice.
            saga.live = self._busy.get(saga.key) is saga
        try:
            await self._drive_batch([saga for saga in batch if saga.live])
        finally:
            for saga in batch:
                self._release(saga, None)
        return len(batch)

    async def _next_batch(self) -> list[Saga]:
        loop = asyncio.get_running_loop()
        while True:
            if not self._queue:
                resting = loop.create_future()
                self._lanes.append(resting)
                await resting
            elif len(self._queue) < BATCH_SIZE and (wait_s := self._next_start - loop.time()) > 0:
                await asyncio.sleep(wait_s)
            else:
                self._next_start = loop.time() + GATHER_SECONDS
                return [self._queue.popleft() for _ in range(min(BATCH_SIZE, len(self._queue)))]

    async def sweep(self) -> int:
        """Renews the lease of this process, and takes over sagas without a driver; gives how many."""
        if self._renewed_at is None or self._clock.monotonic() - self._renewed_at >= self.lease_seconds / 3:
            await self._renew()
        taken = await self._take_over()
        if self._clock.monotonic() - self._checked_at >= self.lease_seconds:
            await self._take_over_own()
        return len(taken)

    async def _renew(self) -> None:
        now = self._clock.monotonic()
        async with self._database.transaction() as tx:
            await renew_lease(tx, self.driver, self.lease_seconds)
        self._renewed_at = now

    async def _take_over(self) -> Sequence[Saga]:
        free = min(SWEPT_AT_ONCE, BACKLOG_LIMIT - len(self._busy))
        if free <= 0:
            return ()
        async with self._database.read() as tx:
            expired = await expired_drivers(tx, self.lease_seconds)
        async with self._database.transaction() as tx:
            taken = await take_over(tx, self.driver, free, expired)
        if taken:
            self._taken.inc(len(taken))
            # A saga that this process still works on was lost while the process was paused: the new epoch counts.
            self.drive(taken)
        return taken

    async def _take_over_own(self) -> None:
        """Takes over sagas whose row names this process as their driver, but which are not in its memory.

        Their start or their postponement was committed, and the answer to the commit was lost.
        """
        async with self._database.read() as tx:
            found = await stale(tx, self.driver, self.lease_seconds, BACKLOG_LIMIT + SWEPT_AT_ONCE)
        if unknown := [epoch for key, epoch in found if key not in self._busy]:
            async with self._database.transaction() as tx:
                taken = await reclaim(tx, self.driver, unknown)
            self._taken.inc(len(taken))
            self.drive(taken)
        self._checked_at = self._clock.monotonic()

    # ---------------------------------------------------------------------------------------------------------- driving

    async def _drive_batch(self, batch: Sequence[Saga]) -> None:
        """Drives a batch until no saga can continue. One that fails is tried later, and does not block the others."""
        try:
            await self._drive_through(batch)
        except Exception as error:  # an edge: after any error, the sagas are still stored and are tried again
            left = [saga for saga in batch if saga.live]
            if len(left) > 1:
                log.warning("saga_batch_rerun", size=len(left), reason=type(error).__name__, exc_info=error)
                for saga in left:
                    saga.memo = None
                    await self._drive_batch([saga])
                return
            log.error("saga_failed", sagas=[saga.key for saga in left], exc_info=error)
            await self._postpone(left)

    async def _drive_through(self, batch: Sequence[Saga]) -> None:
        while live := [saga for saga in batch if saga.live]:
            by_step: dict[tuple[str, str], list[Saga]] = {}
            for saga in live:
                by_step.setdefault((saga.kind, saga.step), []).append(saga)
            for where, sagas in by_step.items():
                span = self._span(where, sagas)
                self.enter_service_context(span)
                try:
                    with span or NO_SPAN:
                        await self._steps[where](sagas)
                except ServiceError:  # a called service, or the database, does not answer
                    await self._postpone([saga for saga in sagas if saga.live])

    def _span(self, where: tuple[str, str], sagas: Sequence[Saga]) -> Span | None:
        """The span of a step, in the traces of the requests that have moved these sagas. None: none is recorded."""
        places: dict[str, Place] = {}
        for saga in sagas:
            if saga.trace:
                places.update((p.trace_id, msgspec.structs.replace(p, about=saga.subject_id)) for p in read(saga.trace))
        if not places or not self._tracing.is_on:
            return None
        span = Span(".".join(where), self._database.service, INTERNAL, self._tracing, list(places.values()))
        span.note({"mercato.batch.size": len(sagas)})
        return span

    def enter_service_context(self, span: Span | None = None) -> None:
        """The steps call other services as the service itself, with a deadline of `STEP_SECONDS`."""
        trace_id = span.places[0].trace_id if span is not None else f"{random.getrandbits(128):032x}"
        deadline = self._clock.monotonic() + STEP_SECONDS
        current.set(Context(Actor(SERVICE_ROLE), deadline, trace_id, "", span))

    async def _postpone(self, sagas: Sequence[Saga]) -> None:
        """Saves that a try has failed. If even that fails, the sweep of this process takes its own saga over."""
        for saga in sagas:
            saga.memo = None
        try:
            async with self.saving([(saga, self.retry_later(saga)) for saga in sagas]):
                pass
        except Exception as failure:  # an edge, as above
            for saga in sagas:
                saga.live = False
            trace = None if isinstance(failure, ServiceError) else failure
            log.warning("saga_postponed_unsaved", count=len(sagas), reason=type(failure).__name__, exc_info=trace)

    def retry_later(self, saga: Saga, not_before: datetime.datetime | None = None) -> Next:
        """The same step once more, after a pause that doubles with every try and differs between sagas.

        `not_before`: the time at which the awaited work announces to be done; the next try is then.
        """
        self._retried.inc()
        if not_before is not None and saga.tries == 0:
            return Next(saga.step, saga.state, wake_at=not_before, tries=1)
        pause = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** min(saga.tries, 20))
        wake_s = pause * (0.5 + random.random())
        return Next(saga.step, saga.state, wake_s=wake_s, tries=saga.tries + 1)

    def _release(self, saga: Saga, outcome: Next | None) -> None:
        """Ends the work on a saga, so that a caller who waits for it does not wait for the rest of its batch."""
        if self._busy.get(saga.key) is not saga:  # it was taken over again meanwhile
            return
        del self._busy[saga.key]
        for waiter in self._waiters.pop(saga.key, ()):
            if not waiter.done():
                waiter.set_result(outcome)
        _wake(self._wanting)


def _rests(outcome: Next | None, resting: Sequence[str]) -> bool:
    if outcome is None or outcome.running:
        return False
    is_parked = outcome.wake_s is None and outcome.wake_at is None
    return outcome.finished or is_parked or outcome.step in resting


def _wake(sleepers: deque[asyncio.Future[None]]) -> None:
    while sleepers:
        sleeper = sleepers.popleft()
        if not sleeper.done():
            sleeper.set_result(None)
            return
