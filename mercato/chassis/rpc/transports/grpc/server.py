"""The receiving end of the gRPC transport: the handlers of the servers of one process."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import grpc
import grpc.aio
import structlog
from google.protobuf.message import DecodeError

from mercato.chassis.grpc import NOTHING
from mercato.chassis.observability.clock import Clock
from mercato.chassis.rpc.server import Server
from mercato.chassis.rpc.stats import Stats
from mercato.chassis.rpc.transports.direct.server import SHOWN_CHARACTERS, BatchReceiver, RefusedBatch
from mercato.chassis.rpc.transports.direct.wire import (
    AUTHORIZATION,
    DRAINING_SECONDS,
    LARGEST_ANSWER_BYTES,
    LONGEST_REMAINING_MS,
    NOT_STARTED,
    VERSION,
    NotStarted,
)
from mercato.chassis.rpc.trust import Trust

from .wire import (
    ACCEPTED,
    DESCRIBE,
    EXCHANGE,
    LARGE_BYTES,
    MOST_BATCHES,
    PREFIX,
    Batch,
    Outcomes,
    answers,
    new_outcomes,
    read_batches,
)

if TYPE_CHECKING:  # what the stubs give parameters has none when it runs
    Context = grpc.aio.ServicerContext[Any, Any]
    Handler = grpc.RpcMethodHandler[Any, Any]

log = structlog.stdlib.get_logger("mercato.rpc.grpc")

CODES: Final[Mapping[NotStarted, grpc.StatusCode]] = {
    NotStarted.DRAINING: grpc.StatusCode.UNAVAILABLE,
    NotStarted.UNKNOWN_OPERATION: grpc.StatusCode.UNIMPLEMENTED,
    NotStarted.UNTRUSTED: grpc.StatusCode.UNAUTHENTICATED,
}
"""The status of a stream that is not accepted."""
FOR_ANOTHER: Final = frozenset({NotStarted.DRAINING, NotStarted.UNKNOWN_OPERATION, NotStarted.TOO_MANY_BATCHES})
"""Why another instance may start a batch."""


class RpcHandlers(grpc.GenericRpcHandler):
    """Serves `servers`, by the name of their contract; servers may be added to the mapping later.

    It must run in a `GrpcServer`, which bounds the size of a message, and streams. A batch runs to its end also when
    its caller has left, or the stream has ended.
    """

    def __init__(self, servers: Mapping[str, Server], trust: Trust, clock: Clock, stats: Stats | None = None) -> None:
        self._receiver = BatchReceiver(servers, trust, clock, stats)
        self._streams: set[_Stream] = set()
        self._running: set[asyncio.Task[None]] = set()

    def drain(self, seconds: float) -> None:
        """See `BatchReceiver.drain`. Asks each caller to end its streams, too: none is ended before they have."""
        self._receiver.drain(seconds)
        for stream in self._streams:
            stream.say_goodbye(seconds)

    async def end(self) -> None:
        """Cancels the batches that still run. For the end, after the server."""
        for task in self._running:
            task.cancel()
        if self._running:
            await asyncio.wait(self._running)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Handler | None:
        """The handler of a call. It is admitted before a message is received."""
        path = handler_call_details.method
        if not path.startswith(PREFIX):
            return None
        service, _, method = path.removeprefix(PREFIX).partition("/")
        metadata = {key: value for key, value in handler_call_details.invocation_metadata if isinstance(value, str)}
        authorization = metadata.get(AUTHORIZATION, "")
        receiver = self._receiver
        try:
            if method == DESCRIBE:
                return _describing(receiver.describe(service, authorization))
            if method != EXCHANGE:
                raise RefusedBatch(NotStarted.UNKNOWN_OPERATION, "A service has no such method.")
            receiver.admit(service, authorization)
        except RefusedBatch as refused:
            return _refusing(refused)

        async def exchange(messages: Any, context: Context) -> None:
            try:
                receiver.check_not_draining()  # it may have begun since the stream was admitted
            except RefusedBatch as refused:
                await _abort(context, refused)
            stream = _Stream(receiver, service, metadata.get(VERSION, ""), context, self._start)
            self._streams.add(stream)
            try:
                await stream.run()
            finally:
                self._streams.discard(stream)

        return grpc.stream_stream_rpc_method_handler(exchange)

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task


class _Stream:
    """The batches of one caller for one service. `start` runs the work of a batch in a task of its own."""

    def __init__(
        self,
        receiver: BatchReceiver,
        service: str,
        version: str,
        context: Context,
        start: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
    ) -> None:
        self._receiver = receiver
        self._service = service
        self._version = version
        self._context = context
        self._start = start
        self._running: set[asyncio.Task[None]] = set()
        self._unsent = deque[Outcomes]()
        self._is_writing = False

    async def run(self) -> None:
        """Until the caller has ended the stream, and its batches are answered."""
        await self._context.send_initial_metadata(((ACCEPTED, "1"),))
        while (message := await self._context.read()) is not NOTHING:
            try:
                batches = read_batches(message)
            except DecodeError:
                await self._context.abort(grpc.StatusCode.INVALID_ARGUMENT, "The message is none of ours.")
            for batch in batches:
                self._do(self._answer(batch))
        if self._running:
            await asyncio.wait(self._running)

    def say_goodbye(self, seconds: float) -> None:
        """Tells the caller that this process ends within so many seconds."""
        self._do(self._write(new_outcomes(draining_seconds=seconds)))

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._start(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _answer(self, batch: Batch) -> None:
        try:
            encoded = await self._outcomes(batch)
            if len(encoded) > LARGEST_ANSWER_BYTES:
                outcomes = new_outcomes(id=batch.id, is_too_large=True)
            else:
                outcomes = new_outcomes(id=batch.id, outcomes=encoded)
        except RefusedBatch as refused:
            outcomes = new_outcomes(
                id=batch.id,
                not_started=str(refused.reason),
                another_may_start_it=refused.reason in FOR_ANOTHER,
                draining_seconds=refused.draining_seconds or 0.0,
            )
        except Exception as error:  # an edge: without an answer its callers would wait until their deadlines
            log.error("rpc_failed", service=self._service, operation=batch.operation[:SHOWN_CHARACTERS], exc_info=error)
            outcomes = new_outcomes(id=batch.id)  # neither outcomes nor a refusal: unknown
        await self._write(outcomes)

    async def _outcomes(self, batch: Batch) -> bytes:
        """Raises `RefusedBatch`."""
        receiver = self._receiver
        server, operation = receiver.find(self._service, batch.operation)
        with receiver.recording(operation) as recorder:
            caller = receiver.caller(self._service, batch.authorization)
            if len(self._running) > MOST_BATCHES:
                raise RefusedBatch(NotStarted.TOO_MANY_BATCHES, "Too many batches of this stream are running.")
            if not 0.0 < batch.remaining_ms < math.inf:  # neither if it is NaN
                raise RefusedBatch(NotStarted.MALFORMED_HEADER, "A batch has a deadline.")
            return await receiver.run(
                server,
                operation,
                recorder,
                caller,
                batch.requests,
                min(batch.remaining_ms, LONGEST_REMAINING_MS) / 1_000,
                traceparent=batch.traceparent,
                version=self._version,
            )

    async def _write(self, outcomes: Outcomes) -> None:
        """Returns when it is written, or leaves it to the task that writes now.

        Where the caller has left, it does nothing: what a caller does not get, it takes for unknown.
        """
        self._unsent.append(outcomes)
        if self._is_writing:
            return
        self._is_writing = True
        try:
            await asyncio.sleep(0)  # batches that end in the same turn of the loop share a message
            while self._unsent and not self._context.done():
                await self._context.write(answers(self._next()))
        except grpc.aio.BaseError:
            pass  # the caller leaves right now
        finally:
            self._is_writing = False

    def _next(self) -> Sequence[Outcomes]:
        """As many as one message carries."""
        some, size = list[Outcomes](), 0
        while self._unsent and (size == 0 or size + len(self._unsent[0].outcomes) <= LARGE_BYTES):
            some.append(self._unsent.popleft())
            size += len(some[-1].outcomes)
        return some


def _describing(stats: bytes) -> Handler:
    async def answer(request: bytes, context: Context) -> bytes:
        return answers([new_outcomes(outcomes=stats)])

    return grpc.unary_unary_rpc_method_handler(answer)


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
