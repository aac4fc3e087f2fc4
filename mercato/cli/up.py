"""`mercato up`: the whole shop on one machine, from one command.

The process that a person starts is the owner of everything: the data folder, PostgreSQL under its guard, the listening
socket, and the workers when there are more than one. Whatever of these dies without being asked ends the owner, and
the owner's death, `kill -9` included, ends all of them within five seconds. Nothing has to be cleaned up afterwards:
the next `up` finds a database that recovers, and every order that was answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import os
import socket
from base64 import urlsafe_b64encode
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import msgspec

from mercato import topology
from mercato.chassis.contract import ServiceError, Unavailable
from mercato.chassis.hosting import settings as config
from mercato.chassis.hosting.host import Host, key_deriver
from mercato.chassis.hosting.options import OptionError
from mercato.chassis.http import CannotListen, PortTaken, bind
from mercato.chassis.observability import faults
from mercato.chassis.observability.telemetry import configure_logging
from mercato.chassis.postgres.connections import translated
from mercato.chassis.postgres.migrations import MigrationError, migrate, missing_revisions
from mercato.chassis.postgres.provisioning import ProvisionError, provision, provisioned
from mercato.cli import stopping
from mercato.cli.hosting import hosted, spare_the_collector
from mercato.cli.progress import Progress, fail
from mercato.cli.workers import WorkerFailed, Workers
from mercato.contracts.roles import STAFF
from mercato.contracts.users import EmailTaken, ListUsers, Register, Users
from mercato.embedded_postgres import DataFolder, EmbeddedPostgres, SupervisorError, require_known_format
from mercato.operations.audit.background import Background

T = TypeVar("T")

STAFF_EMAIL: Final = "staff@mercato.local"
SPARE_CONNECTIONS: Final = 20
"""For the administrator, migrations and a person with psql."""


class Options(msgspec.Struct, frozen=True):
    """The options of `up`, as the command line gives them."""

    host: str
    port: int
    data: Path
    demo: bool | None
    workers: int
    auth: Literal["open", "required"] | None
    json: bool


class CannotStart(Exception):
    """A sentence for the person who typed the command."""


class StoppedEarly(Exception):
    """Somebody asked it to stop while it was starting. `signal` is how."""

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
"""Failures whose message is all that the person needs."""


def run(options: Options) -> int:
    """Runs the shop until it is asked to stop; gives the exit code.

    0 for a shop that was ready and was asked to stop; 1, after one sentence, for one that could not start or had to
    end; 130 (Ctrl-C) or 143 (SIGTERM) for one that was asked to stop before it was ready.
    """
    # Imported here, not above: whoever only reads the help does not wait for it.
    import uvloop

    try:
        settings = config.load()
        configure_logging(settings.log_level)
        _inject_faults(settings.faults)
        is_open = _is_open(options)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_Up(options, settings, is_open).run())
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


def _inject_faults(faults_wanted: str) -> None:
    if not faults_wanted:
        return
    topology.builds()  # a service declares its points when it is imported
    try:
        faults.inject_from_environment(faults_wanted)
    except ValueError as error:
        raise CannotStart(str(error)) from error


def _is_open(options: Options) -> bool:
    """Whether callers without a token act as staff."""
    loopback = _is_loopback(options.host)
    if options.auth == "open" and not loopback:
        raise CannotStart(
            f"--auth open is for loopback only, and {options.host} is reachable from elsewhere: leave it away, "
            "and tokens are required"
        )
    return options.auth == "open" or (options.auth is None and loopback)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class _Up:
    """One run of `up`."""

    def __init__(self, options: Options, settings: config.Settings, is_open: bool) -> None:
        self._options = options
        self._has_demo = _is_loopback(options.host) if options.demo is None else options.demo
        self._settings = settings
        self._open = is_open
        self._progress = Progress(as_json=options.json)
        self._stop = asyncio.Event()
        self._signal = 0
        """By which it was asked to stop."""
        self._reason: str | None = None
        """Why the shop ends without having been asked to."""

    async def run(self) -> int:
        """The steps of a start, each undone in the opposite order at the end."""
        self._listen_to_requests()
        try:
            async with contextlib.AsyncExitStack() as stack:
                await self._run(stack)
        finally:
            # Before the loop is closed: there is nobody left to tell.
            stopping.ignore()
        if self._reason is not None:
            raise CannotStart(self._reason)
        self._progress.step("stopped")
        return 0

    async def _run(self, stack: contextlib.AsyncExitStack) -> None:
        require_known_format(self._options.data)  # before anything is written in it
        listener = stack.enter_context(contextlib.closing(self._listen()))
        url = _url(self._options.host, listener)
        folder = stack.enter_context(DataFolder.open(self._options.data, url))
        secret = self._secret(folder)
        admin_dsn = await self._unless_stopped(stack.enter_async_context(self._postgres(folder, secret)))
        dsns = await self._unless_stopped(self._databases(admin_dsn, secret))
        async with contextlib.AsyncExitStack() as hosting:
            opening = hosting.enter_async_context(hosted(self._host(dsns, secret)))
            host = await self._unless_stopped(opening)
            await self._unless_stopped(self._populate(host, secret))
            if self._options.workers == 1:
                background = Background(admin_dsn, dsns, host.telemetry, every_seconds=self._settings.audit_seconds)
                await self._serve_here(host, background, listener, url)
        if self._options.workers > 1:
            await self._serve_in_workers(admin_dsn, dsns, secret, listener, url)

    # ---------------------------------------------------------------------------------------------------- asked to stop

    def _listen_to_requests(self) -> None:
        loop = asyncio.get_running_loop()

        def ask(number: int) -> None:
            # The handler interrupts whatever the main thread does; the loop must be told in its own turn.
            loop.call_soon_threadsafe(self._asked_to_stop, number)

        stopping.tell(ask)

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
            work.exception()  # looked at, so that nobody logs it: that the step was ended explains whatever it says
        raise CannotStart(self._reason) if self._reason else StoppedEarly(self._signal)

    def _end(self, reason: str) -> None:
        self._reason = self._reason or reason
        self._stop.set()

    # -------------------------------------------------------------------------------------------------------- its place

    def _listen(self) -> socket.socket:
        try:
            return bind(self._options.host, self._options.port)
        except PortTaken:
            # Most likely by the shop that serves this very data: then that is what the person needs to know.
            if self._options.data.is_dir():
                DataFolder.open(self._options.data, "(not listening)").close()
            raise

    # --------------------------------------------------------------------------------------------------------- database

    def _secret(self, folder: DataFolder) -> bytes:
        given = self._settings.secret
        return given.get_secret_value().encode() if given is not None else folder.secret()

    @contextlib.asynccontextmanager
    async def _postgres(self, folder: DataFolder, secret: bytes) -> AsyncGenerator[str]:
        """An administrator's DSN: of the server that the environment names, else of an embedded one."""
        if self._settings.postgres_dsn is not None:
            yield self._settings.postgres_dsn.get_secret_value()
            return
        self._progress.step(f"starting PostgreSQL on {folder.path}")
        server = await EmbeddedPostgres.start(
            folder.path,
            password=key_deriver(secret)("postgres/superuser").hex(),
            progress=self._progress.step,
            max_connections=SPARE_CONNECTIONS
            + self._settings.pool_size * len(topology.SERVICES) * self._options.workers,
        )
        watch = asyncio.create_task(self._watch(server))
        try:
            self._progress.step(f"PostgreSQL {server.version} is running")
            yield server.admin_dsn
        finally:
            watch.cancel()
            await server.stop()

    async def _watch(self, server: EmbeddedPostgres) -> None:
        sentence = await server.died()
        self._end(f"{sentence.rstrip('.')}; the shop has stopped. Start it again: no acknowledged order is lost")

    async def _databases(self, admin_dsn: str, secret: bytes) -> Mapping[str, str]:
        """A migrated database for each service; their DSNs."""
        derive = key_deriver(secret)
        names = list(topology.SERVICES)
        complete = await _complete(admin_dsn, names)
        dsns = await provision(admin_dsn, names, lambda role: derive(f"postgres/{role}").hex())
        for name in names:
            if name not in complete and (revisions := await _migrated(name, dsns[name])):
                self._progress.step(f"migrated the database of {name} to {revisions[-1]}")
        return dsns

    def _host(self, dsns: Mapping[str, str], secret: bytes) -> Host:
        return Host(
            topology.builds(),
            dsns,
            secret=secret,
            transport=self._settings.transport,
            pool_size=self._settings.pool_size,
            options=config.service_options(topology.SERVICES),
            may_call=topology.may_call,
        )

    async def _populate(self, host: Host, secret: bytes) -> None:
        """Demo data for an empty shop, and somebody who may run it."""
        if self._has_demo:
            for name, service in host.services.items():
                if service.seed_demo and await service.seed_demo():
                    self._progress.step(f"put demo data into {name}")
        if not self._open:
            password = urlsafe_b64encode(key_deriver(secret)("users/first-staff-password")).decode()[:22]
            await topology.as_the_shop(host, lambda: _ensure_staff(host, password, self._tell_staff))

    def _tell_staff(self, password: str) -> None:
        self._progress.say(f"Staff account  {STAFF_EMAIL}  password {password}  (shown this once)")
        self._progress.event("staff", email=STAFF_EMAIL, password=password)

    # ---------------------------------------------------------------------------------------------------------- serving

    async def _serve_here(self, host: Host, background: Background, listener: socket.socket, url: str) -> None:
        app = topology.gateway(
            host,
            open_to=self._open_to(listener),
            log_requests=self._settings.log_requests,
            details=background.details,
        )

        def on_ready() -> None:
            self._announce(url)

        spare_the_collector()
        async with background.running():
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
            open_to=self._open_to(listener),
            settings=self._settings,
            options=config.service_options(topology.SERVICES),
        )
        async with workers.running(self._end):
            await self._unless_stopped(workers.ready())
            self._announce(url)
            await self._stop.wait()
            # Theirs they close themselves. While this one is open, the kernel would go on accepting for nobody.
            listener.close()

    def _open_to(self, listener: socket.socket) -> tuple[str, int] | None:
        return (self._options.host, listener.getsockname()[1]) if self._open else None

    def _announce(self, url: str) -> None:
        say = self._progress.say
        data = os.path.relpath(self._options.data) if not self._options.data.is_absolute() else self._options.data
        say()
        say(f"Mercato is at  {url}")
        say(f"API docs       {url}/docs")
        say(f"Data           {data}")
        if self._open:
            say("Sign-in        not needed: on this machine callers without a token act as staff (--auth required)")
        else:
            say("Sign-in        required: POST /login with e-mail and password gives an access token")
        say()
        for line in _try_it(url, is_open=self._open, has_demo=self._has_demo):
            say(line)
        say()
        say(f"ready {url}")
        self._progress.event("ready", url=url)


async def _complete(admin_dsn: str, names: Sequence[str]) -> set[str]:
    """The services whose databases miss no revision. Raises `MigrationError` before any of them is changed."""
    existing = await provisioned(admin_dsn, names)
    with _explained("the databases cannot be read"):
        missing = await asyncio.gather(
            *(missing_revisions(dsn, topology.migrations(name)) for name, dsn in existing.items())
        )
    return {name for name, revisions in zip(existing, missing, strict=True) if revisions == []}


async def _migrated(name: str, dsn: str) -> Sequence[str]:
    """Brings the database of a service to the newest revision; gives the revisions that were run."""
    with _explained(f"the database of {name} cannot be migrated"):
        return await migrate(dsn, topology.migrations(name))


@contextlib.contextmanager
def _explained(what: str) -> Generator[None]:
    """Makes a sentence of a server that goes away."""
    try:
        yield
    except Exception as error:  # the driver's, which only the chassis knows by name
        if isinstance(translated(error, what), Unavailable):
            raise CannotStart(f"{what}: {str(error).rstrip('.')}") from error
        raise


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


def _url(host: str, listener: socket.socket) -> str:
    port = listener.getsockname()[1]
    bare = host.strip("[]")
    return f"http://[{bare}]:{port}" if ":" in bare else f"http://{bare}:{port}"


async def _ensure_staff(host: Host, password: str, tell: Callable[[str], None]) -> None:
    """Makes the first staff account, unless there is staff already.

    The password is told before the account is made: told afterwards, a crash in between would leave an account that
    nobody can use. It is derived from the shop's secret, so that two machines that start at once tell the same.
    """
    if await _has_staff(host):
        return
    tell(password)
    try:
        await host.client(Users).register(Register(email=STAFF_EMAIL, name="Staff", password=password, role=STAFF))
    except EmailTaken:
        # By another machine that starts on the same server at this moment, and has told its person the same.
        if await _has_staff(host):
            return
        raise CannotStart(
            f"there is no staff account, and {STAFF_EMAIL}, which it would get, is the e-mail address of a customer: "
            "start with --auth open on loopback, and give somebody the role staff (PUT /users/ID/role)"
        ) from None


async def _has_staff(host: Host) -> bool:
    return bool((await host.client(Users).list(ListUsers(role=STAFF, limit=1))).users)
