"""A feed in memory, bridges that publish it, and a reader of the stream."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from typing import NamedTuple

import msgspec

from embedded_nats.broker import PASSWORD, Broker, user
from mercato.chassis.contract import Unavailable
from mercato.chassis.hosting.periodic import PeriodicTask
from mercato.chassis.messaging.bridge import BATCH, Bridge, FeedBehind, FeedMessage, FeedPurged, ReadFeed
from mercato.chassis.messaging.consumers import Pace
from mercato.chassis.messaging.jetstream import MESSAGE_ID, JetStream, JetStreamMissing, JetStreamRefused
from mercato.chassis.messaging.stream import BRIDGE_PUBLISHES, STREAM
from mercato.chassis.observability.clock import SystemClock
from mercato.chassis.observability.telemetry import Telemetry
from mercato.chassis.rpc.transports.nats import NatsConnection
from mercato.testing.waiting import until

QUICK = Pace(gather_s=0.0, poll_s=0.02, idle_s=0.05)
FIRST_RETRY_SECONDS = 0.02
STEP = 7
"""Positions are not consecutive."""

EVENTS = user("events", BRIDGE_PUBLISHES, ["_INBOX.events.>"])
READER = user("reader", ["$JS.API.>"], ["_INBOX.reader.>"])


class InStream(NamedTuple):
    """A message of the stream."""

    sequence: int
    subject: str
    position: int
    body: bytes


class Feed:
    """Entries in memory, which are added, deleted from the oldest on, or lost by a restore."""

    def __init__(self) -> None:
        self.entries: list[FeedMessage] = []
        self._purged = 0
        self._count = 0

    def add(self, count: int = 1, *, size: int = 0) -> None:
        for _ in range(count):
            self._count += 1
            position, type_ = self._count * STEP, ("order.placed", "order.paid")[self._count % 2]
            body = msgspec.json.encode({"position": position, "type": type_, "data": "x" * size})
            self.entries.append(FeedMessage(position, type_, body))

    def purge(self, count: int) -> None:
        self._purged = self.entries[count - 1].position
        del self.entries[:count]

    def restore(self, count: int, *, skipped: int = 0) -> None:
        """The feed has only its first `count` entries, as its backup had; the next is `skipped` entries behind them."""
        del self.entries[count:]
        self._count = count + skipped

    async def read(self, after: int) -> Sequence[FeedMessage]:
        last = self.entries[-1].position if self.entries else self._purged
        if 0 < after < self._purged:
            raise FeedPurged(self._purged)
        if after > last:
            raise FeedBehind(last)
        return [entry for entry in self.entries if entry.position > after][:BATCH]


@contextlib.asynccontextmanager
async def connected(broker: Broker, name: str) -> AsyncGenerator[NatsConnection]:
    connection = NatsConnection(broker.url, name, PASSWORD, name)
    await connection.open(seconds=60.0)
    try:
        yield connection
    finally:
        await connection.close()


class Running:
    """A bridge that runs."""

    def __init__(self, bridge: Bridge, telemetry: Telemetry) -> None:
        self.bridge = bridge
        self._telemetry = telemetry

    @property
    def published(self) -> float:
        return self._telemetry.registry.get_sample_value("mercato_bridge_published_total") or 0.0

    @property
    def position(self) -> float:
        return self._telemetry.registry.get_sample_value("mercato_bridge_position") or 0.0


@contextlib.asynccontextmanager
async def bridging(broker: Broker, read: ReadFeed, pace: Pace = QUICK) -> AsyncGenerator[Running]:
    """A bridge for the time of the block, as a process of the events service runs it; its end is a cancellation."""
    telemetry = Telemetry()
    async with connected(broker, "events") as connection:
        bridge = Bridge(read, connection, SystemClock(), telemetry, pace=pace)
        await bridge.open()
        task = PeriodicTask(
            "bridge", bridge.follow, 0.0, limit=0, first_retry_seconds=FIRST_RETRY_SECONDS,
            on_failure=bridge.note_failure,
        )  # fmt: skip
        running = asyncio.create_task(task.run("events", SystemClock(), telemetry))
        try:
            yield Running(bridge, telemetry)
        finally:
            running.cancel()
            await asyncio.wait({running})


class Reader:
    """Reads the whole stream, and changes what a person may change."""

    def __init__(self, connection: NatsConnection) -> None:
        self.jetstream = JetStream(connection)

    async def messages(self) -> list[InStream]:
        """All of the stream, by sequence number; none where there is no stream."""
        found: list[InStream] = []
        try:
            state = (await self.jetstream.ask(f"STREAM.INFO.{STREAM}")).state
            assert state
            for sequence in range(state.last_seq - state.messages + 1, state.last_seq + 1):
                answer = await self.jetstream.ask(f"STREAM.MSG.GET.{STREAM}", {"seq": sequence})
                assert answer.message
                position = int(answer.message.header(MESSAGE_ID))
                found.append(InStream(sequence, answer.message.subject, position, answer.message.data))
        except (JetStreamRefused, JetStreamMissing, Unavailable):
            return []
        return found

    async def count(self) -> int:
        try:
            state = (await self.jetstream.ask(f"STREAM.INFO.{STREAM}")).state
        except (JetStreamRefused, JetStreamMissing, Unavailable):
            return 0
        return state.messages if state else 0

    async def until_count(self, count: int) -> None:
        async def reached() -> bool:
            return await self.count() >= count

        await until(reached, f"{count} messages are in the stream")

    async def until_last(self, position: int) -> None:
        """Waits until the last message of the stream is the entry at a position."""

        async def reached() -> bool:
            try:
                answer = await self.jetstream.ask(f"STREAM.MSG.GET.{STREAM}", {"last_by_subj": ">"})
            except (JetStreamRefused, JetStreamMissing, Unavailable):
                return False
            return answer.message is not None and answer.message.header(MESSAGE_ID) == str(position)

        await until(reached, f"the stream ends at {position}")

    async def delete(self) -> None:
        await self.jetstream.ask(f"STREAM.DELETE.{STREAM}")


@contextlib.asynccontextmanager
async def reading(broker: Broker) -> AsyncGenerator[Reader]:
    async with connected(broker, "reader") as connection:
        reader = Reader(connection)
        await reader.jetstream.open()
        yield reader


@contextlib.asynccontextmanager
async def growing(feed: Feed, pause_s: float = 0.005) -> AsyncGenerator[None]:
    """The feed grows for the time of the block."""

    async def grow() -> None:
        while True:
            feed.add(3)
            await asyncio.sleep(pause_s)

    task = asyncio.create_task(grow())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})
