"""Guests: orders without an account, and what their access token opens."""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import AsyncGenerator, Mapping

import pytest
import pytest_asyncio

from mercato.testing.cluster import Cluster
from mercato.testing.responses import Response, assert_problem
from mercato.testing.shop import Shop
from mercato.testing.shop_data import new_order, new_person, new_product, settled_order

pytestmark = pytest.mark.asyncio(loop_scope="session")


@pytest_asyncio.fixture(scope="module", loop_scope="session", params=["open", "guarded"])
async def shop(cluster: Cluster, request: pytest.FixtureRequest) -> AsyncGenerator[Shop]:
    """A shop of these tests alone: what guests order is limited by their address."""
    is_open = request.param == "open"
    own = await Shop.start(cluster, "local" if is_open else "loopback", is_open=is_open)
    yield own
    await own.close()


async def ordered(shop: Shop, order: Mapping[str, object], **headers: str) -> Response:
    """The answer to an order that names no user, when the limit of the address lets it through."""
    while (reply := await shop.post("/orders", order, headers=headers)).status == 429:
        await asyncio.sleep(float(reply.headers["retry-after"]))
    return reply


async def stocked(shop: Shop, on_hand: int = 100) -> int:
    """The number of a product that costs 99.99."""
    product = await new_product(shop)
    token = None if shop.is_open else await shop.staff()
    assert (await shop.put(f"/products/{product.id}/stock", {"on_hand": on_hand}, token=token)).status == 200
    return product.id


async def guest_order(shop: Shop, **fields: object) -> Response:
    order = {"product_id": await stocked(shop), **fields}
    reply = await ordered(shop, order, Prefer="wait=20")
    assert reply.status == 201, reply.body
    return reply


async def as_staff(shop: Shop, path: str) -> Response:
    return await shop.get(path, token=None if shop.is_open else await shop.staff())


async def test_an_order_without_a_user_is_a_guests(shop: Shop) -> None:
    reply = await guest_order(shop)
    assert (reply.json["user_id"], reply.json["customer_id"]) == (None, None)
    assert len(reply.json["access_token"]) == 43
    [placed, *_] = (await as_staff(shop, f"/orders/{reply.json['id']}/history")).json
    assert placed["by"] == "anonymous"


async def test_the_printed_order_of_system_a_is_a_guests(shop: Shop) -> None:
    body = b'{"item_id": 1, "amount": 1299.99}'
    while (reply := await shop.post("/orders", raw=body, headers={"Content-Type": "application/json"})).status == 429:
        await asyncio.sleep(float(reply.headers["retry-after"]))
    assert reply.status == 201, reply.body
    assert (reply.json["item_id"], reply.json["amount"], reply.json["user_id"]) == (1, "1299.99", None)
    assert reply.json["access_token"]
    wrong = await shop.post(
        "/orders", raw=body.replace(b"1299.99", b"42"), headers={"Content-Type": "application/json"}
    )
    assert_problem(wrong, 409, "orders.price_changed")


@pytest.mark.parametrize("way", ["query", "header"])
async def test_a_guest_reads_pays_and_sees_what_happened(shop: Shop, way: str) -> None:
    placed = (await guest_order(shop)).json
    query = f"?access_token={placed['access_token']}" if way == "query" else ""
    headers = {} if way == "query" else {"Authorization": f"Guest {placed['access_token']}"}
    path = f"/orders/{placed['id']}"
    read = await shop.get(path + query, headers=headers)
    assert (read.status, read.json["id"], read.json["access_token"]) == (200, placed["id"], None)
    paid = await shop.post(f"/payments{query}", {"order_id": placed["id"], "amount": "99.99"}, headers=headers)
    assert (paid.status, paid.json["status"], paid.json["user_id"]) == (201, "captured", None), paid.body
    payment = await shop.get(f"/payments/{paid.json['id']}{query}", headers=headers)
    assert (payment.status, payment.json) == (200, paid.json), payment.body
    for part in ("history", "timeline"):
        assert (await shop.get(f"{path}/{part}{query}", headers=headers)).status == 200
    assert (await shop.get(path + query, headers=headers)).json["payment"] == "paid"


async def test_a_guest_pays_by_the_printed_request(shop: Shop) -> None:
    placed = (await guest_order(shop)).json
    query = f"order_id={placed['id']}&amount=99.99&access_token={placed['access_token']}"
    reply = await shop.post(f"/payments/process?{query}")
    assert (reply.status, reply.json["status"]) == (200, "captured"), reply.body
    assert reply.json["message"]


async def test_a_guest_cancels_the_order(shop: Shop) -> None:
    placed = (await guest_order(shop)).json
    reply = await shop.post(f"/orders/{placed['id']}/cancel?access_token={placed['access_token']}", {"reason": "no"})
    assert (reply.status, reply.json["status"]) == (200, "cancelled"), reply.body
    moves = (await as_staff(shop, f"/orders/{placed['id']}/history")).json
    assert moves[-1]["by"] == f"guest {placed['id']}"


async def test_a_wrong_token_answers_like_an_unknown_order(shop: Shop) -> None:
    placed = (await guest_order(shop)).json
    unknown = placed["id"] + 1_000_000
    wrong = ["", "wrong", "A" * 43, "A" * 1000, "%FF", placed["access_token"][:-1]]
    for order_id, token in itertools.product((placed["id"], unknown), wrong):
        replies = [
            await shop.get(f"/orders/{order_id}?access_token={token}"),
            await shop.get(f"/orders/{order_id}/history?access_token={token}"),
            await shop.get(f"/orders/{order_id}/timeline?access_token={token}"),
            await shop.post(f"/orders/{order_id}/cancel?access_token={token}"),
            await shop.post(f"/payments?access_token={token}", {"order_id": order_id}),
            await shop.post(f"/payments/process?access_token={token}&order_id={order_id}&amount=99.99"),
        ]
        for reply in replies:
            assert_problem(reply, 404, "orders.not_found")
            assert reply.json["details"] == {"order_id": order_id}
    assert (await as_staff(shop, f"/orders/{placed['id']}")).json["status"] == "pending"


async def test_a_token_opens_its_order_and_nothing_else(shop: Shop) -> None:
    mine, other = (await guest_order(shop)).json, (await guest_order(shop)).json
    of_user = await new_order(shop, 1)
    token = mine["access_token"]
    for order_id in (other["id"], of_user):
        assert_problem(await shop.get(f"/orders/{order_id}?access_token={token}"), 404, "orders.not_found")
    guest = {"Authorization": f"Guest {token}"}
    for path in ("/orders", "/users", "/users/1", "/users/me", "/payments"):
        reply = await shop.get(path, headers=guest)
        assert_problem(reply, 401, "sign_in_first")
    moved = await shop.patch(f"/orders/{mine['id']}", {"status": "confirmed"}, headers=guest)
    assert_problem(moved, 401, "sign_in_first")
    reserved = await shop.post(f"/payments?access_token={token}", {"order_id": mine["id"], "capture": False})
    assert_problem(reserved, 403, "forbidden")


async def test_a_token_opens_the_payments_of_its_order_alone(shop: Shop) -> None:
    mine, other = (await guest_order(shop)).json, (await guest_order(shop)).json
    token = f"?access_token={mine['access_token']}"
    paid = await shop.post(f"/payments?access_token={other['access_token']}", {"order_id": other["id"]})
    assert paid.status == 201, paid.body
    path = f"/payments/{paid.json['id']}"

    of_another = await shop.get(path + token)
    unknown = await shop.get(f"/payments/{paid.json['id'] + 1_000_000}{token}")
    wrong = await shop.get(f"{path}?access_token={'x' * 43}")

    for refused in (of_another, unknown, wrong):
        assert_problem(refused, 404, "payments.not_found")
    with_own = await shop.get(f"{path}?access_token={other['access_token']}")
    assert (with_own.status, with_own.json) == (200, paid.json)


async def test_a_guest_names_no_user(guarded_shop: Shop) -> None:
    assert_problem(await guarded_shop.post("/orders", {"user_id": 1, "product_id": 100}), 401, "sign_in_first")
    guest = {"Authorization": "Guest something"}
    reply = await guarded_shop.post("/orders", {"user_id": 1, "product_id": 100}, headers=guest)
    assert_problem(reply, 401, "sign_in_first")
    assert_problem(await guarded_shop.get("/orders/1001"), 401, "sign_in_first")


async def test_the_order_of_a_token_of_an_account_is_that_accounts(guarded_shop: Shop) -> None:
    person = await new_person(guarded_shop)
    reply = await guarded_shop.post("/orders", {"product_id": 100}, token=person.token)
    assert (reply.status, reply.json["user_id"], reply.json["access_token"]) == (201, person.id, None)
    assert (await guarded_shop.get(f"/orders/{reply.json['id']}", token=person.token)).status == 200


async def test_customers_do_not_see_orders_of_guests(guarded_shop: Shop) -> None:
    placed = (await guest_order(guarded_shop)).json
    person = await new_person(guarded_shop)
    assert_problem(await guarded_shop.get(f"/orders/{placed['id']}", token=person.token), 404, "orders.not_found")
    assert (await guarded_shop.get("/orders", token=person.token)).json == []


async def test_staff_see_orders_of_guests_and_their_email(shop: Shop) -> None:
    placed = (await guest_order(shop, email="guest@example.com")).json
    assert placed["email"] is None
    seen = (await as_staff(shop, f"/orders/{placed['id']}")).json
    assert (seen["email"], seen["user_id"], seen["access_token"]) == ("guest@example.com", None, None)
    listed = (await as_staff(shop, "/orders")).json
    assert placed["id"] in [order["id"] for order in listed]
    guest = (await shop.get(f"/orders/{placed['id']}?access_token={placed['access_token']}")).json
    assert guest["email"] is None
    cancelled = await shop.post(f"/orders/{placed['id']}/cancel?access_token={placed['access_token']}")
    assert cancelled.json["email"] is None


@pytest.mark.parametrize("email", ["nowhere", "a b@example.com", "a\x00b@example.com", "guest@localhost"])
async def test_an_email_that_is_none_is_refused_and_named(shop: Shop, email: str) -> None:
    product_id = await stocked(shop)
    for form in ({"product_id": product_id}, {"product_id": product_id, "user_id": 1}):
        token = await shop.alice() if "user_id" in form and not shop.is_open else None
        refused = await shop.post("/orders", {**form, "email": email}, token=token)
        assert_problem(refused, 400, "invalid_request")
        assert refused.wrong_fields == {"email"}


async def test_an_email_is_stored_in_one_spelling(shop: Shop) -> None:
    placed = (await guest_order(shop, email=" Guest@EXAMPLE.com ")).json
    assert (await as_staff(shop, f"/orders/{placed['id']}")).json["email"] == "Guest@example.com"


async def test_a_replay_answers_with_the_same_token(shop: Shop) -> None:
    order, headers = (
        {"product_id": await stocked(shop), "email": "a@example.com"},
        {"Idempotency-Key": str(uuid.uuid4())},
    )
    first, again = [await ordered(shop, order, **headers) for _ in range(2)]
    assert (first.status, again.status, again.headers["idempotent-replayed"]) == (201, 201, "true")
    assert again.json == first.json
    assert first.json["email"] is None
    assert_problem(await ordered(shop, {**order, "quantity": 2}, **headers), 422, "idempotency_key_reused")


async def test_a_key_of_a_guest_is_long(shop: Shop) -> None:
    order = {"product_id": await stocked(shop)}
    reply = await ordered(shop, order, **{"Idempotency-Key": "k" * 21})
    assert_problem(reply, 400, "invalid_request")
    assert reply.wrong_fields == {"header Idempotency-Key"}
    assert (await ordered(shop, order, **{"Idempotency-Key": uuid.uuid4().hex[:22]})).status == 201


async def test_guests_of_one_address_are_limited(cluster: Cluster) -> None:
    own = await Shop.start(cluster)
    try:
        replies = await asyncio.gather(*(own.post("/orders", {"product_id": 100}) for _ in range(60)))
        assert {reply.status for reply in replies} == {201, 429}
        assert_problem(next(r for r in replies if r.status == 429), 429, "too_many_requests")
        assert (await own.post("/orders", {"user_id": 1, "product_id": 100})).status == 201
    finally:
        await own.close()


async def test_a_key_of_a_guests_payment_is_that_orders(shop: Shop) -> None:
    key = {"Idempotency-Key": str(uuid.uuid4())}
    for _ in range(2):
        placed = (await guest_order(shop)).json
        paths = [f"/payments?access_token={placed['access_token']}"] * 2
        replies = [await shop.post(path, {"order_id": placed["id"]}, headers=key) for path in paths]
        assert [reply.status for reply in replies] == [201, 201], replies
        assert replies[0].json["id"] == replies[1].json["id"]


async def test_all_guests_together_hold_a_fifth_of_the_stock(shop: Shop) -> None:
    product_id = await stocked(shop, on_hand=10)

    async def status_of(quantity: int) -> str:
        reply = await ordered(shop, {"product_id": product_id, "quantity": quantity}, Prefer="wait=20")
        if reply.status == 409:
            return reply.code
        assert reply.status == 201, reply.body
        return reply.json["status"]

    assert [await status_of(quantity) for quantity in (3, 2, 1)] == [
        "orders.out_of_stock",
        "pending",
        "orders.out_of_stock",
    ]
    order = await settled_order(shop, await new_order(shop, 1, product_id))
    assert order.status == "pending", "accounts are not bounded by what guests hold"
