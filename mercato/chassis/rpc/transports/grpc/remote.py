"""A process whose services call those of other processes over gRPC."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import msgspec

from mercato.chassis.grpc import GrpcServer, GrpcTls
from mercato.chassis.observability.clock import Clock
from mercato.chassis.rpc.discovery import Registrar, Registry
from mercato.chassis.rpc.server import Server
from mercato.chassis.rpc.stats import Stats
from mercato.chassis.rpc.transports.direct.remote import DRAIN_SECONDS, DirectRemote
from mercato.chassis.rpc.transports.server_names import ServerName, by_registry
from mercato.chassis.rpc.trust import TokenSigner, Trust

from .client import GrpcTransport
from .inspecting import GrpcInspector
from .server import RpcHandlers
from .wire import RPC_LIMITS


class GrpcRemote(DirectRemote):
    """See `Remote`. `signers` are by the name of the caller; `trust_of` makes the `Trust` of the services served.

    `listen_at` is where batches arrive, host and port; None for a process that serves none, such as the gateway. With
    `ca` (PEM), it encrypts its calls, and verifies each instance by `server_name`; with `tls`, the calls of others.
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
        listen_at: tuple[str, int] | None = None,
        ca: bytes | None = None,
        tls: GrpcTls | None = None,
        server_name: ServerName = by_registry,
    ) -> None:
        transports = {
            caller: GrpcTransport(registry, signer, clock, version=stats.version, ca=ca, server_name=server_name)
            for caller, signer in signers.items()
        }
        inspector = GrpcInspector(registry, next(iter(signers.values())), ca=ca, server_name=server_name)
        super().__init__(registry, registrar, transports, inspector, stats)
        self._trust_of = trust_of
        self._clock = clock
        self._listen_at = listen_at
        self._tls = tls
        self._handlers: RpcHandlers | None = None
        self._server: GrpcServer | None = None

    async def _listen(self, servers: Mapping[str, Server]) -> str:
        if self._listen_at is None:
            return ""
        limits = msgspec.structs.replace(RPC_LIMITS, drain_seconds=DRAIN_SECONDS)
        self._handlers = RpcHandlers(servers, self._trust_of(servers.keys()), self._clock, self._stats)
        self._server = GrpcServer(*self._listen_at, limits=limits, tls=self._tls)
        await self._server.start([self._handlers])
        return self._server.address

    def _leave(self, seconds: float) -> bool:
        if self._handlers is None:
            return False
        self._handlers.drain(seconds)
        return True

    async def _finish(self) -> None:
        if self._server is not None and self._handlers is not None:
            await self._server.stop()
            await self._handlers.end()
            self._server = None

    async def _abort(self) -> None:
        if self._server is not None and self._handlers is not None:
            await self._server.stop(drain_seconds=0.0)
            await self._handlers.end()
            self._server = None
