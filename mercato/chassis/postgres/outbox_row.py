"""The content of an outbox row: a JSON array of the events of one transaction. Pure."""

from __future__ import annotations

from collections.abc import Sequence
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
"""Where this is not in a row, none of its events has a trace; most rows are not decoded to find out."""


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
    """Of an event in a row of the outbox."""

    type: str
    trace: str = ""


unpack: Final = msgspec.json.Decoder(list[OutboxEvent]).decode
traces: Final = msgspec.json.Decoder(list[EventTrace]).decode
"""The type and the trace of each event of a row. The rest is passed over, which costs a quarter of unpacking them as
events of a source (364 and 1 391 ns an event)."""


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
