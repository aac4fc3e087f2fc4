"""The table of the API: one file a service."""

from __future__ import annotations

from typing import Final

from mercato.gateway.route import Route
from mercato.gateway.routes import events, inventory, orders, payments, products, users

ROUTES: Final[tuple[Route, ...]] = (
    *users.ROUTES,
    *products.ROUTES,
    *inventory.ROUTES,
    *orders.ROUTES,
    *payments.ROUTES,
    *events.ROUTES,
)
