"""The trace of an order, from the click to the feed, as a collector gets it: in one process and in many."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from mercato.chassis.observability.tracing import PARTIAL
from mercato.testing.collector import CollectedSpan, Collector
from mercato.testing.command import run_command
from mercato.testing.process import Process, used_folder
from mercato.testing.responses import Response
from system.tracing import paid_order
from system.tracing.paid_order import EVENTS, FEED, PLACES, REFUSED, REFUSED_EVENTS, TRACE


@pytest.mark.parametrize(
    "place", ["together", "nats", *(pytest.param(place, marks=pytest.mark.long) for place in ("workers", "http"))]
)
def test_a_paid_order_is_one_trace_from_the_click_to_the_feed(place: str) -> None:
    with Collector() as collector, used_folder() as data:
        # Nothing but what a client asks for is sampled: the click decides for all processes.
        environment = {**collector.environment, "MERCATO_TRACE_SHARE": "0", "MERCATO_LOG_LEVEL": "debug"}
        with Process(data, *PLACES[place], environment=environment) as shop, shop.ready().caller() as caller:
            placed = paid_order.place_paid(caller)
            paid_order.wait_for_span(lambda: collector.spans(TRACE), FEED, "order.paid")
            entries = paid_order.wait_for_feed(caller, TRACE, *EVENTS)
            paid_order.wait_for_printed(data, placed.json["id"], lambda: collector.spans(TRACE))
            refused = paid_order.place_declined(caller)
            paid_order.wait_for_span(lambda: collector.spans(REFUSED), "payment.failed to")
            declined = paid_order.wait_for_feed(caller, REFUSED, *REFUSED_EVENTS)
            lines = run_command("logs", "--data", data, "--trace", REFUSED, "--last", "1000", "--json").stdout
            shop.stop()
    paid_order.assert_is_one_tree(collector.spans(TRACE), entries)
    # On a busy machine others are slow, and export some spans although they were not sampled.
    sampled = {span.trace_id for span in collector.spans() if PARTIAL not in span.attributes}
    assert sampled == {TRACE, REFUSED}, "no other request was sampled"
    assert_one_id_leads_through_all(refused, collector.spans(REFUSED), declined, lines)


def assert_one_id_leads_through_all(
    refused: Response, spans: Sequence[CollectedSpan], entries: Sequence[Mapping[str, Any]], lines: str
) -> None:
    """From the problem that a client got to the spans, the events and the log of its order."""
    order_id = refused.json["details"]["order_id"]
    logged = {entry["event"]: entry for entry in map(json.loads, lines.splitlines())}
    assert {logged[event]["order_id"] for event in ("request", "payment.failed")} == {order_id}
    assert {logged[event]["service"] for event in ("request", "payment.failed")} == {"gateway", "payments"}
    known = {span.span_id for span in spans}
    assert {logged[event]["span_id"] for event in ("request", "payment.failed")} <= known
    assert {entry["data"]["order_id"] for entry in entries} == {order_id}
