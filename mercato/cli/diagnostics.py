"""The address at which the operator asks one process: for traces and metrics. Which process answers matters here, while
the services of a shop are called wherever they are."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any, Final

import msgspec

from mercato import topology
from mercato.chassis.contract import Empty
from mercato.chassis.hosting.keys import service_secrets, signing_seed
from mercato.chassis.http import HttpServer, bind
from mercato.chassis.observability.clock import Clock
from mercato.chassis.observability.recent_traces import EndedSpan, RecentTraces
from mercato.chassis.observability.telemetry import Telemetry
from mercato.chassis.rpc.server import Server
from mercato.chassis.rpc.signatures import public_key
from mercato.chassis.rpc.transports.http.server import RpcApp
from mercato.chassis.rpc.transports.http.wire import RPC_LIMITS
from mercato.chassis.rpc.trust import Trust
from mercato.contracts.processes import FindTraces, FoundTraces, Processes, ProcessMetrics, TraceSpan

LOOPBACK: Final = "127.0.0.1"
DRAIN_SECONDS: Final = 0.5
LATEST_TRACES: Final = 100


def operator_keys(shop_secret: bytes) -> Mapping[str, Mapping[str, str]]:
    """The public key of the operator, for a process that has the secret of the shop."""
    secret = service_secrets(shop_secret, [topology.OPERATOR])[topology.OPERATOR]
    return {topology.OPERATOR: public_key(signing_seed(secret))}


@contextlib.asynccontextmanager
async def answering(
    telemetry: Telemetry,
    clock: Clock,
    public_keys: Mapping[str, Mapping[str, str]],
    address: tuple[str, int] = (LOOPBACK, 0),
    tls: ssl.SSLContext | None = None,
) -> AsyncGenerator[str]:
    """Answers the operator for the time of the block; gives the address. Raises `CannotListen`."""
    server = _server(telemetry, clock)
    trust = Trust([Processes.service], public_keys, topology.grants(), clock, telemetry)
    async with serving(RpcApp({Processes.service: server}, trust, clock), address, name="diagnostics", tls=tls) as at:
        yield at


@contextlib.asynccontextmanager
async def serving(
    app: Callable[..., Any], address: tuple[str, int], *, name: str, tls: ssl.SSLContext | None = None
) -> AsyncGenerator[str]:
    """Serves an application for the time of the block; gives the address. Raises `CannotListen`."""
    stop, ready = asyncio.Event(), asyncio.Event()
    with bind(*address) as listener:
        http = HttpServer(
            app,
            sockets=[listener],
            limits=msgspec.structs.replace(RPC_LIMITS, drain_seconds=DRAIN_SECONDS),
            on_ready=ready.set,
            tls=tls,
        )
        running = asyncio.create_task(http.run_until(stop), name=name)
        await ready.wait()
        try:
            yield _written(listener)
        finally:
            stop.set()
            await asyncio.wait({running})


def _written(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _server(telemetry: Telemetry, clock: Clock) -> Server:
    recent = telemetry.tracing.recent

    async def traces(request: FindTraces) -> FoundTraces:
        found = _ids(recent, request)
        if request.trace_id is None and request.order_id is None:
            return FoundTraces(spans=(), traces=tuple(found))
        spans = tuple(_shown(span) for trace_id in found for span in recent.trace(trace_id))
        return FoundTraces(spans=spans, traces=tuple(found))

    async def metrics(_: Empty) -> ProcessMetrics:
        return ProcessMetrics(text=telemetry.own_exposition())

    server = Server(Processes, clock)
    server.register(Processes.traces, traces)
    server.register(Processes.metrics, metrics)
    return server.complete()


def _ids(recent: RecentTraces, request: FindTraces) -> Sequence[str]:
    if request.trace_id is not None:
        return [request.trace_id] if recent.trace(request.trace_id) else []
    if request.order_id is not None:
        return recent.about(request.order_id)
    return recent.latest(LATEST_TRACES)


def _shown(span: EndedSpan) -> TraceSpan:
    return TraceSpan(
        trace_id=span.trace_id,
        span_id=f"{span.span_id:016x}",
        parent_id=f"{span.parent_id:016x}" if span.parent_id else "",
        name=span.name,
        service=span.service,
        kind=span.kind,
        start_ns=span.start_ns,
        end_ns=span.end_ns,
        failure=span.failure,
        attributes=dict(span.attributes),
        order_id=span.about,
    )
