"""The errors of the operations of orders."""

from __future__ import annotations

import datetime
from typing import Any, Final, Literal

from mercato.chassis.contract import Kind, Open, ServiceError

from .inventory import ShortLine
from .money import MoneyError

Axis = Literal["status", "payment", "fulfilment"]
"""The axes of the states of an order."""
SPOKEN_ITEMS: Final = 5
"""The sentence of an error names at most so many products without enough stock; its details name all."""


class OrderNotFound(ServiceError, code="orders.not_found", kind=Kind.NOT_FOUND):
    sentence = "There is no order {order_id}."
    order_id: int


class PriceChanged(MoneyError, code="orders.price_changed", kind=Kind.CONFLICT):
    """The client sent another total than the catalogue gives. Nothing was ordered."""

    sentence = "The catalogue's total for this order is {actual_minor}; the buyer was shown {expected_minor}."
    expected_minor: int
    expected_currency: str
    actual_minor: int
    actual_currency: str


class TooManyOpenOrders(ServiceError, code="orders.too_many_open", kind=Kind.CONFLICT):
    """Nothing was ordered. An open order is pending: neither paid, confirmed, cancelled nor expired."""

    sentence = "Customer {user_id} may have {limit} open orders; pay or cancel one of them first."
    user_id: int
    limit: int


class OrderLost(ServiceError, code="orders.lost", kind=Kind.CONFLICT):
    """The key placed an order that the shop has lost since, and this request differs from it. Nothing was ordered.

    `field`: what differs: `user_id`, `total`, `lines`; `payment`, where its money was moved since; `id`, where another
    order has its id by now.
    """

    sentence = (
        "This Idempotency-Key placed order {order_id}, which the shop has lost; "
        "its payment {payment_id} is kept, and this request differs from it in {field}."
    )
    order_id: int
    payment_id: int
    field: str


class MixedCurrencies(ServiceError, code="orders.mixed_currencies", kind=Kind.CONFLICT):
    sentence = "One order has one currency; these products are priced in {currencies}."
    currencies: tuple[str, ...]


class IllegalMove(ServiceError, code="orders.illegal_move", kind=Kind.CONFLICT):
    """The move is not legal in the order's current state. `legal` names the moves of this axis that are.

    `why`: what forbids the move, and what to do instead, where that is possible.
    """

    sentence = "Order {order_id} cannot go from {current} to {wanted}{why}; legal from here: {legal}."
    order_id: int
    axis: Open[Axis]
    current: str
    wanted: str
    legal: tuple[str, ...]
    why: str = ""

    def sentence_values(self) -> dict[str, Any]:
        return {**super().sentence_values(), "why": f", because {self.why}" if self.why else ""}


class AmountNotDue(MoneyError, code="orders.amount_not_due", kind=Kind.CONFLICT):
    """The client sent another amount than is due. Nothing was charged."""

    sentence = "For order {order_id}, {due_minor} is due, not {expected_minor}."
    order_id: int
    expected_minor: int
    expected_currency: str
    due_minor: int
    due_currency: str


class PaymentInProgress(ServiceError, code="orders.payment_in_progress", kind=Kind.CONFLICT):
    sentence = "A payment or refund of order {order_id} is under way; try again in a moment."
    order_id: int
    retry_after_s: int | None = 1


class NotPayable(ServiceError, code="orders.not_payable", kind=Kind.CONFLICT):
    """Nothing is due: all unpaid goods were returned; or staff confirmed it before shops reserved stock."""

    sentence = "Order {order_id} cannot be paid: {why}."
    order_id: int
    why: str = "nothing is due, or it was sold without stock"


class PaymentDeclined(ServiceError, code="orders.payment_declined", kind=Kind.REFUSED):
    """No money has moved. The order can be paid in another way until its stock is no longer held for it.

    `payable_until`: that time; null where the order is cancelled, or where no stock is held for the payment.
    """

    sentence = "The payment of order {order_id} was declined: {provider_code}{until}."
    order_id: int
    payment_id: int
    provider_code: str
    payable_until: datetime.datetime | None = None
    replayed: bool = False
    """An earlier request with the same key has made this payment."""

    def sentence_values(self) -> dict[str, Any]:
        until = self.payable_until and self.payable_until.astimezone(datetime.UTC)
        return {
            **super().sentence_values(),
            "until": f"; it can be paid until {until:%Y-%m-%dT%H:%M:%SZ}" if until else "",
        }


class OutOfStock(ServiceError, code="orders.out_of_stock", kind=Kind.CONFLICT):
    """The order was placed, and is cancelled. `items`: the products with too little stock. No money has moved."""

    sentence = "Order {order_id} is cancelled: there is not enough in stock of {products}."
    order_id: int
    items: tuple[ShortLine, ...]

    def sentence_values(self) -> dict[str, Any]:
        short = [f"product {i.product_id} ({i.available} of {i.requested})" for i in self.items[:SPOKEN_ITEMS]]
        more = ["more"] if len(self.items) > SPOKEN_ITEMS else []
        return {**super().sentence_values(), "products": ", ".join([*short, *more]) or "its products"}


class HoldLimit(ServiceError, code="orders.hold_limit", kind=Kind.CONFLICT):
    """The order was placed, and is cancelled: its customer's open orders hold as much as they may. No money has moved.

    `items`: the products, and how much this order could hold.
    """

    sentence = "Order {order_id} is cancelled. {explanation}"
    order_id: int
    items: tuple[ShortLine, ...]
    explanation: str


class OrderCancelled(ServiceError, code="orders.cancelled", kind=Kind.CONFLICT):
    """The operation is not possible any more. `reason`: why the order was cancelled."""

    sentence = "Order {order_id} is cancelled: {reason}."
    order_id: int
    reason: str


class NothingToRefund(MoneyError, code="orders.nothing_to_refund", kind=Kind.CONFLICT):
    """The amount is larger than what is left of the payment."""

    sentence = "Order {order_id} has {left_minor} left to refund, not {wanted_minor}."
    order_id: int
    wanted_minor: int
    left_minor: int
    currency: str


class RefundNotFound(ServiceError, code="orders.refund_not_found", kind=Kind.NOT_FOUND):
    sentence = "There is no refund {refund_id}."
    refund_id: str


class NotReturnable(ServiceError, code="orders.not_returnable", kind=Kind.CONFLICT):
    """`left`: how many pieces of the product were delivered and not returned yet."""

    sentence = "Order {order_id} has {left} of product {product_id} that could come back, not {wanted}."
    order_id: int
    product_id: int
    wanted: int
    left: int


class AlreadyClaimed(ServiceError, code="orders.already_claimed", kind=Kind.CONFLICT):
    """Only a caller with the access token of the order gets this error."""

    sentence = "Order {order_id} belongs to another account already."
    order_id: int


class EmailNotProven(ServiceError, code="orders.email_not_proven", kind=Kind.FORBIDDEN):
    sentence = "Prove the e-mail address of this account first, by the link that was mailed to it, or ask for another."


class AnotherEmail(ServiceError, code="orders.another_email", kind=Kind.FORBIDDEN):
    sentence = "Order {order_id} was placed with another e-mail address than that of this account."
    order_id: int
