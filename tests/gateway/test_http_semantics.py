"""HTTP as its RFCs say: methods, validators, links, ids of requests, health, metrics."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from jsonschema import Draft202012Validator

from gateway.harness import Things, requests
from mercato import topology
from mercato.chassis.http import bind
from mercato.gateway import openapi
from mercato.gateway.route import Route
from mercato.gateway.routes import ROUTES
from mercato.testing.cluster import Cluster
from mercato.testing.responses import Response, assert_problem
from mercato.testing.shop import Shop
from mercato.testing.shop_data import PASSWORD, Person, new_order, new_person, new_product, unique

pytestmark = pytest.mark.asyncio(loop_scope="session")

METRICS_TOKEN = "a-token-of-the-collector-of-metrics-0123456789"
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"


# ----------------------------------------------------------------------------------------------------------- methods

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
ALLOWED: dict[str, set[str]] = {}
for row in ROUTES:
    ALLOWED.setdefault(row.path, {"OPTIONS"}).update({row.method, "HEAD"} if row.method == "GET" else {row.method})


@pytest.mark.parametrize("path", ALLOWED)
async def test_a_path_names_the_methods_that_it_takes(open_shop: Shop, path: str) -> None:
    for method in METHODS:
        if method in ALLOWED[path]:
            continue
        reply = await open_shop.request(method, path.replace("{id}", "1"))
        assert (reply.status, reply.headers["content-type"]) == (405, "application/problem+json")
        assert set(reply.headers["allow"].split(", ")) == ALLOWED[path]
        assert method == "HEAD" or reply.code == "method_not_allowed"


@pytest.mark.parametrize("path", ALLOWED)
async def test_options_says_which_methods_a_path_takes_and_does_nothing(open_shop: Shop, path: str) -> None:
    reply = await open_shop.request("OPTIONS", path.replace("{id}", "1"))
    assert (reply.status, reply.body) == (204, b"")
    assert set(reply.headers["allow"].split(", ")) == ALLOWED[path]


@pytest.mark.parametrize(
    "path", ["/health/live", "/health/ready", "/health/self", "/metrics", "/.well-known/jwks.json", "/", "/docs"]
)
async def test_a_page_names_the_methods_that_it_takes(open_shop: Shop, path: str) -> None:
    reply = await open_shop.post(path, {})
    assert_problem(reply, 405, "method_not_allowed")
    options = await open_shop.request("OPTIONS", path)
    assert (options.status, options.body) == (204, b"")
    for answered in (reply, options):
        assert set(answered.headers["allow"].split(", ")) == {"GET", "HEAD", "OPTIONS"}
    assert (await open_shop.request("HEAD", path)).status == (await open_shop.get(path)).status


@pytest.mark.parametrize("target", ["*", "http://{host}"])
async def test_options_of_the_server_itself_says_which_methods_there_are(open_shop: Shop, target: str) -> None:
    """Not of one path: with `*`, or an address without a path (RFC 9110 9.3.7, RFC 9112 3.2.4)."""
    host = open_shop.url.removeprefix("http://")
    reader, writer = await asyncio.open_connection(*host.split(":"))
    for line in (f"OPTIONS {target.format(host=host)}", "GET /health/live"):
        writer.write(f"{line} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    after = await reader.readline()
    writer.close()

    assert head.startswith("http/1.1 204 ")
    assert "\r\nallow: delete, get, head, options, patch, post, put\r\n" in head
    assert "\r\nx-request-id: " in head
    assert after.startswith(b"HTTP/1.1 200 ")


async def test_options_of_the_server_itself_is_refused_under_another_name(open_shop: Shop) -> None:
    host, port = open_shop.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"OPTIONS * HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n")
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()

    assert head.startswith(b"HTTP/1.1 403 ")
    assert b"host_not_allowed" in body


READS = [route for route in ROUTES if route.method == "GET" and not (route.stream and route.stream.is_only)]
"""The answer to HEAD for a stream is tested with streams: it has the head of an answer that does not end."""


@pytest.mark.parametrize("route", READS, ids=lambda route: route.path)
async def test_head_is_get_without_the_body(guarded_shop: Shop, route: Route) -> None:
    person = await new_person(guarded_shop, "staff")
    things = await Things.of(guarded_shop, person, needs_refund=route.path.startswith("/refunds/"))
    path = things.path(route)
    plain = {"Accept-Encoding": "identity"}  # the client decompresses, and the length is that of what is sent
    got = await guarded_shop.get(path, token=person.token, headers=plain)
    head = await guarded_shop.request("HEAD", path, token=person.token, headers=plain)
    assert (head.status, head.body) == (200, b"")
    changing = {"date", "x-request-id"}
    assert {n: v for n, v in head.headers.items() if n not in changing} == {
        n: v for n, v in got.headers.items() if n not in changing
    }
    assert int(head.headers["content-length"]) == len(got.body)


async def test_head_of_what_is_not_there_is_404_without_a_body(open_shop: Shop) -> None:
    reply = await open_shop.request("HEAD", "/orders/999999")
    assert (reply.status, reply.body) == (404, b"")


async def test_connections_are_kept_and_answers_do_not_mix(open_shop: Shop) -> None:
    host, port = open_shop.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    requests = ["HEAD /products/100", "GET /products/100", "GET /nothing", "POST /orders", "GET /products/2"]
    for line in requests:
        writer.write(f"{line} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: 0\r\n\r\n".encode())
    heads = []
    for line in requests:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        found = re.search(r"content-length: (\d+)", head)
        assert found
        if not line.startswith("HEAD"):
            await reader.readexactly(int(found[1]))
        heads.append(int(head.split()[1]))
    writer.close()
    assert heads == [200, 200, 404, 415, 200]


# -------------------------------------------------------------------------------------------------------- validators


async def changeable(shop: Shop) -> list[tuple[str, str, dict[str, Any]]]:
    """Rows that take If-Match, each on a thing of its own."""
    product, archived = await new_product(shop), await new_product(shop)
    person, moved, cancelled = await new_person(shop), await new_order(shop, 1), await new_order(shop, 1)
    return [
        ("PATCH", f"/products/{product.id}", {"name": "Changed"}),
        ("POST", f"/products/{archived.id}/archive", {}),
        ("PATCH", f"/users/{person.id}", {"name": "Changed"}),
        ("PUT", f"/users/{person.id}/role", {"role": "staff"}),
        ("PATCH", f"/orders/{moved}", {"status": "confirmed"}),
        ("POST", f"/orders/{cancelled}/cancel", {}),
    ]


async def test_a_change_of_what_was_seen_is_made_and_of_what_was_not_is_refused(open_shop: Shop) -> None:
    for method, path, body in await changeable(open_shop):
        thing = re.sub(r"/(archive|role|cancel)$", "", path)
        seen = await open_shop.get(thing)
        assert seen.headers["etag"] == f'"{seen.json["version"]}"'
        stale = f'"{seen.json["version"] + 1}"'
        refused = await open_shop.request(method, path, body, headers={"If-Match": stale})
        assert_problem(refused, 412, "stale_version")
        assert refused.json["details"] == {"expected": seen.json["version"] + 1, "actual": seen.json["version"]}
        assert (await open_shop.get(thing)).body == seen.body
        changed = await open_shop.request(method, path, body, headers={"If-Match": seen.headers["etag"]})
        assert changed.status == 200, changed.body
        assert changed.headers["etag"] == f'"{changed.json["version"]}"' != seen.headers["etag"]
        assert (await open_shop.get(thing)).headers["etag"] == changed.headers["etag"]


async def test_of_two_who_have_seen_the_same_one_changes_it(open_shop: Shop) -> None:
    product = await new_product(open_shop)
    path, headers = f"/products/{product.id}", {"If-Match": '"1"'}
    replies = await asyncio.gather(*(open_shop.patch(path, {"name": f"Name {i}"}, headers=headers) for i in range(10)))
    assert sorted(reply.status for reply in replies) == [200] + [412] * 9
    [winner] = [reply for reply in replies if reply.status == 200]
    assert (await open_shop.get(path)).json == winner.json


@pytest.mark.parametrize("tag", ["*", 'W/"1"'])
async def test_any_version_and_a_weak_tag_are_taken(open_shop: Shop, tag: str) -> None:
    product = await new_product(open_shop)
    reply = await open_shop.patch(f"/products/{product.id}", {"name": "Changed"}, headers={"If-Match": tag})
    assert reply.status == 200


async def test_what_is_made_says_where_it_is(open_shop: Shop) -> None:
    product = {"sku": unique("SKU"), "name": "x", "price": {"amount": 1}, "category": "things"}
    account = {"email": f"{unique('new')}@example.com", "name": "x", "password": PASSWORD}
    for path, body in (("/products", product), ("/register", account), ("/orders", {"user_id": 1, "product_id": 1})):
        made = await open_shop.post(path, body)
        assert made.status == 201
        found = await open_shop.get(made.headers["location"])
        assert (found.status, found.json) == (200, made.json)


# ------------------------------------------------------------------------------------------------------------- pages


async def walk(shop: Shop, path: str, **options: Any) -> list[int]:
    """The ids of all pages, along the links."""
    seen: list[int] = []
    following: str | None = path
    while following:
        reply = await shop.get(following, **options)
        assert reply.status == 200, reply.body
        seen += [thing["id"] for thing in reply.json]
        following = next_link(reply)
        if following:
            assert reply.json, "only a page with something on it is followed by another"
    return seen


def next_link(reply: Response) -> str | None:
    if "link" not in reply.headers:
        return None
    found = re.fullmatch(r'<(/[^>]*)>; rel="next"', reply.headers["link"])
    assert found, reply.headers["link"]
    return found[1]


@pytest_asyncio.fixture(loop_scope="session")
async def customer(guarded_shop: Shop) -> AsyncGenerator[Person]:
    yield await new_person(guarded_shop)


@pytest.mark.parametrize("count", [0, 1, 4, 5, 6])
async def test_the_links_lead_through_all_orders_exactly_once(guarded_shop: Shop, customer: Person, count: int) -> None:
    placed = [await new_order(guarded_shop, customer.id) for _ in range(count)]
    assert await walk(guarded_shop, "/orders?limit=2&status=pending", token=customer.token) == placed[::-1]


async def test_what_is_placed_on_the_way_shifts_nothing(guarded_shop: Shop, customer: Person) -> None:
    placed = [await new_order(guarded_shop, customer.id) for _ in range(4)]
    first = await guarded_shop.get("/orders?limit=2", token=customer.token)
    await new_order(guarded_shop, customer.id)
    following = next_link(first)
    assert following
    assert await walk(guarded_shop, following, token=customer.token) == placed[1::-1]


@pytest.mark.parametrize("sort", ["id", "name", "-name", "price", "-price", "newest"])
async def test_the_links_lead_through_the_catalogue_in_every_order(open_shop: Shop, sort: str) -> None:
    category = unique("shelf")
    wanted = set()
    for i in range(7):
        body = {"sku": unique("SKU"), "name": f"N{i % 3}", "price": {"amount": i % 3}, "category": category}
        wanted.add((await open_shop.post("/products", body)).json["id"])
    walked = await walk(open_shop, f"/products?category={category}&sort={sort}&limit=2")
    assert len(walked) == 7
    assert set(walked) == wanted


async def test_the_links_keep_the_words_that_were_searched_for(open_shop: Shop) -> None:
    word = unique("wörd").replace("-", "")
    for i in range(3):
        body = {"sku": unique("SKU"), "name": f"{word} & {i}", "price": {"amount": 1}, "category": "things"}
        assert (await open_shop.post("/products", body)).status == 201
    first = await open_shop.get(f"/products?limit=2&q={word}")
    assert len(first.json) == 2
    following = next_link(first)
    assert following
    rest = await walk(open_shop, following)
    assert len(rest) == 1


async def test_the_links_lead_through_all_users(guarded_shop: Shop) -> None:
    made = [(await new_person(guarded_shop)).id for _ in range(3)]
    walked = await walk(guarded_shop, "/users?limit=2&role=customer", token=await guarded_shop.staff())
    assert walked == sorted(set(walked))
    assert set(made) <= set(walked)


# --------------------------------------------------------------------------------------------------------------- ids

ANSWERS = [
    ("GET", "/products/100", 200),
    ("GET", "/orders/999999", 404),
    ("GET", "/nothing", 404),
    ("DELETE", "/orders", 405),
    ("POST", "/orders", 415),
    ("GET", "/health/live", 200),
    ("GET", "/.well-known/jwks.json", 200),
    ("GET", "/", 307),
]


@pytest.mark.parametrize(("method", "path", "status"), ANSWERS)
async def test_every_answer_has_the_requests_id(open_shop: Shop, method: str, path: str, status: int) -> None:
    given = await open_shop.request(method, path, headers={"X-Request-Id": "from-the-client/42"})
    assert (given.status, given.headers["x-request-id"]) == (status, "from-the-client/42")
    ours = [(await open_shop.request(method, path)).headers["x-request-id"] for _ in range(2)]
    assert ours[0] != ours[1]
    assert all(re.fullmatch("[0-9a-f]{16}", one) for one in ours)


@pytest.mark.parametrize("odd", ["", "two words", "x" * 129, "é"])
async def test_a_request_id_that_no_log_should_hold_is_replaced(open_shop: Shop, odd: str) -> None:
    reply = await open_shop.get("/products/100", headers={"X-Request-Id": odd})
    assert re.fullmatch("[0-9a-f]{16}", reply.headers["x-request-id"])


@pytest.mark.parametrize(("method", "path", "status"), [answer for answer in ANSWERS if answer[2] >= 400])
async def test_a_problem_has_the_trace_id_of_the_caller(open_shop: Shop, method: str, path: str, status: int) -> None:
    headers = {"traceparent": f"00-{TRACE_ID}-00f067aa0ba902b7-01"}
    reply = await open_shop.request(method, path, headers=headers)
    assert (reply.status, reply.json["trace_id"]) == (status, TRACE_ID)


@pytest.mark.parametrize(
    "odd",
    [
        "",
        "00",
        f"00-{'0' * 32}-00f067aa0ba902b7-01",
        f"ff-{TRACE_ID}-00f067aa0ba902b7-01",
        f"00-{TRACE_ID.upper()}-00f067aa0ba902b7-01",
        f"00-{TRACE_ID}",
        f"00-{TRACE_ID}z-00f067aa0ba902b7-01",
    ],
)
async def test_a_trace_that_is_none_is_replaced(open_shop: Shop, odd: str) -> None:
    reply = await open_shop.get("/orders/999999", headers={"traceparent": odd})
    assert re.fullmatch("[0-9a-f]{32}", reply.json["trace_id"])
    assert reply.json["trace_id"] not in (TRACE_ID, "0" * 32)


# ------------------------------------------------------------------------------------------------- health and metrics


async def test_the_shop_says_that_it_lives_and_is_ready(guarded_shop: Shop) -> None:
    live = await guarded_shop.get("/health/live")
    assert (live.status, live.json) == (200, {"status": "live"})
    ready = await guarded_shop.get("/health/ready")
    assert (ready.status, ready.json["status"]) == (200, "ready")
    itself = await guarded_shop.get("/health/self")
    assert (itself.status, itself.json["status"]) == (200, "ready")


async def test_a_shop_without_one_of_its_databases_is_alive_and_not_ready(cluster: Cluster) -> None:
    shop = await Shop.start(cluster)
    name = shop.harness.dsns["products"].partition("?")[0].rpartition("/")[2]
    try:
        await cluster.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')
        await cluster.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
        ready = await shop.get("/health/ready")
        assert (ready.status, ready.json["status"]) == (503, "not_ready")
        assert ready.json["services"]["products"] == "down"
        assert ready.json["services"]["users"] == "up"
        assert int(ready.headers["retry-after"]) >= 1
        assert (await shop.get("/health/self")).json["reasons"] == ready.json["reasons"]
        assert (await shop.get("/health/live")).status == 200
        assert_problem(await shop.get("/products"), 503, "unavailable")
        assert int((await shop.get("/products/100")).headers["retry-after"]) >= 1
    finally:
        await cluster.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true')
        await shop.close()


async def test_metrics_show_requests_batches_queues_and_pools(open_shop: Shop) -> None:
    def counted(text: str, sample: str) -> float:
        found = re.search(rf"^{re.escape(sample)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    async def metrics() -> str:
        reply = await open_shop.get("/metrics")
        assert (reply.status, reply.headers["content-type"].partition(";")[0]) == (200, "text/plain")
        return reply.body.decode()

    samples = {
        requests("POST", "/orders", 201): 3,
        requests("GET", "/orders/{id}", 404): 1,
        requests("GET", "", 404): 2,
        requests("DELETE", "", 405): 1,
        requests("_OTHER", "", 405): 1,
        'mercato_batch_size_count{operation="orders.place"}': 3,
        'mercato_batch_size_sum{operation="orders.place"}': 3,
        'mercato_queue_wait_seconds_count{operation="orders.place"}': 3,
    }
    before = await metrics()
    for _ in range(3):
        assert (await open_shop.post("/orders", {"user_id": 1, "product_id": 100})).status == 201
    for path in ("/orders/999999", "/nothing", "/nothing/else"):
        assert (await open_shop.get(path)).status == 404
    for method in ("DELETE", "PROPFIND"):
        assert (await open_shop.request(method, "/orders")).status == 405
    after = await metrics()
    for sample, more in samples.items():
        assert counted(after, sample) - counted(before, sample) == more, sample
    for service in ("users", "products", "orders"):
        pool = f'db_client_connection_pool_name="{service}"'
        assert counted(after, f"db_client_connection_max{{{pool}}}") >= 1
        assert f'db_client_connection_count{{{pool},db_client_connection_state="used"}}' in after
    assert "/999999" not in after, "a label is a row, never a path"


async def test_metrics_are_for_staff_and_for_a_collector_on_this_machine(guarded_shop: Shop) -> None:
    assert (await guarded_shop.get("/metrics")).status == 200
    app = topology.gateway(guarded_shop.harness.host, open_to=None, metrics_token=METRICS_TOKEN)

    async def from_elsewhere(token: str | None) -> int:
        """The status that a caller on another machine receives."""
        headers = [(b"host", b"shop.example")]
        if token is not None:
            headers.append((b"authorization", f"Bearer {token}".encode()))
        scope = {
            "type": "http",
            "method": "GET",
            "path": "/metrics",
            "raw_path": b"/metrics",
            "query_string": b"",
            "headers": headers,
            "client": ("192.0.2.7", 1234),
            "server": ("192.0.2.1", 80),
            "scheme": "http",
            "http_version": "1.1",
            "root_path": "",
            "asgi": {"version": "3.0"},
        }
        statuses: list[int] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        await app(scope, receive, send)
        assert len(statuses) == 1
        return statuses[0]

    assert await from_elsewhere(None) == 401
    assert await from_elsewhere("abc") == 401
    assert await from_elsewhere(await guarded_shop.alice()) == 403
    assert await from_elsewhere(await guarded_shop.staff()) == 200
    assert await from_elsewhere(METRICS_TOKEN) == 200
    assert await from_elsewhere(METRICS_TOKEN[:-1]) == 401


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:9090", "127.0.0.1:1", "[::1]:8080"])
async def test_metrics_are_answered_on_this_machine_by_its_own_names(guarded_shop: Shop, host: str) -> None:
    assert (await guarded_shop.get("/metrics", headers={"Host": host})).status == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "192.0.2.1"])
async def test_metrics_are_not_for_a_page_whose_name_leads_to_this_machine(guarded_shop: Shop, host: str) -> None:
    assert_problem(await guarded_shop.get("/metrics", headers={"Host": host}), 401, "sign_in_first")
    staff = await guarded_shop.get("/metrics", headers={"Host": host}, token=await guarded_shop.staff())
    assert staff.status == 200


async def test_the_token_of_metrics_opens_nothing_else(guarded_shop: Shop) -> None:
    assert_problem(await guarded_shop.get("/users", token=METRICS_TOKEN), 401, "unauthenticated")


async def test_readiness_is_as_it_is_described(guarded_shop: Shop) -> None:
    async def problems() -> Mapping[str, str]:
        return {"users": "", "orders": "its database does not answer"}

    audit = {"at": "2026-01-15T09:30:00Z", "violations": {"M1": 2}, "failure": "no connection"}
    host, listener = guarded_shop.harness.host, bind("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/health/ready"
    stop, started = asyncio.Event(), asyncio.Event()
    app = topology.gateway(host, open_to=None, problems=problems, details=lambda: {"registry": "gone", "audit": audit})
    serving = asyncio.create_task(topology.server(app, listener, host.telemetry, started.set).run_until(stop))
    await started.wait()
    try:
        async with aiohttp.ClientSession() as session, session.get(url) as answer:
            not_ready, status = await answer.json(), answer.status
    finally:
        stop.set()
        await serving
    ready = await guarded_shop.get("/health/ready")
    assert (status, ready.status) == (503, 200)
    assert not_ready["reasons"]["orders"] == "its database does not answer"
    for answered, body in ((503, not_ready), (200, ready.json)):
        described = openapi.PAGES["/health/ready"].responses[answered]["content"]["application/json"]
        Draft202012Validator({**described["schema"], "additionalProperties": False}).validate(body)


# ------------------------------------------------------------------------------------------------------------- pages


async def test_the_root_leads_to_the_documentation(open_shop: Shop) -> None:
    reply = await open_shop.get("/")
    assert (reply.status, reply.headers["location"]) == (307, "/docs")


async def test_no_redirect_names_a_host_that_the_client_made_up(guarded_shop: Shop) -> None:
    for path in ("/", "/metrics/", "/health/live/", "//evil.example"):
        reply = await guarded_shop.get(path, headers={"Host": "evil.example"})
        assert "evil.example" not in reply.headers.get("location", "")


async def test_a_problem_is_never_kept_and_says_its_length(open_shop: Shop) -> None:
    reply = await open_shop.get("/orders/999999")
    assert int(reply.headers["content-length"]) == len(reply.body)
    assert "etag" not in reply.headers
    assert "location" not in reply.headers


async def test_an_answer_without_content_has_none(guarded_shop: Shop) -> None:
    reply = await guarded_shop.post("/logout", {"refresh_token": "an unknown token"})
    assert (reply.status, reply.body) == (204, b"")
    assert "content-type" not in reply.headers
    assert "content-length" not in reply.headers
