"""Messages of the contracts with sensible defaults: a test names only what it is about."""

from __future__ import annotations

import datetime
from typing import Final

from mercato.contracts.inventory import StockLine
from mercato.contracts.orders import Order, Status
from mercato.contracts.products import Product, Quote
from mercato.contracts.users import User

EPOCH: Final = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
MUG: Final = 1
LAMP: Final = 2


def user(user_id: int) -> User:
    return User(
        id=user_id,
        email=f"{user_id}@example.com",
        name=str(user_id),
        role="customer",
        created_at=EPOCH,
        updated_at=EPOCH,
        version=1,
    )


def product(product_id: int) -> Product:
    return Product(
        id=product_id,
        sku=f"SKU-{product_id}",
        name=f"Thing {product_id}",
        description="",
        price_minor=100,
        currency="USD",
        category="things",
        status="active",
        created_at=EPOCH,
        updated_at=EPOCH,
        version=1,
    )


def quote(product_id: int, price_minor: int, currency: str = "USD") -> Quote:
    return Quote(
        id=product_id, sku=f"SKU-{product_id}", name=f"Thing {product_id}", price_minor=price_minor, currency=currency
    )


def order(order_id: int, status: Status) -> Order:
    """An unpaid order of Alice's without lines."""
    return Order(
        id=order_id,
        user_id=1,
        status=status,
        payment="unpaid",
        fulfilment="unfulfilled",
        currency="USD",
        total_minor=0,
        lines=(),
        created_at=EPOCH,
        updated_at=EPOCH,
        version=1,
    )


def stock_lines(**quantities: int) -> tuple[StockLine, ...]:
    """`stock_lines(mug=2, lamp=1)`; other products by number: `stock_lines(p7=1)`."""
    ids = {"mug": MUG, "lamp": LAMP}
    return tuple(StockLine(product_id=ids.get(n) or int(n[1:]), quantity=q) for n, q in quantities.items())
