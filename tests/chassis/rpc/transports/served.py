"""Processes of a service, as far as their callers see them: real sockets on loopback, in the process of the test."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any, Final

from mercato.chassis.contract import Context, Operation
from mercato.chassis.http import HttpServer, bind
from mercato.chassis.observability.clock import Clock, SystemClock
from mercato.chassis.observability.telemetry import Telemetry
from mercato.chassis.rpc.batching import Outcome
from mercato.chassis.rpc.discovery import Instance
from mercato.chassis.rpc.discovery.static import StaticRegistry
from mercato.chassis.rpc.server import Server
from mercato.chassis.rpc.signatures import public_key
from mercato.chassis.rpc.transports.http.client import HttpTransport
from mercato.chassis.rpc.transports.http.server import RpcApp
from mercato.chassis.rpc.transports.http.wire import RPC_LIMITS
from mercato.chassis.rpc.trust import Grant, TokenSigner, Trust

from .conformance import ThingsService, server_of

HOST = "127.0.0.1"

SEEDS: Final = {"orders": b"1" * 32, "gateway": b"2" * 32, "products": b"3" * 32}
"""The private keys of callers: `orders` may call everything, `gateway` for customers, `products` nothing."""


def signer(service: str = "orders") -> TokenSigner:
    return TokenSigner(service, SEEDS[service], SystemClock())


def trust_of(servers: Mapping[str, Server]) -> Trust:
    """Of a process with these servers."""
    operations = frozenset(o.full_name for server in servers.values() for o in server.contract.operations.values())
    keys = {name: public_key(seed) for name, seed in SEEDS.items()}
    grants = {"orders": Grant(operations), "gateway": Grant(operations, frozenset({"customer"}))}
    return Trust(list(servers), keys, grants, SystemClock(), Telemetry())


class Served:
    """An `RpcApp` behind the HTTP server, on a free port. It counts the requests that reach the application."""

    def __init__(self, servers: Mapping[str, Server], port: int = 0) -> None:
        self.app = RpcApp(servers, trust_of(servers), SystemClock())
        self.requests = 0
        listener = bind(HOST, port)
        self.port: int = listener.getsockname()[1]
        self.address = f"{HOST}:{self.port}"
        self._stop = asyncio.Event()
        self._ready = asyncio.Event()
        self._server = HttpServer(self._count, sockets=[listener], limits=RPC_LIMITS, on_ready=self._ready.set)

    async def _count(self, scope: Any, receive: Any, send: Any) -> None:
        self.requests += 1
        await self.app(scope, receive, send)

    async def open(self) -> None:
        self._running = asyncio.create_task(self._server.run_until(self._stop))
        await self._ready.wait()

    async def close(self) -> None:
        self._stop.set()
        await self._running


class OverHttp:
    """The transport that the conformance suite tests: one instance, and a client of it."""

    def __init__(self, servers: Mapping[str, Server], clock: Clock) -> None:
        self._served = Served(servers)
        instances = [Instance(service, self._served.address, "1") for service in servers]
        self._client = HttpTransport(StaticRegistry({i.service: [i] for i in instances}), signer(), clock)

    async def open(self) -> None:
        await self._served.open()

    async def close(self) -> None:
        await self._client.close()
        await self._served.close()

    async def send(
        self, operation: Operation[Any, Any], requests: Sequence[Any], contexts: Sequence[Context]
    ) -> Sequence[Outcome]:
        return await self._client.send(operation, requests, contexts)


class Process:
    """An instance of `Things`."""

    def __init__(self, port: int = 0) -> None:
        self.service = ThingsService()
        self.server = server_of(self.service, SystemClock())
        self.served = Served({"things": self.server}, port)
        self.address = self.served.address

    @property
    def numbers(self) -> list[int]:
        """Of the requests that its handlers got, in order."""
        return [request.number for batch in self.service.batches for request in batch]


@contextlib.asynccontextmanager
async def running(port: int = 0) -> AsyncGenerator[Process]:
    process = Process(port)
    await process.served.open()
    try:
        yield process
    finally:
        process.service.release.set()
        await process.served.close()


class Listed:
    """A registry that the test changes."""

    def __init__(self, *addresses: str) -> None:
        self._watching: list[Callable[[str], None]] = []
        self.list(*addresses)

    def list(self, *addresses: str) -> None:
        self._instances = tuple(Instance("things", address, "1") for address in addresses)
        for changed in self._watching:
            changed("things")

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    def instances(self, service: str) -> Sequence[Instance]:
        return self._instances if service == "things" else ()

    def watch(self, changed: Callable[[str], None]) -> Callable[[], None]:
        self._watching.append(changed)
        return lambda: self._watching.remove(changed)

    def problem(self) -> str:
        return ""


class RawServer:
    """Reads one whole request of each connection, writes `answer`, and ends the connection: at once, if `reset`.

    `earlier` are the answers to the requests before that one, on the same connection.
    """

    def __init__(self, answer: bytes, *, reset: bool = False, earlier: Sequence[bytes] = ()) -> None:
        self.requests: list[bytes] = []
        self.connections = 0
        self.answer = answer
        self.reset = reset
        self.on_request: Callable[[], None] = lambda: None
        self._earlier = earlier

    async def open(self, port: int = 0) -> None:
        self._listener = await asyncio.start_server(self._serve, HOST, port)
        self.port: int = self._listener.sockets[0].getsockname()[1]
        self.address = f"{HOST}:{self.port}"

    async def close(self) -> None:
        self._listener.close()
        await self._listener.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.suppress(asyncio.IncompleteReadError):
            for answer in (*self._earlier, self.answer):
                self.requests.append(await read_message(reader))
                self.on_request()
                writer.write(answer)
        if self.reset:
            writer.transport.abort()
        writer.close()


async def read_message(reader: asyncio.StreamReader) -> bytes:
    """One HTTP message with a Content-Length."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    return head + await reader.readexactly(int(length.partition(b":")[2]))
