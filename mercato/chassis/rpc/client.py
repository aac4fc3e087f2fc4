"""Client: connects the operations of a contract to a transport, each through a batcher of its own."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Collection, Sequence
from typing import Any, Protocol, TypeVar

from mercato.chassis.contract import (
    Actor,
    Call,
    Context,
    Contract,
    Operation,
)
from mercato.chassis.observability.clock import Clock
from mercato.chassis.observability.telemetry import Telemetry

from .batching import DEFAULT_QUEUE_LIMIT, BatchedCall, Batcher, BatchMetrics, Outcome
from .circuit_breaker import BreakingTransport
from .transports import Transport

C = TypeVar("C", bound=Contract)


class Connector:
    """Makes clients, and closes their batchers. One a process."""

    def __init__(self, clock: Clock, telemetry: Telemetry, *, queue_limit: int = DEFAULT_QUEUE_LIMIT) -> None:
        self._clock = clock
        self._telemetry = telemetry
        self._queue_limit = queue_limit
        self._batchers: list[Batcher] = []

    def client(self, contract: type[C], transport: Transport) -> C:
        """A client of `contract` whose batches travel by `transport`. A transport with breakers watches its queues."""

        def connect(operation: Operation[Any, Any]) -> Call[Any, Any]:
            batcher = Batcher(
                operation.full_name,
                functools.partial(transport.send, operation),
                size=operation.size,
                lanes=operation.lanes,
                observer=BatchMetrics(self._telemetry, operation.full_name),
                monotonic=self._clock.monotonic,
                queue_limit=self._queue_limit,
            )
            self._batchers.append(batcher)
            if isinstance(transport, BreakingTransport):
                transport.watch(operation, batcher)
            return BatchedCall(batcher, self._clock.monotonic, operation)

        return contract(connect)

    async def close(self) -> None:
        # Again, as long as the last handlers of one service still call another whose batcher was closed before.
        while busy := [b for b in self._batchers if b.queued or b.in_flight]:
            for batcher in busy:
                await batcher.close()
        for batcher in self._batchers:
            await batcher.close()  # those at rest have an alarm left


class UndeclaredCallError(AssertionError):
    """A service calls an operation that it is not known to call: between processes its callee would refuse it."""


class _Undeclared:
    """The `Call` of an operation that a service is not known to call."""

    def __init__(self, service: str, operation: str) -> None:
        self._sentence = f"{service} calls {operation}, which is not among its calls: declare it in mercato/topology.py"

    def __call__(self, request: Any) -> Awaitable[Any]:
        raise UndeclaredCallError(self._sentence)

    def many(self, requests: Sequence[Any]) -> Awaitable[Sequence[Outcome]]:
        raise UndeclaredCallError(self._sentence)


class Clients(Protocol):
    """Gives the client of a service. How it reaches that service is the host's business."""

    def __call__(self, contract: type[C]) -> C: ...


def restricted(clients: Clients, service: str, may_call: Collection[str]) -> Clients:
    """The clients of one service, with which it calls the operations in `may_call` (full names) alone."""

    def client(contract: type[C]) -> C:
        whole = clients(contract)

        def connect(operation: Operation[Any, Any]) -> Call[Any, Any]:
            if operation.full_name in may_call:
                return getattr(whole, operation.name)
            return _Undeclared(service, operation.full_name)

        return contract(connect)

    return client


def acting(actor: Actor, *, clock: Clock, seconds: float, trace_id: str = "", request_id: str = "") -> Context:
    """A context for a call that comes from nowhere: a test, a start-up step, a background loop."""
    return Context(actor, clock.monotonic() + seconds, trace_id, request_id)
