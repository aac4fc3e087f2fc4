"""The feed: the domain events of all services, in one sequence."""

from __future__ import annotations

import datetime
from typing import Annotated, Any, Final

from msgspec import Meta

from mercato.chassis.contract import Contract, Kind, Message, Retry, ServiceError, single, worded

from .roles import STAFF_ONLY

PAGE_LIMIT: Final = 500
TYPES_LIMIT: Final = 20
WAIT_LIMIT_MS: Final = 60_000
"""The longest wait for entries, as for an order (`orders.AwaitOrder`)."""

EventType = Annotated[
    str,
    Meta(
        pattern=r"^[a-z]+\.[a-z_]+\Z",
        extra=worded("must be a thing and what has happened to it, such as order.paid"),
        max_length=64,
        examples=["order.paid"],
    ),
]


class FeedEntry(Message):
    position: int
    """Its position in the feed: the cursor of a reader that has read it."""
    id: str
    """The id of the event, the same at every delivery: `orders:69632`. The number rises with the source's commits."""
    type: str
    subject: str
    """What it is about: `order 1001`, `payment 1001`, `product 100`, `reservation 1001` (by order)."""
    version: int
    """The version of the subject, which rises."""
    data: Any
    at: datetime.datetime
    """When the event happened."""
    traceparent: str | None = None
    """Of the transaction that has emitted it (W3C Trace Context), if its trace is recorded."""


class ListEvents(Message):
    """Entries by ascending position, those after `after`; only of `types`, where there are any.

    Positions are given in the order of commits, one writer at a time: a reader that continues from its last position
    never misses an entry. The entries of a subject are in the order in which they happened, except for dead letters,
    which the feed could not take at first: such an entry comes when it is replayed, after later ones. Raises
    `CursorTooOld` where wanted entries after `after` have been deleted (from 0 on it gives those that are left), and
    `CursorAhead` where the feed has never reached `after`.
    """

    after: Annotated[int, Meta(ge=0)] = 0
    limit: Annotated[int, Meta(ge=1, le=PAGE_LIMIT)] = 100
    types: Annotated[tuple[EventType, ...], Meta(max_length=TYPES_LIMIT)] = ()


class EventPage(Message):
    entries: tuple[FeedEntry, ...]
    next_after: int
    """The `after` of the next page. After the last entry it is that of the request: request it again later."""
    is_full: bool = False
    """Whether there are as many entries as requested, so that there may be more."""


Subject = Annotated[
    str,
    Meta(
        pattern=r"^[a-z]{1,31} [1-9][0-9]{0,15}\Z",
        extra=worded("must be a thing and its id, such as order 1001"),
        examples=["order 1001"],
    ),
]


class FollowEvents(Message):
    """The next entries after `after`, as `ListEvents` gives them; if there are none, they are waited for.

    The answer comes as soon as there is an entry, or after `wait_ms` without one. Its `next_after` is behind all that
    was read, also behind entries that the filters exclude. A page of one `subject` reads a bounded part of the feed:
    it may be empty and `is_full`, and then the next one is requested at once. Raises as `ListEvents`.
    """

    after: Annotated[int, Meta(ge=0)] | None = None
    """None: the answer is at once an empty page, whose `next_after` is the end of the feed."""
    limit: Annotated[int, Meta(ge=1, le=PAGE_LIMIT)] = 100
    types: Annotated[tuple[EventType, ...], Meta(max_length=TYPES_LIMIT)] = ()
    subject: Subject | None = None
    """Only entries about this."""
    wait_ms: Annotated[int, Meta(ge=0, le=WAIT_LIMIT_MS)] = 0


class CursorTooOld(ServiceError, code="events.cursor_too_old", kind=Kind.NOT_FOUND):
    """The reader was away for longer than the feed is kept, and would miss entries without notice.

    `oldest` is the lowest `after` that is sure to miss nothing.
    """

    sentence = (
        "The oldest events after position {after} are not in the feed any more: read the orders and products "
        "themselves, then continue after {oldest}."
    )
    after: int
    oldest: int


class CursorAhead(ServiceError, code="events.cursor_ahead", kind=Kind.NOT_FOUND):
    """The reader has a position that the feed has not reached: of another feed, or of one that was restored since."""

    sentence = "Position {after} is behind the end of this feed, which is {last}: was it restored from a backup?"
    after: int
    last: int


class Events(Contract, name="events"):
    """The feed. It is kept for seven days."""

    list = single(ListEvents, EventPage, allow=STAFF_ONLY, retry=Retry.SAFE)
    follow = single(FollowEvents, EventPage, allow=STAFF_ONLY, deadline_ms=70_000, retry=Retry.SAFE, waits=True)
