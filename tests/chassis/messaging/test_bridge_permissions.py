"""What the users of the stream may do, as the server enforces it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import nats
import pytest
import pytest_asyncio
from nats.aio.client import Client
from nats.js.api import ConsumerConfig

from embedded_nats.broker import PASSWORD, Broker, started
from mercato import topology
from mercato.chassis.messaging.stream import BRIDGE_PUBLISHES, STREAM
from mercato.embedded_nats import NatsUser
from mercato.testing.waiting import until_true

from .bridging import READER, Feed, bridging, reading


def of_topology(name: str) -> NatsUser:
    allowed = topology.nats_permissions(name)
    return NatsUser(name, PASSWORD, allowed.publish, allowed.subscribe)


@pytest_asyncio.fixture
async def broker() -> AsyncGenerator[Broker]:
    users = [of_topology(name) for name in ("events", "orders", topology.SUBSCRIBER)]
    async with started(*users, READER, has_streams=True) as broker:
        yield broker


class User:
    """A client of nats-py, and what the server has refused it."""

    def __init__(self, client: Client, refused: list[str]) -> None:
        self.client = client
        self.refused = refused

    async def publish(self, subject: str) -> None:
        await self.client.publish(subject, b"{}", reply=self.client.new_inbox())

    async def assert_refused(self, action: str, subject: str) -> None:
        await until_true(lambda: self.refused, f"{action} of {subject} is refused")
        assert [refused for refused in self.refused if action in refused and subject.lower() in refused]


@pytest_asyncio.fixture
async def subscriber(broker: Broker) -> AsyncGenerator[User]:
    refused: list[str] = []

    async def note(error: Exception) -> None:
        refused.append(str(error).lower())

    name: Any = topology.SUBSCRIBER
    client = await nats.connect(broker.url, user=name, password=PASSWORD, inbox_prefix=f"_INBOX.{name}", error_cb=note)
    yield User(client, refused)
    await client.close()


def test_the_permissions_of_services_and_of_the_bridge_are_named_one_by_one():
    events = topology.nats_permissions("events")
    assert set(BRIDGE_PUBLISHES) <= set(events.publish)
    assert [s for s in events.publish if s.startswith("$JS")] == [
        f"$JS.API.STREAM.INFO.{STREAM}",
        f"$JS.API.STREAM.CREATE.{STREAM}",
        f"$JS.API.STREAM.MSG.GET.{STREAM}",
    ]
    for caller in set(topology.CALLERS) - {"events"}:
        allowed = topology.nats_permissions(caller)
        assert not [s for s in (*allowed.publish, *allowed.subscribe) if s.startswith(("$JS", "mercato.events.*"))]
    assert topology.SUBSCRIBER not in topology.grants()


async def test_a_subscriber_reads_the_stream_with_a_durable_consumer(broker: Broker, subscriber: User):
    feed = Feed()
    feed.add(10)
    async with bridging(broker, feed.read), reading(broker) as stream:
        await stream.until_count(10)
    jetstream = subscriber.client.jetstream()
    for name in ("mine", "yours"):
        await jetstream.add_consumer(STREAM, ConsumerConfig(durable_name=name))
    reads = await jetstream.pull_subscribe_bind("mine", STREAM)
    messages = await reads.fetch(10, timeout=60)
    for message in messages:
        await message.ack_sync(timeout=60)
    assert [message.headers and message.headers["Nats-Msg-Id"] for message in messages] == [
        str(entry.position) for entry in feed.entries
    ]
    assert [message.data for message in messages] == [entry.body for entry in feed.entries]
    state = await jetstream.consumer_info(STREAM, "mine")
    assert (state.num_pending, state.num_ack_pending) == (0, 0)
    assert (await jetstream.stream_info(STREAM)).state.messages == 10
    assert await jetstream.delete_consumer(STREAM, "yours")
    assert subscriber.refused == []


@pytest.mark.parametrize(
    "subject",
    [
        "mercato.events.order.paid", "mercato.events.list", "mercato.orders.get", "$SRV.PING", "_INBOX.events.x",
        f"$JS.API.STREAM.DELETE.{STREAM}", f"$JS.API.STREAM.PURGE.{STREAM}", f"$JS.API.STREAM.UPDATE.{STREAM}",
        f"$JS.API.STREAM.MSG.DELETE.{STREAM}", f"$JS.API.STREAM.CREATE.{STREAM}", "$JS.API.STREAM.CREATE.OTHER",
        "$JS.API.STREAM.NAMES", "$JS.API.CONSUMER.CREATE.OTHER.mine", "$JS.API.INFO", "$JS.ACK.OTHER.mine.1.1.1.1.1",
    ],
)  # fmt: skip
async def test_a_subscriber_cannot_publish_anything_else(broker: Broker, subscriber: User, subject: str):
    await subscriber.publish(subject)
    await subscriber.assert_refused("publish", subject)


@pytest.mark.parametrize(
    "subject", ["mercato.events.*.*", "mercato.>", "mercato.orders.get", "_INBOX.events.>", "_INBOX.>", ">", "$JS.>"]
)
async def test_a_subscriber_cannot_read_other_subjects(broker: Broker, subscriber: User, subject: str):
    await subscriber.client.subscribe(subject)
    await subscriber.assert_refused("subscription", subject)


async def test_other_services_cannot_write_to_the_stream(broker: Broker):
    refused: list[str] = []

    async def note(error: Exception) -> None:
        refused.append(str(error).lower())

    client = await nats.connect(
        broker.url, user="orders", password=PASSWORD, inbox_prefix="_INBOX.orders", error_cb=note
    )
    try:
        for subject in ("mercato.events.order.paid", f"$JS.API.STREAM.CREATE.{STREAM}"):
            refused.clear()
            await client.publish(subject, b"{}")
            await until_true(lambda: refused)
            assert subject.lower() in refused[0]
    finally:
        await client.close()
    await asyncio.sleep(0)
