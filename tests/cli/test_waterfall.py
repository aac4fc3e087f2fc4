"""A trace as lines of a terminal."""

from __future__ import annotations

import msgspec
import pytest

from mercato.cli import waterfall
from mercato.contracts.processes import TraceSpan

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
MS = 1_000_000


def span(
    name: str,
    span_id: str,
    parent_id: str = "",
    *,
    service: str = "orders",
    kind: str = "internal",
    at: float = 0,
    took: float = 10,
    failure: str = "",
) -> TraceSpan:
    """`at` and `took` in milliseconds."""
    start_ns = round(at * MS)
    return TraceSpan(
        trace_id=TRACE, span_id=span_id, parent_id=parent_id, name=name, service=service, kind=kind, start_ns=start_ns,
        end_ns=start_ns + round(took * MS), failure=failure, attributes={},
    )  # fmt: skip


def shown(spans: list[TraceSpan], columns: int = 80) -> list[str]:
    return [line.text for line in waterfall.lines(spans, columns)]


def test_spans_are_a_tree_in_the_order_of_their_starts():
    spans = [
        span("second", "c", "a", at=5),
        span("below", "d", "b", at=2),
        span("first", "b", "a", at=1),
        span("root", "a"),
    ]
    names = [line.split(" ", 1)[1].split("  ")[0] for line in shown(spans)]
    assert names == ["root", "├ first", "│ └ below", "└ second"]


def test_a_call_and_the_batch_that_answers_it_are_one_line():
    spans = [
        span("POST /orders", "a", service="gateway"),
        span("orders.place", "b", "a", service="gateway", kind="client", took=8),
        span("orders.place", "c", "b", service="orders", kind="server", at=1, took=6, failure="orders.no_stock"),
        span("orders transaction", "d", "c", at=2, took=2),
    ]
    lines = [*waterfall.lines(spans, 80)]
    assert [line.text.split()[0] for line in lines] == ["gateway", "orders", "orders"]
    assert "orders.place (orders.no_stock)" in lines[1].text
    assert lines[1].text.endswith("8.00 ms")
    assert [line.is_failed for line in lines] == [False, True, False]
    assert "└ transaction" in lines[2].text


def test_a_call_that_was_sent_twice_shows_both_batches():
    spans = [
        span("orders.get", "a", kind="client"),
        span("orders.get", "b", "a", kind="server"),
        span("orders.get", "c", "a", kind="server", at=5),
    ]
    assert len(shown(spans)) == 3


@pytest.mark.parametrize("columns", [60, 80, 160])
def test_no_line_is_longer_than_the_terminal_and_bars_are_where_spans_were(columns: int):
    spans = [
        span("a name that is far too long for the columns that a terminal has for it, at least for 60", "a", took=100),
        span("half", "b", "a", took=50),
        span("other half", "c", "a", at=50, took=50),
        span("short", "d", "a", at=99, took=0.001),
    ]
    lines = shown(spans, columns)
    assert {len(line) for line in lines} == {columns}
    whole, half, other, short = (line.index(waterfall.BAR) if waterfall.BAR in line else -1 for line in lines)
    assert whole == half < other
    assert short == -1
    assert lines[0].count(waterfall.BAR) == pytest.approx(2 * lines[1].count(waterfall.BAR), abs=2)
    assert waterfall.THIN in lines[3]
    assert waterfall.CUT in lines[0]


def test_what_a_process_has_not_given_leaves_trees_without_a_root():
    spans = [span("orders.place", "b", "lost"), span("transaction of another", "c", "b", at=1)]
    assert len(waterfall.roots(spans)) == 1
    spans.append(span("feed", "e", "lost too", at=20))
    assert [node.span.name for node in waterfall.roots(spans)] == ["orders.place", "feed"]


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [(0, "0 us"), (900, "1 us"), (999_499, "999 us"), (1_234_567, "1.23 ms"), (56_780_000, "56.8 ms"),
     (567_800_000, "568 ms"), (1_500_000_000, "1.50 s"), (75_000_000_000, "75.0 s"), (123_000_000_000, "123 s")],
)  # fmt: skip
def test_a_duration_has_three_digits_and_a_unit(nanoseconds: int, text: str):
    assert waterfall.duration(nanoseconds) == text


def test_the_spans_of_several_processes_are_put_together_by_trace_once_each():
    first, second = span("first", "a", at=5), span("second", "b", "a", at=6)
    assert waterfall.by_trace([second, first, second]) == {TRACE: [first, second]}


def test_a_heading_says_what_when_and_how_long():
    spans = [span("POST /orders", "a", service="gateway"), span("orders.place", "b", "a", at=2, took=18)]
    what = "POST /orders at 1970-01-01 00:00:00 UTC, 20.0 ms, 2 spans of 2 services"
    assert waterfall.heading(TRACE, spans) == f"{TRACE}: {what}"
    spans[0] = msgspec.structs.replace(spans[0], order_id=1001)
    assert waterfall.heading(TRACE, spans) == f"{TRACE} of order 1001: {what}"
