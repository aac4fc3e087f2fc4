"""Bounds around each handler, which gRPC does not have.

Every handler is served as one that reads its messages itself. gRPC would otherwise call the handler of a single message
when that has arrived, and until then wait without a bound.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import grpc
import grpc.aio
import structlog

from .limits import LATE, NOT_STARTED, TOO_MANY_CALLS, GrpcLimits

log = structlog.stdlib.get_logger("mercato.grpc")

if TYPE_CHECKING:  # what the stubs give parameters has none when it runs
    Context = grpc.aio.ServicerContext[Any, Any]
    Handler = grpc.RpcMethodHandler[Any, Any]

NOTHING: Final[Any] = vars(grpc.aio)["EOF"]
"""What is read where no message is, at both ends of a call. The type stubs of gRPC do not have it."""

TOO_LATE: Final = "The message of the call was not received completely within {seconds:g} seconds."
FAILED: Final = "The call failed unexpectedly."
MALFORMED: Final = "The message of the call is not what the method takes."
TOO_MANY: Final = "Too many calls are running."
SHOWN_CHARACTERS: Final = 200
UNWIND_SECONDS: Final = 1.0
"""How long a cancelled handler may take to end after a drain that ran out of time."""


class BoundedHandlers(grpc.GenericRpcHandler):
    """The handlers of a server, each with its bounds."""

    def __init__(self, handlers: Sequence[grpc.GenericRpcHandler], limits: GrpcLimits) -> None:
        self._handlers = handlers
        self._limits = limits
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def running(self) -> int:
        """How many calls have a handler, or are being received for one."""
        return len(self._tasks)

    async def end(self) -> None:
        """Cancels the handlers that run, and waits until they have ended, for a bounded time."""
        tasks = tuple(self._tasks)
        if tasks:
            log.warning("grpc_calls_cancelled", calls=len(tasks))
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=UNWIND_SECONDS)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Handler | None:
        for handlers in self._handlers:
            found = handlers.service(handler_call_details)
            if found is not None:
                return self._bounded(found, handler_call_details.method)
        return None

    def _bounded(self, handler: Any, method: str) -> Handler:
        deserialize, serialize = _refusing(handler.request_deserializer), handler.response_serializer
        if not handler.response_streaming:
            answer = handler.stream_unary if handler.request_streaming else handler.unary_unary
            reads = not handler.request_streaming

            async def unary(messages: AsyncIterator[Any], context: Context) -> Any:
                return await self._run(method, messages, context, answer, reads=reads)

            return grpc.stream_unary_rpc_method_handler(unary, deserialize, serialize)

        stream = handler.stream_stream if handler.request_streaming else handler.unary_stream
        reads = not handler.request_streaming

        async def streamed(messages: AsyncIterator[Any], context: Context) -> None:
            async def write(request: Any, context: Context) -> None:
                answered = stream(request, context)
                if not hasattr(answered, "__aiter__"):
                    await answered
                    return
                async for message in answered:
                    await context.write(message)

            await self._run(method, messages, context, write, reads=reads)

        return grpc.stream_stream_rpc_method_handler(streamed, deserialize, serialize)

    async def _run(
        self, method: str, messages: Any, context: Context, answer: Callable[[Any, Context], Any], *, reads: bool
    ) -> Any:
        """Runs a handler. With `reads`, it takes a single message, else it reads them itself."""
        if len(self._tasks) >= self._limits.calls:
            trailer = ((NOT_STARTED, TOO_MANY_CALLS),)
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, TOO_MANY, trailer)
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            request = await self._received(context) if reads else messages
            if request is NOTHING:  # the client has left, or the message was too large, which gRPC has answered
                return None
            return await answer(request, context)
        except grpc.aio.AbortError:
            raise
        except _MalformedError:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, MALFORMED)
        except Exception as error:  # an edge: gRPC would send the text of the error to the client
            if context.cancelled() or context.done():
                raise
            log.error("grpc_failed", method=method[:SHOWN_CHARACTERS], exc_info=error)
            await context.abort(grpc.StatusCode.INTERNAL, FAILED)
        finally:
            self._tasks.discard(task)

    async def _received(self, context: Context) -> Any:
        seconds = self._limits.receive_seconds
        try:
            async with asyncio.timeout(seconds):
                return await context.read()
        except TimeoutError:
            await context.abort(
                grpc.StatusCode.DEADLINE_EXCEEDED, TOO_LATE.format(seconds=seconds), ((NOT_STARTED, LATE),)
            )


class _MalformedError(Exception):
    pass


def _refusing(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    """Raises `_MalformedError` for what `deserialize` cannot read, whatever it raises."""
    if deserialize is None:
        return None

    def read(message: bytes) -> Any:
        try:
            return deserialize(message)
        except Exception as error:  # each library has its own errors
            raise _MalformedError from error

    return read
