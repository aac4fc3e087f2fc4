"""Migrations: bring the database of a service to the newest revision.

A service's `migrations/` holds Alembic revisions `0001_what.py`, `0002_what.py`, ... in one line, forward only, each a
list of plain SQL statements. Alembic turns the missing ones into SQL; our own driver runs it, one transaction a
revision (except in an `autocommit_block`), so that no second driver is needed. If no revision is missing,
Alembic is not even imported (0.7 s).

A released revision is frozen. Its checksum is committed beside it (`checksums.txt`, written by `make freeze`),
and the transaction that runs a revision records the checksum of its statements in the database (`revision_checksums`).
Each start compares the two with one query: a database of other revisions is refused, and not changed.

A migration expands: the version before goes on with the databases of this one, and its processes may be started again
beside them. What a migration makes superfluous is removed by one of the next version, which says so (`needs`): versions
without the revision that it names are refused from then on.

Processes that start together wait for each other by polling `pg_try_advisory_lock`: the blocking form would deadlock
with a `CREATE INDEX CONCURRENTLY`, which waits for every older transaction, the one that waits for the lock included.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, TextIO, cast
from urllib.parse import unquote, urlsplit

import asyncpg  # pyright: ignore[reportMissingTypeStubs]  # it has no types

from .sessions import WHOLE_TABLES, connect

LOCK_KEY: Final = 0x6D657263  # "merc"
LOCK_SECONDS: Final = 60.0
LOCK_POLL_SECONDS: Final = 0.1
TABLE_LOCK_TIMEOUT: Final = "10s"
"""A revision that waits for a lock on a busy table makes all later statements wait behind it: it fails instead, and may
be tried again."""

CHECKSUMS: Final = "checksums.txt"
"""In a folder of migrations: a line `REVISION SHA256` for each frozen revision."""

WAY_OUT: Final = (
    "nothing in it was changed: start it with the commit of mercato that made it, or give this one databases of its "
    "own (--data with a new folder, or another server in MERCATO_POSTGRES_DSN)"
)

_RECORDED: Final = """
    SELECT revision, checksum, coalesce(to_jsonb(made) ->> 'needs', '') AS needs FROM revision_checksums AS made
"""
"""`needs` is a column once a revision has called `needs`; a database without one has no key of that name."""
_STATE: Final = """
    SELECT count(*) FILTER (WHERE relname = 'alembic_version') > 0,
           count(*) FILTER (WHERE relname = 'revision_checksums') > 0
      FROM pg_class
     WHERE relnamespace = current_schema()::regnamespace
"""
"""Both from one snapshot. `to_regclass` reads the cache of the session, which may know one of two tables that another
session has made in one transaction, and still hold that there is no other."""
_MAKE_RECORDS: Final = """
    CREATE TABLE revision_checksums (
        revision text CONSTRAINT revision_checksums_pkey PRIMARY KEY,
        checksum text NOT NULL,
        run_at timestamptz NOT NULL DEFAULT now()
    )
"""


class MigrationError(Exception):
    """A sentence for the operator: other revisions made the database, or a process holds the lock for ever."""


async def migrate(dsn: str, folder: Path) -> Sequence[str]:
    """Brings a database to the newest revision in `folder`; gives the revisions that were run, in order.

    Raises `MigrationError`; errors of a statement as the driver's. A revision that fails leaves nothing behind.
    """
    connection = await connect(dsn, WHOLE_TABLES)
    try:
        if not await _missing(connection, dsn, folder):
            return []
        await _lock(connection)
        # Read again under the lock: another process may have migrated while this one waited.
        missing = await _missing(connection, dsn, folder)
        scripts = [_script(folder, revision) for revision in missing]
        await connection.execute("SELECT set_config('lock_timeout', $1, false)", TABLE_LOCK_TIMEOUT)
        for script in scripts:
            for statement in script:
                await connection.execute(statement)
        return missing
    finally:
        # Gives back the lock, and rolls back a revision that failed.
        await connection.close()


async def missing_revisions(dsn: str, folder: Path) -> Sequence[str] | None:
    """The revisions in `folder` that a database does not have; None if this role may not read it. Changes nothing.

    Raises `MigrationError` for a database that `migrate` would refuse; errors of the connection as the driver's.
    """
    try:
        connection = await connect(dsn)
    except asyncpg.InsufficientPrivilegeError:
        return None
    try:
        return await _missing(connection, dsn, folder)
    except asyncpg.InsufficientPrivilegeError:
        return None
    finally:
        await connection.close()


async def _missing(connection: Any, dsn: str, folder: Path) -> list[str]:
    known = revisions(folder)
    assert known, f"there are no migrations in {folder}"
    recorded = await _recorded(connection, dsn)
    run = known[: len(recorded)]
    for revision in run:
        if revision in recorded and recorded[revision].checksum != checksum(folder, revision):
            raise MigrationError(
                f"revision {revision} of the database {_name(dsn)} was run with statements that are not those of this "
                f"version of mercato; {WAY_OUT}"
            )
    if newer := sorted(set(recorded) - set(run)):
        needed = max(recorded[revision].needs for revision in newer)
        if not recorded.keys() >= set(known) or newer[0] < known[-1] or needed > known[-1]:
            raise MigrationError(
                f"the database {_name(dsn)} is at revision {newer[-1]} of a newer version of mercato, which this one "
                f"cannot use: install one that knows revision {needed or newer[-1]}"
            )
    return known[len(recorded) :]


class _Run(NamedTuple):
    """A revision that was run on a database."""

    checksum: str
    needs: str
    """The oldest revision that the code of a version must know to use the database; empty: any."""


async def _recorded(connection: Any, dsn: str) -> Mapping[str, _Run]:
    """The revisions that were run on a database."""
    while True:
        try:
            return {row["revision"]: _Run(row["checksum"], row["needs"]) for row in await connection.fetch(_RECORDED)}
        except asyncpg.UndefinedTableError:
            is_migrated, has_records = await connection.fetchrow(_STATE)
        if not is_migrated and not has_records:
            return {}
        if not has_records:
            break
        # Another process has run the first revision since the first query.
    raise MigrationError(
        f"the database {_name(dsn)} was made by a commit of mercato from before its revisions had checksums, which "
        f"this one cannot continue; {WAY_OUT}"
    )


def _name(dsn: str) -> str:
    return unquote(urlsplit(dsn).path.lstrip("/"))


def revisions(folder: Path) -> list[str]:
    """The revisions of a folder, oldest first. The name of the file begins with it."""
    return sorted(path.stem.partition("_")[0] for path in folder.glob("[0-9]*_*.py"))


def frozen_checksums(folder: Path) -> dict[str, str]:
    """The committed checksum of each frozen revision in `folder`."""
    file = folder / CHECKSUMS
    lines = file.read_text().splitlines() if file.exists() else []
    return dict(cast(tuple[str, str], line.split()) for line in lines)


def checksum(folder: Path, revision: str) -> str:
    """The checksum that a database must have recorded for a revision: the committed one, once it is frozen."""
    return frozen_checksums(folder).get(revision) or computed_checksum(folder, revision)


def computed_checksum(folder: Path, revision: str) -> str:
    """The SHA-256 of the statements of a revision as they are in its file now: comments in Python do not count."""
    known = revisions(folder)
    position = known.index(revision)
    return _digest(statements(folder, known[position - 1] if position else None, revision))


def _digest(made: Sequence[str]) -> str:
    # Another version of Alembic may word the statements for its own table differently.
    own = (statement for statement in made if "alembic_version" not in statement)
    return hashlib.sha256("\0".join(own).encode()).hexdigest()


def _script(folder: Path, revision: str) -> list[str]:
    """The statements that run a revision and record its checksum, from BEGIN to COMMIT."""
    known = revisions(folder)
    position = known.index(revision)
    made = statements(folder, known[position - 1] if position else None, revision)
    digest = _digest(made)
    if digest != frozen_checksums(folder).get(revision, digest):
        raise MigrationError(
            f"revision {revision} in {folder} was changed after it was frozen: take the change back, and make it in a "
            "revision of its own"
        )
    record = f"INSERT INTO revision_checksums (revision, checksum) VALUES ('{revision}', '{digest}')"  # noqa: S608
    return [*made[:-1], *([] if position else [_MAKE_RECORDS]), record, made[-1]]


async def _lock(connection: Any) -> None:
    """Waits until no other process migrates this database; none can until this connection is closed."""
    deadline = asyncio.get_running_loop().time() + LOCK_SECONDS
    while not await connection.fetchval("SELECT pg_try_advisory_lock($1)", LOCK_KEY):
        if asyncio.get_running_loop().time() > deadline:
            raise MigrationError(f"another process has been migrating this database for {LOCK_SECONDS:.0f} s; end it")
        await asyncio.sleep(LOCK_POLL_SECONDS)


class _Statements:
    """The output of Alembic, which writes one statement at a time, so that no text has to be split."""

    def __init__(self) -> None:
        self.written: list[str] = []

    def write(self, text: str) -> None:
        self.written.append(text.strip())

    def flush(self) -> None:
        pass


def statements(folder: Path, current: str | None, revision: str) -> list[str]:
    """The SQL of the revisions after `current` up to `revision`, from BEGIN to COMMIT.

    Each is run alone: in a text of many, PostgreSQL would refuse a `CREATE INDEX CONCURRENTLY` even after a COMMIT.
    """
    from alembic.command import upgrade
    from alembic.config import Config

    output = _Statements()
    config = Config(output_buffer=cast(TextIO, output))
    config.set_main_option("script_location", _literal(Path(__file__).with_name("alembic_environment")))
    config.set_main_option("version_locations", _literal(folder))
    config.set_main_option("path_separator", "newline")
    upgrade(config, f"{current or 'base'}:{revision}", sql=True)
    return [text for text in output.written if text and not text.startswith("--")]


def _literal(path: Path) -> str:
    return str(path).replace("%", "%%")  # the configuration would interpolate it


# ----------------------------------------------------------------------------------------------------- for revisions


def needs(revision: str) -> Sequence[str]:
    """The statements by which a revision removes what the code of older versions uses: they are refused from then on.

    `revision` is the newest one of the oldest version that can go on: of the one before that which removes.
    """
    return (
        "ALTER TABLE revision_checksums ADD COLUMN IF NOT EXISTS needs text",
        f"ALTER TABLE revision_checksums ALTER COLUMN needs SET DEFAULT '{revision}'",
    )


def append_only(table: str) -> Sequence[str]:
    """The statements after which rows of a table can be inserted, but no code can change or delete them.

    The trigger is for UPDATE and DELETE: an insert costs nothing more. TRUNCATE stays possible: tests empty their
    databases with it, and it is not run by mistake.
    """
    return (
        f"""
        CREATE FUNCTION {table}_stay() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            RAISE EXCEPTION '% of % is refused: its rows stay as they were written', TG_OP, TG_TABLE_NAME
                USING ERRCODE = 'restrict_violation';
        END $$
        """,
        f"""
        CREATE TRIGGER {table}_stay BEFORE UPDATE OR DELETE ON {table}
            FOR EACH STATEMENT EXECUTE FUNCTION {table}_stay()
        """,
    )
