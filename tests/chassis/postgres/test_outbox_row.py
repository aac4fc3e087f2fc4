"""Which events of a transaction name which of its traces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import pytest

from mercato.chassis.contract import Message, Place
from mercato.chassis.postgres.outbox_row import Outgoing, pack, traced, traces

FIRST, SECOND = "1" * 32, "2" * 32


class AboutOrder(Message):
    about_field: ClassVar = "order_id"

    order_id: int


class AboutNothing(Message):
    name: str = ""


class WithKind(Message):
    """It begins as an event does."""

    type: str


class WithTrace(Message):
    type: str
    trace: str


def event(data: Message, type_: str = "thing.changed") -> Outgoing:
    return Outgoing(type_, "thing", 1, 1, data)


def about(*orders: int) -> list[Outgoing]:
    """An event about each order, of the type `thing.ORDER`."""
    return [event(AboutOrder(order_id=n), f"thing.{n}") for n in orders]


def traces_of(events: Sequence[Outgoing], *places: Place) -> dict[str, list[str]]:
    """The ids of the traces of each event that has one, by its type, as they are read from a row."""
    [row] = pack(traced(events, places))
    return {each.type: [part[:32] for part in each.trace.split(",")] for each in traces(row)}


def place(trace_id: str, about: int = 0) -> Place:
    return Place(trace_id, 1, 7, about)


def test_an_event_names_the_traces_about_its_order_alone() -> None:
    assert traces_of(about(1, 2, 3), place(FIRST, 1), place(SECOND, 3)) == {"thing.1": [FIRST], "thing.3": [SECOND]}


def test_a_trace_of_which_it_is_not_known_what_it_is_about_is_named_by_each_event() -> None:
    found = traces_of(about(1, 2), place(FIRST), place(SECOND, 2))
    assert found == {"thing.1": [FIRST], "thing.2": [FIRST, SECOND]}


@pytest.mark.parametrize("data", [AboutNothing(), AboutOrder(order_id=0)], ids=["no field", "no order"])
def test_an_event_about_no_order_names_each_trace(data: Message) -> None:
    assert traces_of([event(data), *about(5)], place(FIRST, 1)) == {"thing.changed": [FIRST]}


def test_a_row_gives_types_and_traces_whatever_its_data_says() -> None:
    before = [event(data) for data in (AboutNothing(name='"trace":"no"'), WithKind(type="x"), AboutNothing(name="]}"))]
    [row] = pack([*before, *traced(about(1), [place(FIRST)]), event(WithKind(type="y"))])
    assert [(each.type, each.trace[:32]) for each in traces(row)] == [("thing.1", FIRST)]


def test_a_row_whose_data_has_a_trace_has_no_traced_event() -> None:
    [row] = pack([event(WithTrace(type="x", trace="t")), *about(2)])
    assert traces(row) == []


@pytest.mark.parametrize("data", [WithKind(type="x"), WithTrace(type="x", trace=""), WithTrace(type="x", trace="t")])
def test_a_traced_event_whose_data_looks_like_an_event_keeps_its_own_type_and_trace(data: Message) -> None:
    [row] = pack([*traced([event(data, "thing.1")], [place(FIRST)]), *about(2), event(data)])
    assert [(each.type, each.trace[:32]) for each in traces(row)] == [("thing.1", FIRST)]
