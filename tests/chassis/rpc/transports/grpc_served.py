"""Instances behind the gRPC server, and a caller of them: real sockets on loopback, in the process of the test."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

import grpc

from chassis.rpc.breakers import ManualClock
from mercato.chassis.contract import Context, Operation, OutcomeUnknown, Span, Unavailable
from mercato.chassis.grpc import GrpcServer, GrpcTls
from mercato.chassis.observability.clock import SystemClock
from mercato.chassis.rpc.server import Server
from mercato.chassis.rpc.transports.direct.client import ClientLimits
from mercato.chassis.rpc.transports.grpc.client import GrpcTransport
from mercato.chassis.rpc.transports.grpc.server import RpcHandlers
from mercato.chassis.rpc.transports.grpc.wire import (
    RPC_LIMITS,
)

from .conformance import CUSTOMER, Ask, Things, ThingsService, server_of
from .served import HOST, Listed, signer, trust_of


class Served:
    """`RpcHandlers` behind the gRPC server, on a free port. It counts the calls: each stream is one."""

    def __init__(self, servers: Mapping[str, Server], port: int = 0, tls: GrpcTls | None = None) -> None:
        self.handlers = RpcHandlers(servers, trust_of(servers), SystemClock())
        self.calls = 0
        self._server = GrpcServer(HOST, port, limits=RPC_LIMITS, tls=tls)

    @property
    def address(self) -> str:
        return self._server.address

    @property
    def port(self) -> int:
        return self._server.port

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        self.calls += 1
        return self.handlers.service(details)

    @property
    def running(self) -> int:
        """Calls, so streams."""
        return self._server.running

    async def open(self) -> None:
        await self._server.start([self])  # pyright: ignore[reportArgumentType]

    async def close(self) -> None:
        await self._server.stop(drain_seconds=0.0)
        await self.handlers.end()


class Process:
    """An instance of `Things`."""

    def __init__(self, port: int = 0, tls: GrpcTls | None = None) -> None:
        self.service = ThingsService()
        self.served = Served({"things": server_of(self.service, SystemClock())}, port, tls)

    @property
    def address(self) -> str:
        return self.served.address

    @property
    def numbers(self) -> list[int]:
        """Of the requests that its handlers got, in order."""
        return [request.number for batch in self.service.batches for request in batch]


@contextlib.asynccontextmanager
async def running(port: int = 0, tls: GrpcTls | None = None) -> AsyncGenerator[Process]:
    process = Process(port, tls)
    await process.served.open()
    try:
        yield process
    finally:
        process.service.release.set()
        await process.served.close()


class Caller:
    """A client of the instances that a registry names; its clock is moved by the test."""

    def __init__(self, *addresses: str, limits: ClientLimits | None = None, ca: bytes | None = None) -> None:
        self.clock = ManualClock()
        self.registry = Listed(*addresses)
        self.transport = GrpcTransport(
            self.registry, signer(), self.clock, version="1.2.3", limits=limits, chance=lambda: 0.0, ca=ca
        )

    def context(self, seconds: float = 240.0, span: Span | None = None) -> Context:
        return Context(CUSTOMER, self.clock.seconds + seconds, "t", "r", span)

    async def send(self, *asks: Ask, operation: Operation[Any, Any] = Things.change) -> Sequence[Any]:
        return await self.transport.send(operation, asks, [self.context()] * len(asks))

    def start(self, *asks: Ask) -> asyncio.Task[Sequence[Any]]:
        return asyncio.create_task(self.send(*asks))


@contextlib.asynccontextmanager
async def calling(
    *addresses: str, limits: ClientLimits | None = None, ca: bytes | None = None
) -> AsyncGenerator[Caller]:
    caller = Caller(*addresses, limits=limits, ca=ca)
    try:
        yield caller
    finally:
        await caller.transport.close()


def kinds(outcomes: Sequence[Any]) -> list[type[Any]]:
    return [type(outcome) for outcome in outcomes]


async def closed_address() -> str:
    """An address of loopback on which no process listens."""
    server = GrpcServer(HOST, 0)
    await server.start([])
    await server.stop()
    return server.address


class Link:
    """A TCP connection in between, which can be cut, or stand still."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._writers: list[asyncio.StreamWriter] = []
        self._pipes: set[asyncio.Task[None]] = set()
        self.passes = asyncio.Event()
        self.passes.set()
        self.connections = 0

    async def __aenter__(self) -> Link:
        self._server = await asyncio.start_server(self._serve, HOST, 0)
        self.address = f"{HOST}:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.cut()
        for pipe in self._pipes:
            pipe.cancel()

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        onward_reader, onward = await asyncio.open_connection(HOST, self._target)
        self._writers += [writer, onward]
        for pair in ((reader, onward), (onward_reader, writer)):
            self._pipes.add(asyncio.create_task(self._pipe(*pair)))

    async def _pipe(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65_536):
                await self.passes.wait()
                writer.write(data)
                await writer.drain()
        writer.close()


KEYED = Ask(idempotency_key="a")
CLASSES = {
    "safe": (Things.read, Ask(), Unavailable),
    "keyed": (Things.put, KEYED, Unavailable),
    "keyed, without a key": (Things.put, Ask(), OutcomeUnknown),
    "never": (Things.change, KEYED, OutcomeUnknown),
    "never, single": (Things.move, KEYED, OutcomeUnknown),
}
