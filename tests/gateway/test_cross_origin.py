"""Pages of other origins: those that are named may call the API, and the rest may not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping

import pytest
import pytest_asyncio

from gateway.test_shedding import locked
from mercato.chassis.http import LoadLimits
from mercato.gateway.cross_origin import origins_of
from mercato.testing.cluster import Cluster
from mercato.testing.responses import assert_problem
from mercato.testing.shop import Shop
from mercato.testing.waiting import until_true

pytestmark = pytest.mark.asyncio(loop_scope="session")

PAGE = "https://pages.example"
OTHER_PAGE = "http://localhost:3000"
FOREIGN = [
    "https://evil.example",
    "http://pages.example",
    "https://pages.example:8443",
    "https://pages.example.",
    "null",
]


@pytest_asyncio.fixture(scope="module", loop_scope="session", params=[True, False], ids=["open", "guarded"])
async def shop(cluster: Cluster, request: pytest.FixtureRequest) -> AsyncGenerator[Shop]:
    shop = await Shop.start(cluster, "local", is_open=request.param, cors_origins=(PAGE, OTHER_PAGE))
    yield shop
    await shop.close()


def granted(headers: Mapping[str, str]) -> set[str]:
    return {name for name in headers if name.startswith("access-control-")}


@pytest.mark.parametrize("origin", [PAGE, OTHER_PAGE])
async def test_a_page_of_a_named_origin_reads_every_answer(shop: Shop, origin: str) -> None:
    for path, status in (("/products", 200), ("/orders/999999", 404), ("/nothing", 404), ("/health/live", 200)):
        headers = {"Origin": origin, "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "cors"}
        token = None if shop.is_open else await shop.staff()
        reply = await shop.get(path, headers=headers, token=token)
        assert reply.status == status
        assert reply.headers["access-control-allow-origin"] == origin
        assert granted(reply.headers) == {"access-control-allow-origin", "access-control-expose-headers"}
        exposed = {name.strip() for name in reply.headers["access-control-expose-headers"].split(",")}
        wanted = {"Location", "Retry-After", "Idempotent-Replayed", "Preference-Applied", "ETag", "Link", "Total-Count"}
        assert wanted <= exposed


@pytest.mark.parametrize("path", ["/orders", "/products/1", "/openapi.json"])
async def test_a_preflight_request_gets_the_allowed_methods_and_headers(shop: Shop, path: str) -> None:
    asked = {"Origin": PAGE, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    reply = await shop.request("OPTIONS", path, headers=asked)
    assert (reply.status, reply.body) == (204, b"")
    assert reply.headers["access-control-allow-origin"] == PAGE
    assert {"POST", "PATCH", "DELETE"} <= set(reply.headers["access-control-allow-methods"].split(", "))
    allowed = {name.strip().lower() for name in reply.headers["access-control-allow-headers"].split(",")}
    assert {"authorization", "content-type", "idempotency-key", "if-match", "prefer"} <= allowed
    assert "access-control-allow-credentials" not in reply.headers


@pytest.mark.parametrize("origin", FOREIGN)
async def test_an_answer_to_another_origin_has_no_cors_headers(shop: Shop, origin: str) -> None:
    asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    for reply in (
        await shop.request("OPTIONS", "/orders", headers=asked),
        await shop.get("/products", headers={"Origin": origin}),
    ):
        assert granted(reply.headers) == set()
        if shop.is_open:
            assert_problem(reply, 403, "host_not_allowed")


async def test_caches_keep_the_answers_to_different_origins_apart(shop: Shop) -> None:
    for headers in ({}, {"Origin": PAGE}):
        for path in ("/products", "/openapi.json", "/nothing"):
            reply = await shop.request("GET", path, headers=headers)
            assert "Origin" in reply.headers["vary"]


REFUSED = {
    "malformed": ("GET * HTTP/1.1\r\n", "\r\n", 400),
    "too large": ("POST /orders HTTP/1.1\r\n", "Content-Length: 10000000\r\n\r\n", 413),
    "too many headers": ("GET /orders HTTP/1.1\r\n", f"X-Large: {'a' * 20_000}\r\n\r\n", 431),
}
"""What the server refuses below the API: what comes before the host and the origin, what comes behind, the status."""


async def heads_of(shop: Shop, sent: str) -> str:
    """Sends text as it is; the answers to the end of the connection, in small letters."""
    host, port = shop.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(sent.encode())
    received = (await reader.read()).decode().lower()
    writer.close()
    return received


@pytest.mark.parametrize(("line", "rest", "status"), REFUSED.values(), ids=REFUSED)
async def test_a_page_of_a_named_origin_reads_what_the_server_refuses(
    shop: Shop, line: str, rest: str, status: int
) -> None:
    host = shop.url.removeprefix("http://")
    for origin, is_named in ((f"Origin: {PAGE}\r\n", True), (f"Origin: {FOREIGN[0]}\r\n", False), ("", False)):
        answer = await heads_of(shop, f"{line}Host: {host}\r\n{origin}{rest}")
        assert answer.startswith(f"http/1.1 {status} ")
        assert "\r\nvary: origin\r\n" in answer
        assert (f"\r\naccess-control-allow-origin: {PAGE}\r\n" in answer) is is_named
        assert ("\r\naccess-control-expose-headers: " in answer) is is_named


async def test_of_two_origins_none_is_read(shop: Shop) -> None:
    twice = f"Host: a\r\nOrigin: {PAGE}\r\nOrigin: {PAGE}\r\n\r\n"
    answer = await heads_of(shop, f"GET * HTTP/1.1\r\n{twice}")
    assert answer.startswith("http/1.1 400 ")
    assert "access-control-" not in answer


async def test_a_page_of_a_named_origin_reads_that_the_shop_is_overloaded(cluster: Cluster) -> None:
    """Refused by the server before the application is called."""
    limits = LoadLimits(floor=10, start=10, ceiling=10, queue_share=0.1, standing_seconds=1e9, deadline_share=1e9)
    shop = await Shop.start(cluster, "local", load=limits, cors_origins=(PAGE,))
    try:
        async with locked(shop, "products", of="products"):
            browsing = [asyncio.create_task(shop.get("/products/100")) for _ in range(8)]
            await until_true(lambda: shop.load.waiting == 1, "one waits")
            for origin, is_named in ((PAGE, True), (FOREIGN[0], False)):
                reply = await shop.get("/products/100", headers={"Origin": origin})
                assert_problem(reply, 503, "overloaded")
                assert (reply.headers.get("access-control-allow-origin") == PAGE) is is_named
                assert bool(granted(reply.headers)) is is_named
                assert reply.headers["vary"] == "Origin"
        assert {reply.status for reply in await asyncio.gather(*browsing)} == {200}
    finally:
        await shop.close()


async def test_without_the_setting_no_answer_has_a_word_about_origins(guarded_shop: Shop) -> None:
    reply = await guarded_shop.get("/products", headers={"Origin": PAGE})
    assert granted(reply.headers) == set()
    assert "Origin" not in reply.headers.get("vary", "")
    refused = await heads_of(guarded_shop, f"GET * HTTP/1.1\r\nHost: a\r\nOrigin: {PAGE}\r\n\r\n")
    assert refused.startswith("http/1.1 400 ")
    assert "vary" not in refused
    assert "access-control-" not in refused


async def test_several_origins_are_read() -> None:
    assert origins_of(f"{PAGE}, {OTHER_PAGE} http://[::1]:3000") == (PAGE, OTHER_PAGE, "http://[::1]:3000")
    assert origins_of("") == ()


@pytest.mark.parametrize(
    "text",
    [
        "*",
        "null",
        "shop.example",
        "https://shop.example/",
        "https://SHOP.example",
        "https://shop.example:443",
        "ftp://a",
    ],
)
async def test_what_no_browser_sends_as_an_origin_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"as browsers send it"):
        origins_of(text)
