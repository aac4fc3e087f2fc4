"""The state machines of an order, one for each of its axes.

These tables are the only definition of the legal moves: the guard of every UPDATE, the error that lists the legal
moves, the diagram in the documentation and the test over all pairs are derived from them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from mercato.contracts.order_refusals import Axis

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
        "unpaid": {"authorized", "paid", "failed"},
        # To refunded: it was captured during the cancellation of the order. To unpaid: the authorization of an order
        # that was sold on account expired; the order stays sold.
        "authorized": {"paid", "voided", "refunded", "unpaid"},
        "paid": {"partially_refunded", "refunded"},
        "partially_refunded": {"partially_refunded", "refunded"},
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
