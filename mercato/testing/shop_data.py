"""People, products, orders and payments of a running shop: each test creates its own."""

from __future__ import annotations

import base64
import hashlib
import hmac
import itertools
import os
import uuid
from typing import Final

import msgspec

from mercato import topology
from mercato.chassis.hosting.keys import key_deriver, service_secrets
from mercato.contracts.orders import AwaitOrder, Order, Orders, PayOrder, PlaceLine, PlaceOrder, RefundOrder
from mercato.contracts.products import CreateProduct, Product, Products
from mercato.contracts.roles import CUSTOMER, Role
from mercato.contracts.users import Register, Users
from mercato.services.users.letters import KEY_PURPOSE as LINKS_PURPOSE

from .harness import TEST_SECRET
from .shop import Shop

PASSWORD: Final = "a password that is long enough"
UNKNOWN_ID: Final = 2**53 - 1
SETTLED_MS: Final = 10_000

_numbers = itertools.count(1)


def unique(prefix: str) -> str:
    """A text that no other test of this run, or of another process, has."""
    return f"{prefix}-{os.getpid()}-{next(_numbers)}"


class Person(msgspec.Struct, frozen=True):
    """The owner of an account. `token` is an access token; None in an open shop, which needs none."""

    id: int
    email: str
    token: str | None


async def new_person(shop: Shop, role: Role = CUSTOMER) -> Person:
    users = shop.harness.client(Users)
    email = f"{unique('person')}@example.com"
    account = Register(email=email, name="Person", password=PASSWORD, role=role)
    user = await topology.as_the_shop(shop.harness.host, lambda: users.register(account))
    token = None if shop.is_open else await shop.token(email, PASSWORD)
    return Person(user.id, email, token)


async def new_product(shop: Shop, price_minor: int = 99_99, currency: str = "USD") -> Product:
    products = shop.harness.client(Products)
    made = CreateProduct(
        sku=unique("SKU"), name="Something", price_minor=price_minor, currency=currency, category="things"
    )
    return await topology.as_the_shop(shop.harness.host, lambda: products.create(made))


async def new_order(shop: Shop, user_id: int, product_id: int = 100) -> int:
    """The id of an order of one piece; its checkout runs."""
    orders = shop.harness.client(Orders)
    wanted = PlaceOrder(user_id=user_id, lines=(PlaceLine(product_id=product_id),))
    placed = await topology.as_the_shop(shop.harness.host, lambda: orders.place(wanted))
    return placed.order.id


async def settled_order(shop: Shop, order_id: int) -> Order:
    """An order once no work of its sagas is due, or after `SETTLED_MS`, without an error."""
    orders = shop.harness.client(Orders)
    return await topology.as_the_shop(
        shop.harness.host, lambda: orders.settled(AwaitOrder(id=order_id, wait_ms=SETTLED_MS))
    )


async def new_payment(shop: Shop, user_id: int) -> int:
    """The id of an authorized payment, which can be captured or voided."""
    order = await settled_order(shop, await new_order(shop, user_id))
    orders = shop.harness.client(Orders)
    paid = await topology.as_the_shop(shop.harness.host, lambda: orders.pay(PayOrder(id=order.id, capture=False)))
    return paid.payment.id


async def new_refund(shop: Shop, user_id: int) -> str:
    """The id of a refund of a paid order."""
    order = await settled_order(shop, await new_order(shop, user_id))
    orders, key = shop.harness.client(Orders), unique("refund")
    paid = await topology.as_the_shop(shop.harness.host, lambda: orders.pay(PayOrder(id=order.id)))
    wanted = RefundOrder(payment_id=paid.payment.id, idempotency_key=key)
    return (await topology.as_the_shop(shop.harness.host, lambda: orders.refund(wanted))).id


async def staff_token(shop: Shop) -> str | None:
    """The access token of staff; None in an open shop."""
    return None if shop.is_open else await shop.staff()


async def token_of(shop: Shop, kind: str, user_id: int) -> str:
    """The token after # in the link of the newest letter, computed as the service does; this shop sends no letters."""
    newest = "SELECT id FROM letters WHERE kind = $1 AND user_id = $2 ORDER BY created_at DESC LIMIT 1"
    [letter] = await shop.harness.values(newest, kind, user_id, of="users")
    raw, key = (
        uuid.UUID(str(letter)).bytes,
        key_deriver(service_secrets(TEST_SECRET, ["users"])["users"])(LINKS_PURPOSE),
    )
    return base64.urlsafe_b64encode(raw + hmac.digest(key, f"{kind}/".encode() + raw, hashlib.sha256)).decode()
