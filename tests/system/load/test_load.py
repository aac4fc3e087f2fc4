"""Many buyers at once: every answer is true, and calls really become batches."""

from __future__ import annotations

import asyncio
import re

import pytest

from mercato.chassis.hosting.host import TransportName
from mercato.testing.caller import LATER
from mercato.testing.cluster import Cluster
from mercato.testing.responses import Response
from mercato.testing.shop import Shop

BUYERS = 128
ORDERS_EACH = 12

COUNT = "SELECT count(*) FROM orders"


@pytest.mark.parametrize("transport", ["local", "loopback"])
async def test_there_are_as_many_orders_as_answers_and_they_were_placed_in_batches(
    cluster: Cluster, transport: TransportName
):
    shop = await Shop.start(cluster, transport)
    try:

        async def buy(buyer: int) -> list[Response]:
            return [await place(shop, f"load-{buyer}-{n}") for n in range(ORDERS_EACH)]

        replies = [reply for mine in await asyncio.gather(*map(buy, range(BUYERS))) for reply in mine]
        async with shop.harness.host.services["orders"].database.read() as tx:
            [rows] = await tx.fetch_values(int, COUNT)
        metrics = (await shop.get("/metrics")).body.decode()
    finally:
        await shop.close()
    assert {reply.status for reply in replies} == {201}
    assert len({reply.json["id"] for reply in replies}) == rows == BUYERS * ORDERS_EACH
    assert mean_batch(metrics) > 4


async def place(shop: Shop, key: str) -> Response:
    """An order, with the same key again while the shop is too busy: on a busy machine it may be."""
    while True:
        order = {"user_id": 1, "product_id": 100}
        reply = await shop.post("/orders", order, headers={"Idempotency-Key": key})
        if reply.status not in LATER:
            return reply
        await asyncio.sleep(0.1)


def mean_batch(metrics: str) -> float:
    """Orders in a batch, from the metrics of the shop."""
    placed, dispatched = (
        float(re.findall(rf'mercato_batch_size_{part}{{operation="orders.place"}} (\S+)', metrics)[0])
        for part in ("sum", "count")
    )
    return placed / dispatched
