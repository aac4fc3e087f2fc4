"""People, products and orders for tests of the API: each test makes its own, so that none sees another's."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from mercato import topology
from mercato.chassis.postgres.outbox_row import end_of_row
from mercato.contracts.orders import AwaitOrder, Orders, PayOrder, PlaceLine, PlaceOrder
from mercato.contracts.products import CreateProduct, Product, Products
from mercato.contracts.roles import CUSTOMER, Role
from mercato.contracts.users import Register, Users
from mercato.gateway.route import Route
from mercato.testing.harness import Cluster
from mercato.testing.shop import Reply, Shop

PASSWORD = "a password that is long enough"
UNKNOWN_ID = 2**53 - 1

_numbers = itertools.count(1)


def unique(prefix: str) -> str:
    """A word that no other test of this run, and no test of another process, has."""
    return f"{prefix}-{os.getpid()}-{next(_numbers)}"


class Person(msgspec.Struct, frozen=True):
    """Somebody with an account. `token` is an access token; None in an open shop, where nobody needs one."""

    id: int
    email: str
    token: str | None


async def somebody(shop: Shop, role: Role = CUSTOMER) -> Person:
    users = shop.rig.client(Users)
    email = f"{unique('somebody')}@example.com"
    account = Register(email=email, name="Somebody", password=PASSWORD, role=role)
    user = await topology.as_the_shop(shop.rig.host, lambda: users.register(account))
    token = None if shop.is_open else await shop.token(email, PASSWORD)
    return Person(user.id, email, token)


async def new_product(shop: Shop, price_minor: int = 99_99, currency: str = "USD") -> Product:
    products = shop.rig.client(Products)
    made = CreateProduct(
        sku=unique("SKU"), name="Something", price_minor=price_minor, currency=currency, category="things"
    )
    return await topology.as_the_shop(shop.rig.host, lambda: products.create(made))


async def new_order(shop: Shop, user_id: int, product_id: int = 100) -> int:
    orders = shop.rig.client(Orders)
    wanted = PlaceOrder(user_id=user_id, lines=(PlaceLine(product_id=product_id),))
    placed = await topology.as_the_shop(shop.rig.host, lambda: orders.place(wanted))
    return placed.order.id


async def new_payment(shop: Shop, user_id: int) -> int:
    """A payment that was authorized, and may be captured or voided."""
    order_id, orders = await new_order(shop, user_id), shop.rig.client(Orders)
    held = AwaitOrder(id=order_id, wait_ms=10_000)
    await topology.as_the_shop(shop.rig.host, lambda: orders.settled(held))
    paid = await topology.as_the_shop(shop.rig.host, lambda: orders.pay(PayOrder(id=order_id, capture=False)))
    return paid.payment.id


async def staff_token(shop: Shop) -> str | None:
    """What a caller needs to act as staff; None in an open shop."""
    return None if shop.is_open else await shop.staff()


# ------------------------------------------------------------------------------------------------------ rows


class Things(msgspec.Struct, frozen=True):
    """What rows with an id in their path and rows with a body speak about."""

    person: Person
    product: Product
    order_id: int
    payment_id: int

    @classmethod
    async def of(cls, shop: Shop, person: Person) -> Things:
        payment_id, order_id = await new_payment(shop, person.id), await new_order(shop, person.id)
        held = AwaitOrder(id=order_id, wait_ms=10_000)
        await topology.as_the_shop(shop.rig.host, lambda: shop.rig.client(Orders).settled(held))
        return cls(person, await new_product(shop), order_id, payment_id)

    def path(self, route: Route) -> str:
        """The row's path with the id of a thing that exists."""
        ids = {
            "users": self.person.id,
            "products": self.product.id,
            "orders": self.order_id,
            "payments": self.payment_id,
        }
        return route.path.replace("{id}", str(ids[route.path.split("/")[1]])) if "{" in route.path else route.path

    def body(self, route: Route) -> dict[str, Any] | None:
        """A body that the row takes; None for a row without one."""
        bodies: Mapping[str, dict[str, Any]] = {
            "POST /register": {"email": f"{unique('new')}@example.com", "name": "New", "password": PASSWORD},
            "POST /login": {"email": self.person.email, "password": PASSWORD},
            "POST /token/refresh": {"refresh_token": "a token that nobody has"},
            "POST /logout": {"refresh_token": "a token that nobody has"},
            "PATCH /users/me": {"name": "Renamed"},
            "POST /users/me/password": {"current_password": PASSWORD, "new_password": PASSWORD},
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
            "POST /orders": {
                "user_id": self.person.id,
                "items": [{"product_id": 100, "quantity": 1}],
                "amount": "99.99",
                "currency": "USD",
            },
            "PATCH /orders/{id}": {"status": "confirmed", "fulfilment": "shipped"},
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
            "POST /payments/{id}/refunds": {"amount": "9.99", "currency": "USD", "reason": "scratched"},
        }
        return None if route.body is None else bodies[f"{route.method} {route.path}"]


# ------------------------------------------------------------------------------------------------------ state


BACKGROUND = {"outbox_readers", "reconciliation", "saga_drivers"}
"""Tables in which the shop notes what it is doing by itself."""


async def state_of(shop: Shop) -> dict[str, str]:
    """A digest of every row of every table, by service and table: equal when nothing was changed.

    Waits until nothing is under way: what was placed is carried on, and told, in the background.
    """
    await _at_rest(shop)
    digests: dict[str, str] = {}
    for name, service in shop.rig.host.services.items():
        async with service.database.read() as tx:
            tables = await tx.fetch_values(str, "SELECT tablename::text FROM pg_tables WHERE schemaname = 'public'")
            for table in set(tables) - BACKGROUND:
                [digest] = await tx.fetch_values(
                    str,
                    f"SELECT count(*) || coalesce(md5(string_agg(t::text, '' ORDER BY t::text)), '') FROM {table} t",
                )
                digests[f"{name}.{table}"] = digest
    return digests


async def _at_rest(shop: Shop) -> None:
    for _ in range(5_000):
        if not await _is_busy(shop):
            return
        await asyncio.sleep(0.02)
    raise AssertionError("the shop does not come to rest")


async def _is_busy(shop: Shop) -> bool:
    driven = "SELECT 1 FROM sagas WHERE driver IS NOT NULL OR (wake_at IS NOT NULL AND step <> 'awaiting') LIMIT 1"
    async with shop.rig.host.services["orders"].database.read() as tx:
        if await tx.fetch_values(int, driven):
            return True
    # In this order: the last step of a saga emits an event.
    for consumer in shop.rig.host.consumers:
        name, source = consumer.key
        async with shop.rig.host.services[source].database.read() as tx:
            [last] = await tx.fetch_values(int, "SELECT coalesce(max(id), 0) FROM outbox")
        async with shop.rig.host.services[name.partition(".")[0]].database.read() as tx:
            read = "SELECT 1 FROM cursors WHERE consumer = $1 AND source = $2 AND position >= $3"
            if not await tx.fetch_values(int, read, name, source, end_of_row(last)):
                return True
    return False


class SameDatabases:
    """A cluster for a shop that opens where another one has closed. `shop` is closed without dropping its databases."""

    def __init__(self, cluster: Cluster, dsns: Mapping[str, str]) -> None:
        self._cluster = cluster
        self._dsns = dict(dsns)

    async def fresh_database(self, service: str, migrations: Path) -> str:
        return self._dsns[service]

    async def release_database(self, dsn: str) -> None:
        await self._cluster.release_database(dsn)


def without_ids(reply: Reply, *ids: int) -> tuple[int, dict[str, str], str]:
    """An answer without what may differ between two things that the caller may not see: ids, and who asked when."""
    body = reply.body.decode().replace(reply.json.get("trace_id", "-"), "TRACE") if reply.json else ""
    for known in ids:
        body = body.replace(str(known), "ID")
    hidden = {"date", "x-request-id", "content-length"}
    return reply.status, {name: value for name, value in reply.headers.items() if name not in hidden}, body


def assert_problem(reply: Reply, status: int, code: str) -> None:
    """That an answer is a whole RFC 9457 problem with this status and code."""
    assert reply.status == status, reply.body
    assert reply.headers["content-type"] == "application/problem+json", reply.headers
    assert reply.code == code, reply.body
    assert reply.json["status"] == status
    # The server refuses some requests before the API sees them; its problems have no page of their own.
    assert reply.json["type"] in (f"/docs/problems#{code}", "about:blank")
    assert reply.json["title"]
    assert reply.json["detail"]
    assert len(reply.json["trace_id"]) == 32
    assert int(reply.json["trace_id"], 16), "a trace id of zeros names no trace"
