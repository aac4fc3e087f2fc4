"""How an entry of the feed is shown, and which entries a stream wants."""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from mercato.contracts.events import FeedEntry, FollowEvents
from mercato.contracts.roles import CUSTOMER
from mercato.gateway.route import Output

TRACEPARENT_PATTERN: Final = r"^00-[0-9a-f]{32}-[0-9a-f]{16}-0[01]\Z"
CLAIMED: Final = "order.claimed"
"""After this event, the access token of a guest's order is void."""

_encode: Final = msgspec.json.Encoder().encode


class EventOut(Output):
    position: Annotated[int, Meta(description="Rises; a later event never comes before one that you have read.")]
    id: Annotated[str, Meta(description="The same at every delivery of this event.")]
    type: str
    subject: Annotated[
        str,
        Meta(
            description="What it is about. Its events are in the order in which they happened, except for one whose "
            "first delivery failed: it comes late, and its version says where it belongs."
        ),
    ]
    version: int
    data: Any
    at: datetime.datetime
    traceparent: (
        Annotated[
            str,
            Meta(
                pattern=TRACEPARENT_PATTERN,
                description="The place of the change in its trace (W3C Trace Context), if that is recorded.",
            ),
        ]
        | None
    )


def shown(entry: FeedEntry) -> EventOut:
    return EventOut(
        position=entry.position,
        id=entry.id,
        type=entry.type,
        subject=entry.subject,
        version=entry.version,
        data=entry.data,
        at=entry.at,
        traceparent=entry.traceparent,
    )


def message(position: int, name: str, body: bytes) -> bytes:
    """One message of a stream. `body` is JSON on one line."""
    return b"id: %d\nevent: %b\ndata: %b\n\n" % (position, name.encode(), body)


def for_staff(entry: FeedEntry) -> bytes:
    return message(entry.position, entry.type, _encode(shown(entry)))


def for_buyer(entry: FeedEntry) -> bytes:
    """The entry without the account of staff who have acted, as in the history of an order."""
    data: dict[str, Any] = entry.data
    if data.get("actor_role", CUSTOMER) != CUSTOMER:
        entry = msgspec.structs.replace(entry, data={**data, "actor_id": 0})
    return for_staff(entry)


class Interest(msgspec.Struct, frozen=True):
    """Which entries a stream wants, and for which reader. Streams with equal ones are sent the same bytes."""

    types: frozenset[str] = frozenset()
    """Empty: all."""
    subject: str | None = None
    """None: all."""
    is_buyers: bool = False
    """Whether the reader is a customer or a guest."""
    until_claimed: bool = False
    """Whether the stream ends when an account becomes the owner of the order."""

    def messages_of(self, entries: Iterable[FeedEntry]) -> tuple[list[tuple[int, bytes]], bool]:
        """The messages for those entries that are wanted, each with its position; and whether the stream ends there."""
        show = for_buyer if self.is_buyers else for_staff
        found: list[tuple[int, bytes]] = []
        for entry in entries:
            if self.subject is not None and entry.subject != self.subject:
                continue
            if self.until_claimed and entry.type == CLAIMED:
                return found, True
            if not self.types or entry.type in self.types:
                found.append((entry.position, show(entry)))
        return found, False

    def request(self, after: int, limit: int) -> FollowEvents:
        """The request for the next entries, of which `messages_of` takes those that are wanted."""
        types = () if self.until_claimed else tuple(sorted(self.types))
        return FollowEvents(after=after, limit=limit, types=types, subject=self.subject)
