"""What is kept for streams, and how they end where the feed is lost: by a feed whose pages the test gives."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import Mapping
from typing import Any

import msgspec

from mercato.chassis.contract import ServiceError
from mercato.chassis.observability.clock import SystemClock
from mercato.contracts.events import CursorTooOld, EventPage, FeedEntry, FollowEvents
from mercato.gateway.streams.entries import Interest
from mercato.gateway.streams.feed import SharedFeed
from mercato.gateway.streams.limits import StreamLimits
from mercato.gateway.streams.stream import Stream
from mercato.testing.waiting import BOUND_SECONDS, until_true

AT = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


def entry(position: int, subject: str = "order 1", size: int = 0) -> FeedEntry:
    return FeedEntry(position, f"orders:{position}", "order.placed", subject, 1, {"text": "x" * size}, AT)


class Feed:
    """The operation: gives the entries that were added, and counts who reads."""

    def __init__(self) -> None:
        self.entries: list[FeedEntry] = []
        self.end = 0
        self.error: ServiceError | None = None
        self.reading = 0
        self.most_reading = 0
        self.released = asyncio.Event()
        self.released.set()
        self._added = asyncio.Event()

    def add(self, *entries: FeedEntry) -> None:
        self.entries += entries
        self.end = entries[-1].position
        self._wake()

    def fail(self, error: ServiceError) -> None:
        self.error = error
        self._wake()

    def _wake(self) -> None:
        self._added.set()
        self._added = asyncio.Event()

    async def follow(self, request: FollowEvents) -> EventPage:
        if request.wait_ms == 0:
            self.reading += 1
            self.most_reading = max(self.most_reading, self.reading)
            try:
                await self.released.wait()
            finally:
                self.reading -= 1
        while True:
            if self.error is not None:
                raise self.error
            found = tuple(e for e in self.entries if e.position > (request.after or 0))[: request.limit]
            if found or not request.wait_ms:
                last = found[-1].position if found else max(self.end, request.after or 0)
                return EventPage(found, last, is_full=len(found) == request.limit)
            await self._added.wait()


class Client:
    """Takes what is sent, or nothing while it `waits`."""

    def __init__(
        self, feed: SharedFeed, limits: StreamLimits, *, after: int = 0, at_end: bool = True, **interest: Any
    ) -> None:
        self.stream = Stream(feed, limits, Interest(**interest), after, b"", at_end=at_end)
        self.takes = asyncio.Event()
        self.takes.set()
        self.sent = b""
        self.task = asyncio.create_task(self.stream.run(self._send))

    async def _send(self, message: Mapping[str, Any]) -> None:
        await self.takes.wait()
        self.sent += message["body"]

    def ids(self) -> list[int]:
        return [int(line[4:]) for line in self.sent.splitlines() if line.startswith(b"id: ")]

    async def leave(self) -> None:
        self.stream.end("test")
        self.takes.set()
        await self.task


def made(**limits: Any) -> tuple[Feed, SharedFeed, StreamLimits]:
    feed, bounds = Feed(), msgspec.structs.replace(StreamLimits(), **limits)
    return feed, SharedFeed(feed.follow, SystemClock(), bounds), bounds


async def test_a_live_stream_of_a_subject_gets_that_alone_also_of_what_is_remembered():
    feed, shared, limits = made()
    first = Client(shared, limits, subject="order 1")
    await until_true(lambda: first.stream.is_live)
    feed.add(entry(1), entry(2, "order 2"), entry(3))
    await until_true(lambda: first.ids() == [1, 3])

    second = Client(shared, limits, at_end=False, subject="order 2")
    await until_true(lambda: second.stream.is_live)
    feed.add(entry(4), entry(5, "order 2"))

    await until_true(lambda: second.ids()[-1:] == [5])
    assert second.ids() == [2, 5]
    for client in (first, second):
        await client.leave()


async def test_a_stream_gets_of_a_remembered_page_what_follows_its_position():
    feed, shared, limits = made()
    first = Client(shared, limits)
    await until_true(lambda: first.stream.is_live)
    feed.add(entry(1), entry(2), entry(3))
    await until_true(lambda: first.ids() == [1, 2, 3])

    second = Client(shared, limits, after=2, at_end=False)
    await until_true(lambda: second.ids()[-1:] == [3])

    assert second.ids() == [3]
    for client in (first, second):
        await client.leave()


async def test_what_is_remembered_is_bounded_and_a_stream_that_needs_more_reads_it():
    feed, shared, limits = made(recent_entries=3)
    live = Client(shared, limits)
    await until_true(lambda: live.stream.is_live)
    for position in range(1, 8):
        feed.add(entry(position))
        await until_true(lambda position=position: live.ids()[-1:] == [position])
    feed.entries.clear()  # what is not remembered is lost, so that a stream without a gap has read it

    late = Client(shared, limits, at_end=False)
    await until_true(lambda: late.stream.is_live)

    assert late.ids() == []
    for client in (live, late):
        await client.leave()


async def test_what_waits_for_all_clients_is_bounded_and_they_miss_nothing():
    feed, shared, limits = made(buffered_bytes=10_000)
    clients = [Client(shared, limits) for _ in range(4)]
    await until_true(lambda: all(client.stream.is_live for client in clients))
    for client in clients:
        client.takes.clear()
    for position in range(1, 9):
        feed.add(entry(position, size=2_000))
        await until_true(lambda position=position: shared.position in (position, None))
        assert shared.buffered_bytes <= limits.buffered_bytes

    assert sum(client.stream.fell_behind for client in clients) > 0
    for client in clients:
        client.takes.set()
    await until_true(lambda: all(client.ids()[-1:] == [8] for client in clients))
    assert [client.ids() for client in clients] == [list(range(1, 9))] * 4
    for client in clients:
        await client.leave()
    assert shared.buffered_bytes == 0


async def test_no_more_streams_read_at_once_than_the_bound():
    feed, shared, limits = made(reads_at_once=2)
    feed.add(entry(1))
    feed.released.clear()
    clients = [Client(shared, limits, at_end=False) for _ in range(6)]
    await until_true(lambda: feed.reading == 2)

    feed.released.set()
    await until_true(lambda: all(client.ids() == [1] for client in clients))

    assert feed.most_reading == 2
    for client in clients:
        await client.leave()


async def test_all_live_streams_end_where_the_feed_does_not_have_what_follows():
    feed, shared, limits = made()
    clients = [Client(shared, limits), Client(shared, limits, subject="order 1")]
    await until_true(lambda: all(client.stream.is_live for client in clients))

    feed.fail(CursorTooOld(after=1, oldest=7))

    async with asyncio.timeout(BOUND_SECONDS):
        await asyncio.gather(*(client.task for client in clients))
    assert [client.stream.ended for client in clients] == ["position_lost"] * 2


async def test_a_stream_that_reads_by_itself_ends_where_the_feed_does_not_have_what_follows():
    feed, shared, limits = made()
    feed.error = CursorTooOld(after=1, oldest=7)

    client = Client(shared, limits, at_end=False)

    async with asyncio.timeout(BOUND_SECONDS):
        await client.task
    assert client.stream.ended == "position_lost"
