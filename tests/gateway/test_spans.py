"""The spans of requests: what they name, what they never contain, and those of a request that fails."""

from __future__ import annotations

import json
import math
import re
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Final

import pytest
import pytest_asyncio
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from gateway.harness import Lines, Things
from mercato import topology
from mercato.chassis.observability.recent_traces import EndedSpan
from mercato.chassis.observability.tracing import PARTIAL, Tracing
from mercato.gateway.route import Route
from mercato.testing.cluster import Cluster
from mercato.testing.injection import fail, injecting
from mercato.testing.responses import Response
from mercato.testing.shop import Shop
from mercato.testing.shop_data import PASSWORD, new_person
from mercato.testing.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="session")

TRACE: Final = "4bf92f3577b34da6a3ce929d0e0e4736"
CLICK: Final = "00f067aa0ba902b7"
ORDER: Final = {"user_id": 1, "items": [{"product_id": 100, "quantity": 1}], "payment_method": "sandbox:ok"}
NOTE: Final = "leave it at the back door"
DECLINED: Final = "sandbox:insufficient_funds"
WRITTEN: Final = (
    PASSWORD,
    NOTE,
    DECLINED,
    "sandbox:ok",
    "Renamed",
    "changed my mind",
    "does not fit",
    "scratched",
    "never issued",
    "never sent",
    "A" * 43,
)
"""Of the bodies: names, notes, reasons, passwords, tokens and means of payment."""
FAILS_ONCE: Final = "orders.place.before_commit"

ATTRIBUTES: Final = {
    "db.namespace": r"[a-z]+",
    "db.system.name": "postgresql",
    "http.request.method": r"[A-Z]+",
    "http.response.status_code": r"\d{3}",
    "http.route": r"/[a-z{}/-]*",
    "mercato.actor.id": r"\d+",
    "mercato.batch.failed": r"\d+",
    "mercato.batch.size": r"\d+",
    "mercato.partial": "True",
    "mercato.request.id": r"[0-9a-f]{16}",
    "rpc.method": r"[a-z_.]+",
    "rpc.system.name": "mercato",
}
"""The attributes of all spans, and what their values are: none is written by a person."""


class Exported:
    def __init__(self) -> None:
        self.spans: list[EndedSpan] = []

    def export(self, span: EndedSpan, /) -> None:
        self.spans.append(span)

    def close(self) -> None:
        """Nothing to close."""

    def of(self, trace_id: str) -> Sequence[EndedSpan]:
        return [span for span in self.spans if span.trace_id == trace_id]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def shop(cluster: Cluster) -> AsyncGenerator[Shop]:
    made = await Shop.start(cluster, "local", log_requests=True)
    yield made
    await made.close()


def tracing_of(shop: Shop) -> Tracing:
    return shop.harness.host.telemetry.tracing


@pytest.fixture
def exported(shop: Shop) -> Exported:
    """Exports every request."""
    exporter = Exported()
    tracing_of(shop).start(1.0, exporter)
    return exporter


@pytest.fixture
def unsampled(shop: Shop) -> Exported:
    """Samples no request, and keeps none; none is slow, however long a busy machine takes for it."""
    return _unsampled(shop, slow_seconds=math.inf)


@pytest.fixture
def unsampled_and_slow(shop: Shop) -> Exported:
    """As `unsampled`, but each request is slow."""
    return _unsampled(shop, slow_seconds=0.0)


def _unsampled(shop: Shop, *, slow_seconds: float) -> Exported:
    exporter = Exported()
    tracing_of(shop).start(0.0, exporter, kept_a_second=0.0, slow_seconds=slow_seconds)
    return exporter


def click(trace_id: str = TRACE, *, sampled: bool = False) -> dict[str, str]:
    return {"traceparent": f"00-{trace_id}-{CLICK}-{sampled:02x}"}


def root_of(spans: Sequence[EndedSpan]) -> EndedSpan:
    [root] = [span for span in spans if span.service == "gateway" and span.kind == "server"]
    return root


async def test_a_request_names_route_status_and_caller(shop: Shop, exported: Exported):
    person = await new_person(shop)
    token = await shop.token(person.email, PASSWORD)
    reply = await shop.get("/orders/987654321", token=token, headers=click())
    assert reply.status == 404
    root = root_of(exported.of(TRACE))
    assert (root.name, root.failure, root.parent_id) == ("GET /orders/{id}", "", int(CLICK, 16))
    assert root.attributes == {
        "http.request.method": "GET",
        "http.route": "/orders/{id}",
        "http.response.status_code": 404,
        "mercato.request.id": reply.headers["x-request-id"],
        "mercato.actor.id": person.id,
    }


async def test_the_failure_of_a_call_is_its_code(shop: Shop, exported: Exported):
    await shop.get("/products/987654321", headers=click("1" * 32))
    failures = {span.name: span.failure for span in exported.of("1" * 32)}
    assert failures == {
        "GET /products/{id}": "",
        "products.get": "products.not_found",
        "products read": "",
    }


async def test_metrics_name_a_trace_to_whom_reads_openmetrics(shop: Shop, exported: Exported):
    await shop.get("/products/100", headers=click("a" * 32))
    older = await shop.get("/metrics")
    newer = await shop.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    named = {
        sample.labels.get("http_route") or sample.labels.get("rpc_method")
        for family in text_string_to_metric_families(newer.text)
        for sample in family.samples
        if sample.exemplar is not None and sample.exemplar.labels["trace_id"] == "a" * 32
    }
    assert named == {"/products/{id}", "products.get"}
    assert "a" * 32 not in older.text
    assert older.headers["vary"] == newer.headers["vary"] == "Accept"


async def test_a_trace_is_about_the_order_that_the_request_names_or_places(shop: Shop, exported: Exported):
    placed = await shop.post("/orders", ORDER, headers=click("2" * 32))
    await shop.get(f"/orders/{placed.json['id']}", headers=click("3" * 32))
    assert root_of(exported.of("2" * 32)).about == placed.json["id"]
    assert root_of(exported.of("3" * 32)).about == placed.json["id"]
    assert tracing_of(shop).recent.about(placed.json["id"])[:2] == ["2" * 32, "3" * 32]


async def test_a_client_decides_that_its_request_is_sampled(shop: Shop, unsampled: Exported):
    await shop.get("/products/100", headers=click("4" * 32))
    await shop.get("/products/100", headers=click("5" * 32, sampled=True))
    assert unsampled.of("4" * 32) == []
    assert root_of(unsampled.of("5" * 32)).name == "GET /products/{id}"


async def test_a_request_that_fails_exports_its_spans_although_it_was_not_sampled(shop: Shop, unsampled: Exported):
    with injecting() as inject:
        inject(FAILS_ONCE, fail)
        reply = await shop.post("/orders", ORDER, headers=click("6" * 32))
    assert (reply.status, reply.json["trace_id"]) == (500, "6" * 32)
    spans = unsampled.of("6" * 32)
    assert root_of(spans).failure == "500"
    assert {"orders.place", "orders transaction", "products.quote"} <= {span.name for span in spans}
    assert all(span.attributes[PARTIAL] for span in spans)


async def test_a_slow_request_exports_its_spans_although_it_was_not_sampled(shop: Shop, unsampled_and_slow: Exported):
    assert (await shop.get("/products/100", headers=click("b" * 32))).status == 200
    spans = unsampled_and_slow.of("b" * 32)
    assert (root_of(spans).name, root_of(spans).failure) == ("GET /products/{id}", "")
    assert "products.get" in {span.name for span in spans}
    assert all(span.attributes[PARTIAL] for span in spans)


async def test_a_refusal_exports_nothing(shop: Shop, unsampled: Exported):
    assert (await shop.get("/orders/987654321", headers=click("7" * 32))).status == 404
    assert (await shop.post("/orders", {}, headers=click("7" * 32))).status == 400
    assert unsampled.of("7" * 32) == []


async def test_an_event_names_its_trace_only_if_that_is_recorded(shop: Shop, unsampled: Exported):
    first = await shop.post("/orders", ORDER, headers=click("8" * 32))
    second = await shop.post("/orders", ORDER, headers=click("9" * 32, sampled=True))
    entries: list[dict[str, Any]] = []

    async def are_there() -> bool:
        feed = (await shop.get("/events?limit=500&types=order.placed")).json
        ids = {first.json["id"], second.json["id"]}
        entries[:] = [entry for entry in feed if entry["data"]["order_id"] in ids]
        return len(entries) == 2

    await until(are_there)
    assert entries[0]["traceparent"] is None
    assert re.fullmatch(rf"00-{'9' * 32}-[0-9a-f]{{16}}-01", entries[1]["traceparent"])


async def test_no_span_line_or_event_has_a_word_that_a_person_has_written(shop: Shop, exported: Exported, lines: Lines):
    person = await new_person(shop)
    things = await Things.of(shop, person, needs_refund=True)
    lines.begin("debug")
    noted = await shop.post("/orders", ORDER | {"user_id": person.id, "customer_note": NOTE})
    declined = await shop.post("/orders", ORDER | {"payment_method": DECLINED}, headers={"Prefer": "wait=20"})
    assert (noted.status, declined.status) == (201, 402)
    answers = [await sent(shop, route, things) for route in topology.ROUTES]
    assert len({answer.status for answer in answers}) > 3, "some are refused"
    assert len({span.name for span in exported.spans}) > len(topology.ROUTES)
    for span in exported.spans:
        for name, value in span.attributes.items():
            assert re.fullmatch(ATTRIBUTES[name], str(value)), f"{span.name} has {name}={value!r}"
        assert re.fullmatch(r"[\w .{}/:-]+", span.name), span.name
        assert re.fullmatch(r"[\w.]*", span.failure), span.failure
    events = ""

    async def are_all_there() -> bool:
        nonlocal events
        reply = await shop.get("/events?limit=500")
        events = reply.text
        kinds = {entry["type"] for entry in reply.json}
        return {"order.paid", "payment.failed", "refund.succeeded", "product.price_changed"} <= kinds

    await until(are_all_there)
    assert {"request", "payment.failed"} <= {line["event"] for line in lines.all()}
    for shown in (repr(exported.spans), lines.text, events):
        assert [word for word in (*WRITTEN, person.email, "@example") if word in shown] == []


async def sent(shop: Shop, route: Route, things: Things) -> Response:
    body = things.body(route)
    headers = {"Idempotency-Key": f"spans-{route.method}-{route.path}"} if route.idempotency else {}
    raw = None if body is None else json.dumps(body).encode()
    headers |= {} if body is None else {"Content-Type": "application/json"}
    return await shop.request(route.method, things.path(route), raw=raw, headers=headers)
