"""`mercato serve`: serves some of the services, while other processes serve the rest.

Its environment has everything that it needs, as in a container (`environment.py`). It has no administrator's DSN and
only the secrets of its services, and changes no database: `mercato migrate` does. It serves the routes of the public
API of its services, `/health/live`, `/health/ready` and `/metrics` on its port; other processes reach its
operations over NATS, or on a second port over HTTP or gRPC.

    SIGTERM ──► not ready ──► accepts no more batches ──► answers running ones ──► closes      within ten seconds
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import secrets
import socket
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final

import msgspec

from mercato import __version__, topology
from mercato.chassis.contract import ServiceError
from mercato.chassis.hosting import settings as config
from mercato.chassis.hosting.host import GATEWAY, Host, forward_wake_ups
from mercato.chassis.hosting.keys import signing_seed
from mercato.chassis.hosting.options import OptionError
from mercato.chassis.http import CannotListen, LoadLimits, bind
from mercato.chassis.observability.clock import SystemClock
from mercato.chassis.observability.telemetry import Telemetry, also_log_to, configure_logging
from mercato.chassis.postgres import sessions
from mercato.chassis.postgres.dsn import shown
from mercato.chassis.postgres.migrations import MigrationError, missing_revisions
from mercato.chassis.rpc.discovery.leased import StoreRefused
from mercato.chassis.rpc.stats import Stats
from mercato.chassis.rpc.transports import Remote
from mercato.chassis.rpc.trust import TokenSigner, Trust
from mercato.cli import diagnostics, environment, stopping
from mercato.cli.environment import Given
from mercato.cli.grpc_port import GrpcPort, answering, wanted
from mercato.cli.hosting import hosted, tune_garbage_collection
from mercato.cli.options import GrpcOptions
from mercato.cli.progress import Progress, fail
from mercato.cli.settings import load
from mercato.cli.starting import (
    Auth,
    CannotStart,
    announce_test_modes,
    explained,
    inject_faults,
    is_open,
    names_of,
    open_to,
    url_of,
)
from mercato.cli.tracing import traced
from mercato.gateway.app import Gateway
from mercato.gateway.cross_origin import origins_of
from mercato.gateway.streams.limits import StreamLimits

INSTANCE_BYTES: Final = 6
UNREADY_SECONDS: Final = 0.5
DRAIN_SECONDS: Final = 3.0
"""How long running requests of clients may take at the end."""

EXPECTED: Final = (CannotStart, CannotListen, MigrationError, OptionError, config.SettingsError, StoreRefused)
"""Failures whose message is all that the operator needs."""


class Options(msgspec.Struct, frozen=True):
    """The options of `serve`, as the command line gives them."""

    names: tuple[str, ...]
    host: str
    port: int
    auth: Auth | None = None
    cors_origins: tuple[str, ...] = ()
    json: bool = False
    grpc: GrpcOptions | None = None


def run(
    options: Options,
    listener: socket.socket | None = None,
    counts: int | None = None,
    grpc: GrpcPort | None = None,
) -> int:
    """Serves until the process is asked to stop; gives the exit code, as `up` does.

    `listener` is a listening socket to use instead of `options.host` and `options.port`; `counts` is the file in which
    several gateways count together; `grpc` is a port for gRPC to use instead of `options.grpc`.
    """
    import uvloop

    try:
        options = msgspec.structs.replace(options, names=names_of(options.names, gateway=True))
        environment.set_origins(options.cors_origins)
        settings = load(config.ServeSettings)
        environment.check_currency(settings.currency)
        environment.check_origins(settings.cors_origin)
        configure_logging(settings.log_level)
        if settings.log_file is not None:
            also_log_to(settings.log_file)
        inject_faults(settings.faults, options.names)
        announce_test_modes(settings, is_open=is_open(options.host, options.auth))
        grpc = grpc or wanted(options.host, options.grpc)
        serving = _Serving(options, settings, listener, counts, grpc)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(serving.run())
    except EXPECTED as error:
        fail(str(error))
    except ServiceError as error:
        fail(f"{', '.join(options.names)} could not start: {error}")
    return 1


class _Serving:
    """One run of `serve`."""

    def __init__(
        self,
        options: Options,
        settings: config.ServeSettings,
        listener: socket.socket | None,
        counts: int | None,
        grpc: GrpcPort | None,
    ) -> None:
        self._grpc = grpc
        self._options = options
        self._settings = settings
        self._listener = listener
        self._counts = counts
        self._progress = Progress(as_json=options.json)
        self._services = [name for name in options.names if name != GATEWAY]
        self._has_gateway = GATEWAY in options.names
        self._clock = SystemClock()
        self._telemetry = Telemetry()
        self._stats = Stats(secrets.token_hex(INSTANCE_BYTES), __version__)
        self._stop = asyncio.Event()

    async def run(self) -> int:
        loop = asyncio.get_running_loop()

        def ask(_: int) -> None:
            loop.call_soon_threadsafe(self._stop.set)

        stopping.notify(ask)
        try:
            async with contextlib.AsyncExitStack() as stack:
                await self._run(stack)
        finally:
            stopping.ignore()
        self._progress.step("stopped")
        return 0

    async def _run(self, stack: contextlib.AsyncExitStack) -> None:
        given = environment.given(self._options.names, self._settings)
        listener = self._listener or bind(self._options.host, self._options.port)
        stack.enter_context(contextlib.closing(listener))
        remote = self._remote(given, stack)
        host = Host(
            topology.builds(self._services),
            given.dsns,
            secrets=given.secrets,
            transport=remote.transport,
            clock=self._clock,
            telemetry=self._telemetry,
            pool_size=self._settings.pool_size,
            options=config.service_options(self._services),
            may_call=topology.may_call,
            limits=self._settings.call_limits,
        )
        self._stats.open_breakers = host.open_breakers
        self._stats.callees = host.callees
        await _require_migrated(given.dsns)
        stack.enter_context(traced(self._telemetry, self._settings.trace_share, is_on=self._settings.tracing == "on"))
        stack.push_async_callback(remote.close)
        await remote.open()
        await forward_wake_ups(host, remote)
        await self._bridge(host, remote)
        await stack.enter_async_context(hosted(host))
        await remote.serve(host.servers)
        await self._serve(host, remote, listener, await self._answer_operator(given, stack))

    async def _serve(self, host: Host, remote: Remote, listener: socket.socket, diagnostics: str) -> None:
        """Serves clients until the process is asked to stop, then drains."""
        app = self._app(host, remote, listener)
        finished = asyncio.Event()
        tune_garbage_collection()
        draining = asyncio.create_task(self._drain(host, remote, finished))
        try:
            async with answering(self._grpc, app, self._telemetry, finished, self._served()) as grpc:
                url = url_of(self._options.host, listener)
                announce = functools.partial(self._announce, url, diagnostics, grpc)
                server = topology.server(app, listener, self._telemetry, announce, drain_seconds=DRAIN_SECONDS)
                await server.run_until(finished)
            await draining
        finally:
            draining.cancel()

    def _app(self, host: Host, remote: Remote, listener: socket.socket) -> Gateway:
        return topology.gateway(
            host,
            open_to=open_to(self._options.host, listener, open_=is_open(self._options.host, self._options.auth)),
            log_requests=self._settings.log_requests,
            cors_origins=origins_of(self._settings.cors_origin),
            metrics_token=self._settings.metrics_token_text,
            currency=self._settings.currency,
            services=self._served(),
            caller=self._options.names[0] if not self._has_gateway else GATEWAY,
            problems=functools.partial(self._problems, host, remote, self._needed()),
            own_problems=functools.partial(self._own_problems, host),
            load=LoadLimits.up_to(self._settings.requests_in_work),
            streams=StreamLimits.up_to(self._settings.streams, self._settings.streams_of_one),
            counts=self._counts,
            details=functools.partial(_details, remote),
        )

    def _served(self) -> Sequence[str]:
        """The services whose routes this process has."""
        return tuple(topology.SERVICES) if self._has_gateway else self._services

    async def _problems(self, host: Host, remote: Remote, needed: Collection[str]) -> Mapping[str, str]:
        """Why the process is not ready: for each of its services, and each of the `needed` ones; empty if it is."""
        found, unreachable = await asyncio.gather(self._own_problems(host), remote.unreachable(needed))
        reasons = {name: f"it cannot be reached: {reason}" for name, reason in unreachable.items()}
        return {**found, **dict.fromkeys(needed, ""), **reasons}

    async def _own_problems(self, host: Host) -> Mapping[str, str]:
        """Why the process cannot work, for each of its services."""
        if self._stop.is_set():
            return dict.fromkeys(self._options.names, "it is about to end")
        return await host.problems()

    async def _answer_operator(self, given: Given, stack: contextlib.AsyncExitStack) -> str:
        """Answers the operator from now on; gives the address, empty if there is none."""
        address = environment.diagnostics_address(self._settings)
        if address is None:
            return ""
        _, tls = environment.contexts(self._settings)
        what = "The setting MERCATO_DIAGNOSTICS_ADDRESS"
        environment.require_encryption(what, address[0], self._settings, is_encrypted=bool(tls))
        return await stack.enter_async_context(
            diagnostics.answering(self._telemetry, self._clock, given.public_keys, address, tls)
        )

    def _announce(self, url: str, diagnostics: str, grpc: str) -> None:
        self._progress.say(f"ready {url}" + (f", gRPC {grpc}" if grpc else ""))
        more = {"grpc": grpc} if grpc else {}
        self._progress.event("ready", url=url, services=self._options.names, diagnostics=diagnostics, **more)

    async def _drain(self, host: Host, remote: Remote, finished: asyncio.Event) -> None:
        """Waits for the request to stop, and drains; sets `finished` when the server may stop to accept clients."""
        await self._stop.wait()
        self._progress.step("stopping, as soon as the running requests are answered")
        host.drain()
        draining = asyncio.create_task(remote.drain())
        # Clients still come for a moment, until their load balancer has seen that the process is not ready.
        await asyncio.sleep(UNREADY_SECONDS)
        finished.set()
        await draining

    async def _bridge(self, host: Host, remote: Remote) -> None:
        """Publishes the feed, if there is NATS and this process serves the feed."""
        if self._settings.carrier == "nats":
            from mercato.chassis.rpc.transports.nats import NatsRemote
            from mercato.cli import nats

            assert isinstance(remote, NatsRemote)
            await nats.bridge_events(host, remote)

    def _needed(self) -> Collection[str]:
        """The services of other processes that the services of this one, or the gateway, need."""
        callers = [GATEWAY] if self._has_gateway else self._services
        called = {operation.service for caller in callers for operation in topology.called_by(caller)}
        return sorted(name for name in called & topology.SERVICES.keys() if name not in self._services)

    def _remote(self, given: Given, stack: contextlib.ExitStack | contextlib.AsyncExitStack) -> Remote:
        signers = {name: TokenSigner(name, signing_seed(secret), self._clock) for name, secret in given.secrets.items()}

        def trust_of(services: Collection[str]) -> Trust:
            return Trust(list(services), given.public_keys, topology.grants(), self._clock, self._telemetry)

        # Imported here: each transport has a client library, which takes as long to import as most of the rest.
        if self._settings.carrier == "http":
            return self._over_http(signers, trust_of, stack)
        if self._settings.carrier == "grpc":
            from mercato.cli import over_grpc

            serves = bool(self._services)
            return over_grpc.connected(self._settings, signers, trust_of, self._clock, self._stats, serves=serves)
        from mercato.chassis.rpc.transports.nats import NatsRemote
        from mercato.cli import nats

        return NatsRemote(
            nats.connections(given.secrets, self._settings),
            signers,
            trust_of,
            self._clock,
            self._stats,
            metadata={"pid": str(os.getpid())},
        )

    def _over_http(
        self,
        signers: Mapping[str, TokenSigner],
        trust_of: Callable[[Collection[str]], Trust],
        stack: contextlib.ExitStack | contextlib.AsyncExitStack,
    ) -> Remote:
        from mercato.chassis.rpc.transports.http.remote import HttpRemote

        settings = self._settings
        tls, server_tls = environment.contexts(settings)
        registry, registrar = environment.registry(settings)
        listener = None
        if self._services:
            host, port = environment.rpc_address(settings)
            environment.require_encryption("The setting MERCATO_RPC_ADDRESS", host, settings, is_encrypted=bool(tls))
            listener = stack.enter_context(contextlib.closing(bind(host, port)))
        return HttpRemote(
            registry,
            signers,
            trust_of,
            self._clock,
            self._stats,
            registrar=registrar,
            listener=listener,
            tls=tls,
            server_tls=server_tls,
            server_name=environment.server_name_of(settings),
        )


def _details(remote: Remote) -> Mapping[str, str]:
    problem = remote.registry_problem()
    return {"registry": problem} if problem else {}


async def _require_migrated(dsns: Mapping[str, str]) -> None:
    """Raises `CannotStart` for a database that was not migrated to this release, or for an unsuitable pooler."""
    for name, dsn in dsns.items():
        with explained(f"the database of {name} cannot be read"):
            if problem := await sessions.problem(dsn):
                raise CannotStart(f"the DSN of {name} ({shown(dsn)}) {problem}")
            missing = await missing_revisions(dsn, topology.migrations(name))
        if missing:
            raise CannotStart(f"the database of {name} lacks {missing[-1]}: run `mercato migrate {name}` first")
