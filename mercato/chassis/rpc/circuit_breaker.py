"""A circuit breaker: who keeps failing is left alone for a while, and callers hear so at once instead of waiting.

The parts
    A `Breaker` stands before one service in one calling process. `admit()` gives a `Permit` for one attempt, or
    refuses; the permit is told what became of the attempt. A `BreakingTransport` does that for every batch of a
    transport. What counts as a failure is the caller's decision; business errors never should: a service that says no
    is in good health.

The states
    closed      everybody is let through. Results are counted over a sliding window; once there are enough of them and
                too many failed, the breaker opens.
    open        everybody is refused, at once, until the open time is over.
    half-open   one attempt, the probe, was let through; everybody else is refused until it reports. Its success closes
                the breaker, its failure opens it for twice as long as before.

Guaranteed
    - At most one probe at a time, however many callers come at once.
    - From open to closed only by the success of a probe.
    - Time to the next probe is bounded: an open time is never longer than `longest_open_seconds`, and a probe whose
      caller was cancelled, or that has not reported when its lease is over, gives way to the next caller.
    - A report that comes late, from a permit of an earlier state, changes nothing: what failed before the service was
      left alone says nothing about its health after.
    - Memory does not grow with calls: results are counted in a fixed number of buckets, permits are not kept.

It has no timer and no task: states change when somebody calls. It belongs to one event loop and needs no lock.
"""

from __future__ import annotations

import asyncio
import enum
import math
from collections.abc import Callable, Sequence
from typing import Any, Final

from mercato.chassis.contract import Context, DeadlineExceeded, Operation, Unavailable
from mercato.chassis.observability.clock import Clock

from .batching import Outcome
from .transports import Transport

BUCKETS: Final = 10
"""Parts of the window. Results leave it a part at a time, so it covers between 9 and 10 tenths of its length."""

JITTER_SHARE: Final = 0.25
"""The part of an open time that chance may take away, so that many processes do not all probe at one moment."""


class State(enum.StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Permit:
    """The permission for one attempt. Its first report counts; none is owed, but a probe's is waited for."""

    __slots__ = ("_breaker", "_era")

    def __init__(self, breaker: Breaker, era: int) -> None:
        self._breaker = breaker
        self._era: int | None = era

    def succeeded(self) -> None:
        self._breaker._report(self._spend(), failed=False)  # pyright: ignore[reportPrivateUsage]  # its own permit

    def failed(self) -> None:
        self._breaker._report(self._spend(), failed=True)  # pyright: ignore[reportPrivateUsage]

    def cancelled(self) -> None:
        """The attempt was given up, and nothing is known about the service."""
        self._breaker._give_up(self._spend())  # pyright: ignore[reportPrivateUsage]

    def _spend(self) -> int | None:
        era, self._era = self._era, None
        return era


class Breaker:
    """See the top of this file. `name` is what `Unavailable` says is not available; `jitter` gives 0.0 to 1.0.

    `failure_share` of at least `minimum_calls` within `window_seconds` opens it. `probe_seconds` is the lease of a
    probe: longer than the deadline of any call, so that it ends only for a probe that will never report.
    `on_change` hears each new state.
    """

    def __init__(
        self,
        name: str,
        *,
        clock: Clock,
        jitter: Callable[[], float],
        window_seconds: float = 10.0,
        minimum_calls: int = 20,
        failure_share: float = 0.5,
        open_seconds: float = 5.0,
        longest_open_seconds: float = 60.0,
        probe_seconds: float = 15.0,
        on_change: Callable[[State], None] | None = None,
    ) -> None:
        assert minimum_calls >= 1
        assert 0 < failure_share <= 1
        assert 0 < open_seconds <= longest_open_seconds
        assert probe_seconds > 0
        self.name = name
        self.clock = clock
        self.state = State.CLOSED
        self._jitter = jitter
        self._minimum_calls = minimum_calls
        self._failure_share = failure_share
        self._open_seconds = open_seconds
        self._longest_open_seconds = longest_open_seconds
        self._probe_seconds = probe_seconds
        self._on_change = on_change
        self._window = _Window(window_seconds)
        self._next_open_seconds = open_seconds
        self._refuse_until: float
        """While it is open."""
        # Permits carry the number of the era in which they were given. A new era begins with each change of state and
        # with each probe: reports of older ones are late.
        self._era = 0

    def admit(self) -> Permit:
        """Permission for one attempt, to be told what became of it. Raises `Unavailable` with `retry_after_s`."""
        if self.state is not State.CLOSED:
            now = self.clock.monotonic()
            if now < self._refuse_until:
                seconds = max(1, math.ceil(self._refuse_until - now))
                # How long a probe takes is not known, but hardly as long as its lease.
                raise Unavailable(service=self.name, retry_after_s=1 if self.state is State.HALF_OPEN else seconds)
            self._enter(State.HALF_OPEN, refuse_until=now + self._probe_seconds)
        return Permit(self, self._era)

    def _report(self, era: int | None, *, failed: bool) -> None:
        if era != self._era:
            return
        if self.state is State.HALF_OPEN:
            if failed:
                self._open()
            else:
                self._close()
            return
        calls, failures = self._window.add(self.clock.monotonic(), failed=failed)
        if failed and calls >= self._minimum_calls and failures >= self._failure_share * calls:
            self._open()

    def _give_up(self, era: int | None) -> None:
        if era == self._era and self.state is State.HALF_OPEN:
            self._refuse_until = 0.0

    def _open(self) -> None:
        seconds = self._next_open_seconds * (1.0 - JITTER_SHARE * self._jitter())
        self._next_open_seconds = min(self._next_open_seconds * 2, self._longest_open_seconds)
        self._enter(State.OPEN, refuse_until=self.clock.monotonic() + seconds)

    def _close(self) -> None:
        self._window.clear()
        self._next_open_seconds = self._open_seconds
        self._enter(State.CLOSED, refuse_until=0.0)

    def _enter(self, state: State, *, refuse_until: float) -> None:
        self._era += 1
        self._refuse_until = refuse_until
        changed = state is not self.state
        self.state = state
        if changed and self._on_change:
            self._on_change(state)


class _Window:
    """Counts of calls and failures over the last `seconds`, in a ring of buckets."""

    __slots__ = ("_bucket_seconds", "_calls", "_failures", "_newest")

    def __init__(self, seconds: float) -> None:
        assert seconds > 0
        self._bucket_seconds = seconds / BUCKETS
        self.clear()

    def clear(self) -> None:
        self._calls = [0] * BUCKETS
        self._failures = [0] * BUCKETS
        self._newest = 0

    def add(self, now: float, *, failed: bool) -> tuple[int, int]:
        """Counts a call that ended now; gives the calls and failures in the window."""
        bucket = int(now / self._bucket_seconds)
        for passed in range(max(self._newest + 1, bucket - BUCKETS + 1), bucket + 1):
            self._calls[passed % BUCKETS] = self._failures[passed % BUCKETS] = 0
        self._newest = max(self._newest, bucket)
        self._calls[bucket % BUCKETS] += 1
        self._failures[bucket % BUCKETS] += failed
        return sum(self._calls), sum(self._failures)


# ----------------------------------------------------------------------------------------------------------- transport


class BreakingTransport:
    """A transport that asks the breaker of a service before each batch to it: one permit, one report a batch.

    `make` gives the breaker of a service, at the first batch to it. A refused batch raises `Unavailable`, which each of
    its callers hears. A batch has failed if it did not arrive or was not answered in time, or if the service says of
    every request that it is not available itself: what it stands on, such as its database, is gone. That another
    service, which it needs, is not available says nothing against it.
    """

    def __init__(self, transport: Transport, make: Callable[[str], Breaker]) -> None:
        self._transport = transport
        self._make = make
        self._breakers: dict[str, Breaker] = {}

    async def send(
        self, operation: Operation[Any, Any], requests: Sequence[Any], contexts: Sequence[Context]
    ) -> Sequence[Outcome]:
        breaker = self._breakers.get(operation.service)
        if breaker is None:
            breaker = self._breakers[operation.service] = self._make(operation.service)
        permit = breaker.admit()
        try:
            outcomes = await self._transport.send(operation, requests, contexts)
        except (Unavailable, DeadlineExceeded):
            permit.failed()
            raise
        except asyncio.CancelledError:
            # A batch is also cancelled because its deadlines passed: then somebody has waited for it in vain.
            now = breaker.clock.monotonic()
            if any(context.deadline <= now for context in contexts):
                permit.failed()
            else:
                permit.cancelled()
            raise
        except BaseException:  # whatever it was, something was there that answered
            permit.succeeded()
            raise
        if _all_unavailable(operation.service, outcomes):
            permit.failed()
        else:
            permit.succeeded()
        return outcomes


def _all_unavailable(service: str, outcomes: Sequence[Outcome]) -> bool:
    return bool(outcomes) and all(isinstance(o, Unavailable) and o.service == service for o in outcomes)
