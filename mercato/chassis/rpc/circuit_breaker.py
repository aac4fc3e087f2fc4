"""A circuit breaker: who keeps failing is left alone for a while, and callers hear so at once instead of waiting.

The parts
    A `Breaker` stands before one callee in one calling process: the reads of one service, or its writes. `admit()`
    gives a `Permit` for one attempt, or refuses; the permit is told what became of the attempt, and also when it has
    taken long. A `BreakingTransport` does that for every batch of a transport. What counts as a failure is the
    caller's decision; business errors never should: a service that says no is in good health.

The states
    closed      everybody is let through. Results are counted over a sliding window; once there are enough of them and
                too many failed, or too many were slow, the breaker opens. A slow call counts as soon as it is slow, not
                when it ends: a service that stands still is found out before the time of its callers is over.
    open        everybody is refused, at once, until the open time is over.
    half-open   one attempt, the probe, was let through; everybody else is refused until it reports. Its success closes
                the breaker; its failure, and also its slowness, opens it for twice as long as before.

Guaranteed
    - At most one probe at a time, however many callers come at once.
    - From open to closed only by the success of a probe.
    - Time to the next probe is bounded: an open time is never longer than `longest_open_seconds`, and a probe whose
      caller was cancelled, or that has not reported when its lease is over, gives way to the next caller.
    - A report that comes late, from a permit of an earlier state, changes nothing: what failed before the service was
      left alone says nothing about its health after.
    - One batch alone never opens it, however many calls it has.
    - While it is not closed, no call waits in a queue for a lane that a batch without an answer holds: batches leave
      without a lane, and are refused.
    - Memory does not grow with calls: results are counted in a fixed number of buckets, permits are kept while they
      are in flight.

A breaker has no timer and no task: states change when there is a call or a report. A transport has one timer, for the
oldest batch in flight. Both belong to one event loop and need no lock.
"""

from __future__ import annotations

import asyncio
import contextvars
import enum
import math
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

from mercato.chassis.contract import Context, DeadlineExceeded, Operation, Retry, Unavailable
from mercato.chassis.observability.clock import Clock

from .batching import Outcome
from .limits import CallLimits
from .transports import Transport

BUCKETS: Final = 10
"""Parts of the window. Results leave it a part at a time, so it covers between 9 and 10 tenths of its length."""

JITTER_SHARE: Final = 0.25
"""The part of an open time that chance may take away, so that many processes do not all probe at one moment."""


TIMER_RESOLUTION_SECONDS: Final = 0.001
"""A loop whose timers ring a little early (uvloop rounds to milliseconds) is not asked again for the rest."""


class State(enum.StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class OperationClass(enum.StrEnum):
    """Reads and writes of a service have a breaker each: a slow search does not stop orders."""

    READS = "reads"
    WRITES = "writes"

    @classmethod
    def of(cls, operation: Operation[Any, Any]) -> OperationClass:
        return cls.READS if operation.retry is Retry.SAFE else cls.WRITES


class Permit:
    """The permission for one attempt of so many calls. Its first end counts; only a probe's is waited for.

    `slow` may come before the end.
    """

    __slots__ = ("_breaker", "_calls", "_era", "_is_counted")

    def __init__(self, breaker: Breaker, era: int, calls: int) -> None:
        self._breaker = breaker
        self._calls = calls
        self._era: int | None = era
        self._is_counted = False

    def succeeded(self) -> None:
        counted = 0 if self._is_counted else self._calls
        self._breaker._report(self._spend(), counted, 0)  # pyright: ignore[reportPrivateUsage]  # its own permit

    def failed(self) -> None:
        counted = 0 if self._is_counted else self._calls
        self._breaker._report(self._spend(), counted, self._calls)  # pyright: ignore[reportPrivateUsage]

    def slow(self, waiting: int = 0) -> None:
        """There is no answer yet, and so many further calls wait until there is one."""
        if not self._is_counted:
            self._is_counted = True
            self._breaker._note_slow(self._era, self._calls + waiting)  # pyright: ignore[reportPrivateUsage]

    def cancelled(self) -> None:
        """The attempt was given up, and nothing is known about the service."""
        self._breaker._give_up(self._spend())  # pyright: ignore[reportPrivateUsage]

    def _spend(self) -> int | None:
        era, self._era = self._era, None
        return era


class Breaker:
    """See the top of this file. `name` is what `Unavailable` says is not available; `jitter` gives 0.0 to 1.0.

    A share of failures, or of slow calls, among at least `minimum_calls` within `window_seconds` opens it
    (`CallLimits`). `probe_seconds` is the lease of a probe: longer than the deadline of any call, so that it ends only
    for a probe that will never report. `on_change` hears each new state, `on_calls` how many more or fewer calls are in
    flight.
    """

    def __init__(
        self,
        name: str,
        *,
        clock: Clock,
        jitter: Callable[[], float],
        limits: CallLimits | None = None,
        probe_seconds: float = 15.0,
        on_change: Callable[[State], None] | None = None,
        on_calls: Callable[[int], None] | None = None,
    ) -> None:
        limits = limits or CallLimits()
        assert limits.minimum_calls >= 1
        assert 0 < limits.failure_share <= 1
        assert 0 < limits.slow_share <= 1
        assert 0 < limits.open_seconds <= limits.longest_open_seconds
        assert probe_seconds > 0
        self.name = name
        self.clock = clock
        self.state = State.CLOSED
        self.on_change = [on_change] if on_change else []
        self.in_flight = 0
        """Calls that were let through and have not ended."""
        self._jitter = jitter
        self._limits = limits
        self._most_at_once = max(1, limits.minimum_calls - 1)
        self._probe_seconds = probe_seconds
        self._on_calls = on_calls
        self._window = _Window(limits.window_seconds)
        self._next_open_seconds = limits.open_seconds
        self._refuse_until: float
        """While it is open."""
        # Permits carry the number of the era in which they were given. A new era begins with each change of state and
        # with each probe: reports of older ones are late.
        self._era = 0

    def admit(self, calls: int = 1) -> Permit:
        """Permission for one attempt, to be told what became of it. Raises `Unavailable` with `retry_after_s`."""
        if self.state is not State.CLOSED:
            now = self.clock.monotonic()
            if now < self._refuse_until:
                seconds = max(1, math.ceil(self._refuse_until - now))
                # How long a probe takes is not known, but hardly as long as its lease.
                raise Unavailable(service=self.name, retry_after_s=1 if self.state is State.HALF_OPEN else seconds)
            self._enter(State.HALF_OPEN, refuse_until=now + self._probe_seconds)
        return Permit(self, self._era, min(calls, self._most_at_once))

    def count(self, calls: int) -> None:
        """So many more calls are in flight; below 0: fewer."""
        self.in_flight += calls
        if self._on_calls:
            self._on_calls(calls)

    def _report(self, era: int | None, calls: int, failures: int) -> None:
        if era != self._era:
            return
        if self.state is State.HALF_OPEN:
            if failures:
                self._open()
            else:
                self._close()
            return
        self._count(calls, failures, 0)

    def _note_slow(self, era: int | None, calls: int) -> None:
        if era != self._era:
            return
        if self.state is State.HALF_OPEN:
            self._open()
            return
        calls = min(calls, self._most_at_once)
        self._count(calls, 0, calls)

    def _count(self, calls: int, failures: int, slow: int) -> None:
        of_calls, failed, were_slow = self._window.add(self.clock.monotonic(), calls, failures, slow)
        if not (failures or slow) or of_calls < self._limits.minimum_calls:
            return
        if failed >= self._limits.failure_share * of_calls or were_slow >= self._limits.slow_share * of_calls:
            self._open()

    def _give_up(self, era: int | None) -> None:
        if era == self._era and self.state is State.HALF_OPEN:
            self._refuse_until = 0.0

    def _open(self) -> None:
        seconds = self._next_open_seconds * (1.0 - JITTER_SHARE * self._jitter())
        self._next_open_seconds = min(self._next_open_seconds * 2, self._limits.longest_open_seconds)
        self._enter(State.OPEN, refuse_until=self.clock.monotonic() + seconds)

    def _close(self) -> None:
        self._window.clear()
        self._next_open_seconds = self._limits.open_seconds
        self._enter(State.CLOSED, refuse_until=0.0)

    def _enter(self, state: State, *, refuse_until: float) -> None:
        self._era += 1
        self._refuse_until = refuse_until
        changed = state is not self.state
        self.state = state
        if changed:
            for heard in self.on_change:
                heard(state)


class _Window:
    """Counts of calls, and of those that failed or were slow, over the last `seconds`, in a ring of buckets."""

    __slots__ = ("_bucket_seconds", "_calls", "_failures", "_newest", "_slow")

    def __init__(self, seconds: float) -> None:
        assert seconds > 0
        self._bucket_seconds = seconds / BUCKETS
        self.clear()

    def clear(self) -> None:
        self._calls = [0] * BUCKETS
        self._failures = [0] * BUCKETS
        self._slow = [0] * BUCKETS
        self._newest = 0

    def add(self, now: float, calls: int, failures: int, slow: int) -> tuple[int, int, int]:
        """Counts calls, failures and slow calls of now; gives those in the window."""
        bucket = int(now / self._bucket_seconds)
        for passed in range(max(self._newest + 1, bucket - BUCKETS + 1), bucket + 1):
            self._calls[passed % BUCKETS] = self._failures[passed % BUCKETS] = self._slow[passed % BUCKETS] = 0
        self._newest = max(self._newest, bucket)
        self._calls[bucket % BUCKETS] += calls
        self._failures[bucket % BUCKETS] += failures
        self._slow[bucket % BUCKETS] += slow
        return sum(self._calls), sum(self._failures), sum(self._slow)


# ----------------------------------------------------------------------------------------------------------- transport


class Queue(Protocol):
    """The calls of one operation that wait for a lane: a `Batcher`."""

    @property
    def queued(self) -> int: ...

    def pass_lanes(self, *, passing: bool) -> None: ...


class BreakingTransport:
    """A transport that asks a breaker before each batch: one permit and one report a batch, which counts its calls.

    `make` gives the breaker of a service and a class of its operations, at the first batch. A refused batch raises
    `Unavailable`, which each of its callers hears. A batch has failed if it did not arrive or was not answered in time,
    or if the service says of every request that it is not available itself: what it stands on, such as its database, is
    gone. That another service, which it needs, is not available says nothing against it. A batch that has no answer
    after `slow_seconds` is slow, and so is what waits behind it; not so where the contract says that the operation
    waits by itself (`Operation.waits`).
    """

    def __init__(
        self,
        transport: Transport,
        make: Callable[[str, OperationClass], Breaker],
        *,
        slow_seconds: float = CallLimits().slow_seconds,
    ) -> None:
        self._transport = transport
        self._make = make
        self._breakers: dict[tuple[str, OperationClass], Breaker] = {}
        self._queues: dict[Operation[Any, Any], Queue] = {}
        self._slow = _SlowBatches(slow_seconds)

    def watch(self, operation: Operation[Any, Any], queue: Queue) -> None:
        """The calls of an operation wait in `queue` before they become batches here."""
        self._queues[operation] = queue

    async def send(
        self, operation: Operation[Any, Any], requests: Sequence[Any], contexts: Sequence[Context]
    ) -> Sequence[Outcome]:
        key = (operation.service, OperationClass.of(operation))
        breaker = self._breakers.get(key)
        if breaker is None:
            breaker = self._breakers[key] = self._make(*key)
            breaker.on_change.append(lambda state: self._pass_lanes(key, passing=state is not State.CLOSED))
        permit = breaker.admit(len(requests))
        breaker.count(len(requests))
        if not operation.waits:
            self._slow.watch(permit, self._queues.get(operation))
        try:
            outcomes = await self._transport.send(operation, requests, contexts)
        except (Unavailable, DeadlineExceeded):
            permit.failed()
            raise
        except asyncio.CancelledError:
            # A batch is also cancelled because its deadlines passed: then its callers have waited for it in vain.
            now = breaker.clock.monotonic()
            if any(context.deadline <= now for context in contexts):
                permit.failed()
            else:
                permit.cancelled()
            raise
        except BaseException:  # whatever it was, something was there that answered
            permit.succeeded()
            raise
        finally:
            breaker.count(-len(requests))
            self._slow.forget(permit)
        if _all_unavailable(operation.service, outcomes):
            permit.failed()
        else:
            permit.succeeded()
        return outcomes

    def _pass_lanes(self, key: tuple[str, OperationClass], *, passing: bool) -> None:
        for operation, queue in self._queues.items():
            if (operation.service, OperationClass.of(operation)) == key:
                queue.pass_lanes(passing=passing)


class _SlowBatches:
    """Tells permits when their batches have taken `seconds`. One timer, for the oldest.

    Times are of the event loop. A timer that rings much too late shows that this process stood still itself: answers
    may have come meanwhile, so that the batches get their time once more.
    """

    __slots__ = ("_is_armed", "_seconds", "_watched")

    def __init__(self, seconds: float) -> None:
        assert seconds > 0
        self._seconds = seconds
        self._watched: dict[Permit, tuple[float, Queue | None]] = {}
        self._is_armed = False

    def watch(self, permit: Permit, queue: Queue | None) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time() + self._seconds
        self._watched[permit] = (due, queue)
        if not self._is_armed:
            self._arm(loop, due)

    def forget(self, permit: Permit) -> None:
        self._watched.pop(permit, None)

    def _arm(self, loop: asyncio.AbstractEventLoop, due: float) -> None:
        self._is_armed = True
        loop.call_at(due, self._ring, context=contextvars.Context())

    def _ring(self) -> None:
        self._is_armed = False
        loop = asyncio.get_running_loop()
        now = loop.time()
        while self._watched:
            permit, (due, queue) = next(iter(self._watched.items()))
            if due > now + TIMER_RESOLUTION_SECONDS:
                self._arm(loop, due)
                return
            del self._watched[permit]
            if now - due > self._seconds / 2:
                self._watched[permit] = (now + self._seconds, queue)
            else:
                permit.slow(queue.queued if queue else 0)


def _all_unavailable(service: str, outcomes: Sequence[Outcome]) -> bool:
    return bool(outcomes) and all(isinstance(o, Unavailable) and o.service == service for o in outcomes)
