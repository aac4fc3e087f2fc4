"""`Prefer: count=exact` (RFC 7240): a page has the number of all entries that its filters match, in `Total-Count`.

A count reads all entries. So it is made only for requests that ask for it, has the priority of a report under overload,
and is given up after a time that the service sets, or at once where many ask (`Database.count`): then the page comes
without the number and without Preference-Applied. The number is counted right after the page is read.
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
    """The function that makes the request of the route's operation, with `count` where the client asks for it."""
    if not are_counted(route) or _is_whole(route):
        return route.request

    def request(asked: RouteRequest) -> Any:
        made = route.request(asked)
        return msgspec.structs.replace(made, count=True) if asked.counts else made

    return request


def lines(answer: Any, page: Page) -> tuple[bytes, ...]:
    """The header fields of a page with a total. `answer`: of the operation; `page`: before slicing."""
    total = getattr(answer, "total", len(page.items))
    return () if total is None else (b"total-count: %d" % total, b"preference-applied: count=exact")


def vary(route: Route) -> tuple[bytes, ...]:
    """For caches: the answer with the total differs."""
    return (b"vary: Prefer",) if are_counted(route) else ()


def _is_whole(route: Route) -> bool:
    """Whether the operation gives all entries of the collection for each page."""
    return route.query is not None and issubclass(route.query, cursors.SliceQuery)
