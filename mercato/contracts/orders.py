"""Orders: what was bought, at which prices, and what has become of it."""

from __future__ import annotations

import datetime
from typing import Annotated, Final, Literal

from msgspec import Meta

from mercato.chassis.contract import MAX_ID, Contract, Kind, Message, Retry, ServiceError, batched, single

from .roles import SIGNED_IN, STAFF_ONLY

OrderId = Annotated[int, Meta(ge=1, le=MAX_ID)]
Version = Annotated[int, Meta(ge=1, le=2**31 - 1)]

Status = Literal["pending", "confirmed", "completed", "cancelled"]
Payment = Literal["unpaid", "authorized", "paid", "partially_refunded", "refunded", "failed", "voided"]
Fulfilment = Literal["unfulfilled", "shipped", "delivered", "returned"]
Axis = Literal["status", "payment", "fulfilment"]

LINES_LIMIT: Final = 100
QUANTITY_LIMIT: Final = 10_000
PAGE_LIMIT: Final = 200


class PlaceLine(Message):
    product_id: Annotated[int, Meta(ge=1, le=MAX_ID)]
    quantity: Annotated[int, Meta(ge=1, le=QUANTITY_LIMIT)] = 1


class PlaceOrder(Message):
    """One order. Prices come from the catalogue; `expected_total_minor` is what the client showed to the buyer.

    With `idempotency_key`, whoever asks gets one order for one key, for ever: the same answer for the same
    `fingerprint` of the request, `IdempotencyKeyReused` for another.
    """

    user_id: Annotated[int, Meta(ge=1, le=MAX_ID)]
    lines: Annotated[tuple[PlaceLine, ...], Meta(min_length=1, max_length=LINES_LIMIT)]
    expected_total_minor: int | None = None
    expected_currency: str | None = None
    idempotency_key: str | None = None
    fingerprint: bytes = b""


class OrderLine(Message):
    product_id: int
    sku: str
    name: str
    quantity: int
    unit_price_minor: int
    line_total_minor: int


class Order(Message):
    id: OrderId
    user_id: int
    status: Status
    payment: Payment
    fulfilment: Fulfilment
    currency: str
    total_minor: int
    lines: tuple[OrderLine, ...]
    created_at: datetime.datetime
    updated_at: datetime.datetime
    version: int


class PlacedOrder(Message):
    order: Order
    """As it was when it was placed, also when the answer is replayed later."""
    replayed: bool = False


class GetOrder(Message):
    id: OrderId


class ListOrders(Message):
    """Orders by descending id, those before `before`."""

    user_id: int | None = None
    status: Status | None = None
    payment: Payment | None = None
    fulfilment: Fulfilment | None = None
    before: OrderId | None = None
    limit: Annotated[int, Meta(ge=1, le=PAGE_LIMIT)] = 50


class OrderPage(Message):
    orders: tuple[Order, ...]
    next_before: int | None = None
    """The `before` of the next page; None on the last."""


class MoveOrder(Message):
    """Moves an order along one or both of the axes that staff move. With `version`, only if it still has it."""

    id: OrderId
    status: Status | None = None
    fulfilment: Fulfilment | None = None
    version: Version | None = None


class CancelOrder(Message):
    id: OrderId
    reason: Annotated[str, Meta(max_length=500)] = ""
    version: Version | None = None


class GetHistory(Message):
    id: OrderId


class HistoryEntry(Message):
    """One move of one axis. The first entries of an order come from nowhere: `before` is None."""

    version: int
    axis: Axis
    before: str | None
    after: str
    reason: str
    actor_role: str
    actor_id: int
    at: datetime.datetime


class History(Message):
    """In the order in which it happened."""

    entries: tuple[HistoryEntry, ...]


class OrderNotFound(ServiceError, code="orders.not_found", kind=Kind.NOT_FOUND):
    sentence = "There is no order {order_id}."
    order_id: int


class PriceChanged(ServiceError, code="orders.price_changed", kind=Kind.CONFLICT):
    """The client showed another total than the catalogue gives. Nothing was ordered."""

    sentence = "The catalogue's total for this order is another one than was shown to the buyer."
    expected_minor: int
    expected_currency: str
    actual_minor: int
    actual_currency: str


class MixedCurrencies(ServiceError, code="orders.mixed_currencies", kind=Kind.CONFLICT):
    sentence = "One order has one currency; these products are priced in {currencies}."
    currencies: tuple[str, ...]


class IllegalMove(ServiceError, code="orders.illegal_move", kind=Kind.CONFLICT):
    """The order is not where that move starts. `legal` names the moves of this axis that it can make now."""

    sentence = "Order {order_id} cannot go from {current} to {wanted}; legal from here: {legal}."
    order_id: int
    axis: Axis
    current: str
    wanted: str
    legal: tuple[str, ...]


class Orders(Contract, name="orders"):
    """Orders and their history. Customers place, see and cancel their own; staff see and move all."""

    place = batched(PlaceOrder, PlacedOrder, allow=SIGNED_IN, size=256, retry=Retry.KEYED)
    get = batched(GetOrder, Order, allow=SIGNED_IN, retry=Retry.SAFE)
    list = single(ListOrders, OrderPage, allow=SIGNED_IN, retry=Retry.SAFE)
    move = single(MoveOrder, Order, allow=STAFF_ONLY)
    cancel = single(CancelOrder, Order, allow=SIGNED_IN)
    history = single(GetHistory, History, allow=SIGNED_IN, retry=Retry.SAFE)
