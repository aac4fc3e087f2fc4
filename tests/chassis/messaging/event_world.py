"""A publisher and two consumers, each with a database of its own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from pathlib import Path

from mercato.chassis.contract import Message
from mercato.chassis.messaging.consumers import Consumer, Pace
from mercato.chassis.messaging.events import Event, Outgoing, SourceRow, Subscription, emit
from mercato.chassis.messaging.outbox import OutboxLog, event_log
from mercato.chassis.observability.clock import SystemClock
from mercato.chassis.observability.telemetry import Telemetry
from mercato.chassis.postgres import outbox_row
from mercato.chassis.postgres.database import Database, Row, Tx
from mercato.chassis.rpc.client import Connector
from mercato.chassis.rpc.transports.local import LocalTransport
from mercato.testing.harness import Cluster

MIGRATIONS = Path(__file__).with_name("migrations_with_events")
SOURCE = "shop"
QUICK = Pace(gather_s=0.0, poll_s=0.01, idle_s=0.02, failed_s=0.02)
QUICK_RETRIES = (0.01, 0.02, 0.03, 0.04)
NO_RETRIES = (3_600.0,) * 4
UNTIL_SECONDS = 120.0
POLL_SECONDS = 0.01


class Told(Message):
    n: int


class EffectRow(Row):
    event_id: int
    subject_id: int
    version: int


class OutboxRow(Row):
    id: int
    events: str


class Cannot(Exception):
    """What a consumer says to an event that it cannot process."""


def place(row: int, number: int = 1) -> int:
    """The position of the event with this number in its row, both from 1 on."""
    return outbox_row.position(row, number - 1)


class Taker:
    """A consumer whose effects can be counted, and that can be told what it cannot process."""

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


class EventWorld:
    """`publisher` has the outbox; `left` and `right` are the takers, of which `left` takes events, `right` rows."""

    def __init__(self, publisher: Database, left: Taker, right: Taker) -> None:
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
        return Outgoing(type, "thing", subject_id, version, Told(n=version))

    async def emit(self, *subject_ids: int, type: str = "thing.changed") -> None:
        """An event of each subject, in one transaction."""
        async with self.publisher.transaction() as tx:
            await emit(tx, [self.outgoing(subject_id, type) for subject_id in subject_ids])

    async def emit_alone(self, *subject_ids: int) -> None:
        """An event of each subject, each in a transaction of its own: rows of one event."""
        for subject_id in subject_ids:
            await self.emit(subject_id)

    def consumer(self, taker: Taker, *, pace: Pace = QUICK, retry_seconds: Sequence[float] = QUICK_RETRIES) -> Consumer:
        return Consumer(
            taker.subscription, SOURCE, taker.database, self.client, self.clock, self.telemetry,
            pace=pace, retry_seconds=retry_seconds,
        )  # fmt: skip

    @contextlib.asynccontextmanager
    async def consuming(self, *takers: Taker, retry_seconds: Sequence[float] = QUICK_RETRIES) -> AsyncGenerator[None]:
        """Both takers, or those that are named, consume."""
        async with contextlib.AsyncExitStack() as stack:
            for taker in takers or (self.left, self.right):
                await stack.enter_async_context(running(self.consumer(taker, retry_seconds=retry_seconds)))
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

    async def is_drained(self, *takers: Taker) -> bool:
        """Whether the takers have had an effect of everything that is not dead."""
        end = [outbox_row.end_of_row(row.id) for row in (await self.outbox())[-1:]]
        for taker in takers or (self.left, self.right):
            if await taker.values("SELECT position FROM cursors") != end or await taker.parked():
                return False
        return True

    async def drained(self, *takers: Taker) -> None:
        await until(lambda: self.is_drained(*takers), "everything is processed")


@contextlib.asynccontextmanager
async def running(consumer: Consumer) -> AsyncGenerator[Consumer]:
    task = asyncio.create_task(consumer.run())
    try:
        yield consumer
    finally:
        await ended(task)


async def ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def until(condition: Callable[[], Awaitable[bool]], what: str) -> None:
    """Waits for something that must come true."""
    end = asyncio.get_running_loop().time() + UNTIL_SECONDS
    while not await condition():
        assert asyncio.get_running_loop().time() < end, f"it never came true that {what}"
        await asyncio.sleep(POLL_SECONDS)


@contextlib.asynccontextmanager
async def opened(cluster: Cluster) -> AsyncGenerator[EventWorld]:
    async with contextlib.AsyncExitStack() as stack:
        databases = [await stack.enter_async_context(database(cluster, name)) for name in (SOURCE, "left", "right")]
        left = Taker("left", databases[1], frozenset({"thing.changed", "thing.told"}))
        world = EventWorld(databases[0], left, Taker("right", databases[2], takes_rows=True))
        stack.push_async_callback(world.connector.close)
        yield world


@contextlib.asynccontextmanager
async def database(cluster: Cluster, name: str) -> AsyncGenerator[Database]:
    dsn = await cluster.fresh_database("messaging", MIGRATIONS)
    made = Database(dsn, name, Telemetry(), size=4)
    await made.open()
    try:
        yield made
    finally:
        await made.close()
        await cluster.release_database(dsn)
