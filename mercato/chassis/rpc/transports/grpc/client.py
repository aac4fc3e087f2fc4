"""The calling end of the gRPC transport. See the top of this package."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, Final

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from mercato.chassis.contract import Context, Operation
from mercato.chassis.observability.clock import Clock
from mercato.chassis.rpc.codec import traceparent_of
from mercato.chassis.rpc.discovery import Instance, Registry
from mercato.chassis.rpc.transports.direct.client import (
    Answer,
    AnswerTooLarge,
    ClientLimits,
    ConnectionBroke,
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
    TRACEPARENT,
    VERSION,
)
from mercato.chassis.rpc.transports.server_names import ServerName, by_registry
from mercato.chassis.rpc.trust import TokenSigner

from .channels import Channels, Metadata
from .wire import PREFIX, batch, outcomes_in

CODE: Final = grpc.StatusCode
TRY_NEXT_INSTANCE: Final = frozenset(
    {CODE.UNAVAILABLE, CODE.UNIMPLEMENTED, CODE.RESOURCE_EXHAUSTED, CODE.DEADLINE_EXCEEDED}
)
"""Statuses of answers that nothing was started, after which another instance may start the batch."""
LEAST_SECONDS: Final = 0.001
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
        """Translates gRPC's errors."""
        remaining_s = max(context.deadline for context in contexts) - self._clock.monotonic()
        seconds = min(max(remaining_s, LEAST_SECONDS), LONGEST_REMAINING_MS / 1_000)
        path = f"{PREFIX}{operation.service}/{operation.name}"
        try:
            message = await self._channels.call(
                instance, path, batch(body), seconds, self._metadata(operation, contexts)
            )
            return Answer(CODE.OK.name, outcomes_in(message))
        except grpc.aio.AioRpcError as error:
            return _answer(error)
        except DecodeError as error:
            raise ConnectionBroke(str(error)) from error

    def _metadata(self, operation: Operation[Any, Any], contexts: Sequence[Context]) -> Metadata:
        metadata = [(AUTHORIZATION, BEARER + self._signer.token(operation.service)), *self._versions]
        if (parent := traceparent_of(contexts)) is not None:
            metadata.append((TRACEPARENT, parent))
        return metadata

    def _update(self, service: str) -> None:
        super()._update(service)
        instances = (instance for each in self._balancers for instance in self._registry.instances(each))
        self._channels.keep(frozenset(instance.address for instance in instances))


def _answer(error: grpc.aio.AioRpcError) -> Answer:
    """What a status other than OK means. Raises `ConnectionBroke`, `AnswerTooLarge`, or TimeoutError."""
    code, trailer = error.code(), dict(error.trailing_metadata() or ())
    if NOT_STARTED not in trailer:
        match code:
            case CODE.DEADLINE_EXCEEDED:
                raise TimeoutError
            case CODE.UNAVAILABLE | CODE.CANCELLED:
                raise ConnectionBroke(f"{code.name}: {error.details()}") from error
            case CODE.RESOURCE_EXHAUSTED:
                raise AnswerTooLarge from error
            case _:
                return Answer(code.name)
    return Answer(
        code.name,
        None,
        str(trailer[NOT_STARTED]),
        seconds_of(str(trailer.get(DRAINING_SECONDS, ""))),
        code in TRY_NEXT_INSTANCE,
    )
