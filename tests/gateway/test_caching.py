"""Which answers a cache may keep."""

from __future__ import annotations

import asyncio

import pytest

from gateway.harness import Things
from mercato.gateway.route import Route
from mercato.gateway.routes import ROUTES
from mercato.testing.shop import Shop
from mercato.testing.shop_data import new_person, unique

pytestmark = pytest.mark.asyncio(loop_scope="session")

PUBLIC = {"GET /products", "GET /products/{id}"}
PAGES = {
    "/": None,
    "/health/live": "no-store",
    "/health/ready": "no-store",
    "/metrics": "no-store",
    "/.well-known/jwks.json": "public, max-age=300",
    "/openapi.json": "no-cache",
    "/docs": "no-cache",
    "/docs/problems": "no-cache",
    "/nothing": "no-store",
}


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.path}")
async def test_only_the_catalogue_is_kept_by_caches(guarded_shop: Shop, route: Route) -> None:
    staff = await new_person(guarded_shop, "staff")
    things = await Things.of(guarded_shop, staff)
    key = {"Idempotency-Key": unique("key")} if route.idempotency else {}
    path, body = things.path(route), things.body(route)
    done = await guarded_shop.request(route.method, path, body, token=staff.token, headers=key)
    refused = await guarded_shop.request(route.method, f"{path}?no_such_parameter=1", body, token="abc")
    assert refused.status in (400, 401)
    name = f"{route.method} {route.path}"
    assert done.headers["cache-control"] == ("no-cache" if name in PUBLIC and done.status < 400 else "no-store")
    assert refused.headers["cache-control"] == "no-store"
    for reply in (done, refused):
        assert reply.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("path", PAGES)
async def test_a_page_says_whether_it_may_be_kept(guarded_shop: Shop, path: str) -> None:
    reply = await guarded_shop.get(path)
    assert reply.headers.get("cache-control") == PAGES[path]
    assert reply.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "sent", ["NONSENSE\r\n\r\n", "GET / HTTP/2.0\r\n\r\n", f"GET /{'x' * 20_000} HTTP/1.1\r\n\r\n"]
)
async def test_a_refusal_below_the_api_is_neither_kept_nor_guessed_at(guarded_shop: Shop, sent: str) -> None:
    reader, writer = await asyncio.open_connection(*guarded_shop.url.removeprefix("http://").split(":"))
    writer.write(sent.encode())
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
    writer.close()
    assert "cache-control: no-store" in head
    assert "x-content-type-options: nosniff" in head
