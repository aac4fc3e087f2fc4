"""Migrations: what brings the database of a service to the newest version.

A service's `migrations/` holds Alembic revisions `0001_what.py`, `0002_what.py`, ... in one line, forward only, each a
list of plain SQL statements. Alembic turns the missing ones into SQL; our own driver runs it, one transaction a
revision (except what stands in an `autocommit_block`), so that no second driver is needed. Where nothing is missing
Alembic is not even imported (0.7 s).

Processes that start together wait for each other by polling `pg_try_advisory_lock`: the blocking form would deadlock
with a `CREATE INDEX CONCURRENTLY`, which waits for every older transaction, the one that waits for the lock included.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, TextIO, cast

import asyncpg  # pyright: ignore[reportMissingTypeStubs]  # see db.py

LOCK_KEY: Final = 0x6D657263  # "merc"
LOCK_SECONDS: Final = 60.0
LOCK_POLL_SECONDS: Final = 0.1
TABLE_LOCK_TIMEOUT: Final = "10s"
"""A revision that waits for a busy table makes everybody else wait behind it: then rather none, and another try."""


class MigrationError(Exception):
    """A sentence for the operator: the database is newer than this program, or somebody holds the lock for ever."""


async def migrate(dsn: str, folder: Path) -> Sequence[str]:
    """Brings a database to the newest revision in `folder`; gives the revisions that were run, in order.

    Raises `MigrationError`; errors of a statement as the driver's. A revision that fails leaves nothing behind.
    """
    known = revisions(folder)
    assert known, f"there are no migrations in {folder}"
    connection = await cast(Any, asyncpg).connect(dsn)
    try:
        if await _current(connection) == known[-1]:
            return []
        await _lock(connection)
        # Only now is it certain: another process may have migrated while this one waited.
        current = await _current(connection)
        if current is not None and current not in known:
            raise MigrationError(
                f"the database is at revision {current}, which this version of mercato does not know; "
                "it was used by a newer one: install that"
            )
        missing = known[known.index(current) + 1 :] if current else known
        await connection.execute("SELECT set_config('lock_timeout', $1, false)", TABLE_LOCK_TIMEOUT)
        for revision in missing:
            for statement in statements(folder, current, revision):
                await connection.execute(statement)
            current = revision
        return missing
    finally:
        # Gives back the lock, and rolls back a revision that failed.
        await connection.close()


def revisions(folder: Path) -> list[str]:
    """The revisions of a folder, oldest first. The name of the file begins with it."""
    return sorted(path.stem.partition("_")[0] for path in folder.glob("[0-9]*_*.py"))


async def _current(connection: Any) -> str | None:
    if await connection.fetchval("SELECT to_regclass('alembic_version')") is None:
        return None
    return await connection.fetchval("SELECT version_num FROM alembic_version")


async def _lock(connection: Any) -> None:
    """Waits until nobody else migrates this database; for as long as this connection is open nobody else will."""
    deadline = asyncio.get_running_loop().time() + LOCK_SECONDS
    while not await connection.fetchval("SELECT pg_try_advisory_lock($1)", LOCK_KEY):
        if asyncio.get_running_loop().time() > deadline:
            raise MigrationError(f"another process has been migrating this database for {LOCK_SECONDS:.0f} s; end it")
        await asyncio.sleep(LOCK_POLL_SECONDS)


class _Statements:
    """Where Alembic writes SQL to: it gives one statement at a time, so that none has to be cut out of a text."""

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


def append_only(table: str) -> Sequence[str]:
    """The statements after which rows of a table can be inserted, and never changed or deleted, by whatever code.

    The trigger is one of statements that change or delete: an insert pays nothing. TRUNCATE stays: tests empty their
    databases with it, and nobody does so by mistake.
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
