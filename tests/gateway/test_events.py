"""GET /events: what staff read of the feed over HTTP, page after page, and what is refused."""

from __future__ import annotations

import asyncio
import re

import pytest

from mercato.gateway.routes.events import KNOWN_TYPES
from mercato.testing.responses import Response, assert_problem
from mercato.testing.shop import Shop
from mercato.testing.shop_data import new_order, new_person, staff_token

pytestmark = pytest.mark.asyncio(loop_scope="session")

POLLS = 5_000
POLL_SECONDS = 0.02


async def entries_about(shop: Shop, order_id: int, query: str = "") -> list[dict[str, object]]:
    """The entries about an order, once it is in the feed."""
    for _ in range(POLLS):
        entries = [e for e in await all_entries(shop, query) if e["subject"] == f"order {order_id}"]
        if entries:
            return entries
        await asyncio.sleep(POLL_SECONDS)
    pytest.fail("the order never came into the feed")


async def all_entries(shop: Shop, query: str = "") -> list[dict[str, object]]:
    """Follows the Link of each page to the last."""
    found: list[dict[str, object]] = []
    path = f"/events?limit=50{query}"
    while True:
        reply = await shop.get(path, token=await staff_token(shop))
        assert reply.status == 200, reply.body
        found += reply.json
        link = reply.headers.get("link")
        if link is None:
            return found
        match = re.fullmatch(r'<(/events\?[^>]+)>; rel="next"', link)
        assert match, link
        path = match[1]


async def behind_the_last(shop: Shop, position: int) -> Response:
    """The page behind the last entry, which other orders of the shop may move for a while."""
    for _ in range(POLLS):
        reply = await shop.get(f"/events?after={position}", token=await staff_token(shop))
        if not reply.json:
            return reply
        position = int(reply.json[-1]["position"])
    pytest.fail("the feed has no end")


async def test_a_placed_order_is_in_the_feed(open_shop: Shop):
    person = await new_person(open_shop)
    order_id = await new_order(open_shop, person.id)
    entries = await entries_about(open_shop, order_id, "&types=order.placed")
    assert len(entries) == 1
    assert set(entries[0]) == {"position", "id", "type", "subject", "version", "data", "at", "traceparent"}
    assert str(entries[0]["id"]).startswith("orders:")
    assert (entries[0]["type"], entries[0]["version"]) == ("order.placed", 1)


async def test_pages_have_a_link_while_they_are_full_and_positions_rise(open_shop: Shop):
    person = await new_person(open_shop)
    orders = [await new_order(open_shop, person.id) for _ in range(3)]
    await entries_about(open_shop, orders[-1])
    positions = [int(str(entry["position"])) for entry in await all_entries(open_shop)]
    assert positions == sorted(set(positions))
    first = await open_shop.get("/events?limit=2", token=await staff_token(open_shop))
    assert len(first.json) == 2
    second = await open_shop.get(first.headers["link"][1:].partition(">")[0], token=await staff_token(open_shop))
    assert second.json[0]["position"] > first.json[-1]["position"]
    behind = await behind_the_last(open_shop, positions[-1])
    assert (behind.json, behind.headers.get("link")) == ([], None)
    nowhere = await open_shop.get("/events?after=9007199254740991", token=await staff_token(open_shop))
    assert_problem(nowhere, 410, "events.cursor_ahead")


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("after=-1", "?after"),
        ("after=x", "?after"),
        ("after=9007199254740992", "?after"),
        ("limit=0", "?limit"),
        ("limit=501", "?limit"),
        ("types=", "?types"),
        ("types=order", "?types"),
        ("types=Order.Paid", "?types"),
        ("types=order.paid,", "?types"),
        ("types=order.paid&types=order.placed", "?types"),
        ("types=" + ",".join(["order.paid"] * 21), "?types"),
        ("types=order." + "a" * 60, "?types"),
        ("types=order.paid,order.payed", "?types"),
        ("type=order.paid", "?type"),
    ],
)
async def test_a_query_of_another_shape_is_refused(open_shop: Shop, query: str, field: str):
    reply: Response = await open_shop.get(f"/events?{query}", token=await staff_token(open_shop))
    assert_problem(reply, 400, "invalid_request")
    assert reply.wrong_fields == {field}


async def test_an_unknown_type_is_refused_with_those_that_there_are(open_shop: Shop):
    reply = await open_shop.get("/events?types=order.paid,order.payed", token=await staff_token(open_shop))

    assert_problem(reply, 400, "invalid_request")
    assert "order.payed" in reply.json["errors"][0]["message"]
    assert "order.paid" in reply.json["errors"][0]["message"].partition("only ")[2].split(", ")
    known = ",".join(sorted(KNOWN_TYPES)[:20])
    assert (await open_shop.get(f"/events?types={known}", token=await staff_token(open_shop))).status == 200


async def test_a_cursor_from_before_what_was_deleted_is_gone(open_shop: Shop):
    database = open_shop.harness.host.services["events"].database
    async with database.transaction() as tx:
        await tx.execute("INSERT INTO feed_purged VALUES ('stock.exhausted', 7)")
    try:
        reply = await open_shop.get("/events?after=6&types=stock.exhausted", token=await staff_token(open_shop))
        last = await open_shop.get("/events?after=7&types=stock.exhausted", token=await staff_token(open_shop))
    finally:
        async with database.transaction() as tx:
            await tx.execute("DELETE FROM feed_purged WHERE type = 'stock.exhausted'")

    assert_problem(reply, 410, "events.cursor_too_old")
    assert reply.json["details"] == {"after": 6, "oldest": 7}
    assert last.status == 200


async def test_the_feed_is_for_staff_alone(guarded_shop: Shop):
    assert_problem(await guarded_shop.get("/events"), 401, "sign_in_first")
    person = await new_person(guarded_shop)
    assert_problem(await guarded_shop.get("/events", token=person.token), 403, "forbidden")
    assert (await guarded_shop.get("/events", token=await guarded_shop.staff())).status == 200
