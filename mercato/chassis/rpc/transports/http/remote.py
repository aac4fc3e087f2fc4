"""A process whose services call those of other processes over HTTP."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable, Collection, Mapping

import msgspec

from mercato.chassis.http import HttpServer
from mercato.chassis.observability.clock import Clock
from mercato.chassis.rpc.discovery import Registrar, Registry
from mercato.chassis.rpc.server import Server
from mercato.chassis.rpc.stats import Stats
from mercato.chassis.rpc.transports.direct.remote import DRAIN_SECONDS, DirectRemote
from mercato.chassis.rpc.transports.server_names import ServerName, by_registry
from mercato.chassis.rpc.trust import TokenSigner, Trust

from .client import HttpTransport
from .inspecting import Inspector
from .server import RpcApp
from .wire import RPC_LIMITS


class HttpRemote(DirectRemote):
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
        transports = {
            caller: HttpTransport(registry, signer, clock, version=stats.version, tls=tls, server_name=server_name)
            for caller, signer in signers.items()
        }
        inspector = Inspector(registry, next(iter(signers.values())), tls=tls, server_name=server_name)
        super().__init__(registry, registrar, transports, inspector, stats)
        self._trust_of = trust_of
        self._clock = clock
        self._listener = listener
        self._server_tls = server_tls
        self._app: RpcApp | None = None
        self._stop = asyncio.Event()
        self._running: asyncio.Task[None] | None = None

    async def _listen(self, servers: Mapping[str, Server]) -> str:
        if self._listener is None:
            return ""
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
        host, port = self._listener.getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def _leave(self, seconds: float) -> bool:
        if self._app is None:
            return False
        self._app.drain(seconds)
        return True

    async def _finish(self) -> None:
        assert self._running is not None
        self._stop.set()
        await self._running

    async def _abort(self) -> None:
        if self._running is not None and not self._running.done():
            self._running.cancel()
            await asyncio.wait({self._running})
