"""Server: dispatches a batch to its handler.

A `Server` holds the handlers of one service. `dispatch` gives each request of a batch its own outcome:

1. A request whose actor may not call the operation, or whose deadline has passed, is answered without being started.
2. The handler gets the rest as one batch.
3. If it fails unexpectedly and nothing was committed, here or by a call elsewhere that must not be repeated, each
   request is run again alone, so that one bad request fails alone. Otherwise nothing is run again.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar, overload

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
    Message,
    Operation,
    OutcomeUnknown,
    Overloaded,
    ServiceError,
    SingleOperation,
    Unavailable,
    current,
    handler_run,
)
from mercato.chassis.observability.clock import Clock
from mercato.chassis.observability.telemetry import Telemetry

from .batching import Outcome

Q = TypeVar("Q", bound=Message)
A = TypeVar("A", bound=Message)

log = structlog.stdlib.get_logger("mercato.rpc")


Handler = Callable[[Any], Awaitable[Any]]


class Server:
    """The handlers of one service."""

    def __init__(self, contract: type[Contract], clock: Clock) -> None:
        self.contract = contract
        self._clock = clock
        self._handlers: dict[str, Handler] = {}
        self._refused_keys: Counter | None = None

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

    def count_in(self, telemetry: Telemetry) -> None:
        """From now on counts keys that are refused because they belong to another request."""
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
        refusals = self._refusals(operation, contexts)
        if not refusals:
            return await self._run(operation, requests, contexts)
        accepted = [i for i in range(len(requests)) if i not in refusals]
        outcomes: list[Outcome] = [refusals.get(i) for i in range(len(requests))]
        if accepted:
            results = await self._run(operation, [requests[i] for i in accepted], [contexts[i] for i in accepted])
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
        self, operation: Operation[Any, Any], requests: Sequence[Any], contexts: Sequence[Context]
    ) -> Sequence[Outcome]:
        if isinstance(operation, SingleOperation):
            return [await self._run_one(operation, r, c) for r, c in zip(requests, contexts, strict=True)]
        current.set(self._batch_context(contexts))
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

    async def _run_one(self, operation: Operation[Any, Any], request: Any, context: Context) -> Outcome:
        current.set(context)
        tried = HandlerRun()
        handler_run.set(tried)
        try:
            return await self._handlers[operation.name](request)
        except (Unavailable, Overloaded, DeadlineExceeded) as error:
            return _unless_committed(error, tried, operation)
        except Exception as error:  # an edge: a handler failed; logged by _log_failure
            return self._answer_to(error, operation, context)

    def _batch_context(self, contexts: Sequence[Context]) -> Context:
        """The context of calls that a batch makes: as the service itself, until the last of its requests expires."""
        deadline = contexts[0].deadline if len(contexts) == 1 else max(c.deadline for c in contexts)
        actor = Actor(SERVICE_ROLE)
        return Context(actor, deadline, contexts[0].trace_id, contexts[0].request_id)

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


def _unless_committed(error: ServiceError, tried: HandlerRun, operation: Operation[Any, Any]) -> ServiceError:
    """`error`, after which a retry is safe; `OutcomeUnknown` once something was, or may be, committed."""
    return OutcomeUnknown(operation=operation.full_name) if tried.committed else error
