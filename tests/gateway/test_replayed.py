"""`Idempotent-Replayed` is there where an earlier request with the same key has done it, and only there."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

import pytest

from mercato.gateway.routes import ROUTES
from mercato.testing.responses import Response, assert_problem
from mercato.testing.shop import Shop
from mercato.testing.shop_data import new_order, new_payment, new_person, new_product, settled_order, unique

pytestmark = pytest.mark.asyncio(loop_scope="session")

Request = tuple[str, dict[str, Any] | None]
"""Path and body."""


async def an_order(shop: Shop) -> Request:
    return "/orders", {"user_id": (await new_person(shop)).id, "product_id": 100}


async def unpaid(shop: Shop) -> int:
    return (await settled_order(shop, await new_order(shop, (await new_person(shop)).id))).id


async def paid(shop: Shop) -> Response:
    reply = await shop.post("/payments", {"order_id": await unpaid(shop)})
    assert reply.status == 201, reply.body
    return reply


async def a_payment(shop: Shop) -> Request:
    return "/payments", {"order_id": await unpaid(shop)}


async def a_payment_as_system_a_has_it(shop: Shop) -> Request:
    return f"/payments/process?order_id={await unpaid(shop)}&amount=99.99", None


async def a_refund(shop: Shop) -> Request:
    return f"/payments/{(await paid(shop)).json['id']}/refunds", {"amount": "1.00"}


async def a_return(shop: Shop) -> Request:
    path = f"/orders/{(await paid(shop)).json['order_id']}"
    for state in ("shipped", "delivered"):
        assert (await shop.patch(path, {"fulfilment": state})).status == 200
    return f"{path}/returns", {"reason": "does not fit"}


async def an_adjustment(shop: Shop) -> Request:
    return f"/products/{(await new_product(shop)).id}/stock/adjustments", {"delta": 5, "reason": "delivery"}


REQUESTS: Final[Mapping[str, Callable[[Shop], Awaitable[Request]]]] = {
    "POST /orders": an_order,
    "POST /payments": a_payment,
    "POST /payments/process": a_payment_as_system_a_has_it,
    "POST /payments/{id}/refunds": a_refund,
    "POST /orders/{id}/returns": a_return,
    "POST /products/{id}/stock/adjustments": an_adjustment,
}


async def test_every_route_that_takes_a_key_is_asked_here() -> None:
    assert {f"{route.method} {route.path}" for route in ROUTES if route.idempotency} == REQUESTS.keys()
    assert [route.path for route in ROUTES if (route.replayed is not None) != route.idempotency] == []


@pytest.mark.parametrize("route", REQUESTS)
async def test_a_repetition_says_that_it_is_one_and_a_first_answer_does_not(open_shop: Shop, route: str) -> None:
    path, body = await REQUESTS[route](open_shop)
    key = {"Idempotency-Key": unique("key")}

    first, second, third = [await open_shop.post(path, body, headers=key) for _ in range(3)]
    other = await open_shop.post(path, body, headers={"Idempotency-Key": unique("key")})

    assert (first.status, "idempotent-replayed" in first.headers) in ((200, False), (201, False)), first.body
    for again in (second, third):
        assert (again.status, again.headers["idempotent-replayed"]) == (first.status, "true")
        assert again.json.get("id") == first.json.get("id")
    assert "idempotent-replayed" not in other.headers


async def test_a_repetition_of_a_payment_that_was_declined_says_so_too(open_shop: Shop) -> None:
    body = {"order_id": await unpaid(open_shop), "payment_method": "sandbox:declined"}
    key = {"Idempotency-Key": unique("key")}

    first, again = [await open_shop.post("/payments", body, headers=key) for _ in range(2)]

    for declined in (first, again):
        assert_problem(declined, 402, "orders.payment_declined")
        assert "replayed" not in declined.json["details"]
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    assert again.json["details"]["payment_id"] == first.json["details"]["payment_id"]


async def test_what_takes_no_key_never_says_that_it_is_a_repetition(open_shop: Shop) -> None:
    payment_id = await new_payment(open_shop, (await new_person(open_shop)).id)

    captured = [await open_shop.post(f"/payments/{payment_id}/capture", {}) for _ in range(2)]

    assert [(reply.status, "idempotent-replayed" in reply.headers) for reply in captured] == [(200, False)] * 2
