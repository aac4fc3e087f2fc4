"""Taking a backup of a shop that may be running, and loading one into databases that are new.

Left out are the sessions of users: one that was ended after the backup would be alive again.
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
    Take,
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
    """Not the name that was asked for where an invariant does not hold."""
    manifest: Manifest
    report: Report
    tries: int
    """How often writes had to wait."""
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
    """Writes a backup of the databases in `dsns`, all of one moment, and audits that moment. Raises `CopyError`.

    A backup in which an invariant does not hold gets a name that says so.
    """
    with draft(target) as file:
        async with one_moment(dsns, progress=progress) as moment:
            progress(f"all databases stood still for {moment.pause_seconds * 1000:.0f} ms")
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
        # After the snapshot: a sequence, which belongs to no snapshot, is then never behind the rows.
        sequences = {
            sequence: Sequence(*await source.fetchrow(f"SELECT last_value, is_called FROM {identifier(sequence)}"))  # noqa: S608
            for (sequence,) in await source.fetch(_SEQUENCES)
        }
    return DatabaseEntry(revisions, tables, sequences)


async def _table(archive: Writer, source: Any, name: str, table: str, columns: tuple[str, ...]) -> TableEntry:
    listed = ", ".join(map(identifier, columns))
    condition = " WHERE false" if table in LEFT_OUT.get(name, ()) else ""
    query = f"SELECT {listed} FROM {identifier(table)}{condition}"  # noqa: S608  # names of the catalog
    done = ""

    async def read(take_chunk: Take) -> None:
        nonlocal done
        done = await source.copy_from_query(query, output=take_chunk, format="text", encoding="utf8")

    sha256 = await archive.write(name, table, read)
    return TableEntry(columns, int(done.rpartition(" ")[2]), sha256)


# ----------------------------------------------------------------------------------------------------------- restoring


def check_revisions(manifest: Manifest, known: Mapping[str, Mapping[str, str]]) -> None:
    """Raises `CopyError` where other revisions than those in `known`, by service, made what is in a backup."""
    way_out = (
        f"it was made by mercato {manifest.version}: restore it with the commit that made it, start that shop, and "
        "upgrade it as any other"
    )
    if manifest.databases.keys() != known.keys():
        raise CopyError(f"the backup has other services than this version of mercato; {way_out}")
    for name, entry in manifest.databases.items():
        if dict(entry.revisions) != dict(known[name]):
            newest = max(entry.revisions, default="none")
            raise CopyError(
                f"the backup has the database of {name} at revision {newest}, of which this version of mercato has "
                f"another text or others behind it; {way_out}"
            )


async def load(archive: Archive, dsns: Mapping[str, str], *, skipped: int, progress: Callable[[str], None]) -> int:
    """Fills new, migrated databases; gives how many rows there are. `dsns` are the superuser's. Raises `CopyError`.

    Each sequence goes on `skipped` ids behind where it stood in the backup.
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
    # Neither triggers nor foreign keys ask again what was asked of these rows when they were written.
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
