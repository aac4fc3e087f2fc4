"""The calling end: which instance gets a batch, and what its answer means. See the top of this package."""

from __future__ import annotations

import abc
import asyncio
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import structlog

from mercato.chassis.contract import Context, DeadlineExceeded, Internal, Operation, Unavailable
from mercato.chassis.observability.clock import Clock
from mercato.chassis.rpc.balancing import Balancer, Pick
from mercato.chassis.rpc.batching import Outcome
from mercato.chassis.rpc.codec import encode_requests
from mercato.chassis.rpc.discovery import Instance, Registry
from mercato.chassis.rpc.transports.encoded import in_parts, not_known, outcomes_of

from .wire import LARGEST_ANSWER_BYTES, LARGEST_BATCH_BYTES, LONGEST_REMAINING_MS, NotStarted

log = structlog.stdlib.get_logger("mercato.rpc.direct")


class ClientLimits(msgspec.Struct, frozen=True, kw_only=True):
    """The limits of one calling process for each service."""

    calls: int = 256
    """Calls of one operation in flight, to all instances: long calls do not use up the connections of others."""
    connect_seconds: float = 1.0
    batch_bytes: int = LARGEST_BATCH_BYTES
    """A larger batch is sent in parts."""
    answer_bytes: int = LARGEST_ANSWER_BYTES


class NotConnected(Exception):
    """There was no connection, so that nothing was sent. `reason`, if there is one, is for the log."""

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


class ConnectionBroke(Exception):
    """The connection ended, or the answer was malformed, after the batch was sent, at least in part."""


class AnswerTooLarge(Exception):
    """The answer is larger than the bound. The rest of it was not read."""


class Answer(msgspec.Struct, frozen=True):
    """A complete answer of an instance. `status` is for the log."""

    status: str
    body: bytes | None = None
    """The outcomes, if the batch was done."""
    not_started: str | None = None
    """A `NotStarted`, perhaps of a newer release."""
    draining_seconds: float = 0.0
    is_for_another: bool = False
    """Nothing was started, and another instance may start it."""


class DirectTransport(abc.ABC):
    """Sends each batch to one of the instances in `registry`. `chance` gives 0.0 up to 1.0, without 1.0.

    It belongs to one event loop.
    """

    def __init__(
        self, registry: Registry, clock: Clock, limits: ClientLimits, chance: Callable[[], float] = random.random
    ) -> None:
        self._registry = registry
        self._clock = clock
        self._limits = limits
        self._chance = chance
        self._balancers: dict[str, Balancer] = {}
        self._slots: dict[str, asyncio.Semaphore] = {}
        self._stop_watching = registry.watch(self._update)

    @abc.abstractmethod
    async def _exchange(
        self, instance: Instance, operation: Operation[Any, Any], contexts: Sequence[Context], body: bytes
    ) -> Answer:
        """Sends a batch. Raises `NotConnected`, `ConnectionBroke`, `AnswerTooLarge`, or TimeoutError."""

    async def send(
        self, operation: Operation[Any, Any], requests: Sequence[Any], contexts: Sequence[Context]
    ) -> Sequence[Outcome]:
        """See `Transport`. A batch that is larger than the bound is sent in parts; each may fail without the others."""
        now = self._clock.monotonic()
        remaining_s = min(max(context.deadline for context in contexts) - now, LONGEST_REMAINING_MS / 1_000)
        if remaining_s <= 0:
            raise DeadlineExceeded(operation=operation.full_name)
        body = encode_requests(requests, contexts, now)
        if len(body) > self._limits.batch_bytes:
            return await in_parts(self.send, operation, requests, contexts, self._limits.batch_bytes)
        try:
            # The time-out includes the wait for a slot.
            async with asyncio.timeout(remaining_s), self._slot(operation):
                return await self._deliver(operation, requests, contexts, body)
        except TimeoutError:
            raise DeadlineExceeded(operation=operation.full_name) from None

    async def close(self) -> None:
        """Closes the connections; batches in flight are lost. For the end, after the connector has been closed."""
        self._stop_watching()

    # --------------------------------------------------------------------------------------------------- the batch

    async def _deliver(
        self, operation: Operation[Any, Any], requests: Sequence[Any], contexts: Sequence[Context], body: bytes
    ) -> Sequence[Outcome]:
        """Tries the instances one after the other, each once, until one has started the batch, or may have."""
        balancer = self._balancer(operation.service)
        tried: list[Instance] = []
        while (pick := balancer.pick(len(requests), tried)) is not None:
            if tried:
                body = encode_requests(requests, contexts, self._clock.monotonic())
            tried.append(pick.instance)
            try:
                outcomes = await self._try(pick, operation, requests, contexts, body)
            finally:
                pick.given_up()
            if outcomes is not None:
                return outcomes
        raise Unavailable(service=operation.service)

    async def _try(
        self,
        pick: Pick,
        operation: Operation[Any, Any],
        requests: Sequence[Any],
        contexts: Sequence[Context],
        body: bytes,
    ) -> Sequence[Outcome] | None:
        """The outcomes at one instance; None if it started nothing and another instance may start the batch."""
        try:
            answer = await self._exchange(pick.instance, operation, contexts, body)
        except NotConnected as error:
            pick.failed()
            if error.reason:
                where = {"operation": operation.full_name, "address": pick.instance.address}
                log.warning("rpc_not_encrypted", **where, reason=error.reason)
            return None
        except ConnectionBroke as error:
            pick.failed()
            where = {"operation": operation.full_name, "address": pick.instance.address}
            log.warning("rpc_connection_broke", **where, reason=str(error))
            return not_known(operation, requests)
        except AnswerTooLarge:
            pick.answered()
            log.error("rpc_answer_too_large", operation=operation.full_name, address=pick.instance.address)
            return not_known(operation, requests)
        if answer.not_started == NotStarted.DRAINING:
            pick.drains(answer.draining_seconds)
            return None
        pick.answered()
        if answer.body is not None:
            return outcomes_of(operation, requests, answer.body)
        return _refused(operation, requests, answer, pick.instance)

    # ------------------------------------------------------------------------------------------------- the instances

    def _balancer(self, service: str) -> Balancer:
        balancer = self._balancers.get(service)
        if balancer is None:
            balancer = self._balancers[service] = Balancer(clock=self._clock, chance=self._chance)
            balancer.update(self._registry.instances(service))
        return balancer

    def _update(self, service: str) -> None:
        if service in self._balancers:
            self._balancers[service].update(self._registry.instances(service))

    def _slot(self, operation: Operation[Any, Any]) -> asyncio.Semaphore:
        slot = self._slots.get(operation.full_name)
        if slot is None:
            slot = self._slots[operation.full_name] = asyncio.Semaphore(self._limits.calls)
        return slot


def _refused(
    operation: Operation[Any, Any], requests: Sequence[Any], answer: Answer, instance: Instance
) -> Sequence[Outcome] | None:
    """The outcomes of a batch that was answered without outcomes; None if another instance may start it."""
    reason = answer.not_started
    fields = {"operation": operation.full_name, "address": instance.address, "status": answer.status, "reason": reason}
    log.warning("rpc_refused", **fields)
    if reason is None:
        return not_known(operation, requests)
    if answer.is_for_another:
        return None
    # The instance does not understand the batch, and another one would not either: a bug on one of the two sides.
    return [Internal(operation=operation.full_name) for _ in requests]


def seconds_of(text: str) -> float:
    """The value of a header, or 0; the balancer bounds it."""
    try:
        seconds = float(text)
    except ValueError:
        return 0.0
    return seconds if math.isfinite(seconds) else 0.0
