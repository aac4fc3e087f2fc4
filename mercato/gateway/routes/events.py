"""The feed of events."""

from __future__ import annotations

from typing import Annotated, Any, Final

from msgspec import Meta

from mercato.chassis.contract import MAX_ID, worded
from mercato.contracts import events as contract
from mercato.contracts.events import CursorAhead, CursorTooOld, EventPage, Events, FollowEvents, ListEvents
from mercato.contracts.inventory import Inventory
from mercato.contracts.orders import Orders
from mercato.contracts.payments import Payments
from mercato.contracts.products import Products
from mercato.contracts.roles import STAFF_ONLY
from mercato.gateway.route import Input, Page, Route, RouteRequest, Streamed
from mercato.gateway.streams.entries import EventOut, shown
from mercato.gateway.streams.opening import position_of
from mercato.gateway.validation import invalid

# One to `contract.TYPES_LIMIT` of `contract.EventType`, with commas between.
TYPES_PATTERN: Final = (
    rf"^[a-z]{{1,31}}\.[a-z_]{{1,32}}(,[a-z]{{1,31}}\.[a-z_]{{1,32}}){{0,{contract.TYPES_LIMIT - 1}}}\Z"
)


SUBJECT_PATTERN: Final = r"^[a-z]{1,31} [1-9][0-9]{0,15}\Z"

KNOWN_TYPES: Final = frozenset(kind for service in (Inventory, Orders, Payments, Products) for kind in service.events)


EventTypes = Annotated[
    str,
    Meta(
        pattern=TYPES_PATTERN,
        extra=worded("must be types of events with commas between, such as order.placed,order.paid"),
        description=f"Only events of these types: up to {contract.TYPES_LIMIT}, with commas between.",
        examples=["order.placed,order.paid"],
    ),
]


EventSubject = Annotated[
    str,
    Meta(
        pattern=SUBJECT_PATTERN,
        extra=worded("must be a thing and its id, such as order 1001"),
        description="Only events about this: an `order`, a `product`, a `payment`, or the `reservation` of an order. "
        "For streams alone.",
        examples=["order 1001"],
    ),
]


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
    types: EventTypes | None = None
    subject: EventSubject | None = None


class FollowQuery(Input):
    after: (
        Annotated[
            int,
            Meta(
                ge=0,
                le=MAX_ID,
                description="Begin after this position, and not at the end; 0: with the oldest event. Last-Event-ID "
                "counts more, so that a browser that comes back continues.",
            ),
        ]
        | None
    ) = None
    types: EventTypes | None = None
    subject: EventSubject | None = None


def types_of(query: Any) -> tuple[str, ...]:
    """The types that a query names. Raises `InvalidRequest`."""
    types = tuple(query.types.split(",")) if query.types else ()
    if len(types) > contract.TYPES_LIMIT:
        raise invalid(("?types", f"has more than {contract.TYPES_LIMIT} types"))
    if unknown := [kind for kind in types if kind not in KNOWN_TYPES]:
        raise invalid(("?types", f"has {', '.join(unknown)}, and there are only {', '.join(sorted(KNOWN_TYPES))}"))
    return types


def _list(request: RouteRequest) -> ListEvents:
    query: EventsQuery = request.query
    if query.subject is not None:
        raise invalid(("?subject", "is a filter of streams alone; send Accept: text/event-stream with it"))
    return ListEvents(after=query.after, limit=query.limit, types=types_of(query))


def _follow(request: RouteRequest) -> FollowEvents:
    query: FollowQuery = request.query
    return FollowEvents(after=position_of(request), types=types_of(query), subject=query.subject)


def _page(page: EventPage) -> Page:
    return Page([shown(e) for e in page.entries], {"after": str(page.next_after)} if page.is_full else None)


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
        stream=Streamed(kind="feed", operation=Events.follow, request=_follow, query=FollowQuery),
    ),
)
