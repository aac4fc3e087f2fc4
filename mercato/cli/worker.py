"""One worker process of `mercato up --workers N`. See `workers.py`, which starts it."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import sys
import threading
from typing import Final, Literal, cast

import msgspec
import uvloop

from mercato import topology
from mercato.chassis import config, faults
from mercato.chassis.service import Host
from mercato.chassis.telemetry import configure_logging
from mercato.cli.workers import Assignment

LAST_SECONDS: Final = 4.0
"""An orphan that has not stopped after this is ended, whatever it is doing."""


def main() -> None:
    assignment = msgspec.json.decode(sys.stdin.buffer.readline(), type=Assignment)
    configure_logging(assignment.log_level)
    faults.plant_from_environment(config.load().faults)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(assignment))


async def _serve(assignment: Assignment) -> None:
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    # A thread of its own: the end of the owner must be noticed even if this loop is busy for ever.
    threading.Thread(target=_follow_owner, args=(loop, stop), daemon=True).start()
    host = Host(
        topology.builds(),
        assignment.dsns,
        secret=assignment.secret,
        transport=cast(Literal["local", "wire"], assignment.transport),
        pool_size=assignment.pool_size,
    )
    await host.open()
    try:
        app = topology.gateway(host, open_to=assignment.open_to)
        gc.collect()
        gc.freeze()
        with socket.socket(fileno=assignment.listener) as listener:
            await topology.server(app, listener, host.telemetry, _tell_ready).run_until(stop)
    finally:
        await host.close()


def _tell_ready() -> None:
    sys.stdout.write("ready\n")
    sys.stdout.flush()


def _follow_owner(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    """Waits for the owner's end of the pipe to close: it asks to stop, or it died."""
    while sys.stdin.buffer.read1():
        pass
    loop.call_soon_threadsafe(stop.set)
    threading.Event().wait(LAST_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    main()
