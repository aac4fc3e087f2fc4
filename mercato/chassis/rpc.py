"""Calls: the client that coalesces, and the server that dispatches a batch to its handler.

A `Server` holds the handlers of one service. `dispatch` gives each request of a batch its own outcome:

1. A request whose actor may not call the operation, or whose deadline has passed, is answered without being started.
2. The handler gets the rest as one batch.
3. If it fails unexpectedly and nothing was committed, here or by a call elsewhere that must not be repeated, each
   request is run again alone, so that one bad request fails alone. Otherwise nothing is run again.

A `Client` connects the operations of a contract to a transport, each through a batcher of its own.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Awaitable, Callable, Generator, Sequence
from typing import Any, Final, Protocol, TypeVar, overload

import structlog

from .batching import DEFAULT_QUEUE_LIMIT, Batcher, Outcome
from .clock import Clock
from .contract import (
    Actor,
    Batch,
    BatchOperation,
    Call,
    Context,
    Contract,
    DeadlineExceeded,
    Forbidden,
    Internal,
    Message,
    Operation,
    OutcomeUnknown,
    Overloaded,
    Retry,
    ServiceError,
    SingleOperation,
    Unavailable,
    current,
)
from .telemetry import Telemetry

Q = TypeVar("Q", bound=Message)
A = TypeVar("A", bound=Message)
C = TypeVar("C", bound=Contract)

SERVICE_ROLE: Final = "service"
"""The role with which a service calls another one. It may call every operation."""

log = structlog.stdlib.get_logger("mercato.rpc")


class Attempt:
    """What a handler has done so far, as far as running it again is concerned."""

    __slots__ = ("committed", "open_transactions")

    def __init__(self) -> None:
        self.open_transactions = 0
        self.committed = False
        """True once a commit has succeeded, or its outcome is unknown; or once another service was asked for something
        that it must not be asked for twice."""

    @property
    def in_transaction(self) -> bool:
        return self.open_transactions > 0


attempt: Final[contextvars.ContextVar[Attempt | None]] = contextvars.ContextVar("attempt", default=None)


class RemoteCallInTransactionError(AssertionError):
    """A handler called another service inside a transaction: row locks would be held while the network decides."""


class Transport(Protocol):
    """How a batch reaches a service.

    `send` takes the requests of one operation and their contexts, and answers with as many outcomes, in the same
    order. It raises `ServiceError` when the batch as a whole did not reach a service: then no request was started, or
    it is not known whether it was.
    """

    async def send(
        self, operation: Operation[Any, Any], requests: Sequence[Any], contexts: Sequence[Context]
    ) -> Sequence[Outcome]: ...


# ---------------------------------------------------------------------------------------------------------- server

Handler = Callable[[Any], Awaitable[Any]]


class Server:
    """The handlers of one service."""

    def __init__(self, contract: type[Contract], clock: Clock) -> None:
        self.contract = contract
        self._clock = clock
        self._handlers: dict[str, Handler] = {}

    @overload
    def register(
        self, operation: BatchOperation[Q, A], handler: Callable[[Batch[Q]], Awaitable[Sequence[A | ServiceError]]]
    ) -> None: ...
    @overload
    def register(self, operation: SingleOperation[Q, A], handler: Callable[[Q], Awaitable[A]]) -> None: ...
    def register(self, operation: Operation[Any, Any], handler: Handler) -> None:
        assert self.contract.operations.get(operation.name) is operation, (
            f"{operation.full_name} is not of this contract"
        )
        self._handlers[operation.name] = handler

    def complete(self) -> Server:
        """This server, once every operation has a handler. Called at the end of `build`."""
        missing = set(self.contract.operations) - set(self._handlers)
        assert not missing, f"{self.contract.service}: no handler for {sorted(missing)}"
        return self

    async def dispatch(
        self, operation: Operation[Any, Any], requests: Sequence[Any], contexts: Sequence[Context]
    ) -> Sequence[Outcome]:
        """One outcome for each request, in order. Never raises because of a request."""
        refusals = self._refusals(operation, contexts)
        if not refusals:
            return await self._run(operation, requests, contexts)
        welcome = [i for i in range(len(requests)) if i not in refusals]
        outcomes: list[Outcome] = [refusals.get(i) for i in range(len(requests))]
        if welcome:
            results = await self._run(operation, [requests[i] for i in welcome], [contexts[i] for i in welcome])
            for i, result in zip(welcome, results, strict=True):
                outcomes[i] = result
        return outcomes

    def _refusals(self, operation: Operation[Any, Any], contexts: Sequence[Context]) -> dict[int, ServiceError]:
        now, allow = self._clock.monotonic(), operation.allow
        refusals: dict[int, ServiceError] = {}
        for i, context in enumerate(contexts):
            role = context.actor.role
            if role not in allow and role != SERVICE_ROLE:
                refusals[i] = Forbidden(operation=operation.full_name, role=role)
            elif context.deadline <= now:
                refusals[i] = DeadlineExceeded(operation=operation.full_name)
        return refusals

    async def _run(
        self, operation: Operation[Any, Any], requests: Sequence[Any], contexts: Sequence[Context]
    ) -> Sequence[Outcome]:
        if isinstance(operation, SingleOperation):
            return [await self._run_one(operation, r, c) for r, c in zip(requests, contexts, strict=True)]
        current.set(self._batch_context(contexts))
        tried = Attempt()
        attempt.set(tried)
        try:
            outcomes = await self._handlers[operation.name](Batch[Any].of(requests, contexts))
            assert len(outcomes) == len(requests), f"{len(outcomes)} answers to {len(requests)} requests"
            return outcomes
        except (Unavailable, Overloaded, DeadlineExceeded) as error:
            # Trying one by one would only wait as many times.
            return [_unless_committed(error, tried, operation).copy() for _ in requests]
        except Exception as error:  # an edge: a handler failed
            if len(requests) == 1:
                return [self._answer_to(error, operation, contexts[0])]
            if tried.committed:
                # Whose request it was is not known any more, so that even a refusal is nobody's answer.
                self._log_failure(error, operation, contexts[0])
                return [Internal(operation=operation.full_name) for _ in requests]
            log.warning("batch_rerun", operation=operation.full_name, size=len(requests), reason=type(error).__name__)
        outcomes: list[Outcome] = []
        for request, context in zip(requests, contexts, strict=True):
            outcomes.extend(await self.dispatch(operation, [request], [context]))
        return outcomes

    async def _run_one(self, operation: Operation[Any, Any], request: Any, context: Context) -> Outcome:
        current.set(context)
        tried = Attempt()
        attempt.set(tried)
        try:
            return await self._handlers[operation.name](request)
        except (Unavailable, Overloaded, DeadlineExceeded) as error:
            return _unless_committed(error, tried, operation)
        except Exception as error:  # an edge: a handler failed
            return self._answer_to(error, operation, context)

    def _batch_context(self, contexts: Sequence[Context]) -> Context:
        """What a batch calls others with: as the service itself, until the last of its requests expires."""
        deadline = contexts[0].deadline if len(contexts) == 1 else max(c.deadline for c in contexts)
        actor = Actor(SERVICE_ROLE)
        return Context(actor, deadline, contexts[0].trace_id, contexts[0].request_id)

    def _answer_to(self, error: Exception, operation: Operation[Any, Any], context: Context) -> ServiceError:
        if isinstance(error, ServiceError):
            return error
        self._log_failure(error, operation, context)
        return Internal(operation=operation.full_name)

    def _log_failure(self, error: Exception, operation: Operation[Any, Any], context: Context) -> None:
        log.error(
            "operation_failed",
            operation=operation.full_name,
            trace_id=context.trace_id,
            request_id=context.request_id,
            exc_info=error,
        )


def _unless_committed(error: ServiceError, tried: Attempt, operation: Operation[Any, Any]) -> ServiceError:
    """`error`, which says that trying again is safe; that is not true once something was, or may be, committed."""
    return OutcomeUnknown(operation=operation.full_name) if tried.committed else error


# ---------------------------------------------------------------------------------------------------------- client


class BatchedCall:
    """A `Call`: one operation, its batcher, and the context of whoever calls."""

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
                observer=self._telemetry.batches(operation.full_name),
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
    """What is called in this block, the service asks for itself, not for whoever called it; until the same deadline."""
    call = current.get()
    token = current.set(Context(Actor(SERVICE_ROLE), call.deadline, call.trace_id, call.request_id))
    try:
        yield
    finally:
        current.reset(token)


def acting(actor: Actor, *, clock: Clock, seconds: float, trace_id: str = "", request_id: str = "") -> Context:
    """A context for a call that comes from nowhere: a test, a start-up step, a background loop."""
    return Context(actor, clock.monotonic() + seconds, trace_id, request_id)
