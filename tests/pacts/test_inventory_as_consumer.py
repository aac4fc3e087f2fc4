"""What inventory needs of products: whether there is a product that staff count."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any, Final

import pytest
import pytest_asyncio

from mercato.contracts.inventory import Inventory, SetLevel
from mercato.contracts.products import ProductNotFound, Products
from mercato.testing.actors import STAFF
from mercato.testing.cluster import Cluster
from pacts.book import PactBook
from pacts.consumers import ConsumerHarness
from pacts.rpc import Exchange, given, refusal

CONSUMER: Final = "inventory"

pytestmark = pytest.mark.asyncio(loop_scope="session")

AT: Final = "2026-11-30T12:00:00Z"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def inventory(cluster: Cluster, book: PactBook) -> AsyncGenerator[ConsumerHarness]:
    async with ConsumerHarness(cluster, "inventory", book).running() as made:
        yield made


def product(product_id: int) -> dict[str, Any]:
    """What the decoder needs: inventory itself reads none of it."""
    return {
        "id": product_id,
        "sku": f"PACT-{product_id}",
        "name": "Mug",
        "description": "",
        "price_minor": 1_250,
        "currency": "USD",
        "category": "things",
        "status": "active",
        "created_at": AT,
        "updated_at": AT,
        "version": 1,
    }


async def test_a_product_that_there_is_can_be_counted(inventory: ConsumerHarness):
    found = Exchange(
        description="a product is read",
        operation=Products.get,
        request={"id": 7_101},
        answer=product(7_101),
        states=(given("a product", product_id=7_101, price_minor=1_250),),
    )
    async with inventory.expects(found):
        with inventory.acting(STAFF):
            level = await inventory.client(Inventory).set(SetLevel(product_id=7_101, on_hand=5))
    assert level.on_hand == 5


async def test_a_product_that_there_is_not_cannot_be_counted(inventory: ConsumerHarness):
    unknown = Exchange(
        description="an unknown product is read",
        operation=Products.get,
        request={"id": 9_007_199_254_740_990},
        error=refusal(ProductNotFound, product_id=9_007_199_254_740_990),
    )
    async with inventory.expects(unknown):
        with inventory.acting(STAFF), pytest.raises(ProductNotFound):
            await inventory.client(Inventory).set(SetLevel(product_id=9_007_199_254_740_990, on_hand=5))
