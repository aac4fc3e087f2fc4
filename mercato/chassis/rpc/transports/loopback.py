"""A transport within one process that behaves as one between processes, for tests.

It encodes and decodes every batch and every answer, sends the remaining time instead of a clock reading, and sends
each request that may be repeated (`safe`, or `keyed` with a key) twice. A test that passes `local` and fails
`loopback` has found a message that does not survive encoding, or an operation that is wrongly declared repeatable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from mercato.chassis.contract import Context, Kind, Operation, Retry, ServiceError
from mercato.chassis.observability.clock import Clock
from mercato.chassis.rpc.batching import Outcome
from mercato.chassis.rpc.codec import decode_outcomes, encode_requests
from mercato.chassis.rpc.server import Server

from .encoded import answer_encoded


class LoopbackTransport:
    """Sends to the servers of this process through bytes. See the top of this file."""

    def __init__(self, servers: Mapping[str, Server], clock: Clock) -> None:
        self._servers = servers
        self._clock = clock

    async def send(
        self, operation: Operation[Any, Any], requests: Sequence[Any], contexts: Sequence[Context]
    ) -> Sequence[Outcome]:
        outcomes = await self._over_and_back(operation, requests, contexts)
        again = [i for i, request in enumerate(requests) if operation.repeatable(request)]
        if again:
            second = await self._over_and_back(operation, [requests[i] for i in again], [contexts[i] for i in again])
            for i, outcome in zip(again, second, strict=True):
                _agree(operation, outcomes[i], outcome)
        return outcomes

    async def _over_and_back(
        self, operation: Operation[Any, Any], requests: Sequence[Any], contexts: Sequence[Context]
    ) -> list[Outcome]:
        sent = encode_requests(requests, contexts, self._clock.monotonic())
        server = self._servers[operation.service]
        return decode_outcomes(operation, await answer_encoded(server, operation, sent, self._clock))


_UNKNOWN: Final = (Kind.UNAVAILABLE, Kind.DEADLINE)
"""Kinds of errors after which it is unknown what the service did."""


def _agree(operation: Operation[Any, Any], first: Outcome, second: Outcome) -> None:
    """Asserts that a keyed request that succeeded succeeds again. The answer of a read may change in between."""
    if operation.retry is not Retry.KEYED or isinstance(first, ServiceError):
        return
    if isinstance(second, ServiceError) and second.kind not in _UNKNOWN:
        raise AssertionError(f"{operation.full_name} is not repeatable: done first, then {second!r}")
