"""Every collection of the table answers in the same way: arrays, limits, cursors, times, names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, get_origin

import pytest

from gateway.harness import Things
from mercato.contracts.roles import STAFF
from mercato.gateway import cursors
from mercato.gateway.route import Page, Route
from mercato.gateway.routes import ROUTES
from mercato.testing.responses import Response, assert_problem
from mercato.testing.shop import Shop
from mercato.testing.shop_data import PASSWORD, new_order, new_person, new_product, settled_order

pytestmark = pytest.mark.asyncio(loop_scope="session")

COLLECTIONS = [route for route in ROUTES if get_origin(route.output) is list]
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?Z\Z")
PAGE = {"limit", "after", "before"}
"""What each collection calls alike."""
AT_LEAST = 200
"""Each takes a limit of so many."""


def named(route: Route) -> str:
    return route.path


async def filled(shop: Shop, route: Route) -> tuple[str, str | None]:
    """The path of a collection with some entries of the caller's, and the token of the caller, who is of staff."""
    caller = await new_person(shop, STAFF)
    things = await Things.of(shop, caller)
    await settled_order(shop, await new_order(shop, caller.id))
    await new_product(shop)
    await shop.token(caller.email, PASSWORD)
    return things.path(route), caller.token


async def ask(shop: Shop, path: str, token: str | None, **query: object) -> Response:
    pairs = "&".join(f"{name}={value}" for name, value in query.items())
    return await shop.get(f"{path}?{pairs}" if pairs else path, token=token)


def following(reply: Response) -> str | None:
    if "link" not in reply.headers:
        return None
    found = re.fullmatch(r'<(/[^>]*)>; rel="next"', reply.headers["link"])
    assert found, reply.headers["link"]
    return found[1]


def cursor_of(path: str, query: str = "") -> str:
    """A cursor of a collection, as a Link has it."""
    scope = {"path": path, "query_string": query.encode()}
    link = cursors.link(scope, {"after": "1"}).decode()
    return link.rpartition("cursor=")[2].partition(">")[0]


def times(value: Any, name: str = "") -> Iterator[str]:
    """Every time in an answer: what is called `at`, or ends so."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from times(part, key)
    elif isinstance(value, list):
        for part in value:
            yield from times(part)
    elif value is not None and (name == "at" or name.endswith("_at")):
        yield value


async def test_there_are_collections() -> None:
    assert {"/orders", "/products", "/users", "/payments", "/events", "/stock"} <= {route.path for route in COLLECTIONS}


@pytest.mark.parametrize("route", COLLECTIONS, ids=named)
async def test_a_collection_is_paged_by_parameters_of_the_same_names(route: Route) -> None:
    assert cursors.is_paged(route)
    assert route.query is not None
    names = set(route.query.__struct_fields__)
    assert "limit" in names
    assert len(names & {"after", "before"}) == 1
    assert not {name for name in names if re.search("page|offset|skip|size|per_", name)}


@pytest.mark.parametrize("route", [r for r in ROUTES if r not in COLLECTIONS], ids=lambda r: f"{r.method} {r.path}")
async def test_what_is_no_collection_has_no_pages(route: Route) -> None:
    assert not cursors.is_paged(route)


@pytest.mark.parametrize("route", COLLECTIONS, ids=named)
async def test_a_collection_is_an_array_with_times_in_utc(guarded_shop: Shop, route: Route) -> None:
    path, token = await filled(guarded_shop, route)
    reply = await ask(guarded_shop, path, token)

    assert reply.status == 200, reply.body
    assert isinstance(reply.json, list)
    assert [time for time in times(reply.json) if not TIME.match(time)] == []


@pytest.mark.parametrize("route", COLLECTIONS, ids=named)
async def test_a_collection_takes_the_same_limits(guarded_shop: Shop, route: Route) -> None:
    path, token = await filled(guarded_shop, route)

    assert len((await ask(guarded_shop, path, token, limit=1)).json) <= 1
    assert (await ask(guarded_shop, path, token, limit=AT_LEAST)).status == 200
    for limit in ("0", "-1", "501", "x", ""):
        refused = await ask(guarded_shop, path, token, limit=limit)
        assert_problem(refused, 400, "invalid_request")
        assert refused.wrong_fields == {"?limit"}


@pytest.mark.parametrize("route", COLLECTIONS, ids=named)
async def test_a_cursor_leads_to_the_next_page(guarded_shop: Shop, route: Route) -> None:
    path, token = await filled(guarded_shop, route)
    whole = (await ask(guarded_shop, path, token, limit=3)).json
    first = await ask(guarded_shop, path, token, limit=1)
    seen, link = list(first.json), following(first)
    while link is not None and len(seen) < len(whole):
        assert re.search(r"[?&]cursor=", link)
        assert not re.search(r"[?&](after|before)=", link)
        page = await guarded_shop.get(link, token=token)
        assert page.status == 200, page.body
        seen, link = seen + page.json, following(page)

    assert seen == whole


@pytest.mark.parametrize("route", COLLECTIONS, ids=named)
async def test_a_cursor_of_another_list_is_refused(guarded_shop: Shop, route: Route) -> None:
    path, token = await filled(guarded_shop, route)
    own = cursor_of(path)
    others = {
        "none": "",
        "no cursor": "x",
        "not of this alphabet": "!",
        "too long": "A" * 4_097,
        "of another collection": cursor_of("/things"),
        "of other filters": cursor_of(path, "user_id=7"),
        "cut off": own[:-3],
        "of another shape": "WzEsMl0",
    }
    for why, cursor in others.items():
        refused = await ask(guarded_shop, path, token, cursor=cursor)
        assert refused.status == 400, why
        assert refused.wrong_fields == {"?cursor"}, why
    for query in (f"cursor={own}&after=1", f"before=1&cursor={own}", f"cursor={own}&cursor={own}"):
        refused = await guarded_shop.get(f"{path}?{query}", token=token)
        assert_problem(refused, 400, "invalid_request")
        assert refused.wrong_fields == {"?cursor"}


async def test_a_cursor_is_refused_with_other_filters_and_may_have_another_limit(guarded_shop: Shop) -> None:
    person = await new_person(guarded_shop)
    for _ in range(4):
        await settled_order(guarded_shop, await new_order(guarded_shop, person.id))
    first = await guarded_shop.get("/orders?status=pending&limit=1", token=person.token)
    cursor = str(following(first)).rpartition("cursor=")[2]

    same = await guarded_shop.get(f"/orders?limit=2&cursor={cursor}&status=pending", token=person.token)
    whole = await guarded_shop.get("/orders", token=person.token)
    assert [order["id"] for order in same.json] == [order["id"] for order in whole.json[1:3]]
    for filters in ("", "&status=confirmed", "&status=pending&payment=unpaid"):
        refused = await guarded_shop.get(f"/orders?cursor={cursor}{filters}", token=person.token)
        assert_problem(refused, 400, "invalid_request")
    of_another = await guarded_shop.get(f"/payments?cursor={cursor}&status=pending", token=person.token)
    assert of_another.wrong_fields >= {"?cursor"}


async def test_a_guest_follows_the_pages_of_an_order(guarded_shop: Shop) -> None:
    placed = await guarded_shop.post("/orders", {"product_id": 100, "email": "guest@example.com"})
    await settled_order(guarded_shop, placed.json["id"])
    await guarded_shop.post(f"/orders/{placed.json['id']}/cancel?access_token={placed.json['access_token']}", {})
    path = f"/orders/{placed.json['id']}/history?limit=1&access_token={placed.json['access_token']}"
    seen: list[Any] = []
    while path:
        page = await guarded_shop.get(path)
        assert page.status == 200, page.body
        seen += page.json
        path = following(page) or ""

    whole = await guarded_shop.get(f"/orders/{placed.json['id']}/history?access_token={placed.json['access_token']}")
    assert seen == whole.json
    assert len(seen) > 1


async def test_a_slice_says_whether_more_follows() -> None:
    whole = Page(list(range(5)))

    assert cursors.sliced(whole, None) is whole
    assert cursors.sliced(whole, cursors.SliceQuery()) is whole
    assert cursors.sliced(whole, cursors.SliceQuery(limit=2)) == Page([0, 1], {"after": "2"})
    assert cursors.sliced(whole, cursors.SliceQuery(limit=2, after=2)) == Page([2, 3], {"after": "4"})
    assert cursors.sliced(whole, cursors.SliceQuery(limit=2, after=3)) == Page([3, 4], None)
    assert cursors.sliced(whole, cursors.SliceQuery(after=9)) == Page([], None)


@pytest.mark.parametrize(
    ("path", "known"),
    [
        ("/orders?status=paid", "pending, confirmed, completed, cancelled"),
        ("/orders?payment=open", "unpaid, authorized, paid, partially_refunded, refunded, failed, voided"),
        ("/orders?fulfilment=sent", "unfulfilled, shipped, delivered, returned"),
        ("/products?sort=cheap", "id, name, -name, price, -price, newest, relevance"),
        ("/products?status=gone", "active, archived"),
        ("/users?role=boss", "customer, staff"),
    ],
)
async def test_an_unknown_value_of_a_filter_is_refused_with_those_that_there_are(
    open_shop: Shop, path: str, known: str
) -> None:
    refused = await open_shop.get(path)

    assert_problem(refused, 400, "invalid_request")
    assert [error["message"] for error in refused.json["errors"]] == [f"must be one of {known}"]
