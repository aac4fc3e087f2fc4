"""One thing of each kind for the rows of the API, a shop on the databases of another, and what is logged."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from mercato.chassis.observability.telemetry import configure_logging
from mercato.contracts.products import Product
from mercato.contracts.roles import CUSTOMER
from mercato.gateway.route import Route
from mercato.gateway.spans import HTTP_SECONDS
from mercato.testing.cluster import Cluster
from mercato.testing.responses import Response
from mercato.testing.shop import Shop
from mercato.testing.shop_data import (
    PASSWORD,
    Person,
    new_order,
    new_payment,
    new_product,
    new_refund,
    settled_order,
    unique,
)


class Things(msgspec.Struct, frozen=True):
    """What the ids in paths and the bodies of requests refer to."""

    person: Person
    product: Product
    order_id: int
    payment_id: int
    refund_id: str = "0" * 32
    """None that exists, where none is needed."""

    @classmethod
    async def of(cls, shop: Shop, person: Person, *, needs_refund: bool = False) -> Things:
        payment_id = await new_payment(shop, person.id)
        order = await settled_order(shop, await new_order(shop, person.id))
        made = cls(person, await new_product(shop), order.id, payment_id)
        return msgspec.structs.replace(made, refund_id=await new_refund(shop, person.id)) if needs_refund else made

    def path(self, route: Route) -> str:
        """The row's path with the id of a thing that exists."""
        if route.path == "/payments/process":
            return f"{route.path}?order_id={self.order_id}&amount=99.99"
        ids = {
            "users": self.person.id,
            "user": self.person.id,
            "customers": self.person.id,
            "products": self.product.id,
            "orders": self.order_id,
            "payments": self.payment_id,
        }
        if route.path.startswith("/refunds/"):
            return route.path.replace("{id}", self.refund_id)
        if "id" in route.text:
            return route.path.replace("{id}", "0" * 32)
        return route.path.replace("{id}", str(ids[route.path.split("/")[1]])) if "{" in route.path else route.path

    def body(self, route: Route) -> dict[str, Any] | None:
        """A body that the row takes; None for a row without one."""
        bodies: Mapping[str, dict[str, Any]] = {
            "POST /register": {"email": f"{unique('new')}@example.com", "name": "New", "password": PASSWORD},
            "POST /login": {"email": self.person.email, "password": PASSWORD},
            "POST /token/refresh": {"refresh_token": "a token that was never issued"},
            "POST /password/forgot": {"email": self.person.email},
            "POST /password/reset": {"token": "a link that was never sent", "new_password": PASSWORD},
            "POST /email/proof": {"token": "a link that was never sent"},
            "POST /logout": {"refresh_token": "a token that was never issued"},
            "PATCH /users/me": {"name": "Renamed"},
            "POST /users/me/password": {"current_password": PASSWORD, "new_password": PASSWORD},
            "DELETE /users/me": {"password": PASSWORD},
            "PATCH /users/{id}": {"name": "Renamed"},
            "PUT /users/{id}/role": {"role": CUSTOMER},
            "POST /products": {
                "sku": unique("SKU"),
                "name": "Something",
                "price": {"amount": "9.99", "currency": "USD"},
                "category": "things",
                "description": "Good",
            },
            "PATCH /products/{id}": {"name": "Something else", "price": {"amount": "8.99", "currency": "USD"}},
            "POST /products/{id}/archive": {},
            "POST /products/{id}/restore": {},
            "POST /orders": {
                "user_id": self.person.id,
                "items": [{"product_id": 100, "quantity": 1}],
                "amount": "99.99",
                "currency": "USD",
            },
            "PATCH /orders/{id}": {"status": "confirmed", "fulfilment": "shipped"},
            "POST /orders/{id}/claim": {"access_token": "A" * 43},
            "POST /orders/{id}/cancel": {"reason": "changed my mind"},
            "POST /orders/{id}/returns": {"items": [{"product_id": 100, "quantity": 1}], "reason": "does not fit"},
            "PUT /products/{id}/stock": {"on_hand": 10, "reason": "counted"},
            "POST /products/{id}/stock/adjustments": {"delta": 5, "reason": "delivery"},
            "POST /payments": {
                "order_id": self.order_id,
                "amount": "99.99",
                "currency": "USD",
                "payment_method": "sandbox:ok",
                "capture": True,
            },
            "POST /payments/{id}/capture": {"amount": "9.99", "currency": "USD"},
            "POST /payments/{id}/refunds": {"amount": "9.99", "currency": "USD", "reason": "scratched"},
        }
        return None if route.body is None else bodies[f"{route.method} {route.path}"]


class SameDatabases(Cluster):
    """A cluster for a shop that opens on the databases of another one, which has closed and left them."""

    def __init__(self, cluster: Cluster, dsns: Mapping[str, str]) -> None:
        super().__init__(cluster.folder, cluster.server)
        self._cluster = cluster
        self._dsns = dict(dsns)

    async def fresh_database(self, service: str, migrations: Path) -> str:
        return self._dsns[service]

    async def release_database(self, dsn: str) -> None:
        await self._cluster.release_database(dsn)


def without_ids(response: Response, *ids: int | str) -> tuple[int, dict[str, str], str]:
    """An answer without what may differ between two things that the caller may not see: ids and times."""
    body = response.body.decode().replace(response.json.get("trace_id", "-"), "TRACE") if response.json else ""
    for known in ids:
        body = body.replace(str(known), "ID")
    hidden = {"date", "x-request-id", "content-length"}
    return response.status, {name: value for name, value in response.headers.items() if name not in hidden}, body


class Lines:
    """What is logged from a moment on."""

    def __init__(self) -> None:
        self._stream = io.BytesIO()

    def begin(self, level: str) -> None:
        self._stream.seek(0)
        self._stream.truncate()
        configure_logging(level, self._stream)

    def all(self) -> list[dict[str, Any]]:
        return [msgspec.json.decode(line) for line in self._stream.getvalue().splitlines()]

    def named(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.all() if line["event"] == event]

    @property
    def text(self) -> str:
        return self._stream.getvalue().decode()


def requests(method: str, route: str, status: int) -> str:
    """The sample that counts such requests."""
    labels = f'http_request_method="{method}",http_response_status_code="{status}",http_route="{route}"'
    return f"{HTTP_SECONDS}_count{{{labels}}}"
