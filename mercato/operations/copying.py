"""Copies of the tables of several databases in one scratch database, for queries over all of them.

    database A ── REPEATABLE READ ──┐
    database B ── REPEATABLE READ ──┼─ binary COPY ──► scratch database: schemas a, b, c in ONE open transaction
    database C ── REPEATABLE READ ──┘                                    which is rolled back at the end

Guaranteed
    - The copy of a database is one snapshot of it. All snapshots are taken within milliseconds, after the last
      connection is open and the clock of each server was read, and none before `Copies.taken_at`: what was committed by
      then is in every copy. That is so whatever the clocks of several servers show: `taken_at` is the earliest of them.
    - The databases are only read, and none of their statements waits for the copying.
    - Nothing is left of the copies, however the process ends: they are never committed. The server rolls back the
      transaction of a killed process; after the server is killed, recovery empties the tables, which are unlogged.
    - Copies are made one after the other: another process waits until the first copies are removed.

The databases may be on several servers, and the scratch database on another one. A `Moment` is one moment on several
servers too: each holds its locks until all have their snapshots, so that no transaction is half in it. Only its time is
that of several clocks.

The snapshots are released as soon as everything is copied, before the first query: an old snapshot keeps the server
from vacuuming.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Generator, Mapping, Sequence
from typing import Any, Final

import asyncpg  # pyright: ignore[reportMissingTypeStubs]  # it has no types
import msgspec

from mercato.chassis.postgres.dsn import DSN_FORM, lacks_certificates, shown
from mercato.chassis.postgres.provisioning import create_database
from mercato.chassis.postgres.sessions import SAME_EVERYWHERE, WHOLE_TABLES, as_administrator, connect

QUEUE_SECONDS: Final = 600.0
CLOCK_NOTICE_SECONDS: Final = 1.0
"""A difference of the servers' clocks that is mentioned. NTP keeps it, and reading them takes, within milliseconds."""
LOCK_KEY: Final = 0x636F7079  # "copy"
CHUNKS_IN_FLIGHT: Final = 16
"""Of up to 64 KiB each, between the source database and the scratch database."""
SCRATCH: Final = "mercato_audit"

# These settings include no time-out for idle transactions: it would end snapshots that wait to be copied.
_SESSION: Final = {
    **SAME_EVERYWHERE,
    **WHOLE_TABLES,
    "application_name": "mercato-copying",
    "statement_timeout": "0",
    "lock_timeout": "10s",
    "jit": "off",
    # An interrupted process closes its connection. Without this, the server would continue the statement, and block
    # other copies, until it has a result to send.
    "client_connection_check_interval": "1s",
}


# Below `deadlock_timeout` (1 s): a pause that deadlocks with a service gives up before the server ends one of the two.
PAUSE_LOCK_MILLISECONDS: Final = 500
PAUSE_SECONDS: Final = 2.0
"""The longest attempt to lock all databases; the server ends the transaction of a process that hangs."""
PAUSE_TRIES: Final = 10
_PAUSE: Final = f"""
    BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY;
    SAVEPOINT pause;
    SET LOCAL lock_timeout = '{PAUSE_LOCK_MILLISECONDS}ms';
    SET LOCAL idle_in_transaction_session_timeout = '{PAUSE_SECONDS:.0f}s';
"""
_WRITTEN: Final = """
    SELECT string_agg(format('%I', c.relname), ', ' ORDER BY c.relname)
    FROM pg_class c
    WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'r'
"""


_DRIVER_ERRORS: Final = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,
    TimeoutError,
    ValueError,
)


# The errors of a statement whose server is lost; any other error is a bug of the statement.
_LOST: Final = (
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,
    TimeoutError,
)


# Errors after which locking all tables is tried again: a long transaction, or a server that ended the session.
_BUSY: Final = (asyncpg.LockNotAvailableError, asyncpg.QueryCanceledError, asyncpg.DeadlockDetectedError, TimeoutError)


class CopyError(Exception):
    """A sentence for the operator: which server or database has a problem, and how to solve it."""


class Table(msgspec.Struct, frozen=True):
    """The copied part of a table: `columns` are expressions over its own, so that secret or large values stay there.

    An expression that is not just a column has a name: `answer IS NOT NULL AS answered`.
    """

    name: str
    columns: tuple[str, ...]
    source: str = ""
    """The FROM clause, where it is not just the table: a row may become several."""

    @property
    def query(self) -> str:
        return f"SELECT {', '.join(self.columns)} FROM {self.source or identifier(self.name)}"  # noqa: S608  # no value is in it


class Moment(msgspec.Struct, frozen=True):
    """A snapshot of each database, all at one moment at which no transaction was writing."""

    snapshots: Mapping[str, tuple[Any, datetime.datetime]]
    """By the name of the database: a connection in a read-only transaction, and the moment by the server's clock."""
    taken_at: datetime.datetime
    """By the clock that is behind the others."""
    pause_seconds: float
    """How long writes were blocked, in the longest attempt."""
    tries: int


class Copies:
    """The copies, in a transaction that no other session sees and that ends with `copied`."""

    def __init__(self, connection: Any, clocks: Collection[datetime.datetime]) -> None:
        self._connection = connection
        self.taken_at = min(clocks)
        """Right before the first snapshot, by the server's clock; of several servers, by the one that is behind."""
        self.clock_difference_seconds = round((max(clocks) - self.taken_at).total_seconds(), 3)
        """How far it is behind, and the time that reading all clocks took."""
        self.rows = 0
        """The number of copied rows."""

    async def fetch(self, sql: str, *values: object) -> list[dict[str, Any]]:
        """All rows, by the names of their columns. This and the methods below raise `CopyError` for a lost server."""
        with explained("the copies", _LOST):
            return [dict(record) for record in await self._connection.fetch(sql, *values)]

    async def execute(self, sql: str, *values: object) -> None:
        """Changes the copies; `sql` may have several statements where there are no values."""
        with explained("the copies", _LOST):
            await self._connection.execute(sql, *values)

    async def fill(
        self, schema: str, table: str, columns: Mapping[str, str], rows: Sequence[tuple[object, ...]]
    ) -> None:
        """Creates a table that is no copy: `columns` are names and types, `rows` have their order."""
        with explained("the copies", _LOST):
            await self._make_table(schema, table, columns)
            await self._connection.copy_records_to_table(table, schema_name=schema, columns=list(columns), records=rows)

    @contextlib.asynccontextmanager
    async def undone(self) -> AsyncGenerator[None]:
        """Rolls back the changes of this block at its end."""
        await self._connection.execute("SAVEPOINT undone")
        try:
            yield
        finally:
            await self._connection.execute("ROLLBACK TO SAVEPOINT undone; RELEASE SAVEPOINT undone")

    async def take(self, source: Any, schema: str, table: Table) -> None:
        """Copies one table from the open snapshot of `source`."""
        statement = await source.prepare(table.query)
        columns = {attribute.name: attribute.type.name for attribute in statement.get_attributes()}
        await self._make_table(schema, table.name, columns)
        chunks: asyncio.Queue[bytes | None] = asyncio.Queue(CHUNKS_IN_FLIGHT)

        async def read() -> None:
            await source.copy_from_query(table.query, output=chunks.put, format="binary")
            await chunks.put(None)

        async def write() -> None:
            done: str = await self._connection.copy_to_table(
                table.name, schema_name=schema, columns=list(columns), source=_until_none(chunks), format="binary"
            )
            self.rows += int(done.rpartition(" ")[2])

        await _both(read(), write())

    async def _make_table(self, schema: str, table: str, columns: Mapping[str, str]) -> None:
        listed = ", ".join(f"{identifier(name)} {kind}" for name, kind in columns.items())
        name = f"{identifier(schema)}.{identifier(table)}"
        await self._connection.execute(
            f"CREATE SCHEMA IF NOT EXISTS {identifier(schema)}; CREATE UNLOGGED TABLE {name} ({listed})"
        )


@contextlib.asynccontextmanager
async def copied(
    admin_dsn: str,
    dsns: Mapping[str, str],
    wanted: Mapping[str, Sequence[Table]],
    *,
    progress: Callable[[str], None],
    scratch: str = SCRATCH,
    moment: Moment | None = None,
) -> AsyncGenerator[Copies]:
    """Copies the `wanted` tables of each database (by its name in `dsns`) into the scratch database, for this block.

    `admin_dsn` names the server that has, or gets, the scratch database, and a role that may create one. The block may
    query and change the copies. `progress` gets lines of text about steps that take time. With `moment`, its snapshots
    are copied, and stay open. Raises `CopyError`.
    """
    scratch_dsn = await ensured(admin_dsn, scratch)
    async with contextlib.AsyncExitStack() as stack:
        connection = await stack.enter_async_context(connected(scratch_dsn, scratch))
        with explained(f"the database {scratch}"):
            await _take_turn(connection, progress)
            await connection.execute("BEGIN; SET LOCAL work_mem = '64MB'")
        async with contextlib.AsyncExitStack() as reading:
            sources = (
                moment.snapshots
                if moment is not None
                else await _snapshots(reading, {name: dsns[name] for name in wanted})
            )
            copies = Copies(connection, [clock for _, clock in sources.values()])
            if copies.clock_difference_seconds >= CLOCK_NOTICE_SECONDS:
                progress(
                    f"the clocks of the databases' servers differ by {copies.clock_difference_seconds:.1f} s: work "
                    "counts as finished so much later; synchronize them"
                )
            for name in wanted:
                source, _ = sources[name]
                progress(f"copying {name}")
                for table in wanted[name]:
                    await _copy_table(copies, source, name, table)
        with explained(f"the copies in {scratch}"):
            await connection.execute("ANALYZE")
        yield copies


async def _take_turn(connection: Any, progress: Callable[[str], None]) -> None:
    """Waits until no other process has copies, and keeps others from making any while this connection is open."""
    if await connection.fetchval("SELECT pg_try_advisory_lock($1)", LOCK_KEY):
        return
    progress("waiting for others to finish with their copies")
    await connection.execute("SET lock_timeout = 0")
    try:
        await connection.execute("SELECT pg_advisory_lock($1)", LOCK_KEY, timeout=QUEUE_SECONDS)
    except TimeoutError:
        raise CopyError(
            f"another process has used {SCRATCH} for {QUEUE_SECONDS:.0f} s: wait for it, or end it"
        ) from None


async def _snapshots(
    stack: contextlib.AsyncExitStack, dsns: Mapping[str, str]
) -> dict[str, tuple[Any, datetime.datetime]]:
    """A connection with an open snapshot for each database, and the time of its server's clock before all of them."""
    opened = {name: await stack.enter_async_context(connected(dsn, name)) for name, dsn in dsns.items()}
    with explained("the databases"):
        clocks = await begin_together(opened)
    return {name: (opened[name], clocks[name]) for name in opened}


async def begin_together(opened: Mapping[str, Any]) -> Mapping[str, datetime.datetime]:
    """Begins a transaction with a snapshot on each of the connections; gives the clock of each server before that.

    All clocks are read before the first snapshot. So what a server stamped with a time before its own was committed, or
    was read by the transaction that stamped it, before every snapshot.
    """

    async def read_clock(connection: Any) -> datetime.datetime:
        return await connection.fetchval("SELECT clock_timestamp()")

    async def begin(connection: Any) -> None:
        await connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        await connection.execute("SELECT 1")  # takes the snapshot

    clocks = await asyncio.gather(*map(read_clock, opened.values()))
    await asyncio.gather(*map(begin, opened.values()))
    return dict(zip(opened, clocks, strict=True))


@contextlib.asynccontextmanager
async def one_moment(dsns: Mapping[str, str], *, progress: Callable[[str], None]) -> AsyncGenerator[Moment]:
    """A snapshot of each database, all at one moment, for the time of the block.

    All tables of all databases are locked against writes until each database has its snapshot; reads continue. An
    attempt that meets a long transaction releases all locks at once, and another follows. Raises `CopyError`.
    """
    longest = 0.0
    for tried in range(1, PAUSE_TRIES + 1):
        began = time.monotonic()
        async with contextlib.AsyncExitStack() as stack:
            opened = {name: await stack.enter_async_context(connected(dsn, name)) for name, dsn in dsns.items()}
            with explained("the databases"):
                tables = {name: await connection.fetchval(_WRITTEN) for name, connection in opened.items()}
            began = time.monotonic()
            moments = await _snapshots_under_locks(opened, tables)
            longest = max(longest, time.monotonic() - began)
            if moments is not None:
                snapshots = {name: (opened[name], moments[name]) for name in opened}
                yield Moment(snapshots, min(moments.values()), longest, tried)
                return
        progress("a transaction of the shop takes long: trying again in a moment")
        await asyncio.sleep(random.uniform(0.5, 1.0))  # no secret
    raise CopyError(
        f"the shop wrote without a gap of {PAUSE_LOCK_MILLISECONDS} ms in {PAUSE_TRIES} tries: try again when there is "
        "less to do"
    )


async def _snapshots_under_locks(
    opened: Mapping[str, Any], tables: Mapping[str, str | None]
) -> Mapping[str, datetime.datetime] | None:
    """Takes a snapshot in each of the connections while writes are blocked in all; None where that took too long."""

    async def lock(name: str) -> None:
        await opened[name].execute(_PAUSE)
        if tables[name]:
            await opened[name].execute(f"LOCK TABLE {tables[name]} IN SHARE MODE")

    async def begin(name: str) -> datetime.datetime:
        return await opened[name].fetchval("SELECT clock_timestamp()")

    async def release(name: str) -> None:
        # Releases the locks. The snapshot belongs to the transaction, and stays.
        await opened[name].execute("ROLLBACK TO SAVEPOINT pause")

    with explained("the databases"):
        try:
            async with asyncio.timeout(PAUSE_SECONDS):
                await asyncio.gather(*(lock(name) for name in opened))
                moments = await asyncio.gather(*(begin(name) for name in opened))
                await asyncio.gather(*(release(name) for name in opened))
        except _BUSY:
            return None
    return dict(zip(opened, moments, strict=True))


async def _copy_table(copies: Copies, source: Any, name: str, table: Table) -> None:
    with explained(f"the table {table.name} of {name}"):
        try:
            await copies.take(source, name, table)
        except (asyncpg.UndefinedTableError, asyncpg.UndefinedColumnError) as error:
            raise CopyError(
                f"the database of {name} is of another version ({error}): start this version of the shop on it once"
            ) from error


async def _both(first: Any, second: Any) -> None:
    """Runs two coroutines; the first failure ends the other and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(first)
            group.create_task(second)
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None


async def _until_none(chunks: asyncio.Queue[bytes | None]) -> AsyncIterator[bytes]:
    while (chunk := await chunks.get()) is not None:
        yield chunk


# ----------------------------------------------------------------------------------------------------------- databases


async def located(admin_dsn: str, services: Sequence[str], *, prefix: str = "mercato_") -> dict[str, str]:
    """The DSN of each service's database, for the administrator. Raises `CopyError` where a database is missing."""
    async with connected(admin_dsn, "the server") as connection:
        with explained("the server"):
            names = set(await connection.fetchval("SELECT array_agg(datname::text) FROM pg_database"))
    if missing := [prefix + service for service in services if prefix + service not in names]:
        raise CopyError(
            f"{shown(admin_dsn)} has no database {missing[0]}: start a shop on that server once, or name the one that "
            f"has it, as in --dsn {missing[0].removeprefix(prefix)}=DSN"
        )
    return {service: as_administrator(admin_dsn, prefix + service) for service in services}


async def ensured(admin_dsn: str, name: str) -> str:
    """The DSN of a database, which is created where it is missing, and closed to other roles. Raises `CopyError`."""
    async with connected(admin_dsn, "the server") as connection:
        with explained(f"the database {name}"):
            if not await connection.fetchval("SELECT true FROM pg_database WHERE datname = $1", name):
                # Another process may create the same database at the same moment.
                with contextlib.suppress(asyncpg.DuplicateDatabaseError, asyncpg.UniqueViolationError):
                    await create_database(connection, name)
            if await connection.fetchval("SELECT has_database_privilege('public', $1, 'CONNECT')", name):
                await connection.execute(f"REVOKE ALL ON DATABASE {identifier(name)} FROM PUBLIC")
    return as_administrator(admin_dsn, name)


@contextlib.asynccontextmanager
async def connected(dsn: str, what: str) -> AsyncGenerator[Any]:
    """A connection that reads whole tables, for the time of the block. Raises `CopyError`."""
    if missing := _lacks_certificates(dsn):
        raise CopyError(f"{what} cannot be reached at {shown(dsn)}: its DSN asks to verify the server, {missing}")
    try:
        connection = await connect(dsn, _SESSION)
    except ValueError as error:  # its text may contain a part of the password that was parsed as the port
        raise CopyError(f"{what} cannot be reached at {shown(dsn)}: {DSN_FORM}") from error
    except _DRIVER_ERRORS as error:
        raise CopyError(
            f"{what} cannot be reached at {shown(dsn)}: {_reason(error)}; check that the shop or its server is running "
            "and that host, user and password are right"
        ) from error
    try:
        yield connection
    finally:
        # Not `close()`, which would wait for a cancelled statement. The server rolls back.
        connection.terminate()


def _lacks_certificates(dsn: str) -> str:
    with contextlib.suppress(ValueError):  # it is not a DSN, which the connection finds
        return lacks_certificates(dsn)
    return ""


@contextlib.contextmanager
def explained(what: str, errors: tuple[type[Exception], ...] = _DRIVER_ERRORS) -> Generator[None]:
    """Turns an error of the driver into a sentence that names what could not be used."""
    try:
        yield
    except errors as error:
        if isinstance(error, asyncpg.InsufficientPrivilegeError):
            raise CopyError(
                f"{what} may not be used by the role of its DSN: {_reason(error)}; take the DSN of a superuser"
            ) from error
        raise CopyError(f"{what} cannot be used: {_reason(error)}; try again when the server works") from error


def _reason(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__


def identifier(name: str) -> str:
    """A quoted identifier of SQL."""
    return '"' + name.replace('"', '""') + '"'
