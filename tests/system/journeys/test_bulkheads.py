"""One service of a shop in one process gets no answer from its database: what the others have is not taken by it.

Shared by all services of a process are the event loop, the threads (those of password hashes are bounded), and the
connections of clients. Each service has database connections of its own, and each operation its queue and its lanes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest
import pytest_asyncio

from mercato.testing.cluster import Cluster
from mercato.testing.shop import Shop
from mercato.testing.waiting import until_blocked, until_true

pytestmark = pytest.mark.slow

READS = 60
ORDERS = 10
ORDER = {"user_id": 1, "product_id": 100}


@pytest_asyncio.fixture
async def shop(cluster: Cluster) -> AsyncGenerator[Shop]:
    made = await Shop.start(cluster)
    yield made
    await made.close()


def connections(shop: Shop, name: str, service: str, **labels: str) -> float:
    labels["db_client_connection_pool_name"] = service
    return shop.harness.host.telemetry.registry.get_sample_value(f"db_client_connection_{name}", labels) or 0.0


def used(shop: Shop, service: str) -> float:
    return connections(shop, "count", service, db_client_connection_state="used")


async def order(shop: Shop, key: str) -> int:
    """The id of an order; asked for again while a service is too slow, as just after a start on a busy machine."""
    while True:
        answer = await shop.post("/orders", ORDER, headers={"Idempotency-Key": key})
        if answer.is_final:
            return answer.json["id"]
        await asyncio.sleep(0.1)


async def test_products_without_a_database_take_nothing_from_payments(shop: Shop):
    placed = [await order(shop, f"order-{n}") for n in range(ORDERS)]
    products = shop.harness.dsns["products"]
    locking = await shop.harness.connection("products")
    held = locking.transaction()
    await held.start()
    await locking.execute("LOCK TABLE products IN ACCESS EXCLUSIVE MODE")
    paths = ["/products/100", "/products?limit=5", "/products?q=lamp"]
    reads = [asyncio.create_task(shop.get(paths[number % len(paths)])) for number in range(READS)]
    most = connections(shop, "max", "products") - 1
    await until_blocked(products, int(most), by=reads)  # reads hold all that they may have

    paid = await asyncio.gather(*(shop.post("/payments", {"order_id": order_id}) for order_id in placed))
    assert {answer.status for answer in paid} == {201}
    assert used(shop, "products") >= most  # the last one is that of an event
    assert not all(read.done() for read in reads), "products have not answered meanwhile"

    await held.rollback()
    answers = await asyncio.gather(*reads)
    assert {answer.status for answer in answers} <= {200, 503, 504}
    await order(shop, "again")
    await until_true(lambda: used(shop, "payments") == 0)
