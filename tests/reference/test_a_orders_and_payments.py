"""Reference system A: an order service and a payment service, in memory."""

from __future__ import annotations

import asyncio

import pytest

from mercato.testing.shop import Shop

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
    assert (reply.status, reply.headers["allow"]) == (405, "GET, HEAD, OPTIONS, POST")


async def waiting_order(shop: Shop) -> int:
    """An order of 99.99 whose stock is held, and that waits for its payment."""
    order = {"user_id": 1, "product_id": 100, "amount": "99.99"}
    reply = await shop.post("/orders", order, headers={"Prefer": "wait=20"})
    assert (reply.status, reply.json["status"]) == (201, "pending"), reply.body
    return reply.json["id"]


async def test_a_payment_of_what_is_due_is_processed(open_shop: Shop) -> None:
    order_id = await waiting_order(open_shop)
    reply = await open_shop.post("/payments", {"order_id": order_id, "amount": 99.99})
    assert (reply.status, reply.json["status"]) == (201, "captured"), reply.body
    assert (await open_shop.get(f"/orders/{order_id}")).json["payment"] == "paid"


async def test_another_amount_than_is_due_is_a_conflict(open_shop: Shop) -> None:
    order_id = await waiting_order(open_shop)
    reply = await open_shop.post("/payments", {"order_id": order_id, "amount": 42})
    assert (reply.status, reply.code) == (409, "orders.amount_not_due")
    assert (await open_shop.get(f"/orders/{order_id}")).json["payment"] == "unpaid"


async def test_a_payment_that_the_provider_refuses_is_402(open_shop: Shop) -> None:
    order_id = await waiting_order(open_shop)
    payment = {"order_id": order_id, "amount": 99.99, "payment_method": "sandbox:declined"}
    reply = await open_shop.post("/payments", payment)
    assert (reply.status, reply.code) == (402, "orders.payment_declined")


async def test_a_payment_of_an_unknown_order_is_404(open_shop: Shop) -> None:
    reply = await open_shop.post("/payments", {"order_id": 999_999_999, "amount": 42})
    assert (reply.status, reply.code) == (404, "orders.not_found")


@pytest.mark.parametrize("payment", [{"order_id": "one", "amount": 42}, {"order_id": 1001, "amount": "forty-two"}])
async def test_what_is_not_a_number_is_400(open_shop: Shop, payment: dict[str, object]) -> None:
    reply = await open_shop.post("/payments", payment)
    assert reply.status == 400, reply.body


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH"])
async def test_payments_are_not_made_by_any_method(open_shop: Shop, method: str) -> None:
    reply = await open_shop.request(method, "/payments", {"order_id": 1001})
    assert (reply.status, reply.headers["allow"]) == (405, "GET, HEAD, OPTIONS, POST")


async def test_payments_at_the_same_moment_are_one_charge(open_shop: Shop) -> None:
    order_id = await waiting_order(open_shop)
    replies = await asyncio.gather(*(open_shop.post("/payments", {"order_id": order_id}) for _ in range(10)))
    assert sorted(reply.status for reply in replies) == [201] + [409] * 9
    captured = (await open_shop.get(f"/payments?order_id={order_id}")).json
    assert [payment["status"] for payment in captured] == ["captured"]
