"""Connections to PostgreSQL, and errors of their driver: the one module that runs statements through it.

A `LentConnection` serves one block of `database.py`. `Connections` lends them: it keeps idle ones on its own stack, and
uses the driver's pool if the stack is empty. Each use of the pool costs a timer, a task and a proxy, a use of the stack
none of them. The pool still opens connections, bounds their number, gives them to callers that wait, and takes back
every connection whose block has failed.

Driver errors are translated here: lost or refused connections become `Unavailable`, other errors that a service can
handle become `UniqueViolation` or `LockTimeout`.

A COMMIT is never cancelled at the server. With synchronous replication it waits for the standby, and a cancelled wait
leaves a transaction that all sessions can read though the standby does not have it: after a fail-over it is gone. So a
COMMIT that takes too long is left to the server, and the caller is answered that its outcome is not known. While one
waits there, no transaction is begun: its COMMIT would wait behind that one, and keep one more session of the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import re
import socket
import struct
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, NoReturn, Self, cast

import asyncpg  # pyright: ignore[reportMissingTypeStubs]  # the driver has no types; this module is the typed seam
import structlog
from asyncpg.protocol import protocol as _protocol  # pyright: ignore[reportMissingTypeStubs]

from mercato.chassis.contract import Unavailable

from .sessions import Servers, is_pooled

OLDEST_VERSION: Final = 16
"""Of PostgreSQL."""
STATEMENT_SECONDS: Final = 10.0
CONNECT_SECONDS: Final = 30.0
"""At the start of a process, while machine and database may be busy. Later a batch waits at most `ACQUIRE_SECONDS` for
a connection, new or existing."""
ACQUIRE_SECONDS: Final = 5.0
CLOSE_SECONDS: Final = 2.0
OUTBOX_LOCK_SECONDS: Final = STATEMENT_SECONDS - 1
"""The server ends the wait for the lock of the outbox: the COMMIT in the same message is never cancelled."""

STALLED_SECONDS: Final = STATEMENT_SECONDS / 2
"""A COMMIT that has waited so long for a standby is stalled. Those given up have waited for twice as long."""
STALLED_LOOK_SECONDS: Final = 2.0
"""The pause between two looks at whether COMMITs are still stalled."""
_STALLED: Final = """
    SELECT count(*) FROM pg_stat_activity
    WHERE usename = current_user AND wait_event = 'SyncRep' AND clock_timestamp() - query_start > $1::interval
"""
"""Asked of the server, not of the connections that were given up: they may be those of a pooler, of another process, or
of a server that is not the primary any more."""

DEAD_SECONDS: Final = 10
"""A machine that dies closes no connection: one whose other end is silent for so long is lost, also if it is idle."""
_SOCKET_OPTIONS: Final = (
    (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
    (socket.IPPROTO_TCP, "TCP_KEEPIDLE", DEAD_SECONDS // 2),
    (socket.IPPROTO_TCP, "TCP_KEEPINTVL", 1),
    (socket.IPPROTO_TCP, "TCP_KEEPCNT", DEAD_SECONDS - DEAD_SECONDS // 2),
    (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", DEAD_SECONDS * 1_000),
)
"""By name: some are Linux's alone."""


OUTBOX_LOCK: Final = 0x6F757462  # "outb"
_WRITE_EVENTS: Final = f"INSERT INTO outbox (events) SELECT %s FROM pg_advisory_xact_lock({OUTBOX_LOCK})"  # noqa: S608
"""The default of `id` is taken after the lock, which ends with the transaction: ids are in the order of commits."""


def _message(kind: bytes, *parts: bytes) -> bytes:
    """A message of PostgreSQL's protocol."""
    content = b"".join(parts)
    return kind + struct.pack("!i", 4 + len(content)) + content


_BEGIN: Final = b"".join([
    _message(b"P", b"\0BEGIN\0", struct.pack("!h", 0)),  # Parse: no name, no parameters
    _message(b"B", b"\0\0", struct.pack("!hhh", 0, 0, 0)),  # Bind
    _message(b"E", b"\0", struct.pack("!i", 0)),  # Execute; without Sync, so that no answer is sent yet
])  # fmt: skip
"""BEGIN as messages that can stand before those of a prepared statement."""


def check_containers_by_type(protocol: Any) -> bool:
    """Makes the driver accept only lists and tuples as arrays. Does nothing, and gives False, for another driver.

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


log = structlog.stdlib.get_logger("mercato.database")


class UniqueViolation(Exception):
    """A unique key refused a row. `constraint` is the key's name."""

    def __init__(self, constraint: str) -> None:
        super().__init__(constraint)
        self.constraint = constraint


class LockTimeout(Exception):
    """Another transaction held a row or key for longer than this transaction was willing to wait."""


class RolledBackError(AssertionError):
    """A statement failed, and the block ignored the error: PostgreSQL answered its COMMIT with a roll-back."""


class _Connection(asyncpg.Connection):
    """A connection that sends BEGIN with the first statement of a transaction: one round trip less for each.

    The driver knows no pipeline. But the messages of BEGIN can stand before those of the statement, whose handler
    passes over what PostgreSQL answers to them, and takes an error of BEGIN for one of the statement.

    It also prepares the statement which writes events, at the first transaction that has any; not behind a pooler,
    where the next transaction may run in another session.
    """

    __slots__ = ("_events_prepared", "_events_tried", "_is_committing", "_is_pooled", "is_beginning")

    def __init__(self, protocol: Any, transport: asyncio.Transport, *values: Any, **options: Any) -> None:
        super().__init__(protocol, transport, *values, **options)  # pyright: ignore[reportUnknownMemberType]
        _notice_a_dead_machine(transport)
        self._is_committing = False
        self.is_beginning = False
        """The next statement begins a transaction."""
        self._events_prepared = ""
        self._events_tried = 0
        self._is_pooled: bool | None = None

    @property
    def address(self) -> tuple[str, int] | str:
        """Of its server: host and port, or the path of a socket."""
        return cast(Any, self)._addr

    def begin_with_next(self, *, begins: bool = True) -> None:
        self.is_beginning = begins

    async def execute(self, query: str, *values: Any, timeout: float | None = None) -> str:
        if self.is_beginning and not values:
            self.is_beginning = False
            query = f"BEGIN; {query}"
        return await super().execute(query, *values, timeout=timeout)  # pyright: ignore[reportUnknownMemberType]

    async def _do_execute(self, query: str, executor: Callable[..., Awaitable[Any]], *values: Any, **options: Any):
        """Where the driver runs every statement that has values or rows."""
        return await cast(Any, super())._do_execute(
            query, self._begun(executor) if self.is_beginning else executor, *values, **options
        )

    def _begun(self, executor: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def execute(statement: Any, timeout: float | None) -> Any:
            if self.is_beginning:  # the driver may have run statements of its own meanwhile, to look up types
                self.is_beginning = False
                cast(Any, self)._transport.write(_BEGIN)
                if not statement.name:  # BEGIN replaces the one statement without a name: the driver parses it again
                    statement.mark_unprepared()
            return await executor(statement, timeout)

        return execute

    async def commit(self, statements: str) -> str:
        """Runs statements, of which the last is COMMIT. The wait for it may be cancelled, the COMMIT is not."""
        self._is_committing = True
        try:
            return await self.execute(statements)
        finally:
            self._is_committing = False

    def _cancel_current_command(self, waiter: asyncio.Future[None], cancel_waiter: Any = None) -> None:
        """Called by the driver to send a request to cancel, when the time of a statement is over or its task cancelled.

        Without one, the driver still waits for the answer before it uses the connection again, or ends it.
        """
        if self._is_committing:
            waiter.set_result(None)
        else:
            cast(Any, super())._cancel_current_command(waiter, cancel_waiter)

    @property
    def is_unanswered(self) -> bool:
        """Whether the last statement was given up before its answer, and the answer has not come since."""
        return self.is_closed() or cast(Any, self)._protocol._is_cancelling()

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


def _notice_a_dead_machine(transport: asyncio.Transport) -> None:
    """Makes the kernel end a connection whose other end is silent."""
    end = transport.get_extra_info("socket")
    if end is None or end.family == socket.AF_UNIX:
        return
    for level, name, value in _SOCKET_OPTIONS:
        if (option := getattr(socket, name, None)) is not None:
            end.setsockopt(level, option, value)


class Connections:
    """At most `size` connections to the database of one service. Lent by `acquire`, given back by `release`."""

    def __init__(self, pool: Any, service: str, servers: Servers) -> None:
        self.service = service
        self._pool = pool
        self._servers = servers
        self._idle: list[Any] = []
        """Idle connections outside of the pool; the last one is used next, so that few are used often."""
        self._waiting = 0
        """Callers that wait for the pool."""
        self.are_commits_stalled = False
        """A COMMIT was given up, and since then no look has shown that none waits at the server any more."""
        self._looks_again_at = 0.0
        self._is_closing = False

    @classmethod
    async def open(cls, dsn: str, service: str, size: int) -> Self:
        """Makes one connection; the others are made when they are needed. Raises `Unavailable`."""
        servers = Servers(dsn)
        try:
            pool = await asyncpg.create_pool(  # pyright: ignore[reportUnknownMemberType]
                dsn,
                connect=servers.connect,
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
        return cls(pool, service, servers)

    async def acquire(self) -> Any:
        """A connection. Raises `Unavailable` if none is free within `ACQUIRE_SECONDS`."""
        while self._idle:
            connection = self._idle.pop()
            if _is_open(connection):
                return connection
            await self._return(connection)
        self._waiting += 1
        try:
            return await self._pool.acquire(timeout=ACQUIRE_SECONDS)
        except DRIVER_ERRORS as error:
            # Any error means `Unavailable`: without a connection nothing was done, and no statement has failed.
            raise Unavailable(service=self.service) from error
        finally:
            self._waiting -= 1

    async def release(self, connection: Any, *, is_clean: bool) -> None:
        """Gives a connection back. `is_clean`: its block has succeeded, and left no state on it."""
        if is_clean and not self._waiting and not self._is_closing:
            self._idle.append(connection)
        else:
            await self._return(connection)

    async def renew(self) -> None:
        """Closes the idle connections, and the others when they are released: after one was lost, all probably are."""
        await self._pool.expire_connections()
        await self._return_idle()

    async def note_stalled_commit(self, address: tuple[str, int] | str) -> None:
        """A COMMIT was given up at the server of `address`: others of the DSN are tried before it from now on.

        Its standby does not answer, or was promoted, and the server does not know that.
        """
        if not self.are_commits_stalled:
            log.warning("commits_stalled", service=self.service)
        self.are_commits_stalled = True
        self._servers.put_last(address)
        await self.renew()

    async def check_commits(self) -> None:
        """Raises `Unavailable` while COMMITs of this service's role are stalled at the server.

        It looks once in `STALLED_LOOK_SECONDS`, through a new connection: a proxy, or the DSN, may lead to another
        server by then. Between two looks it raises at once.
        """
        now = asyncio.get_running_loop().time()
        if now < self._looks_again_at:
            raise Unavailable(service=self.service)
        self._looks_again_at = now + STALLED_LOOK_SECONDS
        await self.renew()
        lease = LentConnection(self)
        await lease.acquire()
        is_clean = False
        try:
            stalled, address = await lease.count_stalled_commits()
            is_clean = True
        finally:
            await lease.release(is_clean=is_clean)
        if stalled:
            self._servers.put_last(address)
            raise Unavailable(service=self.service)
        self.are_commits_stalled = False
        log.info("commits_go_on", service=self.service)

    async def close(self) -> None:
        """Waits for running statements, up to `CLOSE_SECONDS`, then closes."""
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

    __slots__ = ("_connections", "_has_failed", "_is_renewed", "connection", "is_rolled_back")

    def __init__(self, connections: Connections) -> None:
        self.is_rolled_back = False
        self._has_failed = False
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
        """Whether `error` means that the connection is lost and may be replaced: once in a block."""
        return not self._is_renewed and _lost(error)

    async def renew(self) -> None:
        """A new connection."""
        self._is_renewed = True
        await self.release(is_clean=False)
        await self._connections.renew()
        await self.acquire()

    def begin(self) -> None:
        """Begins a transaction with its first statement."""
        self.connection.begin_with_next()

    @property
    def is_beginning(self) -> bool:
        """The transaction has had no statement yet. False for a connection that the pool has taken back."""
        return getattr(self.connection, "is_beginning", False)

    def note_failure(self) -> None:
        """Called when a statement of a transaction has failed.

        One that could not be prepared has not begun the transaction, which must fail nevertheless.
        """
        self._has_failed = self._has_failed or self.is_beginning

    async def commit(self, events: Sequence[str]) -> None:
        """Writes the rows of the outbox and commits. `is_rolled_back` says whether a failure is known to be one.

        Raises `RolledBackError` if nothing was committed because an earlier statement had failed.
        """
        if self.is_beginning and not events and not self._has_failed:
            self.connection.begin_with_next(begins=False)
            return
        connection = self._kept()
        try:
            end = "ROLLBACK" if self._has_failed else "COMMIT"
            outcome = await connection.commit(await self._with_events(connection, events, end) if events else end)
        except asyncio.CancelledError:
            await self._await_answer(connection)
            raise
        except asyncpg.InFailedSQLTransactionError:
            await self.roll_back()
            outcome = "ROLLBACK"
        except asyncpg.LockNotAvailableError as error:
            await self.roll_back()
            self.is_rolled_back = True
            raise Unavailable(service=self._connections.service) from error
        except DRIVER_ERRORS as error:
            if getattr(error, "severity_en", None) == "ERROR" and self.connection.is_in_transaction():
                # The server answered that a statement before the COMMIT failed; it then skips the rest of the message.
                await self.roll_back()
                self.is_rolled_back = True
            if isinstance(error, TimeoutError):
                connection.terminate()  # the pool would wait for the answer
                await self._connections.note_stalled_commit(connection.address)
            raise_translated(error, self._connections.service)
        if outcome != "COMMIT":
            self.is_rolled_back = True
            raise RolledBackError("an error inside the transaction was caught there; nothing was committed")

    async def _await_answer(self, connection: _Connection) -> None:
        """Waits for the answer to a COMMIT whose caller has left; after `STATEMENT_SECONDS` it is given up."""
        try:
            await self.roll_back()  # does nothing if the transaction has ended
        finally:
            if connection.is_unanswered:
                await self._connections.note_stalled_commit(connection.address)

    async def count_stalled_commits(self) -> tuple[int, tuple[str, int] | str]:
        """How many COMMITs of this role wait at the server for a standby, and its address. Raises `Unavailable`."""
        try:
            seconds = datetime.timedelta(seconds=STALLED_SECONDS)
            return await self.connection.fetchval(_STALLED, seconds), self._kept().address
        except DRIVER_ERRORS as error:
            raise_translated(error, self._connections.service)

    def _kept(self) -> _Connection:
        """The driver's connection. Raises `Unavailable` if the pool has taken it back, because it was lost."""
        found: _Connection | None = self.connection._con
        if found is None:
            raise Unavailable(service=self._connections.service)
        return found

    async def _with_events(self, connection: _Connection, events: Sequence[str], end: str) -> str:
        # As literals, so that a single message has the rows and the COMMIT: a process that is stopped between two
        # messages would hold the lock, and block every writer of the service. Prepared, because planning costs more
        # than the literals. A lock timeout that the transaction has set does not apply to this lock.
        name = await connection.prepare_events()
        write = f"EXECUTE {name} (%s)" if name else _WRITE_EVENTS
        literals = [row.replace("'", "''") for row in events]
        writes = "; ".join([write % f"'{literal}'" for literal in literals])
        return f"SET LOCAL lock_timeout = '{OUTBOX_LOCK_SECONDS:.0f}s'; {writes}; {end}"

    async def roll_back(self) -> None:
        """Never fails: the server rolls back when a connection is lost."""
        if self.is_beginning:
            self.connection.begin_with_next(begins=False)
            return
        if self.connection is None:  # the first statement has found it lost, and there was no other
            return
        with contextlib.suppress(*DRIVER_ERRORS):
            await self.connection.execute("ROLLBACK")


def _is_open(connection: Any) -> bool:
    try:
        return not connection.is_closed()
    except asyncpg.InterfaceError:  # it was lost, and the pool has already taken it back
        return False


async def _leave_as_is(_connection: Any) -> None:
    """Replaces the driver's reset between two uses of a connection. See the top of `database.py`.

    The driver itself still ends a transaction that a cancelled roll-back has left open.
    """


# ---------------------------------------------------------------------------------------------------------- errors

# The driver raises InternalClientError for a statement on a connection that the server is just closing.
DRIVER_ERRORS: Final = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,
    TimeoutError,
)

# The server is unavailable, is shutting down, or has no connection or disk space left: no fault of the statement.
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

# The driver raises InterfaceError for a lost connection and for a wrong use of one (a value of the wrong type, two
# statements at once); only its text distinguishes them.
_GONE: Final = re.compile(r"\bclos(ed|ing)\b|released back to the pool")


def translated(error: Exception, service: str) -> Exception:
    """The chassis' error for a driver's error; the error itself if it is a bug of a statement."""
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
    """Whether an error, or its cause, means that the server cannot store anything: its disk is full."""
    cause = error.__cause__ or error
    if isinstance(cause, asyncpg.TooManyConnectionsError):
        return False
    return isinstance(cause, asyncpg.InsufficientResourcesError | asyncpg.PostgresIOError)


def has_no_connection_left(error: BaseException) -> bool:
    """Whether an error, or its cause, means that all connections of the server are in use."""
    return isinstance(error.__cause__ or error, asyncpg.TooManyConnectionsError)


def raise_translated(error: Exception, service: str) -> NoReturn:
    known = translated(error, service)
    if known is error:
        raise error
    raise known from error
