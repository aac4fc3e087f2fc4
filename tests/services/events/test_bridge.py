"""The bridge on the real feed: what is in the stream is what `GET /events` shows, each entry once, in order."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncGenerator

import msgspec
import pytest_asyncio
from structlog.testing import capture_logs

from chassis.messaging.bridging import EVENTS, READER, Reader, bridging, reading
from embedded_nats.broker import Broker, started
from mercato.chassis.messaging.bridge import BATCH, ReadFeed
from mercato.chassis.messaging.consumers import Pace
from mercato.cli.nats import feed_reader
from mercato.contracts.events import Events
from services.events.harness import FeedHarness, event, row
from services.events.test_feed import purge_first

WRITERS = 4
PAGES = 12


@pytest_asyncio.fixture
async def broker() -> AsyncGenerator[Broker]:
    async with started(EVENTS, READER, has_streams=True) as broker:
        yield broker


@pytest_asyncio.fixture
async def stream(broker: Broker) -> AsyncGenerator[Reader]:
    async with reading(broker) as reader:
        yield reader


def reader_of(feed: FeedHarness) -> ReadFeed:
    return feed_reader(feed.client(Events))


async def write_much(feed: FeedHarness, pages: int = PAGES) -> None:
    """Several writers at once: rows of several events, and events by themselves."""

    async def write(writer: int) -> None:
        for page in range(pages):
            first = 1 + (writer * pages + page) * 3
            await feed.write_rows(row(first, "order.placed", "order.paid"), row(first + 1, "stock.committed"))
            await feed.write(event(first + 2, type="payment.captured", data='{"order_id":1,"words":"a \\u00e9"}'))

    await asyncio.gather(*(write(writer) for writer in range(WRITERS)))


async def assert_same(stream: Reader, feed: FeedHarness) -> None:
    entries = await feed.entries()
    await stream.until_last(entries[-1].position)
    messages = await stream.messages()
    assert [(m.subject, m.position) for m in messages] == [(f"mercato.events.{e.type}", e.position) for e in entries]
    assert [m.body for m in messages] == [msgspec.json.encode(entry) for entry in entries]


async def test_two_bridges_publish_a_feed_that_is_being_written(feed: FeedHarness, broker: Broker, stream: Reader):
    async with bridging(broker, reader_of(feed)) as one, bridging(broker, reader_of(feed)) as other:
        await write_much(feed)
        await assert_same(stream, feed)
        assert one.published + other.published >= WRITERS * PAGES * 4


async def test_pages_that_end_within_a_row_miss_nothing(feed: FeedHarness, broker: Broker, stream: Reader):
    assert BATCH % 7
    await feed.write_rows(*(row(n, *["order.placed"] * 7) for n in range(1, 41)))
    async with bridging(broker, reader_of(feed)):
        await assert_same(stream, feed)


async def test_a_commit_of_the_feed_wakes_the_bridge(feed: FeedHarness, broker: Broker, stream: Reader):
    await feed.write(event(1))
    async with bridging(broker, reader_of(feed), Pace(gather_s=0.0, poll_s=3_600.0, idle_s=3_600.0)) as running:
        await assert_same(stream, feed)
        feed.database.on_commit.append(running.bridge.wake)
        await feed.write(event(2))
        await assert_same(stream, feed)


async def test_a_deleted_store_is_filled_from_what_the_feed_has_kept(feed: FeedHarness, broker: Broker, stream: Reader):
    async with bridging(broker, reader_of(feed)):
        writing = asyncio.create_task(write_much(feed))
        await stream.until_count(20)
        await broker.kill()
        shutil.rmtree(broker.store)
        await purge_first(feed, 3)
        await broker.start()
        await writing
        await assert_same(stream, feed)


async def test_what_was_deleted_unpublished_is_reported(feed: FeedHarness, broker: Broker, stream: Reader):
    await feed.write(*(event(n) for n in range(1, 4)))
    async with bridging(broker, reader_of(feed)):
        await assert_same(stream, feed)
    published = await stream.messages()
    await feed.write(*(event(n) for n in range(4, 8)))
    await purge_first(feed, 5)
    with capture_logs() as logs:
        async with bridging(broker, reader_of(feed)):
            await stream.until_count(5)
    assert [log["event"] for log in logs if log["log_level"] == "error"] == ["bridge_missed_events"]
    kept = [entry.position for entry in await feed.entries()]
    assert [m.position for m in await stream.messages()] == [m.position for m in published] + kept


async def test_a_restored_feed_is_not_published(feed: FeedHarness, broker: Broker, stream: Reader):
    await feed.write(*(event(n) for n in range(1, 6)))
    async with bridging(broker, reader_of(feed)):
        await assert_same(stream, feed)
    before = await stream.messages()
    await feed.rows("DELETE FROM feed WHERE outbox_id > 2")
    with capture_logs() as logs:
        async with bridging(broker, reader_of(feed)):
            while not logs:
                await asyncio.sleep(0.01)
            assert await stream.messages() == before
            await stream.delete()
            await assert_same(stream, feed)
    assert [log["event"] for log in logs if log["log_level"] == "error"] == ["bridge_feed_is_behind"]
