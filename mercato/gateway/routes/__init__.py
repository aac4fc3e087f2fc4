"""The table of the API: one file a service, and one for the requests of the reference systems."""

from __future__ import annotations

from typing import Final

from mercato.gateway.route import Route
from mercato.gateway.routes import (
    claims,
    events,
    inventory,
    orders,
    own_data,
    payments,
    products,
    reference,
    refunds,
    security_log,
    users,
)

ROUTES: Final[tuple[Route, ...]] = reference.added_to(
    (
        *users.ROUTES,
        *own_data.ROUTES,
        *security_log.ROUTES,
        *products.ROUTES,
        *inventory.ROUTES,
        *orders.ROUTES,
        *claims.ROUTES,
        *refunds.ROUTES,
        *payments.ROUTES,
        *events.ROUTES,
    )
)
