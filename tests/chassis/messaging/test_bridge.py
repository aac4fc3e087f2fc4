"""The bridge, on a real NATS server: the stream has each entry of the feed once, in order, whatever happens to it."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import pytest
import pytest_asyncio
from structlog.testing import capture_logs

from embedded_nats.broker import Broker, started
from mercato.chassis.messaging.bridge import BATCH, Bridge
from mercato.chassis.messaging.consumers import Pace
from mercato.chassis.messaging.jetstream import JetStreamAnswer
from mercato.chassis.messaging.stream import CONFIGURATION, STREAM
from mercato.chassis.observability.clock import SystemClock
from mercato.chassis.observability.telemetry import Telemetry
from mercato.testing.waiting import until_true

from .bridging import EVENTS, READER, Feed, Reader, bridging, connected, growing, reading

SOME = 200
SHORT_NANOSECONDS = 100_000_000
"""The shortest window in which a server refuses duplicates."""


@pytest_asyncio.fixture
async def broker() -> AsyncGenerator[Broker]:
    async with started(EVENTS, READER, has_streams=True) as broker:
        yield broker


@pytest_asyncio.fixture
async def stream(broker: Broker) -> AsyncGenerator[Reader]:
    async with reading(broker) as reader:
        yield reader


@pytest.fixture
def feed() -> Feed:
    return Feed()


async def assert_same(stream: Reader, feed: Feed) -> None:
    """In the end the stream has what the feed has, one after the other."""
    await stream.until_last(feed.entries[-1].position)
    messages = await stream.messages()
    assert [(m.subject, m.position, m.body) for m in messages] == [
        (f"mercato.events.{entry.type}", entry.position, entry.body) for entry in feed.entries
    ]
    assert [m.sequence for m in messages] == list(range(messages[0].sequence, messages[0].sequence + len(messages)))


async def test_the_stream_has_the_entries_of_the_feed_in_order(broker: Broker, stream: Reader, feed: Feed):
    feed.add(2 * BATCH + 1)
    async with bridging(broker, feed.read) as running:
        await assert_same(stream, feed)
        feed.add(5)
        await assert_same(stream, feed)
        await until_true(lambda: running.published == len(feed.entries))
        assert running.position == feed.entries[-1].position


async def test_a_wake_up_makes_it_prompt(broker: Broker, stream: Reader, feed: Feed):
    feed.add()
    async with bridging(broker, feed.read, Pace(gather_s=0.0, poll_s=3_600.0, idle_s=3_600.0)) as running:
        await assert_same(stream, feed)
        for _ in range(3):
            feed.add()
            running.bridge.wake()
            await assert_same(stream, feed)


async def test_a_bridge_goes_on_where_another_has_ended(broker: Broker, stream: Reader, feed: Feed):
    """Each is cancelled in the middle of what it does: what it has sent by then may be stored or not."""
    async with growing(feed):
        for lives in range(1, 11):
            async with bridging(broker, feed.read):
                await stream.until_count(lives * 40)
    async with bridging(broker, feed.read):
        await assert_same(stream, feed)


async def test_two_bridges_at_once_publish_each_entry_once(broker: Broker, stream: Reader, feed: Feed):
    async with bridging(broker, feed.read) as one, bridging(broker, feed.read) as other:
        async with growing(feed):
            await until_true(lambda: min(one.published, other.published) >= SOME)
        await assert_same(stream, feed)
        await until_true(lambda: one.published + other.published == len(feed.entries))


async def test_what_belongs_behind_the_end_of_a_former_stream_is_refused(broker: Broker, stream: Reader, feed: Feed):
    """A bridge has read the end, and is stopped. Meanwhile the stream is made again out of a feed without its first
    entries, and has as many messages as before: others."""
    feed.add(4)
    async with connected(broker, "events") as connection:
        stopped = Bridge(feed.read, connection, SystemClock(), Telemetry())
        await stopped.open()
        end = await stopped._publish(await stopped._read_end(), feed.entries[:2])
        assert end is not None
        await stream.delete()
        feed.purge(2)
        async with bridging(broker, feed.read):
            await stream.until_count(2)
        feed.add(1)
        assert await stopped._publish(end, feed.entries[-1:]) is None
    async with bridging(broker, feed.read):
        await assert_same(stream, feed)


async def test_a_stream_that_takes_no_batches_is_reported(broker: Broker, stream: Reader, feed: Feed):
    """A person has made it, or a server before 2.12."""
    await stream.jetstream.ask(f"STREAM.CREATE.{STREAM}", {**CONFIGURATION, "allow_atomic": False})
    feed.add(1)
    with capture_logs() as logs:
        async with bridging(broker, feed.read):
            await until_true(lambda: logs)
            await stream.delete()
            await assert_same(stream, feed)
            await until_true(lambda: len(logs) > 1)
    assert [log["event"] for log in logs] == ["bridge_stopped", "bridge_stream_made"]
    assert "does not take batches (allow_atomic), which NATS has since 2.12" in logs[0]["reason"]


async def test_a_deleted_stream_is_made_again_with_all_that_the_feed_has(broker: Broker, stream: Reader, feed: Feed):
    async with bridging(broker, feed.read):
        async with growing(feed):
            for _ in range(3):
                await stream.until_count(SOME)
                await stream.delete()
            await stream.until_count(SOME)
        await assert_same(stream, feed)
        # Also where nothing new comes.
        await stream.delete()
        await assert_same(stream, feed)


async def test_a_stream_that_is_deleted_while_its_end_is_read_is_made_again(
    broker: Broker, stream: Reader, feed: Feed, monkeypatch: pytest.MonkeyPatch
):
    feed.add(3)
    async with bridging(broker, feed.read):
        await assert_same(stream, feed)
    async with connected(broker, "events") as connection:
        bridge = Bridge(feed.read, connection, SystemClock(), Telemetry())
        await bridge.open()
        ask = bridge._jetstream.ask

        async def ask_after_a_deletion(what: str, question: Mapping[str, Any] | None = None) -> JetStreamAnswer:
            if what.startswith("STREAM.MSG.GET"):
                await stream.delete()
            return await ask(what, question)

        monkeypatch.setattr(bridge._jetstream, "ask", ask_after_a_deletion)
        assert (await bridge._read_end()).position == 0


async def test_a_deleted_store_is_filled_again(broker: Broker, stream: Reader, feed: Feed):
    async with bridging(broker, feed.read), bridging(broker, feed.read):
        async with growing(feed):
            for _ in range(2):
                await stream.until_count(SOME)
                await broker.kill()
                shutil.rmtree(broker.store)
                await broker.start()
            await stream.until_count(SOME)
        await assert_same(stream, feed)


async def test_a_killed_server_that_keeps_its_store_gets_what_is_missing(broker: Broker, stream: Reader, feed: Feed):
    async with bridging(broker, feed.read):
        async with growing(feed):
            for round_ in range(1, 4):
                await stream.until_count(round_ * SOME)
                await broker.kill()
                await broker.start()
        await assert_same(stream, feed)


# --------------------------------------------------------------------------------------------------- gaps and restores


async def test_what_the_feed_has_deleted_unpublished_is_reported_and_passed_over(
    broker: Broker, stream: Reader, feed: Feed
):
    feed.add(10)
    async with bridging(broker, feed.read):
        await stream.until_count(10)
    last = feed.entries[-1].position
    feed.add(10)
    feed.purge(15)
    missed = {"event": "bridge_missed_events", "after": last, "oldest": feed._purged, "log_level": "error"}
    with capture_logs() as logs:
        async with bridging(broker, feed.read):
            await stream.until_count(15)
            feed.add(1)
            await stream.until_last(feed.entries[-1].position)
    assert [log for log in logs if log["log_level"] == "error"] == [missed]
    assert [m.position for m in await stream.messages()][10:] == [entry.position for entry in feed.entries]


async def test_a_missing_rest_of_the_feed_is_reported_once(broker: Broker, stream: Reader, feed: Feed):
    """Nothing behind the gap can be published that would move the end of the stream over it."""
    feed.add(10)
    async with bridging(broker, feed.read):
        await stream.until_count(10)
    feed.add(10)
    feed.purge(20)
    reads: list[int] = []

    async def read(after: int):
        reads.append(after)
        return await feed.read(after)

    with capture_logs() as logs:
        async with bridging(broker, read):
            await until_true(lambda: len(reads) >= 10)
    assert [log["event"] for log in logs if log["log_level"] == "error"] == ["bridge_missed_events"]


async def test_a_feed_that_was_restored_is_reported_until_the_stream_is_deleted(
    broker: Broker, stream: Reader, feed: Feed
):
    # The server must not be what refuses entries that were there before.
    await stream.jetstream.ask(f"STREAM.CREATE.{STREAM}", {**CONFIGURATION, "duplicate_window": SHORT_NANOSECONDS})
    feed.add(20)
    async with bridging(broker, feed.read):
        await stream.until_count(20)
    await asyncio.sleep(10 * SHORT_NANOSECONDS / 1e9)
    before = await stream.messages()
    feed.restore(12)
    reads: list[int] = []

    async def read(after: int):
        reads.append(after)
        return await feed.read(after)

    behind = {"position": before[-1].position, "last": feed.entries[-1].position, "log_level": "error"}
    with capture_logs() as logs:
        async with bridging(broker, read):
            await until_true(lambda: len(reads) >= 5)
            assert await stream.messages() == before
            await stream.delete()
            await assert_same(stream, feed)
    errors = [log for log in logs if log["log_level"] == "error"]
    assert errors == [{"event": "bridge_feed_is_behind", **behind}]


async def test_a_restored_feed_goes_on_with_positions_that_the_stream_has_not_had(
    broker: Broker, stream: Reader, feed: Feed
):
    feed.add(20)
    async with bridging(broker, feed.read):
        await stream.until_count(20)
    before = await stream.messages()
    feed.restore(12, skipped=1_000)

    with capture_logs() as logs:
        async with bridging(broker, feed.read):
            await until_true(lambda: [log["event"] for log in logs].count("bridge_feed_is_behind") == 1)
            assert await stream.messages() == before
            feed.add(3)
            await stream.until_count(23)

    after = await stream.messages()
    assert after[:20] == before
    assert [message.body for message in after[20:]] == [entry.body for entry in feed.entries[-3:]]
    assert [log["event"] for log in logs if log["log_level"] == "error"] == ["bridge_feed_is_behind"]


# ------------------------------------------------------------------------------------------------------------- refusals


async def test_without_jetstream_there_is_one_line_in_the_log(feed: Feed):
    feed.add(3)
    async with started(EVENTS, READER) as broker:
        with capture_logs() as logs:
            async with bridging(broker, feed.read) as running:
                rounds = "mercato_periodic_rounds_total"
                labels = {"service": "events", "task": "bridge", "outcome": "failed"}
                registry = running._telemetry.registry
                await until_true(lambda: (registry.get_sample_value(rounds, labels) or 0) >= 5)
                assert [log["event"] for log in logs] == ["bridge_waits"]
                assert "no JetStream" in logs[0]["reason"]
                await broker.kill()
                broker.has_streams = True
                await broker.start()
                async with reading(broker) as stream:
                    await assert_same(stream, feed)


async def test_a_full_stream_keeps_what_it_has_and_goes_on_when_there_is_room(
    broker: Broker, stream: Reader, feed: Feed
):
    """A person has made it, or changed its limits: the bridge takes it as it is."""
    await stream.jetstream.ask(f"STREAM.CREATE.{STREAM}", {**CONFIGURATION, "max_bytes": 20_000})
    feed.add(2 * BATCH)
    with capture_logs() as logs:
        async with bridging(broker, feed.read):
            await until_true(lambda: any(log["event"] == "bridge_refused" for log in logs))
            kept = [message.position for message in await stream.messages()]
            assert kept == [entry.position for entry in feed.entries[: len(kept)]]
            await stream.jetstream.ask(f"STREAM.UPDATE.{STREAM}", {**CONFIGURATION, "max_bytes": 20_000_000})
            await assert_same(stream, feed)
    assert [log["code"] for log in logs if log["event"] == "bridge_refused"] == [10077]


async def test_an_entry_that_is_larger_than_a_message_may_be_is_not_passed_over(
    broker: Broker, stream: Reader, feed: Feed
):
    feed.add(3)
    feed.add(1, size=1_048_576)
    feed.add(3)
    with capture_logs() as logs:
        async with bridging(broker, feed.read):
            await until_true(lambda: any(log["event"] == "bridge_stopped" for log in logs))
    assert [message.position for message in await stream.messages()] == [e.position for e in feed.entries[:3]]
    [reason] = [log["reason"] for log in logs if log["event"] == "bridge_stopped"]
    assert f"the entry at {feed.entries[3].position} has" in reason


async def test_large_entries_travel_in_smaller_batches(broker: Broker, stream: Reader, feed: Feed):
    feed.add(30, size=600_000)
    async with bridging(broker, feed.read):
        await assert_same(stream, feed)


async def test_every_wait_of_the_bridge_is_bounded(broker: Broker, feed: Feed):
    """A cancellation ends it at once, also while the server does not read."""
    feed.add(10)
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(bridging(broker, feed.read))
        broker.signal(signal.SIGSTOP)
        feed.add(10)
    broker.signal(signal.SIGCONT)
