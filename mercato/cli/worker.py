"""One worker process of `mercato up --workers N`. See `workers.py`, which starts it."""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import signal
import socket
import sys
import threading
from typing import Final, Literal, cast

import msgspec
import uvloop

from mercato import topology
from mercato.chassis import faults
from mercato.chassis.contract import ServiceError
from mercato.chassis.service import Host
from mercato.chassis.telemetry import MULTIPROCESS_VARIABLE, configure_logging
from mercato.cli.progress import fail
from mercato.cli.workers import READY_LINE, Assignment

LAST_SECONDS: Final = 4.0
"""An orphan that has not stopped after this is ended, whatever it is doing."""


def main() -> None:
    """Serves until the owner closes the pipe; exits with 1, after a sentence, when it cannot begin."""
    assignment = msgspec.json.decode(sys.stdin.buffer.readline(), type=Assignment)
    configure_logging(assignment.log_level)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(assignment))
    except ServiceError as error:
        fail(f"a worker could not start: {error}")
        sys.exit(1)
    finally:
        # The owner's business, but its last workers may outlive it.
        shutil.rmtree(os.environ[MULTIPROCESS_VARIABLE], ignore_errors=True)


async def _serve(assignment: Assignment) -> None:
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    # A thread of its own: the end of the owner must be noticed even if this loop is busy for ever.
    threading.Thread(target=_follow_owner, args=(loop, stop), daemon=True).start()
    builds = topology.builds()
    faults.plant_from_environment(assignment.faults)
    host = Host(
        builds,
        assignment.dsns,
        secret=assignment.secret,
        transport=cast(Literal["local", "wire"], assignment.transport),
        pool_size=assignment.pool_size,
    )
    await host.open()
    try:
        app = topology.gateway(host, open_to=assignment.open_to, log_requests=assignment.log_requests)
        gc.collect()
        gc.freeze()
        with socket.socket(fileno=assignment.listener) as listener:
            await topology.server(app, listener, host.telemetry, _tell_ready).run_until(stop)
    finally:
        await host.close()


def _tell_ready() -> None:
    sys.stdout.buffer.write(READY_LINE)
    sys.stdout.buffer.flush()


def _follow_owner(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    """Waits for the owner's end of the pipe to close: it asks to stop, or it died."""
    while os.read(0, 1):  # not through `sys.stdin`, whose lock the interpreter needs when it ends
        pass
    loop.call_soon_threadsafe(stop.set)
    threading.Event().wait(LAST_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    main()
