"""Server: dispatches a batch to its handler.

A `Server` holds the handlers of one service. `dispatch` gives each request of a batch its own outcome:

1. A request whose actor may not call the operation, or whose deadline has passed, is answered without being started.
2. The handler gets the rest as one batch.
3. If it fails unexpectedly and nothing was committed, here or by a call elsewhere that must not be repeated, each
   request is run again alone, so that one bad request fails alone. Otherwise nothing is run again.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeVar, overload

import structlog
from prometheus_client import Counter

from mercato.chassis.contract import (
    SERVICE_ROLE,
    Actor,
    Batch,
    BatchOperation,
    Context,
    Contract,
    DeadlineExceeded,
    Forbidden,
    HandlerRun,
    Internal,
    Kind,
    Message,
    Operation,
    OutcomeUnknown,
    Overloaded,
    ServiceError,
    SingleOperation,
    Span,
    Unavailable,
    current,
    handler_run,
)
from mercato.chassis.contract.context import NO_SPAN
from mercato.chassis.observability.clock import Clock
from mercato.chassis.observability.telemetry import SECONDS_BUCKETS, Telemetry
from mercato.chassis.observability.tracing import Tracing

from .batching import Outcome

Q = TypeVar("Q", bound=Message)
A = TypeVar("A", bound=Message)

log = structlog.stdlib.get_logger("mercato.rpc")


FAILURES: Final = frozenset({Kind.INTERNAL, Kind.UNAVAILABLE, Kind.DEADLINE})
"""The kinds of errors that are no answers: something does not work."""
CALL_SECONDS: Final = "rpc_server_call_duration_seconds"
RPC_SYSTEM: Final = "mercato"
BATCH_SECONDS: Final = (0.00025, 0.0005, *SECONDS_BUCKETS)
LINKS_MAX: Final = 128
"""Recorded requests that the span of a batch names; the others have no spans that could be looked at."""

Handler = Callable[[Any], Awaitable[Any]]


class Observed(NamedTuple):
    """The metrics of one operation."""

    seconds: Callable[[float], None]
    requests: Callable[[float], None]
    failed: Callable[[float], None]


class Served:
    """The metrics of batches that were served, by the full name of the operation."""

    def __init__(self, telemetry: Telemetry) -> None:
        by = ["rpc_method"]
        about = "Requests that failed; a refusal is an answer."
        self._seconds = telemetry.histogram(
            CALL_SECONDS, "How long a batch took.", [*by, "rpc_system_name"], BATCH_SECONDS
        )
        self._requests = telemetry.counter("mercato_requests", "Requests in batches.", by)
        self._failed = telemetry.counter("mercato_requests_failed", about, by)
        self._exemplars = telemetry.exemplars
        self._observed: dict[str, Observed] = {}

    def observe(
        self, name: str, count: int, outcomes: Sequence[Outcome] | None, seconds: float, span: Span | None
    ) -> None:
        """Counts a batch of `count` requests. Without outcomes it was cancelled: nothing waits for it any more."""
        observed = self._observed.get(name) or self._of(name)
        observed.seconds(seconds)
        observed.requests(count)
        failed = count
        if outcomes is not None:
            failed = len([o for o in outcomes if isinstance(o, ServiceError) and o.kind in FAILURES])
        if failed:
            observed.failed(failed)
        if span is not None and span.places:
            labels = {"rpc_method": name, "rpc_system_name": RPC_SYSTEM}
            self._exemplars.note(CALL_SECONDS, labels, seconds, span)

    def _of(self, name: str) -> Observed:
        """Made by the first batch: a process serves more operations than are called."""
        seconds, requests, failed = self._seconds.labels(name, RPC_SYSTEM), self._requests, self._failed
        made = self._observed[name] = Observed(seconds.add, requests.labels(name).add, failed.labels(name).add)
        return made


class Server:
    """The handlers of one service."""

    def __init__(self, contract: type[Contract], clock: Clock) -> None:
        self.contract = contract
        self._clock = clock
        self._handlers: dict[str, Handler] = {}
        self._names: dict[str, str] = {}
        self._refused_keys: Counter | None = None
        self._served: Served | None = None
        self._tracing = Tracing()

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
        self._names[operation.name] = operation.full_name

    def report_to(self, telemetry: Telemetry) -> None:
        """From now on makes a span of each batch, and counts refused keys: those that belong to another request."""
        self._tracing = telemetry.tracing
        self._served = Served(telemetry)
        about = "Requests that were refused because their key belongs to another request, by the field that differs."
        self._refused_keys = telemetry.counter("mercato_keys_refused", about, ["operation", "field"])

    def complete(self) -> Server:
        """This server, once every operation has a handler. Called at the end of `build`."""
        missing = set(self.contract.operations) - set(self._handlers)
        assert not missing, f"{self.contract.service}: no handler for {sorted(missing)}"
        return self

    async def dispatch(
        self, operation: Operation[Any, Any], requests: Sequence[Any], contexts: Sequence[Context]
    ) -> Sequence[Outcome]:
        """One outcome for each request, in order. Never raises because of a request."""
        started, span = time.perf_counter(), self._begin(operation, contexts)
        outcomes: Sequence[Outcome] | None = None
        try:
            with span or NO_SPAN:
                outcomes = await self._dispatch(operation, requests, contexts, span)
                if span is not None:
                    _note_refusals(span, outcomes)
                return outcomes
        finally:
            if span is not None:
                self._tracing.end_batch(span, contexts)
            if self._served is not None:
                name, seconds = self._names[operation.name], time.perf_counter() - started
                self._served.observe(name, len(requests), outcomes, seconds, span)

    def _begin(self, operation: Operation[Any, Any], contexts: Sequence[Context]) -> Span | None:
        """The span of a batch, below those of its requests. None if tracing is off."""
        if not self._tracing.is_on:
            return None
        callers: list[Span] = []
        for context in contexts:
            if (caller := context.span) is not None and (not callers or caller is not callers[-1]):
                callers.append(caller)
        name = self._names[operation.name]
        span = self._tracing.batch(name, operation.service, callers)
        if span.places:
            span.note({
                "rpc.system.name": RPC_SYSTEM, "rpc.method": name, "mercato.batch.size": len(contexts),
            })  # fmt: skip
            span.links = [(caller.places[0].trace_id, caller.id) for caller in callers if caller.places][:LINKS_MAX]
        return span

    async def _dispatch(
        self, operation: Operation[Any, Any], requests: Sequence[Any], contexts: Sequence[Context], span: Span | None
    ) -> Sequence[Outcome]:
        refusals = self._refusals(operation, contexts)
        if not refusals:
            return await self._run(operation, requests, contexts, span)
        accepted = [i for i in range(len(requests)) if i not in refusals]
        outcomes: list[Outcome] = [refusals.get(i) for i in range(len(requests))]
        if accepted:
            results = await self._run(operation, [requests[i] for i in accepted], [contexts[i] for i in accepted], span)
            for i, result in zip(accepted, results, strict=True):
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
        self, operation: Operation[Any, Any], requests: Sequence[Any], contexts: Sequence[Context], span: Span | None
    ) -> Sequence[Outcome]:
        if isinstance(operation, SingleOperation):
            return [await self._run_one(operation, r, c, span) for r, c in zip(requests, contexts, strict=True)]
        current.set(self._batch_context(contexts, span))
        tried = HandlerRun()
        handler_run.set(tried)
        try:
            outcomes = await self._handlers[operation.name](Batch[Any].of(requests, contexts))
            assert len(outcomes) == len(requests), f"{len(outcomes)} answers to {len(requests)} requests"
            for outcome in outcomes:
                if isinstance(outcome, ServiceError) and outcome.key_field:
                    self._note_refused_key(outcome, operation)
            return outcomes
        except (Unavailable, Overloaded, DeadlineExceeded) as error:
            # Running the requests one by one would only wait once for each.
            return [_unless_committed(error, tried, operation).copy() for _ in requests]
        except Exception as error:  # an edge: a handler failed
            if len(requests) == 1:
                return [self._answer_to(error, operation, contexts[0])]
            if tried.committed:
                # The error may belong to any of the requests, so that even a refusal is the answer to none.
                self._log_failure(error, operation, contexts[0])
                return [Internal(operation=operation.full_name) for _ in requests]
            log.warning(
                "batch_rerun", operation=operation.full_name, size=len(requests), reason=type(error).__name__,
                exc_info=None if isinstance(error, ServiceError) else error,
            )  # fmt: skip
        outcomes: list[Outcome] = []
        for request, context in zip(requests, contexts, strict=True):
            outcomes.extend(await self.dispatch(operation, [request], [context]))
        return outcomes

    async def _run_one(
        self, operation: Operation[Any, Any], request: Any, context: Context, span: Span | None
    ) -> Outcome:
        current.set(Context(context.actor, context.deadline, context.trace_id, context.request_id, span))
        tried = HandlerRun()
        handler_run.set(tried)
        try:
            return await self._handlers[operation.name](request)
        except (Unavailable, Overloaded, DeadlineExceeded) as error:
            return _unless_committed(error, tried, operation)
        except Exception as error:  # an edge: a handler failed; logged by _log_failure
            return self._answer_to(error, operation, context)

    def _batch_context(self, contexts: Sequence[Context], span: Span | None) -> Context:
        """The context of calls that a batch makes: as the service itself, until the last of its requests expires."""
        deadline = contexts[0].deadline if len(contexts) == 1 else max(c.deadline for c in contexts)
        actor = Actor(SERVICE_ROLE)
        return Context(actor, deadline, contexts[0].trace_id, contexts[0].request_id, span)

    def _answer_to(self, error: Exception, operation: Operation[Any, Any], context: Context) -> ServiceError:
        if isinstance(error, ServiceError):
            if error.key_field:
                self._note_refused_key(error, operation)
            return error
        self._log_failure(error, operation, context)
        return Internal(operation=operation.full_name)

    def _note_refused_key(self, error: ServiceError, operation: Operation[Any, Any]) -> None:
        field = error.details.get("field") or error.key_field
        if self._refused_keys is not None:
            self._refused_keys.labels(operation.full_name, field).inc()
        ids = {name: value for name, value in error.details.items() if name.endswith("_id")}
        log.warning("key_refused", operation=operation.full_name, field=field, code=error.code, **ids)

    def _log_failure(self, error: Exception, operation: Operation[Any, Any], context: Context) -> None:
        log.error(
            "operation_failed",
            operation=operation.full_name,
            trace_id=context.trace_id,
            request_id=context.request_id,
            exc_info=error,
        )


def _note_refusals(span: Span, outcomes: Sequence[Outcome]) -> None:
    refused = [outcome.code for outcome in outcomes if isinstance(outcome, ServiceError)]
    if refused:
        span.note({"mercato.batch.failed": len(refused)})
        span.failure = refused[0] if len(refused) == len(outcomes) else ""


def _unless_committed(error: ServiceError, tried: HandlerRun, operation: Operation[Any, Any]) -> ServiceError:
    """`error`, after which a retry is safe; `OutcomeUnknown` once something was, or may be, committed."""
    return OutcomeUnknown(operation=operation.full_name) if tried.committed else error


class LocalTransport:
    """Sends to the servers of this process. `servers` maps a service's name to its server, and may be filled later."""

    def __init__(self, servers: Mapping[str, Server]) -> None:
        self._servers = servers

    async def send(
        self, operation: Operation[Any, Any], requests: Sequence[Any], contexts: Sequence[Context]
    ) -> Sequence[Outcome]:
        return await self._servers[operation.service].dispatch(operation, requests, contexts)
