"""The trace of a paid order and that of a declined one: how they are made, and what a collector must have of them.

`test_traces.py` reads them from a collector of the tests, `tests/deploy/test_jaeger.py` from a real Jaeger.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from mercato.testing.caller import Caller
from mercato.testing.collector import CollectedSpan
from mercato.testing.command import run_command
from mercato.testing.process import Process
from mercato.testing.responses import Response
from mercato.testing.waiting import wait_until

TRACE: Final = "4bf92f3577b34da6a3ce929d0e0e4736"
REFUSED: Final = "0af7651916cd43dd8448eb211c80319c"
CLICK: Final = "00f067aa0ba902b7"
FEED: Final = "events.feed"

EVENTS: Final = ("order.placed", "stock.held", "payment.captured", "stock.committed", "order.confirmed", "order.paid")
REFUSED_EVENTS: Final = ("order.placed", "payment.failed")

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

Spans = Callable[[], Sequence[CollectedSpan]]
"""What has arrived of a trace."""


# ---------------------------------------------------------------------------------------------------- making the traces


def place_paid(caller: Caller) -> Response:
    """An order that is paid, in the trace `TRACE`."""
    placed = _place(caller, TRACE, "sandbox:ok")
    assert (placed.status, placed.json["payment"]) == (201, "paid"), placed.text
    return placed


def place_declined(caller: Caller) -> Response:
    """An order whose payment is declined, in the trace `REFUSED`."""
    refused = _place(caller, REFUSED, "sandbox:insufficient_funds")
    assert (refused.status, refused.json["code"]) == (402, "orders.payment_declined"), refused.text
    assert refused.json["trace_id"] == REFUSED
    return refused


def place_side_by_side(shop: Process, trace_ids: Sequence[str]) -> None:
    """So many paid orders at once, each in its own trace: some of their calls share a batch, if not all of the time."""

    def place(trace_id: str) -> None:
        with shop.caller() as caller:
            assert _place(caller, trace_id, "sandbox:ok").status == 201

    with ThreadPoolExecutor(len(trace_ids)) as buyers:
        for _ in buyers.map(place, trace_ids):
            pass


def _place(caller: Caller, trace_id: str, method: str) -> Response:
    body = {"user_id": 1, "items": [{"product_id": 100, "quantity": 1}], "payment_method": method}
    return caller.post("/orders", body, Prefer="wait=20", traceparent=f"00-{trace_id}-{CLICK}-01")


# ------------------------------------------------------------------------------------------------- waiting for the ends


def wait_for_span(spans: Spans, *words: str) -> None:
    """Returns once a span has all these words in its name."""
    wait_until(lambda: any(all(word in span.name for word in words) for span in spans()))


def wait_for_feed(caller: Caller, trace_id: str, *types: str) -> list[dict[str, Any]]:
    """The events of a trace, once all of these types are there."""
    found: list[dict[str, Any]] = []

    def is_complete() -> bool:
        entries = caller.get("/events?limit=500").json
        found[:] = [entry for entry in entries if trace_id in (entry["traceparent"] or "")]
        return {*types} <= {entry["type"] for entry in found}

    wait_until(is_complete)
    return found


def wait_for_printed(data: Path, order_id: int, spans: Spans) -> None:
    """Returns once `mercato trace` gives the spans that the collector has: the last ones come a moment later."""
    printed: dict[str, tuple[object, ...]] = {}
    collected: dict[str, tuple[object, ...]] = {}

    def are_same() -> bool:
        done = run_command("trace", str(order_id), "--data", data, "--json")
        assert done.returncode == 0, done.stderr
        [trace] = json.loads(done.stdout)["traces"]
        for span in trace["spans"]:
            about = (span["parent_id"], span["service"], span["name"], span["kind"], bool(span["failure"]))
            printed[span["span_id"]] = about
        for span in spans():
            collected[span.span_id] = (span.parent_id, span.service, span.name, span.kind, span.is_failed)
        return printed.keys() == collected.keys()

    wait_until(are_same, explain=lambda: f"not in both: {sorted(printed.keys() ^ collected.keys())}")
    assert printed == collected


# ------------------------------------------------------------------------------------------------- looking at the spans


def assert_is_one_tree(spans: Sequence[CollectedSpan], entries: Sequence[Mapping[str, Any]]) -> None:
    """The trace of a paid order is whole: from the click, with every parent right, to the `entries` of the feed."""
    assert missing(spans) == set()
    assert_have_their_parents(spans)
    roots = [span for span in spans if span.parent_id == CLICK]
    assert [(root.service, root.name) for root in roots] == [("gateway", "POST /orders")]
    assert [named(span) for span in spans if span.is_failed] == []
    assert_batches_are_below_a_call(spans)
    assert {entry["traceparent"].split("-")[2] for entry in entries} <= {span.span_id for span in spans}


def assert_have_their_parents(spans: Sequence[CollectedSpan]) -> None:
    """Each span has arrived once, and is below another one or below the click."""
    known = {span.span_id for span in spans}
    assert len(known) == len(spans), "a span has arrived twice"
    assert [named(span) for span in spans if span.parent_id not in known and span.parent_id != CLICK] == []
    assert all(span.start_ns <= span.end_ns for span in spans)


def assert_batches_are_below_a_call(spans: Sequence[CollectedSpan]) -> None:
    """One call of each batch is its parent, and has no link: a backend may take that for another kind of parent."""
    calls = {span.span_id for span in spans if span.kind == "client"}
    batches = [span for span in spans if span.attributes.get("mercato.batch.size") and span.kind == "server"]
    assert batches
    for batch in batches:
        assert batch.parent_id in calls, named(batch)
        assert (batch.trace_id, batch.parent_id) not in batch.links, named(batch)


def missing(spans: Sequence[CollectedSpan]) -> set[tuple[str, str]]:
    """The pairs of parent and child that a paid order has, and these spans have not."""
    by_id = {span.span_id: span for span in spans}
    found = {(named(by_id[span.parent_id]), named(span)) for span in spans if span.parent_id in by_id}
    return EDGES - found


def named(span: CollectedSpan) -> str:
    return f"{span.service} {span.name}"
