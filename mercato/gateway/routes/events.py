"""The feed of events."""

from __future__ import annotations

import datetime
from typing import Annotated, Any, Final

from msgspec import Meta

from mercato.chassis.contract import MAX_ID, worded
from mercato.contracts import events as contract
from mercato.contracts.events import CursorAhead, CursorTooOld, EventPage, Events, ListEvents
from mercato.contracts.inventory import Inventory
from mercato.contracts.orders import Orders
from mercato.contracts.payments import Payments
from mercato.contracts.products import Products
from mercato.contracts.roles import STAFF_ONLY
from mercato.gateway.route import Input, Output, Page, Route, RouteRequest
from mercato.gateway.validation import invalid

# One to `contract.TYPES_LIMIT` of `contract.EventType`, with commas between.
TYPES_PATTERN: Final = (
    rf"^[a-z]{{1,31}}\.[a-z_]{{1,32}}(,[a-z]{{1,31}}\.[a-z_]{{1,32}}){{0,{contract.TYPES_LIMIT - 1}}}\Z"
)


TRACEPARENT_PATTERN: Final = r"^00-[0-9a-f]{32}-[0-9a-f]{16}-0[01]\Z"

KNOWN_TYPES: Final = frozenset(kind for service in (Inventory, Orders, Payments, Products) for kind in service.events)


class EventsQuery(Input):
    after: Annotated[
        int,
        Meta(
            ge=0,
            le=MAX_ID,
            description="Only positions after this one. To follow the feed, request it again with the last position "
            "that you have read, also when there was no Link to a next page. Where wanted events after it have been "
            "deleted, or the feed has never reached it, the answer is 410.",
        ),
    ] = 0
    limit: Annotated[int, Meta(ge=1, le=contract.PAGE_LIMIT, description="How many at most.")] = 100
    types: (
        Annotated[
            str,
            Meta(
                pattern=TYPES_PATTERN,
                extra=worded("must be types of events with commas between, such as order.placed,order.paid"),
                description=f"Only events of these types: up to {contract.TYPES_LIMIT}, with commas between.",
                examples=["order.placed,order.paid"],
            ),
        ]
        | None
    ) = None


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


def _list(request: RouteRequest) -> ListEvents:
    query: EventsQuery = request.query
    types = tuple(query.types.split(",")) if query.types else ()
    if len(types) > contract.TYPES_LIMIT:
        raise invalid(("?types", f"has more than {contract.TYPES_LIMIT} types"))
    if unknown := [kind for kind in types if kind not in KNOWN_TYPES]:
        raise invalid(("?types", f"has {', '.join(unknown)}, and there are only {', '.join(sorted(KNOWN_TYPES))}"))
    return ListEvents(after=query.after, limit=query.limit, types=types)


def _page(page: EventPage) -> Page:
    shown = [
        EventOut(
            position=entry.position,
            id=entry.id,
            type=entry.type,
            subject=entry.subject,
            version=entry.version,
            data=entry.data,
            at=entry.at,
            traceparent=entry.traceparent,
        )
        for entry in page.entries
    ]
    return Page(shown, {"after": str(page.next_after)} if page.is_full else None)


ROUTES: Final[tuple[Route, ...]] = (
    Route(
        method="GET",
        path="/events",
        operation=Events.list,
        summary="The feed of events, in the order in which it received them; kept for seven days",
        roles=STAFF_ONLY,
        query=EventsQuery,
        request=_list,
        answer=_page,
        output=list[EventOut],
        errors=(CursorAhead, CursorTooOld),
    ),
)
