"""The port for gRPC that `up` and `serve` may have beside that for HTTP.

Several processes of one machine (workers, gateways) each listen on the same port with SO_REUSEPORT, and the system
gives each connection to one of them: gRPC takes no listening socket from outside. The owner keeps the port for them by
a socket that is bound to it and does not listen.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import AsyncGenerator, Collection, Generator
from pathlib import Path

import msgspec

from mercato import topology
from mercato.chassis.http import CannotListen, PortTaken
from mercato.chassis.observability.telemetry import Telemetry
from mercato.cli import environment
from mercato.cli.options import GrpcOptions
from mercato.cli.starting import CannotStart
from mercato.gateway.app import Gateway


class GrpcPort(msgspec.Struct, frozen=True):
    """Where a process listens for gRPC. `certificate` and `key`: the files of both, for TLS, else empty.

    `is_shared`: other processes listen on it too.
    """

    host: str
    port: int
    certificate: str = ""
    key: str = ""
    is_shared: bool = False


def wanted(host: str, options: GrpcOptions | None) -> GrpcPort | None:
    """The options of a command; None for a process without a port for gRPC. Raises `CannotStart`, `SettingsError`."""
    port, certificate, key = (options.grpc_port, options.grpc_cert, options.grpc_key) if options else (None,) * 3
    if port is None:
        if certificate or key:
            raise CannotStart("--grpc-cert and --grpc-key are for the port of gRPC: name it with --grpc-port")
        return None
    environment.require_grpc("--grpc-port")
    if (certificate is None) != (key is None):
        raise CannotStart("--grpc-cert and --grpc-key belong together: give both files, or neither")
    return GrpcPort(host, port, str(certificate or ""), str(key or ""))


@contextlib.contextmanager
def shared(port: GrpcPort | None) -> Generator[GrpcPort | None]:
    """The port for several processes, kept for the time of the block. Raises `PortTaken` if another program has it."""
    if port is None:
        yield None
        return
    family = socket.AF_INET6 if ":" in port.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as kept:
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            kept.bind((port.host.strip("[]"), port.port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise PortTaken(
                    f"Port {port.port} of {port.host} is taken: choose another one with --grpc-port."
                ) from None
            raise CannotListen(f"Cannot listen for gRPC on {port.host} port {port.port}: {error.strerror}.") from error
        yield msgspec.structs.replace(port, port=kept.getsockname()[1], is_shared=True)


@contextlib.asynccontextmanager
async def answering(
    port: GrpcPort | None,
    gateway: Gateway,
    telemetry: Telemetry,
    stop: asyncio.Event,
    services: Collection[str] = tuple(topology.SERVICES),
) -> AsyncGenerator[str]:
    """Answers on the port as the gateway does, until `stop`, and then drains; gives the address, or an empty text.

    It drains beside the HTTP server, not after it: a process has one time to end.
    """
    if port is None:
        yield ""
        return
    files = (Path(port.certificate), Path(port.key)) if port.certificate else None
    serving = topology.public_grpc(
        gateway,
        telemetry,
        port.host,
        port.port,
        services=services,
        certificate=files,
        reuse_port=port.is_shared,
    )
    started: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(_serve(serving, started, stop), name="serve gRPC")
    try:
        await asyncio.wait((started, task), return_when=asyncio.FIRST_COMPLETED)
        if not started.done():
            await task  # raises why it could not start
        yield started.result()
    finally:
        stop.set()
        await task


async def _serve(
    serving: contextlib.AbstractAsyncContextManager[str], started: asyncio.Future[str], stop: asyncio.Event
) -> None:
    try:
        async with serving as address:
            started.set_result(address)
            await stop.wait()
    except (OSError, ValueError) as error:
        if started.done() or isinstance(error, CannotListen):
            raise
        raise CannotStart(f"the certificate of --grpc-cert cannot be used: {error}") from None
