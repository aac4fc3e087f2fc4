"""`mercato backup` and `mercato restore`: writes a whole shop to one file, and makes a new shop from it."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import os
import secrets
import shutil
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from mercato import topology
from mercato.chassis.hosting import settings as config
from mercato.chassis.hosting.keys import key_deriver
from mercato.chassis.postgres.dsn import shown
from mercato.chassis.postgres.migrations import checksum, migrate, revisions
from mercato.chassis.postgres.new_databases import NewDatabases, new_databases, take_names
from mercato.cli import preparing, servers
from mercato.cli.databases import Unreachable, reached, run
from mercato.cli.progress import Progress
from mercato.cli.settings import load
from mercato.embedded_postgres import DataFolder, EmbeddedPostgres, remove_cluster
from mercato.embedded_postgres.folder import SECRET_BYTES, explained, sync_folder
from mercato.operations.audit.checking import Report, audit
from mercato.operations.backup import archive, taking
from mercato.operations.copying import located
from mercato.operations.ids import margin

HOLDS: Final = 0
VIOLATED: Final = 1
FAILED: Final = 2
"""Exit codes. 2: no backup or shop was made."""

UNFINISHED: Final = ".restoring"
"""The suffix of a new folder until it is complete."""
OWN_URL: Final = "(mercato restore)"


def backup(file: Path, data: Path, dsns: Sequence[str], scratch: str | None, *, as_json: bool) -> int:
    """Backs up a shop, running or not; gives the exit code."""
    return run(lambda: _backup(Path(os.path.abspath(file)), data, dsns, scratch, as_json=as_json), failure=FAILED)


def restore(file: Path, data: Path | None, dsns: Sequence[str], scratch: str | None, *, as_json: bool) -> int:
    """Makes a new shop from a backup, in a folder or on servers; gives the exit code."""
    return run(lambda: _restore(file, data, dsns, scratch, as_json=as_json), failure=FAILED)


async def _backup(file: Path, data: Path, dsns: Sequence[str], scratch: str | None, *, as_json: bool) -> int:
    progress, print_step = _progress_of(as_json=as_json)
    async with reached(data, dsns, print_step, scratch=scratch) as databases:
        taken = await taking.take(
            file, databases.scratch_dsn, databases.dsns, is_stopped=databases.is_stopped, progress=print_step
        )
    manifest = taken.manifest
    rows = sum(table.rows for entry in manifest.databases.values() for table in entry.tables.values())
    if as_json:
        _document(
            {
                "file": str(taken.path),
                "bytes": taken.size,
                "rows": rows,
                "taken_at": manifest.taken_at,
                "pause_seconds": manifest.pause_seconds,
                "tries": taken.tries,
                "holds": manifest.holds,
                "violated": manifest.violated,
            }
        )
    else:
        progress.say(f"{taken.path}  {taken.size} bytes, {rows} rows, as of {manifest.taken_at:%Y-%m-%d %H:%M:%S} UTC")
        progress.say(f"Writes waited for {manifest.pause_seconds:.3f} s at most.")
        _print_verdict(progress, taken.report, "The backup")
    return HOLDS if manifest.holds else VIOLATED


async def _restore(file: Path, data: Path | None, dsns: Sequence[str], scratch: str | None, *, as_json: bool) -> int:
    progress, print_step = _progress_of(as_json=as_json)
    settings = load()
    where, making = _place(data, dsns, settings, print_step)
    print_step(f"checking {file}")
    with contextlib.ExitStack() as stack:
        found = await asyncio.to_thread(lambda: stack.enter_context(archive.opened(file)))
        taking.check_revisions(found.manifest, _known())
        async with making() as (first, made):
            skipped = margin(found.manifest.taken_at, datetime.datetime.now(datetime.UTC))
            rows = await taking.load(found, made, skipped=skipped, progress=print_step)
            report = await audit(
                scratch or first, made, is_stopped=True, progress=print_step, stopped_at=found.manifest.taken_at
            )
    place = str(where) if isinstance(where, Path) else ", ".join(where)
    if as_json:
        violated = [finding.name for finding in report.violated]
        taken_at = found.manifest.taken_at
        _document(
            {
                "data" if isinstance(where, Path) else "server": place,
                "rows": rows,
                "taken_at": taken_at,
                "skipped_ids": skipped,
                "holds": not report.violated,
                "violated": violated,
            }
        )
    else:
        progress.say(f"{place}  {rows} rows, as of {found.manifest.taken_at:%Y-%m-%d %H:%M:%S} UTC")
        progress.say(f"Its next ids are {skipped} behind those of the backup: none of the lost time comes again.")
        _print_verdict(progress, report, "The new shop")
        progress.say(f"Start it: {_start_of(where)}")
    return VIOLATED if report.violated else HOLDS


def _start_of(where: Path | Sequence[str]) -> str:
    """How the new shop is started."""
    if isinstance(where, Path):
        return f"mercato up --data {where}"
    if len(where) > 1:
        return "mercato migrate SERVICE... --dsn DSN for each of the servers, then mercato serve"
    return "MERCATO_POSTGRES_DSN=... mercato up, with the DSN of that server"


def _progress_of(*, as_json: bool) -> tuple[Progress, Callable[[str], None]]:
    """The progress of a command, and a function that prints a step; with --json, programs get one document instead."""
    progress = Progress(as_json=False)

    def print_step(line: str) -> None:
        if not as_json:
            progress.step(line)

    return progress, print_step


def _document(values: dict[str, object]) -> None:
    Progress(as_json=False).say(msgspec.json.encode(values).decode())


def _print_verdict(progress: Progress, report: Report, what: str) -> None:
    if not report.violated:
        progress.say(f"{what} holds: all {len(report.findings)} invariants of the audit.")
        return
    progress.say(f"{what} does not hold: `mercato audit` shows the rows.")
    for finding in report.violated:
        progress.say(f"  {finding.name}  {finding.title}: {finding.violations} times that it does not")


def _known() -> dict[str, dict[str, str]]:
    """The revisions of this version and their checksums, by service."""
    folders = {name: topology.migrations(name) for name in topology.SERVICES}
    return {name: {one: checksum(folder, one) for one in revisions(folder)} for name, folder in folders.items()}


Making = Callable[[], contextlib.AbstractAsyncContextManager[tuple[str, Mapping[str, str]]]]
"""Makes an empty shop: an administrator's DSN of its first server, and that of each database by service."""


def _place(
    data: Path | None, dsns: Sequence[str], settings: config.Settings, print_step: Callable[[str], None]
) -> tuple[Path | Sequence[str], Making]:
    """The folder of the new shop, or its servers as they are shown, and the function that makes the shop there."""
    if data is not None and dsns:
        raise Unreachable("a new shop is in one place: name a folder with --data, or a server with --dsn")
    named = servers.given(dsns, settings) if data is None else None
    if named is not None:
        return [shown(dsn) for dsn in named.by_dsn], lambda: _made_on_servers(named, settings, print_step)
    if data is None:
        raise Unreachable("name a folder for the new shop with --data, or a server with --dsn")
    if settings.postgres_dsn is not None:
        raise Unreachable(
            "a shop in a folder has a PostgreSQL of its own: run the command without MERCATO_POSTGRES_DSN, or "
            "without --data to restore onto that server"
        )
    folder = Path(os.path.abspath(data))
    _require_new(folder)
    return folder, lambda: _made(folder, settings, print_step)


@contextlib.asynccontextmanager
async def _made_on_servers(
    named: servers.Servers, settings: config.Settings, print_step: Callable[[str], None]
) -> AsyncGenerator[tuple[str, Mapping[str, str]]]:
    """The new, migrated databases of a shop on its servers; they get their names only if the block succeeds."""
    # The first start gives the roles the passwords of its own secret.
    secret = settings.secret.get_secret_value().encode() if settings.secret else secrets.token_bytes(SECRET_BYTES)
    derive = key_deriver(secret)
    async with contextlib.AsyncExitStack() as stack:
        made: list[NewDatabases] = []
        for dsn, services in named.by_dsn.items():
            on_server = new_databases(dsn, services, lambda role: derive(f"postgres/{role}").hex())
            made.append(await stack.enter_async_context(on_server))
        for new in made:
            for name, each in new.owned.items():
                print_step(f"making the database of {name}")
                await migrate(each, topology.migrations(name))
        yield named.first, {name: each for new in made for name, each in new.dsns.items()}
        await take_names(made)


def _require_new(data: Path) -> None:
    if os.path.lexists(data):
        raise Unreachable(f"{data} is there already, and a shop is never written over: name a new folder with --data")
    unfinished = data.with_name(data.name + UNFINISHED)
    if os.path.lexists(unfinished):
        raise Unreachable(
            f"{unfinished} is of a restore that runs or was killed: wait for it, or remove it with "
            f"`python -m mercato.embedded_postgres --remove {unfinished}` and rm -r"
        )


@contextlib.asynccontextmanager
async def _made(
    data: Path, settings: config.Settings, print_step: Callable[[str], None]
) -> AsyncGenerator[tuple[str, Mapping[str, str]]]:
    """The databases of a new, migrated shop in a folder, which gets its name only if the block succeeds."""
    unfinished = data.with_name(data.name + UNFINISHED)
    with explained(data):
        unfinished.mkdir(mode=0o700)  # of two concurrent restores, one fails
    try:
        with DataFolder.open(unfinished, OWN_URL) as folder:
            secret = settings.secret.get_secret_value().encode() if settings.secret else folder.secret()
            print_step("starting a new PostgreSQL")
            server = await EmbeddedPostgres.start(
                folder.path, password=key_deriver(secret)("postgres/superuser").hex(), progress=print_step
            )
            try:
                await preparing.databases(server.admin_dsn, secret, Steps(print_step))
                yield server.admin_dsn, await located(server.admin_dsn, list(topology.SERVICES))
            finally:
                await server.stop()
            with explained(data):
                _require_unused(data)
                unfinished.rename(data)
                sync_folder(data.parent)
    except BaseException:
        remove_cluster(unfinished)
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _require_unused(data: Path) -> None:
    # A rename can replace only an empty folder, so that nothing is lost if another process makes one meanwhile.
    if os.path.lexists(data):
        raise Unreachable(f"{data} was made by another meanwhile: name a new folder with --data")


class Steps(Progress):
    """Progress that passes its steps to `print_step`."""

    def __init__(self, print_step: Callable[[str], None]) -> None:
        super().__init__(as_json=True)
        self._print_step = print_step

    def step(self, line: str) -> None:
        self._print_step(line)
