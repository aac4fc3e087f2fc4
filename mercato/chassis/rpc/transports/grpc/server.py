"""The receiving end of the gRPC transport: the handlers of the servers of one process."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from mercato.chassis.observability.clock import Clock
from mercato.chassis.rpc.server import Server
from mercato.chassis.rpc.stats import OperationRecorder, Stats
from mercato.chassis.rpc.transports.direct.server import BatchReceiver, RefusedBatch
from mercato.chassis.rpc.transports.direct.wire import (
    AUTHORIZATION,
    DRAINING_SECONDS,
    LONGEST_REMAINING_MS,
    NOT_STARTED,
    TRACEPARENT,
    VERSION,
    NotStarted,
)
from mercato.chassis.rpc.trust import Trust

from .wire import DESCRIBE, PREFIX, outcomes, requests_of

if TYPE_CHECKING:  # what the stubs give parameters has none when it runs
    Context = grpc.aio.ServicerContext[Any, Any]
    Handler = grpc.RpcMethodHandler[Any, Any]

CODES: Final[Mapping[NotStarted, grpc.StatusCode]] = {
    NotStarted.DRAINING: grpc.StatusCode.UNAVAILABLE,
    NotStarted.UNKNOWN_OPERATION: grpc.StatusCode.UNIMPLEMENTED,
    NotStarted.UNTRUSTED: grpc.StatusCode.UNAUTHENTICATED,
}
"""The status of a refusal; of all others INVALID_ARGUMENT."""


class RpcHandlers(grpc.GenericRpcHandler):
    """Serves `servers`, by the name of their contract; servers may be added to the mapping later.

    It must run in a `GrpcServer`, which bounds the size and time of a message.
    """

    def __init__(self, servers: Mapping[str, Server], trust: Trust, clock: Clock, stats: Stats | None = None) -> None:
        self._receiver = BatchReceiver(servers, trust, clock, stats)
        self._running: set[asyncio.Task[bytes]] = set()

    def drain(self, seconds: float) -> None:
        """See `BatchReceiver.drain`."""
        self._receiver.drain(seconds)

    async def end(self) -> None:
        """Cancels the batches that still run. For the end, after the server."""
        for task in self._running:
            task.cancel()
        if self._running:
            await asyncio.wait(self._running)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Handler | None:
        """The handler of a call. It is admitted before its message is received."""
        path = handler_call_details.method
        if not path.startswith(PREFIX):
            return None
        service, _, name = path.removeprefix(PREFIX).partition("/")
        metadata = {key: value for key, value in handler_call_details.invocation_metadata if isinstance(value, str)}
        try:
            return self._described(service, metadata) if name == DESCRIBE else self._admitted(service, name, metadata)
        except RefusedBatch as refused:
            return _refusing(refused)

    def _described(self, service: str, metadata: Mapping[str, str]) -> Handler:
        stats = self._receiver.describe(service, metadata.get(AUTHORIZATION, ""))

        async def answer(request: bytes, context: Context) -> bytes:
            return outcomes(stats)

        return grpc.unary_unary_rpc_method_handler(answer)

    def _admitted(self, service: str, name: str, metadata: Mapping[str, str]) -> Handler:
        receiver = self._receiver
        server, operation = receiver.find(service, name)
        with receiver.recording(operation):
            receiver.check_not_draining()
            caller = receiver.caller(service, metadata.get(AUTHORIZATION, ""))

        async def run(message: bytes, remaining_s: float, recorder: OperationRecorder) -> bytes:
            return await receiver.run(
                server,
                operation,
                recorder,
                caller,
                _unwrapped(message),
                remaining_s,
                traceparent=metadata.get(TRACEPARENT, ""),
                version=metadata.get(VERSION, ""),
            )

        async def answer(message: bytes, context: Context) -> bytes:
            try:
                with receiver.recording(operation) as recorder:
                    return outcomes(await self._to_its_end(run(message, _remaining(context), recorder)))
            except RefusedBatch as refused:
                await _abort(context, refused)
                raise

        return grpc.unary_unary_rpc_method_handler(answer)

    async def _to_its_end(self, work: Any) -> bytes:
        """The result of `work`, which goes on when the caller leaves."""
        task: asyncio.Task[bytes] = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    def _ended(self, task: asyncio.Task[bytes]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # retrieved: where the caller has left, nothing else does


def _remaining(context: Context) -> float:
    """The time that is left, in seconds."""
    remaining_s = context.time_remaining()
    if remaining_s is None:  # pyright: ignore[reportUnnecessaryComparison]  # the stubs do not know it
        raise RefusedBatch(NotStarted.MALFORMED_HEADER, "A batch has a deadline.")
    return min(remaining_s, LONGEST_REMAINING_MS / 1_000)


def _unwrapped(message: bytes) -> bytes:
    try:
        return requests_of(message)
    except DecodeError as error:
        raise RefusedBatch(NotStarted.MALFORMED_BODY, "The message is not a Batch.") from error


def _refusing(refused: RefusedBatch) -> Handler:
    """A handler that reads nothing."""

    async def refuse(messages: Any, context: Context) -> bytes:
        await _abort(context, refused)
        return b""

    return grpc.stream_unary_rpc_method_handler(refuse)


async def _abort(context: Context, refused: RefusedBatch) -> None:
    trailer = [(NOT_STARTED, str(refused.reason))]
    if refused.draining_seconds is not None:
        trailer.append((DRAINING_SECONDS, f"{refused.draining_seconds:.3f}"))
    code = CODES.get(refused.reason, grpc.StatusCode.INVALID_ARGUMENT)
    await context.abort(code, refused.detail, tuple(trailer))
