"""Shared by all transports that send bytes: batches in parts, encoded outcomes, and unknown outcomes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec
import structlog

from mercato.chassis.contract import (
    Context,
    FieldError,
    InvalidRequest,
    Operation,
    OutcomeUnknown,
    ServiceError,
    Unavailable,
)
from mercato.chassis.observability.clock import Clock
from mercato.chassis.rpc.batching import Outcome
from mercato.chassis.rpc.codec import decode_outcomes, decode_requests, encode_outcomes
from mercato.chassis.rpc.server import Server

log = structlog.stdlib.get_logger("mercato.rpc")


async def answer_encoded(server: Server, operation: Operation[Any, Any], sent: bytes, clock: Clock) -> bytes:
    """The outcomes of the requests in `sent`, in their order. Raises if `sent` is no batch."""
    requests, contexts = decode_requests(operation, sent, clock.monotonic())
    return await answer_decoded(server, operation, requests, contexts)


async def answer_decoded(
    server: Server,
    operation: Operation[Any, Any],
    requests: Sequence[Any | ServiceError],
    contexts: Sequence[Context],
) -> bytes:
    """The outcomes of decoded requests, in the same order; the outcome of an `InvalidRequest` is itself."""
    outcomes: list[Outcome] = list(requests)
    fit = [i for i, request in enumerate(requests) if not isinstance(request, ServiceError)]
    if fit:
        done = await server.dispatch(operation, [requests[i] for i in fit], [contexts[i] for i in fit])
        for i, outcome in zip(fit, done, strict=True):
            outcomes[i] = outcome
    return encode_outcomes(operation, outcomes)


# ----------------------------------------------------------------------------------------------------- the calling side

Send = Callable[[Operation[Any, Any], Sequence[Any], Sequence[Context]], Awaitable[Sequence[Outcome]]]


async def in_parts(
    send: Send, operation: Operation[Any, Any], requests: Sequence[Any], contexts: Sequence[Context], bound: int
) -> Sequence[Outcome]:
    """Sends the two halves of a batch that is larger than `bound` bytes; each may fail without the other."""
    if len(requests) == 1:
        return [InvalidRequest(errors=(FieldError(field="", message=f"The request is larger than {bound} bytes."),))]
    half = len(requests) // 2
    outcomes: list[Outcome] = []
    for part in (slice(half), slice(half, None)):
        try:
            outcomes += await send(operation, requests[part], contexts[part])
        except ServiceError as error:
            outcomes += [error.copy() for _ in requests[part]]
    return outcomes


def not_known(operation: Operation[Any, Any], requests: Sequence[Any]) -> Sequence[Outcome]:
    """The outcomes of requests that may have been started: `Unavailable` if repeatable, else `OutcomeUnknown`."""
    return [
        Unavailable(service=operation.service)
        if operation.repeatable(request)
        else OutcomeUnknown(operation=operation.full_name)
        for request in requests
    ]


def outcomes_of(operation: Operation[Any, Any], requests: Sequence[Any], body: bytes) -> Sequence[Outcome]:
    """Decodes the outcomes of a batch from the body of its answer. If it is malformed, the outcomes are unknown."""
    try:
        outcomes = decode_outcomes(operation, body)
    except (msgspec.MsgspecError, RecursionError) as error:
        log.error("rpc_answer_malformed", operation=operation.full_name, reason=str(error))
        return not_known(operation, requests)
    if len(outcomes) != len(requests):
        log.error("rpc_answers_miscounted", operation=operation.full_name, wanted=len(requests), got=len(outcomes))
        return not_known(operation, requests)
    return outcomes
