"""The content of an outbox row: a JSON array of the events of one transaction. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import msgspec

from mercato.chassis.contract import Message, Place
from mercato.chassis.contract.context import written

ROW_EVENTS: Final = 1_000
ROW_BYTES: Final = 256 * 1024
"""A transaction with more events than that writes several rows."""
PLACE_BITS: Final = 12
LAST_PLACE: Final = (1 << PLACE_BITS) - 1
assert ROW_EVENTS <= LAST_PLACE
HAS_TRACE: Final = '"trace":"'
"""Where this is not in a row, none of its events has a trace. In an event it begins the last field."""
BEGINS_EVENT: Final = '{"type":"'


class Outgoing(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """An event to be emitted. `version` rises with every event of a subject."""

    type: str
    subject: str
    subject_id: int
    version: int
    data: Message
    trace: str = ""
    """Where the traces of the change go on, if they are recorded (`contract/places.py`)."""


class OutboxEvent(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """An event in a row of the outbox. `data` is JSON."""

    type: str
    subject: str
    subject_id: int
    version: int
    data: msgspec.Raw
    trace: str = ""


class EventTrace(msgspec.Struct, frozen=True, gc=False):
    """Of an event in a row of the outbox. It has what the data of an event has not: see `traces`."""

    type: str
    subject_id: int
    version: int
    trace: str = ""


unpack: Final = msgspec.json.Decoder(list[OutboxEvent]).decode
_decode_trace: Final = msgspec.json.Decoder(EventTrace).decode
_decode_traces: Final = msgspec.json.Decoder(list[EventTrace]).decode


def traces(row: str) -> list[EventTrace]:
    """The events of a row that have a trace, in their order.

    One event in a hundred has one: the text is searched for them, and they alone are decoded. That takes half of
    the time that it takes to decode the types and traces of all (14 and 29 us for 100 events `order.placed`).
    """
    try:
        return [_decode_trace(event) for event in _with_trace(row)]
    except msgspec.DecodeError:  # the data of an event has a field, or an object, that looks like those of an event
        return [event for event in _decode_traces(row) if event.trace]


def _with_trace(row: str) -> Iterator[str]:
    place = row.find(HAS_TRACE)
    while place >= 0:
        end = row.index('"', place + len(HAS_TRACE)) + 2
        yield row[row.rindex(BEGINS_EVENT, 0, place) : end]
        place = row.find(HAS_TRACE, end)


def pack(events: Sequence[Outgoing] | Sequence[OutboxEvent]) -> list[str]:
    """The rows that hold these events, in order. A single event that is too large has a row of its own."""
    row = msgspec.json.encode(events)
    if len(events) == 1 or (len(events) <= ROW_EVENTS and len(row) <= ROW_BYTES):
        return [row.decode()]
    middle = len(events) // 2
    return pack(events[:middle]) + pack(events[middle:])


def traced(events: Sequence[Outgoing], places: Sequence[Place]) -> Sequence[Outgoing]:
    """The events, each with those of the traces that are about what it is about, or not known to be about something.

    In a batch of many requests one is recorded: the events of the others are only looked at.
    """
    known = {place.about for place in places}
    found = list(events)
    for n, event in enumerate(events):
        field = event.data.about_field
        about = getattr(event.data, field) if field else 0
        if about in known or not about or 0 in known:
            own = [place for place in places if not place.about or not about or place.about == about]
            found[n] = msgspec.structs.replace(event, trace=written(own))
    return found


def position(row_id: int, place: int) -> int:
    """The position of an event: it rises with the row, and within a row with the event's place, which begins at 0."""
    return row_id << PLACE_BITS | place


def place_of(position: int) -> tuple[int, int]:
    """The row of a position, and its place there. The position behind a row has the place `LAST_PLACE`."""
    return position >> PLACE_BITS, position & LAST_PLACE


def end_of_row(row_id: int) -> int:
    return position(row_id, LAST_PLACE)
