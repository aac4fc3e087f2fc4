"""The event of a refund."""

from __future__ import annotations

from typing import ClassVar

from mercato.chassis.contract import Message


class OrderRefunded(Message):
    """`refund.succeeded`: money of an order was refunded, by a refund, a return, or because it was cancelled.

    Amounts in minor units. Not emitted for money that a checkout took and returned before the order was paid.
    """

    order_id: int
    user_id: int
    """0: the order is a guest's."""
    refund_id: str
    """Unique within the order. `cancel`: the refund of a cancelled order."""
    amount_minor: int
    refunded_minor: int
    """The refunded total of the order, with this amount."""
    currency: str
    version: int
    actor_role: str
    actor_id: int
    """The account that requested the refund, or cancelled the order; 0: a caller without an account, or the shop."""
    about_field: ClassVar = "order_id"
