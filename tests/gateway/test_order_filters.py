"""Orders by time, total and text, as the API asks for them."""

from __future__ import annotations

import pytest

from mercato.testing.responses import Response, assert_problem
from mercato.testing.shop import Shop
from mercato.testing.shop_data import new_person

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def order(shop: Shop, note: str) -> dict[str, object]:
    person = await new_person(shop)
    body = {"user_id": person.id, "product_id": 100, "customer_note": note}
    placed: Response = await shop.post("/orders", body)
    assert placed.status == 201, placed.body
    return placed.json


async def ids(shop: Shop, query: str) -> list[int]:
    found = await shop.get(f"/orders?{query}")
    assert found.status == 200, found.body
    return [shown["id"] for shown in found.json]


async def test_orders_are_found_by_what_is_known_of_them(open_shop: Shop) -> None:
    placed = await order(open_shop, "Ring at the Blue Door")
    own = f"user_id={placed['user_id']}"
    total, at = placed["total"]["amount"], placed["created_at"]  # type: ignore[index]

    for query in (
        "q=blue%20door",
        f"q={placed['id']}",
        f"created_from={at}",
        "created_from=2020-01-01T00:00:00%2B02:00&created_to=2100-01-01T00:00:00Z",
        f"min_total={total}&max_total={total}",
        f"min_total={total}&currency=USD&created_from={at}&status=pending&payment=unpaid",
        "currency=USD",
        "q=%20",
    ):
        assert await ids(open_shop, f"{own}&{query}") == [placed["id"]], query
    for query in ("q=red", f"created_to={at}", "min_total=1000", "max_total=1", f"currency=EUR&max_total={total}"):
        assert await ids(open_shop, f"{own}&{query}") == [], query


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("created_from=yesterday", "?created_from"),
        ("created_from=2026-01-01", "?created_from"),
        ("created_from=2026-01-01T00:00:00", "?created_from"),
        ("created_from=0001-01-01T00:00:00%2B14:00", "?created_from"),
        ("created_to=9999-12-31T23:59:59-14:00", "?created_to"),
        ("min_total=-1", "?min_total"),
        ("max_total=1.234", "?max_total"),
        ("min_total=1&currency=XXX", "?currency"),
        ("q=" + "a" * 201, "?q"),
        ("q=a%00b", "?q"),
    ],
)
async def test_a_filter_that_is_none_is_refused(open_shop: Shop, query: str, field: str) -> None:
    refused = await open_shop.get(f"/orders?{query}")

    assert_problem(refused, 400, "invalid_request")
    assert refused.wrong_fields == {field}
