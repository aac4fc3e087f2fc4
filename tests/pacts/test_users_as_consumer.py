"""What the security log of users needs of the events of orders and products."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Final

import pytest
import pytest_asyncio

from mercato.testing.cluster import Cluster
from pacts.book import PactBook
from pacts.event_consumers import EventConsumer, assert_reads_the_log, example
from pacts.messages import EventExample

CONSUMER: Final = "users"

pytestmark = pytest.mark.asyncio(loop_scope="session")

PRICE_CHANGED: Final = example(
    "products",
    "product.price_changed",
    "product",
    {
        "product_id": 7_501,
        "old_price_minor": 1_000,
        "old_currency": "USD",
        "price_minor": 1_250,
        "currency": "USD",
        "version": 2,
        "actor_role": "staff",
        "actor_id": 9,
    },
)
REFUNDED: Final = example(
    "orders",
    "refund.succeeded",
    "order",
    {
        "order_id": 7_001,
        "user_id": 7_001,
        "refund_id": "0f3a5c7e9b1d2f4a6c8e0b1d",
        "amount_minor": 1_000,
        "refunded_minor": 1_000,
        "currency": "USD",
        "version": 5,
        "actor_role": "staff",
        "actor_id": 9,
    },
)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def users(cluster: Cluster, book: PactBook) -> AsyncGenerator[EventConsumer]:
    async with EventConsumer(cluster, "users", book).running() as made:
        yield made


@pytest.mark.parametrize("event", [PRICE_CHANGED, REFUNDED], ids=lambda each: each.provider)
async def test_the_security_log_reads_the_events_of_another_process(users: EventConsumer, event: EventExample):
    await assert_reads_the_log(users, event)
    await users.rows("DELETE FROM security_log RETURNING 1")


async def test_the_security_log_has_changes_of_prices(users: EventConsumer):
    await users.consume(PRICE_CHANGED)
    assert "10.00 USD to 12.50 USD" in await users.values(
        "SELECT detail FROM security_log WHERE kind = 'price_changed'"
    )


async def test_the_security_log_has_refunds(users: EventConsumer):
    await users.consume(REFUNDED)
    [detail] = await users.values("SELECT detail FROM security_log WHERE kind = 'refunded'")
    assert detail.endswith(": 0.00 USD to 10.00 USD")
