"""The same request twenty times at once, a hundred keys over, on two worker processes: one order for each key.

Then everything is killed and started anew, and the keys still know their orders. `CAMPAIGN=full` takes a thousand keys.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mercato.testing.concurrent_client import ConcurrentClient
from mercato.testing.process import Process, used_folder
from mercato.testing.responses import RETRYABLE, Response
from mercato.testing.waiting import BOUND_SECONDS

pytestmark = pytest.mark.slow

KEYS = [f"many-{number}" for number in range(1_000 if os.environ.get("CAMPAIGN") == "full" else 100)]
TIMES = 20
CARTS = 500
SETTLED_SECONDS = 240.0


@pytest.fixture(scope="module")
def data() -> Iterator[Path]:
    with used_folder() as folder:
        yield folder


@pytest.mark.long
async def test_a_key_has_one_order_however_often_and_whenever_it_is_sent(data: Path):
    with Process(data, "--workers", "2") as shop:
        async with ConcurrentClient(shop.ready().url) as client:
            first = await send_all(client)
            assert len({answer.json["id"] for answer in first}) == len(KEYS)
            assert len(await client.orders("/orders")) == len(KEYS)
            await refuse_another_body(client)
        shop.kill()
        shop.exit_code(BOUND_SECONDS)

    with Process(data, "--workers", "2") as shop:
        async with ConcurrentClient(shop.ready().url) as client:
            again = await send_all(client)
            assert [answer.body for answer in again] == [answer.body for answer in first]
            assert {answer.headers["idempotent-replayed"] for answer in again} == {"true"}
            assert len(await client.orders("/orders")) == len(KEYS)
            await refuse_another_body(client)


@pytest.mark.long
async def test_carts_with_the_same_products_in_opposite_orders_are_all_paid(data: Path):
    with Process(data, "--workers", "2") as shop:
        async with ConcurrentClient(shop.ready().url) as client:
            one, other = [await client.product(sku, CARTS) for sku in ("THERE", "BACK")]
            forth = [{"product_id": one, "quantity": 1}, {"product_id": other, "quantity": 1}]
            placed = await asyncio.gather(
                *(
                    client.request(
                        "POST",
                        "/orders",
                        {"user_id": 2, "items": forth[:: 1 - 2 * (cart % 2)], "payment_method": "sandbox:ok"},
                        key=f"cart-{cart}",
                    )
                    for cart in range(CARTS)
                )
            )
            assert {answer.status for answer in placed} == {201}
            assert set(client.statuses) <= {200, 201, *RETRYABLE}
            async with asyncio.timeout(SETTLED_SECONDS):
                while len(paid := await client.orders("/orders?payment=paid&user_id=2")) < CARTS:
                    await asyncio.sleep(0.2)
            assert {order["id"] for order in paid} == {answer.json["id"] for answer in placed}
        assert "deadlock" not in shop.output.lower()


async def send_all(client: ConcurrentClient) -> list[Response]:
    """Sends each key's request so many times at once; gives one answer of each key, which they all have got."""
    answers = await asyncio.gather(
        *(
            client.request("POST", "/orders", {"user_id": 1, "product_id": 100, "quantity": 1 + number % 5}, key=key)
            for number, key in enumerate(KEYS)
            for _ in range(TIMES)
        )
    )
    # What asks to be sent again is sent again by the client; everything else was the answer.
    assert set(client.statuses) <= {200, 201, *RETRYABLE}
    by_key = [answers[start : start + TIMES] for start in range(0, len(answers), TIMES)]
    for same in by_key:
        assert {(answer.status, answer.body) for answer in same} == {(201, same[0].body)}
    return [same[0] for same in by_key]


async def refuse_another_body(client: ConcurrentClient) -> None:
    refused = await asyncio.gather(
        *(client.request("POST", "/orders", {"user_id": 1, "product_id": 101}, key=key) for key in KEYS)
    )
    assert {answer.status for answer in refused} == {422}
    client.statuses.pop(422)
