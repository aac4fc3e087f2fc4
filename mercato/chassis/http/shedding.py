"""How many requests a server has in work at once, and which it refuses early, before it collapses.

A server that takes more requests than it can answer answers all of them late, and none in time. So a `Shedder` keeps a
limit of requests in work:

    limit   It follows what is measured, by additive increase and multiplicative decrease, as `AIMDLimit` of Netflix's
            concurrency-limits does (github.com/Netflix/concurrency-limits), here for windows of requests instead of
            single ones: a batch makes many requests slow at once. A window in which more than `slow_share` of the
            requests took longer than `slow_seconds` lowers the limit; any other raises it. It stays as it is while
            fewer than half of it were in work at once, for then the limit has no part in how long they took. It falls
            below `floor` only while the queue stands.
    shares  The requests of a class enter while fewer than its share of the limit are in work, of all classes together:
            the rest is left to the classes above.
    queue   Requests that may not enter yet wait, at most twice the limit, the classes in their order. A full queue
            refuses the oldest request of the lowest class for one of a higher class, and the new request otherwise.
            Requests that have waited for half of the time until their deadline are refused. A queue that has not been
            empty for `standing_seconds` is no burst: it lets the newest enter first, whose clients still wait, and
            refuses requests that have waited for `standing_wait_seconds` (adaptive LIFO and controlled delay:
            B. Maurer, Fail at Scale, ACM Queue 13(8), 2015). It takes only `standing_share` of the limit: to refuse
            what has waited costs several times as much as to refuse it at once. It stands until it was empty and
            nothing was refused for `standing_seconds`.
    pace    Refusals for a full queue are sent `refusals_at_once` every `refusal_seconds`, and no faster. Clients that
            ignore Retry-After and send again at once would otherwise be answered in each turn of the event loop, and
            every step of the requests in work would wait for hundreds of refusals. A timer that comes late sends as
            many more.

The server itself refuses a request that finds the queue full (`EarlyRefusals`), unless an earlier request of its
connection is unanswered. Its body is read and dropped, so that the connection stays open.

While the server has capacity, an application only counts, without a further call, task or future:

    if shedder.in_work < shedder.capacity[priority]:
        shedder.in_work += 1
    else:
        entered_at = await shedder.queue(priority, name, deadline)
    try:
        ...
    finally:
        shedder.in_work -= 1
        if shedder.slow_seconds[priority] is not None: count in `measured`, and in `slow`
        if shedder.waiting or shedder.measured >= shedder.window_requests:
            shedder.end_window()

Guaranteed: a request that was let in is never refused later; a refused request was not started; every request that
waits is let in or refused, even if no other request is answered. A shedder belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import contextvars
import enum
import functools
import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Literal, Protocol

import msgspec

from mercato.chassis.contract import Overloaded
from mercato.chassis.observability.telemetry import Telemetry


class Priority(enum.IntEnum):
    """What a request is for; the lower number enters first. Health and metrics have none: they are never limited."""

    PAY = 0
    """Payments and what belongs to a checkout that has begun."""
    ORDER = 1
    """Placing and changing orders."""
    BROWSE = 2
    """Other reads and changes."""
    REPORT = 3
    """Lists and exports for staff."""


class LoadLimits(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of a `Shedder`; tuples have one value for each `Priority`."""

    floor: int = 192  # the 128 connections of `make bench` may all browse at once, however slow the machine is
    standing_floor: int = 64  # 32 connections at once keep one process busy (`make bench-overload`)
    start: int = 256
    ceiling: int = 512  # half of the connections of one server
    shares: tuple[float, ...] = (1.0, 0.9, 0.7, 0.5)
    slow_seconds: tuple[float | None, ...] = (None, 0.15, 0.1, None)
    """From entering to the answer: chosen as three times the 99th percentile at half of the capacity. None: not
    measured, for the time says little about this server: a payment takes as long as the provider needs, a report
    depends on its size."""
    slow_share: float = 0.1  # so the 90th percentile stays below `slow_seconds`
    window_seconds: float = 0.1
    window_requests: int = 32  # a window has at least so many, and lasts at least so long
    step: int = 8  # from floor to ceiling within four seconds
    backoff: float = 0.9  # as in AIMDLimit
    queue_share: float = 2.0  # of the limit
    standing_share: float = 0.125  # enters within `standing_wait_seconds`
    deadline_share: float = 0.5
    standing_seconds: float = 0.1  # as in Fail at Scale, and in CoDel (RFC 8289)
    standing_wait_seconds: float = 0.05  # a refusal comes within a tenth of a second
    refusal_seconds: float = 0.02
    refusals_at_once: int = 100  # 5 000 a second: a part of a core
    most_refusals_at_once: int = 500  # after a turn of the event loop of a tenth of a second
    sweep_seconds: float = 0.025  # how often requests that wait are checked, while there are any
    retry_after_seconds: int = 3  # 1 to so many, at random, so that clients do not all come back at once

    @classmethod
    def up_to(cls, ceiling: int) -> LoadLimits:
        """The defaults with another ceiling."""
        usual = cls()
        return cls(floor=min(usual.floor, ceiling), start=min(usual.start, ceiling), ceiling=ceiling)


Rendered = tuple[int, Sequence[bytes], bytes]
"""An answer: status, header lines (`name: value`) and body."""


class EarlyRefusals(Protocol):
    """Refuses requests before the application is called, as soon as their heads are read."""

    @property
    def load(self) -> Shedder: ...

    def refuse(
        self, method: str, path: str, headers: Sequence[tuple[bytes, bytes]], seconds: Callable[[], float]
    ) -> Callable[[], Rendered] | None:
        """None: the application answers the request. Else it is refused, and the result renders its answer, once.

        `seconds` gives how long ago the request was received.
        """
        ...


class Waiter:
    """A request that waits; its future gets the time at which it entered."""

    __slots__ = ("future", "name", "queued_at", "until")

    def __init__(self, future: asyncio.Future[float], name: str, queued_at: float, until: float) -> None:
        self.future = future
        self.name = name
        self.queued_at = queued_at
        self.until = until


Reason = Literal["queue_full", "displaced", "waited"]
REASONS: Final[tuple[Reason, ...]] = ("queue_full", "displaced", "waited")


class Shedder:
    """The requests of one server that are in work, and those that wait.

    An application reads and changes `in_work`, `measured`, `slow` and `peak` by itself, as the prologue says.
    """

    def __init__(
        self,
        limits: LoadLimits,
        *,
        monotonic: Callable[[], float],
        telemetry: Telemetry,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._limits = limits
        self._monotonic = monotonic
        self._jitter = jitter
        self.in_work = 0
        self.waiting = 0
        self.measured = 0
        """How many requests of this window were measured."""
        self.slow = 0
        """How many of the measured requests were slow."""
        self.peak = 0
        """The most requests of this window that were in work at once."""
        self.slow_seconds = limits.slow_seconds
        self.window_requests = limits.window_requests
        self.limit = 0
        self.capacity: tuple[int, ...] = ()
        """By `Priority`: a request enters while fewer than this are in work."""
        self._window_ends_at = monotonic() + limits.window_seconds
        self._standing_since = 0.0
        self._standing_until = 0.0
        """Even if the queue was empty in between."""
        self._queues: tuple[deque[Waiter], ...] = tuple(deque() for _ in Priority)
        self._sweeper: asyncio.TimerHandle | None = None
        self._held: deque[Callable[[], bool]] = deque()
        self._is_pacing = False
        self._paced_at = 0.0
        # A timer would otherwise run in the context of the request that armed it.
        self._no_request = contextvars.Context()
        gauge = telemetry.gauge
        self._shown_limit = gauge("mercato_http_limit", "Requests that may be in work at once.", workers="livesum")
        about = "The most requests that were in work at once, of the latest window."
        self._shown_peak = gauge("mercato_http_in_work", about, workers="livesum")
        self._shown_waiting = gauge("mercato_http_waiting", "Requests that wait to be let in.", workers="livesum")
        refused = telemetry.counter(
            "mercato_http_shed", "Requests refused for too much load, by class and reason.", ["class", "reason"]
        )
        self._refused = {
            (priority, reason): refused.labels(priority.name.lower(), reason).inc
            for priority in Priority
            for reason in REASONS
        }
        self._set_limit(limits.start)

    def _set_limit(self, limit: int) -> None:
        self.limit = limit
        self.capacity = tuple(max(1, int(limit * share)) for share in self._limits.shares)
        self._shown_limit.set(limit)

    # ------------------------------------------------------------------------------------------------ for requests

    def is_full(self, priority: Priority) -> bool:
        """Whether a new request could neither enter nor wait."""
        return self.in_work >= self.capacity[priority] and self._queue_is_full(priority)

    def _queue_is_full(self, priority: Priority) -> bool:
        """Full, and without a request of a lower class that could be displaced."""
        return self.waiting >= self._queue_size(self._monotonic()) and not any(self._queues[priority + 1 :])

    def _queue_size(self, now: float) -> float:
        limits = self._limits
        return self.limit * (limits.standing_share if self._is_standing(now) else limits.queue_share)

    async def check(self, priority: Priority, name: str) -> None:
        """Raises `Overloaded` for a request that could not even wait, before any work is done for it."""
        if self._queue_is_full(priority):
            error = self._refusal(priority, name, "queue_full")
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self.hold(functools.partial(_end_wait, turn))
            await turn
            raise error

    async def queue(self, priority: Priority, name: str, deadline: float) -> float:
        """Waits until a request may enter, counts it in `in_work`, and gives the time at which it has entered.

        `name` is what the refusal calls the request. Raises `Overloaded` for a request that is refused.
        """
        await self.check(priority, name)
        loop, now = asyncio.get_running_loop(), self._monotonic()
        if not self.waiting:
            self._standing_since = now
        elif any(self._queues[priority + 1 :]) and self.waiting >= self._queue_size(now):
            self._displace()
        until = now + self._limits.deadline_share * (deadline - now)
        waiter = Waiter(loop.create_future(), name, now, until)
        self._queues[priority].append(waiter)
        self._set_waiting(self.waiting + 1)
        if self._sweeper is None:
            self._arm(loop)
        try:
            return await waiter.future
        except asyncio.CancelledError:
            self._forget(waiter, priority)
            raise

    def end_window(self) -> None:
        """Ends a complete window, and lets waiting requests in as capacity allows. Called when a request ends."""
        now = self._monotonic()
        if self.measured >= self.window_requests and now >= self._window_ends_at:
            self._adapt(now)
            self._window_ends_at = now + self._limits.window_seconds
        if self.waiting:
            self._let_in(now)

    def hold(self, send: Callable[[], bool]) -> None:
        """Calls `send` when the pace allows this refusal. `send` gives False if its client has left meanwhile."""
        self._held.append(send)
        if not self._is_pacing:
            self._pace(asyncio.get_running_loop())

    def count_refusal(self, priority: Priority, reason: Reason) -> int:
        """Counts a refusal; gives after how many seconds its client may come again."""
        self._refused[priority, reason]()
        if self._is_standing(now := self._monotonic()):
            self._standing_until = now + self._limits.standing_seconds
        return 1 + int(self._jitter() * self._limits.retry_after_seconds)

    def _pace(self, loop: asyncio.AbstractEventLoop) -> None:
        self._is_pacing = True
        self._paced_at = self._monotonic()
        loop.call_later(self._limits.refusal_seconds, self.send_refusals, loop, context=self._no_request)

    def send_refusals(self, loop: asyncio.AbstractEventLoop) -> None:
        """Sends as many refusals as may go out at once, the oldest first. A timer calls it while there are any."""
        self._is_pacing = False
        limits, sent = self._limits, 0
        may_send = limits.refusals_at_once
        if limits.refusal_seconds:
            periods = (self._monotonic() - self._paced_at) / limits.refusal_seconds
            may_send = max(may_send, min(limits.most_refusals_at_once, int(periods * may_send)))
        while self._held and sent < may_send:
            sent += self._held.popleft()()
        if self._held:
            self._pace(loop)

    # ------------------------------------------------------------------------------------------------ limit, queues

    def _adapt(self, now: float) -> None:
        limits, limit = self._limits, self.limit
        if 2 * self.peak >= limit:
            is_slow = self.slow > limits.slow_share * self.measured
            limit = int(limit * limits.backoff) if is_slow else limit + limits.step
        floor = min(limits.floor, limits.standing_floor) if self._is_standing(now) else limits.floor
        self._set_limit(min(max(floor, limit), limits.ceiling))
        self._shown_peak.set(self.peak)
        self.measured = self.slow = 0
        self.peak = self.in_work

    def _let_in(self, now: float) -> None:
        is_standing = self._is_standing(now)
        for priority in Priority:
            queue = self._queues[priority]
            while queue and self.in_work < self.capacity[priority]:
                waiter = queue.pop() if is_standing else queue.popleft()
                if waiter.future.done():  # cancelled, in this turn of the loop
                    self._set_waiting(self.waiting - 1)
                    continue
                if self._is_late(waiter, now, is_standing=is_standing):
                    self._refuse(waiter, priority, "waited")
                    continue
                self._set_waiting(self.waiting - 1)
                self.in_work += 1
                self.peak = max(self.peak, self.in_work)
                waiter.future.set_result(now)

    def expire(self) -> None:
        """Refuses requests that have waited for too long. A timer calls it while requests wait."""
        now = self._monotonic()
        is_standing = self._is_standing(now)
        for priority in Priority:
            queue = self._queues[priority]
            late = [waiter for waiter in queue if self._is_late(waiter, now, is_standing=is_standing)]
            for waiter in late:
                queue.remove(waiter)
                self._refuse(waiter, priority, "waited")

    def _is_standing(self, now: float) -> bool:
        if now < self._standing_until:
            return True
        return self.waiting > 0 and now - self._standing_since >= self._limits.standing_seconds

    def _is_late(self, waiter: Waiter, now: float, *, is_standing: bool) -> bool:
        return now >= waiter.until or (is_standing and now - waiter.queued_at >= self._limits.standing_wait_seconds)

    def _displace(self) -> None:
        """Refuses the oldest request of the lowest class that waits."""
        lowest = next(each for each in reversed(Priority) if self._queues[each])
        self._refuse(self._queues[lowest].popleft(), lowest, "displaced")

    def _refuse(self, waiter: Waiter, priority: Priority, reason: Reason) -> None:
        self._set_waiting(self.waiting - 1)
        if not waiter.future.done():
            waiter.future.set_exception(self._refusal(priority, waiter.name, reason))

    def _refusal(self, priority: Priority, name: str, reason: Reason) -> Overloaded:
        return Overloaded(operation=name, retry_after_s=self.count_refusal(priority, reason))

    def _forget(self, waiter: Waiter, priority: Priority) -> None:
        """Removes a request that was cancelled while it waited, or after it was let in and before it resumed."""
        if waiter in self._queues[priority]:
            self._queues[priority].remove(waiter)
            self._set_waiting(self.waiting - 1)
        elif not waiter.future.cancelled() and waiter.future.exception() is None:
            self.in_work -= 1
            self.end_window()

    def _set_waiting(self, waiting: int) -> None:
        self.waiting = waiting
        self._shown_waiting.set(waiting)

    def _arm(self, loop: asyncio.AbstractEventLoop) -> None:
        self._sweeper = loop.call_later(self._limits.sweep_seconds, self._sweep, loop, context=self._no_request)

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        self._sweeper = None
        self.expire()
        if self.waiting:
            self._arm(loop)


def _end_wait(turn: asyncio.Future[None]) -> bool:
    if turn.done():  # cancelled
        return False
    turn.set_result(None)
    return True
