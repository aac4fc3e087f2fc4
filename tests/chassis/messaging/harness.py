"""A publisher and the handlers of two consumers, each with a database of its own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

import msgspec

from mercato.chassis.contract import Message
from mercato.chassis.hosting.host import consumer_tasks
from mercato.chassis.messaging.consumers import Consumer, Pace
from mercato.chassis.messaging.events import Event, Outgoing, SourceRow, Subscription
from mercato.chassis.messaging.outbox import OutboxLog, event_log
from mercato.chassis.observability.clock import SystemClock
from mercato.chassis.observability.telemetry import Telemetry
from mercato.chassis.postgres import outbox_row
from mercato.chassis.postgres.database import Database, Row, Tx
from mercato.chassis.rpc.client import Connector
from mercato.chassis.rpc.server import LocalTransport
from mercato.testing import databases
from mercato.testing.cluster import Cluster
from mercato.testing.waiting import until

MIGRATIONS = Path(__file__).with_name("migrations_with_events")
SOURCE = "shop"
QUICK = Pace(gather_s=0.0, poll_s=0.01, idle_s=0.02)
QUICK_RETRIES = (0.01, 0.02, 0.03, 0.04)
NO_RETRIES = (3_600.0,) * 4


class Changed(Message):
    n: int


class EffectRow(Row):
    event_id: int
    subject_id: int
    version: int


class OutboxRow(Row):
    id: int
    events: str


class Cannot(Exception):
    """Raised by a handler for an event in `poison`."""


def place(row: int, number: int = 1) -> int:
    """The position of the event with this number in its row, both from 1 on."""
    return outbox_row.position(row, number - 1)


class RecordingHandler:
    """Handles the events of one consumer: each leaves one effect, and those in `poison` fail."""

    def __init__(
        self, name: str, database: Database, types: frozenset[str] | None = None, *, takes_rows: bool = False
    ) -> None:
        self.name = name
        self.database = database
        self.poison: set[int] = set()
        """Positions of events that it cannot process."""
        self.handled: list[list[int]] = []
        """The positions of each batch that it was given."""
        whole = self.handle_rows if takes_rows else None
        self.subscription = Subscription(name, (SOURCE,), self.handle, types, whole)

    async def handle_rows(self, tx: Tx, page: Sequence[SourceRow]) -> int:
        events = [event for row in page for event in row.unpack()]
        await self.handle(tx, events)
        return len(events)

    async def handle(self, tx: Tx, events: Sequence[Event]) -> None:
        self.handled.append([event.id for event in events])
        await tx.execute(
            """
            INSERT INTO effects (consumer, event_id, subject_id, version)
            SELECT $1, e.id, e.subject_id, e.version
              FROM unnest($2::bigint[], $3::bigint[], $4::bigint[]) WITH ORDINALITY AS e (id, subject_id, version, n)
             ORDER BY e.n
            """,
            self.name,
            [event.id for event in events],
            [event.subject_id for event in events],
            [event.version for event in events],
        )
        if wrong := [event.id for event in events if event.id in self.poison]:
            raise Cannot(f"event {wrong[0]} is poison")

    async def effects(self) -> list[EffectRow]:
        async with self.database.read() as tx:
            return await tx.fetch(
                EffectRow,
                "SELECT event_id, subject_id, version FROM effects WHERE consumer = $1 ORDER BY n",
                self.name,
            )

    async def ids(self) -> list[int]:
        return [row.event_id for row in await self.effects()]

    async def values(self, sql: str) -> list[int]:
        async with self.database.read() as tx:
            return await tx.fetch_values(int, sql)

    async def execute(self, sql: str) -> int:
        async with self.database.transaction() as tx:
            return await tx.execute(sql)

    async def parked(self) -> list[int]:
        """The positions of what is parked and not dead."""
        return await self.values("SELECT position FROM parked WHERE dead_at IS NULL ORDER BY position")

    async def dead(self) -> list[int]:
        return await self.values(
            "SELECT position FROM parked WHERE dead_at IS NOT NULL AND replayed_at IS NULL ORDER BY position"
        )


class EventHarness:
    """`publisher` has the outbox; `left` handles events, `right` rows."""

    def __init__(self, publisher: Database, left: RecordingHandler, right: RecordingHandler) -> None:
        self.publisher = publisher
        self.left = left
        self.right = right
        self.telemetry = Telemetry()
        self.clock = SystemClock()
        self.log = OutboxLog(SOURCE, publisher)
        self.connector = Connector(self.clock, self.telemetry)
        contract = event_log(SOURCE)
        transport = LocalTransport({contract.service: self.log.server(self.clock)})
        self.client = self.connector.client(contract, transport)
        self._versions: dict[int, int] = {}

    def outgoing(self, subject_id: int, type: str = "thing.changed") -> Outgoing:
        version = self._versions[subject_id] = self._versions.get(subject_id, 0) + 1
        return Outgoing(type, "thing", subject_id, version, Changed(n=version))

    async def emit(self, *subject_ids: int, type: str = "thing.changed") -> None:
        """An event of each subject, in one transaction."""
        async with self.publisher.transaction() as tx:
            tx.emit([self.outgoing(subject_id, type) for subject_id in subject_ids])

    async def emit_alone(self, *subject_ids: int) -> None:
        """An event of each subject, each in a transaction of its own: rows of one event."""
        for subject_id in subject_ids:
            await self.emit(subject_id)

    def consumer(
        self, handler: RecordingHandler, *, pace: Pace = QUICK, retry_seconds: Sequence[float] = QUICK_RETRIES
    ) -> Consumer:
        return Consumer(
            handler.subscription, SOURCE, handler.database, self.client, self.clock, self.telemetry,
            pace=pace, retry_seconds=retry_seconds,
        )  # fmt: skip

    @contextlib.asynccontextmanager
    async def consuming(
        self, *handlers: RecordingHandler, retry_seconds: Sequence[float] = QUICK_RETRIES
    ) -> AsyncGenerator[None]:
        """Both handlers, or those that are named, get events."""
        async with contextlib.AsyncExitStack() as stack:
            for handler in handlers or (self.left, self.right):
                await stack.enter_async_context(running(self.consumer(handler, retry_seconds=retry_seconds)))
            yield

    async def outbox(self) -> list[OutboxRow]:
        async with self.publisher.read() as tx:
            return await tx.fetch(OutboxRow, "SELECT id, events FROM outbox ORDER BY id")

    async def values(self, sql: str) -> list[int]:
        async with self.publisher.read() as tx:
            return await tx.fetch_values(int, sql)

    async def execute(self, sql: str) -> int:
        async with self.publisher.transaction() as tx:
            return await tx.execute(sql)

    async def is_drained(self, *handlers: RecordingHandler) -> bool:
        """Whether the handlers have had an effect of everything that is not dead."""
        end = [outbox_row.end_of_row(row.id) for row in (await self.outbox())[-1:]]
        for handler in handlers or (self.left, self.right):
            if await handler.values("SELECT position FROM cursors") != end or await handler.parked():
                return False
        return True

    async def drained(self, *handlers: RecordingHandler) -> None:
        await until(lambda: self.is_drained(*handlers), "everything is processed")


async def run(consumer: Consumer) -> None:
    """As a host runs it, but for the pause after a round that fails. Never returns."""
    telemetry = Telemetry()
    async with asyncio.TaskGroup() as group:
        for task in consumer_tasks(consumer):
            quick = msgspec.structs.replace(task, first_retry_seconds=0.02, longest_retry_seconds=0.1)
            group.create_task(quick.run("handler", SystemClock(), telemetry))


@contextlib.asynccontextmanager
async def running(consumer: Consumer) -> AsyncGenerator[Consumer]:
    task = asyncio.create_task(run(consumer))
    try:
        yield consumer
    finally:
        await ended(task)


async def ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


@contextlib.asynccontextmanager
async def opened(cluster: Cluster) -> AsyncGenerator[EventHarness]:
    async with contextlib.AsyncExitStack() as stack:
        publisher, left, right = [
            await stack.enter_async_context(databases.opened(dsn, name))
            for name in (SOURCE, "left", "right")
            for dsn in [await stack.enter_async_context(databases.fresh_dsn(cluster, "messaging", MIGRATIONS))]
        ]
        harness = EventHarness(
            publisher,
            RecordingHandler("left", left, frozenset({"thing.changed", "thing.noted"})),
            RecordingHandler("right", right, takes_rows=True),
        )
        stack.push_async_callback(harness.connector.close)
        yield harness
