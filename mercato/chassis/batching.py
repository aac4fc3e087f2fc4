"""Coalescing: concurrent single calls become the batches that a service takes.

The parts
    A `Batcher` belongs to one operation in one calling process. It holds a queue and up to `lanes` flights. A flight
    is one batch on its way: a task that awaits `send` and hands every caller its own answer.

What happens when
    A call joins the queue. If a lane is free, a flush runs at the next turn of the event loop, so that everything
    that was called in this turn goes together; there is no timer and no added wait, and a lone call is a batch of
    one. If no lane is free, calls gather until a flight lands, and leave together: under load batches grow by
    themselves.

An entry is in one of these states
    queued      waiting for a lane
    in flight   in a batch that was sent
    settled     its caller has an answer, an error, or is gone

Guaranteed
    - Every caller hears exactly once: its own answer or error, never a neighbour's.
    - It hears in bounded time: at its deadline it gets `DeadlineExceeded`, whatever the service does.
    - Never more than `lanes` flights, never more than `queue_limit` entries waiting: beyond, `Overloaded`, at once.
    - An entry that nobody waits for any more, because its caller was cancelled or its deadline passed, is not sent.
    - A flight that nobody waits for any more is cancelled, so that a service that hangs does not hold a lane for ever.

Deadlines cost nothing on the way: one timer per batcher stands at the earliest deadline that was ever armed, looks
through the entries when it rings (in practice once in ten seconds), and is armed again for the earliest that is left.

A batcher belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, Protocol

from .contract import Context, DeadlineExceeded, Internal, OutcomeUnknown, Overloaded, ServiceError, Unavailable

Outcome = Any
"""An answer message, or a `ServiceError`."""

Send = Callable[[Sequence[Any], Sequence[Context]], Awaitable[Sequence[Outcome]]]

DEFAULT_QUEUE_LIMIT: Final = 10_000

ALARM_RESOLUTION_SECONDS: Final = 0.001
"""The alarm never sleeps less: a loop whose timers ring a little early (uvloop rounds to milliseconds) would spin."""


class Observer(Protocol):
    """What a batcher reports, once per batch."""

    def sent(self, size: int, longest_wait_s: float) -> None: ...
    def refused(self, count: int) -> None: ...
    def failed(self, error: BaseException) -> None: ...


class Waiter(Protocol):
    """Where the outcome of an entry goes."""

    def gone(self) -> bool:
        """True once nobody waits for the outcome any more."""
        ...

    def settle(self, place: int, outcome: Outcome) -> None:
        """Called once for each place."""
        ...


class Lone:
    """The waiter of a single call: a future that is resolved or failed."""

    __slots__ = ("future", "gone")

    def __init__(self, future: asyncio.Future[Any]) -> None:
        self.future = future
        self.gone = future.done

    def settle(self, place: int, outcome: Outcome) -> None:
        if self.future.done():
            return
        if isinstance(outcome, ServiceError):
            self.future.set_exception(outcome)
        else:
            self.future.set_result(outcome)


class Group:
    """The waiter of a call with many requests: one future for all of them, resolved by the last."""

    __slots__ = ("future", "gone", "missing", "outcomes")

    def __init__(self, future: asyncio.Future[Sequence[Outcome]], size: int) -> None:
        self.future = future
        self.gone = future.done
        self.outcomes: list[Outcome] = [None] * size
        self.missing = size

    def settle(self, place: int, outcome: Outcome) -> None:
        self.outcomes[place] = outcome
        self.missing -= 1
        if self.missing == 0 and not self.future.done():
            self.future.set_result(self.outcomes)


class Entry:
    """One request on its way to one answer."""

    __slots__ = ("context", "place", "queued_at", "request", "settled", "waiter")

    def __init__(self, request: Any, context: Context, waiter: Waiter, place: int, queued_at: float) -> None:
        self.request = request
        self.context = context
        self.waiter = waiter
        self.place = place
        self.queued_at = queued_at
        self.settled = False

    def settle(self, outcome: Outcome) -> None:
        if not self.settled:
            self.settled = True
            self.waiter.settle(self.place, outcome)

    def wanted(self) -> bool:
        return not self.settled and not self.waiter.gone()


class Flight:
    """A batch on its way. `task` is None only until the task that flies it exists."""

    __slots__ = ("abandoned", "entries", "longest_wait_s", "task")

    def __init__(self, entries: list[Entry], longest_wait_s: float) -> None:
        self.entries = entries
        self.longest_wait_s = longest_wait_s
        self.abandoned = False
        self.task: asyncio.Task[None] | None = None


class Batcher:
    """Collects the calls of one operation and sends them in batches. See the top of this file.

    `send` takes requests and their contexts, both of the same length, at most `size`, and answers in the same order.
    """

    def __init__(
        self,
        operation: str,
        send: Send,
        *,
        size: int,
        lanes: int,
        observer: Observer,
        monotonic: Callable[[], float],
        queue_limit: int = DEFAULT_QUEUE_LIMIT,
    ) -> None:
        assert min(size, lanes) > 0
        assert queue_limit >= size
        self.operation = operation
        self.size = size
        self.lanes = lanes
        self.queue_limit = queue_limit
        self._send = send
        self._observer = observer
        self._monotonic = monotonic
        self._queue: deque[Entry] = deque()
        self._flights: set[Flight] = set()
        self._flush_scheduled = False
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_at = float("inf")
        # What runs between calls sees no caller's context. Each batcher has its own: a context cannot be entered twice.
        self._no_caller = contextvars.Context()

    # ------------------------------------------------------------------------------------------------ for callers

    def submit(self, request: Any, context: Context) -> asyncio.Future[Any]:
        """A future of the answer. Raises `Overloaded` when the queue is full."""
        if len(self._queue) >= self.queue_limit:
            self._refuse(1)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        self._queue.append(Entry(request, context, Lone(future), 0, self._monotonic()))
        self._awake(loop, context.deadline)
        return future

    def submit_many(self, requests: Sequence[Any], context: Context) -> asyncio.Future[Sequence[Outcome]]:
        """A future of the outcomes, in the order of the requests. Raises `Overloaded` when they do not all fit."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Sequence[Outcome]] = loop.create_future()
        if not requests:
            future.set_result([])
            return future
        if len(self._queue) + len(requests) > self.queue_limit:
            self._refuse(len(requests))
        group, now = Group(future, len(requests)), self._monotonic()
        self._queue.extend(Entry(request, context, group, i, now) for i, request in enumerate(requests))
        self._awake(loop, context.deadline)
        return future

    @property
    def queued(self) -> int:
        return len(self._queue)

    @property
    def in_flight(self) -> int:
        return len(self._flights)

    async def close(self) -> None:
        """Lets the flights land, and fails what still waits. For the end of a process, after requests have stopped."""
        while self._queue or self._flights:
            while self._queue:
                self._queue.popleft().settle(self._unavailable())
            if tasks := [flight.task for flight in self._flights if flight.task]:
                await asyncio.wait(tasks)
        if self._alarm:
            self._alarm.cancel()
        self._alarm, self._alarm_at = None, float("inf")

    # ------------------------------------------------------------------------------------------------ the machine

    def _refuse(self, count: int) -> None:
        self._observer.refused(count)
        raise Overloaded(operation=self.operation)

    def _awake(self, loop: asyncio.AbstractEventLoop, deadline: float) -> None:
        if deadline < self._alarm_at:
            self._arm(loop, deadline)
        if not self._flush_scheduled and len(self._flights) < self.lanes:
            self._flush_scheduled = True
            loop.call_soon(self._flush, context=self._no_caller)

    def _flush(self) -> None:
        self._flush_scheduled = False
        self._depart()

    def _depart(self) -> None:
        while self._queue and len(self._flights) < self.lanes:
            if (flight := self._board()) is None:
                continue
            self._flights.add(flight)
            # A flight belongs to no caller: it must not see one caller's context, nor end with one caller's task.
            flight.task = asyncio.get_running_loop().create_task(self._fly(flight), context=contextvars.Context())
            flight.task.add_done_callback(functools.partial(self._give_up, flight), context=self._no_caller)

    def _board(self) -> Flight | None:
        """A flight of up to `size` entries that are still worth sending; those whose time is over hear so here."""
        now, entries = self._monotonic(), list[Entry]()
        while self._queue and len(entries) < self.size:
            entry = self._queue.popleft()
            if not entry.wanted():
                continue
            if entry.context.deadline <= now:
                entry.settle(DeadlineExceeded(operation=self.operation))
                continue
            entries.append(entry)
        return Flight(entries, now - entries[0].queued_at) if entries else None

    async def _fly(self, flight: Flight) -> None:
        entries = flight.entries
        try:
            self._observer.sent(len(entries), flight.longest_wait_s)
            outcomes = await self._send([e.request for e in entries], [e.context for e in entries])
            if len(outcomes) != len(entries):
                raise AssertionError(f"{self.operation}: {len(outcomes)} answers to {len(entries)} requests")
        except ServiceError as error:
            self._settle_all(entries, error)
        except Exception as error:  # an edge: whatever the transport did, every caller hears
            self._settle_all(entries, Internal(operation=self.operation))
            self._observer.failed(error)
        except BaseException:
            # Cancelled: nobody waits any more, or the process ends. The service may have done it all the same.
            self._settle_all(entries, OutcomeUnknown(operation=self.operation))
            raise
        else:
            for entry, outcome in zip(entries, outcomes, strict=True):
                entry.settle(outcome)
        finally:
            self._land(flight)

    def _land(self, flight: Flight) -> None:
        self._flights.discard(flight)
        if not self._flush_scheduled:  # or else what was called in this turn leaves together, at the next
            self._depart()

    def _give_up(self, flight: Flight, _: asyncio.Task[None]) -> None:
        """For a flight whose task was cancelled before its first step: such a task runs nothing, not even `finally`."""
        if flight in self._flights:
            self._settle_all(flight.entries, self._unavailable())
            self._land(flight)

    def _settle_all(self, entries: Sequence[Entry], error: ServiceError) -> None:
        for entry in entries:
            entry.settle(error.copy())

    def _unavailable(self) -> ServiceError:
        return Unavailable(service=self.operation.partition(".")[0])

    # -------------------------------------------------------------------------------------------------- deadlines

    def _arm(self, loop: asyncio.AbstractEventLoop, deadline: float) -> None:
        if self._alarm:
            self._alarm.cancel()
        self._alarm_at = deadline
        delay = max(ALARM_RESOLUTION_SECONDS, deadline - self._monotonic())
        self._alarm = loop.call_later(delay, self._ring, context=self._no_caller)

    def _ring(self) -> None:
        """Tells everybody whose time is over, gives up flights that nobody waits for, and arms for the next."""
        now, left = self._monotonic(), float("inf")
        for entry in (*self._queue, *(e for flight in self._flights for e in flight.entries)):
            if entry.settled:
                continue
            if entry.context.deadline <= now:
                entry.settle(DeadlineExceeded(operation=self.operation))
            else:
                left = min(left, entry.context.deadline)
        for flight in self._flights:
            if flight.task and not flight.abandoned and not any(entry.wanted() for entry in flight.entries):
                # Cancelled once: a second time would hit the roll-back that the first one began
                flight.abandoned = True
                flight.task.cancel()
        # What has left the queue's front is dropped when boarding; its back must not keep dead entries either.
        self._queue = deque(entry for entry in self._queue if entry.wanted())
        self._alarm, self._alarm_at = None, float("inf")
        if left < float("inf"):
            self._arm(asyncio.get_running_loop(), left)
