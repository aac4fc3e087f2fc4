"""Stock in the API: every caller reads it, staff count and adjust, and an adjustment is made once for its key."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from mercato import topology
from mercato.contracts.inventory import Inventory, ReserveStock, StockLine
from mercato.testing.responses import Response, assert_problem
from mercato.testing.shop import Shop
from mercato.testing.shop_data import UNKNOWN_ID, new_person, new_product, staff_token, unique

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def counted(shop: Shop, on_hand: int) -> tuple[str, int]:
    """The path of the stock of a new product, and its id."""
    product = await new_product(shop)
    path = f"/products/{product.id}/stock"
    reply = await shop.put(path, {"on_hand": on_hand}, token=await staff_token(shop))
    assert reply.status == 200, reply.body
    return path, product.id


async def adjust(shop: Shop, path: str, body: Any, key: str | None = None) -> Response:
    headers = {"Idempotency-Key": key or unique("key")}
    return await shop.post(f"{path}/adjustments", body, headers=headers, token=await staff_token(shop))


async def hold(shop: Shop, product_id: int, quantity: int) -> None:
    inventory = shop.harness.client(Inventory)
    wanted = ReserveStock(
        order_id=1_000_000_000 + product_id,  # a number that no order has
        lines=(StockLine(product_id=product_id, quantity=quantity),),
        for_payment=True,
        idempotency_key=unique("hold"),
    )
    await topology.as_the_shop(shop.harness.host, lambda: inventory.reserve(wanted))


# -------------------------------------------------------------------------------------------------------------- look


@pytest.mark.parametrize("on_hand", [0, 5])
async def test_customers_and_guests_see_whether_there_is_any(guarded_shop: Shop, on_hand: int) -> None:
    path, product_id = await counted(guarded_shop, on_hand)
    for token in (None, (await new_person(guarded_shop)).token):
        reply = await guarded_shop.get(path, token=token)
        assert reply.status == 200
        untold = dict.fromkeys(("on_hand", "reserved", "available", "updated_at", "version"))
        assert reply.json == {"product_id": product_id, "in_stock": on_hand > 0, **untold}
        assert "etag" not in reply.headers


async def test_a_product_whose_pieces_are_all_reserved_is_not_in_stock(guarded_shop: Shop) -> None:
    path, product_id = await counted(guarded_shop, 2)
    await hold(guarded_shop, product_id, 2)
    assert (await guarded_shop.get(path)).json["in_stock"] is False
    assert (await guarded_shop.get(path, token=await guarded_shop.staff())).json["in_stock"] is False


async def test_a_large_order_does_not_learn_how_large_the_stock_is(guarded_shop: Shop) -> None:
    for on_hand, shown in ((37, 10), (4, 4)):
        _, product_id = await counted(guarded_shop, on_hand)
        person = await new_person(guarded_shop)
        body = {"user_id": person.id, "product_id": product_id, "quantity": 5_000}
        short = [{"product_id": product_id, "requested": 5_000, "available": shown}]
        refused = await guarded_shop.post("/orders", body, token=person.token, headers={"Prefer": "wait=30"})
        assert (refused.code, refused.json["details"]["items"]) == ("orders.out_of_stock", short)
        assert f"({shown} of 5000)" in refused.json["detail"]
        order = await guarded_shop.get(refused.headers["location"], token=person.token)
        assert order.json["reason"]["items"] == short


async def test_staff_see_how_much_there_is(guarded_shop: Shop) -> None:
    path, product_id = await counted(guarded_shop, 5)
    await hold(guarded_shop, product_id, 2)
    reply = await guarded_shop.get(path, token=await guarded_shop.staff())

    assert reply.status == 200
    assert {name: reply.json[name] for name in ("product_id", "on_hand", "reserved", "available", "version")} == {
        "product_id": product_id,
        "on_hand": 5,
        "reserved": 2,
        "available": 3,
        "version": 2,
    }
    assert reply.json["updated_at"].endswith("Z")
    assert reply.headers["etag"] == '"2"'


async def test_a_product_without_a_count_has_no_stock_and_no_tag(open_shop: Shop) -> None:
    product = await new_product(open_shop)
    reply = await open_shop.get(f"/products/{product.id}/stock")

    assert (reply.json["available"], reply.json["version"], reply.json["updated_at"]) == (0, 0, None)
    assert "etag" not in reply.headers


async def test_an_unknown_product_has_no_stock(open_shop: Shop) -> None:
    path = f"/products/{UNKNOWN_ID}/stock"
    for reply in (
        await open_shop.get(path),
        await open_shop.put(path, {"on_hand": 1}),
        await adjust(open_shop, path, {"delta": 1, "reason": "found"}),
    ):
        assert_problem(reply, 404, "products.not_found")


async def test_the_demo_shop_has_stock(open_shop: Shop) -> None:
    assert (await open_shop.get("/products/100/stock")).json["on_hand"] > 900_000


# ------------------------------------------------------------------------------------------------------------- count


async def test_a_count_of_what_was_seen_is_taken_and_of_what_was_not_is_refused(open_shop: Shop) -> None:
    path, _ = await counted(open_shop, 5)
    seen = await open_shop.get(path)
    stale = await open_shop.put(path, {"on_hand": 4}, headers={"If-Match": '"9"'})
    taken = await open_shop.put(path, {"on_hand": 4}, headers={"If-Match": seen.headers["etag"]})

    assert_problem(stale, 412, "stale_version")
    assert (taken.status, taken.json["on_hand"], taken.headers["etag"]) == (200, 4, '"2"')


async def test_reserved_pieces_cannot_be_counted_away(open_shop: Shop) -> None:
    path, product_id = await counted(open_shop, 5)
    await hold(open_shop, product_id, 3)
    reply = await open_shop.put(path, {"on_hand": 2})

    assert_problem(reply, 409, "inventory.below_reserved")
    assert reply.json["details"] == {"product_id": product_id, "wanted": 2, "reserved": 3}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"on_hand": -1}, "on_hand"),
        ({"on_hand": 1.5}, "on_hand"),
        ({"on_hand": 10**9 + 1}, "on_hand"),
        ({}, "on_hand"),
        ({"on_hand": 1, "reason": ""}, "reason"),
        ({"on_hand": 1, "reserved": 1}, "reserved"),
    ],
)
async def test_a_count_that_makes_no_sense_is_refused(open_shop: Shop, body: Any, field: str) -> None:
    reply = await open_shop.put("/products/100/stock", body)

    assert_problem(reply, 400, "invalid_request")
    assert reply.wrong_fields == {field}


# ------------------------------------------------------------------------------------------------------------ adjust


async def test_an_adjustment_is_made_once_for_its_key(open_shop: Shop) -> None:
    path, _ = await counted(open_shop, 5)
    key, body = unique("key"), {"delta": -2, "reason": "broken"}
    first, again = await adjust(open_shop, path, body, key), await adjust(open_shop, path, body, key)

    assert (first.status, first.json["on_hand"], first.headers["etag"]) == (200, 3, '"2"')
    assert "idempotent-replayed" not in first.headers
    assert (again.body, again.headers["idempotent-replayed"]) == (first.body, "true")
    assert (await open_shop.get(path)).json["on_hand"] == 3


async def test_many_at_once_with_one_key_adjust_once(open_shop: Shop) -> None:
    path, _ = await counted(open_shop, 5)
    key, body = unique("key"), {"delta": 3, "reason": "delivery"}
    replies = await asyncio.gather(*(adjust(open_shop, path, body, key) for _ in range(10)))

    assert {reply.status for reply in replies} <= {200, 409}
    assert sum("idempotent-replayed" not in reply.headers for reply in replies if reply.status == 200) == 1
    assert (await open_shop.get(path)).json["on_hand"] == 8


async def test_the_key_of_another_adjustment_is_refused(open_shop: Shop) -> None:
    path, _ = await counted(open_shop, 5)
    other, _ = await counted(open_shop, 5)
    key = unique("key")
    await adjust(open_shop, path, {"delta": 1, "reason": "found"}, key)

    for where, delta in ((path, 2), (other, 1)):
        reply = await adjust(open_shop, where, {"delta": delta, "reason": "found"}, key)
        assert_problem(reply, 422, "idempotency_key_reused")
    assert (await open_shop.get(path)).json["on_hand"] == 6


async def test_an_adjustment_without_a_key_is_refused(open_shop: Shop) -> None:
    path, _ = await counted(open_shop, 5)
    reply = await open_shop.post(f"{path}/adjustments", {"delta": 1, "reason": "found"})

    assert_problem(reply, 400, "idempotency_key_missing")
    assert (await open_shop.get(path)).json["on_hand"] == 5


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"delta": 0, "reason": "nothing"}, "delta"),
        ({"delta": 10**9 + 1, "reason": "x"}, "delta"),
        ({"delta": 10**9, "reason": "with what is there too many"}, "delta"),
        ({"delta": 1}, "reason"),
        ({"reason": "x"}, "delta"),
    ],
)
async def test_an_adjustment_that_makes_no_sense_is_refused(open_shop: Shop, body: Any, field: str) -> None:
    path, _ = await counted(open_shop, 5)
    reply = await adjust(open_shop, path, body)

    assert_problem(reply, 400, "invalid_request")
    assert reply.wrong_fields == {field}


# -------------------------------------------------------------------------------------------------------------- list


async def test_what_runs_out_is_listed_page_by_page(open_shop: Shop) -> None:
    ids = [(await counted(open_shop, n))[1] for n in (1, 0, 2_000_000, 2)]
    start = f"/stock?below=3&limit=2&after={ids[0] - 1}"
    first = await open_shop.get(start)
    link = first.headers["link"]
    second = await open_shop.get(link.partition(">")[0].lstrip("<"))

    assert [level["product_id"] for level in first.json] == ids[:2]
    assert link.endswith('>; rel="next"')
    assert [level["product_id"] for level in second.json] == ids[3:]
    assert "link" not in second.headers


@pytest.mark.parametrize("query", ["below=0", "below=x", "after=0", "limit=201", "page=1"])
async def test_a_list_that_makes_no_sense_is_refused(open_shop: Shop, query: str) -> None:
    reply = await open_shop.get(f"/stock?{query}")

    assert_problem(reply, 400, "invalid_request")
    assert reply.wrong_fields == {f"?{query.partition('=')[0]}"}


# ------------------------------------------------------------------------------------------------------------ access


async def test_customers_read_stock_and_cannot_change_it(guarded_shop: Shop) -> None:
    path, _ = await counted(guarded_shop, 5)
    token = (await new_person(guarded_shop)).token
    key = {"Idempotency-Key": unique("key")}
    for reply in (
        await guarded_shop.put(path, {"on_hand": 0}, token=token),
        await guarded_shop.post(f"{path}/adjustments", {"delta": 1, "reason": "x"}, token=token, headers=key),
        await guarded_shop.get("/stock", token=token),
    ):
        assert_problem(reply, 403, "forbidden")
    for reply in (
        await guarded_shop.put(path, {"on_hand": 0}),
        await guarded_shop.post(f"{path}/adjustments", {"delta": 1, "reason": "x"}, headers=key),
        await guarded_shop.get("/stock"),
    ):
        assert_problem(reply, 401, "sign_in_first")
    assert (await guarded_shop.get(path, token=await guarded_shop.staff())).json["on_hand"] == 5
