"""Orders: what was bought, at which prices, and in which state it is."""

from __future__ import annotations

import datetime
from typing import Annotated, ClassVar, Final, Literal, get_args

from msgspec import Meta

from mercato.chassis.contract import MAX_ID, Contract, Message, Open, Retry, batched, filled, single, worded

from .inventory import NO_NUL, ShortLine
from .money import AmountText
from .order_history import History, Timeline
from .payments import Method, Payment as PaymentRecord
from .products import Sku
from .refunds import OrderRefunded
from .roles import ALL_ROLES, SIGNED_IN, STAFF_ONLY
from .users import Email

OrderId = Annotated[int, Meta(ge=1, le=MAX_ID)]
PaymentId = Annotated[int, Meta(ge=1, le=MAX_ID)]
Version = Annotated[int, Meta(ge=1, le=2**31 - 1)]

Status = Literal["pending", "confirmed", "completed", "cancelled"]
Payment = Literal["unpaid", "authorized", "paid", "partially_refunded", "refunded", "failed", "voided"]
Fulfilment = Literal["unfulfilled", "shipped", "delivered", "returned"]
CHANGES: Final = (
    *("placed", "confirmed", "completed", "cancelled"),
    *get_args(Payment),
    *("shipped", "delivered", "returned", "partially_returned", "claimed"),
)
"""The changes of an order of which events are emitted: `order.placed`, and so on."""
CancelCode = Literal[
    "requested", "out_of_stock", "payment_declined", "payment_lost", "expired", "stock_lost", "hold_limit"
]

PAID: Final = frozenset({"paid", "partially_refunded", "refunded"})
"""States of a payment whose money was taken, whether or not it was refunded since."""

LINES_LIMIT: Final = 100
QUANTITY_LIMIT: Final = 10_000
PAGE_LIMIT: Final = 200
SCANNED_AT_ONCE: Final = 10_000
REFUSED_MINOR: Final = MAX_ID
"""An amount that is more than any order has left: a refund of it is refused, with what is left (`RefundOrder`)."""
NAMED_BY_SKU: Final = MAX_ID
"""The product id of a line that names its product by SKU; no product has it."""
NO_USER: Final = MAX_ID
"""The user id of a request that a guest makes; no account has it."""

Note = Annotated[str, Meta(max_length=500, pattern=r"^[^\x00]*\Z", extra=NO_NUL)]
"""A customer's note to the shop about an order. Public: shown to all who may see the order."""
AccessToken = Annotated[str, Meta(max_length=64)]
"""Of a guest's order. With a wrong token the answer is the one for an unknown order: not found."""
Fingerprint = Annotated[bytes, Meta(extra=filled("fingerprint"))]
"""Equal for requests with the same meaning: a key that comes again with another one is refused."""
Amount = Annotated[AmountText, Meta(extra=filled("default"))]
"""Of the HTTP API, whose clients send amounts in major units."""
InternalNote = Annotated[str, Meta(max_length=500)]
"""A note of staff for staff. Customers and guests never see it; a `reason` is for them."""


class PlaceLine(Message):
    product_id: Annotated[int, Meta(ge=1, le=MAX_ID)]
    quantity: Annotated[int, Meta(ge=1, le=QUANTITY_LIMIT)] = 1
    sku: Annotated[Sku | None, Meta(extra=filled("default"))] = None
    """Instead of `product_id`, which is `NAMED_BY_SKU` then: a service that does not know this field yet refuses it."""


class PlaceOrder(Message):
    """One order. Prices come from the catalogue; `expected_total_minor` is what the client showed to the buyer.

    With `payment_method` it is paid at once. Without one, or where that payment is declined, its stock is held until it
    is paid or expires. An order whose total is 0 is paid without a payment.

    With `idempotency_key`, an account gets one order for one key, without a time limit: the same answer for the same
    `fingerprint` of the request, `IdempotencyKeyReused` for another.
    """

    user_id: Annotated[int, Meta(ge=1, le=MAX_ID, extra=filled("buyer"))]
    lines: Annotated[tuple[PlaceLine, ...], Meta(min_length=1, max_length=LINES_LIMIT)]
    expected_total_minor: int | None = None
    expected_currency: str | None = None
    idempotency_key: str | None = None
    fingerprint: Fingerprint = b""
    payment_method: Method | None = None
    customer_note: Note = ""
    expected_total: Amount | None = None
    """As `expected_total_minor`, in the currency of the order."""
    guest: Annotated[bool, Meta(extra=filled("guest"))] = False
    """A guest orders. `user_id` is ignored then; it is `NO_USER`, which a service that knows no guests refuses."""
    guest_email: Email | None = None
    """Shown to staff."""


class OrderLine(Message):
    """Amounts in minor units of the order's currency. `line_total_minor` is what is paid for the line:
    `quantity * unit_price_minor - discount_minor + tax_minor`."""

    id: int
    """1 for the first line of an order, and so on. Lines never change."""
    product_id: int
    sku: str
    name: str
    quantity: int
    unit_price_minor: int
    discount_minor: int
    tax_minor: int
    line_total_minor: int
    returned: int = 0
    """How many of `quantity` have been returned."""


class CancelReason(Message):
    """Why an order was cancelled: a code for programs, and a message for people."""

    code: Open[CancelCode]
    message: str = ""
    """Written by the actor who cancelled it; of `hold_limit`, the bound of each product and the remedy."""
    provider_code: str | None = None
    """The payment provider's, such as `insufficient_funds`."""
    lines: tuple[ShortLine, ...] = ()
    """The lines that were short of stock, with what was available."""


class Order(Message):
    id: OrderId
    user_id: int
    """0 (`GUEST_USER`): it is a guest's."""
    status: Open[Status]
    payment: Open[Payment]
    fulfilment: Open[Fulfilment]
    currency: str
    total_minor: int
    lines: tuple[OrderLine, ...]
    created_at: datetime.datetime
    updated_at: datetime.datetime
    version: int
    refunded_minor: int = 0
    reason: CancelReason | None = None
    """Of a cancelled order."""
    customer_note: str = ""
    waived_minor: int = 0
    """The part of the total that is not taken: goods were returned before they were paid, or a part was captured."""
    guest_email: str | None = None
    """Of a guest's order, where one was given. Shown to staff only."""


class PlacedOrder(Message):
    order: Order
    """The order as it was when it was placed, also when the answer is replayed later."""
    replayed: bool = False
    access_token: str | None = None
    """Of a guest's order: a caller that sends it may see, pay and cancel the order."""


class GetOrder(Message):
    id: OrderId
    access_token: AccessToken | None = None


Time = Annotated[datetime.datetime, Meta(tz=True)]


class ListOrders(Message):
    """Orders by descending id, those before `before`; with `product_id`, those that have the product in a line."""

    user_id: int | None = None
    product_id: int | None = None
    status: Status | None = None
    payment: Payment | None = None
    fulfilment: Fulfilment | None = None
    before: OrderId | None = None
    limit: Annotated[int, Meta(ge=1, le=PAGE_LIMIT)] = 50
    created_from: Time | None = None
    created_to: Time | None = None
    """Those placed from `created_from` on, and before `created_to`."""
    currency: str | None = None
    min_total_minor: Annotated[int, Meta(ge=0)] | None = None
    max_total_minor: Annotated[int, Meta(ge=0)] | None = None
    text: Annotated[str, Meta(max_length=200, pattern=r"^[^\x00]*\Z", extra=NO_NUL)] | None = None
    """Digits alone are an id; any other text is searched in the `customer_note`, without case."""
    count: bool = False
    """Whether `total` of the page is asked for."""


class OrderPage(Message):
    orders: tuple[Order, ...]
    next_before: int | None = None
    """The `before` of the next page; None on the last. With times, totals or a text, a page that is not the last may
    have fewer orders than were asked for, also none: one page scans at most `SCANNED_AT_ONCE` orders."""
    total: int | None = None
    """All that the filters match, whatever the page; None where it is not asked for, or takes too long to count."""


class MoveOrder(Message):
    """Moves an order along one or both of the axes that staff move. With `version`, only if it still has it."""

    id: OrderId
    status: Status | None = None
    fulfilment: Fulfilment | None = None
    version: Version | None = None


class CancelOrder(Message):
    id: OrderId
    reason: Annotated[str, Meta(max_length=500)] = ""
    """Public: it is shown with the order."""
    version: Version | None = None
    access_token: AccessToken | None = None
    internal_note: InternalNote = ""
    """Staff alone may give one."""


class ClaimOrder(Message):
    """The caller's account, whose e-mail address is proven, becomes the owner of a guest's order.

    Where the order has an e-mail address, it must be that of the account. A repetition answers with the order.
    """

    id: OrderId
    access_token: AccessToken


class AwaitOrder(Message):
    """Waits until no process works on the order: it is paid, cancelled, or waits for its payment."""

    id: OrderId
    wait_ms: Annotated[int, Meta(ge=0, le=60_000)]
    access_token: AccessToken | None = None
    refusals: bool = False
    """Whether an order that was refused, and is not paid since, is answered with the reason: `OutOfStock`,
    `HoldLimit`, `PaymentDeclined` or `OrderCancelled`. Otherwise the answer is the order in whichever state."""


class PayOrder(Message):
    """Pays an order that is not paid yet. `expected_total_minor` is what the client thinks is due.

    With an `idempotency_key` a repetition joins the first request: it is answered with the payment of the first.
    """

    id: OrderId
    method: Method | None = None
    """None: the shop's default."""
    capture: bool = True
    """False: the amount is reserved, and taken when `capture` is called. For staff."""
    expected_total_minor: int | None = None
    expected_currency: str | None = None
    idempotency_key: str | None = None
    fingerprint: Fingerprint = b""
    expected_total: Amount | None = None
    """As `expected_total_minor`, in the currency of the order."""
    access_token: AccessToken | None = None


class PaidOrder(Message):
    payment: PaymentRecord
    """`pending` where the provider's answer is not known before the deadline."""
    replayed: bool = False


class GetGuestPayment(Message):
    """A payment of the guest's order whose access token is sent. Any other payment is `payments.not_found`."""

    payment_id: PaymentId
    access_token: AccessToken


class MovePayment(Message):
    """Captures or voids the payment of an order that waits for that."""

    payment_id: PaymentId


class CapturePart(Message):
    """Captures a payment that was authorized: an amount of it, or all. The rest is released, and not due any more.

    Once, with one amount: with another one it is `payments.CaptureAmountChanged`.
    """

    payment_id: PaymentId
    amount_minor: Annotated[int, Meta(ge=1)] | None = None
    currency: str | None = None
    amount: Amount | None = None
    """As `amount_minor`, in the currency of the order, and before it."""


class RefundOrder(Message):
    """Refunds all that is left of what was paid, or an amount of it. Once for each key, without a time limit."""

    payment_id: PaymentId
    idempotency_key: str
    fingerprint: Fingerprint = b""
    amount_minor: Annotated[int, Meta(ge=1)] | None = None
    currency: str | None = None
    reason: Annotated[str, Meta(max_length=500)] = ""
    amount: Amount | None = None
    """As `amount_minor`, in the currency of the order, and before it.

    A service that does not know this field yet must not refund all that is left: the sender also gives
    `REFUSED_MINOR` as `amount_minor`, which is more than any order has left.
    """
    internal_note: InternalNote = ""


class ReturnLine(Message):
    """A quantity of one line, which is named by its id, or by its product. Answers name both."""

    quantity: Annotated[int, Meta(ge=1, le=QUANTITY_LIMIT)]
    line_id: Annotated[int, Meta(ge=1, le=LINES_LIMIT)] | None = None
    product_id: Annotated[int, Meta(ge=1, le=MAX_ID)] | None = None


class ReturnOrder(Message):
    """Returns goods of a delivered order: they are restocked, and what was paid for them is refunded.

    Without `lines`, everything that was not returned yet. Once for each key, without a time limit.
    """

    id: OrderId
    idempotency_key: str
    fingerprint: Fingerprint = b""
    lines: Annotated[tuple[ReturnLine, ...], Meta(max_length=LINES_LIMIT)] = ()
    reason: Annotated[str, Meta(max_length=500)] = ""
    internal_note: InternalNote = ""


RefundStatus = Literal["pending", "succeeded", "declined"]
RefundId = Annotated[
    str,
    Meta(
        pattern=r"^[0-9a-z]{1,60}\Z",
        extra=worded("must be 1 to 60 digits and small letters"),
        examples=["0f3a5c7e9b1d2f4a6c8e0b1d"],
    ),
]


class Refund(Message):
    """One refund, with the goods that were returned for it, if any. `pending` until the provider's answer is known."""

    id: str
    order_id: int
    lines: tuple[ReturnLine, ...]
    amount_minor: int
    currency: str
    status: Open[RefundStatus]
    code: str | None
    """Why it was declined."""
    reason: str
    replayed: bool = False
    payment_id: int | None = None
    """The payment that is refunded. None where no money is refunded, and in the answer to a return."""
    created_at: datetime.datetime | None = None
    settled_at: datetime.datetime | None = None
    """When the provider's answer was known; None while it is not."""
    actor_role: str = ""
    actor_id: int = 0
    """The account that requested it. 0 for customers, who are not shown the accounts of staff."""
    internal_note: str = ""
    """Empty for customers."""
    asked_minor: int | None = None
    """The amount that was asked for, or the price of the returned goods. None: not known; the refund is older than
    this field."""
    limit_reason: str = ""
    """Why `amount_minor` is less than `asked_minor`, in plain words; empty where it is not."""


class GetRefund(Message):
    """One refund or return. Each order may have one with the id `rest` and one with `cancel`: they need `order_id`."""

    id: RefundId
    order_id: OrderId | None = None


class ListRefunds(Message):
    """The refunds and returns of an order."""

    order_id: OrderId


class ListPaymentRefunds(Message):
    """The refunds of one payment."""

    payment_id: PaymentId


class RefundList(Message):
    """By time. Of a cancelled order, also the refund by which it was cancelled, with the id `cancel`."""

    refunds: tuple[Refund, ...]


class GetTimeline(Message):
    id: OrderId
    access_token: AccessToken | None = None


class GetHistory(Message):
    id: OrderId
    access_token: AccessToken | None = None


class OrderChanged(Message):
    """`order.placed`, and `order.<state>` for each state that an axis of the order reaches: the order as it is then.

    A move along two axes at once emits two events of one version. `order.claimed`: an account has become the owner of a
    guest's order.
    """

    order_id: int
    user_id: int
    """0: the order is a guest's."""
    status: Open[Status]
    payment: Open[Payment]
    fulfilment: Open[Fulfilment]
    currency: str
    total_minor: int
    refunded_minor: int
    version: int
    reason: CancelReason | None = None
    waived_minor: int = 0
    """The part of the total that is not taken (`Order`)."""
    outcome_field: ClassVar = "reason"
    about_field: ClassVar = "order_id"


class Orders(Contract, name="orders"):
    """Orders, their history, and the requests that change them. Orders decides what happens to stock and money.

    Customers place, see, pay and cancel their own; staff see and move all. Guests place, and see, pay and cancel the
    order whose access token they send.
    """

    place = batched(PlaceOrder, PlacedOrder, allow=ALL_ROLES, size=256, retry=Retry.KEYED)
    get = batched(GetOrder, Order, allow=ALL_ROLES, retry=Retry.SAFE)
    list = single(ListOrders, OrderPage, allow=SIGNED_IN, retry=Retry.SAFE)
    move = single(MoveOrder, Order, allow=STAFF_ONLY)
    cancel = single(CancelOrder, Order, allow=ALL_ROLES)
    history = single(GetHistory, History, allow=ALL_ROLES, retry=Retry.SAFE)
    settled = single(AwaitOrder, Order, allow=ALL_ROLES, lanes=1_024, deadline_ms=70_000, retry=Retry.SAFE, waits=True)
    timeline = single(GetTimeline, Timeline, allow=ALL_ROLES, retry=Retry.SAFE)
    pay = single(PayOrder, PaidOrder, allow=ALL_ROLES, lanes=256, retry=Retry.KEYED, waits=True)
    capture = single(MovePayment, PaidOrder, allow=STAFF_ONLY)
    capture_part = single(CapturePart, PaidOrder, allow=STAFF_ONLY)
    void = single(MovePayment, PaidOrder, allow=STAFF_ONLY)
    refund = single(RefundOrder, Refund, allow=STAFF_ONLY, retry=Retry.KEYED)
    take_back = single(ReturnOrder, Refund, allow=STAFF_ONLY, retry=Retry.KEYED)
    refunds = single(ListRefunds, RefundList, allow=SIGNED_IN, retry=Retry.SAFE)
    payment_refunds = single(ListPaymentRefunds, RefundList, allow=SIGNED_IN, retry=Retry.SAFE)
    one_refund = single(GetRefund, Refund, allow=SIGNED_IN, retry=Retry.SAFE)
    guest_payment = single(GetGuestPayment, PaymentRecord, allow=ALL_ROLES, retry=Retry.SAFE)
    claim = single(ClaimOrder, Order, allow=SIGNED_IN, retry=Retry.SAFE)

    events: ClassVar = {
        **{f"order.{state}": OrderChanged for state in CHANGES},
        "refund.succeeded": OrderRefunded,
    }
