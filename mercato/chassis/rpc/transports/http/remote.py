"""A process whose services call those of other processes over HTTP."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final

import msgspec

from mercato.chassis.http import HttpServer
from mercato.chassis.observability.clock import Clock
from mercato.chassis.rpc.discovery import Instance, Registrar, Registry
from mercato.chassis.rpc.server import Server
from mercato.chassis.rpc.stats import Inspected, Stats
from mercato.chassis.rpc.transports.server_names import ServerName, by_registry
from mercato.chassis.rpc.trust import TokenSigner, Trust

from .client import HttpTransport
from .inspecting import Inspector
from .server import RpcApp
from .wire import RPC_LIMITS

LEAVE_SECONDS: Final = 2.0
"""A process that drains refuses batches for so long before it closes its connections. By then each caller has received
a refusal, and uses other instances, or has closed an unused connection (`HttpClientLimits.keep_alive_seconds`)."""
DRAIN_SECONDS: Final = 3.0
"""How long running batches may take after that."""


class HttpRemote:
    """See `Remote`. `signers` are by the name of the caller; `trust_of` makes the `Trust` of the services served.

    `listener` is the socket on which batches arrive; None for a process that serves none, such as the gateway.
    `registrar` is the registry where an instance registers itself, with the address of that socket. `server_name` gives
    the name that the certificate of an instance must have.
    """

    def __init__(
        self,
        registry: Registry,
        signers: Mapping[str, TokenSigner],
        trust_of: Callable[[Collection[str]], Trust],
        clock: Clock,
        stats: Stats,
        *,
        registrar: Registrar | None = None,
        listener: socket.socket | None = None,
        tls: ssl.SSLContext | None = None,
        server_tls: ssl.SSLContext | None = None,
        server_name: ServerName = by_registry,
    ) -> None:
        self._registry = registry
        self._registrar = registrar
        self._registered: Sequence[Instance] = ()
        self._trust_of = trust_of
        self._clock = clock
        self._stats = stats
        self._listener = listener
        self._server_tls = server_tls
        self._transports = {
            caller: HttpTransport(registry, signer, clock, version=stats.version, tls=tls, server_name=server_name)
            for caller, signer in signers.items()
        }
        self._inspector = Inspector(registry, next(iter(signers.values())), tls=tls, server_name=server_name)
        self._app: RpcApp | None = None
        self._stop = asyncio.Event()
        self._running: asyncio.Task[None] | None = None

    def transport(self, caller: str) -> HttpTransport:
        return self._transports[caller]

    async def open(self) -> None:
        """Does nothing: the first calls open connections."""
        await self._registry.open()

    async def serve(self, servers: Mapping[str, Server]) -> None:
        if self._listener is None:
            return
        self._app = RpcApp(servers, self._trust_of(servers.keys()), self._clock, self._stats)
        ready = asyncio.Event()
        server = HttpServer(
            self._app,
            sockets=[self._listener],
            limits=msgspec.structs.replace(RPC_LIMITS, drain_seconds=DRAIN_SECONDS),
            on_ready=ready.set,
            tls=self._server_tls,
        )
        self._running = asyncio.create_task(server.run_until(self._stop), name="rpc server")
        await ready.wait()
        if self._registrar is not None:
            host, port = self._listener.getsockname()[:2]
            address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            self._registered = [Instance(name, address, self._stats.instance, self._stats.version) for name in servers]
            await asyncio.gather(*map(self._registrar.register, self._registered))

    async def drain(self) -> None:
        if self._app is None or self._running is None:
            return
        if self._registrar is not None:
            await asyncio.gather(*map(self._registrar.deregister, self._registered))
        self._app.drain(LEAVE_SECONDS + DRAIN_SECONDS)
        await asyncio.sleep(LEAVE_SECONDS)
        self._stop.set()
        await self._running

    async def close(self) -> None:
        if self._running is not None and not self._running.done():
            self._running.cancel()
            await asyncio.wait({self._running})
        await self._registry.close()
        await self._inspector.close()
        for transport in self._transports.values():
            await transport.close()

    def wake_consumers(self, source: str) -> None:
        """Does nothing: consumers poll."""

    async def listen(self, consumer: str, source: str, wake: Callable[[], None]) -> None:
        """Never calls `wake`: consumers poll."""

    async def inspect(self, services: Collection[str]) -> Mapping[str, Sequence[Inspected]]:
        found = await asyncio.gather(*(self._inspector.inspect(service) for service in services))
        return dict(zip(services, found, strict=True))

    async def unreachable(self, services: Collection[str]) -> Mapping[str, str]:
        reasons = {name: _reason(found) for name, found in (await self.inspect(services)).items()}
        return {service: reason for service, reason in reasons.items() if reason}

    def registry_problem(self) -> str:
        return self._registry.problem()


def _reason(instances: Sequence[Inspected]) -> str:
    """Why no instance accepts calls; empty if one does."""
    if any(found.stats for found in instances):
        return ""
    return next((found.problem for found in instances), "no instance is known")
