"""The API's table of routes: one file a service, and one for the requests of the reference systems.

`PRIORITIES` says which routes enter first under overload.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

from mercato.chassis.http import Priority
from mercato.gateway.route import Route
from mercato.gateway.routes import (
    claims,
    events,
    inventory,
    order_events,
    order_history,
    orders,
    own_data,
    payments,
    products,
    reference,
    refunds,
    security_log,
    users,
)

PRIORITIES: Final[Mapping[Priority, tuple[str, ...]]] = {
    Priority.PAY: (
        "POST /payments",
        "POST /payments/process",
        "POST /payments/{id}/capture",
        "POST /payments/{id}/refunds",
        "POST /payments/{id}/void",
    ),
    Priority.ORDER: (
        "POST /orders",
        "PATCH /orders/{id}",
        "POST /orders/{id}/cancel",
        "POST /orders/{id}/claim",
        "POST /orders/{id}/returns",
        "POST /token/refresh",  # without it, no checkout can continue after fifteen minutes
    ),
    Priority.BROWSE: (
        "GET /categories",
        "GET /customers/{id}",
        "GET /orders",
        "GET /orders/{id}",
        "GET /orders/{id}/events",
        "GET /orders/{id}/history",
        "GET /orders/{id}/refunds",
        "GET /orders/{id}/timeline",
        "GET /payments",
        "GET /payments/{id}",
        "GET /payments/{id}/refunds",
        "GET /products",
        "POST /products",
        "GET /products/{id}",
        "PATCH /products/{id}",
        "POST /products/{id}/archive",
        "POST /products/{id}/restore",
        "GET /products/{id}/stock",
        "PUT /products/{id}/stock",
        "POST /products/{id}/stock/adjustments",
        "GET /refunds/{id}",
        "POST /email/proof",
        "POST /login",  # hashing a password costs more than anything else here, and attackers call it too
        "POST /logout",
        "POST /password/forgot",
        "POST /password/reset",
        "POST /register",
        "GET /user/{id}",
        "GET /users/{id}",
        "PATCH /users/{id}",
        "PUT /users/{id}/role",
        "DELETE /users/me",
        "GET /users/me",
        "GET /users/me/security-log",
        "PATCH /users/me",
        "POST /users/me/password",
        "POST /users/me/proof",
        "DELETE /users/me/sessions",
        "GET /users/me/sessions",
        "DELETE /users/me/sessions/{id}",
    ),
    Priority.REPORT: (
        "GET /events",
        "GET /security-log",
        "GET /stock",
        "GET /users",
        "GET /users/me/export",
    ),
}
"""The priority of each route. A route that is not listed has `BROWSE`, and a test fails for it."""

_PRIORITY_OF: Final = {name: priority for priority, names in PRIORITIES.items() for name in names}


_DECLARED: Final[tuple[Route, ...]] = reference.added_to(
    (
        *users.ROUTES,
        *own_data.ROUTES,
        *security_log.ROUTES,
        *products.ROUTES,
        *inventory.ROUTES,
        *orders.ROUTES,
        *order_history.ROUTES,
        *claims.ROUTES,
        *refunds.ROUTES,
        *payments.ROUTES,
        *events.ROUTES,
        *order_events.ROUTES,
    )
)

ROUTES: Final[tuple[Route, ...]] = tuple(
    msgspec.structs.replace(route, priority=_PRIORITY_OF.get(f"{route.method} {route.path}", Priority.BROWSE))
    for route in _DECLARED
)
