"""Connections to PostgreSQL, and what their driver says: the one module that runs statements through it.

A `LentConnection` serves one block of `database.py`. `Connections` lends them: it keeps those that are idle on a stack
of its own, and asks the pool of the driver when there is none. Each use of the pool costs a timer, a task and a proxy,
a use of the stack none of them. The pool still makes connections, bounds their number, hands them to callers that wait,
and takes back every connection whose block has not ended well.

Driver errors are translated here: lost or refused connections become `Unavailable`, the rest that a service can act on
is `UniqueViolation` or `LockTimeout`.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Sequence
from typing import Any, Final, NoReturn, Self, cast

import asyncpg  # pyright: ignore[reportMissingTypeStubs]  # the driver has no types; this module is the typed seam
from asyncpg.protocol import protocol as _protocol  # pyright: ignore[reportMissingTypeStubs]

from mercato.chassis.contract import Unavailable

from .sessions import is_pooled

OLDEST_VERSION: Final = 16
"""Of PostgreSQL."""
STATEMENT_SECONDS: Final = 10.0
CONNECT_SECONDS: Final = 30.0
"""At the start of a process, whose database may be as busy as the machine. Later a batch waits for at most
`ACQUIRE_SECONDS` for a connection, whether it is a new one or one of those that there are."""
ACQUIRE_SECONDS: Final = 5.0
CLOSE_SECONDS: Final = 2.0


OUTBOX_LOCK: Final = 0x6F757462  # "outb"
_WRITE_EVENTS: Final = f"INSERT INTO outbox (events) SELECT %s FROM pg_advisory_xact_lock({OUTBOX_LOCK})"  # noqa: S608
"""The default of `id` is taken after the lock, which ends with the transaction: ids are in the order of commits."""


def check_containers_by_type(protocol: Any) -> bool:
    """Makes the driver accept only lists and tuples as arrays. False, and nothing changed: it is another driver.

    It asks abstract base classes whether each element of an array is itself a container, which costs more than to
    encode the element.
    """
    names = ("IterableABC", "SizedABC", "MappingABC")
    if not all(hasattr(protocol, name) for name in names):
        return False
    protocol.IterableABC = protocol.SizedABC = (list, tuple)
    protocol.MappingABC = dict
    return True


check_containers_by_type(_protocol)


class UniqueViolation(Exception):
    """A unique key refused a row. `constraint` is the key's name."""

    def __init__(self, constraint: str) -> None:
        super().__init__(constraint)
        self.constraint = constraint


class LockTimeout(Exception):
    """Another transaction held a row or key for longer than this transaction was willing to wait."""


class RolledBackError(AssertionError):
    """A statement failed, and the block went on as if it had not: PostgreSQL answered its COMMIT with a roll-back."""


class _Connection(asyncpg.Connection):
    """A connection that has prepared the statement which writes events, from the first transaction on that has any.

    Behind a pooler it has not: the next transaction may meet another session.
    """

    __slots__ = ("_events_prepared", "_events_tried", "_is_pooled")

    def __init__(self, *values: Any, **options: Any) -> None:
        super().__init__(*values, **options)  # pyright: ignore[reportUnknownMemberType]
        self._events_prepared = ""
        self._events_tried = 0
        self._is_pooled: bool | None = None

    async def prepare_events(self) -> str:
        """The name of the statement, empty behind a pooler. It has a new one after an attempt that ended unknown."""
        if self._is_pooled is None:
            self._is_pooled = await is_pooled(self)
        if not self._events_prepared and not self._is_pooled:
            self._events_tried += 1
            execute = cast(Any, self).execute
            await execute(f"PREPARE mercato_events_{self._events_tried} (text) AS {_WRITE_EVENTS % '$1'}")
            self._events_prepared = f"mercato_events_{self._events_tried}"
        return self._events_prepared


class Connections:
    """At most `size` connections to the database of one service. Lent by `acquire`, given back by `release`."""

    def __init__(self, pool: Any, service: str) -> None:
        self.service = service
        self._pool = pool
        self._idle: list[Any] = []
        """Taken from the pool and not in use; the last one is used next, so that few are used often."""
        self._waiting = 0
        """Who asks the pool at this moment."""
        self._is_closing = False

    @classmethod
    async def open(cls, dsn: str, service: str, size: int) -> Self:
        """Makes one connection; the others are made when they are needed. Raises `Unavailable`."""
        try:
            pool = await asyncpg.create_pool(  # pyright: ignore[reportUnknownMemberType]
                dsn,
                min_size=1,
                max_size=size,
                timeout=CONNECT_SECONDS,
                command_timeout=STATEMENT_SECONDS,
                max_inactive_connection_lifetime=0,
                connection_class=_Connection,
                reset=_leave_as_is,
                server_settings={"application_name": f"mercato-{service}"},
            )
        except DRIVER_ERRORS as error:
            raise translated(error, service) from error
        return cls(pool, service)

    async def acquire(self) -> Any:
        """A connection. Raises `Unavailable` where none is to be had within `ACQUIRE_SECONDS`."""
        while self._idle:
            connection = self._idle.pop()
            if _is_open(connection):
                return connection
            await self._return(connection)
        self._waiting += 1
        try:
            return await self._pool.acquire(timeout=ACQUIRE_SECONDS)
        except DRIVER_ERRORS as error:
            # Whatever the reason: without a connection nothing is done, and nothing is the statement's fault.
            raise Unavailable(service=self.service) from error
        finally:
            self._waiting -= 1

    async def release(self, connection: Any, *, is_clean: bool) -> None:
        """Gives a connection back. `is_clean`: its block has ended well, and left nothing on it."""
        if is_clean and not self._waiting and not self._is_closing:
            self._idle.append(connection)
        else:
            await self._return(connection)

    async def renew(self) -> None:
        """Closes the idle connections, and the others when they come back: they are probably as dead as one was."""
        await self._pool.expire_connections()
        await self._return_idle()

    async def close(self) -> None:
        """Waits for what runs, then closes; after `CLOSE_SECONDS` it no longer waits."""
        self._is_closing = True
        await self._return_idle()
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._pool.close()
        except DRIVER_ERRORS:
            self._pool.terminate()

    async def _return_idle(self) -> None:
        while self._idle:
            await self._return(self._idle.pop())

    async def _return(self, connection: Any) -> None:
        with contextlib.suppress(*DRIVER_ERRORS):
            await self._pool.release(connection)


class LentConnection:
    """A connection for the time of one block."""

    __slots__ = ("_connections", "_is_renewed", "connection", "is_rolled_back")

    def __init__(self, connections: Connections) -> None:
        self.is_rolled_back = False
        self._connections = connections
        self._is_renewed = False
        self.connection: Any = None

    async def acquire(self) -> None:
        """Raises `Unavailable`."""
        self.connection = await self._connections.acquire()

    async def release(self, *, is_clean: bool) -> None:
        connection, self.connection = self.connection, None
        if connection is not None:
            await self._connections.release(connection, is_clean=is_clean)

    def is_lost(self, error: Exception) -> bool:
        """True where `error` says that the connection is gone, and it may be replaced: once in a block."""
        return not self._is_renewed and _lost(error)

    async def renew(self) -> None:
        """A connection made now."""
        self._is_renewed = True
        await self.release(is_clean=False)
        await self._connections.renew()
        await self.acquire()

    async def begin(self) -> None:
        """Begins a transaction; on another connection where this one is gone."""
        try:
            await self.connection.execute("BEGIN")
            return
        except asyncio.CancelledError:
            # The server may have begun all the same, and no block goes on: the connection must not stay like that.
            await self.roll_back()
            raise
        except DRIVER_ERRORS as error:
            if not self.is_lost(error):
                raise_translated(error, self._connections.service)
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
        except DRIVER_ERRORS as error:
            if getattr(error, "severity_en", None) == "ERROR" and self.connection.is_in_transaction():
                # A statement before the COMMIT failed, and the server has told so: it skips the rest of the message.
                await self.roll_back()
                self.is_rolled_back = True
            raise_translated(error, self._connections.service)
        if outcome != "COMMIT":
            self.is_rolled_back = True
            raise RolledBackError("an error inside the transaction was caught there; nothing was committed")

    async def _with_events(self, events: Sequence[str]) -> str:
        # As literals, so that a single message carries the rows and the COMMIT: a process that is stopped between two
        # messages would hold the lock, and every writer of the service up. Prepared, because planning costs more than
        # the literals do. A lock timeout of this transaction was not meant for this lock.
        name = await self.connection.prepare_events()
        write = f"EXECUTE {name} (%s)" if name else _WRITE_EVENTS
        literals = [row.replace("'", "''") for row in events]
        writes = "; ".join([write % f"'{literal}'" for literal in literals])
        return f"SET LOCAL lock_timeout = 0; {writes}; COMMIT"

    async def roll_back(self) -> None:
        """Never fails: a lost connection has rolled back by itself."""
        with contextlib.suppress(*DRIVER_ERRORS):
            await self.connection.execute("ROLLBACK")

    async def _step(self, sql: str) -> None:
        try:
            await self.connection.execute(sql)
        except DRIVER_ERRORS as error:
            raise_translated(error, self._connections.service)


def _is_open(connection: Any) -> bool:
    try:
        return not connection.is_closed()
    except asyncpg.InterfaceError:  # it was lost, and the pool has noticed and taken it back
        return False


async def _leave_as_is(_connection: Any) -> None:
    """Takes the place of the driver's reset between two uses of a connection. See the top of `database.py`.

    A transaction that a cancelled roll-back left open, the driver still ends by itself.
    """


# ---------------------------------------------------------------------------------------------------------- errors

# The driver's InternalClientError is what a statement meets on a connection that the server ended in this very moment.
DRIVER_ERRORS: Final = (
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


def refuses_writes(error: BaseException) -> bool:
    """Whether an error, or what it was translated from, says that the server stores nothing now: its disk is full."""
    cause = error.__cause__ or error
    if isinstance(cause, asyncpg.TooManyConnectionsError):
        return False
    return isinstance(cause, asyncpg.InsufficientResourcesError | asyncpg.PostgresIOError)


def has_no_connection_left(error: BaseException) -> bool:
    """Whether an error, or what it was translated from, says that others have all connections of the server."""
    return isinstance(error.__cause__ or error, asyncpg.TooManyConnectionsError)


def raise_translated(error: Exception, service: str) -> NoReturn:
    known = translated(error, service)
    if known is error:
        raise error
    raise known from error
