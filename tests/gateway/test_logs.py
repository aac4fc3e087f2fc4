"""What a shop says of itself: access lines, declines and cancellations in the log, and its metrics."""

from __future__ import annotations

import ast
import re
from collections.abc import AsyncGenerator, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families

import mercato
from gateway.harness import Lines
from mercato.chassis.observability.clock import SystemClock
from mercato.chassis.observability.telemetry import Telemetry
from mercato.contracts.products import Product
from mercato.gateway import access_log
from mercato.gateway.app import Gateway
from mercato.gateway.headers import RequestHeaders
from mercato.testing.cluster import Cluster
from mercato.testing.injection import fail, injecting
from mercato.testing.shop import Shop
from mercato.testing.shop_data import PASSWORD, new_person, new_product

in_session = pytest.mark.asyncio(loop_scope="session")

PACKAGE = Path(mercato.__file__).parent
SEMANTIC_CONVENTIONS = {
    "http_server_request_duration_seconds": "histogram",
    "rpc_server_call_duration_seconds": "histogram",
    "db_client_connection_count": "gauge",
    "db_client_connection_max": "gauge",
}
"""Metrics that OpenTelemetry names."""
NAME = re.compile(r"(mercato|process)(_[a-z0-9]+)+\Z")
NOT_BASE = re.compile(r"_(ms|us|ns|milliseconds?|minutes?|hours?|kb|mb|percent|pct|count|sum|info_total)\Z")
"""Of a name: a unit that is none of the base units of Prometheus, or an ending that it gives itself."""


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def shop(cluster: Cluster) -> AsyncGenerator[Shop]:
    made = await Shop.start(cluster, "local", log_requests=True)
    yield made
    await made.close()


# --------------------------------------------------------------------------------------------------------------- log


@in_session
async def test_an_access_line_has_the_route_and_no_word_of_the_client(shop: Shop, lines: Lines):
    lines.begin("debug")

    await shop.get("/orders/987654321?secret=hunter2")
    await shop.get("/no/such/hunter2")

    first, second = lines.named("request")
    assert (first["level"], first["method"], first["route"]) == ("debug", "GET", "/orders/{id}")
    assert (first["status"], first["actor_id"]) == (400, 0)
    assert first["milliseconds"] > 0
    assert (second["method"], second["route"], second["status"]) == ("GET", "none", 404)
    assert "hunter2" not in lines.text
    assert "987654321" not in lines.text


@in_session
async def test_a_line_names_its_service_although_the_request_is_not_traced(shop: Shop, lines: Lines):
    shop.harness.host.telemetry.tracing.start(0.0, kept_a_second=0.0)
    lines.begin("info")

    with injecting() as inject:
        inject("orders.place.before_commit", fail)
        assert (await shop.post("/orders", {"user_id": 1, "product_id": 100})).status == 500

    assert [line["service"] for line in lines.named("request")] == ["gateway"]
    assert [line["service"] for line in lines.named("operation_failed")] == ["orders"]


@in_session
async def test_an_access_line_names_the_actor(shop: Shop, lines: Lines):
    person = await new_person(shop)
    token = await shop.token(person.email, PASSWORD)
    lines.begin("debug")

    assert (await shop.get("/orders", token=token)).status == 200

    assert [line["actor_id"] for line in lines.named("request")] == [person.id]


@in_session
async def test_debug_logs_more_than_info(shop: Shop, lines: Lines):
    counts: dict[str, int] = {}
    for level in ("debug", "info", "warning"):
        lines.begin(level)
        await shop.get("/products?limit=1")
        counts[level] = len(lines.named("request"))

    assert counts == {"debug": 1, "info": 0, "warning": 0}


@pytest.mark.parametrize(("status", "is_slow"), [(503, False), (200, True)])
@in_session
async def test_failed_and_slow_requests_are_logged_at_info(lines: Lines, status: int, is_slow: bool):
    lines.begin("info")

    access_log.note("GET", "/orders/{id}", status, 0.001, RequestHeaders([]), is_slow=is_slow)

    assert [line["level"] for line in lines.named("request")] == ["info"]


@pytest.mark.parametrize(("seconds", "level"), [(0.999, None), (1.0, "info")])
def test_of_requests_that_are_not_all_logged_those_of_a_second_are(lines: Lines, seconds: float, level: str | None):
    gateway = Gateway(
        [],
        client=lambda operation: cast(Any, operation),
        authenticator=cast(Any, None),
        telemetry=Telemetry(),
        clock=SystemClock(),
        fallback=cast(Any, None),
    )
    lines.begin("debug")

    gateway.note(None, 200, seconds, RequestHeaders([]), "GET")

    assert [line["level"] for line in lines.named("request")] == ([level] if level else [])


@in_session
async def test_a_decline_and_a_cancellation_are_logged_with_ids_and_code_alone(shop: Shop, lines: Lines):
    product, person = await stocked(shop), await new_person(shop)
    lines.begin("info")

    await order(shop, person.id, product.id, 1, "sandbox:insufficient_funds")
    refused = await order(shop, person.id, product.id, 50, "sandbox:ok")

    [decline] = lines.named("payment.failed")
    ids = {"subject_id", "order_id", "trace_id", "span_id", "request_id"}
    assert set(decline) <= {"event", "level", "timestamp", "service", "subject", "outcome", *ids}
    assert decline["outcome"] == "insufficient_funds"
    [cancellation] = lines.named("order.cancelled")
    assert (cancellation["subject_id"], cancellation["outcome"]) == (refused["details"]["order_id"], "out_of_stock")


async def stocked(shop: Shop) -> Product:
    """A new product with five pieces."""
    product = await new_product(shop)
    answer = await shop.request("PUT", f"/products/{product.id}/stock", {"on_hand": 5})
    assert answer.status == 200
    return product


async def order(shop: Shop, user_id: int, product_id: int, quantity: int, method: str) -> Mapping[str, Any]:
    body = {"user_id": user_id, "items": [{"product_id": product_id, "quantity": quantity}], "payment_method": method}
    placed = await shop.request("POST", "/orders", body, headers={"Prefer": "wait=10"})
    assert placed.status in (201, 402, 409), placed.text
    return placed.json


# ----------------------------------------------------------------------------------------------------------- metrics


async def samples(shop: Shop) -> Mapping[tuple[str, str, str], float]:
    """Of `mercato_domain_events_total`: service, type and outcome."""
    text = (await shop.get("/metrics")).text
    found: dict[tuple[str, str, str], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "mercato_domain_events_total":
                found[sample.labels["service"], sample.labels["type"], sample.labels["outcome"]] = sample.value
    return found


@in_session
async def test_orders_declines_and_shortages_are_counted(shop: Shop):
    product, person = await stocked(shop), await new_person(shop)
    before = await samples(shop)

    await order(shop, person.id, product.id, 1, "sandbox:ok")
    await order(shop, person.id, product.id, 1, "sandbox:insufficient_funds")
    await order(shop, person.id, product.id, 50, "sandbox:ok")

    after = await samples(shop)
    more = {key: after[key] - before.get(key, 0) for key in after if after[key] != before.get(key, 0)}
    assert more["orders", "order.placed", ""] == 3
    assert more["orders", "order.paid", ""] == 1
    assert more["payments", "payment.failed", "insufficient_funds"] == 1
    assert more["orders", "order.cancelled", "out_of_stock"] == 1


@in_session
async def test_build_and_process_are_shown_and_nothing_twice(shop: Shop):
    text = (await shop.get("/metrics")).text

    assert f'version="{mercato.__version__}"' in text
    for name in ("cpu_seconds_total", "resident_memory_bytes", "open_fds", "start_time_seconds"):
        assert f"\nprocess_{name} " in text
    assert "_created" not in text


@in_session
async def test_what_is_shown_has_names_by_the_conventions(shop: Shop):
    families = list(text_string_to_metric_families((await shop.get("/metrics")).text))

    assert len(families) > 20
    assert [wrong for f in families if (wrong := misnamed(f.name, f.type, f.documentation))] == []


def test_every_declared_metric_has_a_name_by_the_conventions():
    declared = [metric for module in PACKAGE.rglob("*.py") for metric in declared_metrics(module.read_text())]

    assert len(declared) > 20
    assert [wrong for kind, name in declared if (wrong := misnamed(name, kind, "about"))] == []


def declared_metrics(source: str) -> Iterator[tuple[str, str]]:
    """The kind and name of each call of `counter`, `gauge` or `histogram` with the name of a metric."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not node.args or not isinstance(node.args[0], ast.Constant):
            continue
        kind, name = ast.unparse(node.func).rpartition(".")[2], node.args[0].value
        if kind in ("counter", "gauge", "histogram", "pool") and isinstance(name, str) and name.startswith("mercato_"):
            yield kind, name


def misnamed(name: str, kind: str, about: str) -> str:
    """What is wrong with a metric, by prometheus.io/docs/practices/naming; empty: nothing."""
    if SEMANTIC_CONVENTIONS.get(name) == kind:
        return ""
    name = name.removesuffix("_total") if kind == "counter" else name
    if not NAME.match(name) or not about.strip():
        return f"{name}: lower case words behind mercato_, with a text"
    if NOT_BASE.search(name) or name.endswith("_total"):
        return f"{name}: base units (seconds, bytes), and _total for counters alone"
    return ""


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("mercato_wait_ms", "histogram"),
        ("mercato_Wait_seconds", "histogram"),
        ("orders_placed", "counter"),
        ("mercato_orders_total", "gauge"),
        ("mercato_pool_used_percent", "gauge"),
        ("http_server_request_duration_ms", "histogram"),
        ("db_client_connection_count", "counter"),
    ],
)
def test_a_name_against_the_conventions_is_found(name: str, kind: str):
    assert misnamed(name, kind, "about")


def test_events_of_one_commit_are_counted_by_type_and_outcome():
    from mercato.chassis.contract import Message
    from mercato.chassis.postgres.database import EmittedEvents
    from mercato.chassis.postgres.outbox_row import Outgoing

    class Ended(Message):
        outcome_field: ClassVar = "code"
        code: str

    class Moved(Message):
        pieces: int

    telemetry = Telemetry()
    data: list[tuple[str, Message]] = [
        ("ended", Ended(code="")),
        ("ended", Ended(code="full")),
        ("ended", Ended(code="full")),
    ]
    data += [("moved", Moved(pieces=1)), ("moved", Moved(pieces=2))]
    EmittedEvents(telemetry, "things").count([Outgoing(f"thing.{type_}", "thing", 1, 1, each) for type_, each in data])

    series = [line for line in telemetry.exposition()[0].decode().splitlines() if line.startswith("mercato_domain")]
    assert sorted(series) == [
        'mercato_domain_events_total{outcome="",service="things",type="thing.ended"} 1.0',
        'mercato_domain_events_total{outcome="",service="things",type="thing.moved"} 2.0',
        'mercato_domain_events_total{outcome="full",service="things",type="thing.ended"} 2.0',
    ]


def test_codes_beyond_the_bound_are_counted_as_one():
    from mercato.chassis.postgres.database import OUTCOMES_COUNTED, EmittedEvents
    from mercato.chassis.postgres.outbox_row import Outgoing
    from mercato.contracts.payments import PaymentChanged

    telemetry = Telemetry()
    emitted = EmittedEvents(telemetry, "payments")
    for number in range(2 * OUTCOMES_COUNTED):
        failed = PaymentChanged(
            payment_id=1, order_id=1, status="failed", code=f"code_{number}", currency="USD", amount_minor=1,
            captured_minor=0, refunded_minor=0, version=1,
        )  # fmt: skip
        emitted.count([Outgoing("payment.failed", "payment", 1, 1, failed)])

    series = [line for line in telemetry.exposition()[0].decode().splitlines() if line.startswith("mercato_domain")]
    assert len(series) == OUTCOMES_COUNTED + 1
    assert 'mercato_domain_events_total{outcome="other",service="payments",type="payment.failed"} 100.0' in series
