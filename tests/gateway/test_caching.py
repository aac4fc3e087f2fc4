"""Which answers a cache may keep."""

from __future__ import annotations

import asyncio
import gzip
import json

import pytest

from gateway.harness import Things
from mercato.gateway.representations import is_known, takes_gzip
from mercato.gateway.route import Route
from mercato.gateway.routes import ROUTES
from mercato.testing.shop import Shop
from mercato.testing.shop_data import new_person, new_product, unique
from mercato.testing.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="session")

PUBLIC = {"GET /products", "GET /products/{id}"}
PAGES = {
    "/": None,
    "/health/live": "no-store",
    "/health/ready": "no-store",
    "/health/self": "no-store",
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


@pytest.mark.parametrize("path", ["/products", "/products?q=headphones", "/products/100", "/openapi.json", "/docs"])
async def test_what_a_client_has_already_is_not_sent_again(guarded_shop: Shop, path: str) -> None:
    first = await guarded_shop.get(path)
    tag = first.headers["etag"]
    for names in (tag, f'"other", {tag}', tag.removeprefix("W/"), "*"):
        again = await guarded_shop.get(path, headers={"If-None-Match": names})
        assert (again.status, again.body) == (304, b"")
        assert "content-type" not in again.headers
        for name in ("etag", "cache-control", "vary"):
            assert again.headers.get(name) == first.headers.get(name)
    other = await guarded_shop.get(path, headers={"If-None-Match": '"other"'})
    assert (other.status, other.body) == (200, first.body)


async def test_what_has_changed_is_sent_again(open_shop: Shop) -> None:
    product = await new_product(open_shop)
    path, listed = f"/products/{product.id}", f"/products?q={product.sku}"
    for change in ({"name": "Changed"}, {"description": "New"}):
        seen = [(one, (await open_shop.get(one)).headers["etag"]) for one in (path, listed)]
        assert (await open_shop.patch(path, change)).status == 200
        for one, tag in seen:
            assert (await open_shop.get(one, headers={"If-None-Match": tag})).status == 200


async def test_a_product_that_comes_into_stock_is_sent_again_and_its_tag_still_fits(open_shop: Shop) -> None:
    product = await new_product(open_shop)
    path = f"/products/{product.id}"
    tag = (await open_shop.get(path)).headers["etag"]
    assert (await open_shop.put(f"{path}/stock", {"on_hand": 1})).status == 200

    async def is_in_stock() -> bool:
        return (await open_shop.get(path)).json["in_stock"]

    await until(is_in_stock, "the product is in stock")
    again = await open_shop.get(path, headers={"If-None-Match": tag})
    assert again.status == 200
    for known in (tag, again.headers["etag"]):
        version = (await open_shop.get(path)).json["version"]
        changed = await open_shop.patch(path, {"name": f"Changed {known}"}, headers={"If-Match": known})
        assert changed.status == (200 if f'"{version}' in known else 412)


async def test_a_private_answer_is_sent_whatever_the_client_has(guarded_shop: Shop) -> None:
    reply = await guarded_shop.get("/users/me", token=await guarded_shop.alice(), headers={"If-None-Match": "*"})
    assert (reply.status, reply.json["id"]) == (200, 1)


@pytest.mark.parametrize("path", ["/products", "/openapi.json", "/docs"])
async def test_a_large_answer_is_compressed_for_those_who_take_it(open_shop: Shop, path: str) -> None:
    plain = await raw(open_shop, path, "identity")
    packed = await raw(open_shop, path, "br, gzip;q=0.5")
    assert "content-encoding" not in plain[0]
    assert packed[0]["content-encoding"] == "gzip"
    assert gzip.decompress(packed[1]) == plain[1]
    assert len(packed[1]) < len(plain[1]) / 2
    assert plain[0]["vary"] == packed[0]["vary"] == "Accept-Encoding"
    assert plain[0]["etag"] == packed[0]["etag"]
    assert "content-encoding" not in (await raw(open_shop, path, "gzip;q=0"))[0]


async def test_a_small_answer_is_not_compressed(open_shop: Shop) -> None:
    headers, body = await raw(open_shop, "/products?limit=1", "gzip")
    assert "content-encoding" not in headers
    assert len(json.loads(body)) == 1


async def raw(shop: Shop, path: str, accepted: str) -> tuple[dict[str, str], bytes]:
    """Headers and body as they are sent."""
    host = shop.url.removeprefix("http://")
    reader, writer = await asyncio.open_connection(*host.split(":"))
    lines = (f"GET {path} HTTP/1.1", f"Host: {host}", "Connection: close", f"Accept-Encoding: {accepted}", "", "")
    writer.write("\r\n".join(lines).encode())
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    fields = (line.partition(": ") for line in head.decode().split("\r\n")[1:])
    return {name.lower(): value for name, _, value in fields}, body


@pytest.mark.parametrize(
    ("accepted", "takes"),
    [
        (None, False),
        (b"", False),
        (b"gzip", True),
        (b"GZIP;q=0.001", True),
        (b"gzip; q=0", False),
        (b"gzip;q=0.000", False),
        (b"*", True),
        (b"*;q=0", False),
        (b"gzip;q=0, *", False),
        (b"identity", False),
        (b"x-gzip-not", False),
    ],
)
async def test_accept_encoding_is_read_with_its_weights(accepted: bytes | None, takes: bool) -> None:
    assert takes_gzip(accepted) is takes


async def test_tags_are_compared_whole() -> None:
    assert is_known(b'"1"', '"1"')
    assert not is_known(b'"11"', '"1"')
    assert not is_known(None, '"1"')
