"""`Prefer: wait=N`: the answer is what the order has come to; a refusal is a problem, as long as it is so."""

from __future__ import annotations

import asyncio
import datetime
from typing import Any, Final

import pytest

from mercato.chassis.contract import Actor, InvalidRequest, Unavailable
from mercato.chassis.http import LONG_RESPONSE
from mercato.contracts.order_refusals import OutOfStock, PaymentDeclined
from mercato.contracts.orders import AwaitOrder, Order, Orders
from mercato.contracts.roles import CUSTOMER
from mercato.gateway.headers import RequestHeaders, preferred_wait_ms
from mercato.gateway.route import Wait
from mercato.gateway.waiting import Waiting
from mercato.testing.responses import Response, assert_problem
from mercato.testing.shop import Shop
from mercato.testing.shop_data import Person, new_person, new_product, staff_token, unique

pytestmark = pytest.mark.asyncio(loop_scope="session")

WAIT: Final = {"Prefer": "wait=20"}
KNOWS_LONG_ANSWERS: Final = {"extensions": {LONG_RESPONSE: {}}}


async def stocked(shop: Shop, pieces: int = 10) -> int:
    product = await new_product(shop)
    reply = await shop.put(f"/products/{product.id}/stock", {"on_hand": pieces}, token=await staff_token(shop))
    assert reply.status == 200, reply.body
    return product.id


async def place(shop: Shop, person: Person, body: Any, key: str, **headers: str) -> Response:
    return await shop.post("/orders", body, headers={"Idempotency-Key": key, **headers}, token=person.token)


# ------------------------------------------------------------------------------------------------------- refused orders


async def test_an_order_whose_payment_is_declined_is_402_with_its_place_and_until_when_it_can_be_paid(
    guarded_shop: Shop,
) -> None:
    shop, person = guarded_shop, await new_person(guarded_shop)
    body = {"user_id": person.id, "product_id": await stocked(shop), "payment_method": "sandbox:insufficient_funds"}

    refused = await place(shop, person, body, unique("key"), **WAIT)

    assert_problem(refused, 402, "orders.payment_declined")
    order = await shop.get(refused.headers["location"], token=person.token)
    [payment] = (await shop.get(f"/payments?order_id={order.json['id']}", token=person.token)).json
    details = refused.json["details"]
    until = datetime.datetime.fromisoformat(details.pop("payable_until"))
    assert details == {
        "order_id": order.json["id"],
        "payment_id": payment["id"],
        "provider_code": "insufficient_funds",
    }
    assert until - datetime.datetime.fromisoformat(order.json["created_at"]) == datetime.timedelta(minutes=15)
    assert f"it can be paid until {until:%Y-%m-%dT%H:%M:%SZ}" in refused.json["detail"]
    assert refused.headers["preference-applied"] == "wait=20"
    assert "idempotent-replayed" not in refused.headers
    assert (order.json["status"], order.json["payment"]) == ("pending", "unpaid")


async def test_a_repetition_is_answered_as_a_problem_only_as_long_as_the_order_is_refused(guarded_shop: Shop) -> None:
    shop, person, key = guarded_shop, await new_person(guarded_shop), unique("key")
    body = {"user_id": person.id, "product_id": await stocked(shop), "payment_method": "sandbox:declined"}
    first = await place(shop, person, body, key, **WAIT)

    again = await place(shop, person, body, key, **WAIT)
    accepted = await place(shop, person, body, key)
    paid = await shop.post("/payments", {"order_id": first.json["details"]["order_id"]}, token=person.token)
    at_last = await place(shop, person, body, key, **WAIT)

    for refused in (first, again):
        assert_problem(refused, 402, "orders.payment_declined")
    assert again.headers["location"] == accepted.headers["location"] == first.headers["location"]
    assert again.headers["idempotent-replayed"] == "true"
    assert (accepted.status, accepted.json["status"]) == (201, "pending")
    assert paid.status == 201
    assert (at_last.status, at_last.json["status"], at_last.json["payment"]) == (201, "confirmed", "paid")
    assert at_last.headers["idempotent-replayed"] == "true"


async def test_an_order_that_there_is_not_enough_for_is_409_and_without_a_wait_accepted(guarded_shop: Shop) -> None:
    shop, person = guarded_shop, await new_person(guarded_shop)
    product_id = await stocked(shop, 1)
    body = {"user_id": person.id, "product_id": product_id, "quantity": 3, "payment_method": "sandbox:ok"}
    key = unique("key")

    accepted = await place(shop, person, body, unique("key"))
    refused = [await place(shop, person, body, key, **WAIT) for _ in range(2)]

    assert (accepted.status, accepted.json["status"]) == (201, "pending")
    for reply in refused:
        assert_problem(reply, 409, "orders.out_of_stock")
        assert reply.json["details"]["items"] == [{"product_id": product_id, "requested": 3, "available": 1}]
        assert f"product {product_id} (1 of 3)" in reply.json["detail"]
        order = await shop.get(reply.headers["location"], token=person.token)
        assert (order.json["status"], order.json["reason"]["code"]) == ("cancelled", "out_of_stock")
    assert [reply.headers.get("idempotent-replayed") for reply in refused] == [None, "true"]


async def test_an_order_that_was_cancelled_on_request_is_answered_as_it_is(guarded_shop: Shop) -> None:
    shop, person, key = guarded_shop, await new_person(guarded_shop), unique("key")
    body = {"user_id": person.id, "product_id": await stocked(shop), "payment_method": "sandbox:declined"}
    refused = await place(shop, person, body, key, **WAIT)
    await shop.post(f"{refused.headers['location']}/cancel", {}, token=person.token)

    again = await place(shop, person, body, key, **WAIT)

    assert (again.status, again.json["status"], again.json["reason"]["code"]) == (201, "cancelled", "requested")


async def test_a_guest_whose_payment_is_declined_is_given_the_token_to_pay_in_another_way(guarded_shop: Shop) -> None:
    body = {"product_id": await stocked(guarded_shop, 100), "payment_method": "sandbox:declined"}
    headers = {"Idempotency-Key": unique("a-long-key-of-a-guest"), **WAIT}
    while (refused := await guarded_shop.post("/orders", body, headers=headers)).status == 429:
        await asyncio.sleep(0.2)

    assert_problem(refused, 402, "orders.payment_declined")
    token = refused.json["details"]["access_token"]
    paid = await guarded_shop.post(
        f"/payments?access_token={token}",
        {"order_id": refused.json["details"]["order_id"]},
        headers={"Idempotency-Key": unique("a-long-key-of-a-guest")},
    )
    assert paid.status == 201, paid.body


async def test_an_order_that_is_paid_is_201_and_the_preference_was_applied(guarded_shop: Shop) -> None:
    person = await new_person(guarded_shop)
    body = {"user_id": person.id, "product_id": await stocked(guarded_shop), "payment_method": "sandbox:ok"}

    paid = await place(guarded_shop, person, body, unique("key"), Prefer="respond-async, wait=300")

    assert (paid.status, paid.json["payment"]) == (201, "paid")
    assert paid.headers["preference-applied"] == "wait=60"


async def test_a_payment_that_is_declined_by_itself_says_until_when_its_order_can_be_paid(guarded_shop: Shop) -> None:
    shop, person = guarded_shop, await new_person(guarded_shop)
    order = await place(shop, person, {"user_id": person.id, "product_id": await stocked(shop)}, unique("key"), **WAIT)

    declined = await shop.post(
        "/payments", {"order_id": order.json["id"], "payment_method": "sandbox:declined"}, token=person.token
    )

    assert_problem(declined, 402, "orders.payment_declined")
    assert declined.json["details"]["payable_until"] > order.json["created_at"]


# ------------------------------------------------------------------------------------------------- waits that end early


class AnyRoute:
    name = "POST /things"

    def respond(self, answer: Any, scope: Any) -> tuple[int, list[bytes], bytes]:
        return 201, [], str(answer).encode()

    def location_lines(self, answer: Any) -> list[bytes]:
        return [b"location: /things/1"]


WAITS: Final = Wait(
    operation=Orders.settled,
    request=lambda answer, wait_ms: (answer, wait_ms),
    answer=lambda _, waited: waited,
    refusals=(OutOfStock,),
)


async def test_a_wait_that_is_interrupted_answers_as_things_are_and_says_no_preference_applied() -> None:
    asked: list[int] = []
    interrupts: list[Any] = []

    async def ask(request: Any) -> str:
        asked.append(request[1])
        if request[1]:
            await asyncio.Event().wait()
        return "as it is"

    async def send(message: Any) -> None:
        interrupts.append(message)
        asyncio.get_running_loop().call_soon(message["interrupt"])

    answer = await Waiting(WAITS, ask, AnyRoute()).respond("placed", 60_000, KNOWS_LONG_ANSWERS, send, "")

    assert answer == (201, [], b"as it is")
    assert asked == [60_000, 0]
    assert [(message["type"], message["seconds"]) for message in interrupts] == [(LONG_RESPONSE, 60.0)]


async def test_a_wait_that_fails_answers_with_what_was_begun_and_says_no_preference_applied() -> None:
    async def ask(_request: Any) -> str:
        raise Unavailable(service="orders")

    async def send(_message: Any) -> None:
        raise AssertionError("the server knows no long answers")

    answer = await Waiting(WAITS, ask, AnyRoute()).respond("placed", 5_000, {}, send, "")

    assert answer == (201, [], b"placed")


async def test_a_wait_that_ends_with_a_refusal_answers_with_the_problem_and_the_place() -> None:
    async def ask(_request: Any) -> str:
        raise OutOfStock(order_id=1, items=())

    status, lines, _ = await Waiting(WAITS, ask, AnyRoute()).respond("placed", 5_000, {}, None, "")  # type: ignore[arg-type]  # it is not used

    assert status == 409
    assert lines[-2:] == [b"location: /things/1", b"preference-applied: wait=5"]


# ----------------------------------------------------------------------------------------------------------- the header


@pytest.mark.parametrize(
    ("lines", "wait_ms"),
    [
        ([b"wait=5"], 5_000),
        ([b"WAIT = 5"], 5_000),
        ([b'wait="5"'], 5_000),
        ([b"wait=5; unit=s"], 5_000),
        ([b"respond-async, wait=5"], 5_000),
        ([b"handling=lenient; wait=7, wait=5"], 5_000),
        ([b'note="a, wait=7; wait=8", wait=5'], 5_000),
        ([b"wait=5, wait=7"], 5_000),
        ([b"return=minimal", b"wait=5"], 5_000),
        ([b"wait=5", b"return=minimal"], 5_000),
        ([b"wait=0"], 0),
        ([b"wait=9999999999"], 60_000),
        ([b"waiting=5"], None),
        ([b"return=minimal"], None),
        ([b"respond-async; wait=5"], None),
        ([b'"unfinished, wait=5'], None),
        ([b""], None),
    ],
)
async def test_preferences_are_read_as_rfc_7240_has_them(lines: list[bytes], wait_ms: int | None) -> None:
    headers = RequestHeaders([(b"prefer", line) for line in lines])
    assert headers.prefer is not None
    assert preferred_wait_ms(headers.prefer) == wait_ms


@pytest.mark.parametrize("prefer", [b"wait", b"wait=", b"wait=soon", b"wait=-1", b"wait=1.5"])
async def test_a_wait_that_is_no_number_of_seconds_is_refused(prefer: bytes) -> None:
    with pytest.raises(InvalidRequest) as refused:
        preferred_wait_ms(prefer)
    assert refused.value.errors[0].field == "header Prefer"


async def test_old_gateways_are_answered_with_the_order_whatever_it_has_come_to(guarded_shop: Shop) -> None:
    person = await new_person(guarded_shop)
    body = {"user_id": person.id, "product_id": await stocked(guarded_shop), "payment_method": "sandbox:declined"}
    order_id = (await place(guarded_shop, person, body, unique("key"), **WAIT)).json["details"]["order_id"]
    orders = guarded_shop.harness.client(Orders)

    with guarded_shop.harness.acting(Actor(CUSTOMER, person.id)):
        order = await orders.settled(AwaitOrder(id=order_id, wait_ms=0))
        with pytest.raises(PaymentDeclined):
            await orders.settled(AwaitOrder(id=order_id, wait_ms=0, refusals=True))

    assert isinstance(order, Order)
    assert order.status == "pending"
