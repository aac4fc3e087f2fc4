"""Headers that may come once, lists in several lines, and pages of other sites that a browser shows."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from mercato.testing.responses import assert_problem
from mercato.testing.shop import Shop
from mercato.testing.snapshots import state_of

pytestmark = pytest.mark.asyncio(loop_scope="session")

ORDER = b'{"user_id": 1, "product_id": 100}'
NAVIGATION = {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}


async def send(shop: Shop, line: str, *headers: str, body: bytes = b"") -> tuple[int, dict[str, str], bytes]:
    """Sends header lines as they are; status, headers and body of the answer."""
    host = shop.url.removeprefix("http://")
    head = [f"{line} HTTP/1.1", f"Host: {host}", "Connection: close", f"Content-Length: {len(body)}", *headers, "", ""]
    reader, writer = await asyncio.open_connection(*host.split(":"))
    writer.write("\r\n".join(head).encode() + body)
    head_read, _, content = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    status, *lines = head_read.decode().split("\r\n")
    found = {name.lower(): value for name, _, value in (given.partition(": ") for given in lines)}
    return int(status.split()[1]), found, content


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("Authorization", ("Bearer a", "Bearer b")),
        ("Content-Type", ("application/json", "application/json")),
        ("Idempotency-Key", ("first", "second")),
        ("If-Match", ('"1"', '"2"')),
        ("Origin", ("http://localhost", "http://localhost")),
    ],
)
@pytest.mark.parametrize("line", ["POST /orders", "GET /health/live"])
async def test_a_header_that_may_come_once_is_refused_twice(
    open_shop: Shop, line: str, name: str, values: tuple[str, str]
) -> None:
    before = await state_of(open_shop)
    kind = [] if name == "Content-Type" else ["Content-Type: application/json"]
    twice = [f"{name}: {value}" for value in values]
    status, _, body = await send(open_shop, line, *kind, *twice, body=ORDER if line.startswith("POST") else b"")
    problem = msgspec.json.decode(body)
    assert (status, problem["code"]) == (400, "invalid_request")
    assert [error["field"] for error in problem["errors"]] == [f"header {name}"]
    assert await state_of(open_shop) == before


async def test_preferences_may_come_in_several_lines(open_shop: Shop) -> None:
    headers = ("Content-Type: application/json", "Prefer: wait=0", "Prefer: respond-async")
    status, answered, _ = await send(open_shop, "POST /orders", *headers, body=ORDER)
    assert (status, answered["preference-applied"]) == (201, "wait=0")


async def test_of_two_request_ids_and_traces_neither_counts(open_shop: Shop) -> None:
    ids = [digit * 32 for digit in "ab"]
    traces = [f"traceparent: 00-{id_}-00f067aa0ba902b7-01" for id_ in ids]
    status, answered, body = await send(open_shop, "GET /orders/999999", "X-Request-Id: a", "X-Request-Id: b", *traces)
    assert status == 404
    assert answered["x-request-id"] not in ("a", "b")
    assert msgspec.json.decode(body)["trace_id"] not in ids


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
@pytest.mark.parametrize(("method", "path"), [("POST", "/orders"), ("GET", "/users"), ("GET", "/docs")])
async def test_a_page_of_another_site_asks_an_open_shop_for_nothing(
    open_shop: Shop, method: str, path: str, site: str
) -> None:
    before = await state_of(open_shop)
    body = {"user_id": 1, "product_id": 100} if method == "POST" else None
    own = {"Origin": open_shop.url, **NAVIGATION} if method == "POST" else {}
    reply = await open_shop.request(method, path, body, headers={"Sec-Fetch-Site": site, **own})
    assert_problem(reply, 403, "host_not_allowed")
    framed = await open_shop.get("/docs", headers={"Sec-Fetch-Site": site, **NAVIGATION, "Sec-Fetch-Dest": "iframe"})
    assert_problem(framed, 403, "host_not_allowed")
    assert await state_of(open_shop) == before


async def test_a_link_and_a_page_of_the_shop_may_lead_to_an_open_shop(open_shop: Shop) -> None:
    for site in ("same-origin", "none"):
        assert (await open_shop.get("/users", headers={"Sec-Fetch-Site": site})).status == 200
    assert (await open_shop.get("/docs", headers={"Sec-Fetch-Site": "cross-site", **NAVIGATION})).status == 200


async def test_a_shop_with_tokens_lets_pages_of_other_sites_ask(guarded_shop: Shop) -> None:
    assert (await guarded_shop.get("/products", headers={"Sec-Fetch-Site": "cross-site"})).status == 200
