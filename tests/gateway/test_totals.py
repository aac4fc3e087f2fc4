"""`Prefer: count=exact`: a page says how many entries its collection has with these filters."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from typing import Any, Final
from urllib.parse import urlencode

import pytest
import pytest_asyncio

from gateway.test_collections import COLLECTIONS, filled, following, named
from gateway.test_shedding import LIMIT, locked, shop_with
from mercato.chassis.http import Priority
from mercato.chassis.postgres.database import Tx
from mercato.gateway import totals
from mercato.gateway.headers import prefers_count
from mercato.gateway.route import Route
from mercato.testing.cluster import Cluster
from mercato.testing.responses import Response
from mercato.testing.shop import Shop
from mercato.testing.shop_data import Person, new_order, new_person, new_product, settled_order
from mercato.testing.waiting import until_true

pytestmark = pytest.mark.asyncio(loop_scope="session")

COUNT: Final = {"Prefer": "count=exact"}
COUNTED = [route for route in COLLECTIONS if route.path != "/events"]
"""The feed of events has no end to count to."""


async def all_of(shop: Shop, path: str, token: str | None) -> list[Any]:
    """The entries of all pages."""
    reply = await shop.get(path, token=token)
    assert reply.status == 200, reply.body
    found = list(reply.json)
    while (link := following(reply)) is not None:
        reply = await shop.get(link, token=token)
        found += reply.json
    return found


def total(reply: Response) -> int:
    assert reply.status == 200, reply.body
    assert reply.headers["preference-applied"] == "count=exact"
    return int(reply.headers["total-count"])


async def test_every_collection_but_the_feed_is_counted() -> None:
    assert [route.path for route in COLLECTIONS if not totals.are_counted(route)] == ["/events"]


@pytest.mark.parametrize("route", COUNTED, ids=named)
async def test_every_page_says_how_many_entries_all_pages_have(guarded_shop: Shop, route: Route) -> None:
    path, token = await filled(guarded_shop, route)
    entries = await all_of(guarded_shop, f"{path}?limit=200", token)

    first = await guarded_shop.get(f"{path}?limit=1", token=token, headers=COUNT)
    head = await guarded_shop.request("HEAD", f"{path}?limit=1", token=token, headers=COUNT)
    link = following(first)
    later = first if link is None else await guarded_shop.get(link, token=token, headers=COUNT)

    assert [total(first), total(head), total(later)] == [len(entries)] * 3
    assert head.body == b""


@pytest.mark.parametrize("route", COLLECTIONS, ids=named)
@pytest.mark.parametrize("prefer", [None, "count=planned", "count", "respond-async; count=exact", "wait=5"])
async def test_a_page_is_not_counted_unasked(guarded_shop: Shop, route: Route, prefer: str | None) -> None:
    path, token = await filled(guarded_shop, route)
    reply = await guarded_shop.get(path, token=token, headers={"Prefer": prefer} if prefer else {})

    assert reply.status == 200, reply.body
    assert not {"total-count", "preference-applied"} & reply.headers.keys()


@pytest.mark.parametrize(
    "prefer", [b"count=exact", b'Count="exact"', b"respond-async, count=exact", b"count=exact; a=b"]
)
async def test_the_preference_is_read_as_http_has_it(prefer: bytes) -> None:
    assert prefers_count(prefer)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def shopper(guarded_shop: Shop) -> AsyncGenerator[Person]:
    """A customer with two orders beside those of others, and products of a category."""
    person = await new_person(guarded_shop)
    for buyer in (person, person, await new_person(guarded_shop)):
        await settled_order(guarded_shop, await new_order(guarded_shop, buyer.id))
    archived = await new_product(guarded_shop)
    await guarded_shop.post(f"/products/{archived.id}/archive", token=await guarded_shop.staff())
    yield person


FILTERS: Mapping[str, list[dict[str, Any]]] = {
    "/orders": [
        {"status": "pending"},
        {"status": "cancelled", "payment": "unpaid"},
        {"user_id": "SHOPPER"},
        {"user_id": "SHOPPER", "status": "pending"},
        {"product_id": 100},
        {"product_id": 100, "user_id": "SHOPPER"},
        {"product_id": 100, "status": "pending", "fulfilment": "unfulfilled"},
        {"created_from": "2020-01-01T00:00:00Z"},
        {"created_to": "2020-01-01T00:00:00Z"},
        {"created_from": "2020-01-01T00:00:00Z", "user_id": "SHOPPER", "product_id": 100},
        {"min_total": "0.01", "max_total": "1000", "status": "pending"},
        {"q": "nothing that a note has"},
        {"q": "1"},
    ],
    "/products": [
        {"q": "headphones"},
        {"q": "the"},
        {"q": "headphones", "sort": "price", "max_price": "1000"},
        {"category": "audio"},
        {"category": "audio", "sort": "-name"},
        {"sku": "head-100"},
        {"min_price": "50"},
        {"status": "archived"},
        {"status": "archived", "category": "none-such"},
        {"currency": "EUR"},
    ],
    "/users": [{"role": "staff"}, {"role": "customer"}, {"email": "alice@example.com"}, {"email": "no@example.com"}],
    "/payments": [{"user_id": "SHOPPER"}, {"order_id": 1}, {"order_id": 1, "user_id": "SHOPPER"}],
    "/stock": [{"below": 1}, {"below": 1_000}],
    "/security-log": [{"account_id": "SHOPPER"}],
}


@pytest.mark.parametrize(
    ("path", "filters"), [(path, filters) for path, several in FILTERS.items() for filters in several]
)
async def test_what_the_filters_match_is_counted(
    guarded_shop: Shop, shopper: Person, path: str, filters: Mapping[str, Any]
) -> None:
    token = await guarded_shop.staff()
    asked = urlencode({name: shopper.id if value == "SHOPPER" else value for name, value in filters.items()})
    entries = await all_of(guarded_shop, f"{path}?{asked}&limit=200", token)

    counted = await guarded_shop.get(f"{path}?{asked}&limit=1", token=token, headers=COUNT)
    link = following(counted)
    later = counted if link is None else await guarded_shop.get(link, token=token, headers=COUNT)

    assert [total(counted), total(later)] == [len(entries)] * 2


@pytest.mark.parametrize("path", ["/orders", "/payments"])
async def test_customers_learn_the_number_of_their_own_alone(guarded_shop: Shop, shopper: Person, path: str) -> None:
    own = await all_of(guarded_shop, path, shopper.token)

    assert total(await guarded_shop.get(path, token=shopper.token, headers=COUNT)) == len(own)
    of_another = await guarded_shop.get(f"{path}?user_id=1", token=shopper.token, headers=COUNT)
    assert (of_another.json, total(of_another)) == ([], 0)


async def test_who_may_not_list_learns_no_number(guarded_shop: Shop, shopper: Person) -> None:
    for path in ("/users", "/stock", "/security-log", "/products?status=archived"):
        refused = await guarded_shop.get(path, token=shopper.token, headers=COUNT)
        assert refused.status == 403
        assert "total-count" not in refused.headers


async def test_a_page_comes_without_the_number_where_counting_takes_too_long(
    guarded_shop: Shop, shopper: Person
) -> None:
    """Another count has its turn for as long as this one waits."""
    token, ended, counting = await guarded_shop.staff(), asyncio.Event(), asyncio.Event()

    async def slow(_: Tx) -> int:
        counting.set()
        await ended.wait()
        return 0

    another = asyncio.create_task(guarded_shop.harness.host.services["orders"].database.count(slow, seconds=600))
    await counting.wait()
    try:
        reply = await guarded_shop.get("/orders?limit=1", token=token, headers=COUNT)
    finally:
        ended.set()
        await another

    assert reply.status == 200
    assert not {"total-count", "preference-applied"} & reply.headers.keys()
    assert len(reply.json) == 1
    of_shopper = f"/orders?user_id={shopper.id}&limit=1"
    assert total(await guarded_shop.get(of_shopper, token=token, headers=COUNT)) == 2


async def test_a_request_that_counts_waits_like_a_report_where_another_enters(cluster: Cluster) -> None:
    for_ever = {"standing_seconds": 1e9, "deadline_share": 1e9}
    async with shop_with(cluster, **for_ever) as shop:
        reports = int(shop.load.capacity[Priority.REPORT])
        async with locked(shop, "products", of="products"):
            browsing = [asyncio.create_task(shop.get("/products/100")) for _ in range(reports)]
            await until_true(lambda: shop.load.in_work == reports, "they are in work")
            counting = asyncio.create_task(shop.get("/orders", headers=COUNT))
            await until_true(lambda: shop.load.waiting == 1, "it waits")
            assert reports < LIMIT
            assert (await shop.get("/orders")).json == []
            assert not counting.done()
        await asyncio.gather(*browsing)
        assert total(await counting) == 0


async def test_caches_keep_the_catalogue_with_its_number_apart(open_shop: Shop) -> None:
    async with open_shop._session.get(f"{open_shop.url}/products?category=none-such", headers=COUNT) as reply:
        assert "Prefer" in ", ".join(reply.headers.getall("Vary"))
        tag = reply.headers["ETag"]
    known = await open_shop.get("/products?category=none-such", headers={**COUNT, "If-None-Match": tag})
    assert known.status == 304
    assert known.headers["total-count"] == reply.headers["Total-Count"]
