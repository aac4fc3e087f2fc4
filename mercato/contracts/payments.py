"""Payments: what was paid for an order, and with which operations the provider was called for it."""

from __future__ import annotations

import datetime
from typing import Annotated, ClassVar, Final, Literal

from msgspec import Meta

from mercato.chassis.contract import (
    MAX_ID,
    Contract,
    Empty,
    Kind,
    Message,
    Open,
    Retry,
    ServiceError,
    batched,
    filled,
    single,
    worded,
)

from .money import MoneyError
from .roles import SERVICES_ONLY, SIGNED_IN, STAFF_ONLY

PaymentId = Annotated[int, Meta(ge=1, le=MAX_ID)]
OrderId = Annotated[int, Meta(ge=1, le=MAX_ID)]
OrderNonce = Annotated[int, Meta(ge=0, le=2**63 - 1)]
"""The random part of an order, made when it is placed. A database that was restored from a backup uses ids again: a
payment with the id of an order and another nonce belongs to another order."""
Attempt = Annotated[int, Meta(ge=1, le=10_000)]
Method = Annotated[
    str,
    Meta(
        pattern=r"^[a-z][a-z0-9_]{0,31}:[!-~]{1,200}\Z",
        extra=worded("must be the name of a provider and its token, such as sandbox:ok"),
        examples=["provider:token"],
    ),
]
"""A token of the provider, with the provider's name before the colon. Card numbers are never sent here.

`check_method` says whether there is such a provider, and whether the token may be one of its own."""

Status = Literal["pending", "failed", "authorized", "voided", "captured", "partially_refunded", "refunded"]
OperationKind = Literal["authorize", "charge", "capture", "void", "refund"]
OperationStatus = Literal["intent", "unknown", "succeeded", "declined"]

PAGE_LIMIT: Final = 200


class Payment(Message):
    """One attempt to pay one order. Amounts in minor units of `currency`.

    `pending` until the provider's answer is known; `failed` when it declined; `voided` when the authorization was
    voided, or expired before it was captured (`code`). For an amount of 0 the provider is never called.
    """

    id: PaymentId
    order_id: int
    attempt: int
    """1 for an order's first payment. An order has at most one that is live: not failed, voided or refunded."""
    user_id: int
    method: str
    currency: str
    amount_minor: int
    authorized_minor: int
    captured_minor: int
    refunded_minor: int
    status: Open[Status]
    code: str | None
    """The provider's code of a failed payment, such as `insufficient_funds`."""
    created_at: datetime.datetime
    updated_at: datetime.datetime
    version: int


class CheckMethod(Message):
    """Asks whether an order can be paid with a method; None: with the shop's default."""

    method: Method | None = None


class CheckedMethod(Message):
    """A method that has the form of one of its provider."""

    method: Method


class AuthorizePayment(Message):
    """Reserves an order's total with the provider. Once for each order and attempt.

    A repeated request continues where the first one stopped, with the same key at the provider, or answers with the
    payment as it is by now. A declined card is no error: the answer is a payment with the status `failed`. With another
    user, amount, currency or method than the first time it is `AttemptReused`.
    """

    order_id: OrderId
    attempt: Attempt
    user_id: int
    amount_minor: Annotated[int, Meta(ge=0)]
    currency: str
    method: Method
    idempotency_key: str
    order_nonce: OrderNonce = 0


class ChargePayment(Message):
    """Takes an order's total in one operation of the provider: authorize and capture. Once for each order and attempt.

    Repeated as `AuthorizePayment` is. The answer is a payment with the status `captured`, or `failed` where the
    provider declined. An attempt that was authorized before is captured.
    """

    order_id: OrderId
    attempt: Attempt
    user_id: int
    amount_minor: Annotated[int, Meta(ge=0)]
    currency: str
    method: Method
    idempotency_key: str
    order_nonce: OrderNonce = 0


class CapturePayment(Message):
    """Takes what was authorized. Once; declined (`authorization_expired`) is a payment with the status `voided`."""

    order_id: OrderId
    attempt: Attempt
    idempotency_key: str
    order_nonce: OrderNonce = 0


class CapturePart(Message):
    """Takes a part of what was authorized; the provider releases the rest. Otherwise as `CapturePayment`.

    Once, with one amount: with another one it is `CaptureAmountChanged`. An operation of its own: a service that does
    not know it must not take the whole.
    """

    order_id: OrderId
    attempt: Attempt
    amount_minor: Annotated[int, Meta(ge=1)]
    idempotency_key: str
    order_nonce: OrderNonce = 0


class VoidPayment(Message):
    """Voids an authorization, after settling an authorize or charge whose result is not known. Once.

    For an attempt that never began it inserts a voided payment, a tombstone: an authorize or charge of a fenced process
    that arrives later is answered with it. A captured payment stays captured, also where this
    settles its charge: the caller refunds it. `user_id`, `amount_minor` and `currency` are those of the authorize or
    charge.
    """

    order_id: OrderId
    attempt: Attempt
    user_id: int
    amount_minor: Annotated[int, Meta(ge=0)]
    currency: str
    method: Method
    idempotency_key: str
    order_nonce: OrderNonce = 0


class RefundPayment(Message):
    """Refunds captured money. Once for each `reference`."""

    order_id: OrderId
    attempt: Attempt
    amount_minor: Annotated[int, Meta(ge=1)]
    reference: Annotated[str, Meta(min_length=1, max_length=60, pattern=r"^[\x21-\x7e]+\Z")]
    """The purpose of the refund: unique within the order."""
    idempotency_key: str
    order_nonce: OrderNonce = 0


class GetPayment(Message):
    id: PaymentId


class ListPayments(Message):
    """Payments by descending id, those before `before`. Customers get only their own.

    With `order_id` and `order_nonce`, no payments of another order that had the same id.
    """

    order_id: OrderId | None = None
    user_id: int | None = None
    before: PaymentId | None = None
    limit: Annotated[int, Meta(ge=1, le=PAGE_LIMIT)] = 50
    order_nonce: Annotated[OrderNonce | None, Meta(extra=filled("default"))] = None
    count: bool = False
    """Whether `total` of the page is asked for."""


class PaymentPage(Message):
    payments: tuple[Payment, ...]
    next_before: int | None = None
    """The `before` of the next page; None on the last."""
    total: int | None = None
    """All that the filters match, whatever the page; None where it is not asked for, or takes too long to count."""


class TracePayments(Message):
    """The operations of an order with the provider; with `order_nonce`, not those of another order with the same id."""

    order_id: OrderId
    order_nonce: OrderNonce | None = None


class PaymentStep(Message):
    """One operation of the provider: `succeeded` or `declined`, or an `intent`, whose result is not known.

    An intent is `unknown` once the provider was called and its answer does not say the result.
    """

    payment_id: int
    kind: Open[OperationKind]
    amount_minor: int
    currency: str
    status: Open[OperationStatus]
    code: str | None
    calls: int
    """How often the provider was called, always with the same key."""
    began_at: datetime.datetime
    settled_at: datetime.datetime | None
    """When the result became known; None while it is not."""


class PaymentTrace(Message):
    """In the order in which they began."""

    steps: tuple[PaymentStep, ...]


class AssignPayments(Message):
    """Makes an account, which owns the order by now, the owner of the payments that a guest made for the order."""

    order_id: OrderId
    order_nonce: OrderNonce
    user_id: Annotated[int, Meta(ge=1, le=MAX_ID)]


class PaymentNotFound(ServiceError, code="payments.not_found", kind=Kind.NOT_FOUND):
    sentence = "There is no payment {payment_id}."
    payment_id: int


class AttemptNotFound(ServiceError, code="payments.attempt_not_found", kind=Kind.NOT_FOUND):
    sentence = "Order {order_id} has no payment {attempt}."
    order_id: int
    attempt: int


class AnotherOrder(ServiceError, code="payments.another_order", kind=Kind.CONFLICT):
    """The payments of this order id belong to an order with another nonce. Final: nothing was or will be done."""

    sentence = "The payments of order {order_id} belong to another order that had this id."
    key_field = "order_nonce"
    order_id: int
    newest_order_id: int = 0
    """The highest order id that is known here; 0: not said."""


class AttemptReused(ServiceError, code="payments.attempt_reused", kind=Kind.CONFLICT):
    """An attempt of an order names one payment. Nothing was or will be done for the request that differs."""

    sentence = "Payment {attempt} of order {order_id} was begun with another {field}."
    key_field = "field"
    order_id: int
    attempt: int
    field: str


class OutcomePending(ServiceError, code="payments.outcome_pending", kind=Kind.UNAVAILABLE):
    """The provider was called, and the result is not known. A repeated request continues with the same key."""

    sentence = "The outcome of {operation} for order {order_id} is not known yet."
    operation: str
    order_id: int
    retry_after_s: int | None = 1
    settles_at: datetime.datetime | None = None
    """When it will be known, as the provider says; None where it does not say so."""


class AnotherPaymentLive(ServiceError, code="payments.another_live", kind=Kind.CONFLICT):
    """An order has one live payment at a time."""

    sentence = "Order {order_id} has another payment that is alive."
    order_id: int


class PaymentStateConflict(ServiceError, code="payments.state_conflict", kind=Kind.CONFLICT):
    """The payment is not in a state where that operation starts."""

    sentence = "Payment {payment_id} is {status}: it cannot be {wanted}."
    payment_id: int
    status: str
    wanted: str


class CaptureTooLarge(MoneyError, code="payments.capture_too_large", kind=Kind.CONFLICT):
    """More was to be captured than was authorized. Nothing was taken."""

    sentence = "Payment {payment_id} has {authorized_minor} authorized; {wanted_minor} cannot be captured."
    payment_id: int
    wanted_minor: int
    authorized_minor: int
    currency: str


class CaptureAmountChanged(MoneyError, code="payments.capture_amount_changed", kind=Kind.CONFLICT):
    """A payment is captured once: with the first amount. To reduce it, refund a part."""

    sentence = "Payment {payment_id} is captured with {captured_minor}, not {wanted_minor}."
    key_field = "amount_minor"
    payment_id: int
    wanted_minor: int
    captured_minor: int
    currency: str


class RefundTooLarge(MoneyError, code="payments.refund_too_large", kind=Kind.CONFLICT):
    sentence = "Payment {payment_id} has {left_minor} left to refund, not {wanted_minor}."
    payment_id: int
    wanted_minor: int
    left_minor: int
    currency: str


class RefundDeclined(ServiceError, code="payments.refund_declined", kind=Kind.REFUSED):
    """The provider has declined the refund, which is final; another `reference` is another try."""

    sentence = "The provider has declined the refund of payment {payment_id}: {reason}."
    payment_id: int
    reason: str


class RefundReferenceReused(MoneyError, code="payments.refund_reference_reused", kind=Kind.CONFLICT):
    """A reference names one refund, of one amount."""

    sentence = "{reference} was used for a refund of {amount_minor}, not {wanted_minor}."
    key_field = "amount_minor"
    reference: str
    amount_minor: int
    wanted_minor: int
    currency: str


class PaymentChanged(Message):
    """`payment.authorized`, `.failed`, `.captured`, `.voided`, `.refunded`: the payment as it is after it."""

    payment_id: int
    order_id: int
    status: Open[Status]
    code: str | None
    currency: str
    amount_minor: int
    captured_minor: int
    refunded_minor: int
    version: int
    outcome_field: ClassVar = "code"
    about_field: ClassVar = "order_id"


class Payments(Contract, name="payments"):
    """Money. Orders decides what happens to it; customers see their own payments, staff all."""

    check_method = batched(CheckMethod, CheckedMethod, allow=SERVICES_ONLY, size=256, retry=Retry.SAFE)
    authorize = batched(AuthorizePayment, Payment, allow=SERVICES_ONLY, size=256, retry=Retry.KEYED)
    charge = batched(ChargePayment, Payment, allow=SERVICES_ONLY, size=256, retry=Retry.KEYED)
    capture = batched(CapturePayment, Payment, allow=SERVICES_ONLY, size=256, retry=Retry.KEYED)
    capture_part = batched(CapturePart, Payment, allow=SERVICES_ONLY, size=256, retry=Retry.KEYED)
    void = batched(VoidPayment, Payment, allow=SERVICES_ONLY, size=256, retry=Retry.KEYED)
    refund = batched(RefundPayment, Payment, allow=SERVICES_ONLY, size=256, retry=Retry.KEYED)
    get = batched(GetPayment, Payment, allow=SIGNED_IN, retry=Retry.SAFE)
    list = single(ListPayments, PaymentPage, allow=SIGNED_IN, retry=Retry.SAFE)
    trace = single(TracePayments, PaymentTrace, allow=STAFF_ONLY, retry=Retry.SAFE)
    assign = batched(AssignPayments, Empty, allow=SERVICES_ONLY, size=256, retry=Retry.SAFE)

    events: ClassVar = {
        "payment.authorized": PaymentChanged,
        "payment.failed": PaymentChanged,
        "payment.captured": PaymentChanged,
        "payment.voided": PaymentChanged,
        "payment.refunded": PaymentChanged,
    }
