"""What the spans and the metric of requests say: attributes, labels, and which order a trace is about."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, Final

from mercato.chassis.contract import Message, Span
from mercato.chassis.observability.counting import PendingHistogram
from mercato.chassis.observability.exemplars import Exemplars
from mercato.chassis.observability.telemetry import Telemetry
from mercato.chassis.observability.tracing import Tracing
from mercato.contracts.orders import Orders
from mercato.gateway.headers import RequestHeaders
from mercato.gateway.route import Route

CLIENT_GONE: Final = "client_gone"
"""The failure of a request whose client did not wait for the answer."""


HTTP_SECONDS: Final = "http_server_request_duration_seconds"
METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "CONNECT", "TRACE"})
OTHER_METHOD: Final = "_OTHER"
"""What a method that is not in `METHODS` is called, so that a client does not make series (semantic conventions)."""


def answered(telemetry: Telemetry) -> PendingHistogram:
    """Requests by method, route and status, as OpenTelemetry's semantic conventions name them."""
    about = "From a request's head to the last byte of its answer."
    labels = ["http_request_method", "http_route", "http_response_status_code"]
    return telemetry.histogram(HTTP_SECONDS, about, labels)


def labels_of(route: Route, status: int) -> Mapping[str, str]:
    """The labels of a request for a route. One for another path has an empty `http_route`."""
    return {
        "http_request_method": route.method,
        "http_route": route.path,
        "http_response_status_code": str(status),
    }


def method_label(method: str) -> str:
    return method if method in METHODS else OTHER_METHOD


def attributes_of(route: Route, status: int, headers: RequestHeaders) -> dict[str, Any]:
    """The attributes of a request whose answer was sent: ids alone, for a client writes the rest."""
    return {
        "http.request.method": route.method,
        "http.route": route.path,
        "http.response.status_code": status,
        "mercato.request.id": headers.request_id,
        "mercato.actor.id": headers.actor_id,
    }


def end_request(
    span: Span,
    tracing: Tracing,
    exemplars: Exemplars,
    route: Route,
    status: int,
    headers: RequestHeaders,
    seconds: float,
) -> None:
    """Ends the span of a request whose answer was sent."""
    if span.places:
        span.note(attributes_of(route, status, headers))
        exemplars.note(HTTP_SECONDS, labels_of(route, status), seconds, span)
    is_failed = status >= 500 and status != 503  # an overloaded process answers 503 to many
    tracing.end_request(span, headers.trace_id, str(status) if status >= 500 else "", is_failed=is_failed)


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
