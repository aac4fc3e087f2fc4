"""The trace of an order, from the click to the feed, as a collector gets it: in one process and in many."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import pytest

from mercato.testing.caller import Caller
from mercato.testing.collector import CollectedSpan, Collector
from mercato.testing.command import run_command
from mercato.testing.process import Process, data_folder
from mercato.testing.responses import Response
from mercato.testing.waiting import wait_until

TRACE: Final = "4bf92f3577b34da6a3ce929d0e0e4736"
REFUSED: Final = "0af7651916cd43dd8448eb211c80319c"
CLICK: Final = "00f067aa0ba902b7"
FEED: Final = "events.feed"

EVENTS: Final = ("order.placed", "stock.held", "payment.captured", "stock.committed", "order.confirmed", "order.paid")

PLACES: Final[Mapping[str, tuple[str, ...]]] = {
    "together": (),
    "workers": ("--workers", "2"),
    "nats": ("--split", "--transport", "nats"),
    "http": ("--split", "--transport", "http"),
}

EDGES: Final = {
    ("gateway POST /orders", "gateway orders.place"),
    ("gateway orders.place", "orders orders.place"),
    ("orders orders.place", "orders payments.check_method"),
    ("orders orders.place", "orders users.get"),
    ("orders users.get", "users users.get"),
    ("users users.get", "users users read"),
    ("orders orders.place", "orders products.quote"),
    ("orders products.quote", "products products.quote"),
    ("orders orders.place", "orders orders transaction"),
    ("orders orders transaction", f"events order.placed to {FEED}"),
    ("orders orders.place", "orders checkout.reserve"),
    ("orders checkout.reserve", "orders inventory.reserve"),
    ("orders inventory.reserve", "inventory inventory.reserve"),
    ("inventory inventory.reserve", "inventory inventory transaction"),
    ("inventory inventory transaction", f"events stock.held to {FEED}"),
    ("orders checkout.reserve", "orders payments.charge"),
    ("orders payments.charge", "payments payments.charge"),
    ("payments payments.charge", "payments payments transaction"),
    ("payments payments.charge", "payments provider charge"),
    ("payments provider charge", "payments sandbox.charge"),
    ("payments sandbox.charge", "sandbox sandbox.charge"),
    ("sandbox sandbox.charge", "sandbox sandbox transaction"),
    ("payments payments transaction", f"events payment.captured to {FEED}"),
    ("orders checkout.reserve", "orders inventory.commit"),
    ("orders inventory.commit", "inventory inventory.commit"),
    ("inventory inventory transaction", f"events stock.committed to {FEED}"),
    ("orders checkout.reserve", "orders orders transaction"),
    ("orders orders transaction", f"events order.confirmed to {FEED}"),
    ("orders orders transaction", f"events order.paid to {FEED}"),
    (f"events order.placed to {FEED}", f"events {FEED} from orders"),
    (f"events {FEED} from orders", "events events transaction"),
}
"""Parent and child, each as service and name. What the gateway waits for the order with is left out."""


@pytest.mark.parametrize(
    "place", ["together", "nats", *(pytest.param(place, marks=pytest.mark.long) for place in ("workers", "http"))]
)
def test_a_paid_order_is_one_trace_from_the_click_to_the_feed(place: str) -> None:
    with Collector() as collector, data_folder() as data:
        # Nothing but what a client asks for is sampled: the click decides for all processes.
        environment = {**collector.environment, "MERCATO_TRACE_SHARE": "0", "MERCATO_LOG_LEVEL": "debug"}
        with Process(data, *PLACES[place], environment=environment) as shop, shop.ready().caller() as caller:
            body = {"user_id": 1, "items": [{"product_id": 100, "quantity": 1}], "payment_method": "sandbox:ok"}
            placed = caller.post("/orders", body, Prefer="wait=20", traceparent=f"00-{TRACE}-{CLICK}-01")
            assert (placed.status, placed.json["payment"]) == (201, "paid"), placed.text
            wait_until(lambda: any(FEED in span.name and "order.paid" in span.name for span in collector.spans(TRACE)))
            entries = wait_for_feed(caller, TRACE, *EVENTS)
            wait_for_printed(data, placed.json["id"], collector)
            refused = caller.post(
                "/orders",
                {**body, "payment_method": "sandbox:insufficient_funds"},
                Prefer="wait=20",
                traceparent=f"00-{REFUSED}-{CLICK}-01",
            )
            wait_until(lambda: any("payment.failed to" in span.name for span in collector.spans(REFUSED)))
            declined = wait_for_feed(caller, REFUSED, "order.placed", "payment.failed")
            lines = run_command("logs", "--data", data, "--trace", REFUSED, "--last", "1000", "--json").stdout
            shop.stop()
    spans = collector.spans(TRACE)
    assert missing(spans) == set()
    roots = [span for span in spans if span.parent_id == CLICK]
    assert [(root.service, root.name) for root in roots] == [("gateway", "POST /orders")]
    known = {span.span_id for span in spans}
    assert [span for span in spans if span.parent_id not in known and span.parent_id != CLICK] == []
    assert {span.trace_id for span in collector.spans()} == {TRACE, REFUSED}, "no other request was sampled"
    assert all(span.start_ns <= span.end_ns for span in spans)
    assert_links_lead_back(spans)
    assert {entry["traceparent"].split("-")[2] for entry in entries} <= known
    assert_one_id_leads_through_all(refused, collector.spans(REFUSED), declined, lines)


def assert_one_id_leads_through_all(
    refused: Response, spans: Sequence[CollectedSpan], entries: Sequence[Mapping[str, Any]], lines: str
) -> None:
    """From the problem that a client got to the spans, the events and the log of its order."""
    assert (refused.status, refused.json["code"]) == (402, "orders.payment_declined"), refused.text
    assert refused.json["trace_id"] == REFUSED
    order_id = refused.json["details"]["order_id"]
    logged = {entry["event"]: entry for entry in map(json.loads, lines.splitlines())}
    assert {logged[event]["order_id"] for event in ("request", "payment.failed")} == {order_id}
    assert {logged[event]["service"] for event in ("request", "payment.failed")} == {"gateway", "payments"}
    known = {span.span_id for span in spans}
    assert {logged[event]["span_id"] for event in ("request", "payment.failed")} <= known
    assert {entry["data"]["order_id"] for entry in entries} == {order_id}


def wait_for_printed(data: Path, order_id: int, collector: Collector) -> None:
    """Returns once `mercato trace` gives the spans that the collector has: the last ones come a moment later."""

    def are_same() -> bool:
        done = run_command("trace", str(order_id), "--data", data, "--json")
        assert done.returncode == 0, done.stderr
        [trace] = json.loads(done.stdout)["traces"]
        printed = {(span["span_id"], span["parent_id"], span["name"]) for span in trace["spans"]}
        return printed == {(span.span_id, span.parent_id, span.name) for span in collector.spans(TRACE)}

    wait_until(are_same)


def missing(spans: Sequence[CollectedSpan]) -> set[tuple[str, str]]:
    by_id = {span.span_id: span for span in spans}
    found = {(named(by_id[span.parent_id]), named(span)) for span in spans if span.parent_id in by_id}
    return EDGES - found


def named(span: CollectedSpan) -> str:
    return f"{span.service} {span.name}"


def assert_links_lead_back(spans: Sequence[CollectedSpan]) -> None:
    """Each batch names the calls that it carries; one of them is its parent."""
    batches = [span for span in spans if span.attributes.get("mercato.batch.size")]
    batches = [span for span in batches if span.kind == "server"]
    assert batches
    for batch in batches:
        assert batch.parent_id in [span_id for _, span_id in batch.links], named(batch)


def wait_for_feed(caller: Caller, trace_id: str, *types: str) -> list[dict[str, Any]]:
    """The events of a trace, once all of these types are there."""
    found: list[dict[str, Any]] = []

    def is_complete() -> bool:
        entries = caller.get("/events?limit=500").json
        found[:] = [entry for entry in entries if trace_id in (entry["traceparent"] or "")]
        return {*types} <= {entry["type"] for entry in found}

    wait_until(is_complete)
    return found
