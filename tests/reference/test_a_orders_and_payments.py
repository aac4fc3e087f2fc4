"""Reference system A: an order service and a payment service, in memory."""

from __future__ import annotations

import asyncio

import pytest

from support.shop import Shop

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_an_order_of_an_item_and_an_amount_is_answered_with_its_number(open_shop: Shop) -> None:
    reply = await open_shop.post("/orders", {"user_id": 1, "product_id": 100, "amount": "99.99"})
    assert reply.status == 201
    assert isinstance(reply.json["id"], int)
    assert (await open_shop.get(f"/orders/{reply.json['id']}")).json == reply.json


async def test_orders_placed_at_the_same_moment_have_numbers_of_their_own(open_shop: Shop) -> None:
    order = {"user_id": 1, "product_id": 100}
    replies = await asyncio.gather(*(open_shop.post("/orders", order) for _ in range(50)))
    assert {reply.status for reply in replies} == {201}
    assert len({reply.json["id"] for reply in replies}) == 50


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH"])
async def test_orders_are_not_placed_by_any_method(open_shop: Shop, method: str) -> None:
    reply = await open_shop.request(method, "/orders", {"user_id": 1, "product_id": 100})
    assert (reply.status, reply.headers["allow"]) == (405, "GET, HEAD, POST")
