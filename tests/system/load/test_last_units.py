"""Many buyers, few pieces: as many orders are paid as there were pieces, and no other buyer's card is charged.

Two worker processes sell the same pieces. `CAMPAIGN=full` has twenty runs instead of two.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import asyncpg
import pytest

from mercato.testing.concurrent_client import ConcurrentClient
from mercato.testing.process import Process, used_folder

pytestmark = pytest.mark.slow

RUNS = 20 if os.environ.get("CAMPAIGN") == "full" else 2
BUYERS = 1_000
PIECES = 100
SETTLED_SECONDS = 240.0
"""A bound for a machine that is busy with other things. On a quiet one every order has come to its end within 60."""

STATEMENT = """
    SELECT order_id, sum(CASE WHEN kind IN ('charge', 'capture') THEN amount_minor
                              WHEN kind = 'refund' THEN -amount_minor ELSE 0 END)::bigint
      FROM operations
     WHERE order_id = ANY ($1)
     GROUP BY order_id
"""
LEVEL = "SELECT on_hand, reserved FROM levels WHERE product_id = $1"


@pytest.fixture(scope="module")
def shop() -> Iterator[Process]:
    with used_folder() as data, Process(data, "--workers", "2") as process:
        yield process.ready()


@pytest.mark.parametrize("run", range(RUNS))
async def test_the_last_hundred_pieces_are_sold_to_a_hundred_of_a_thousand_buyers(shop: Process, run: int):
    async with ConcurrentClient(shop.url, connections=BUYERS // 2) as client:
        product_id = await client.product(f"LAST-{run}", PIECES)
        order = {"user_id": 1, "product_id": product_id, "payment_method": "sandbox:ok"}

        placed = await asyncio.gather(
            *(client.request("POST", "/orders", order, key=f"last-{run}-{buyer}") for buyer in range(BUYERS))
        )
        assert {answer.status for answer in placed} == {201}
        ids = {answer.json["id"] for answer in placed}
        assert len(ids) == BUYERS
        ended = [order for order in await when_settled(client) if order["id"] in ids]

    fates = Counter((o["status"], o["payment"], o["reason"]["code"] if o["reason"] else None) for o in ended)
    assert fates == {("confirmed", "paid", None): PIECES, ("cancelled", "unpaid", "out_of_stock"): BUYERS - PIECES}
    taken = dict(await rows(shop, "sandbox", STATEMENT, sorted(ids)))
    assert taken == {order["id"]: 10_00 for order in ended if order["payment"] == "paid"}
    assert [tuple(level) for level in await rows(shop, "inventory", LEVEL, product_id)] == [(0, 0)]


async def when_settled(client: ConcurrentClient) -> list[dict[str, Any]]:
    """Every order, once none is on its way any more."""
    async with asyncio.timeout(SETTLED_SECONDS):
        while (await client.request("GET", "/orders?status=pending&limit=1")).json or (
            await client.request("GET", "/orders?payment=authorized&limit=1")
        ).json:
            await asyncio.sleep(0.1)
    return await client.orders("/orders")


async def rows(shop: Process, service: str, statement: str, *values: Any) -> list[Any]:
    connection: Any = await asyncpg.connect(shop.dsn(service))
    try:
        return await connection.fetch(statement, *values)
    finally:
        await connection.close()
