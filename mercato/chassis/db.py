"""PostgreSQL, and the only seam to its driver.

A service opens `db.transaction()` to change something and `db.read()` to look; its `store.py` gets the `tx` and runs
SQL through it. Rows come back as frozen structs: `tx.fetch(UserRow, "SELECT id, name ...")` fills `UserRow` in the
order of the columns (a test compares the names of both for every statement).

The rules that the rest relies on
    - Only this module commits. A commit that succeeded, or whose outcome is unknown, is noted on the running attempt,
      so that the batch is not run again.
    - The events of a transaction are written with its COMMIT, in one message: the lock that orders the rows of the
      outbox is never held while the server waits for this process.
    - No remote call inside a transaction: the client refuses it.
    - Connections are not reset between uses (that halves the cost of a read), so nothing may be left on them:
      `SET LOCAL` only, locks of a transaction only. A test holds this.
    - Driver errors are translated here: lost or refused connections become `Unavailable`, the rest that a service can
      act on is `UniqueViolation` or `LockTimeout`.
    - A connection that was lost while nothing had been done on it is replaced once, unseen: after a restart of the
      server the first batch works. Nothing had been done means: a statement of `read()`, or the BEGIN of a transaction.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from typing import Any, Final, NoReturn, TypeVar, cast

import asyncpg  # pyright: ignore[reportMissingTypeStubs]  # the driver has no types; this module is the typed seam
import msgspec
from asyncpg.protocol import protocol as _protocol  # pyright: ignore[reportMissingTypeStubs]

from .contract import FrozenMeta, ServiceError, Unavailable
from .messaging import rows
from .rpc import Attempt, attempt
from .telemetry import Telemetry

R = TypeVar("R", bound="Row")
T = TypeVar("T")

OLDEST_VERSION: Final = 16
STATEMENT_SECONDS: Final = 10.0
CONNECT_SECONDS: Final = 5.0
PING_SECONDS: Final = 1.0
ACQUIRE_SECONDS: Final = 5.0
CLOSE_SECONDS: Final = 2.0


_SETTINGS: Final = {
    # Batches are short statements that are run very often: compiling them costs more than it saves.
    "jit": "off",
    # They find their rows by keys. A plan is made once for a connection, perhaps when the table was new and reading all
    # of it was the cheapest way; it must not stay so when there are a million rows.
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    # Events are written as literals, in which a backslash is a backslash.
    "standard_conforming_strings": "on",
    # A process that was stopped in the middle of a transaction must not hold others up for ever.
    "idle_in_transaction_session_timeout": "10s",
}


OUTBOX_LOCK: Final = 0x6F757462  # "outb"
_WRITE_EVENTS: Final = f"INSERT INTO outbox (events) SELECT $1 FROM pg_advisory_xact_lock({OUTBOX_LOCK})"  # noqa: S608
"""The default of `id` is taken after the lock, which ends with the transaction: ids are in the order of commits."""


def check_containers_by_type(protocol: Any) -> bool:
    """Makes the driver accept only lists and tuples as arrays. False, and nothing changed: it is another driver.

    It asks abstract base classes whether each element of an array is itself a container, which costs more than to
    encode the element: 0.42 against 0.20 us a value.
    """
    names = ("IterableABC", "SizedABC", "MappingABC")
    if not all(hasattr(protocol, name) for name in names):
        return False
    protocol.IterableABC = protocol.SizedABC = (list, tuple)
    protocol.MappingABC = dict
    return True


check_containers_by_type(_protocol)


class Row(msgspec.Struct, frozen=True, gc=False, metaclass=FrozenMeta):
    """A row as it came from the database. Fields in the order of the columns of the statement that fills it."""


class UniqueViolation(Exception):
    """A unique key refused a row. `constraint` is the key's name."""

    def __init__(self, constraint: str) -> None:
        super().__init__(constraint)
        self.constraint = constraint


class LockTimeout(Exception):
    """Somebody else held a row or key for longer than this transaction was willing to wait."""


class RolledBackError(AssertionError):
    """A statement failed, and the block went on as if it had not: PostgreSQL answered its COMMIT with a roll-back."""


class Tx:
    """What a store runs its statements on. `events` are written when the transaction commits."""

    __slots__ = ("_lease", "_service", "_writable", "events")

    def __init__(self, lease: _Lease, service: str, *, writable: bool) -> None:
        self.events: list[rows.Outgoing] = []
        self._lease = lease
        self._service = service
        self._writable = writable

    async def fetch(self, row: type[R], sql: str, *values: object) -> list[R]:
        """All rows."""
        return [row(*record) for record in await self._run("fetch", sql, values)]

    async def fetch_one(self, row: type[R], sql: str, *values: object) -> R | None:
        """The first row."""
        record = await self._run("fetchrow", sql, values)
        return None if record is None else row(*record)

    async def fetch_values(self, kind: type[T], sql: str, *values: object) -> list[T]:
        """The first column of all rows."""
        return [record[0] for record in await self._run("fetch", sql, values)]

    async def execute(self, sql: str, *values: object) -> int:
        """The number of rows that the statement changed."""
        status: str = await self._run("execute", sql, values)
        count = status.rpartition(" ")[2]
        return int(count) if count.isdigit() else 0

    async def _run(self, method: str, sql: str, values: Sequence[object]) -> Any:
        if not self._writable and sql not in _known_reads:
            _check_read(sql)
        try:
            return await getattr(self._lease.connection, method)(sql, *values)
        except _DRIVER_ERRORS as error:
            if self._writable or not self._lease.is_lost(error):
                _raise_translated(error, self._service)
        await self._lease.renew()
        try:
            return await getattr(self._lease.connection, method)(sql, *values)
        except _DRIVER_ERRORS as error:
            _raise_translated(error, self._service)


_known_reads: Final[set[str]] = set()
_CHANGES: Final = re.compile(
    r"\b(INSERT|UPDATE|DELETE|MERGE|TRUNCATE|INTO|CREATE|ALTER|DROP|LOCK|COPY|CALL|DO|SET|nextval|setval)\b",
    re.IGNORECASE,
)
_QUOTED: Final = re.compile(r"'[^']*'|\"[^\"]*\"|--[^\n]*")


def _check_read(sql: str) -> None:
    # A change outside `transaction` would commit without being noted, and could then be run a second time.
    assert not _CHANGES.search(_QUOTED.sub("", sql)), f"db.read() does not change or lock anything: {sql}"
    _known_reads.add(sql)


class _Connection(asyncpg.Connection):
    """A connection that has prepared the statement which writes events, from the first transaction on that has any."""

    __slots__ = ("_events_prepared", "_events_tried")

    def __init__(self, *values: Any, **options: Any) -> None:
        super().__init__(*values, **options)  # pyright: ignore[reportUnknownMemberType]
        self._events_prepared = ""
        self._events_tried = 0

    async def prepare_events(self) -> str:
        """The name of the statement. It has a new one after an attempt of which nothing is known."""
        if not self._events_prepared:
            self._events_tried += 1
            execute = cast(Any, self).execute
            await execute(f"PREPARE mercato_events_{self._events_tried} (text) AS {_WRITE_EVENTS}")
            self._events_prepared = f"mercato_events_{self._events_tried}"
        return self._events_prepared


class _Lease:
    """A connection of the pool for the time of one block."""

    __slots__ = ("_pool", "_renewed", "_service", "connection", "is_rolled_back")

    def __init__(self, pool: Any, service: str) -> None:
        self.is_rolled_back = False
        self._pool = pool
        self._service = service
        self._renewed = False
        self.connection: Any = None

    async def acquire(self) -> None:
        try:
            self.connection = await self._pool.acquire(timeout=ACQUIRE_SECONDS)
        except _DRIVER_ERRORS as error:
            # Whatever the reason: without a connection nothing is done, and nothing is the statement's fault.
            raise Unavailable(service=self._service) from error

    async def release(self) -> None:
        connection, self.connection = self.connection, None
        if connection is not None:
            with contextlib.suppress(*_DRIVER_ERRORS):
                await self._pool.release(connection)

    def is_lost(self, error: Exception) -> bool:
        """True where `error` says that the connection is gone, and it may be replaced: once in a block."""
        return not self._renewed and _lost(error)

    async def renew(self) -> None:
        """A connection made now: the others of the pool are probably as dead as this one was."""
        self._renewed = True
        await self.release()
        await self._pool.expire_connections()
        await self.acquire()

    async def begin(self) -> None:
        try:
            await self.connection.execute("BEGIN")
            return
        except asyncio.CancelledError:
            # The server may have begun all the same, and nobody goes on: the connection must not stay like that.
            await self.roll_back()
            raise
        except _DRIVER_ERRORS as error:
            if not self.is_lost(error):
                _raise_translated(error, self._service)
        await self.renew()
        await self._step("BEGIN")

    async def commit(self, events: Sequence[str]) -> None:
        """Writes the rows of the outbox and commits. `is_rolled_back` says whether a failure is known to be one.

        Raises `RolledBackError` where nothing was committed because a statement before had failed.
        """
        try:
            outcome: str = await self.connection.execute(await self._with_events(events) if events else "COMMIT")
        except asyncio.CancelledError:
            await self.roll_back()  # where it came too late, nothing happens
            raise
        except asyncpg.InFailedSQLTransactionError:
            await self.roll_back()
            outcome = "ROLLBACK"
        except _DRIVER_ERRORS as error:
            if getattr(error, "severity_en", None) == "ERROR" and self.connection.is_in_transaction():
                # A statement before the COMMIT failed, and the server has told so: it skips the rest of the message.
                await self.roll_back()
                self.is_rolled_back = True
            _raise_translated(error, self._service)
        if outcome != "COMMIT":
            self.is_rolled_back = True
            raise RolledBackError("an error inside the transaction was caught there; nothing was committed")

    async def _with_events(self, events: Sequence[str]) -> str:
        # As literals, so that a single message carries the rows and the COMMIT: a process that is stopped between two
        # messages would hold the lock, and every writer of the service up. Prepared, because planning costs more than
        # the literals do. A lock timeout of this transaction was not meant for this lock.
        name = await self.connection.prepare_events()
        literals = [row.replace("'", "''") for row in events]
        writes = "; ".join([f"EXECUTE {name} ('{literal}')" for literal in literals])
        return f"SET LOCAL lock_timeout = 0; {writes}; COMMIT"

    async def roll_back(self) -> None:
        with contextlib.suppress(*_DRIVER_ERRORS):  # a lost connection has rolled back by itself
            await self.connection.execute("ROLLBACK")

    async def _step(self, sql: str) -> str:
        try:
            return await self.connection.execute(sql)
        except _DRIVER_ERRORS as error:
            _raise_translated(error, self._service)


class Database:
    """The database of one service, through a pool of at most `size` connections."""

    def __init__(self, dsn: str, service: str, telemetry: Telemetry, *, size: int = 6) -> None:
        self.service = service
        self.size = size
        self._dsn = dsn
        self._pool: Any = None
        self.on_events: list[Callable[[], None]] = []
        """Called after the commit of a transaction with events."""
        self._busy = telemetry.pool_busy.labels(service)
        telemetry.pool_size.labels(service).set(size)

    async def open(self) -> None:
        """Opens the pool with one connection; the others come when they are needed. Raises `Unavailable`."""
        try:
            self._pool = await asyncpg.create_pool(  # pyright: ignore[reportUnknownMemberType]
                self._dsn,
                min_size=1,
                max_size=self.size,
                timeout=CONNECT_SECONDS,
                command_timeout=STATEMENT_SECONDS,
                max_inactive_connection_lifetime=0,
                connection_class=_Connection,
                reset=_leave_as_is,
                server_settings={**_SETTINGS, "application_name": f"mercato-{self.service}"},
            )
        except _DRIVER_ERRORS as error:
            raise translated(error, self.service) from error

    async def close(self) -> None:
        """Waits for what runs, then closes; after `CLOSE_SECONDS` it no longer waits."""
        if self._pool is None:
            return
        pool, self._pool = self._pool, None
        try:
            await asyncio.wait_for(pool.close(), CLOSE_SECONDS)
        except _DRIVER_ERRORS:
            pool.terminate()

    async def answers(self) -> bool:
        """Whether the database answers now, within a second."""
        try:
            async with asyncio.timeout(PING_SECONDS), self.read() as tx:
                return await tx.fetch_values(int, "SELECT 1") == [1]
        except (ServiceError, TimeoutError):
            return False

    @contextlib.asynccontextmanager
    async def read(self) -> AsyncGenerator[Tx]:
        """Statements that change nothing, each seeing what is committed when it starts."""
        async with self._lease() as lease:
            yield Tx(lease, self.service, writable=False)

    @contextlib.asynccontextmanager
    async def transaction(self) -> AsyncGenerator[Tx]:
        """Commits at the end of the block, with the events that it has emitted; rolls back when the block raises."""
        with _attempt() as made:
            async with self._lease() as lease:
                await lease.begin()
                made.open_transactions += 1
                tx = Tx(lease, self.service, writable=True)
                try:
                    yield tx
                    events = rows.pack(tx.events) if tx.events else ()
                except BaseException:
                    await lease.roll_back()
                    raise
                finally:
                    made.open_transactions -= 1
                await self._commit(lease, made, events)
        if events:
            for wake in self.on_events:
                wake()

    async def _commit(self, lease: _Lease, made: Attempt, events: Sequence[str]) -> None:
        before = made.committed
        # Noted before it is tried: when the answer to COMMIT is lost, it may have happened.
        made.committed = True
        try:
            await lease.commit(events)
        except (UniqueViolation, asyncpg.IntegrityConstraintViolationError):
            made.committed = before  # the server has said that it has not
            raise
        except Exception:
            if lease.is_rolled_back:
                made.committed = before
            raise

    @contextlib.asynccontextmanager
    async def _lease(self) -> AsyncGenerator[_Lease]:
        if self._pool is None:
            raise Unavailable(service=self.service)
        lease = _Lease(self._pool, self.service)
        await lease.acquire()
        self._busy.inc()
        try:
            yield lease
        finally:
            self._busy.dec()
            await lease.release()


@contextlib.contextmanager
def _attempt() -> Generator[Attempt]:
    """The running attempt; one for this transaction where there is none, as in a loop or a start-up step."""
    made = attempt.get()
    if made is not None:
        yield made
        return
    token = attempt.set(made := Attempt())
    try:
        yield made
    finally:
        attempt.reset(token)


async def _leave_as_is(_connection: Any) -> None:
    """Takes the place of the driver's reset between two uses of a connection. See the top of this file.

    A transaction that a cancelled roll-back left open, the driver still ends by itself.
    """


# ---------------------------------------------------------------------------------------------------------- errors

# The driver's InternalClientError is what a statement meets on a connection that the server ended in this very moment.
_DRIVER_ERRORS: Final = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,
    TimeoutError,
)

# The server is not there, goes away, or has no room: nothing that the statement itself is to blame for.
_UNAVAILABLE: Final = (
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.ObjectNotInPrerequisiteStateError,
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.PostgresIOError,
    asyncpg.InternalClientError,
    OSError,
    TimeoutError,
)

_LOST: Final = (
    asyncpg.PostgresConnectionError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.CannotConnectNowError,
    asyncpg.InternalClientError,
    ConnectionError,
)

# The driver's InterfaceError stands for a connection that is gone as well as for a wrong use of it (a value of the
# wrong type, two statements at once); only its words tell them apart.
_GONE: Final = re.compile(r"\bclos(ed|ing)\b|released back to the pool")


def translated(error: Exception, service: str) -> Exception:
    """The chassis' own word for a driver's error; the error itself where it is a bug of a statement."""
    if isinstance(error, asyncpg.UniqueViolationError):
        return UniqueViolation(str(getattr(error, "constraint_name", "") or ""))
    if isinstance(error, asyncpg.LockNotAvailableError):
        return LockTimeout(service)
    if isinstance(error, _UNAVAILABLE) or _lost(error):
        return Unavailable(service=service)
    return error


def _lost(error: Exception) -> bool:
    if isinstance(error, asyncpg.InterfaceError):
        return not isinstance(error, ValueError) and _GONE.search(str(error)) is not None
    return isinstance(error, _LOST)


def _raise_translated(error: Exception, service: str) -> NoReturn:
    known = translated(error, service)
    if known is error:
        raise error
    raise known from error
