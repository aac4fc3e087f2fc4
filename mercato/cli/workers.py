"""The owner's side of the worker processes of `mercato up --workers N`.

All workers accept from one listening socket, which they inherit; the kernel gives each connection to an idle one.
A worker gets its assignment, secrets included, as one line on its standard input, never on its command line or in its
environment. The pipe stays open: its end means that the owner has ended. One line on the worker's standard output means
that it is ready.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncGenerator, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from mercato.chassis.hosting import variables
from mercato.chassis.observability.telemetry import MULTIPROCESS_VARIABLE
from mercato.chassis.rpc.limits import CallLimits
from mercato.cli.grpc_port import GrpcPort
from mercato.cli.logs import log_file
from mercato.cli.shared_metrics import MetricsFolder
from mercato.cli.worker import ask_to_stop
from mercato.gateway.cross_origin import origins_of
from mercato.gateway.shared_counts import new_file

if TYPE_CHECKING:
    # Only the owner reads settings; a worker that imported the module would start later.
    from mercato.chassis.hosting.settings import Settings

STOP_SECONDS: Final = 3.5
"""How long a worker may take to stop; then it is killed."""

READY: Final = "ready"
"""The first word of the line; the other one is the address at which the worker answers the operator."""


class WorkerFailed(Exception):
    """A sentence about a worker that ended by itself."""


class WorkerAssignment(msgspec.Struct, frozen=True):
    """What the owner sends to a worker."""

    listener: int
    """The file descriptor of the listening socket."""
    counts: int
    """The file descriptor of the file in which the workers count the requests of each caller together."""
    admin_dsn: str
    """For audits, which make their own database."""
    dsns: Mapping[str, str]
    secret: bytes
    open_to: tuple[str, int] | None
    transport: str
    pool_size: int
    requests_in_work: int
    streams: int
    streams_of_one: int
    log_level: str
    log_requests: bool
    cors_origins: tuple[str, ...]
    metrics_token: str
    currency: str
    audit_seconds: float
    faults: str
    options: Mapping[str, str]
    """What the operator has set for single services."""
    call_limits: CallLimits
    is_traced: bool
    trace_share: float
    log_file: str = ""
    grpc: GrpcPort | None = None


class Workers:
    """N worker processes."""

    def __init__(
        self,
        count: int,
        listener: socket.socket,
        *,
        admin_dsn: str,
        dsns: Mapping[str, str],
        secret: bytes,
        open_to: tuple[str, int] | None,
        settings: Settings,
        options: Mapping[str, str],
        data: Path,
        grpc: GrpcPort | None = None,
    ) -> None:
        self._count = count
        self._data = data
        self._listener = listener
        self._counts = new_file()
        self._assignment = WorkerAssignment(
            listener=listener.fileno(),
            counts=self._counts,
            admin_dsn=admin_dsn,
            dsns=dict(dsns),
            secret=secret,
            open_to=open_to,
            transport=settings.transport,
            pool_size=settings.pool_size,
            requests_in_work=settings.requests_in_work,
            streams=settings.streams,
            streams_of_one=settings.streams_of_one,
            log_level=settings.log_level,
            log_requests=settings.log_requests,
            cors_origins=origins_of(settings.cors_origin),
            metrics_token=settings.metrics_token_text,
            currency=settings.currency,
            audit_seconds=settings.audit_seconds,
            faults=settings.faults,
            options=options,
            call_limits=settings.call_limits,
            is_traced=settings.tracing == "on",
            trace_share=settings.trace_share,
            grpc=grpc,
        )
        self._processes: list[asyncio.subprocess.Process] = []
        self._stopping = False

    @contextlib.asynccontextmanager
    async def running(self, on_death: Callable[[str], None]) -> AsyncGenerator[None]:
        """Runs the workers for the time of the block. `on_death` gets a sentence about one that ends by itself."""
        metrics = MetricsFolder()
        watches: list[asyncio.Task[None]] = []
        try:
            for _ in range(self._count):
                process = await self._start(metrics.path)
                self._processes.append(process)
                watches.append(asyncio.create_task(self._watch(process, on_death)))
            yield
        finally:
            self._stopping = True
            await asyncio.gather(*(self._stop(process) for process in self._processes))
            for watch in watches:
                watch.cancel()
            metrics.remove()
            os.close(self._counts)

    async def ready(self) -> Mapping[str, str]:
        """Returns when every worker accepts connections; gives the addresses at which they answer the operator.

        Raises `WorkerFailed` when one ends instead.
        """
        addresses: dict[str, str] = {}
        for n, process in enumerate(self._processes, 1):
            assert process.stdout is not None
            word, _, address = (await process.stdout.readline()).decode().strip().partition(" ")
            if word != READY:
                await process.wait()
                raise WorkerFailed(f"{_describe_exit(process)} before it was ready")
            addresses[f"worker.{n}"] = address
        return addresses

    async def _start(self, metrics: str) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "mercato.cli.worker",
            metrics,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            pass_fds=[self._listener.fileno(), self._counts],
            env=variables.for_child(**{MULTIPROCESS_VARIABLE: metrics}),
            start_new_session=True,  # only the owner handles a Ctrl-C in the terminal
        )
        assert process.stdin is not None
        name = f"worker.{len(self._processes) + 1}"
        assignment = msgspec.structs.replace(self._assignment, log_file=str(log_file(self._data, name)))
        process.stdin.write(msgspec.json.encode(assignment) + b"\n")
        await process.stdin.drain()
        return process

    async def _watch(self, process: asyncio.subprocess.Process, on_death: Callable[[str], None]) -> None:
        await process.wait()
        if not self._stopping:
            on_death(f"{_describe_exit(process)}; the shop has stopped. Start it again: no acknowledged order is lost")

    async def _stop(self, process: asyncio.subprocess.Process) -> None:
        ask_to_stop(process)
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


def _describe_exit(process: asyncio.subprocess.Process) -> str:
    code = process.returncode
    assert code is not None
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    return f"worker {process.pid} {how}"
