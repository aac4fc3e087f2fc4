"""Client: connects the operations of a contract to a transport, each through its own batcher."""

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
        """A client of `contract` that sends by `transport`. A transport with breakers watches its queues."""

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
        # Repeated while the last handlers of one service still call another one whose batcher was closed before.
        while busy := [b for b in self._batchers if b.queued or b.in_flight]:
            for batcher in busy:
                await batcher.close()
        for batcher in self._batchers:
            await batcher.close()  # an idle one may still have a timer


class UndeclaredCallError(AssertionError):
    """A service calls an operation that it has not declared: in another process the callee would refuse it."""


class _UndeclaredCall:
    """The `Call` of an operation that a service has not declared."""

    def __init__(self, service: str, operation: str) -> None:
        self._sentence = f"{service} calls {operation}, which is not among its calls: declare it in mercato/topology.py"

    def __call__(self, request: Any) -> Awaitable[Any]:
        raise UndeclaredCallError(self._sentence)

    def many(self, requests: Sequence[Any]) -> Awaitable[Sequence[Outcome]]:
        raise UndeclaredCallError(self._sentence)


class Clients(Protocol):
    """Gives the client of a service. The host decides which transport it uses."""

    def __call__(self, contract: type[C]) -> C: ...


def restricted(clients: Clients, service: str, may_call: Collection[str]) -> Clients:
    """The clients of one service, which may call only the operations in `may_call` (full names)."""

    def client(contract: type[C]) -> C:
        whole = clients(contract)

        def connect(operation: Operation[Any, Any]) -> Call[Any, Any]:
            if operation.full_name in may_call:
                return getattr(whole, operation.name)
            return _UndeclaredCall(service, operation.full_name)

        return contract(connect)

    return client


def acting(actor: Actor, *, clock: Clock, seconds: float, trace_id: str = "", request_id: str = "") -> Context:
    """A context for a call that serves no request: of a test, a start-up step, a background loop."""
    return Context(actor, clock.monotonic() + seconds, trace_id, request_id)
