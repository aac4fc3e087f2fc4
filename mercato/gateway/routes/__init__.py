"""The table of the API: one file a service."""

from __future__ import annotations

from typing import Final

from mercato.gateway.route import Route
from mercato.gateway.routes import orders, products, users

ROUTES: Final[tuple[Route, ...]] = (*users.ROUTES, *products.ROUTES, *orders.ROUTES)
