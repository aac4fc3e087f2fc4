"""What products needs of the events of inventory: whether a product is in stock."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Final

import pytest
import pytest_asyncio

from mercato.testing.cluster import Cluster
from pacts.book import PactBook
from pacts.event_consumers import EventConsumer, assert_reads_the_log, example

CONSUMER: Final = "products"

pytestmark = pytest.mark.asyncio(loop_scope="session")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def products(cluster: Cluster, book: PactBook) -> AsyncGenerator[EventConsumer]:
    async with EventConsumer(cluster, "products", book).running() as made:
        yield made


@pytest.mark.parametrize("type_", ["stock.available", "stock.exhausted"])
async def test_the_catalogue_knows_whether_a_product_is_in_stock(products: EventConsumer, type_: str):
    await products.rows(
        """
        INSERT INTO products (id, sku, name, description, price_minor, currency, category, in_stock, stock_version)
        VALUES (7501, 'PACT-7501', 'Mug', '', 1250, 'USD', 'things', $1, 1)
            ON CONFLICT (id) DO UPDATE SET in_stock = $1, stock_version = 1
        RETURNING id
        """,
        type_ == "stock.exhausted",
    )
    await products.consume(example("inventory", type_, "product", {"product_id": 7_501, "version": 2}))
    assert await products.values("SELECT in_stock FROM products WHERE id = 7501") == [type_ == "stock.available"]


async def test_the_catalogue_reads_the_events_of_another_process(products: EventConsumer):
    available = example("inventory", "stock.available", "product", {"product_id": 7_501, "version": 2})
    await assert_reads_the_log(products, available)
