"""Client: connects the operations of a contract to a transport, each through a batcher of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Generator, Sequence
from typing import Any, Final, TypeVar

import structlog

from mercato.chassis.contract import (
    SERVICE_ROLE,
    Actor,
    Attempt,
    Call,
    Context,
    Contract,
    Operation,
    Retry,
    attempt,
    current,
)
from mercato.chassis.observability.clock import Clock
from mercato.chassis.observability.telemetry import Telemetry

from .batching import DEFAULT_QUEUE_LIMIT, Batcher, Outcome
from .transports import Transport

C = TypeVar("C", bound=Contract)

SIZE_BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

log = structlog.stdlib.get_logger("mercato.batching")


class RemoteCallInTransactionError(AssertionError):
    """A handler called another service inside a transaction: row locks would be held while the network decides."""


class BatchedCall:
    """A `Call`: one operation, its batcher, and the context of the caller."""

    __slots__ = ("_deadline_s", "_monotonic", "_operation", "_submit", "_submit_many")

    def __init__(self, batcher: Batcher, clock: Clock, operation: Operation[Any, Any]) -> None:
        self._submit = batcher.submit
        self._submit_many = batcher.submit_many
        self._monotonic = clock.monotonic
        self._operation = operation
        self._deadline_s = operation.deadline_ms / 1_000

    def __call__(self, request: Any) -> Awaitable[Any]:
        if (made := attempt.get()) is not None:
            self._note(made, (request,))
        context = current.get()
        own_deadline = self._monotonic() + self._deadline_s
        if own_deadline < context.deadline:
            context = Context(context.actor, own_deadline, context.trace_id, context.request_id)
        return self._submit(request, context)

    def many(self, requests: Sequence[Any]) -> Awaitable[Sequence[Outcome]]:
        if (made := attempt.get()) is not None:
            self._note(made, requests)
        context = current.get()
        own_deadline = self._monotonic() + self._deadline_s
        if own_deadline < context.deadline:
            context = Context(context.actor, own_deadline, context.trace_id, context.request_id)
        return self._submit_many(requests, context)

    def _note(self, made: Attempt, requests: Sequence[Any]) -> None:
        """A handler calls: refused inside a transaction, and remembered if it must not be done twice."""
        if made.open_transactions:
            raise RemoteCallInTransactionError(f"{self._operation.full_name} was called inside a transaction")
        if self._operation.retry is not Retry.SAFE and not all(map(self._operation.repeatable, requests)):
            made.committed = True


class BatchMetrics:
    """What the batcher of one operation counts."""

    def __init__(self, telemetry: Telemetry, operation: str) -> None:
        labels = ("operation",)
        size = telemetry.histogram("mercato_batch_size", "Requests in a batch.", labels, SIZE_BUCKETS)
        wait = "How long the first request of a batch waited for a lane."
        refused = "Calls refused because the queue was full."
        failed = "Batches that failed unexpectedly."
        self._size = size.labels(operation)
        self._wait = telemetry.histogram("mercato_queue_wait_seconds", wait, labels).labels(operation)
        self._refused = telemetry.counter("mercato_calls_refused", refused, labels).labels(operation)
        self._failed = telemetry.counter("mercato_batches_failed", failed, labels).labels(operation)
        self._operation = operation

    def sent(self, size: int, longest_wait_s: float) -> None:
        self._size.observe(size)
        self._wait.observe(longest_wait_s)

    def refused(self, count: int) -> None:
        self._refused.inc(count)

    def failed(self, error: BaseException) -> None:
        self._failed.inc()
        log.error("batch_failed", operation=self._operation, exc_info=error)


class Connector:
    """Makes clients, and closes their batchers. One a process."""

    def __init__(self, clock: Clock, telemetry: Telemetry, *, queue_limit: int = DEFAULT_QUEUE_LIMIT) -> None:
        self._clock = clock
        self._telemetry = telemetry
        self._queue_limit = queue_limit
        self._batchers: list[Batcher] = []

    def client(self, contract: type[C], transport: Transport) -> C:
        """A client of `contract` whose batches travel by `transport`."""

        def connect(operation: Operation[Any, Any]) -> Call[Any, Any]:
            async def send(requests: Sequence[Any], contexts: Sequence[Context]) -> Sequence[Outcome]:
                return await transport.send(operation, requests, contexts)

            batcher = Batcher(
                operation.full_name,
                send,
                size=operation.size,
                lanes=operation.lanes,
                observer=BatchMetrics(self._telemetry, operation.full_name),
                monotonic=self._clock.monotonic,
                queue_limit=self._queue_limit,
            )
            self._batchers.append(batcher)
            return BatchedCall(batcher, self._clock, operation)

        return contract(connect)

    async def close(self) -> None:
        # Again, as long as the last handlers of one service still call another whose batcher was closed before.
        while busy := [b for b in self._batchers if b.queued or b.in_flight]:
            for batcher in busy:
                await batcher.close()
        for batcher in self._batchers:
            await batcher.close()  # those at rest have an alarm left


@contextlib.contextmanager
def as_service() -> Generator[None]:
    """Calls in this block are made as the service itself, not as its caller; until the same deadline."""
    call = current.get()
    token = current.set(Context(Actor(SERVICE_ROLE), call.deadline, call.trace_id, call.request_id))
    try:
        yield
    finally:
        current.reset(token)


def acting(actor: Actor, *, clock: Clock, seconds: float, trace_id: str = "", request_id: str = "") -> Context:
    """A context for a call that comes from nowhere: a test, a start-up step, a background loop."""
    return Context(actor, clock.monotonic() + seconds, trace_id, request_id)
