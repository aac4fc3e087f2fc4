"""`Prefer: count=exact` (RFC 7240): a page comes with the number of all that its filters match, in `Total-Count`.

A count reads all that it counts. So it is made for those alone who ask, enters as a report does where there are too
many requests, and is given up after a time that the service sets, or at once where many ask (`Database.count`): then
the page comes without the number and without Preference-Applied. The number is of another moment than the page, if only
a little.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from mercato.gateway import cursors
from mercato.gateway.route import Page, Route, RouteRequest


def are_counted(route: Route) -> bool:
    """Whether a route answers a collection whose entries can be counted."""
    return cursors.is_paged(route) and (_is_whole(route) or "count" in route.operation.request.__struct_fields__)


def asking(route: Route) -> Callable[[RouteRequest], Any]:
    """What makes the request of the route's operation, so that it asks for the total where the client does."""
    if not are_counted(route) or _is_whole(route):
        return route.request

    def request(asked: RouteRequest) -> Any:
        made = route.request(asked)
        return msgspec.structs.replace(made, count=True) if asked.counts else made

    return request


def lines(answer: Any, page: Page) -> tuple[bytes, ...]:
    """The header fields of a page for which the total was asked. `answer`: of the operation; `page`: before slicing."""
    total = getattr(answer, "total", len(page.items))
    return () if total is None else (b"total-count: %d" % total, b"preference-applied: count=exact")


def vary(route: Route) -> tuple[bytes, ...]:
    """For caches: the answer with the total is another."""
    return (b"vary: Prefer",) if are_counted(route) else ()


def _is_whole(route: Route) -> bool:
    """Whether the operation gives all of the collection, whatever the page."""
    return route.query is not None and issubclass(route.query, cursors.SliceQuery)
