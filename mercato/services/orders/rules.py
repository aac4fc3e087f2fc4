"""What may happen to an order. Pure: no I/O, no clock.

The three tables of moves are the only place where an order's life is written down: the guard of every UPDATE, the
error that lists the legal moves, and the test over all pairs are derived from them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import msgspec

from mercato.chassis.contract import Actor, FieldError, InvalidRequest
from mercato.contracts.orders import (
    Axis,
    IllegalMove,
    MixedCurrencies,
    Order,
    OrderLine,
    PlaceLine,
    PlaceOrder,
    PriceChanged,
)
from mercato.contracts.products import Quote
from mercato.contracts.roles import CUSTOMER

Moves = Mapping[str, frozenset[str]]


def _moves(table: Mapping[str, Iterable[str]]) -> Moves:
    return {before: frozenset(after) for before, after in table.items()}


STATUS: Final[Moves] = _moves(
    {
        "pending": {"confirmed", "cancelled"},
        "confirmed": {"completed", "cancelled"},
        "completed": set(),
        "cancelled": set(),
    }
)

PAYMENT: Final[Moves] = _moves(
    {
        "unpaid": {"authorized", "failed"},
        "authorized": {"paid", "voided"},
        "paid": {"partially_refunded", "refunded"},
        "partially_refunded": {"refunded"},
        "refunded": set(),
        "failed": set(),
        "voided": set(),
    }
)

FULFILMENT: Final[Moves] = _moves(
    {
        "unfulfilled": {"shipped"},
        "shipped": {"delivered"},
        "delivered": {"returned"},
        "returned": set(),
    }
)

AXES: Final[Mapping[Axis, Moves]] = {"status": STATUS, "payment": PAYMENT, "fulfilment": FULFILMENT}

SHIPPABLE: Final = frozenset({"confirmed", "completed"})
"""Goods move only for an order that was confirmed and is not cancelled."""

PLACED: Final[Mapping[Axis, str]] = {"status": "pending", "payment": "unpaid", "fulfilment": "unfulfilled"}
"""Where every order begins."""


def as_placed(order: Order) -> Order:
    """An order as it was when it was placed. Lines, total and currency stay as they were written."""
    return msgspec.structs.replace(
        order,
        status=PLACED["status"],
        payment=PLACED["payment"],
        fulfilment=PLACED["fulfilment"],
        version=1,
        updated_at=order.created_at,
    )


def sources(axis: Axis, wanted: str) -> list[str]:
    """The states from which `wanted` can be reached in one move."""
    return sorted(before for before, after in AXES[axis].items() if wanted in after)


def legal_moves(order: Order, axis: Axis) -> tuple[str, ...]:
    """Where this order can go next on an axis."""
    if axis == "fulfilment" and order.status not in SHIPPABLE:
        return ()
    return tuple(sorted(AXES[axis][getattr(order, axis)]))


def check_move(order: Order, axis: Axis, wanted: str) -> None:
    """Raises `IllegalMove`, which lists the legal ones."""
    legal = legal_moves(order, axis)
    if wanted not in legal:
        raise IllegalMove(order_id=order.id, axis=axis, current=getattr(order, axis), wanted=wanted, legal=legal)


def check_cancel(order: Order, actor: Actor) -> None:
    """A customer cancels what has not been shipped; staff cancel whatever the status allows. Raises `IllegalMove`."""
    if actor.role == CUSTOMER and order.fulfilment != "unfulfilled":
        raise IllegalMove(order_id=order.id, axis="status", current=order.status, wanted="cancelled", legal=())
    check_move(order, "status", "cancelled")


def may_see(actor: Actor, user_id: int) -> bool:
    """Customers see their own; staff, and services on behalf of the shop, see all."""
    return actor.role != CUSTOMER or actor.id == user_id


def check_lines(lines: Sequence[PlaceLine]) -> InvalidRequest | None:
    """A product stands in one line of an order: stock is reserved by order and product."""
    first: dict[int, int] = {}
    errors: list[FieldError] = []
    for i, line in enumerate(lines):
        j = first.setdefault(line.product_id, i)
        if j != i:
            message = f"product {line.product_id} stands in items[{j}] already; give one item with the whole quantity"
            errors.append(FieldError(field=f"items[{i}].product_id", message=message))
    return InvalidRequest(errors=tuple(errors)) if errors else None


def priced(lines: Sequence[PlaceLine], quotes: Mapping[int, Quote]) -> tuple[OrderLine, ...]:
    """The lines as the order keeps them: named and priced as the catalogue says at this moment."""
    return tuple(
        OrderLine(
            product_id=line.product_id,
            sku=quote.sku,
            name=quote.name,
            quantity=line.quantity,
            unit_price_minor=quote.price_minor,
            line_total_minor=quote.price_minor * line.quantity,
        )
        for line in lines
        for quote in (quotes[line.product_id],)
    )


def total(lines: Sequence[OrderLine]) -> int:
    return sum(line.line_total_minor for line in lines)


def currency_of(lines: Sequence[PlaceLine], quotes: Mapping[int, Quote]) -> str | MixedCurrencies:
    first = quotes[lines[0].product_id].currency
    if len(lines) > 1 and any(quotes[line.product_id].currency != first for line in lines):
        return MixedCurrencies(currencies=tuple(sorted({quotes[line.product_id].currency for line in lines})))
    return first


def check_total(request: PlaceOrder, actual_minor: int, currency: str) -> PriceChanged | None:
    """What the client showed to the buyer, amount and currency, must be what the catalogue says."""
    shown, shown_currency = request.expected_total_minor, request.expected_currency
    if (shown is None or shown == actual_minor) and (shown_currency is None or shown_currency == currency):
        return None
    return PriceChanged(
        expected_minor=actual_minor if shown is None else shown,
        expected_currency=shown_currency or currency,
        actual_minor=actual_minor,
        actual_currency=currency,
    )
