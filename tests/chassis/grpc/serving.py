"""A gRPC server in the process of a test, with handlers whose steps the test directs, and raw clients of HTTP/2."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, Final

import grpc
import grpc.aio

from mercato.chassis.grpc import GrpcLimits, GrpcServer, GrpcTls

HOST: Final = "127.0.0.1"
NO_RETRIES: Final = [("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1)]

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS, PING, GOAWAY = 4, 6, 7
ACK: Final = 1


class Echo(grpc.GenericRpcHandler):
    """`/echo/say` answers after `release`; `/echo/all` streams; `/echo/fail` raises; `/echo/picky` takes no message."""

    def __init__(self) -> None:
        self.seen: list[bytes] = []
        self.ended = 0
        self.cancelled = 0
        self.release = asyncio.Event()
        self.release.set()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        methods = {
            "/echo/say": lambda: grpc.unary_unary_rpc_method_handler(self._say),
            "/echo/all": lambda: grpc.unary_stream_rpc_method_handler(self._all),
            "/echo/written": lambda: grpc.unary_stream_rpc_method_handler(self._written),
            "/echo/joined": lambda: grpc.stream_unary_rpc_method_handler(self._joined),
            "/echo/fail": lambda: grpc.unary_unary_rpc_method_handler(self._fail),
            "/echo/refuse": lambda: grpc.unary_unary_rpc_method_handler(self._refuse),
            "/echo/picky": lambda: grpc.unary_unary_rpc_method_handler(self._say, request_deserializer=_takes_nothing),
        }
        made = methods.get(handler_call_details.method)
        return made() if made else None

    async def _say(self, request: bytes, context: Any) -> bytes:
        self.seen.append(request)
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.ended += 1
        return request

    async def _all(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        for byte in request:
            yield bytes([byte])

    async def _written(self, request: bytes, context: Any) -> None:
        for byte in request:
            await context.write(bytes([byte]))

    async def _joined(self, messages: AsyncIterator[bytes], context: Any) -> bytes:
        return b"".join([message async for message in messages])

    async def _fail(self, request: bytes, context: Any) -> bytes:
        raise RuntimeError("the handler's own words")

    async def _refuse(self, request: bytes, context: Any) -> bytes:
        await context.abort(grpc.StatusCode.NOT_FOUND, "there is none", (("reason", "none"),))
        return b""


def _takes_nothing(message: bytes) -> bytes:
    raise KeyError("the deserializer's own words")


class Running:
    """A started server with an `Echo`."""

    def __init__(self, server: GrpcServer, echo: Echo) -> None:
        self.server = server
        self.echo = echo


@contextlib.asynccontextmanager
async def serving(limits: GrpcLimits | None = None, tls: GrpcTls | None = None) -> AsyncGenerator[Running]:
    echo = Echo()
    server = GrpcServer(HOST, 0, limits=limits or GrpcLimits(drain_seconds=0.0), tls=tls)
    await server.start([echo])
    try:
        yield Running(server, echo)
    finally:
        echo.release.set()
        await server.stop()


@contextlib.asynccontextmanager
async def channel(
    running: Running, *options: tuple[str, int], credentials: grpc.ChannelCredentials | None = None
) -> AsyncGenerator[grpc.aio.Channel]:
    wanted = [*NO_RETRIES, *options]
    made = (
        grpc.aio.secure_channel(running.server.address, credentials, options=wanted)
        if credentials
        else grpc.aio.insecure_channel(running.server.address, options=wanted)
    )
    async with made:
        yield made


async def failure(call: Any) -> grpc.aio.AioRpcError:
    """The error of a call that must fail."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error
    raise AssertionError("the call succeeded")


class RawClient:
    """A connection that speaks as much HTTP/2 as the test wants."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.frames: list[tuple[int, int, bytes]] = []
        """The type, flags and payload of each frame of the server."""

    def send(self, data: bytes) -> None:
        self._writer.write(data)

    def ping(self, times: int) -> None:
        """In one piece: a server that closes while more arrives resets the connection, and its last words are lost."""
        self.send(frame(PING, 0, b"12345678") * times)

    @property
    def settings(self) -> dict[int, int]:
        """What the server has announced (RFC 9113, 6.5.2)."""
        own = [payload for kind, flags, payload in self.frames if kind == SETTINGS and not flags & ACK]
        return dict(struct.iter_unpack(">HI", b"".join(own)))

    async def until_closed(self) -> None:
        """Reads frames until the server ends the connection."""
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await self._reader.readexactly(9)
                payload = await self._reader.readexactly(int.from_bytes(head[:3], "big"))
                self.frames.append((head[3], head[4], payload))


def frame(kind: int, flags: int, payload: bytes) -> bytes:
    """A frame of the connection itself."""
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + bytes(4) + payload


@contextlib.asynccontextmanager
async def raw_client(address: str, *, greets: bool = True) -> AsyncGenerator[RawClient]:
    """`greets`: it sends what each connection begins with."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    client = RawClient(reader, writer)
    if greets:
        client.send(PREFACE + frame(SETTINGS, 0, b""))
    try:
        yield client
    finally:
        writer.close()
