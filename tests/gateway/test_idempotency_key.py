"""`Idempotency-Key` on POST /orders: whatever a client, a proxy or a broken line repeats, there is one order."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from gateway.harness import SameDatabases, Things
from mercato.chassis.hosting.host import TransportName
from mercato.gateway.routes import ROUTES
from mercato.testing.cluster import Cluster
from mercato.testing.responses import Response, assert_problem
from mercato.testing.shop import Shop
from mercato.testing.shop_data import new_order, new_person, new_product, staff_token, unique
from mercato.testing.snapshots import state_of

pytestmark = pytest.mark.asyncio(loop_scope="session")

ORDER = {"user_id": 1, "product_id": 100, "quantity": 1}


async def place(
    shop: Shop, key: str, body: Any = None, *, raw: bytes | None = None, token: str | None = None
) -> Response:
    sent = json.dumps(body or ORDER).encode() if raw is None else raw
    headers = {"Idempotency-Key": key, "Content-Type": "application/json"}
    return await shop.post("/orders", raw=sent, headers=headers, token=token)


async def order_count(shop: Shop) -> int:
    async with shop.harness.host.services["orders"].database.read() as tx:
        [count] = await tx.fetch_values(int, "SELECT count(*) FROM orders")
    return count


def assert_replayed(first: Response, again: Response) -> None:
    """That an answer is the first one again, byte for byte, and says so."""
    assert (first.status, again.status) == (201, 201)
    assert again.body == first.body
    assert again.headers["idempotent-replayed"] == "true"
    assert again.headers["location"] == first.headers["location"]
    assert again.headers["etag"] == first.headers["etag"]


async def test_a_repeated_request_gets_the_first_answer(open_shop: Shop) -> None:
    key, before = unique("key"), await order_count(open_shop)
    first = await place(open_shop, key)
    assert "idempotent-replayed" not in first.headers
    for _ in range(3):
        assert_replayed(first, await place(open_shop, key))
    assert await order_count(open_shop) == before + 1


async def test_a_repeated_request_gets_the_first_answer_also_when_the_order_has_moved_on(open_shop: Shop) -> None:
    key = unique("key")
    first = await place(open_shop, key)
    assert (await open_shop.post(f"{first.headers['location']}/cancel")).status == 200
    assert_replayed(first, await place(open_shop, key))


async def test_the_key_with_another_body_is_refused_and_nothing_runs(open_shop: Shop) -> None:
    key = unique("key")
    first = await place(open_shop, key)
    before = await state_of(open_shop)
    for other in ({**ORDER, "quantity": 2}, {**ORDER, "user_id": 2}, {**ORDER, "amount": "99.99"}):
        assert_problem(await place(open_shop, key, other), 422, "idempotency_key_reused")
    assert await state_of(open_shop) == before
    assert_replayed(first, await place(open_shop, key))


async def test_white_space_and_the_order_of_members_do_not_count(open_shop: Shop) -> None:
    key = unique("key")
    first = await place(open_shop, key, raw=b'{"user_id":1,"items":[{"product_id":100,"quantity":2}]}')
    spaced = b'{\n  "items": [ { "quantity": 2,\t"product_id": 100 } ],\r\n  "user_id": 1\n}'
    assert_replayed(first, await place(open_shop, key, raw=spaced))


async def test_the_same_key_of_another_user_is_another_key(guarded_shop: Shop) -> None:
    key, one, other = unique("key"), await new_person(guarded_shop), await new_person(guarded_shop)
    first = await place(guarded_shop, key, {**ORDER, "user_id": one.id}, token=one.token)
    second = await place(guarded_shop, key, {**ORDER, "user_id": other.id}, token=other.token)
    third = await place(guarded_shop, key, {**ORDER, "user_id": one.id}, token=await staff_token(guarded_shop))
    assert (first.status, second.status, third.status) == (201, 201, 201)
    assert len({first.json["id"], second.json["id"], third.json["id"]}) == 3
    assert not any("idempotent-replayed" in reply.headers for reply in (first, second, third))


async def test_without_a_key_each_request_is_its_own_order(open_shop: Shop) -> None:
    first, second = await open_shop.post("/orders", ORDER), await open_shop.post("/orders", ORDER)
    assert first.json["id"] != second.json["id"]


async def test_twenty_identical_requests_at_once_make_one_order(open_shop: Shop) -> None:
    for _ in range(5):
        key, before = unique("key"), await order_count(open_shop)
        replies = await asyncio.gather(*(place(open_shop, key) for _ in range(20)))
        done = [reply for reply in replies if reply.status == 201]
        assert len({reply.body for reply in done}) == 1
        assert sum("idempotent-replayed" not in reply.headers for reply in done) == 1
        for reply in replies:
            assert reply.status == 201 or (reply.status in (409, 503) and int(reply.headers["retry-after"]) >= 1)
        assert await order_count(open_shop) == before + 1


async def test_at_once_with_two_bodies_one_body_wins(open_shop: Shop) -> None:
    key, before = unique("key"), await order_count(open_shop)
    bodies = [ORDER, {**ORDER, "quantity": 2}]
    replies = await asyncio.gather(*(place(open_shop, key, bodies[i % 2]) for i in range(20)))
    assert {reply.status for reply in replies} == {201, 422}
    assert len({reply.body for reply in replies if reply.status == 201}) == 1
    assert await order_count(open_shop) == before + 1


@pytest.mark.parametrize(
    ("refused", "status"),
    [
        ({"user_id": 1}, 400),
        ({**ORDER, "quantity": 0}, 400),
        ({**ORDER, "user_id": 999_999}, 404),
        ({**ORDER, "product_id": 999_999}, 404),
        ({**ORDER, "amount": "1.00"}, 409),
    ],
)
async def test_a_refusal_leaves_the_key_free(open_shop: Shop, refused: dict[str, Any], status: int) -> None:
    key, before = unique("key"), await state_of(open_shop)
    for _ in range(2):
        reply = await place(open_shop, key, refused)
        assert reply.status == status
        assert "idempotent-replayed" not in reply.headers
    assert await state_of(open_shop) == before
    assert (await place(open_shop, key)).status == 201


async def test_a_refused_request_is_accepted_when_the_reason_is_gone(open_shop: Shop) -> None:
    product, key = await new_product(open_shop, price_minor=10_00), unique("key")
    wanted = {"user_id": 1, "product_id": product.id, "amount": "12.00"}
    assert_problem(await place(open_shop, key, wanted), 409, "orders.price_changed")
    await open_shop.patch(f"/products/{product.id}", {"price": {"amount": "12.00", "currency": "USD"}})
    assert (await place(open_shop, key, wanted)).status == 201


async def test_a_forbidden_order_does_not_use_its_key(guarded_shop: Shop) -> None:
    key, person = unique("key"), await new_person(guarded_shop)
    wanted = {**ORDER, "user_id": person.id}
    assert_problem(await place(guarded_shop, key, wanted), 401, "sign_in_first")
    assert_problem(await place(guarded_shop, key, {**wanted, "user_id": 1}, token=person.token), 404, "users.not_found")
    assert (await place(guarded_shop, key, wanted, token=person.token)).status == 201


# ------------------------------------------------------------------------------------------------------- what a key is


async def test_bare_and_quoted_are_the_same_key(open_shop: Shop) -> None:
    key = unique("key")
    first = await place(open_shop, key)
    assert_replayed(first, await place(open_shop, f'"{key}"'))


@pytest.mark.parametrize("key", ["", '""', "two words", '"two words"', '"open', "x" * 256, "é", '"a"b"'])
async def test_what_is_no_key_is_refused(open_shop: Shop, key: str) -> None:
    before = await state_of(open_shop)
    reply = await place(open_shop, key)
    assert_problem(reply, 400, "invalid_request")
    assert reply.wrong_fields == {"header Idempotency-Key"}
    assert await state_of(open_shop) == before


async def test_the_longest_key_is_taken(open_shop: Shop) -> None:
    key = unique("key").ljust(255, "x")
    assert_replayed(await place(open_shop, key), await place(open_shop, key))


KEYLESS = [route for route in ROUTES if not route.idempotency]


@pytest.mark.parametrize("route", KEYLESS, ids=lambda route: f"{route.method} {route.path}")
async def test_a_row_that_takes_no_key_says_so(guarded_shop: Shop, route: Any) -> None:
    person = await new_person(guarded_shop, "staff")
    things = await Things.of(guarded_shop, person)
    before = await state_of(guarded_shop)
    reply = await guarded_shop.request(
        route.method, things.path(route), things.body(route), headers={"Idempotency-Key": "abc"}, token=person.token
    )
    assert_problem(reply, 400, "invalid_request")
    assert reply.wrong_fields == {"header Idempotency-Key"}
    assert await state_of(guarded_shop) == before


# ------------------------------------------------------------------------------------------------ how long it lasts


async def test_a_key_finds_its_order_after_30_days(open_shop: Shop) -> None:
    key = unique("key")
    first, before = await place(open_shop, key), await order_count(open_shop)
    async with open_shop.harness.host.services["orders"].database.transaction() as tx:
        moved = "UPDATE orders SET created_at = created_at - interval '30 days' WHERE idempotency_key = $1"
        assert await tx.execute(moved, key) == 1
    again = await place(open_shop, key)
    assert (again.status, again.json["id"]) == (201, first.json["id"])
    assert again.headers["idempotent-replayed"] == "true"
    assert_problem(await place(open_shop, key, {**ORDER, "quantity": 2}), 422, "idempotency_key_reused")
    assert await order_count(open_shop) == before


@pytest.mark.parametrize("transport", ["local", "loopback"])
async def test_a_key_outlives_the_process(cluster: Cluster, transport: TransportName) -> None:
    key = unique("key")
    shop = await Shop.start(cluster, transport)
    first = await place(shop, key)
    await new_order(shop, 1)
    same = SameDatabases(cluster, shop.harness.dsns)
    shop.harness.dsns.clear()  # it closes, and leaves its databases
    await shop.close()
    shop = await Shop.start(same, transport)  # pyright: ignore[reportArgumentType]  # all that a shop asks of a cluster
    try:
        assert await order_count(shop) == 2
        assert_replayed(first, await place(shop, key))
        assert_problem(await place(shop, key, {**ORDER, "quantity": 2}), 422, "idempotency_key_reused")
        assert await order_count(shop) == 2
    finally:
        await shop.close()
