"""The event of money that was given back."""

from __future__ import annotations

from mercato.chassis.contract import Message


class OrderRefunded(Message):
    """`refund.succeeded`: money of an order was given back, by a refund, a return, or because it was cancelled.

    Amounts in minor units. Not emitted for what a checkout took and gave back before the order was paid.
    """

    order_id: int
    user_id: int
    """0: the order is a guest's."""
    refund_id: str
    """`cancel`: what cancelling the order has given back. With the order, names one refund."""
    amount_minor: int
    refunded_minor: int
    """Of the order, with this amount."""
    currency: str
    version: int
    actor_role: str
    actor_id: int
    """Who asked for the refund, or has cancelled the order; 0 for callers without an account, and for the shop."""
