"""What a customer who orders too much is answered, with the settings that a shop begins with."""

from __future__ import annotations

import asyncio

import pytest

from mercato.testing.responses import assert_problem
from mercato.testing.shop import Shop
from mercato.testing.shop_data import Product, new_person, new_product

pytestmark = pytest.mark.asyncio(loop_scope="session")

OPEN_ORDERS = 50
WAIT = {"Prefer": "wait=20"}


async def stocked(shop: Shop, on_hand: int) -> Product:
    product = await new_product(shop)
    reply = await shop.put(f"/products/{product.id}/stock", {"on_hand": on_hand}, token=await shop.staff())
    assert reply.status == 200
    return product


async def test_one_open_order_too_many_is_409_with_the_limit_and_the_way_out(guarded_shop: Shop) -> None:
    product, person = await stocked(guarded_shop, 1_000), await new_person(guarded_shop)
    order = {"product_id": product.id, "user_id": person.id}
    replies = await asyncio.gather(
        *(guarded_shop.post("/orders", order, token=person.token) for _ in range(OPEN_ORDERS + 5))
    )

    refused = [reply for reply in replies if reply.status != 201]
    assert len(refused) == 5
    for reply in refused:
        assert_problem(reply, 409, "orders.too_many_open")
        assert reply.json["details"] == {"user_id": person.id, "limit": OPEN_ORDERS}
        assert "pay or cancel" in reply.json["detail"]
    by_staff = await guarded_shop.post("/orders", order, token=await guarded_shop.staff())
    assert by_staff.status == 201
    first = next(reply.json["id"] for reply in replies if reply.status == 201)
    for one in (first, by_staff.json["id"]):
        cancelled = await guarded_shop.post(f"/orders/{one}/cancel", {}, token=person.token)
        assert cancelled.status == 200
    assert (await guarded_shop.post("/orders", order, token=person.token)).status == 201


async def test_an_order_that_would_hold_too_much_is_cancelled_with_the_bound_and_the_way_out(
    guarded_shop: Shop,
) -> None:
    product, person = await stocked(guarded_shop, 100), await new_person(guarded_shop)
    order = {"product_id": product.id, "user_id": person.id, "quantity": 15}
    held = await guarded_shop.post("/orders", order, token=person.token, headers=WAIT)
    answer = await guarded_shop.post("/orders", order, token=person.token, headers=WAIT)
    refused = await guarded_shop.get(answer.headers["location"], token=person.token)

    assert_problem(answer, 409, "orders.hold_limit")
    assert f"at most 20 pieces of product {product.id}" in answer.json["detail"]
    assert answer.json["details"]["items"] == [{"product_id": product.id, "requested": 15, "available": 5}]
    assert (held.json["status"], refused.json["status"]) == ("pending", "cancelled")
    reason = refused.json["reason"]
    assert reason["code"] == "hold_limit"
    assert reason["items"] == [{"product_id": product.id, "requested": 15, "available": 5}]
    assert f"at most 20 pieces of product {product.id}" in reason["message"]
    assert "Pay or cancel open orders" in reason["message"]
