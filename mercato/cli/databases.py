"""Connects commands to the databases of a shop, whether the shop runs or not.

If the shop runs, a command connects to its server. If no process uses the data folder, the command owns the folder and
starts its PostgreSQL for as long as it needs them, and stops it afterwards.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
import traceback
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode

import msgspec

from mercato import topology
from mercato.chassis.contract import Unavailable
from mercato.chassis.hosting import settings as config
from mercato.chassis.hosting.keys import key_deriver
from mercato.chassis.postgres.connections import translated
from mercato.chassis.postgres.migrations import MigrationError, missing_revisions
from mercato.chassis.postgres.provisioning import ProvisionError
from mercato.cli import servers, stopping
from mercato.cli.progress import OutputFailed, fail
from mercato.cli.settings import load
from mercato.cli.starting import CannotStart
from mercato.embedded_postgres import DataFolder, DataFolderBusy, EmbeddedPostgres, SupervisorError
from mercato.embedded_postgres.folder import SECRET_BYTES, explained, require_text
from mercato.embedded_postgres.outside import PLACES
from mercato.embedded_postgres.postgres import PORT, ROLE
from mercato.embedded_postgres.record import read_record, require_known_format
from mercato.operations.copying import CopyError, located

OWN_URL: Final = "(a command that looks at its databases)"
"""What a command writes as its URL into the lock of a folder without a running shop."""
OTHER_COMMAND_SECONDS: Final = 600.0
OTHER_COMMAND_POLL_SECONDS: Final = 0.2
OTHER_COMMAND_NOTICE_SECONDS: Final = 1.0
"""The notice about another command is printed after this time; most commands have ended by then."""


class Databases(msgspec.Struct, frozen=True):
    """The DSNs of the databases of a shop, with the administrator's role, which may read and write all of them."""

    scratch_dsn: str
    """Of the server that gets the copies of an audit."""
    dsns: Mapping[str, str]
    """By service."""
    is_stopped: bool = False
    """No shop runs on them: their server was started for this command."""


class Unreachable(Exception):
    """A sentence for the operator: what cannot be reached, and how to fix it."""


EXPECTED: Final = (
    Unreachable,
    CannotStart,
    CopyError,
    MigrationError,
    ProvisionError,
    SupervisorError,
    config.SettingsError,
)
"""Failures whose message is all that the operator needs."""


@contextlib.asynccontextmanager
async def reached(
    data: Path,
    dsns: Sequence[str],
    progress: Callable[[str], None],
    *,
    must_run: bool = False,
    scratch: str | None = None,
) -> AsyncGenerator[Databases]:
    """The databases of the shop in the folder `data`, or on the servers in `dsns`, for the time of the block.

    `dsns` are an administrator's, as in `servers.py`; empty: those of MERCATO_POSTGRES_DSN. `scratch` is that of the
    server for copies; None: the first. `progress` gets a line about each step that takes time. `must_run` refuses a
    folder without a running shop. Raises one of `EXPECTED`.
    """
    settings = load()
    if (named := servers.given(dsns, settings)) is not None:
        yield await _located(named, scratch)
        return
    async with _server(data, settings, progress, must_run=must_run) as (admin_dsn, is_stopped):
        yield await _located(servers.parsed([admin_dsn]), scratch, is_stopped=is_stopped)


def run(command: Callable[[], Coroutine[Any, Any, int]], *, failure: int = 1) -> int:
    """Runs a command that reaches databases; gives its exit code, or `failure` after one sentence.

    Ctrl-C and SIGTERM cancel it, so that it stops what it has started; the exit code is then 128 + the signal's number.
    """
    import uvloop

    signals: list[int] = []

    async def cancellable() -> int:
        loop = asyncio.get_running_loop()
        work = asyncio.create_task(command())

        def stop(number: int) -> None:
            signals.append(number)
            loop.call_soon_threadsafe(work.cancel)

        stopping.notify(stop)
        try:
            return await work
        finally:
            stopping.ignore()

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(cancellable())
    except asyncio.CancelledError:
        fail("stopped before it was done")
        return stopping.exit_code(signals[0])
    except OutputFailed as error:
        if error.is_closed:
            return 0
        fail(str(error))
    except EXPECTED as error:
        fail(str(error))
    except Exception:  # an edge: a bug must not end with an exit code that reports a result
        traceback.print_exc()
    return failure


async def _located(named: servers.Servers, scratch: str | None, *, is_stopped: bool = False) -> Databases:
    found = await asyncio.gather(*(located(dsn, services) for dsn, services in named.by_dsn.items()))
    of_server = {name: dsn for each in found for name, dsn in each.items()}
    dsns = {name: of_server[name] for name in topology.SERVICES}
    await asyncio.gather(*(_checked(name, dsn) for name, dsn in dsns.items()))
    return Databases(scratch or named.first, dsns, is_stopped)


async def _checked(name: str, dsn: str) -> None:
    """Refuses a database with other revisions than those of this version."""
    try:
        await missing_revisions(dsn, topology.migrations(name))
    except MigrationError:
        raise
    except Exception as error:  # the driver's, which only the chassis knows by name
        if isinstance(translated(error, name), Unavailable):
            raise Unreachable(f"the database of {name} cannot be read: {str(error).rstrip('.')}") from error
        raise


@contextlib.asynccontextmanager
async def _server(
    data: Path, settings: config.Settings, progress: Callable[[str], None], *, must_run: bool
) -> AsyncGenerator[tuple[str, bool]]:
    """An administrator's DSN of the embedded server: of the running shop, else (True) of one started for the block."""
    data = _shop_in(data)
    password = key_deriver(shop_secret(data, settings))("postgres/superuser").hex()
    folder = await _own(data, progress, must_run=must_run)
    if folder is None:
        where = urlencode({"host": str(_socket_folder(data)), "port": PORT})
        yield f"postgresql://{ROLE}:{password}@/postgres?{where}", False
        return
    with folder:
        progress(f"starting PostgreSQL on {data}")
        server = await EmbeddedPostgres.start(data, password=password, progress=progress)
        try:
            yield server.admin_dsn, True
        finally:
            await server.stop()


def _shop_in(data: Path) -> Path:
    """The absolute path of a folder with a shop. It does not take the lock, which would create the folder."""
    data = Path(os.path.abspath(data))
    require_text(data)
    if not data.is_dir() or not (data / "lock").exists():
        raise Unreachable(f"there is no shop in {data}: name its folder with --data, or its server with --dsn")
    require_known_format(data)
    if not read_record(data).initialized:
        raise Unreachable(
            f"the shop in {data} has no database of its own, or not yet: "
            "wait until it is ready, or name its server with --dsn"
        )
    return data


async def _own(data: Path, progress: Callable[[str], None], *, must_run: bool) -> DataFolder | None:
    """The folder, owned by this process; None while a shop runs on it. Waits for another command to end.

    The server of another command stops with that command, so that this command cannot use it.
    """
    began, is_announced, shops_seen = time.monotonic(), False, 0
    while True:
        try:
            folder = DataFolder.open(data, OWN_URL)
        except DataFolderBusy as busy:
            # A process that has just taken the lock may not have written to it yet: the file then names the last owner.
            shops_seen = 0 if busy.url == OWN_URL else shops_seen + 1
            if shops_seen == 2:
                return None
            waited = time.monotonic() - began
            if waited > OTHER_COMMAND_SECONDS:
                raise
            if waited > OTHER_COMMAND_NOTICE_SECONDS and not is_announced:
                progress(f"waiting for another command that looks at these databases, with pid {busy.pid}")
                is_announced = True
        else:
            if not must_run:
                return folder
            folder.close()
            shops_seen = 0
        if must_run and not shops_seen:
            raise Unreachable(f"no shop runs on {data}, so there is nothing to follow: start it, or leave out --follow")
        await asyncio.sleep(OTHER_COMMAND_POLL_SECONDS)


def shop_secret(data: Path, settings: config.Settings) -> bytes:
    """The secret of the shop in a folder. Raises `Unreachable`."""
    if settings.secret is not None:
        return settings.secret.get_secret_value().encode()
    with explained(data):
        found = (data / "secret").read_bytes()
    if len(found) != SECRET_BYTES:
        raise Unreachable(f"{data / 'secret'} is damaged: restore it from a backup")
    return found


def _socket_folder(data: Path) -> Path:
    """Where the running server of this folder listens."""
    record = read_record(data)
    if record.socket_folder is not None:
        return Path(record.socket_folder)
    home = PLACES / record.place if record.outside and record.place is not None else data
    return home / "socket"
