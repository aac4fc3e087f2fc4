"""`mercato up`: the whole shop on one machine, from one command.

The process of this command is the owner of everything: the data folder, PostgreSQL under its guard, the listening
socket, and its child processes. It restarts PostgreSQL if that dies, and the processes of a shop that is split; if a
worker dies, the owner ends. If the owner dies, even by `kill -9`, all of them end within five seconds. Nothing has to
be cleaned up afterwards: after the next `up` the database recovers, with every acknowledged order.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import os
import socket
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import msgspec

from mercato import __version__, placements, topology
from mercato.chassis.contract import ServiceError
from mercato.chassis.hosting import settings as config, variables
from mercato.chassis.hosting.host import Host
from mercato.chassis.hosting.keys import key_deriver
from mercato.chassis.hosting.options import OptionError
from mercato.chassis.http import CannotListen, LoadLimits, PortTaken, bind
from mercato.chassis.observability.telemetry import Telemetry, also_log_to, configure_logging
from mercato.chassis.postgres.migrations import MigrationError
from mercato.chassis.postgres.provisioning import ProvisionError
from mercato.cli import diagnostics, environment, owner_metrics, preparing, stopping
from mercato.cli.grpc_port import answering, shared, wanted
from mercato.cli.hosting import hosted, tune_garbage_collection
from mercato.cli.keeping import kept
from mercato.cli.logs import OWNER, log_file
from mercato.cli.options import Carrier, GrpcOptions
from mercato.cli.progress import Progress, fail
from mercato.cli.settings import load
from mercato.cli.shared_metrics import MetricsFolder
from mercato.cli.split import (
    ProcessFile,
    Split,
    SupervisedProcess,
    assign,
    has_several_gateways,
    planned,
    recorded,
    with_replicas,
)
from mercato.cli.starting import (
    Auth,
    CannotStart,
    announce_test_modes,
    inject_faults,
    is_loopback,
    is_open,
    open_to,
    url_of,
)
from mercato.cli.tracing import traced
from mercato.cli.workers import WorkerFailed, Workers
from mercato.embedded_postgres import DataFolder, EmbeddedPostgres, SupervisorError, require_known_format
from mercato.gateway.cross_origin import origins_of
from mercato.gateway.shared_counts import new_file
from mercato.gateway.streams.limits import StreamLimits
from mercato.operations.audit.background import Background

T = TypeVar("T")


class Options(msgspec.Struct, frozen=True):
    """The options of `up`, as the command line gives them."""

    host: str
    port: int
    data: Path
    demo: bool | None
    workers: int
    auth: Auth | None
    cors_origins: tuple[str, ...]
    placement: Literal["together", "split", "cluster"]
    replicas: str
    transport: Carrier | None
    json: bool
    grpc: GrpcOptions | None = None


class StoppedEarly(Exception):
    """The command was asked to stop, by `signal`, during its start."""

    def __init__(self, signal: int) -> None:
        super().__init__(stopping.SENTENCE)
        self.signal = signal


EXPECTED: Final = (
    CannotStart,
    CannotListen,
    MigrationError,
    ProvisionError,
    SupervisorError,
    WorkerFailed,
    OptionError,
    config.SettingsError,
)
"""Failures whose message is all that the operator needs."""


def run(options: Options) -> int:
    """Runs the shop until it is asked to stop; gives the exit code.

    0 for a shop that was ready and was asked to stop; 1, after one sentence, for one that could not start or had to
    end; 130 (Ctrl-C) or 143 (SIGTERM) for one that was asked to stop before it was ready.
    """
    # Imported here, not above: `mercato up --help` should not wait for it.
    import uvloop

    try:
        environment.set_origins(options.cors_origins)
        settings = load()
        environment.check_currency(settings.currency)
        environment.check_origins(settings.cors_origin)
        configure_logging(settings.log_level)
        inject_faults(settings.faults)
        open_ = is_open(options.host, options.auth)
        for_tests = announce_test_modes(settings, is_open=open_)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_Up(options, settings, is_open=open_, for_tests=for_tests).run())
    except StoppedEarly as stop:
        fail(str(stop))
        return stopping.exit_code(stop.signal)
    except EXPECTED as error:
        fail(str(error))
    except ServiceError as error:
        fail(f"the shop could not start: {error}")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        fail("the disk is full; free some space and start again: no acknowledged order is lost")
    return 1


class _Up:
    """One run of `up`."""

    def __init__(
        self, options: Options, settings: config.Settings, *, is_open: bool, for_tests: Sequence[str] = ()
    ) -> None:
        self._options = options
        self._has_demo = is_loopback(options.host) if options.demo is None else options.demo
        self._settings = settings
        self._open = is_open
        self._for_tests = for_tests
        self._is_split = options.placement != "together"
        if self._is_split and options.workers > 1:
            raise CannotStart(
                "--workers is for a shop in one place; with --split, name the processes: --replicas gateway=2,orders=2"
            )
        self._transport: Carrier = options.transport or "nats"
        if self._transport == "grpc":
            environment.require_grpc("--transport grpc")
        self._grpc = wanted(options.host, options.grpc)
        self._placement = with_replicas(placements.read(options.placement), options.replicas)
        self._progress = Progress(as_json=options.json)
        self._stop = asyncio.Event()
        self._is_ready = asyncio.Event()
        self._recorder: ProcessFile | None = None
        self._signal = 0
        """The signal by which it was asked to stop."""
        self._reason: str | None = None
        """Why the shop ends without having been asked to."""
        self._cluster_outside: Path | None = None
        """The database, if that is not in the data folder."""

    async def run(self) -> int:
        """The steps of a start, each undone in the opposite order at the end."""
        self._listen_to_requests()
        try:
            async with contextlib.AsyncExitStack() as stack:
                await self._run(stack)
        finally:
            # Before the loop is closed: after it, a handler could notify no loop.
            stopping.ignore()
        if self._reason is not None:
            raise CannotStart(self._reason)
        self._progress.step("stopped")
        return 0

    async def _run(self, stack: contextlib.AsyncExitStack) -> None:
        require_known_format(self._options.data)  # before anything is written in it
        listener = stack.enter_context(contextlib.closing(self._listen()))
        if self._grpc is not None and (self._is_split or self._options.workers > 1):
            self._grpc = stack.enter_context(shared(self._grpc))
        url = url_of(self._options.host, listener)
        folder = stack.enter_context(DataFolder.open(self._options.data, url))
        also_log_to(log_file(self._options.data, OWNER))
        for name, value in environment.mail_defaults(folder.path, url).items():
            variables.set_default(name, value)
        secret = self._secret(folder)
        split = self._importing(stack, listener) if self._is_split else None
        admin_dsn = await self._unless_stopped(stack.enter_async_context(self._postgres(folder, secret)))
        dsns = await self._unless_stopped(preparing.databases(admin_dsn, secret, self._progress))
        if self._settings.postgres_dsn is not None:
            await self._unless_stopped(preparing.warn_of_too_few_connections(admin_dsn, self._pools(), self._progress))
        async with contextlib.AsyncExitStack() as hosting:
            opening = hosting.enter_async_context(hosted(preparing.host_of(dsns, secret, self._settings)))
            host = await self._unless_stopped(opening)
            populating = preparing.populate(
                host, secret, self._progress, has_demo=self._has_demo, has_staff=not self._open
            )
            await self._unless_stopped(populating)
            if self._options.workers == 1 and not self._is_split:
                background = Background(admin_dsn, dsns, host.telemetry, every_seconds=self._settings.audit_seconds)
                await self._serve_here(host, background, listener, url, secret)
        if split is not None:
            try:
                await self._serve_split(stack, split, admin_dsn, dsns, secret, listener, url)
            finally:
                await split.stop()  # before PostgreSQL and NATS, which they use
        elif self._options.workers > 1:
            await self._serve_in_workers(admin_dsn, dsns, secret, listener, url)

    # ---------------------------------------------------------------------------------------------------- asked to stop

    def _listen_to_requests(self) -> None:
        loop = asyncio.get_running_loop()

        def ask(number: int) -> None:
            # The handler interrupts the main thread at any point; the loop handles the request in its next turn.
            loop.call_soon_threadsafe(self._asked_to_stop, number)

        stopping.notify(ask)

    def _asked_to_stop(self, number: int) -> None:
        if not self._stop.is_set():
            self._progress.step("stopping, as soon as the running requests are answered")
        self._signal = self._signal or number
        self._stop.set()

    async def _unless_stopped(self, step: Coroutine[Any, Any, T]) -> T:
        """The result of a step of the start. A Ctrl-C or the death of PostgreSQL in the middle of it ends the step."""
        work, stop = asyncio.create_task(step), asyncio.create_task(self._stop.wait())
        await asyncio.wait({work, stop}, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if not self._stop.is_set():
            return await work
        work.cancel()
        await asyncio.wait({work})
        if not work.cancelled():
            work.exception()  # retrieved, so that asyncio does not log it: the step failed because it was cancelled
        raise CannotStart(self._reason) if self._reason else StoppedEarly(self._signal)

    def _end(self, reason: str) -> None:
        self._reason = self._reason or reason
        self._stop.set()

    # --------------------------------------------------------------------------------------------------------- listener

    def _listen(self) -> socket.socket:
        try:
            return bind(self._options.host, self._options.port)
        except PortTaken:
            # Most likely by the shop that runs on this data folder: then `DataFolderBusy` is the more useful error.
            if self._options.data.is_dir():
                DataFolder.open(self._options.data, "(not listening)").close()
            raise

    # --------------------------------------------------------------------------------------------------------- database

    def _secret(self, folder: DataFolder) -> bytes:
        given = self._settings.secret
        return given.get_secret_value().encode() if given is not None else folder.secret()

    @contextlib.asynccontextmanager
    async def _postgres(self, folder: DataFolder, secret: bytes) -> AsyncGenerator[str]:
        """An administrator's DSN: of the server in MERCATO_POSTGRES_DSN, else of an embedded one."""
        if self._settings.postgres_dsn is not None:
            yield self._settings.postgres_dsn.get_secret_value()
            return
        self._progress.step(f"starting PostgreSQL on {folder.path}")
        server = await EmbeddedPostgres.start(
            folder.path,
            password=key_deriver(secret)("postgres/superuser").hex(),
            progress=self._progress.step,
            max_connections=preparing.SPARE_CONNECTIONS + self._pools(),
        )

        async def again(died: EmbeddedPostgres) -> EmbeddedPostgres:
            return await died.start_again(self._progress.step)

        async with kept(server, again, "PostgreSQL", self._progress, self._end):
            self._progress.step(f"PostgreSQL {server.version} is running")
            self._cluster_outside = server.cluster_outside
            async with self._checkpointing(server):
                yield server.admin_dsn

    @contextlib.asynccontextmanager
    async def _checkpointing(self, server: EmbeddedPostgres) -> AsyncGenerator[None]:
        """Makes a new server write its databases to the disk once the shop is ready, not at its first stop."""

        async def checkpoint() -> None:
            await self._is_ready.wait()
            await server.checkpoint()

        task = asyncio.create_task(checkpoint(), name="first checkpoint") if server.is_new else None
        try:
            yield
        finally:
            if task is not None:
                task.cancel()
                await asyncio.wait({task})

    def _pools(self) -> int:
        """How many connections the pools of all processes may open together."""
        return self._settings.pool_size * self._services_hosted()

    def _services_hosted(self) -> int:
        """By all processes together; one more for the populating, before those begin."""
        if not self._is_split:
            return len(topology.SERVICES) * self._options.workers
        plans = self._placement.processes.values()
        return sum(plan.replicas * len(topology.SERVICES.keys() & set(plan.hosts)) for plan in plans)

    # ---------------------------------------------------------------------------------------------------------- serving

    async def _serve_here(
        self, host: Host, background: Background, listener: socket.socket, url: str, secret: bytes
    ) -> None:
        app = topology.gateway(
            host,
            open_to=open_to(self._options.host, listener, open_=self._open),
            log_requests=self._settings.log_requests,
            cors_origins=origins_of(self._settings.cors_origin),
            metrics_token=self._settings.metrics_token_text,
            currency=self._settings.currency,
            details=background.details,
            load=LoadLimits.up_to(self._settings.requests_in_work),
            streams=StreamLimits.up_to(self._settings.streams, self._settings.streams_of_one),
        )

        tune_garbage_collection()
        traces = traced(host.telemetry, self._settings.trace_share, is_on=self._settings.tracing == "on")
        diagnosing = diagnostics.answering(host.telemetry, host.clock, diagnostics.operator_keys(secret))
        async with background.running(), diagnosing as address:
            with traces, recorded(self._options.data, {"shop": address}):
                async with answering(self._grpc, app, host.telemetry, self._stop) as grpc:
                    on_ready = functools.partial(self._announce, url, grpc)
                    await topology.server(app, listener, host.telemetry, on_ready).run_until(self._stop)

    async def _serve_in_workers(
        self, admin_dsn: str, dsns: Mapping[str, str], secret: bytes, listener: socket.socket, url: str
    ) -> None:
        workers = Workers(
            self._options.workers,
            listener,
            admin_dsn=admin_dsn,
            dsns=dsns,
            secret=secret,
            open_to=open_to(self._options.host, listener, open_=self._open),
            settings=self._settings,
            options=config.service_options(topology.SERVICES),
            data=self._options.data,
            grpc=self._grpc,
        )
        async with workers.running(self._end):
            addresses = await self._unless_stopped(workers.ready())
            with recorded(self._options.data, addresses):
                self._announce(url, self._grpc_address())
                await self._stop.wait()
            # The workers close their own copies. While this one is open, the kernel would accept connections that no
            # process answers.
            listener.close()

    def _importing(self, stack: contextlib.AsyncExitStack, listener: socket.socket) -> Split:
        """The processes, which import while the databases are made ready."""
        counts = new_file()
        stack.callback(os.close, counts)
        metrics = MetricsFolder() if has_several_gateways(self._placement) else None
        if metrics:
            stack.callback(metrics.remove)
        split = Split(planned(self._placement, self._transport, listener, counts, metrics))
        self._progress.step(f"starting {len(split.instances)} processes")
        stack.push_async_callback(split.stop)
        split.start(self._note_process, self._end)
        return split

    async def _serve_split(
        self,
        stack: contextlib.AsyncExitStack,
        split: Split,
        admin_dsn: str,
        dsns: Mapping[str, str],
        secret: bytes,
        listener: socket.socket,
        url: str,
    ) -> None:
        nats_url = None
        if self._transport == "nats":
            from mercato.cli import nats_server  # its client library takes a while to import

            carrying = nats_server.embedded(self._options.data, secret, self._progress, self._end)
            nats_url = await self._unless_stopped(stack.enter_async_context(carrying))
        assign(
            split.instances,
            self._placement,
            environment.variables(secret, dsns),
            data=self._options.data,
            host=self._options.host,
            auth="open" if self._open else "required",
            nats_url=nats_url,
            grpc=self._grpc,
        )
        telemetry = Telemetry()
        telemetry.describe_process(__version__)
        background = Background(admin_dsn, dsns, telemetry, every_seconds=self._settings.audit_seconds)
        async with contextlib.AsyncExitStack() as ours:
            await self._unless_stopped(split.ready())
            await ours.enter_async_context(background.running())
            metrics = await ours.enter_async_context(owner_metrics.answering(telemetry))
            self._recorder = ours.enter_context(ProcessFile(self._options.data, split.instances, metrics))
            self._announce(url, self._grpc_address())
            await self._stop.wait()
            listener.close()

    def _grpc_address(self) -> str:
        """Where other processes listen for gRPC; empty if none does."""
        return f"{self._grpc.host}:{self._grpc.port}" if self._grpc else ""

    def _note_process(self, instance: SupervisedProcess) -> None:
        if instance.starts > 1:
            self._progress.step(f"{instance.name} is running again")
        if self._recorder:
            self._recorder.write()

    def _announce(self, url: str, grpc: str) -> None:
        say = self._progress.say
        data = os.path.relpath(self._options.data) if not self._options.data.is_absolute() else self._options.data
        say()
        say(f"Mercato is at  {url}")
        say(f"API docs       {url}/docs")
        if grpc:
            say(f"gRPC           {grpc}")
        say(f"Data           {data}")
        if self._cluster_outside is not None:
            say(
                f"Database       {self._cluster_outside}, for PostgreSQL's account cannot reach the data folder: "
                "a copy or volume of that folder is without it"
            )
        if variables.value(environment.MAIL) == environment.mail_defaults(self._options.data, url)[environment.MAIL]:
            say(f"Letters        {data}/{environment.LETTERS}, instead of being mailed ({environment.MAIL})")
        if self._open:
            say("Sign-in        not needed: on this machine callers without a token act as staff (--auth required)")
        else:
            say("Sign-in        required: POST /login with e-mail and password gives an access token")
        for sentence in self._for_tests:
            say(f"For tests      {sentence}")
        say()
        for line in _try_it(url, is_open=self._open, has_demo=self._has_demo):
            say(line)
        say()
        say(f"ready {url}")
        self._progress.event("ready", url=url, **({"grpc": grpc} if grpc else {}))
        self._is_ready.set()


def _try_it(url: str, *, is_open: bool, has_demo: bool) -> list[str]:
    """Two commands that work as they are, in this very shop."""
    look = f"  curl '{url}/users?id=1'" if is_open and has_demo else f"  curl {url}/products"
    if not has_demo:
        path, body = "register", '{"email": "you@example.com", "name": "You", "password": "a long enough password"}'
    elif is_open:
        path, body = "orders", '{"user_id": 1, "product_id": 100, "amount": 99.99}'
    else:
        path, body = "login", '{"email": "alice@example.com", "password": "demo-password"}'
    return [look, f"  curl -X POST {url}/{path} -H 'Content-Type: application/json' \\", f"       -d '{body}'"]
