"""The receiving side of every transport that carries bytes: from the bytes of a batch to the bytes of its outcomes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mercato.chassis.contract import Context, Operation, ServiceError
from mercato.chassis.observability.clock import Clock
from mercato.chassis.rpc.batching import Outcome
from mercato.chassis.rpc.codec import decode_requests, encode_outcomes
from mercato.chassis.rpc.server import Server


async def answer_encoded(server: Server, operation: Operation[Any, Any], sent: bytes, clock: Clock) -> bytes:
    """As many outcomes as there are requests in `sent`, in their order. Raises where `sent` is no batch."""
    requests, contexts = decode_requests(operation, sent, clock.monotonic())
    return await answer_decoded(server, operation, requests, contexts)


async def answer_decoded(
    server: Server,
    operation: Operation[Any, Any],
    requests: Sequence[Any | ServiceError],
    contexts: Sequence[Context],
) -> bytes:
    """The outcomes of what `decode_requests` gave, in the same order; an error in place of a request is its own."""
    outcomes: list[Outcome] = list(requests)
    fit = [i for i, request in enumerate(requests) if not isinstance(request, ServiceError)]
    if fit:
        done = await server.dispatch(operation, [requests[i] for i in fit], [contexts[i] for i in fit])
        for i, outcome in zip(fit, done, strict=True):
            outcomes[i] = outcome
    return encode_outcomes(operation, outcomes)
