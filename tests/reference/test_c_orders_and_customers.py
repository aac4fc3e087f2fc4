"""Reference system C: orders and customers, each at a path of its own."""

from __future__ import annotations

import asyncio

import pytest

from mercato.testing.responses import assert_problem
from mercato.testing.shop import Shop
from mercato.testing.shop_data import new_person

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_a_customers_order_of_items_is_created(open_shop: Shop) -> None:
    items = [{"product_id": 100, "quantity": 2}, {"product_id": 2, "quantity": 1}]
    reply = await open_shop.post("/orders", {"user_id": 1, "items": items})
    assert (reply.status, reply.headers["location"]) == (201, f"/orders/{reply.json['id']}")
    assert reply.json["user_id"] == 1
    assert [(item["product_id"], item["quantity"], item["line_total"]["amount"]) for item in reply.json["items"]] == [
        (100, 2, "199.98"),
        (2, 1, "899.99"),
    ]
    assert reply.json["total"] == {"amount": "1099.97", "currency": "USD"}


async def test_without_a_customer_there_is_no_order(open_shop: Shop) -> None:
    reply = await open_shop.post("/orders", {"items": []})
    assert_problem(reply, 400, "invalid_request")
    assert reply.wrong_fields == {"customer_id", "items"}


async def test_a_customer_who_does_not_exist_orders_nothing(open_shop: Shop) -> None:
    reply = await open_shop.post("/orders", {"user_id": 999_999, "items": [{"product_id": 100, "quantity": 2}]})
    assert_problem(reply, 404, "users.not_found")
    assert reply.json["details"] == {"user_id": 999_999}


async def test_an_order_without_a_body_is_refused(open_shop: Shop) -> None:
    assert_problem(await open_shop.post("/orders"), 415, "unsupported_media_type")
    empty = await open_shop.post("/orders", raw=b"", headers={"Content-Type": "application/json"})
    assert_problem(empty, 400, "malformed_json")


async def test_an_order_can_be_read_by_its_number(open_shop: Shop) -> None:
    placed = await open_shop.post("/orders", {"user_id": 2, "product_id": 1})
    reply = await open_shop.get(f"/orders/{placed.json['id']}")
    assert (reply.status, reply.json) == (200, placed.json)


async def test_an_unknown_order_is_not_found(open_shop: Shop) -> None:
    reply = await open_shop.get("/orders/999999")
    assert_problem(reply, 404, "orders.not_found")
    assert "999999" in reply.json["detail"]


async def test_a_customer_has_a_name_and_an_email(open_shop: Shop) -> None:
    reply = await open_shop.get("/users/1")
    assert reply.status == 200
    assert (reply.json["name"], reply.json["email"]) == ("Alice", "alice@example.com")


async def test_an_unknown_customer_is_not_found(open_shop: Shop) -> None:
    assert_problem(await open_shop.get("/users/999999"), 404, "users.not_found")


async def test_numbers_of_orders_are_the_databases_and_not_a_counters(open_shop: Shop) -> None:
    person = await new_person(open_shop)
    placed = await asyncio.gather(
        *(open_shop.post("/orders", {"user_id": person.id, "product_id": 100}) for _ in range(10))
    )
    listed = await open_shop.get(f"/orders?user_id={person.id}")
    assert {order["id"] for order in listed.json} == {reply.json["id"] for reply in placed}
    assert len(listed.json) == 10
