"""Which traces are recorded and exported, and what becomes of the spans of requests that fail."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import pytest

from mercato.chassis.contract import ANONYMOUS_ACTOR, Context
from mercato.chassis.contract.context import KEPT, SAMPLED, Span
from mercato.chassis.observability.recent_traces import EndedSpan
from mercato.chassis.observability.tracing import (
    ASKED_A_SECOND,
    BURST_SECONDS,
    KEPT_A_SECOND,
    PARTIAL,
    PARTIAL_A_SECOND,
    SLOW_SECONDS,
    Budget,
    Tracing,
)

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
NOW = 1_000.0
"""A moment, for tests that count what is done within one: a busy machine takes longer."""


class Exported:
    """An exporter that keeps what it gets."""

    def __init__(self) -> None:
        self.spans: list[EndedSpan] = []
        self.is_closed = False

    def export(self, span: EndedSpan, /) -> None:
        self.spans.append(span)

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def exported() -> Exported:
    return Exported()


def started(share: float, exporter: Exported, *, kept_a_second: float = KEPT_A_SECOND) -> Tracing:
    """Nothing is slow, however long a busy machine takes for it."""
    tracing = Tracing()
    tracing.start(share, exporter, kept_a_second=kept_a_second, slow_seconds=math.inf)
    return tracing


def keeping_none(exporter: Exported) -> Tracing:
    """Samples and keeps no request."""
    return started(0.0, exporter, kept_a_second=0.0)


def request(tracing: Tracing, trace_id: str = TRACE, *, asked: bool = False, at: float | None = None) -> Span:
    """A request that arrives now, or `at`."""
    arrived = time.perf_counter() if at is None else at
    made = tracing.request("POST /orders", "gateway", trace_id, 0, asked=asked, started=arrived)
    assert made is not None
    return made


def test_a_sampled_request_is_exported_and_kept(exported: Exported) -> None:
    tracing = started(1.0, exported)
    span = request(tracing)
    span.child("orders.place").end()
    span.end()
    assert [(each.name, each.parent_id) for each in exported.spans] == [("orders.place", span.id), ("POST /orders", 0)]
    assert tracing.recent.trace(TRACE) == exported.spans
    assert all(each.flags == SAMPLED | KEPT for each in exported.spans)


def test_the_first_requests_are_kept_and_not_exported(exported: Exported) -> None:
    tracing = started(0.0, exported)
    request(tracing).end()
    assert len(tracing.recent.trace(TRACE)) == 1
    assert exported.spans == []


def test_without_an_exporter_only_a_request_that_is_recorded_has_a_span() -> None:
    tracing = Tracing()
    tracing.start(0.0)
    kept = 0
    while span := tracing.request("POST /orders", "gateway", TRACE, 0, asked=False, started=NOW):
        assert span.places
        kept += 1
    assert kept == KEPT_A_SECOND * BURST_SECONDS


def test_only_so_many_a_second_are_kept(exported: Exported) -> None:
    tracing = started(0.0, exported)
    burst = int(KEPT_A_SECOND * BURST_SECONDS)
    assert [bool(request(tracing, at=NOW).places) for _ in range(burst + 2)] == [True] * burst + [False] * 2


def test_a_client_that_records_its_trace_has_it_recorded_here_within_a_bound(exported: Exported) -> None:
    tracing = started(0.0, exported)
    asked = [request(tracing, asked=True, at=NOW).places for _ in range(int(ASKED_A_SECOND * BURST_SECONDS) + 100)]
    sampled = sum(any(place.flags & SAMPLED for place in places) for places in asked)
    assert sampled == ASKED_A_SECOND * BURST_SECONDS


def test_a_budget_fills_again_up_to_a_burst() -> None:
    budget = Budget(2.0)
    assert sum(budget.take(10.0) for _ in range(100)) == 2 * BURST_SECONDS
    assert [budget.take(11.0) for _ in range(3)] == [True, True, False]
    assert [budget.take(11.4), budget.take(11.5), budget.take(11.6)] == [False, True, False]
    assert sum(budget.take(1_000_000.0) for _ in range(100)) == 2 * BURST_SECONDS


def test_a_budget_of_nothing_is_never_taken_from() -> None:
    budget = Budget(0.0)
    assert not any(budget.take(now) for now in (0.0, 1.0, 1_000_000.0))


# -------------------------------------------------------------------------------------------------------------- batches


def test_a_batch_is_in_the_traces_of_all_recorded_requests_that_it_carries(exported: Exported) -> None:
    tracing = started(1.0, exported)
    first, second = request(tracing, "1" * 32), request(tracing, "2" * 32)
    batch = tracing.batch("orders.place", "orders", [first, second])
    batch.end()
    found = [(each.trace_id, each.span_id, each.parent_id) for each in exported.spans]
    assert found == [("1" * 32, batch.id, first.id), ("2" * 32, batch.id, second.id)]


def test_a_batch_that_carries_two_calls_of_one_trace_is_in_it_once(exported: Exported) -> None:
    tracing = started(1.0, exported)
    span = request(tracing)
    tracing.batch("orders.get", "orders", [span.child("orders.get"), span.child("orders.get")]).end()
    assert [each.name for each in exported.spans] == ["orders.get"]


def test_a_request_that_is_not_recorded_remembers_its_batch(exported: Exported) -> None:
    tracing = keeping_none(exported)
    span = request(tracing)
    batch = tracing.batch("orders.place", "orders", [span])
    assert span.children == [batch]
    assert not batch.places


# -------------------------------------------------------------------------------------------- requests that have failed


def failed_request(tracing: Tracing) -> Span:
    span = request(tracing)
    batch = tracing.batch("orders.place", "orders", [span])
    batch.child("orders transaction").end()
    batch.child("a saga that goes on")
    batch.end("internal")
    span.end("500")
    return span


def test_a_request_that_fails_exports_what_this_process_has_done_for_it(exported: Exported) -> None:
    tracing = keeping_none(exported)
    span = failed_request(tracing)
    assert exported.spans == []
    tracing.export_partial(span, TRACE)
    assert [each.name for each in exported.spans] == ["POST /orders", "orders.place", "orders transaction"]
    assert [each.trace_id for each in exported.spans] == [TRACE] * 3
    assert parents(exported.spans) == ["", "POST /orders", "orders.place"]
    assert all(each.attributes[PARTIAL] for each in exported.spans)


def parents(spans: Sequence[EndedSpan]) -> list[str]:
    names = {each.span_id: each.name for each in spans}
    return [names.get(each.parent_id, "") for each in spans]


def test_a_request_that_was_only_kept_exports_its_spans_when_it_fails(exported: Exported) -> None:
    tracing = started(0.0, exported)
    span = failed_request(tracing)
    tracing.export_partial(span, TRACE)
    assert [each.name for each in exported.spans] == ["orders transaction", "orders.place", "POST /orders"]
    assert all(each.attributes[PARTIAL] for each in exported.spans)


def test_a_sampled_request_that_fails_is_exported_once(exported: Exported) -> None:
    tracing = started(1.0, exported)
    span = failed_request(tracing)
    before = [*exported.spans]
    tracing.export_partial(span, TRACE)
    assert exported.spans == before


def test_only_so_many_failures_a_second_are_exported(exported: Exported) -> None:
    tracing = keeping_none(exported)
    for _ in range(int(PARTIAL_A_SECOND * BURST_SECONDS) + 100):
        span = request(tracing, at=NOW)
        span.end("500")
        tracing.export_partial(span, TRACE)
    assert len(exported.spans) == PARTIAL_A_SECOND * BURST_SECONDS


@pytest.mark.parametrize(("failure", "is_exported"), [("internal", True), ("orders.not_found", False), ("", False)])
def test_a_batch_for_another_process_exports_its_spans_if_it_fails(
    exported: Exported, failure: str, is_exported: bool
) -> None:
    tracing = started(0.0, exported)
    batch = tracing.batch("orders.place", "orders", [])
    batch.end(failure)
    tracing.end_batch(batch, [Context(ANONYMOUS_ACTOR, 0.0, TRACE, "")])
    assert [each.trace_id for each in exported.spans] == [TRACE] * is_exported


def test_a_batch_for_another_process_exports_its_spans_if_it_is_slow(exported: Exported) -> None:
    tracing = Tracing()
    tracing.start(0.0, exported)
    batch = tracing.batch("orders.place", "orders", [])
    batch.started -= SLOW_SECONDS
    batch.end()
    tracing.end_batch(batch, [Context(ANONYMOUS_ACTOR, 0.0, TRACE, "")])
    assert [each.name for each in exported.spans] == ["orders.place"]


def test_a_batch_of_a_request_of_this_process_is_exported_with_it_alone(exported: Exported) -> None:
    tracing = keeping_none(exported)
    span = request(tracing)
    batch = tracing.batch("orders.place", "orders", [span])
    batch.end("internal")
    tracing.end_batch(batch, [Context(ANONYMOUS_ACTOR, 0.0, TRACE, "", span)])
    assert exported.spans == []


def test_the_end_closes_the_exporter_and_nothing_is_exported_behind_it(exported: Exported) -> None:
    tracing = started(1.0, exported)
    span = request(tracing)
    tracing.close()
    span.end()
    assert exported.is_closed
    assert exported.spans == []


def test_times_are_of_the_wall_clock(exported: Exported) -> None:
    before = time.time_ns()
    request(started(1.0, exported)).end()
    [ended] = exported.spans
    second = 1_000_000_000
    assert before - second <= ended.start_ns <= ended.end_ns <= time.time_ns() + second
