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


def event(data: Message) -> Outgoing:
    return Outgoing("thing.changed", "thing", 1, 1, data)


def traces_of(events: Sequence[Outgoing], *places: Place) -> list[list[str]]:
    """The ids of the traces of each event, as they are read from a row."""
    [row] = pack(traced(events, places))
    return [[part[:32] for part in each.trace.split(",") if part] for each in traces(row)]


def place(trace_id: str, about: int = 0) -> Place:
    return Place(trace_id, 1, 7, about)


def test_an_event_names_the_traces_about_its_order_alone() -> None:
    events = [event(AboutOrder(order_id=n)) for n in (1, 2, 3)]
    assert traces_of(events, place(FIRST, 1), place(SECOND, 3)) == [[FIRST], [], [SECOND]]


def test_a_trace_of_which_it_is_not_known_what_it_is_about_is_named_by_each_event() -> None:
    events = [event(AboutOrder(order_id=n)) for n in (1, 2)]
    assert traces_of(events, place(FIRST), place(SECOND, 2)) == [[FIRST], [FIRST, SECOND]]


@pytest.mark.parametrize("data", [AboutNothing(), AboutOrder(order_id=0)], ids=["no field", "no order"])
def test_an_event_about_no_order_names_each_trace(data: Message) -> None:
    assert traces_of([event(data), event(AboutOrder(order_id=5))], place(FIRST, 1)) == [[FIRST], []]


def test_a_row_gives_types_and_traces_whatever_its_data_says() -> None:
    [row] = pack([event(AboutNothing(name='"trace":"no"')), *traced([event(AboutOrder(order_id=1))], [place(FIRST)])])
    assert [(each.type, each.trace[:32]) for each in traces(row)] == [("thing.changed", ""), ("thing.changed", FIRST)]
