"""A batch as bytes: what of a trace goes with it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from mercato.chassis.contract import ANONYMOUS_ACTOR, Context, Place, Span
from mercato.chassis.contract.context import KEPT, SAMPLED, SERVER
from mercato.chassis.contract.places import NoRecorder
from mercato.chassis.rpc.codec import decode_requests, encode_requests, traceparent_of
from mercato.contracts.orders import GetOrder, Orders

TRACE, OTHER = "4bf92f3577b34da6a3ce929d0e0e4736", "0af7651916cd43dd8448eb211c80319c"


def span(*trace_ids: str, flags: int = SAMPLED | KEPT) -> Span:
    places = [Place(trace_id, flags, 0, 1001) for trace_id in trace_ids]
    return Span("GET /orders/{id}", "gateway", SERVER, NoRecorder(), places)


def context(trace_id: str, of: Span | None) -> Context:
    return Context(ANONYMOUS_ACTOR, 60.0, trace_id, "r", of)


def sent(contexts: Sequence[Context], traceparent: str = "") -> Sequence[Context]:
    requests = [GetOrder(id=1001) for _ in contexts]
    found, arrived = decode_requests(Orders.get, encode_requests(requests, contexts, 0.0), 0.0, traceparent)
    assert found == requests
    return arrived


def test_a_recorded_request_goes_on_below_its_call() -> None:
    call = span(TRACE)
    [arrived] = sent([context(TRACE, call)])
    assert arrived.span is not None
    assert arrived.span.id == call.id
    assert [*arrived.span.below()] == [Place(TRACE, SAMPLED | KEPT, call.id, 1001)]


def test_a_request_that_is_not_recorded_has_no_span_there() -> None:
    for of in (None, span()):
        [arrived] = sent([context(TRACE, of)])
        assert (arrived.span, arrived.trace_id) == (None, TRACE)


def test_the_places_of_one_call_with_many_requests_are_sent_once() -> None:
    call, other = span(TRACE, OTHER), span(OTHER)
    arrived = sent([context(TRACE, call), context(TRACE, call), context(OTHER, other)])
    assert [each.span is not None for each in arrived] == [True, False, True]


def test_the_header_of_a_caller_that_is_no_mercato_counts() -> None:
    [arrived] = sent([context(TRACE, None)], f"00-{OTHER}-b7ad6b7169203331-01")
    assert arrived.span is not None
    assert arrived.span.below()[0] == Place(OTHER, SAMPLED | KEPT, 0xB7AD6B7169203331)


def test_what_the_requests_themselves_say_goes_before_the_header() -> None:
    call = span(TRACE)
    [arrived] = sent([context(TRACE, call)], f"00-{OTHER}-b7ad6b7169203331-01")
    assert arrived.span is not None
    assert arrived.span.below()[0].trace_id == TRACE


@pytest.mark.parametrize("header", ["", "x", f"00-{OTHER}-b7ad6b7169203331-00"])
def test_a_header_without_a_recorded_trace_changes_nothing(header: str) -> None:
    assert sent([context(TRACE, None)], header)[0].span is None


def test_the_header_of_a_batch_is_that_of_its_first_recorded_request() -> None:
    call = span(TRACE)
    contexts = [context(OTHER, None), context(OTHER, span()), context(TRACE, call), context(OTHER, span(OTHER))]
    assert traceparent_of(contexts) == f"00-{TRACE}-{call.id:016x}-01"
    assert traceparent_of(contexts[:2]) is None


def test_a_trace_that_is_only_kept_is_not_sampled_for_others() -> None:
    call = span(TRACE, flags=KEPT)
    assert traceparent_of([context(TRACE, call)]) == f"00-{TRACE}-{call.id:016x}-00"
