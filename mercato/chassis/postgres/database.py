"""PostgreSQL, as services see it.

A service opens `db.transaction()` to change something and `db.read()` to look; its `store.py` gets the `tx` and runs
SQL through it. Rows come back as frozen structs: `tx.fetch(UserRow, "SELECT id, name ...")` fills `UserRow` in the
order of the columns (a test compares the names of both for every statement).

The rules that the rest relies on
    - Only this module commits. A commit that succeeded, or whose outcome is unknown, is noted on the handler's run,
      so that the batch is not run again.
    - The events of a transaction are written with its COMMIT, in one message: the lock that orders the rows of the
      outbox is never held while the server waits for this process.
    - No remote call inside a transaction: the client refuses it.
    - Connections are not reset between uses (that halves the cost of a read), so nothing may be left on them:
      `SET LOCAL` only, locks of a transaction only. A test holds this.
    - Driver errors are translated (`connections.py`): lost or refused connections become `Unavailable`, other errors
      that a service can handle become `UniqueViolation` or `LockTimeout`.
    - A connection that is lost at a statement of `read()`, or at the first one of a transaction, which begins it, is
      replaced once, and the statement is run again: after a restart of the server the first batch works.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterable, Sequence
from typing import Any, Final, TypeVar

import asyncpg  # pyright: ignore[reportMissingTypeStubs]  # it has no types; only its errors are named here
import msgspec
import structlog

from mercato.chassis.contract import (
    FrozenMeta,
    HandlerRun,
    Message,
    ServiceError,
    Span,
    Unavailable,
    current_span,
    handler_run,
)
from mercato.chassis.contract.context import CLIENT, NO_SPAN
from mercato.chassis.observability.telemetry import Telemetry

from . import outbox_row
from .connections import (
    ACQUIRE_SECONDS,
    DRIVER_ERRORS,
    Connections,
    LentConnection,
    LockTimeout as LockTimeout,  # what a service may meet is imported from here
    RolledBackError as RolledBackError,
    UniqueViolation as UniqueViolation,
    has_no_connection_left,
    raise_translated,
    refuses_writes,
)

R = TypeVar("R", bound="Row")
T = TypeVar("T")

WRITES_RESERVED: Final = 1
"""Connections that reads may not use: however many reads are slow, they do not stop the writes of a service."""
COUNT_SECONDS: Final = 2.0
"""The deadline of a count of all rows that some filters match, the wait for its turn included."""
COUNTS_WAITING: Final = 16
"""Counts that wait while one runs; each occupies one of the concurrent calls of its operation."""
PING_SECONDS: Final = 1.0
REFUSED_SECONDS: Final = 5.0
"""A process whose transaction was refused for want of space is not ready for so long, or until one is committed."""
IS_READ_ONLY: Final = "SELECT pg_is_in_recovery() OR current_setting('transaction_read_only')::boolean"

OUTCOMES_COUNTED: Final = 100
"""Types of events, each with its outcome codes, that one service counts by name."""

log = structlog.stdlib.get_logger("mercato.events")


class Row(msgspec.Struct, frozen=True, gc=False, metaclass=FrozenMeta):
    """A row as it came from the database. Fields in the order of the columns of the statement that fills it."""


class Tx:
    """A transaction or read, through which a store runs its statements."""

    __slots__ = ("_lease", "_service", "_writable", "events")

    def __init__(self, lease: LentConnection, service: str, *, writable: bool) -> None:
        self.events: list[outbox_row.Outgoing] = []
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

    def emit(self, events: Iterable[outbox_row.Outgoing]) -> None:
        """Emits events with the transaction of the change: they are written with its COMMIT, or not at all.

        The caller holds the lock of each subject's row, so that the order of commits is the order of the changes. Each
        type is declared in the contract of the service (`Contract.events`) with the message that it carries. The tests
        check it (`messaging.events.declared_only`); the shop does not, because it would cost time for each event.
        """
        self.events.extend(events)

    async def _run(self, method: str, sql: str, values: Sequence[object]) -> Any:
        if not self._writable and sql not in _known_reads:
            _check_read(sql)
        can_repeat = not self._writable or self._lease.is_beginning
        try:
            return await getattr(self._lease.connection, method)(sql, *values)
        except DRIVER_ERRORS as error:
            if not can_repeat or not self._lease.is_lost(error):
                self._lease.note_failure()
                raise_translated(error, self._service)
        await self._lease.renew()
        if self._writable:
            self._lease.begin()
        try:
            return await getattr(self._lease.connection, method)(sql, *values)
        except DRIVER_ERRORS as error:
            self._lease.note_failure()
            raise_translated(error, self._service)


_known_reads: Final[set[str]] = set()
_CHANGES: Final = re.compile(
    r"\b(INSERT|UPDATE|DELETE|MERGE|TRUNCATE|INTO|CREATE|ALTER|DROP|LOCK|COPY|CALL|DO|SET|nextval|setval)\b",
    re.IGNORECASE,
)
_QUOTED: Final = re.compile(r"'[^']*'|\"[^\"]*\"|--[^\n]*")


def _check_read(sql: str) -> None:
    # A change outside of `transaction` would commit without a note on the handler's run, and could be run again.
    assert not _CHANGES.search(_QUOTED.sub("", sql)), f"db.read() does not change or lock anything: {sql}"
    _known_reads.add(sql)


class Database:
    """The database of one service, through at most `size` connections."""

    def __init__(self, dsn: str, service: str, telemetry: Telemetry, *, size: int = 6) -> None:
        self.service = service
        self.size = size
        self._dsn = dsn
        self._connections: Connections | None = None
        self._reads = asyncio.Semaphore(max(1, size - WRITES_RESERVED))
        self._counting = asyncio.Lock()
        self._counts = 0
        """How many counts run or wait."""
        self.on_events: list[Callable[[], None]] = []
        """Called after the commit of a transaction with events."""
        self.on_commit: list[Callable[[], None]] = []
        """Called after the commit of any transaction."""
        self._attributes = {"db.system.name": "postgresql", "db.namespace": service}
        """Of each span."""
        self._refused_at: float | None = None
        self.pack: Callable[[Sequence[outbox_row.Outgoing]], Sequence[str]] = outbox_row.pack
        """Makes rows of the events of a transaction. Tests set one that also checks them."""
        self._emitted = EmittedEvents(telemetry, service)
        busy, limit = "Database connections in use.", "Database connections that the pool may open."
        by = ["db_client_connection_pool_name"]
        in_state = telemetry.gauge(
            "db_client_connection_count", busy, [*by, "db_client_connection_state"], workers="livesum"
        )
        self._note_busy = in_state.labels(service, "used").add
        telemetry.gauge("db_client_connection_max", limit, by, workers="livesum").labels(service).set(size)

    async def open(self) -> None:
        """Makes one connection; the others are made when they are needed. Raises `Unavailable`."""
        self._connections = await Connections.open(self._dsn, self.service, self.size)

    async def close(self) -> None:
        """Waits for what runs, then closes; after two seconds it no longer waits."""
        connections, self._connections = self._connections, None
        if connections is not None:
            await connections.close()

    async def problem(self) -> str:
        """Why the database does not accept writes now, in a few words; empty if it does. Within a second."""
        try:
            async with asyncio.timeout(PING_SECONDS):
                async with self.read() as tx:
                    is_read_only = await tx.fetch_values(bool, IS_READ_ONLY)
                are_commits_stalled = await self._are_commits_stalled()
        except (ServiceError, TimeoutError) as error:
            if has_no_connection_left(error):
                return "its database has no connection left, for others have all of them"
            return "its database does not answer"
        if is_read_only[0]:
            return "its database is read-only"
        if are_commits_stalled:
            return "its database waits for a standby that does not answer"
        if self._refused_at is not None and _now() - self._refused_at < REFUSED_SECONDS:
            return "its database has no space for what it is to store"
        return ""

    async def _are_commits_stalled(self) -> bool:
        if self._connections is None or not self._connections.are_commits_stalled:
            return False
        with contextlib.suppress(Unavailable):
            await self._connections.check_commits()
        return self._connections.are_commits_stalled

    def _span(self, what: str) -> contextlib.AbstractContextManager[Span | None]:
        """The span of a read or a transaction, where the call is traced."""
        if (serving := current_span()) is None:
            return NO_SPAN
        span = serving.child(f"{self.service} {what}", CLIENT, self.service)
        span.note(self._attributes)
        return span

    def _packed(self, events: Sequence[outbox_row.Outgoing], span: Span | None) -> Sequence[str]:
        """Rows of events, which name the traces that they belong to."""
        if span is not None and span.places and (serving := current_span()) is not None:
            span.places = serving.below()  # again: by now it may be known what they are about
            below = span.below()
            events = outbox_row.traced(events, below)
        return self.pack(events)

    @contextlib.asynccontextmanager
    async def read(self) -> AsyncGenerator[Tx]:
        """Statements that change nothing, each seeing what is committed when it starts."""
        with self._span("read"):
            await self._take_turn_to_read()
            try:
                lease = await self._lease()
                is_clean = False
                try:
                    yield Tx(lease, self.service, writable=False)
                    is_clean = True
                finally:
                    await self._give_back(lease, is_clean=is_clean)
            finally:
                self._reads.release()

    async def count(self, counted: Callable[[Tx], Awaitable[int]], *, seconds: float = COUNT_SECONDS) -> int | None:
        """The result of `counted`; None if it takes longer than `seconds`, and the statement is then cancelled.

        For counts that read every row that they count. They run one after another, so that the other connections
        are left to short reads. None at once if `COUNTS_WAITING` counts already wait.
        """
        if self._counts > COUNTS_WAITING:
            return None
        self._counts += 1
        try:
            async with asyncio.timeout(seconds), self._counting, self.read() as tx:
                return await counted(tx)
        except TimeoutError:
            return None
        finally:
            self._counts -= 1

    async def _take_turn_to_read(self) -> None:
        """Raises `Unavailable` if no connection is free within `ACQUIRE_SECONDS`."""
        if not self._reads.locked():
            await self._reads.acquire()  # at once
            return
        try:
            async with asyncio.timeout(ACQUIRE_SECONDS):
                await self._reads.acquire()
        except TimeoutError:
            raise Unavailable(service=self.service) from None

    @contextlib.asynccontextmanager
    async def transaction(self) -> AsyncGenerator[Tx]:
        """Commits at the end of the block, with the events that it has emitted; rolls back when the block raises."""
        with self._span("transaction") as span, _handler_run() as made:
            lease = await self._lease(writes=True)
            is_clean = False
            try:
                lease.begin()
                made.open_transactions += 1
                tx = Tx(lease, self.service, writable=True)
                try:
                    yield tx
                    events = self._packed(tx.events, span) if tx.events else ()
                except BaseException:
                    await lease.roll_back()
                    raise
                finally:
                    made.open_transactions -= 1
                await self._commit(lease, made, events)
                is_clean = True
                self._refused_at = None
            except Unavailable as error:
                if refuses_writes(error):
                    self._refused_at = _now()
                raise
            finally:
                await self._give_back(lease, is_clean=is_clean)
        if events:
            self._emitted.count(tx.events)
            for wake in self.on_events:
                wake()
        for wake in self.on_commit:
            wake()

    async def _commit(self, lease: LentConnection, made: HandlerRun, events: Sequence[str]) -> None:
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

    async def _lease(self, *, writes: bool = False) -> LentConnection:
        if self._connections is None:
            raise Unavailable(service=self.service)
        if writes and self._connections.are_commits_stalled:
            await self._connections.check_commits()
        lease = LentConnection(self._connections)
        await lease.acquire()
        self._note_busy(1)
        return lease

    async def _give_back(self, lease: LentConnection, *, is_clean: bool) -> None:
        self._note_busy(-1)
        await lease.release(is_clean=is_clean)


class EmittedEvents:
    """Counts the events of committed transactions, and logs the ids of those that have an outcome code."""

    def __init__(self, telemetry: Telemetry, service: str) -> None:
        about = "Events of committed transactions, by type and outcome code: orders, payments, refunds, stock."
        self._counter = telemetry.counter("mercato_domain_events", about, ["service", "type", "outcome"])
        self._service = service
        self._children: dict[tuple[str, str], Callable[[float], None]] = {}

    def count(self, events: Sequence[outbox_row.Outgoing]) -> None:
        counts: dict[tuple[str, str], int] = {}
        for event in events:
            outcome = _outcome(event.data)
            key = (event.type, outcome)
            counts[key] = counts.get(key, 0) + 1
            if outcome:
                field = event.data.about_field
                about = {field: getattr(event.data, field)} if field else {}
                log.info(event.type, subject=event.subject, subject_id=event.subject_id, outcome=outcome, **about)
        for key, count in counts.items():
            (self._children.get(key) or self._child(key))(count)

    def _child(self, key: tuple[str, str]) -> Callable[[float], None]:
        # A provider may have any number of codes: those beyond the bound are counted under one name.
        type_, outcome = key if len(self._children) < OUTCOMES_COUNTED else (key[0], "other")
        child = self._counter.labels(self._service, type_, outcome).add
        if len(self._children) < OUTCOMES_COUNTED:
            self._children[key] = child
        return child


def _outcome(data: Message) -> str:
    """The code in the message of an event; empty where it has none."""
    if not (field := data.outcome_field):
        return ""
    found = getattr(data, field)
    return getattr(found, "code", found) or ""


def _now() -> float:
    return asyncio.get_running_loop().time()


@contextlib.contextmanager
def _handler_run() -> Generator[HandlerRun]:
    """The run of the handler; one for this transaction where there is none, as in a loop or a start-up step."""
    made = handler_run.get()
    if made is not None:
        yield made
        return
    token = handler_run.set(made := HandlerRun())
    try:
        yield made
    finally:
        handler_run.reset(token)
