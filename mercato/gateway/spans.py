"""What the spans of requests say: attributes, and which order a trace is about."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Final

from mercato.chassis.contract import Message
from mercato.contracts.orders import Orders
from mercato.gateway.headers import RequestHeaders
from mercato.gateway.route import Route

GATEWAY: Final = "gateway"
"""The service of the spans of requests."""
CLIENT_GONE: Final = "client_gone"
"""The failure of a request whose client did not wait for the answer."""


def attributes_of(route: Route, status: int, headers: RequestHeaders) -> dict[str, Any]:
    """The attributes of a request whose answer was sent: ids alone, for a client writes the rest."""
    return {
        "http.request.method": route.method,
        "http.route": route.path,
        "http.response.status_code": status,
        "mercato.request.id": headers.request_id,
        "mercato.actor.id": headers.actor_id,
    }


def order_in(service: str, message: type[Message]) -> Callable[[Any], int | None] | None:
    """Gives the order that a message of a service is about. None: it has no such field."""
    fields = message.__struct_fields__
    if "order_id" in fields:
        return operator.attrgetter("order_id")
    if service == Orders.service:
        if "order" in fields:
            return operator.attrgetter("order.id")
        if "id" in fields:
            return operator.attrgetter("id")
    return None
