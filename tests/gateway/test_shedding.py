"""What clients meet where there are more requests than can be answered: the classes give way in their order."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from collections.abc import AsyncGenerator, Mapping
from typing import Any, Final, cast

import msgspec
import pytest

from gateway.harness import requests
from mercato import topology
from mercato.chassis.http import LoadLimits
from mercato.chassis.observability.clock import SystemClock
from mercato.chassis.observability.telemetry import Telemetry
from mercato.gateway.app import Gateway
from mercato.gateway.early import EarlyRefusals
from mercato.gateway.routes import PRIORITIES, ROUTES
from mercato.testing.cluster import Cluster
from mercato.testing.responses import assert_problem
from mercato.testing.shop import Shop
from mercato.testing.shop_data import new_order, settled_order
from mercato.testing.waiting import until_true

LIMIT: Final = 10
SHOPPERS: Final = 7
"""May browse at once: seven tenths of the limit."""
QUEUE: Final = 2 * LIMIT


@contextlib.asynccontextmanager
async def shop_with(cluster: Cluster, **settings: Any) -> AsyncGenerator[Shop]:
    limits = msgspec.structs.replace(LoadLimits(floor=LIMIT, start=LIMIT, ceiling=LIMIT), **settings)
    shop = await Shop.start(cluster, "local", load=limits)
    try:
        yield shop
    finally:
        await shop.close()


@contextlib.asynccontextmanager
async def locked(shop: Shop, table: str, *, of: str) -> AsyncGenerator[None]:
    """The reads of a table wait until the block has ended."""
    connection = await shop.harness.connection(of)
    async with connection.transaction():
        await connection.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
        yield


async def metrics(shop: Shop) -> Mapping[str, float]:
    """The samples of the shop, by name and labels."""
    lines = (await shop.get("/metrics")).body.decode().splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


async def test_every_route_has_one_class() -> None:
    classed = [name for names in PRIORITIES.values() for name in names]
    declared = [f"{route.method} {route.path}" for route in ROUTES]
    assert set(declared) - set(classed) == set(), "add them to PRIORITIES in mercato/gateway/routes/__init__.py"
    assert sorted(classed) == sorted(declared), "PRIORITIES names a route twice, or one that there is not"
    for priority, names in PRIORITIES.items():
        for route in ROUTES:
            assert (f"{route.method} {route.path}" in names) == (route.priority is priority)


async def test_payments_and_health_pass_while_browsing_is_refused(cluster: Cluster) -> None:
    async with shop_with(cluster) as shop:
        order = await settled_order(shop, await new_order(shop, 1))
        async with locked(shop, "products", of="products"):
            browsing = [asyncio.create_task(shop.get(f"/products/{100 + n % 3}")) for n in range(SHOPPERS)]
            await until_true(lambda: shop.load.in_work == SHOPPERS, "they are in work")
            refused = await asyncio.gather(*(shop.get("/products/100") for _ in range(QUEUE + LIMIT)))
            for reply in refused:
                assert_problem(reply, 503, "overloaded")
                assert reply.json["type"] == "/docs/problems#overloaded"
                assert reply.json["details"] == {"operation": "GET /products/{id}"}
                assert int(reply.headers["retry-after"]) in (1, 2, 3)
            payment = {"order_id": order.id, "payment_method": "sandbox:ok"}
            paid = await shop.post("/payments", payment)
            assert paid.status == 201, paid.body
            assert (await shop.get("/health/live")).status == 200
            assert (await shop.get("/health/ready")).status == 200
            seen = await metrics(shop)
            assert not any(task.done() for task in browsing)  # so no refusal has waited for them
        accepted = await asyncio.gather(*browsing)
        assert {reply.status for reply in accepted} == {200}
        again = [await shop.get("/products/100") for _ in range(SHOPPERS)]
        assert {reply.status for reply in again} == {200}
        assert shop.load.in_work == 0
    by_reason = {name: count for name, count in seen.items() if name.startswith("mercato_http_shed_total") and count}
    assert sum(by_reason.values()) == QUEUE + LIMIT
    assert all('class="browse"' in name for name in by_reason)
    assert seen["mercato_http_limit"] == LIMIT
    assert seen["mercato_http_waiting"] == 0


async def test_request_that_could_not_even_wait_is_refused_before_it_is_read(cluster: Cluster) -> None:
    for_ever = {"standing_seconds": 1e9, "deadline_share": 1e9}
    async with shop_with(cluster, queue_share=1 / LIMIT, **for_ever) as shop:
        async with locked(shop, "products", of="products"):
            browsing = [asyncio.create_task(shop.get("/products/100")) for _ in range(SHOPPERS)]
            await until_true(lambda: shop.load.in_work == SHOPPERS, "they are in work")
            waiting = asyncio.create_task(shop.get("/products/100"))
            await until_true(lambda: shop.load.waiting == 1, "one waits")
            assert_problem(await shop.get("/products/100?none=1", token="no token"), 503, "overloaded")
            assert (await shop.post("/orders", {"no": "order"})).status == 400  # of a class that may enter
        assert {reply.status for reply in await asyncio.gather(*browsing)} == {200}
        assert shop.load.waiting == 0
        assert (await waiting).status == 200


async def test_server_and_application_refuse_in_the_same_words(cluster: Cluster) -> None:
    """Of two requests on one connection the server refuses the first by itself; the second, behind it, is refused later
    by the application."""
    ids = f"traceparent: 00-{'a' * 32}-{'b' * 16}-01\r\nX-Request-Id: mine"
    request = f"GET /products/100 HTTP/1.1\r\nHost: localhost\r\n{ids}\r\n\r\n".encode()
    for_ever = {"standing_seconds": 1e9, "deadline_share": 1e9}
    async with shop_with(cluster, queue_share=1 / LIMIT, **for_ever) as shop:
        async with locked(shop, "products", of="products"):
            browsing = [asyncio.create_task(shop.get("/products/100")) for _ in range(SHOPPERS + 1)]
            await until_true(lambda: shop.load.waiting == 1, "one waits")
            reader, writer = await asyncio.open_connection("127.0.0.1", int(shop.url.rpartition(":")[2]))
            writer.write(request + request)
            heads, bodies = [], []
            for _ in range(2):
                heads.append(await reader.readuntil(b"\r\n\r\n"))
                length = int(heads[-1].partition(b"content-length: ")[2].split(b"\r\n")[0])
                bodies.append(await reader.readexactly(length))
            writer.close()
            seen = await metrics(shop)
        await asyncio.gather(*browsing)
    without = [re.sub(rb"(date|retry-after): [^\r]*", rb"\1", head) for head in heads]
    assert without[0] == without[1]
    assert b"x-request-id: mine" in without[0]
    assert bodies[0] == bodies[1]
    assert msgspec.json.decode(bodies[0])["trace_id"] == "a" * 32
    assert seen[requests("GET", "/products/{id}", 503)] == 2
    assert seen['mercato_http_shed_total{class="browse",reason="queue_full"}'] == 2


def test_server_of_a_shop_refuses_early() -> None:
    gateway = Gateway(
        ROUTES,
        client=lambda operation: cast(Any, operation),
        authenticator=cast(Any, None),
        telemetry=Telemetry(),
        clock=SystemClock(),
        fallback=cast(Any, None),
    )
    with socket.socket() as listener:
        server = topology.server(gateway, listener, Telemetry(), lambda: None)
    assert isinstance(server._table.early, EarlyRefusals)
    assert server._table.early.load is gateway.load


@pytest.mark.parametrize(("seconds", "limit"), [(0.0, 9), (1e9, 18)])
async def test_limit_follows_what_is_measured(cluster: Cluster, seconds: float, limit: int) -> None:
    """Requests at once: all of them slow, or none."""
    measured = {"window_requests": SHOPPERS, "window_seconds": 0.0, "slow_seconds": (None, None, seconds, None)}
    async with shop_with(cluster, floor=1, ceiling=100, **measured) as shop:
        assert (await shop.post("/login", {"email": "alice@example.com", "password": "wrong"})).status == 401
        async with locked(shop, "products", of="products"):
            browsing = [asyncio.create_task(shop.get("/products/100")) for _ in range(SHOPPERS)]
            await until_true(lambda: shop.load.in_work == SHOPPERS, "they are in work")
            assert (shop.load.limit, shop.load.measured) == (LIMIT, 0)  # a sign-in says nothing, nor does a demo shop
        await asyncio.gather(*browsing)
        assert shop.load.limit == limit
