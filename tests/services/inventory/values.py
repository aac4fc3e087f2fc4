"""Levels, reservations and requests as the rules of stock take them."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

from mercato.contracts.inventory import (
    Level,
    ReserveStock,
    StockLine,
)
from mercato.services.inventory import rules
from mercato.services.inventory.rules import (
    ReservedLine,
    StoredReservation,
)
from mercato.testing.builders import stock_lines
from services.inventory.harness import NONCE

NOW = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
HOLD_SECONDS = 10.0


def level(product_id: int, on_hand: int, reserved: int = 0, version: int = 1) -> Level:
    return Level(
        product_id=product_id,
        on_hand=on_hand,
        reserved=reserved,
        available=on_hand - reserved,
        updated_at=NOW,
        version=version,
    )


def stored(
    order_id: int, state: Any = "held", *, expires_in_s: float | None = 5.0, **quantities: int
) -> StoredReservation:
    held = reserved(stock_lines(**quantities))
    return StoredReservation(order_id, NONCE, state, 1, expires_in_s if state == "held" else None, held)


def reserved(wanted: Sequence[StockLine]) -> tuple[ReservedLine, ...]:
    return tuple(ReservedLine(line.product_id, line.quantity) for line in rules.in_product_order(wanted))


def ask(order_id: int, wanted: tuple[StockLine, ...], *, for_payment: bool = True) -> ReserveStock:
    return ReserveStock(
        order_id=order_id, lines=wanted, for_payment=for_payment, idempotency_key="k", order_nonce=NONCE
    )
