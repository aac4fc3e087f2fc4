"""What the feed needs of the events of all services that have some: it publishes each as it is."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Final

import pytest
import pytest_asyncio

from mercato.testing.cluster import Cluster
from pacts.book import PactBook
from pacts.event_consumers import FeedConsumer, assert_reads_the_log, example

CONSUMER: Final = "events"

pytestmark = pytest.mark.asyncio(loop_scope="session")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def feed(cluster: Cluster, book: PactBook) -> AsyncGenerator[FeedConsumer]:
    async with FeedConsumer(cluster, "events", book).running() as made:
        yield made


EVENTS: Final = (
    ("inventory", "stock.held", "reservation"),
    ("orders", "order.paid", "order"),
    ("payments", "payment.captured", "payment"),
    ("products", "product.price_changed", "product"),
)


@pytest.mark.parametrize(("provider", "type_", "subject"), EVENTS)
async def test_the_feed_takes_the_events_of_a_service(feed: FeedConsumer, provider: str, type_: str, subject: str):
    await feed.consume(example(provider, type_, subject, {}))


@pytest.mark.parametrize(("provider", "type_", "subject"), EVENTS)
async def test_the_feed_reads_the_events_of_another_process(
    feed: FeedConsumer, provider: str, type_: str, subject: str
):
    await assert_reads_the_log(feed, example(provider, type_, subject, {}))
    await feed.forget()
