"""Places of spans as texts: in a row of the database, an event, a message between processes, and W3C's header."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from .context import CLIENT, KEPT, SAMPLED, Place, Span


class NoRecorder:
    def record(self, _: Span, /) -> None: ...


def remote(places: Sequence[Place]) -> Span:
    """The span of a caller in another process, from the places of its children. It has ended, as seen from here."""
    span = Span("", "", CLIENT, NoRecorder(), places, started=0.0, span_id=places[0].parent_id)
    span.ended = 0.0
    return span


# ------------------------------------------------------------------------------------------------------ places as text


def read(text: str) -> Sequence[Place]:
    """Places from a text; none from one that is malformed: a trace is never worth an error."""
    places: list[Place] = []
    try:
        for part in filter(None, text.split(",")):
            trace_id, parent_id, flags, about = part.split("-")
            if len(trace_id) == 32:
                places.append(Place(trace_id, int(flags, 16), int(parent_id, 16), int(about, 16)))
    except ValueError:
        return ()
    return places


# ---------------------------------------------------------------------------------------------------- W3C Trace Context


TRACEPARENT: Final = re.compile(
    r"^(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?\Z"
)


def traceparent(place: Place) -> str:
    """The header for what is done below the parent of this place."""
    return f"00-{place.trace_id}-{place.parent_id:016x}-{place.flags & SAMPLED:02x}"


def remote_parent(header: str) -> Span | None:
    """The caller that a header names, if it records its trace; None also for a malformed header."""
    found = TRACEPARENT.match(header)
    if found is None or not int(found[3], 16) & SAMPLED:
        return None
    return remote([Place(found[1], SAMPLED | KEPT, int(found[2], 16))])
