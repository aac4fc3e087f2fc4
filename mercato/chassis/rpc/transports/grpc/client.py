"""The calling end of the gRPC transport. See the top of this package."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, Final

import grpc
import grpc.aio

from mercato.chassis.contract import Context, Operation
from mercato.chassis.observability.clock import Clock
from mercato.chassis.rpc.codec import traceparent_of
from mercato.chassis.rpc.discovery import Instance, Registry
from mercato.chassis.rpc.transports.direct.client import (
    Answer,
    AnswerTooLarge,
    ClientLimits,
    DirectTransport,
    seconds_of,
)
from mercato.chassis.rpc.transports.direct.wire import (
    AUTHORIZATION,
    BEARER,
    DRAINING_SECONDS,
    HEADER_WORD,
    LONGEST_REMAINING_MS,
    NOT_STARTED,
    VERSION,
)
from mercato.chassis.rpc.transports.server_names import ServerName, by_registry
from mercato.chassis.rpc.trust import TokenSigner

from .channels import Channels, Metadata
from .wire import new_batch

CODE: Final = grpc.StatusCode
TRY_NEXT_INSTANCE: Final = frozenset(
    {CODE.UNAVAILABLE, CODE.UNIMPLEMENTED, CODE.RESOURCE_EXHAUSTED, CODE.DEADLINE_EXCEEDED}
)
"""Statuses of streams that are not accepted, after which another instance may start the batch."""
LEAST_MS: Final = 0.001
"""At least a little, also if the deadline passes right now: the receiver then refuses each expired request."""


class GrpcTransport(DirectTransport):
    """Sends each batch to one of the instances in `registry`. One a process.

    `version` is the release of this process. With `ca` (PEM), all calls are encrypted, and each server must have a
    certificate of its `server_name`. `chance` gives 0.0 up to 1.0, without 1.0. It belongs to one event loop.
    """

    def __init__(
        self,
        registry: Registry,
        signer: TokenSigner,
        clock: Clock,
        *,
        version: str = "",
        ca: bytes | None = None,
        server_name: ServerName = by_registry,
        limits: ClientLimits | None = None,
        chance: Callable[[], float] = random.random,
    ) -> None:
        limits = limits or ClientLimits()
        super().__init__(registry, clock, limits, chance)
        self._signer = signer
        self._channels = Channels(limits, server_name, ca)
        self._versions: Metadata = ((VERSION, version),) if HEADER_WORD.fullmatch(version) else ()

    async def close(self) -> None:
        await super().close()
        await self._channels.close()

    async def _exchange(
        self, instance: Instance, operation: Operation[Any, Any], contexts: Sequence[Context], body: bytes
    ) -> Answer:
        """Translates the statuses of streams."""
        remaining_ms = (max(context.deadline for context in contexts) - self._clock.monotonic()) * 1_000
        batch = new_batch(
            requests=body,
            operation=operation.name,
            remaining_ms=min(max(remaining_ms, LEAST_MS), LONGEST_REMAINING_MS),
            authorization=self._authorization(operation.service),
            traceparent=traceparent_of(contexts),
        )
        try:
            outcomes = await self._channels.exchange(instance, batch, lambda: self._metadata(operation.service))
        except grpc.aio.AioRpcError as error:
            return _refusal(error)
        if outcomes.is_too_large or len(outcomes.outcomes) > self._limits.answer_bytes:
            raise AnswerTooLarge
        if not outcomes.not_started:
            return Answer(CODE.OK.name, outcomes.outcomes)
        return Answer(
            NOT_STARTED,
            None,
            outcomes.not_started,
            outcomes.draining_seconds,
            outcomes.another_may_start_it,
        )

    def _authorization(self, service: str) -> str:
        return BEARER + self._signer.token(service)

    def _metadata(self, service: str) -> Metadata:
        return ((AUTHORIZATION, self._authorization(service)), *self._versions)

    def _update(self, service: str) -> None:
        super()._update(service)
        instances = (instance for each in self._balancers for instance in self._registry.instances(each))
        self._channels.keep(frozenset(instance.address for instance in instances))


def _refusal(error: grpc.aio.AioRpcError) -> Answer:
    """What it means that an instance does not accept a stream."""
    code, trailer = error.code(), dict(error.trailing_metadata() or ())
    return Answer(
        code.name,
        None,
        str(trailer[NOT_STARTED]),
        seconds_of(str(trailer.get(DRAINING_SECONDS, ""))),
        code in TRY_NEXT_INSTANCE,
    )
