"""A publisher and two consumers, each with a database of its own, and relays between them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from pathlib import Path

from mercato.chassis.contract import Message
from mercato.chassis.db import Database, Row, Tx
from mercato.chassis.events import Event, Outgoing, Subscription, emit
from mercato.chassis.inbox import LocalBus
from mercato.chassis.relay import Pace, Relay
from mercato.chassis.telemetry import Telemetry
from mercato.chassis.testing import Cluster

MIGRATIONS = Path(__file__).with_name("migrations_with_events")
SOURCE = "shop"
QUICK = Pace(idle_s=0.01, gather_s=0.0, failed_s=0.02, lead_s=0.02, reap_s=0.05)
QUICK_RETRIES = (0.01, 0.02, 0.03, 0.04)
NO_RETRIES = (3_600.0,) * 4
UNTIL_SECONDS = 30.0
POLL_SECONDS = 0.01


class Told(Message):
    n: int


class EffectRow(Row):
    event_id: int
    subject_id: int
    version: int


class Cannot(Exception):
    """What a consumer says to an event that it cannot take."""


class Taker:
    """A consumer whose effects can be counted, and that can be told what it cannot take."""

    def __init__(self, name: str, database: Database, types: frozenset[str] | None = None) -> None:
        self.name = name
        self.database = database
        self.poison: set[int] = set()
        """Ids of events that it cannot take."""
        self.handled: list[list[int]] = []
        """The ids of each batch that it was given."""
        self.subscription = Subscription(name, self.handle, types)

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


class EventWorld:
    """`publisher` has the outbox; `left` and `right` are the takers."""

    def __init__(self, publisher: Database, left: Taker, right: Taker) -> None:
        self.publisher = publisher
        self.left = left
        self.right = right
        self.telemetry = Telemetry()
        self.bus = LocalBus([(taker.subscription, taker.database) for taker in (left, right)], self.telemetry)
        self._versions: dict[int, int] = {}

    def outgoing(self, subject_id: int, type: str = "thing.changed") -> Outgoing:
        version = self._versions[subject_id] = self._versions.get(subject_id, 0) + 1
        return Outgoing(type, "thing", subject_id, version, Told(n=version))

    async def emit(self, *subject_ids: int, type: str = "thing.changed") -> None:
        """An event of each subject, in one transaction."""
        async with self.publisher.transaction() as tx:
            await emit(tx, [self.outgoing(subject_id, type) for subject_id in subject_ids])

    def relay(
        self, *, pace: Pace = QUICK, retry_seconds: Sequence[float] = QUICK_RETRIES, database: Database | None = None
    ) -> Relay:
        return Relay(
            SOURCE, database or self.publisher, self.bus, self.telemetry, pace=pace, retry_seconds=retry_seconds
        )

    @contextlib.asynccontextmanager
    async def relaying(self, relay: Relay | None = None) -> AsyncGenerator[Relay]:
        relay = relay or self.relay()
        task = asyncio.create_task(relay.run())
        try:
            yield relay
        finally:
            await ended(task)
            await relay.release()

    async def values(self, sql: str) -> list[int]:
        async with self.publisher.read() as tx:
            return await tx.fetch_values(int, sql)

    async def unpublished(self) -> list[int]:
        return await self.values("SELECT id FROM outbox WHERE published_at IS NULL ORDER BY id")

    async def is_drained(self) -> bool:
        return not await self.unpublished()

    async def expire_lease(self) -> None:
        """As if its holder had been silent for long."""
        async with self.publisher.transaction() as tx:
            await tx.execute("UPDATE relays SET leased_until = clock_timestamp() - interval '1 second'")


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
        yield EventWorld(
            databases[0], Taker("left", databases[1]), Taker("right", databases[2], frozenset({"thing.changed"}))
        )


@contextlib.asynccontextmanager
async def database(cluster: Cluster, name: str) -> AsyncGenerator[Database]:
    dsn = await cluster.fresh_database("relayed", MIGRATIONS)
    made = Database(dsn, name, Telemetry(), size=4)
    await made.open()
    try:
        yield made
    finally:
        await made.close()
        await cluster.release_database(dsn)
