"""Payments. Reads call the payments service; changes call the orders service."""

from __future__ import annotations

import datetime
from typing import Annotated, Final

from msgspec import Meta

from mercato.chassis.contract import (
    MAX_ID,
    FieldError,
    Forbidden,
    IdempotencyKeyReused,
    Open,
    RequestInProgress,
)
from mercato.contracts import order_refusals, orders, payments as contract
from mercato.contracts.orders import Orders, PaidOrder
from mercato.contracts.payments import Payment, PaymentPage, Payments
from mercato.contracts.roles import SIGNED_IN, STAFF_ONLY
from mercato.gateway.cursors import SliceQuery
from mercato.gateway.fields import NOT_ZERO, PaymentMethod
from mercato.gateway.money import AmountIn, Currency, Money, body_currency_errors, currency_of, money, text_of
from mercato.gateway.route import Input, Output, Page, Route, RouteRequest
from mercato.gateway.routes.orders import Id, InternalNote, PublicReason
from mercato.gateway.routes.refunds import RefundOut, refund_out, refunds_out
from mercato.gateway.validation import refuse_wrong


class PayIn(Input):
    """Pays an order that is not paid yet."""

    order_id: Id
    amount: (
        Annotated[
            AmountIn,
            Meta(description="The amount that the client expects to be due; another is refused.", examples=["99.99"]),
        ]
        | None
    ) = None
    currency: Annotated[Currency | None, Meta(description="Of `amount`; without it, that of the order.")] = None
    payment_method: Annotated[PaymentMethod | None, Meta(description="Without it, the shop's default.")] = None
    capture: Annotated[
        bool, Meta(description="false, for staff: only authorize it; POST /payments/{id}/capture takes it later.")
    ] = True


class CaptureIn(Input):
    """Without `amount`, all that was authorized. The rest is released, and not due any more."""

    amount: Annotated[AmountIn, Meta(examples=["79.99"])] | None = None
    currency: Currency | None = None


class RefundIn(Input):
    """Without `amount`, all that is left."""

    amount: Annotated[AmountIn, Meta(examples=["10.00"], extra_json_schema=NOT_ZERO)] | None = None
    currency: Currency | None = None
    reason: PublicReason = ""
    internal_note: InternalNote = ""


class PaymentsQuery(Input):
    order_id: Id | None = None
    user_id: Id | None = None
    limit: Annotated[int, Meta(ge=1, le=contract.PAGE_LIMIT, description="How many at most.")] = 50
    before: Annotated[int, Meta(ge=1, le=MAX_ID, description="Only ids below this one.")] | None = None


class PaymentOut(Output):
    id: int
    order_id: int
    user_id: int | None
    """None: the order is a guest's."""
    payment_method: str
    status: Open[contract.Status]
    code: str | None
    amount: Money
    captured: Money
    refunded: Money
    created_at: datetime.datetime
    updated_at: datetime.datetime
    version: int


def payment_out(payment: Payment) -> PaymentOut:
    currency = payment.currency
    return PaymentOut(
        id=payment.id,
        order_id=payment.order_id,
        user_id=payment.user_id or None,
        payment_method=payment.method,
        status=payment.status,
        code=payment.code,
        amount=money(payment.amount_minor, currency),
        captured=money(payment.captured_minor, currency),
        refunded=money(payment.refunded_minor, currency),
        created_at=payment.created_at,
        updated_at=payment.updated_at,
        version=payment.version,
    )


def paid_out(paid: PaidOrder) -> PaymentOut:
    return payment_out(paid.payment)


def page_of(page: PaymentPage) -> Page:
    following = None if page.next_before is None else {"before": str(page.next_before)}
    return Page([payment_out(payment) for payment in page.payments], following)


def _pay(request: RouteRequest) -> orders.PayOrder:
    body: PayIn = request.body
    refuse_wrong(body_currency_errors(body.amount, body.currency))
    return orders.PayOrder(
        id=body.order_id,
        method=body.payment_method,
        capture=body.capture,
        expected_total=text_of(body.amount),
        expected_currency=currency_of(body.amount, body.currency),
        idempotency_key=request.idempotency_key,
        fingerprint=request.fingerprint,
        access_token=request.access_token,
    )


def _get(request: RouteRequest) -> contract.GetPayment | orders.GetGuestPayment:
    payment_id, access_token = request.path["id"], request.access_token
    if access_token is None:
        return contract.GetPayment(id=payment_id)
    return orders.GetGuestPayment(payment_id=payment_id, access_token=access_token)


def _list(request: RouteRequest) -> contract.ListPayments:
    query: PaymentsQuery = request.query
    return contract.ListPayments(order_id=query.order_id, user_id=query.user_id, before=query.before, limit=query.limit)


def _refund(request: RouteRequest) -> orders.RefundOrder:
    body: RefundIn = request.body
    errors = body_currency_errors(body.amount, body.currency)
    if body.amount is not None and not body.amount.strip("0."):
        errors.append(FieldError(field="amount", message="is nothing"))
    refuse_wrong(errors)
    assert request.idempotency_key is not None
    return orders.RefundOrder(
        payment_id=request.path["id"],
        idempotency_key=request.idempotency_key,
        fingerprint=request.fingerprint,
        amount=text_of(body.amount),
        amount_minor=None if body.amount is None else orders.REFUSED_MINOR,
        currency=currency_of(body.amount, body.currency),
        reason=body.reason,
        internal_note=body.internal_note,
    )


def _capture(request: RouteRequest) -> orders.CapturePart:
    body: CaptureIn = request.body
    refuse_wrong(body_currency_errors(body.amount, body.currency))
    currency = currency_of(body.amount, body.currency)
    return orders.CapturePart(payment_id=request.path["id"], amount=text_of(body.amount), currency=currency)


def _version(payment: Payment) -> int:
    return payment.version


ROUTES: Final[tuple[Route, ...]] = (
    Route(
        method="POST",
        path="/payments",
        operation=Orders.pay,
        summary="Pay an order that is not paid yet",
        roles=SIGNED_IN,
        body=PayIn,
        examples={
            "with the amount that is due": {"order_id": 1001, "amount": 99.99, "payment_method": "sandbox:ok"},
            "authorize now, capture later": {"order_id": 1001, "capture": False},
        },
        takes_access_token=True,
        request=_pay,
        answer=paid_out,
        output=PaymentOut,
        status=201,
        idempotency=True,
        etag=lambda paid: paid.payment.version,
        location=lambda paid: f"/payments/{paid.payment.id}",
        replayed=lambda paid: paid.replayed,
        fields={"id": "order_id", "method": "payment_method", "expected_total": "amount"},
        errors=(
            order_refusals.OrderNotFound,
            order_refusals.AmountNotDue,
            order_refusals.PaymentDeclined,
            order_refusals.OrderCancelled,
            order_refusals.IllegalMove,
            order_refusals.PaymentInProgress,
            order_refusals.NotPayable,
            Forbidden,
            IdempotencyKeyReused,
            RequestInProgress,
        ),
    ),
    Route(
        method="GET",
        path="/payments",
        operation=Payments.list,
        summary="Payments, the newest first: your own, or all for staff",
        roles=SIGNED_IN,
        query=PaymentsQuery,
        request=_list,
        answer=page_of,
        output=list[PaymentOut],
    ),
    Route(
        method="GET",
        path="/payments/{id}",
        operation=Payments.get,
        summary="One payment",
        roles=SIGNED_IN,
        takes_access_token=True,
        guest_operation=Orders.guest_payment,
        request=_get,
        answer=payment_out,
        output=PaymentOut,
        etag=_version,
        errors=(contract.PaymentNotFound,),
    ),
    Route(
        method="POST",
        path="/payments/{id}/refunds",
        operation=Orders.refund,
        summary="Refund a payment: all that is left, or a part",
        roles=STAFF_ONLY,
        body=RefundIn,
        body_optional=True,
        examples={"a part": {"amount": 10.00, "reason": "scratched"}},
        request=_refund,
        answer=refund_out,
        output=RefundOut,
        status=201,
        idempotency=True,
        idempotency_required=True,
        replayed=lambda refund: refund.replayed,
        errors=(
            contract.PaymentNotFound,
            order_refusals.IllegalMove,
            order_refusals.NothingToRefund,
            order_refusals.PaymentInProgress,
        ),
    ),
    Route(
        method="GET",
        path="/payments/{id}/refunds",
        operation=Orders.payment_refunds,
        summary="The refunds of a payment, by time",
        roles=SIGNED_IN,
        query=SliceQuery,
        request=lambda request: orders.ListPaymentRefunds(payment_id=request.path["id"]),
        answer=refunds_out,
        output=list[RefundOut],
        errors=(contract.PaymentNotFound,),
    ),
    Route(
        method="POST",
        path="/payments/{id}/capture",
        operation=Orders.capture_part,
        summary="Capture a payment that was only authorized: all, or a part",
        roles=STAFF_ONLY,
        body=CaptureIn,
        body_optional=True,
        examples={"a part, and the rest is released": {"amount": 79.99}},
        request=_capture,
        answer=paid_out,
        output=PaymentOut,
        etag=lambda paid: paid.payment.version,
        errors=(
            contract.PaymentNotFound,
            contract.CaptureTooLarge,
            contract.CaptureAmountChanged,
            order_refusals.IllegalMove,
            order_refusals.PaymentDeclined,
            order_refusals.PaymentInProgress,
        ),
    ),
    Route(
        method="POST",
        path="/payments/{id}/void",
        operation=Orders.void,
        summary="Release an authorized amount, and cancel its order",
        roles=STAFF_ONLY,
        request=lambda request: orders.MovePayment(payment_id=request.path["id"]),
        answer=paid_out,
        output=PaymentOut,
        etag=lambda paid: paid.payment.version,
        errors=(contract.PaymentNotFound, order_refusals.IllegalMove, order_refusals.PaymentInProgress),
    ),
)
