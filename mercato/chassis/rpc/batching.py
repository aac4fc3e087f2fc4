"""Coalescing: concurrent single calls become the batches that a service takes.

The parts
    A `Batcher` belongs to one operation in one calling process. It holds a queue and up to `lanes` batches in flight.
    Each of these has a task that awaits `send` and gives every caller its own answer.

Flow
    A call joins the queue. If a lane is free, a flush runs in the next turn of the event loop. A single call with no
    batch in flight is sent then, as a batch of one: it never waits for others. Several calls are a sign of load: they
    gather for as long as each further turn brings calls, for `GATHER_TURNS` turns at most, and are sent together. There
    is no timer: an idle loop's turn takes microseconds. If no lane is free, calls gather until a batch completes; its
    callers are answered before the next flush, so that what they call next is in the next batch.

A pending request is in one of these states
    queued      waiting for a lane
    in flight   in a batch that was sent
    settled     its caller has an answer, an error, or was cancelled

Guaranteed
    - Every caller gets exactly one outcome: its own answer or error, never that of another request.
    - It gets it in bounded time: at its deadline it gets `DeadlineExceeded`, whatever the service does.
    - Never more than `lanes` batches in flight, never more than `queue_limit` requests waiting: a further one gets
      `Overloaded` at once. Batches do not wait for a lane while `send` refuses them at once (`bypass_lanes`).
    - A request without a waiting caller, because it was cancelled or its deadline passed, is not sent.
    - A batch without a waiting caller is cancelled, so that a service that hangs does not hold a lane for ever.

Deadlines cost almost nothing: one timer per batcher is set to the earliest deadline that was ever armed, checks all
pending requests when it fires (in practice once in ten seconds), and is armed again for the earliest one left.

A batcher belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, Protocol

import structlog

from mercato.chassis.contract import (
    Context,
    DeadlineExceeded,
    HandlerRun,
    Internal,
    Operation,
    OutcomeUnknown,
    Overloaded,
    Retry,
    ServiceError,
    Unavailable,
    current,
    handler_run,
)
from mercato.chassis.contract.context import CLIENT
from mercato.chassis.observability.telemetry import Telemetry

log = structlog.stdlib.get_logger("mercato.batching")

Outcome = Any
"""An answer message, or a `ServiceError`."""

Send = Callable[[Sequence[Any], Sequence[Context]], Awaitable[Sequence[Outcome]]]

DEFAULT_QUEUE_LIMIT: Final = 10_000
CANCELLED: Final = "cancelled"
"""The failure of the span of a call whose caller did not wait for its answer."""
SIZE_BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

GATHER_TURNS: Final = 4
"""Turns of the event loop for which calls gather at most (decision 52): two make batches as large as 16 do, with 128
connections on one machine. Two more are for callers whose requests come later."""

TIMER_RESOLUTION_SECONDS: Final = 0.001
"""The shortest delay of the timer: a loop whose timers fire a little early (uvloop rounds to ms) would spin."""


class Observer(Protocol):
    """What a batcher reports, once per batch."""

    def sent(self, size: int, longest_wait_s: float) -> None: ...
    def refused(self, count: int) -> None: ...
    def failed(self, error: BaseException) -> None: ...


class BatchMetrics:
    """The metrics of the batcher of one operation."""

    def __init__(self, telemetry: Telemetry, operation: str) -> None:
        labels = ("operation",)
        size = telemetry.histogram("mercato_batch_size", "Requests in a batch.", labels, SIZE_BUCKETS)
        wait = "How long the first request of a batch waited for a lane."
        refused = "Calls refused because the queue was full."
        failed = "Batches that failed unexpectedly."
        self._sizes = size
        self._waits = telemetry.histogram("mercato_queue_wait_seconds", wait, labels)
        self._refused = telemetry.counter("mercato_calls_refused", refused, labels).labels(operation)
        self._failed = telemetry.counter("mercato_batches_failed", failed, labels).labels(operation)
        self._operation = operation

    @functools.cached_property
    def _series(self) -> tuple[Callable[[float], None], Callable[[float], None]]:
        """Sizes and waits, made by the first batch: a process calls few of its operations, and each has 26 buckets."""
        return self._sizes.labels(self._operation).add, self._waits.labels(self._operation).add

    def sent(self, size: int, longest_wait_s: float) -> None:
        add_size, add_wait = self._series
        add_size(size)
        add_wait(longest_wait_s)

    def refused(self, count: int) -> None:
        self._refused.inc(count)

    def failed(self, error: BaseException) -> None:
        self._failed.inc()
        log.error("batch_failed", operation=self._operation, exc_info=error)


class PendingRequest:
    """The only request of a call, whose future it resolves or fails. The span of its context is its own if recorded."""

    __slots__ = ("context", "future", "queued_at", "request")

    def __init__(self, request: Any, context: Context, future: asyncio.Future[Any], queued_at: float) -> None:
        self.request = request
        self.context = context
        self.future = future
        self.queued_at = queued_at

    def is_waiting(self) -> bool:
        """Whether a caller waits: False once it is settled, or its caller was cancelled."""
        return not self.future.done()

    def drop(self) -> None:
        """Called when it leaves the queue without a waiting caller."""
        if (span := self.context.span) is not None and span.places:
            span.end(CANCELLED)

    def settle(self, outcome: Outcome) -> None:
        """Only the first outcome counts."""
        if (span := self.context.span) is not None and span.places:
            span.end(outcome.code if isinstance(outcome, ServiceError) else "")
        if self.future.done():
            return
        if isinstance(outcome, ServiceError):
            self.future.set_exception(outcome)
        else:
            self.future.set_result(outcome)


class RequestGroup:
    """The outcomes of a call with many requests; the last outcome resolves the future of the call."""

    __slots__ = ("future", "missing", "outcomes")

    def __init__(self, future: asyncio.Future[Sequence[Outcome]], size: int) -> None:
        self.future = future
        self.outcomes: list[Outcome] = [None] * size
        self.missing = size


class GroupedRequest(PendingRequest):
    """One of the requests of a `RequestGroup`, at `place` among them."""

    __slots__ = ("group", "place", "settled")

    def __init__(self, request: Any, context: Context, group: RequestGroup, place: int, queued_at: float) -> None:
        self.request = request
        self.context = context
        self.future = group.future
        self.queued_at = queued_at
        self.group = group
        self.place = place
        self.settled = False

    def is_waiting(self) -> bool:
        return not self.settled and not self.future.done()

    def settle(self, outcome: Outcome) -> None:
        if self.settled:
            return
        self.settled = True
        group = self.group
        group.outcomes[self.place] = outcome
        group.missing -= 1
        if group.missing:
            return
        if (span := self.context.span) is not None and span.places:
            span.end()
        if not self.future.done():
            self.future.set_result(group.outcomes)


class InFlightBatch:
    """A batch that was dispatched. `task` is None only until the task that runs it exists."""

    __slots__ = ("abandoned", "entries", "longest_wait_s", "task")

    def __init__(self, entries: list[PendingRequest], longest_wait_s: float) -> None:
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
        self._queue: deque[PendingRequest] = deque()
        self._in_flight: set[InFlightBatch] = set()
        self._flush_scheduled = False
        self._gathered = 0
        """Calls that were queued in the last turn of a flush that gathers."""
        self._turns = 0
        """For so many turns it has gathered."""
        self._bypasses_lanes = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = float("inf")
        # Callbacks must not run in the context of a caller. Each batcher has its own: a context is not entered twice.
        self._no_caller = contextvars.Context()

    # ------------------------------------------------------------------------------------------------ for callers

    def submit(self, request: Any, context: Context) -> asyncio.Future[Any]:
        """A future of the answer. Raises `Overloaded` when the queue is full."""
        if len(self._queue) >= self.queue_limit:
            self._refuse(1)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        self._queue.append(PendingRequest(request, context, future, self._monotonic()))
        if context.deadline < self._timer_at:
            self._arm(loop, context.deadline)
        if not self._flush_scheduled and (len(self._in_flight) < self.lanes or self._bypasses_lanes):
            self._schedule_flush(loop)
        return future

    def submit_many(self, requests: Sequence[Any], context: Context) -> asyncio.Future[Sequence[Outcome]]:
        """A future of the outcomes, in the order of the requests. Raises `Overloaded` if they do not all fit."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Sequence[Outcome]] = loop.create_future()
        if not requests:
            future.set_result([])
            return future
        if len(self._queue) + len(requests) > self.queue_limit:
            self._refuse(len(requests))
        group, now = RequestGroup(future, len(requests)), self._monotonic()
        self._queue.extend(GroupedRequest(request, context, group, i, now) for i, request in enumerate(requests))
        if context.deadline < self._timer_at:
            self._arm(loop, context.deadline)
        if not self._flush_scheduled and (len(self._in_flight) < self.lanes or self._bypasses_lanes):
            self._schedule_flush(loop)
        return future

    @property
    def queued(self) -> int:
        return len(self._queue)

    @property
    def in_flight(self) -> int:
        return len(self._in_flight)

    def bypass_lanes(self, *, bypassing: bool) -> None:
        """While `bypassing`, batches are sent although no lane is free: `send` refuses them at once."""
        self._bypasses_lanes = bypassing
        if bypassing and self._queue and not self._flush_scheduled:
            self._schedule_flush(asyncio.get_running_loop())

    async def close(self) -> None:
        """Lets the batches in flight complete, and fails the queued requests.

        For the end of a process, after requests have stopped.
        """
        while self._queue or self._in_flight:
            while self._queue:
                self._queue.popleft().settle(self._unavailable())
            if tasks := [batch.task for batch in self._in_flight if batch.task]:
                await asyncio.wait(tasks)
        if self._timer:
            self._timer.cancel()
        self._timer, self._timer_at = None, float("inf")

    # --------------------------------------------------------------------------------------------------- dispatch

    def _refuse(self, count: int) -> None:
        self._observer.refused(count)
        raise Overloaded(operation=self.operation)

    def _schedule_flush(self, loop: asyncio.AbstractEventLoop) -> None:
        self._flush_scheduled = True
        loop.call_soon(self._flush, context=self._no_caller)

    def _flush(self) -> None:
        """Dispatches, or gathers for a further turn. See Flow at the top of this file."""
        queued = len(self._queue)
        is_gathering = (queued > 1 or self._in_flight) and self._gathered < queued < self.size
        if is_gathering and self._turns < GATHER_TURNS:
            self._gathered = queued
            self._turns += 1
            asyncio.get_running_loop().call_soon(self._flush, context=self._no_caller)
            return
        self._flush_scheduled = False
        self._gathered = self._turns = 0
        self._dispatch()

    def _dispatch(self) -> None:
        while self._queue and (len(self._in_flight) < self.lanes or self._bypasses_lanes):
            if (batch := self._collect()) is None:
                continue
            self._in_flight.add(batch)
            # A batch belongs to no caller: it must not see one caller's context, nor end with one caller's task.
            batch.task = asyncio.get_running_loop().create_task(self._run(batch), context=contextvars.Context())
            batch.task.add_done_callback(functools.partial(self._release, batch), context=self._no_caller)

    def _collect(self) -> InFlightBatch | None:
        """A batch of up to `size` requests with waiting callers. Expired ones get their error, others are dropped."""
        queue, size, now, entries = self._queue, self.size, self._monotonic(), list[PendingRequest]()
        while queue and len(entries) < size:
            entry = queue.popleft()
            if not entry.is_waiting():
                entry.drop()
                continue
            if entry.context.deadline <= now:
                entry.settle(DeadlineExceeded(operation=self.operation))
                continue
            entries.append(entry)
        return InFlightBatch(entries, now - entries[0].queued_at) if entries else None

    async def _run(self, batch: InFlightBatch) -> None:
        entries = batch.entries
        try:
            self._observer.sent(len(entries), batch.longest_wait_s)
            outcomes = await self._send([e.request for e in entries], [e.context for e in entries])
            if len(outcomes) != len(entries):
                raise AssertionError(f"{self.operation}: {len(outcomes)} answers to {len(entries)} requests")
        except ServiceError as error:
            self._settle_all(entries, error)
        except Exception as error:  # an edge: every caller gets an outcome; logged by failed
            self._settle_all(entries, Internal(operation=self.operation))
            self._observer.failed(error)
        except BaseException:
            # Cancelled: no caller waits, or the process ends. The service may nevertheless have done it.
            self._settle_all(entries, OutcomeUnknown(operation=self.operation))
            raise
        else:
            for entry, outcome in zip(entries, outcomes, strict=True):
                entry.settle(outcome)
        finally:
            self._complete(batch)

    def _complete(self, batch: InFlightBatch) -> None:
        self._in_flight.discard(batch)
        if self._queue and not self._flush_scheduled:
            self._schedule_flush(asyncio.get_running_loop())

    def _release(self, batch: InFlightBatch, _: asyncio.Task[None]) -> None:
        """Completes a batch whose task was cancelled before its first step: it runs nothing, not even `finally`."""
        if batch in self._in_flight:
            self._settle_all(batch.entries, self._unavailable())
            self._complete(batch)

    def _settle_all(self, entries: Sequence[PendingRequest], error: ServiceError) -> None:
        for entry in entries:
            entry.settle(error.copy())

    def _unavailable(self) -> ServiceError:
        return Unavailable(service=self.operation.partition(".")[0])

    # -------------------------------------------------------------------------------------------------- deadlines

    def _arm(self, loop: asyncio.AbstractEventLoop, deadline: float) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer_at = deadline
        delay = max(TIMER_RESOLUTION_SECONDS, deadline - self._monotonic())
        self._timer = loop.call_later(delay, self._on_timer, context=self._no_caller)

    def _on_timer(self) -> None:
        """Fails expired requests, cancels batches without a waiting caller, and arms the timer again."""
        now, left = self._monotonic(), float("inf")
        for entry in (*self._queue, *(e for batch in self._in_flight for e in batch.entries)):
            if not entry.is_waiting():
                continue
            if entry.context.deadline <= now:
                entry.settle(DeadlineExceeded(operation=self.operation))
            else:
                left = min(left, entry.context.deadline)
        for batch in self._in_flight:
            if batch.task and not batch.abandoned and not any(entry.is_waiting() for entry in batch.entries):
                # Once: a second cancellation would interrupt the roll-back that the first one began.
                batch.abandoned = True
                batch.task.cancel()
        # `_collect` drops settled requests at the front of the queue; this drops those behind.
        self._queue = deque(entry for entry in self._queue if entry.is_waiting())
        self._timer, self._timer_at = None, float("inf")
        if left < float("inf"):
            self._arm(asyncio.get_running_loop(), left)


class RemoteCallInTransactionError(AssertionError):
    """A handler called another service inside a transaction: row locks would be held during a network call."""


class BatchedCall:
    """A `Call`: one operation, its batcher, and the context of the caller."""

    __slots__ = ("_deadline_s", "_monotonic", "_name", "_operation", "_submit", "_submit_many")

    def __init__(self, batcher: Batcher, monotonic: Callable[[], float], operation: Operation[Any, Any]) -> None:
        self._submit = batcher.submit
        self._submit_many = batcher.submit_many
        self._monotonic = monotonic
        self._operation = operation
        self._name = operation.full_name
        self._deadline_s = operation.deadline_ms / 1_000

    def __call__(self, request: Any) -> Awaitable[Any]:
        if (made := handler_run.get()) is not None:
            self._note(made, (request,))
        return self._submit(request, self._context())

    def many(self, requests: Sequence[Any]) -> Awaitable[Sequence[Outcome]]:
        if (made := handler_run.get()) is not None:
            self._note(made, requests)
        return self._submit_many(requests, self._context())

    def _context(self) -> Context:
        """The context of a call made now: that of its caller, with the operation's deadline and a span of its own."""
        context = current.get()
        deadline = min(context.deadline, self._monotonic() + self._deadline_s)
        span = context.span
        if span is not None and span.places:  # a call that is not recorded has no span: its batch has one
            span = span.child(self._name, CLIENT)
        return Context(context.actor, deadline, context.trace_id, context.request_id, span)

    def _note(self, made: HandlerRun, requests: Sequence[Any]) -> None:
        """Refuses a handler's call inside a transaction; notes on its run a call that must not be repeated."""
        if made.open_transactions:
            raise RemoteCallInTransactionError(f"{self._operation.full_name} was called inside a transaction")
        if self._operation.retry is not Retry.SAFE and not all(map(self._operation.repeatable, requests)):
            made.committed = True
