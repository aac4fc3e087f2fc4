"""PostgreSQL, and the only seam to its driver.

A service opens `db.transaction()` to change something and `db.read()` to look; its `store.py` gets the `tx` and runs
SQL through it. Rows come back as frozen structs: `tx.fetch(UserRow, "SELECT id, name ...")` fills `UserRow` in the
order of the columns (a test compares the names of both for every statement).

The rules that the rest relies on
    - Only this module commits. A commit that succeeded, or whose outcome is unknown, is noted on the running attempt,
      so that the batch is not run again.
    - No remote call inside a transaction: the client refuses it.
    - Connections are not reset between uses (that halves the cost of a read), so nothing may be left on them:
      `SET LOCAL` only, locks of a transaction only. A test holds this.
    - Driver errors are translated here: lost or refused connections become `Unavailable`, the rest that a service can
      act on is `UniqueViolation` or `LockTimeout`.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Final, TypeVar

import asyncpg  # pyright: ignore[reportMissingTypeStubs]  # the driver has no types; this module is the typed seam
import msgspec

from .contract import ServiceError, Unavailable
from .rpc import attempt
from .telemetry import Telemetry

R = TypeVar("R", bound="Row")
T = TypeVar("T")

OLDEST_VERSION: Final = 16
STATEMENT_SECONDS: Final = 10.0
CONNECT_SECONDS: Final = 5.0
PING_SECONDS: Final = 1.0
ACQUIRE_SECONDS: Final = 5.0


class Row(msgspec.Struct, frozen=True, gc=False):
    """A row as it came from the database. Fields in the order of the columns of the statement that fills it."""


class UniqueViolation(Exception):
    """A unique key refused a row. `constraint` is the key's name."""

    def __init__(self, constraint: str) -> None:
        super().__init__(constraint)
        self.constraint = constraint


class LockTimeout(Exception):
    """Somebody else held a row or key for longer than this transaction was willing to wait."""


class Tx:
    """What a store runs its statements on."""

    __slots__ = ("_connection", "_service", "_writable")

    def __init__(self, connection: Any, service: str, *, writable: bool) -> None:
        self._connection = connection
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
            return await getattr(self._connection, method)(sql, *values)
        except _DRIVER_ERRORS as error:
            raise translated(error, self._service) from error


_known_reads: Final[set[str]] = set()
_WRITES: Final = re.compile(r"\b(INSERT|UPDATE|DELETE|MERGE|TRUNCATE|nextval)\b")


def _check_read(sql: str) -> None:
    # A change outside `transaction` would commit without being noted, and could then be run a second time.
    assert not _WRITES.search(sql.replace("FOR UPDATE", "")), f"db.read() does not change anything: {sql}"
    _known_reads.add(sql)


class Database:
    """The database of one service, through a pool of at most `size` connections."""

    def __init__(self, dsn: str, service: str, telemetry: Telemetry, *, size: int = 6) -> None:
        self.service = service
        self.size = size
        self._dsn = dsn
        self._pool: Any = None
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
                reset=_leave_as_is,
                # Batches are short statements that are run very often: compiling them costs more than it saves.
                server_settings={"jit": "off", "application_name": f"mercato-{self.service}"},
            )
        except _DRIVER_ERRORS as error:
            raise translated(error, self.service) from error

    async def close(self) -> None:
        """Waits for what runs, then closes; after two seconds it no longer waits."""
        if self._pool is None:
            return
        pool, self._pool = self._pool, None
        try:
            await asyncio.wait_for(pool.close(), 2.0)
        except (TimeoutError, *_DRIVER_ERRORS):
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
        async with self._connection() as connection:
            yield Tx(connection, self.service, writable=False)

    @contextlib.asynccontextmanager
    async def transaction(self) -> AsyncGenerator[Tx]:
        """Commits at the end of the block, rolls back when the block raises."""
        made = attempt.get()
        async with self._connection() as connection:
            transaction = connection.transaction()
            await self._step(transaction.start())
            if made is not None:
                made.in_transaction = True
            try:
                yield Tx(connection, self.service, writable=True)
            except BaseException:
                if made is not None:
                    made.in_transaction = False
                with contextlib.suppress(*_DRIVER_ERRORS):  # a lost connection has rolled back by itself
                    await transaction.rollback()
                raise
            if made is not None:
                # Noted before the attempt: when the answer to COMMIT is lost, it may have happened.
                made.in_transaction, made.committed = False, True
            await self._step(transaction.commit())

    async def _step(self, step: Any) -> None:
        try:
            await step
        except _DRIVER_ERRORS as error:
            raise translated(error, self.service) from error

    @contextlib.asynccontextmanager
    async def _connection(self) -> AsyncGenerator[Any]:
        if self._pool is None:
            raise Unavailable(service=self.service)
        try:
            connection = await self._pool.acquire(timeout=ACQUIRE_SECONDS)
        except _DRIVER_ERRORS as error:
            raise translated(error, self.service) from error
        self._busy.inc()
        try:
            yield connection
        finally:
            self._busy.dec()
            await self._pool_release(connection)

    async def _pool_release(self, connection: Any) -> None:
        pool = self._pool
        if pool is not None:
            with contextlib.suppress(*_DRIVER_ERRORS):
                await pool.release(connection)


async def _leave_as_is(_connection: Any) -> None:
    """Takes the place of the driver's reset between two uses of a connection. See the top of this file."""


# ---------------------------------------------------------------------------------------------------------- errors

_DRIVER_ERRORS: Final = (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError)

# The server is not there, goes away, or has no room: nothing that the statement itself is to blame for.
_UNAVAILABLE: Final = (
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.OperatorInterventionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.ObjectNotInPrerequisiteStateError,
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.PostgresIOError,
    OSError,
    TimeoutError,
)


def translated(error: BaseException, service: str) -> Exception:
    """The chassis' own word for a driver's error; the error itself where it is a bug of a statement."""
    if isinstance(error, asyncpg.UniqueViolationError):
        return UniqueViolation(str(getattr(error, "constraint_name", "") or ""))
    if isinstance(error, asyncpg.LockNotAvailableError):
        return LockTimeout(service)
    if isinstance(error, _UNAVAILABLE):
        return Unavailable(service=service)
    return error if isinstance(error, Exception) else ServiceError()
