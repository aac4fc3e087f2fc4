"""Spans, and their places in traces as texts."""

from __future__ import annotations

import pytest

from mercato.chassis.contract.context import (
    CHILDREN_MAX,
    INTERNAL,
    KEPT,
    OVERTAKEN,
    SAMPLED,
    SERVER,
    Overtaken,
    Place,
    Span,
    written,
)
from mercato.chassis.contract.places import read, remote, remote_parent, traceparent

TRACE, OTHER = "4bf92f3577b34da6a3ce929d0e0e4736", "0af7651916cd43dd8448eb211c80319c"


class Recorded:
    def __init__(self) -> None:
        self.spans: list[Span] = []

    def record(self, span: Span, /) -> None:
        self.spans.append(span)


def span(recorder: Recorded, *places: Place) -> Span:
    return Span("POST /orders", "gateway", SERVER, recorder, places)


def test_a_child_is_in_the_traces_of_its_parent_below_it() -> None:
    parent = span(Recorded(), Place(TRACE, SAMPLED, 0), Place(OTHER, KEPT, 7, 1001))
    child = parent.child("orders.place")
    assert [*child.places] == [Place(TRACE, SAMPLED, parent.id), Place(OTHER, KEPT, parent.id, 1001)]
    assert child.service == "gateway"


def test_only_a_span_with_a_place_is_recorded_and_only_once() -> None:
    recorder = Recorded()
    without, recorded = span(recorder), span(recorder, Place(TRACE, SAMPLED, 0))
    for each in (without, recorded, recorded):
        each.end("internal")
    assert recorder.spans == [recorded]
    assert recorded.failure == "internal"


def test_a_span_without_a_place_remembers_its_children_while_it_runs() -> None:
    parent = span(Recorded())
    children = [parent.child(f"call {n}") for n in range(CHILDREN_MAX + 1)]
    assert parent.children == children[:CHILDREN_MAX]
    parent.end()
    parent.child("a saga that goes on")
    assert parent.children == children[:CHILDREN_MAX]


def test_a_recorded_span_remembers_no_children() -> None:
    parent = span(Recorded(), Place(TRACE, SAMPLED, 0))
    parent.child("orders.place")
    assert parent.children is None


def test_an_exception_fails_a_span() -> None:
    failed = span(Recorded())
    with pytest.raises(ZeroDivisionError), failed:
        1 / 0  # noqa: B018  # pyright: ignore[reportUnusedExpression]
    assert failed.failure == "ZeroDivisionError"
    assert failed.ended is not None


def test_a_span_whose_work_another_process_has_done_has_not_failed() -> None:
    recorder = Recorded()
    overtaken = span(recorder, Place(TRACE, SAMPLED, 0))
    with pytest.raises(Overtaken), overtaken:
        raise Overtaken
    assert recorder.spans == [overtaken]
    assert (overtaken.failure, overtaken.attributes) == ("", {OVERTAKEN: True})


def test_places_survive_being_written() -> None:
    places = [Place(TRACE, SAMPLED | KEPT, 2**63, 1001), Place(OTHER, KEPT, 1)]
    assert read(written(places)) == places
    assert written([]) == ""
    assert read("") == []


@pytest.mark.parametrize("text", ["x", f"{TRACE}-1-1", f"{TRACE}-zz-01-0", "-".join("abcde"), f"{TRACE}-1-01-0-9"])
def test_a_malformed_text_has_no_places(text: str) -> None:
    assert not read(text)


def test_the_caller_in_another_process_is_the_parent_of_what_is_done_here() -> None:
    caller = span(Recorded(), Place(TRACE, SAMPLED, 0, 1001))
    arrived = remote(read(written(caller.below())))
    assert arrived.id == caller.id
    assert [*arrived.below()] == [Place(TRACE, SAMPLED, caller.id, 1001)]
    arrived.adopt(Span("late", "orders", INTERNAL, Recorded()))
    assert arrived.children is None


def test_what_a_trace_is_about_holds_for_that_trace_alone() -> None:
    batch = span(Recorded(), Place(TRACE, KEPT, 1), Place(OTHER, KEPT, 2))
    batch.concern(1001, {TRACE})
    assert [place.about for place in batch.places] == [1001, 0]


def test_a_header_is_read_if_its_sender_records_the_trace() -> None:
    place = Place(TRACE, SAMPLED | KEPT, 0xB7AD6B7169203331)
    assert traceparent(place) == f"00-{TRACE}-b7ad6b7169203331-01"
    found = remote_parent(traceparent(place))
    assert found is not None
    assert (found.id, found.places[0].trace_id) == (0xB7AD6B7169203331, TRACE)
    assert remote_parent(traceparent(Place(TRACE, KEPT, 1))) is None, "it is not recorded there"


@pytest.mark.parametrize(
    "header",
    ["", "x", f"ff-{TRACE}-b7ad6b7169203331-01", f"00-{'0' * 32}-b7ad6b7169203331-01", f"00-{TRACE}-{'0' * 16}-01",
     f"00-{TRACE}-b7ad6b7169203331-01\n", f"00-{TRACE.upper()}-b7ad6b7169203331-01"],
)  # fmt: skip
def test_a_malformed_header_names_no_caller(header: str) -> None:
    assert remote_parent(header) is None
