"""Payments over HTTP: pay, capture, void, refund, take back; and what only their owner and staff may see."""

from __future__ import annotations

from typing import Any, Final

import pytest

from mercato.contracts.products import Product
from mercato.testing.responses import Response, assert_problem
from mercato.testing.shop import Shop
from mercato.testing.shop_data import UNKNOWN_ID, Person, new_person, new_product, staff_token, unique

pytestmark = pytest.mark.asyncio(loop_scope="session")

PRICE: Final = {"amount": "99.99", "currency": "USD"}
NOTHING: Final = {"amount": "0.00", "currency": "USD"}


async def stocked(shop: Shop, pieces: int = 10) -> Product:
    product = await new_product(shop)
    reply = await shop.put(f"/products/{product.id}/stock", {"on_hand": pieces}, token=await staff_token(shop))
    assert reply.status == 200, reply.body
    return product


async def placed(shop: Shop, person: Person | None = None, **fields: Any) -> Response:
    """An order of one piece of a product of its own, when nothing is under way for it any more."""
    person = person or await new_person(shop)
    body = {"user_id": person.id, "product_id": (await stocked(shop)).id, **fields}
    reply = await shop.post("/orders", body, headers={"Prefer": "wait=20"}, token=person.token)
    assert reply.status == 201, reply.body
    return reply


async def declined_order(shop: Shop, method: str) -> Response:
    """An order whose payment was declined while it was waited for."""
    body = {"user_id": (await new_person(shop)).id, "product_id": (await stocked(shop)).id, "payment_method": method}
    refused = await shop.post("/orders", body, headers={"Prefer": "wait=20"})
    assert_problem(refused, 402, "orders.payment_declined")
    return await shop.get(refused.headers["location"])


async def pay(shop: Shop, order: Response, token: str | None = None, key: str | None = None, **fields: Any) -> Response:
    headers = {} if key is None else {"Idempotency-Key": key}
    return await shop.post("/payments", {"order_id": order.json["id"], **fields}, headers=headers, token=token)


async def order_of(shop: Shop, order: Response, token: str | None = None) -> Any:
    return (await shop.get(f"/orders/{order.json['id']}", token=token)).json


# -------------------------------------------------------------------------------------------------------------- paying


async def test_an_order_is_paid(open_shop: Shop) -> None:
    order = await placed(open_shop)

    paid = await pay(open_shop, order, amount="99.99", currency="USD")

    assert paid.status == 201, paid.body
    assert paid.headers["location"] == f"/payments/{paid.json['id']}"
    assert {name: paid.json[name] for name in ("order_id", "status", "amount", "captured", "refunded", "code")} == {
        "order_id": order.json["id"],
        "status": "captured",
        "amount": PRICE,
        "captured": PRICE,
        "refunded": NOTHING,
        "code": None,
    }
    now = await order_of(open_shop, order)
    assert (now["status"], now["payment"]) == ("confirmed", "paid")
    assert (await open_shop.get(paid.headers["location"])).json == paid.json
    assert (await open_shop.get(f"/payments?order_id={order.json['id']}")).json == [paid.json]


async def test_an_order_with_a_method_is_paid_when_its_answer_is_waited_for(open_shop: Shop) -> None:
    order = await placed(open_shop, payment_method="sandbox:ok")

    assert (order.json["status"], order.json["payment"]) == ("confirmed", "paid")


async def test_an_order_whose_payment_is_declined_when_it_is_placed_stays_pending_and_can_be_paid(
    open_shop: Shop,
) -> None:
    order = await declined_order(open_shop, "sandbox:insufficient_funds")
    [declined] = (await open_shop.get(f"/payments?order_id={order.json['id']}")).json

    paid = await pay(open_shop, order)

    assert (order.json["status"], order.json["payment"], order.json["reason"]) == ("pending", "unpaid", None)
    assert (declined["status"], declined["code"], declined["captured"]) == ("failed", "insufficient_funds", NOTHING)
    assert (paid.status, paid.json["status"]) == (201, "captured")
    now = await order_of(open_shop, order)
    assert (now["status"], now["payment"]) == ("confirmed", "paid")


async def test_the_tenth_declined_payment_cancels_the_order_which_says_why(open_shop: Shop) -> None:
    order = await declined_order(open_shop, "sandbox:declined")
    for _ in range(8):
        assert_problem(await pay(open_shop, order, payment_method="sandbox:declined"), 402, "orders.payment_declined")
    assert (await order_of(open_shop, order))["status"] == "pending"

    tenth = await pay(open_shop, order, payment_method="sandbox:insufficient_funds")

    assert_problem(tenth, 402, "orders.payment_declined")
    now = await order_of(open_shop, order)
    assert (now["status"], now["payment"]) == ("cancelled", "failed")
    assert (now["reason"]["code"], now["reason"]["provider_code"]) == ("payment_declined", "insufficient_funds")
    assert_problem(await pay(open_shop, order), 409, "orders.cancelled")


async def test_an_order_that_there_is_not_enough_for_says_what_is_short(open_shop: Shop) -> None:
    product = await stocked(open_shop, 1)
    body = {"user_id": 1, "product_id": product.id, "quantity": 3}

    refused = await open_shop.post("/orders", body, headers={"Prefer": "wait=20"})
    order = await open_shop.get(refused.headers["location"])

    assert_problem(refused, 409, "orders.out_of_stock")
    assert order.json["status"] == "cancelled"
    assert order.json["reason"]["code"] == "out_of_stock"
    assert order.json["reason"]["items"] == [{"product_id": product.id, "requested": 3, "available": 1}]


async def test_another_amount_than_is_due_is_409_with_what_is_due(open_shop: Shop) -> None:
    order = await placed(open_shop)

    refused = await pay(open_shop, order, amount="99.98")

    assert_problem(refused, 409, "orders.amount_not_due")
    assert (await order_of(open_shop, order))["payment"] == "unpaid"


async def test_a_declined_payment_is_402_and_the_order_can_be_paid_in_another_way(open_shop: Shop) -> None:
    order = await placed(open_shop)

    declined = await pay(open_shop, order, payment_method="sandbox:declined")
    paid = await pay(open_shop, order)

    assert_problem(declined, 402, "orders.payment_declined")
    assert declined.json["details"]["provider_code"] == "card_declined"
    assert paid.status == 201
    payments = (await open_shop.get(f"/payments?order_id={order.json['id']}")).json
    assert [payment["status"] for payment in payments] == ["captured", "failed"]


async def test_a_paid_or_cancelled_order_is_not_paid(open_shop: Shop) -> None:
    order = await placed(open_shop, payment_method="sandbox:ok")
    cancelled = await placed(open_shop)
    await open_shop.post(f"/orders/{cancelled.json['id']}/cancel", {})

    assert_problem(await pay(open_shop, order), 409, "orders.illegal_move")
    assert_problem(await pay(open_shop, cancelled), 409, "orders.cancelled")


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"order_id": "one"}, "order_id"),
        ({"amount": "much"}, "amount"),
        ({"amount": "1.001"}, "amount"),
        ({"currency": "XXX"}, "currency"),
        ({"payment_method": "4111 1111 1111 1111"}, "payment_method"),
        ({"capture": "yes"}, "capture"),
    ],
)
async def test_what_is_not_valid_is_400_and_named(open_shop: Shop, fields: dict[str, Any], wrong: str) -> None:
    reply = await open_shop.post("/payments", {"order_id": 1001, **fields})

    assert reply.status in (400, 422), reply.body
    assert wrong in reply.wrong_fields, reply.body


@pytest.mark.parametrize(
    ("method", "reason"),
    [("sandbox:nonsense", "the sandbox has no such token"), ("other:ok", "no payment provider is behind this method")],
)
async def test_a_method_that_payments_does_not_know_is_refused_before_anything_is_done(
    open_shop: Shop, method: str, reason: str
) -> None:
    person, product = await new_person(open_shop), await stocked(open_shop)
    body = {"user_id": person.id, "product_id": product.id}
    waiting = await placed(open_shop, person)

    refused = await open_shop.post("/orders", {**body, "payment_method": method}, token=person.token)
    unpaid = await pay(open_shop, waiting, payment_method=method)

    for reply in (refused, unpaid):
        assert_problem(reply, 400, "invalid_request")
        assert reply.json["errors"] == [{"field": "payment_method", "message": reason}]
    assert [order["id"] for order in (await open_shop.get(f"/orders?user_id={person.id}")).json] == [waiting.json["id"]]
    assert (await open_shop.get(f"/payments?order_id={waiting.json['id']}")).json == []


async def test_what_came_back_before_it_was_paid_is_not_due(open_shop: Shop) -> None:
    order = await placed(open_shop, quantity=2)
    path = f"/orders/{order.json['id']}"
    for move in ({"status": "confirmed"}, {"fulfilment": "shipped"}, {"fulfilment": "delivered"}):
        assert (await open_shop.patch(path, move)).status == 200
    assert (await return_item(open_shop, path, {"line_id": 1, "quantity": 1})).status == 201
    waiting = await order_of(open_shop, order)

    too_much = await pay(open_shop, order, **order.json["total"])
    paid = await pay(open_shop, order, **waiting["due"])

    assert (waiting["due"], waiting["paid"]["amount"]) == (PRICE, "0.00")
    assert_problem(too_much, 409, "orders.amount_not_due")
    assert "99.99 USD is due" in too_much.json["detail"]
    assert (paid.status, paid.json["captured"]) == (201, PRICE)
    now = await order_of(open_shop, order)
    assert (now["payment"], now["paid"], now["due"]["amount"]) == ("paid", PRICE, "0.00")


# ---------------------------------------------------------------------------------------------------------------- keys


async def test_a_repeated_key_gets_the_same_payment(open_shop: Shop) -> None:
    order, key = await placed(open_shop), unique("pay")

    first = await pay(open_shop, order, key=key)
    again = await pay(open_shop, order, key=key)
    other = await pay(open_shop, order, key=key, amount="99.99")

    assert (first.status, again.status) == (201, 201)
    assert again.body == first.body
    assert again.headers["idempotent-replayed"] == "true"
    assert_problem(other, 422, "idempotency_key_reused")
    assert len((await open_shop.get(f"/payments?order_id={order.json['id']}")).json) == 1


# ---------------------------------------------------------------------------------------------------- capture and void


async def test_an_amount_is_reserved_and_taken_later(open_shop: Shop) -> None:
    order = await placed(open_shop)
    reserved = await pay(open_shop, order, capture=False)
    early = await open_shop.patch(f"/orders/{order.json['id']}", {"fulfilment": "shipped"})

    captured = await open_shop.post(f"/payments/{reserved.json['id']}/capture")

    assert (reserved.status, reserved.json["status"]) == (201, "authorized")
    assert_problem(early, 409, "orders.illegal_move")
    assert (captured.status, captured.json["status"], captured.json["captured"]) == (200, "captured", PRICE)
    assert (await order_of(open_shop, order))["payment"] == "paid"


async def test_a_part_of_what_was_reserved_is_taken(open_shop: Shop) -> None:
    order = await placed(open_shop)
    reserved = await pay(open_shop, order, capture=False)
    path = f"/payments/{reserved.json['id']}/capture"
    too_much = await open_shop.post(path, {"amount": "100.00"})
    other_currency = await open_shop.post(path, {"amount": "10.00", "currency": "EUR"})

    captured = await open_shop.post(path, {"amount": 79.99, "currency": "USD"})
    again = await open_shop.post(path, {"amount": "79.99"})
    other = await open_shop.post(path, {"amount": "80.00"})
    whole = await open_shop.post(path)

    assert_problem(too_much, 409, "payments.capture_too_large")
    assert_problem(other_currency, 400, "invalid_request")
    assert other_currency.wrong_fields == {"currency"}
    assert (captured.status, captured.json["status"], captured.json["amount"]) == (200, "captured", PRICE)
    assert captured.json["captured"]["amount"] == "79.99"
    assert again.body == captured.body
    for refused in (other, whole):
        assert_problem(refused, 409, "payments.capture_amount_changed")
    now = await order_of(open_shop, order)
    assert (now["payment"], now["paid"]["amount"], now["total"]) == ("paid", "79.99", PRICE)


async def test_an_amount_is_reserved_and_given_back(open_shop: Shop) -> None:
    order = await placed(open_shop)
    reserved = await pay(open_shop, order, capture=False)

    voided = await open_shop.post(f"/payments/{reserved.json['id']}/void")
    captured = await open_shop.post(f"/payments/{reserved.json['id']}/capture")

    assert (voided.status, voided.json["status"]) == (200, "voided")
    assert_problem(captured, 409, "orders.illegal_move")
    now = await order_of(open_shop, order)
    assert (now["status"], now["payment"]) == ("cancelled", "voided")


# ------------------------------------------------------------------------------------------------- refunds and returns


async def refund(shop: Shop, payment: Response, body: Any = None, key: str | None = None) -> Response:
    headers = {"Idempotency-Key": key or unique("refund")}
    return await shop.post(f"/payments/{payment.json['id']}/refunds", body, headers=headers)


async def test_a_payment_is_given_back_in_parts(open_shop: Shop) -> None:
    order = await placed(open_shop)
    payment = await pay(open_shop, order)

    part = await refund(open_shop, payment, {"amount": "10.00", "reason": "scratched"})
    too_much = await refund(open_shop, payment, {"amount": "90.00"})
    rest = await refund(open_shop, payment)

    assert (part.status, part.json["status"], part.json["amount"]["amount"]) == (201, "succeeded", "10.00")
    assert_problem(too_much, 409, "orders.nothing_to_refund")
    assert rest.json["amount"]["amount"] == "89.99"
    now = await order_of(open_shop, order)
    assert (now["payment"], now["refunded"]) == ("refunded", PRICE)


async def test_a_refunded_order_is_not_sent_and_the_answer_says_why(open_shop: Shop) -> None:
    order = await placed(open_shop, payment_method="sandbox:ok")
    path = f"/orders/{order.json['id']}"
    [payment] = (await open_shop.get(f"/payments?order_id={order.json['id']}")).json
    headers = {"Idempotency-Key": unique("refund")}
    assert (await open_shop.post(f"/payments/{payment['id']}/refunds", headers=headers)).status == 201

    refused = await open_shop.patch(path, {"fulfilment": "shipped"})

    assert_problem(refused, 409, "orders.illegal_move")
    assert refused.json["details"]["why"] == "all that was paid was refunded; cancel the order instead"
    assert refused.json["details"]["why"] in refused.json["detail"]
    assert (await order_of(open_shop, order))["fulfilment"] == "unfulfilled"


async def test_a_refund_needs_a_key_and_is_one_for_it(open_shop: Shop) -> None:
    payment = await pay(open_shop, await placed(open_shop))
    key = unique("refund")

    without = await open_shop.post(f"/payments/{payment.json['id']}/refunds", {"amount": "10.00"})
    first = await refund(open_shop, payment, {"amount": "10.00"}, key)
    again = await refund(open_shop, payment, {"amount": "10.00"}, key)
    other = await refund(open_shop, payment, {"amount": "20.00"}, key)

    assert without.status == 400
    assert again.body == first.body
    assert again.headers["idempotent-replayed"] == "true"
    assert_problem(other, 422, "idempotency_key_reused")
    assert (await open_shop.get(f"/payments/{payment.json['id']}")).json["refunded"]["amount"] == "10.00"


async def test_goods_come_back_and_what_they_cost_is_refunded(open_shop: Shop) -> None:
    order = await placed(open_shop, quantity=3, payment_method="sandbox:ok")
    path = f"/orders/{order.json['id']}"
    [item] = order.json["items"]
    early = await open_shop.post(f"{path}/returns", {}, headers={"Idempotency-Key": unique("return")})
    for state in ("shipped", "delivered"):
        assert (await open_shop.patch(path, {"fulfilment": state})).status == 200
    back = {"items": [{"product_id": item["product_id"], "quantity": 1}], "reason": "too big"}

    returned = await open_shop.post(f"{path}/returns", back, headers={"Idempotency-Key": unique("return")})
    too_many = await open_shop.post(
        f"{path}/returns",
        {"items": [{"product_id": item["product_id"], "quantity": 3}]},
        headers={"Idempotency-Key": unique("return")},
    )

    assert_problem(early, 409, "orders.illegal_move")
    assert (returned.status, returned.json["amount"], returned.json["status"]) == (201, PRICE, "succeeded")
    assert_problem(too_many, 409, "orders.not_returnable")
    now = await order_of(open_shop, order)
    assert (now["payment"], now["refunded"], now["items"][0]["returned"]) == ("partially_refunded", PRICE, 1)
    assert (await open_shop.get(f"/products/{item['product_id']}/stock")).json["on_hand"] == 8


async def test_items_are_returned_by_the_id_of_their_line_or_by_their_product(open_shop: Shop) -> None:
    order = await placed(open_shop, quantity=3, payment_method="sandbox:ok")
    path = f"/orders/{order.json['id']}"
    [item] = order.json["items"]
    for state in ("shipped", "delivered"):
        assert (await open_shop.patch(path, {"fulfilment": state})).status == 200
    one, other = {"line_id": item["id"]}, {"product_id": item["product_id"]}

    for named in (one, other, {**one, **other}):
        returned = await return_item(open_shop, path, {**named, "quantity": 1})
        assert (returned.status, returned.json["amount"]) == (201, PRICE), returned.body
        assert returned.json["items"] == [{**one, **other, "quantity": 1}]

    now = await order_of(open_shop, order)
    assert (now["fulfilment"], now["payment"], now["items"][0]["returned"]) == ("returned", "refunded", 3)


@pytest.mark.parametrize(
    ("named", "status", "code"),
    [
        ({}, 400, "invalid_request"),
        ({"line_id": 2}, 400, "invalid_request"),
        ({"line_id": 1, "product_id": UNKNOWN_ID}, 400, "invalid_request"),
        ({"product_id": UNKNOWN_ID}, 409, "orders.not_returnable"),
    ],
)
async def test_a_return_that_names_no_line_is_refused(
    open_shop: Shop, named: dict[str, int], status: int, code: str
) -> None:
    order = await placed(open_shop, payment_method="sandbox:ok")
    path = f"/orders/{order.json['id']}"
    for state in ("shipped", "delivered"):
        assert (await open_shop.patch(path, {"fulfilment": state})).status == 200

    refused = await return_item(open_shop, path, {**named, "quantity": 1})

    assert_problem(refused, status, code)
    assert status != 400 or refused.wrong_fields == {"items[0]"}
    assert (await order_of(open_shop, order))["items"][0]["returned"] == 0


async def return_item(shop: Shop, path: str, item: dict[str, int]) -> Response:
    return await shop.post(f"{path}/returns", {"items": [item]}, headers={"Idempotency-Key": unique("return")})


async def test_the_timeline_has_the_order_its_stock_and_its_money(open_shop: Shop) -> None:
    order = await placed(open_shop, payment_method="sandbox:ok")

    reply = await open_shop.get(f"/orders/{order.json['id']}/timeline")

    assert reply.status == 200
    assert [(entry["part"], entry["what"]) for entry in reply.json if entry["part"] != "order"] == [
        ("stock", "held"),
        ("money", "charge"),
        ("stock", "committed"),
    ]
    moves = [entry["what"] for entry in reply.json if entry["part"] == "order"]
    assert moves == ["status pending", "status confirmed", "payment paid"]
    assert {entry["outcome"] for entry in reply.json} == {"succeeded"}


# --------------------------------------------------------------------------------------------------------------- items


async def test_an_item_has_an_id_and_says_how_its_total_comes_about(open_shop: Shop) -> None:
    products = [await stocked(open_shop), await stocked(open_shop)]
    body = {"user_id": 1, "items": [{"product_id": product.id, "quantity": 2} for product in products]}

    order = await open_shop.post("/orders", body)

    assert order.status == 201, order.body
    assert order.json["items"] == [
        {
            "id": i,
            "product_id": product.id,
            "sku": product.sku,
            "name": product.name,
            "quantity": 2,
            "unit_price": PRICE,
            "discount": NOTHING,
            "tax": NOTHING,
            "line_total": {"amount": "199.98", "currency": "USD"},
            "returned": 0,
        }
        for i, product in enumerate(products, 1)
    ]
    assert order.json["total"] == {"amount": "399.96", "currency": "USD"}


async def test_orders_are_listed_by_a_product_of_their_items(open_shop: Shop) -> None:
    product, other = await stocked(open_shop), await stocked(open_shop)
    both = {"user_id": 1, "items": [{"product_id": product.id}, {"product_id": other.id}]}
    first = await open_shop.post("/orders", {"user_id": 1, "product_id": product.id})
    second = await open_shop.post("/orders", both)

    async def listed(query: str) -> list[int]:
        return [order["id"] for order in (await open_shop.get(f"/orders?{query}")).json]

    assert await listed(f"product_id={product.id}") == [second.json["id"], first.json["id"]]
    assert await listed(f"product_id={product.id}&limit=1") == [second.json["id"]]
    assert await listed(f"product_id={other.id}") == [second.json["id"]]
    assert await listed(f"product_id={UNKNOWN_ID}") == []


# --------------------------------------------------------------------------------------------------------------- access


async def test_unknown_orders_and_payments_are_404(open_shop: Shop) -> None:
    assert_problem(await open_shop.post("/payments", {"order_id": UNKNOWN_ID}), 404, "orders.not_found")
    assert_problem(await open_shop.get(f"/payments/{UNKNOWN_ID}"), 404, "payments.not_found")
    assert_problem(await open_shop.post(f"/payments/{UNKNOWN_ID}/capture"), 404, "payments.not_found")
    assert (await open_shop.get(f"/payments?order_id={UNKNOWN_ID}")).json == []


async def test_customers_pay_and_see_their_own_and_others_are_like_unknown(guarded_shop: Shop) -> None:
    owner, other = await new_person(guarded_shop), await new_person(guarded_shop)
    order = await placed(guarded_shop, owner)

    others = await pay(guarded_shop, order, other.token)
    paid = await pay(guarded_shop, order, owner.token)
    path = f"/payments/{paid.json['id']}"

    assert_problem(others, 404, "orders.not_found")
    assert paid.status == 201
    assert (await guarded_shop.get(path, token=owner.token)).status == 200
    assert_problem(await guarded_shop.get(path, token=other.token), 404, "payments.not_found")
    assert (await guarded_shop.get(f"/payments?order_id={order.json['id']}", token=other.token)).json == []
    assert len((await guarded_shop.get("/payments", token=owner.token)).json) == 1
    assert_problem(
        await guarded_shop.get(f"/orders/{order.json['id']}/timeline", token=other.token), 404, "orders.not_found"
    )


@pytest.mark.parametrize("what", ["capture", "void", "refunds"])
async def test_only_staff_capture_void_and_refund(guarded_shop: Shop, what: str) -> None:
    owner = await new_person(guarded_shop)
    paid = await pay(guarded_shop, await placed(guarded_shop, owner), owner.token)
    path, headers = f"/payments/{paid.json['id']}/{what}", {"Idempotency-Key": unique("key")}

    assert (await guarded_shop.post(path, headers=headers, token=owner.token)).status == 403
    assert (await guarded_shop.post(path, headers=headers)).status == 401


# ----------------------------------------------------------------------------------------------------- reading refunds


async def test_refunds_are_read_by_order_and_by_payment(guarded_shop: Shop) -> None:
    person, staff = await new_person(guarded_shop), await staff_token(guarded_shop)
    order = await placed(guarded_shop, person)
    paid = await pay(guarded_shop, order, token=person.token)
    body = {"amount": "10.00", "reason": "scratched"}
    key = {"Idempotency-Key": unique("key")}
    given = await guarded_shop.post(f"/payments/{paid.json['id']}/refunds", body, headers=key, token=staff)
    assert given.status == 201, given.body
    paths = (f"/orders/{order.json['id']}/refunds", f"/payments/{paid.json['id']}/refunds")

    one = f"/refunds/{given.json['id']}"
    assert (await guarded_shop.get(one, token=staff)).json == given.json
    assert (await guarded_shop.get(one, token=person.token)).json == {**given.json, "by": "staff"}
    for path in paths:
        assert (await guarded_shop.get(path, token=staff)).json == [given.json]
        [own] = (await guarded_shop.get(path, token=person.token)).json
        assert own == {**given.json, "by": "staff"}

    assert given.json["by"].startswith("staff ")
    assert (given.json["payment_id"], given.json["reason"]) == (paid.json["id"], "scratched")
    assert None not in (given.json["created_at"], given.json["settled_at"])
    other = await new_person(guarded_shop)
    for path, code in zip(paths, ("orders.not_found", "payments.not_found"), strict=True):
        assert_problem(await guarded_shop.get(path, token=other.token), 404, code)
        assert_problem(await guarded_shop.get(path), 401, "sign_in_first")
    assert_problem(await guarded_shop.get(one, token=other.token), 404, "orders.refund_not_found")
    assert_problem(await guarded_shop.get(one), 401, "sign_in_first")


async def test_a_limited_refund_says_so(open_shop: Shop) -> None:
    order = await placed(open_shop, payment_method="sandbox:ok")
    path, headers = f"/orders/{order.json['id']}", {"Idempotency-Key": unique("return")}
    for state in ("shipped", "delivered"):
        assert (await open_shop.patch(path, {"fulfilment": state})).status == 200
    [payment] = (await open_shop.get(f"/payments?order_id={order.json['id']}")).json
    by_hand = await open_shop.post(f"/payments/{payment['id']}/refunds", {"amount": "90.00"}, headers=headers)
    assert (by_hand.json["asked"], by_hand.json["limit_reason"]) == (by_hand.json["amount"], "")

    returned = await open_shop.post(f"{path}/returns", headers={"Idempotency-Key": unique("return")})

    assert (returned.status, returned.json["amount"]["amount"], returned.json["asked"]) == (201, "9.99", PRICE)
    why = returned.json["limit_reason"]
    assert why.startswith("asked for 99.99 USD, refunded 9.99 USD: 99.99 USD was paid for the order, and 90.00 USD")
    assert (await open_shop.get(f"{path}/refunds")).json[1]["limit_reason"] == why
    assert [entry["limit_reason"] for entry in (await open_shop.get(f"{path}/history")).json][-2:] == [why, why]


async def test_what_staff_note_for_staff_is_in_no_answer_to_a_customer(guarded_shop: Shop) -> None:
    person, staff, note = (
        await new_person(guarded_shop),
        await staff_token(guarded_shop),
        unique("called the bank about"),
    )
    order = await placed(guarded_shop, person, payment_method="sandbox:ok")
    [paid] = (await guarded_shop.get(f"/payments?order_id={order.json['id']}", token=person.token)).json
    path, key = f"/orders/{order.json['id']}", {"Idempotency-Key": unique("key")}
    noted = {"reason": "our mistake", "internal_note": note}
    given = await guarded_shop.post(
        f"/payments/{paid['id']}/refunds", {"amount": "1.00", **noted}, headers=key, token=staff
    )
    assert (given.status, given.json["reason"], given.json["internal_note"]) == (201, "our mistake", note)
    refused = await guarded_shop.post(f"{path}/cancel", noted, token=person.token)
    assert_problem(refused, 403, "forbidden")
    cancelled = await guarded_shop.post(f"{path}/cancel", noted, token=staff)
    assert cancelled.status == 200, cancelled.body

    noting = []
    for of in ("", "/history", "/timeline", "/refunds"):
        to_staff = await guarded_shop.get(f"{path}{of}", token=staff)
        to_customer = await guarded_shop.get(f"{path}{of}", token=person.token)
        assert (to_staff.status, to_customer.status) == (200, 200)
        assert note not in to_customer.body.decode()
        noting += [of] * (note in to_staff.body.decode())
    assert noting == ["/history", "/timeline", "/refunds"]
    one = f"/refunds/{given.json['id']}"
    assert (await guarded_shop.get(one, token=staff)).json["internal_note"] == note
    assert note not in (await guarded_shop.get(one, token=person.token)).body.decode()
