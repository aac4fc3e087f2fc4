"""A circuit breaker: a service that keeps failing gets no calls for a while, and callers get an error at once.

The parts
    A `Breaker` belongs to one callee in one calling process: the reads of one service, or its writes. `admit()` gives
    a `Permit` for one attempt, or refuses; the caller reports to the permit how the attempt ended, and that it is slow.
    A `BreakingTransport` does that for every batch of a transport. What counts as a failure is the caller's decision;
    business errors never should: a service that refuses a request works.

The states
    closed      Every call is let through. Results are counted over a sliding window; once there are enough of them and
                too many failed, or too many were slow, the breaker opens. A slow call counts as soon as it is slow, not
                when it ends: the breaker opens before the callers of a service that hangs reach their deadlines.
    open        Every call is refused at once, until the open time is over.
    half-open   One attempt, the probe, was let through; all others are refused until it reports. Its success closes
                the breaker; a probe that fails or is slow opens it for twice as long as before.

Guaranteed
    - At most one probe at a time, however many callers there are.
    - From open to closed only by the success of a probe.
    - Time to the next probe is bounded: an open time is never longer than `longest_open_seconds`, and a probe whose
      caller was cancelled, or that has not reported when its lease is over, is replaced by that of the next caller.
    - A late report, from a permit of an earlier generation, changes nothing: a failure from before the breaker opened
      says nothing about the service afterwards.
    - One batch alone never opens it, however many calls it has.
    - While it is not closed, no call waits in a queue for a lane that a batch without an answer holds: batches are sent
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
"""Parts of the window. Results are dropped a part at a time, so it covers between 9 and 10 tenths of its length."""

JITTER_SHARE: Final = 0.25
"""The part of an open time that may be cut at random, so that many processes do not all probe at one moment."""


TIMER_RESOLUTION_SECONDS: Final = 0.001
"""Timers may fire so much too early (uvloop rounds to milliseconds); no second timer is set for the rest."""


class State(enum.StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class OperationClass(enum.StrEnum):
    """Reads and writes of a service have separate breakers: a slow search does not stop orders."""

    READS = "reads"
    WRITES = "writes"

    @classmethod
    def of(cls, operation: Operation[Any, Any]) -> OperationClass:
        return cls.READS if operation.retry is Retry.SAFE else cls.WRITES


class Permit:
    """The permission for one attempt of so many calls. The first report of its end counts; a breaker waits only for
    that of a probe. `slow` may be reported before the end.
    """

    __slots__ = ("_breaker", "_calls", "_generation", "_is_counted")

    def __init__(self, breaker: Breaker, generation: int, calls: int) -> None:
        self._breaker = breaker
        self._calls = calls
        self._generation: int | None = generation
        self._is_counted = False

    def succeeded(self) -> None:
        counted = 0 if self._is_counted else self._calls
        self._breaker._report(self._end(), counted, 0)  # pyright: ignore[reportPrivateUsage]  # its own permit

    def failed(self) -> None:
        counted = 0 if self._is_counted else self._calls
        self._breaker._report(self._end(), counted, self._calls)  # pyright: ignore[reportPrivateUsage]

    def slow(self, waiting: int = 0) -> None:
        """Reports that there is no answer yet, while so many further calls are `waiting` for a lane."""
        if not self._is_counted:
            self._is_counted = True
            self._breaker._note_slow(self._generation, self._calls + waiting)  # pyright: ignore[reportPrivateUsage]

    def cancelled(self) -> None:
        """The attempt was given up, which says nothing about the service."""
        self._breaker._release_probe(self._end())  # pyright: ignore[reportPrivateUsage]

    def _end(self) -> int | None:
        generation, self._generation = self._generation, None
        return generation


class Breaker:
    """See the top of this file. `name` is the service that `Unavailable` names; `jitter` gives 0.0 to 1.0.

    A share of failures, or of slow calls, among at least `minimum_calls` within `window_seconds` opens it
    (`CallLimits`). `probe_seconds` is the lease of a probe: longer than the deadline of any call, so that it ends only
    for a probe that will never report. `on_change` gets each new state, `on_calls` each change of the number of calls
    in flight.
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
        """The end of the open time, or of the lease of a probe."""
        # A permit has the number of its generation. A new one begins with each change of state and with each probe;
        # reports of older ones are ignored.
        self._generation = 0

    def admit(self, calls: int = 1) -> Permit:
        """Permission for one attempt, to which the caller reports. Raises `Unavailable` with `retry_after_s`."""
        if self.state is not State.CLOSED:
            now = self.clock.monotonic()
            if now < self._refuse_until:
                seconds = max(1, math.ceil(self._refuse_until - now))
                # A probe takes an unknown time, but hardly as long as its lease.
                raise Unavailable(service=self.name, retry_after_s=1 if self.state is State.HALF_OPEN else seconds)
            self._enter(State.HALF_OPEN, refuse_until=now + self._probe_seconds)
        return Permit(self, self._generation, min(calls, self._most_at_once))

    def count(self, calls: int) -> None:
        """So many more calls are in flight; below 0: fewer."""
        self.in_flight += calls
        if self._on_calls:
            self._on_calls(calls)

    def _report(self, generation: int | None, calls: int, failures: int) -> None:
        if generation != self._generation:
            return
        if self.state is State.HALF_OPEN:
            if failures:
                self._open()
            else:
                self._close()
            return
        self._count(calls, failures, 0)

    def _note_slow(self, generation: int | None, calls: int) -> None:
        if generation != self._generation:
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

    def _release_probe(self, generation: int | None) -> None:
        if generation == self._generation and self.state is State.HALF_OPEN:
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
        self._generation += 1
        self._refuse_until = refuse_until
        changed = state is not self.state
        self.state = state
        if changed:
            for listener in self.on_change:
                listener(state)


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

    def bypass_lanes(self, *, bypassing: bool) -> None: ...


class BreakingTransport:
    """A transport with circuit breakers: one permit and one report a batch, which counts its calls.

    `make` makes the breaker of a service and a class of its operations, at the first batch. A refused batch raises
    `Unavailable` to each of its callers. A batch has failed if it did not arrive or was not answered in time, or if the
    service answers every request that it is itself unavailable, for instance because its database is. That it answers
    that another service is unavailable is no failure. A batch without an answer after `slow_seconds` is slow, and so
    are the calls that wait behind it, unless the contract says that the operation waits (`Operation.waits`).
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
        """Registers the `queue` in which the calls of an operation wait before they become batches here."""
        self._queues[operation] = queue

    async def send(
        self, operation: Operation[Any, Any], requests: Sequence[Any], contexts: Sequence[Context]
    ) -> Sequence[Outcome]:
        key = (operation.service, OperationClass.of(operation))
        breaker = self._breakers.get(key)
        if breaker is None:
            breaker = self._breakers[key] = self._make(*key)
            breaker.on_change.append(lambda state: self._bypass_lanes(key, bypassing=state is not State.CLOSED))
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
            # A batch is also cancelled when its deadlines have passed: then the service did not answer in time.
            now = breaker.clock.monotonic()
            if any(context.deadline <= now for context in contexts):
                permit.failed()
            else:
                permit.cancelled()
            raise
        except BaseException:  # any other error is an answer of the service
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

    def _bypass_lanes(self, key: tuple[str, OperationClass], *, bypassing: bool) -> None:
        for operation, queue in self._queues.items():
            if (operation.service, OperationClass.of(operation)) == key:
                queue.bypass_lanes(bypassing=bypassing)


class _SlowBatches:
    """Reports batches that have taken `seconds` to their permits. One timer, for the oldest.

    Times are of the event loop. A timer that fires much too late shows that this process itself was stopped: answers
    may have arrived meanwhile, so that the batches get their time once more.
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
        loop.call_at(due, self._on_timer, context=contextvars.Context())

    def _on_timer(self) -> None:
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
