"""An embedded PostgreSQL, whose programs are part of a wheel: creates, starts, watches and stops it.

    EmbeddedPostgres (this process) ── pipes ──► guard.py ──► postgres

Guaranteed, whichever of the three is killed: no process of the server runs on for more than a few seconds, and the next
start works. The guard handles the death of this process (`guard.py`); this process that of the guard (`died`); if both
die, the next start waits for the server to end (`processes.py`). A cluster gets its name only when it is complete, so
that a first start may be interrupted at any point. `place.py` decides where the cluster is, and the server's account.

It is as durable as any PostgreSQL (fsync, full pages, synchronous commit, checksums), listens only on a socket
in a folder of mode 0700, and requires a password from every client.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import shutil
import sys
import tempfile
import time
from asyncio.subprocess import PIPE
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote, urlencode

from mercato.embedded_postgres import place, record, server_log
from mercato.embedded_postgres.folder import SupervisorError, explained, sync_folder
from mercato.embedded_postgres.guarded import PATIENT_STOP_SECONDS, STOP_SECONDS, Guarded
from mercato.embedded_postgres.processes import (
    FORMER_STOP_SECONDS,
    end_leftovers,
    former_server_gone,
    is_taken,
    postmaster_pid,
    process_at,
    serving,
    takes_connections,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from mercato.embedded_postgres.place import Layout

ROLE = "mercato"
PORT = 5432  # Only a part of the socket's name.
ACCESS_RULES = "local all all scram-sha-256\n"
SOCKET_PATH_BYTES_MAX = 107 if sys.platform.startswith("linux") else 103  # sun_path, without its final zero.
READY_SECONDS = 60.0
READY_POLL_SECONDS = 0.02
RECOVERY_NOTICE_SECONDS = 1.0
RECOVERY_POLL_SECONDS = 0.25
STOP_NOTICE_SECONDS = 2.0
CLOSE_SECONDS = 1.0

# Passed on the command line at each start, so that a change here applies to existing clusters.
SETTINGS = {
    "listen_addresses": "",
    "port": str(PORT),
    "unix_socket_permissions": "0700",
    "fsync": "on",
    "synchronous_commit": "on",
    "full_page_writes": "on",
    "shared_buffers": "128MB",
    "password_encryption": "scram-sha-256",
    "timezone": "UTC",
    **server_log.SETTINGS,
    "log_startup_progress_interval": f"{server_log.PROGRESS_SECONDS}s",
}


class EmbeddedPostgres:
    """A running server. `admin_dsn` is for its superuser; `version` is like "18.4"; `pid` is the postmaster's."""

    def __init__(
        self,
        layout: Layout,
        guarded: Guarded,
        socket_folder: Path,
        password: str,
        max_connections: int,
        log_start: int,
        progress: Callable[[str], None],
    ) -> None:
        self.admin_dsn = _dsn(password, socket_folder)
        self.pid = guarded.pid
        self.guard_pid = guarded.guard_pid
        self.socket_folder = socket_folder
        self.version = ""
        self.is_new = False
        """Whether this start made its cluster."""
        self._layout = layout
        self._guarded = guarded
        self._password = password
        self._max_connections = max_connections
        self._log_start = log_start
        self._progress = progress
        self._postmaster = process_at(guarded.pid)
        self._stopping = False
        self._gone: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._watch = asyncio.create_task(self._watch_guard())
        self._rotation = asyncio.create_task(self._keep_log_short())

    @property
    def cluster_outside(self) -> Path | None:
        """The folder of the cluster, if it is outside of the data folder."""
        return self._layout.cluster if self._layout.is_outside else None

    @classmethod
    async def start(
        cls, folder: Path, *, password: str, progress: Callable[[str], None], max_connections: int = 100
    ) -> EmbeddedPostgres:
        """Start the server of this data folder, which the caller owns (`DataFolder`), making its cluster if needed.

        `password` is the superuser's, the same at each start. `progress` gets a line about each step that takes time.
        Raises SupervisorError if the server cannot start; then nothing is left running.
        """
        layout, lines = await asyncio.to_thread(place.prepare, folder)
        is_new = not layout.cluster.exists()
        for line in lines:
            progress(line)
        await _wait_for_former(layout, progress)
        with explained(layout.data):
            if is_new:
                progress(f"creating a database in {layout.cluster}")
                await _create_cluster(layout, password)
            record.note_initialized(layout.data)
            place.remove_former_socket_folder(layout.data)
            server = await cls._launch(layout, _make_socket_folder(layout), password, max_connections, progress)
        server.is_new = is_new
        await server._become_ready_or_stop()
        return server

    async def start_again(self, progress: Callable[[str], None]) -> EmbeddedPostgres:
        """Start a server on the same cluster, at the same address, after this one has died. Raises as `start`."""
        await _wait_for_former(self._layout, progress)
        with explained(self._layout.data):
            folder = _make_socket_folder(self._layout, self.socket_folder)
            server = await self._launch(self._layout, folder, self._password, self._max_connections, progress)
        await server._become_ready_or_stop()
        return server

    @classmethod
    async def _launch(
        cls,
        layout: Layout,
        socket_folder: Path,
        password: str,
        max_connections: int,
        progress: Callable[[str], None],
    ) -> EmbeddedPostgres:
        _write_access_rules(layout)
        command = _server_command(layout, socket_folder, max_connections)
        with server_log.opened(layout.data / "postgres.log") as log:
            server_log.rotate(layout.data / "postgres.log")
            log_start = log.seek(0, os.SEEK_END)
            guarded = await Guarded.start(command, layout.account, errors=log.fileno())
        return cls(layout, guarded, socket_folder, password, max_connections, log_start, progress)

    async def checkpoint(self) -> None:
        """Write the server's buffers to the disk, so that its stop and a recovery are short.

        If that fails, they only take longer.
        """
        driver = _driver()
        with contextlib.suppress(driver.PostgresError, driver.InterfaceError, OSError):
            connection = await driver.connect(self.admin_dsn, ssl=False, timeout=READY_SECONDS)
            try:
                await connection.execute("CHECKPOINT")
            finally:
                await _close(connection)

    async def stop(self) -> None:
        """Stop the server. May be called again.

        It may take as long as the server writes, for at most half a minute; usually that is less than a second.
        """
        self._stopping = True
        self._guarded.ask_to_finish()
        await asyncio.wait([self._watch], timeout=STOP_NOTICE_SECONDS)
        if not self._watch.done():
            self._progress("waiting for PostgreSQL, which writes to the disk what it has in memory")
        await self._ended_within(PATIENT_STOP_SECONDS)

    async def _stop_soon(self) -> None:
        """Stop the server, with a shutdown checkpoint if that takes less than three seconds; returns within five."""
        self._stopping = True
        self._guarded.ask_to_stop()
        await self._ended_within(STOP_SECONDS)

    async def _ended_within(self, seconds: float) -> None:
        await asyncio.wait([self._watch], timeout=seconds)
        if not self._watch.done():
            self._guarded.kill()
        await self._watch
        await self._rotation

    async def _keep_log_short(self) -> None:
        while not self._watch.done():
            await asyncio.wait([self._watch], timeout=server_log.LOOK_SECONDS)
            with contextlib.suppress(OSError):  # a full disk, or a folder that was deleted
                if await asyncio.to_thread(server_log.rotate, self._log):
                    self._log_start = 0

    async def died(self) -> str:
        """Wait until the server or its guard ends unexpectedly; gives a sentence about it. Not after `stop()`.

        When it returns, no process of the server runs.
        """
        return await asyncio.shield(self._gone)

    async def _watch_guard(self) -> None:
        """Wait for the end of the guard, and end the server if it still runs."""
        ending = await self._guarded.ended()
        await end_leftovers(self._layout.cluster, self._postmaster)
        _remove_socket_folder(self._layout, self.socket_folder)
        if not self._stopping:
            self._gone.set_result(f"PostgreSQL in {self._layout.cluster} (pid {self.pid}) is gone: {ending}.")

    async def _become_ready_or_stop(self) -> None:
        try:
            await self._become_ready()
        except BaseException:
            await self._stop_soon()
            raise

    async def _become_ready(self) -> None:
        """Wait until the server answers a query.

        A recovery may take any time while it makes progress, which the server logs and `progress` gets. Raises
        `SupervisorError` once the server has ended, or has logged no progress for a minute.
        """
        progressed_at = started = time.monotonic()
        reported = ""
        pause = READY_POLL_SECONDS
        while not await self._answers():
            now = time.monotonic()
            if reported and (state := self._recovery()) not in ("", reported):
                self._progress(f"PostgreSQL is recovering: {state}")
                reported, progressed_at = state, now
            if self._watch.done() or now - progressed_at > READY_SECONDS:
                raise SupervisorError(self._failure(now - started))
            if now - started > RECOVERY_NOTICE_SECONDS and not reported:
                reported = "waiting for PostgreSQL, which is recovering from a crash; this can take a while"
                self._progress(reported)
                pause = RECOVERY_POLL_SECONDS
            await asyncio.wait([self._watch], timeout=pause)

    def _recovery(self) -> str:
        return server_log.recovery(server_log.tail(self._log, self._log_start))

    async def _answers(self) -> bool:
        """Whether the server accepts a connection; reads its version."""
        driver = _driver()
        if not takes_connections(self._layout.cluster, self.pid):
            return False
        try:
            connection = await driver.connect(self.admin_dsn, ssl=False, timeout=READY_SECONDS)
        except (OSError, driver.CannotConnectNowError, driver.ConnectionDoesNotExistError):
            return False
        except driver.InvalidAuthorizationSpecificationError as error:
            raise SupervisorError(
                f"The database in {self._layout.cluster} was made with another password: "
                f"restore {self._layout.data / 'secret'} from a backup, or choose another data folder."
            ) from error
        self.version = str(connection.get_settings().server_version)
        await _close(connection)
        return True

    def _failure(self, elapsed: float) -> str:
        if not self._watch.done():
            return (
                f"PostgreSQL in {self._layout.cluster} is not ready after {elapsed:.0f} s: see {self._log}, "
                "and start again."
            )
        reason = server_log.reason(server_log.tail(self._log, self._log_start), self._layout.home)
        return f"PostgreSQL in {self._layout.cluster} did not start: {reason} (more in {self._log})."

    @property
    def _log(self) -> Path:
        return self._layout.data / "postgres.log"


def _driver() -> Any:
    # Imported here: the import takes as long as the start of the server, which runs meanwhile.
    import asyncpg  # pyright: ignore[reportMissingTypeStubs]  # It has none.

    return cast("Any", asyncpg)


async def _close(connection: Any) -> None:
    """Close a connection properly: the server would log one that is only cut off."""
    driver = _driver()
    with contextlib.suppress(driver.PostgresError, driver.InterfaceError, OSError, TimeoutError):
        await connection.close(timeout=CLOSE_SECONDS)


async def _wait_for_former(layout: Layout, progress: Callable[[str], None]) -> None:
    """Wait until a server whose owner was killed has stopped; remove its pid file if another process has the pid."""
    if serving(layout.cluster):
        progress("waiting for the former PostgreSQL to stop")
        if (pid := await former_server_gone(layout.cluster)) is not None:
            raise SupervisorError(
                f"A PostgreSQL (pid {pid}) still serves {layout.cluster} after {FORMER_STOP_SECONDS:.0f} s: "
                f"stop it with `kill -INT {pid}`, and start again."
            )
    pid = postmaster_pid(layout.cluster)
    if pid is not None and is_taken(pid):
        # PostgreSQL would take the process with this pid for the former server, and refuse to start, even if it is an
        # unrelated process, or a zombie of the former server. A pid that is free it handles itself.
        (layout.cluster / "postmaster.pid").unlink(missing_ok=True)


async def _create_cluster(layout: Layout, password: str) -> None:
    """Make the cluster under a temporary name, and rename it when it is complete and on the disk."""
    attempt = secrets.token_hex(4)
    new = layout.home / f"postgres.new-{attempt}"
    password_file = layout.home / f"password.new-{attempt}"
    try:
        new.mkdir(mode=0o700)
        layout.give(new)
        _write_private(password_file, password)
        layout.give(password_file)
        initdb = await Guarded.start(_initdb_command(layout, new, password_file), layout.account, errors=PIPE)
        succeeded, output = await initdb.finished()
        if not succeeded:
            reason = server_log.reason(output, layout.home)
            raise SupervisorError(f"No database could be made in {layout.cluster}: {reason}.")
        new.rename(layout.cluster)  # initdb has synced what is in it.
        sync_folder(layout.home)
    finally:
        # Also the files of an interrupted attempt whose initdb was still ending when this one began.
        place.clear_leftovers(layout)


def _initdb_command(layout: Layout, new: Path, password_file: Path) -> list[str]:
    return [
        str(layout.binaries / "initdb"),
        f"--pgdata={new}",
        f"--username={ROLE}",
        f"--pwfile={password_file}",
        "--auth=scram-sha-256",
        "--encoding=UTF8",
        # Not the machine's locales: the same order and the same case rules on every machine.
        "--no-locale",
        "--locale-provider=builtin",
        "--builtin-locale=C.UTF-8",
        "--data-checksums",
    ]


def _server_command(layout: Layout, socket_folder: Path, max_connections: int) -> list[str]:
    settings = {
        **SETTINGS,
        "recovery_init_sync_method": _sync_method(sys.platform, os.uname().release),
        "unix_socket_directories": _quoted(socket_folder),
        "hba_file": str(layout.home / "pg_hba.conf"),
        "max_connections": str(max_connections),
    }
    command = [str(layout.binaries / "postgres"), "-D", str(layout.cluster)]
    for name, value in settings.items():
        command += ["-c", f"{name}={value}"]
    return command


def _sync_method(platform: str, release: str) -> str:
    """How the server syncs all of its files to the disk before it recovers.

    One `syncfs` takes a fraction of the time of an `fsync` for each of thousands of files. Before Linux 5.8 it does not
    report what could not be written.
    """
    found = re.match(r"(\d+)\.(\d+)", release, re.ASCII)
    knows_errors = found is not None and (int(found[1]), int(found[2])) >= (5, 8)
    return "syncfs" if platform == "linux" and knows_errors else "fsync"


def _quoted(path: Path) -> str:
    """A path as one item of a list setting, where a comma or a blank would otherwise end it."""
    return '"' + str(path).replace('"', '""') + '"'


def _write_private(file: Path, content: str) -> None:
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
        stream.write(content + "\n")


def _write_access_rules(layout: Layout) -> None:
    """Beside the cluster, not in it: root must not write in a folder whose owner could have made a link there."""
    rules = layout.home / "pg_hba.conf"
    rules.unlink(missing_ok=True)
    _write_private(rules, ACCESS_RULES)
    layout.give(rules)


def _make_socket_folder(layout: Layout, former: Path | None = None) -> Path:
    """A folder of mode 0700 for the socket: beside the cluster, or elsewhere if that path would be too long.

    With `former`: the folder of a server that has died, again.
    """
    folder = layout.home / "socket"
    if len(os.fsencode(folder / f".s.PGSQL.{PORT}")) <= SOCKET_PATH_BYTES_MAX:
        # Made again: no server runs, and PostgreSQL would trust a socket's lock file with a reused pid.
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700)
    else:
        folder = _make_short_folder() if former is None else former
        folder.mkdir(mode=0o700, exist_ok=True)
        record.note_socket_folder(layout.data, folder)
    layout.give(folder)
    return folder


def _make_short_folder() -> Path:
    usual = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="mercato-", dir=usual if len(os.fsencode(usual)) < 60 else "/tmp"))  # noqa: S108


def _remove_socket_folder(layout: Layout, folder: Path) -> None:
    """Remove the socket folder. If that fails, the folder is in the record, and the next start removes it."""
    shutil.rmtree(folder, ignore_errors=True)
    if not folder.is_relative_to(layout.home) and not folder.exists():
        with contextlib.suppress(OSError):
            record.note_socket_folder(layout.data, None)


def _dsn(password: str, socket_folder: Path) -> str:
    # The port is explicit although it is the default: PGPORT in the environment would override a missing one.
    return f"postgresql://{ROLE}:{quote(password, safe='')}@/postgres?" + urlencode(
        {"host": str(socket_folder), "port": PORT}
    )
