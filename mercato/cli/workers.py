"""The worker processes of `mercato up --workers N`, seen from their owner.

All workers accept from one listening socket, which they inherit; the kernel gives each connection to one that is free.
A worker gets everything that it must know, secrets included, as one line on its standard input, never on its command
line or in its environment. The pipe stays open: its end means that the owner is gone. One line on the worker's
standard output means that it is ready.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Final

import msgspec

from mercato.chassis.config import Settings
from mercato.chassis.telemetry import MULTIPROCESS_VARIABLE

STOP_SECONDS: Final = 3.5
"""After a worker was asked to stop, so long it may take; then it is killed."""


class Assignment(msgspec.Struct, frozen=True):
    """What a worker is told."""

    listener: int
    """The file descriptor of the listening socket."""
    dsns: Mapping[str, str]
    secret: bytes
    open_to: tuple[str, int] | None
    transport: str
    pool_size: int
    log_level: str


class Workers:
    """N worker processes."""

    def __init__(
        self,
        count: int,
        listener: socket.socket,
        *,
        dsns: Mapping[str, str],
        secret: bytes,
        open_to: tuple[str, int] | None,
        settings: Settings,
    ) -> None:
        self._count = count
        self._listener = listener
        self._assignment = Assignment(
            listener=listener.fileno(),
            dsns=dict(dsns),
            secret=secret,
            open_to=open_to,
            transport=settings.transport,
            pool_size=settings.pool_size,
            log_level=settings.log_level,
        )
        self._processes: list[asyncio.subprocess.Process] = []
        self._stopping = False

    @contextlib.asynccontextmanager
    async def running(self, on_death: Callable[[str], None]) -> AsyncGenerator[None]:
        """Runs the workers for the time of the block. `on_death` hears a sentence about one that ends by itself."""
        metrics = tempfile.mkdtemp(prefix="mercato-metrics-")
        watches: list[asyncio.Task[None]] = []
        try:
            for _ in range(self._count):
                process = await self._start(metrics)
                self._processes.append(process)
                watches.append(asyncio.create_task(self._watch(process, on_death)))
            yield
        finally:
            self._stopping = True
            await asyncio.gather(*(self._stop(process) for process in self._processes))
            for watch in watches:
                watch.cancel()
            shutil.rmtree(metrics, ignore_errors=True)

    async def ready(self) -> None:
        """Returns when every worker accepts connections."""
        for process in self._processes:
            assert process.stdout is not None
            await process.stdout.readline()

    async def _start(self, metrics: str) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "mercato.cli.worker",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            pass_fds=[self._listener.fileno()],
            env={**os.environ, MULTIPROCESS_VARIABLE: metrics},
            start_new_session=True,  # Ctrl-C in the terminal is the owner's business
        )
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(self._assignment) + b"\n")
        await process.stdin.drain()
        return process

    async def _watch(self, process: asyncio.subprocess.Process, on_death: Callable[[str], None]) -> None:
        code = await process.wait()
        if not self._stopping:
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            on_death(f"worker {process.pid} {how}; the shop has stopped. Start it again: no acknowledged order is lost")

    async def _stop(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), STOP_SECONDS)
        except TimeoutError:
            process.kill()
            await process.wait()
