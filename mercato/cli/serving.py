"""The work of a worker: it serves on the listening socket of its owner, until the owner asks it to stop or dies."""

from __future__ import annotations

import asyncio
import functools
import signal
import socket
import sys
from pathlib import Path
from typing import Literal, cast

import msgspec
import uvloop

from mercato import topology
from mercato.chassis.contract import ServiceError
from mercato.chassis.hosting.host import Host
from mercato.chassis.hosting.keys import service_secrets
from mercato.chassis.http import LoadLimits
from mercato.chassis.observability import faults
from mercato.chassis.observability.telemetry import also_log_to, configure_logging
from mercato.cli import diagnostics
from mercato.cli.grpc_port import answering
from mercato.cli.hosting import hosted, tune_garbage_collection
from mercato.cli.progress import fail
from mercato.cli.tracing import traced
from mercato.cli.worker import OwnerWatch
from mercato.cli.workers import READY, WorkerAssignment
from mercato.gateway.streams.limits import StreamLimits
from mercato.operations.audit.background import Background


def run(line: bytes, owner_watch: OwnerWatch) -> int:
    """Serves by the `WorkerAssignment` encoded in `line`; gives the exit code."""
    assignment = msgspec.json.decode(line, type=WorkerAssignment)
    configure_logging(assignment.log_level)
    also_log_to(Path(assignment.log_file))
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(assignment, owner_watch))
    except ServiceError as error:
        fail(f"a worker could not start: {error}")
        return 1
    return 0


async def _serve(assignment: WorkerAssignment, owner_watch: OwnerWatch) -> None:
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)

    def ask_to_stop() -> None:
        loop.call_soon_threadsafe(stop.set)

    builds = topology.builds()
    faults.inject_from_environment(assignment.faults)
    host = Host(
        builds,
        assignment.dsns,
        secrets=service_secrets(assignment.secret, topology.SERVICES),
        transport=cast(Literal["local", "loopback"], assignment.transport),
        pool_size=assignment.pool_size,
        options=assignment.options,
        may_call=topology.may_call,
        limits=assignment.call_limits,
    )
    traces = traced(host.telemetry, assignment.trace_share, is_on=assignment.is_traced)
    async with hosted(host):
        owner_watch.on_end(ask_to_stop)
        background = Background(
            assignment.admin_dsn, assignment.dsns, host.telemetry, every_seconds=assignment.audit_seconds
        )
        app = topology.gateway(
            host,
            open_to=assignment.open_to,
            log_requests=assignment.log_requests,
            cors_origins=assignment.cors_origins,
            metrics_token=assignment.metrics_token,
            currency=assignment.currency,
            details=background.details,
            load=LoadLimits.up_to(assignment.requests_in_work),
            streams=StreamLimits.up_to(assignment.streams, assignment.streams_of_one),
            counts=assignment.counts,
        )
        tune_garbage_collection()
        diagnosing = diagnostics.answering(host.telemetry, host.clock, diagnostics.operator_keys(assignment.secret))
        with traces, socket.socket(fileno=assignment.listener) as listener:
            grpc = answering(assignment.grpc, app, host.telemetry, stop)
            async with background.running(), diagnosing as address, grpc:
                ready = functools.partial(_report_ready, address)
                await topology.server(app, listener, host.telemetry, ready).run_until(stop)


def _report_ready(address: str) -> None:
    sys.stdout.buffer.write(f"{READY} {address}\n".encode())
    sys.stdout.buffer.flush()
