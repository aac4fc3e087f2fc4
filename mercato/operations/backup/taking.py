"""Taking a backup of a shop that may be running, and loading one into new databases.

A backup has no sessions of users: a session that was ended after the backup would be valid again.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from mercato import __version__
from mercato.operations.audit.checking import Report, audit
from mercato.operations.backup.archive import (
    FORMAT,
    VIOLATED,
    Archive,
    DatabaseEntry,
    Manifest,
    Sequence,
    TableEntry,
    Writer,
    draft,
    writer,
)
from mercato.operations.copying import CopyError, Moment, connected, explained, identifier, one_moment

LEFT_OUT: Final[Mapping[str, frozenset[str]]] = {"users": frozenset({"sessions", "refresh_tokens"})}
"""Tables whose rows are in no backup, by service."""

_REVISIONS: Final = "SELECT revision, checksum FROM revision_checksums ORDER BY revision"
_TABLES: Final = """
    SELECT c.relname::text AS name,
           array_agg(a.attname::text ORDER BY a.attnum) FILTER (WHERE a.attgenerated = '') AS columns
      FROM pg_class c
      JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
     WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'r'
       AND c.relname NOT IN ('alembic_version', 'revision_checksums')
     GROUP BY c.relname ORDER BY c.relname
"""
_SEQUENCES: Final = """
    SELECT c.relname::text FROM pg_class c
     WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'S' ORDER BY c.relname
"""
_SET_SEQUENCE: Final = "SELECT setval($1::text::regclass, $2, $3)"


class Taken(msgspec.Struct, frozen=True):
    """A backup that was taken."""

    path: Path
    """The requested name; with a suffix where an invariant does not hold."""
    manifest: Manifest
    report: Report
    tries: int
    """How often writes were blocked."""
    size: int
    """In bytes."""


async def take(
    target: Path,
    admin_dsn: str,
    dsns: Mapping[str, str],
    *,
    is_stopped: bool,
    progress: Callable[[str], None],
) -> Taken:
    """Writes a backup of the databases in `dsns`, all at one moment, and audits that moment. Raises `CopyError`.

    The name of a backup in which an invariant does not hold gets the suffix `VIOLATED`.
    """
    with draft(target) as file:
        async with one_moment(dsns, progress=progress) as moment:
            progress(f"writes to all databases were blocked for {moment.pause_seconds * 1000:.0f} ms")
            with writer(file) as archive:
                entries = {name: await _written(archive, moment, name, progress) for name in dsns}
                report = await audit(admin_dsn, dsns, is_stopped=is_stopped, progress=progress, moment=moment)
                manifest = Manifest(
                    FORMAT,
                    __version__,
                    moment.taken_at,
                    round(moment.pause_seconds, 3),
                    not report.violated,
                    tuple(finding.name for finding in report.violated),
                    entries,
                )
                archive.finish(manifest)
        path = target if manifest.holds else target.with_name(target.name + VIOLATED)
        size = file.stream.tell()
        file.publish(path)
    return Taken(path, manifest, report, moment.tries, size)


async def _written(archive: Writer, moment: Moment, name: str, progress: Callable[[str], None]) -> DatabaseEntry:
    source, _ = moment.snapshots[name]
    progress(f"writing {name}")
    with explained(f"the database of {name}"):
        revisions = dict(await source.fetch(_REVISIONS))
        tables: dict[str, TableEntry] = {}
        for found in await source.fetch(_TABLES):
            columns = tuple(found["columns"])
            tables[found["name"]] = await _table(archive, source, name, found["name"], columns)
        # A sequence belongs to no snapshot. Read after the snapshot, it is never behind the rows.
        sequences = {
            sequence: Sequence(*await source.fetchrow(f"SELECT last_value, is_called FROM {identifier(sequence)}"))  # noqa: S608
            for (sequence,) in await source.fetch(_SEQUENCES)
        }
    return DatabaseEntry(revisions, tables, sequences)


async def _table(archive: Writer, source: Any, name: str, table: str, columns: tuple[str, ...]) -> TableEntry:
    listed = ", ".join(map(identifier, columns))
    condition = " WHERE false" if table in LEFT_OUT.get(name, ()) else ""
    query = f"SELECT {listed} FROM {identifier(table)}{condition}"  # noqa: S608  # names of the catalog
    with archive.table(name, table) as entry:
        done: str = await source.copy_from_query(query, output=entry.write, format="text", encoding="utf8")
    return TableEntry(columns, int(done.rpartition(" ")[2]), entry.sha256)


# ----------------------------------------------------------------------------------------------------------- restoring


def check_revisions(manifest: Manifest, known: Mapping[str, Mapping[str, str]]) -> None:
    """Raises `CopyError` where a backup has other revisions than those in `known`, by service."""
    remedy = (
        f"it was made by mercato {manifest.version}: restore it with the commit that made it, start that shop, and "
        "upgrade it as any other"
    )
    if manifest.databases.keys() != known.keys():
        raise CopyError(f"the backup has other services than this version of mercato; {remedy}")
    for name, entry in manifest.databases.items():
        if dict(entry.revisions) != dict(known[name]):
            newest = max(entry.revisions, default="none")
            raise CopyError(
                f"the backup has the database of {name} at revision {newest}, of which this version of mercato has "
                f"another text or others behind it; {remedy}"
            )


async def load(archive: Archive, dsns: Mapping[str, str], *, skipped: int, progress: Callable[[str], None]) -> int:
    """Fills new, migrated databases; gives the number of rows. `dsns` are the superuser's. Raises `CopyError`.

    Each sequence continues `skipped` ids after its position in the backup.
    """
    rows = 0
    for name, entry in archive.manifest.databases.items():
        progress(f"restoring {name}")
        async with connected(dsns[name], name) as connection:
            with explained(f"the database of {name}"):
                rows += await _load(archive, connection, name, entry, skipped)
    return rows


async def _load(archive: Archive, connection: Any, name: str, entry: DatabaseEntry, skipped: int) -> int:
    has = {found["name"]: tuple(found["columns"]) for found in await connection.fetch(_TABLES)}
    sequences = {sequence for (sequence,) in await connection.fetch(_SEQUENCES)}
    if has != {table: found.columns for table, found in entry.tables.items()} or sequences != set(entry.sequences):
        raise CopyError(f"the backup has other tables of {name} than its revisions make: take another backup")
    rows = 0
    # Triggers and foreign keys do not run: these rows were checked when they were written.
    await connection.execute("BEGIN; SET LOCAL session_replication_role = replica")
    await connection.execute(f"TRUNCATE {', '.join(map(identifier, has))}")
    for table, found in entry.tables.items():
        done: str = await connection.copy_to_table(
            table,
            columns=list(found.columns),
            source=_pieces(archive, name, table),
            format="text",
            encoding="utf8",
        )
        count = int(done.rpartition(" ")[2])
        if count != found.rows:
            raise CopyError(f"the table {table} of {name} has {count} rows, and the backup names {found.rows}")
        rows += count
    for sequence, at in entry.sequences.items():
        await connection.execute(_SET_SEQUENCE, identifier(sequence), at.last_value + skipped, at.is_called)
    await connection.execute("COMMIT")
    await connection.execute("ANALYZE")
    return rows


async def _pieces(archive: Archive, name: str, table: str) -> AsyncIterator[bytes]:
    for chunk in archive.rows(name, table):
        yield chunk
