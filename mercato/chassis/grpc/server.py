"""The server: listens, bounds each call, drains on stop."""

from __future__ import annotations

from collections.abc import Sequence

import grpc
import grpc.aio

from mercato.chassis.http import CannotListen, bind

from .bounding import BoundedHandlers
from .limits import GrpcLimits
from .tls import GrpcTls


class GrpcServer:
    """Serves handlers on one address. It belongs to one event loop, and is started and stopped once.

        server = GrpcServer("127.0.0.1", 0)
        await server.start(handlers.all)
        print(server.address)
        await server.stop()

    `port` 0 takes a free one. With `reuse_port`, several processes listen on one port, and the system gives each
    connection to one of them; otherwise a port that is taken is an error. With `tls`, clients must encrypt.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        limits: GrpcLimits | None = None,
        tls: GrpcTls | None = None,
        reuse_port: bool = False,
    ) -> None:
        self._host = host.removeprefix("[").removesuffix("]")
        self._limits = limits or GrpcLimits()
        self._tls = tls
        self._reuse_port = reuse_port
        self.port = port
        """The port on which it listens; after `start` never 0."""
        self._server: grpc.aio.Server | None = None
        self._handlers: BoundedHandlers | None = None

    @property
    def address(self) -> str:
        """Where it listens: `127.0.0.1:9083`, an IPv6 host in brackets."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{host}:{self.port}"

    @property
    def running(self) -> int:
        """How many calls are running."""
        return self._handlers.running if self._handlers else 0

    async def start(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Accepts calls from now on. Raises a `CannotListen`, or `ValueError` for a certificate that is none.

        An exception of a handler does not reach the client: it is logged, and the call is INTERNAL. A handler that a
        client leaves is cancelled: what must not end halfway runs in a task of its own.
        """
        self._handlers = BoundedHandlers(handlers, self._limits)
        options = [*self._limits.options(), ("grpc.so_reuseport", int(self._reuse_port))]
        server = grpc.aio.server(handlers=[self._handlers], options=options)
        self.port = self._listen(server)
        self._server = server
        await server.start()

    async def stop(self, drain_seconds: float | None = None) -> None:
        """Takes no more calls, lets running ones finish for up to `drain_seconds`, by default those of the limits.

        Then it cancels them.

        Clients are asked to connect elsewhere (GOAWAY). When it returns, no connection is open and no handler runs.
        """
        if self._server is not None:
            assert self._handlers is not None
            await self._server.stop(self._limits.drain_seconds if drain_seconds is None else drain_seconds)
            await self._handlers.end()

    def _listen(self, server: grpc.aio.Server) -> int:
        try:
            if self._tls is None:
                return server.add_insecure_port(self.address)
            return server.add_secure_port(self.address, self._tls.credentials())
        except RuntimeError as error:
            if not self._reuse_port:
                # gRPC does not say why: a socket of ours fails for the same reason, in one sentence.
                bind(self._host, self.port).close()
            raise CannotListen(f"Cannot listen for gRPC on {self.address}.") from error
