"""An amount belongs to the currency of what it is about, and where there is none, to that of the shop."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import pytest
import pytest_asyncio

from mercato.chassis.contract import Actor
from mercato.contracts.orders import REFUSED_MINOR, Orders
from mercato.gateway.route import RouteRequest
from mercato.gateway.routes import ROUTES
from mercato.gateway.validation import decode_body, decoder
from mercato.testing.cluster import Cluster
from mercato.testing.responses import Response, assert_problem
from mercato.testing.shop import Shop
from mercato.testing.shop_data import unique
from mercato.testing.transports import TRANSPORTS

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=TRANSPORTS)
async def shop(cluster: Cluster, request: pytest.FixtureRequest) -> AsyncGenerator[Shop]:
    """It sells in EUR unless it says otherwise."""
    shop = await Shop.start(cluster, request.param, currency="EUR")
    yield shop
    await shop.close()


async def product(shop: Shop, amount: Any, currency: str | None = None) -> dict[str, Any]:
    price = {"amount": amount} | ({"currency": currency} if currency else {})
    made = await shop.post("/products", {"sku": unique("CUR"), "name": "Tea", "category": "tea", "price": price})
    assert made.status == 201, made.body
    stocked = await shop.put(f"/products/{made.json['id']}/stock", {"on_hand": 100})
    assert stocked.status == 200, stocked.body
    return made.json


async def order(shop: Shop, price: str, priced_in: str, **more: Any) -> Response:
    """An order of one piece of a new product, with more fields in its body."""
    made = await product(shop, price, priced_in)
    return await shop.post("/orders", {"user_id": 1, "product_id": made["id"], **more}, headers={"Prefer": "wait=20"})


async def test_the_price_of_a_new_product_is_in_the_currency_of_the_shop(shop: Shop) -> None:
    assert (await product(shop, "12.50"))["price"] == {"amount": "12.50", "currency": "EUR"}
    refused = await shop.post("/products", {"sku": "A", "name": "A", "category": "a", "price": {"amount": "0.001"}})
    assert refused.wrong_fields == {"price.amount"}


@pytest.mark.parametrize(("currency", "before", "after"), [("USD", "12.50", "90.00"), ("JPY", "1200", "90")])
async def test_another_price_leaves_the_currency_of_the_product(
    shop: Shop, currency: str, before: str, after: str
) -> None:
    made = await product(shop, before, currency)
    changed = await shop.patch(f"/products/{made['id']}", {"price": {"amount": after}})
    assert (changed.status, changed.json["price"]) == (200, {"amount": after, "currency": currency})


async def test_an_amount_with_digits_that_the_currency_of_the_product_has_not_is_refused(shop: Shop) -> None:
    made = await product(shop, "1200", "JPY")
    refused = await shop.patch(f"/products/{made['id']}", {"price": {"amount": "90.50"}})
    assert_problem(refused, 400, "invalid_request")
    assert refused.wrong_fields == {"price.amount"}


@pytest.mark.parametrize(("price", "currency"), [("1500", "JPY"), ("1.250", "KWD"), ("12.50", "USD")])
async def test_an_order_takes_its_own_total(shop: Shop, price: str, currency: str) -> None:
    for amount in (price, float(price)):
        assert (await order(shop, price, currency, amount=amount)).status == 201
    other = await order(shop, price, currency, amount="7")
    assert_problem(other, 409, "orders.price_changed")
    assert f"is {price} {currency}; the buyer was shown 7" in other.json["detail"]
    foreign = await order(shop, price, currency, amount=price.partition(".")[0], currency="BRL")
    assert_problem(foreign, 409, "orders.price_changed")


async def test_a_total_that_is_no_amount_of_the_orders_currency_is_refused(shop: Shop) -> None:
    refused = await order(shop, "1500", "JPY", amount="1500.50")
    assert_problem(refused, 400, "invalid_request")
    assert refused.wrong_fields == {"amount"}


@pytest.mark.parametrize(
    ("price", "currency", "part", "rest"), [("1500", "JPY", "500", "1000"), ("1.250", "KWD", "0.250", "1.000")]
)
async def test_what_is_paid_and_refunded_is_in_the_currency_of_the_order(
    shop: Shop, price: str, currency: str, part: str, rest: str
) -> None:
    placed = await order(shop, price, currency)
    wrong = await shop.post("/payments", {"order_id": placed.json["id"], "amount": part})
    assert_problem(wrong, 409, "orders.amount_not_due")
    assert f"{price} {currency} is due, not {part} {currency}" in wrong.json["detail"]
    paid = await shop.post("/payments", {"order_id": placed.json["id"], "amount": price})
    assert (paid.status, paid.json["captured"]) == (201, {"amount": price, "currency": currency})
    refunds = f"/payments/{paid.json['id']}/refunds"
    given = await shop.post(refunds, {"amount": part}, headers={"Idempotency-Key": unique("key")})
    assert (given.status, given.json["amount"]) == (201, {"amount": part, "currency": currency})
    more = await shop.post(refunds, {"amount": price}, headers={"Idempotency-Key": unique("key")})
    assert_problem(more, 409, "orders.nothing_to_refund")
    assert f"has {rest} {currency} left to refund, not {price} {currency}" in more.json["detail"]
    nothing = await shop.post(refunds, {"amount": "0.00"}, headers={"Idempotency-Key": unique("key")})
    assert nothing.wrong_fields == {"amount"}
    small = await shop.post(refunds, {"amount": "0.00001"}, headers={"Idempotency-Key": unique("key")})
    assert small.wrong_fields == {"amount"}


async def test_what_an_answer_shows_can_be_sent_back(shop: Shop) -> None:
    made = await product(shop, "1.250", "KWD")
    again = await shop.patch(f"/products/{made['id']}", {"price": made["price"]})
    assert (again.status, again.json["price"]) == (200, {"amount": "1.250", "currency": "KWD"})
    placed = await order(shop, "1.250", "KWD", amount=made["price"])
    assert (placed.status, placed.json["total"]) == (201, made["price"])
    paid = await shop.post("/payments", {"order_id": placed.json["id"], "amount": placed.json["total"]})
    assert (paid.status, paid.json["captured"]) == (201, made["price"])
    key = {"Idempotency-Key": unique("key")}
    given = await shop.post(f"/payments/{paid.json['id']}/refunds", {"amount": paid.json["captured"]}, headers=key)
    assert (given.status, given.json["amount"]) == (201, made["price"])


async def test_an_amount_in_two_currencies_is_refused_wherever_a_body_has_one(shop: Shop) -> None:
    placed = await order(shop, "12.50", "EUR")
    two: dict[str, Any] = {"amount": {"amount": "12.50", "currency": "EUR"}, "currency": "USD"}
    paying = {"order_id": placed.json["id"]}
    for refused in (
        await order(shop, "12.50", "EUR", **two),
        await shop.post("/payments", paying | two),
    ):
        assert_problem(refused, 400, "invalid_request")
        assert refused.wrong_fields == {"amount.currency"}
    paid = await shop.post("/payments", paying | two | {"currency": "EUR"})
    assert paid.status == 201, paid.body
    key = {"Idempotency-Key": unique("key")}
    refused = await shop.post(f"/payments/{paid.json['id']}/refunds", two, headers=key)
    assert_problem(refused, 400, "invalid_request")
    assert refused.wrong_fields == {"amount.currency"}


async def test_a_filter_by_price_without_a_currency_means_that_of_the_shop(shop: Shop) -> None:
    euros, yen = await product(shop, "77.70"), await product(shop, "77", "JPY")
    found = {p["id"] for p in (await shop.get("/products?min_price=77&max_price=78&limit=200")).json}
    assert (euros["id"] in found, yen["id"] in found) == (True, False)
    found = {p["id"] for p in (await shop.get("/products?min_price=77&max_price=78&currency=JPY&limit=200")).json}
    assert (euros["id"] in found, yen["id"] in found) == (False, True)
    assert (await shop.get("/products?min_price=77&currency=XXX")).wrong_fields == {"?currency"}


async def test_an_older_service_does_not_take_a_part_for_all_that_is_left() -> None:
    """It does not know `amount`; without `amount_minor` it would give back everything."""
    [route] = [route for route in ROUTES if route.operation is Orders.refund]
    assert route.body is not None
    body = decode_body(decoder(route.body), b'{"amount": 1}')
    asked = route.request(RouteRequest(Actor("staff", 1), {"id": 1}, None, body, None, "key", b"", None, "USD"))
    assert (asked.amount, asked.amount_minor) == ("1", REFUSED_MINOR)
