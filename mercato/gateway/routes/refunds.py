"""Refunds of money, and returns of goods."""

from __future__ import annotations

import datetime
from typing import Annotated, Final

from msgspec import Meta

from mercato.chassis.contract import MAX_ID, FieldError, InvalidRequest, Open
from mercato.contracts import order_refusals, orders as contract
from mercato.contracts.orders import Orders, Refund, RefundList, ReturnLine
from mercato.contracts.roles import SIGNED_IN, STAFF_ONLY
from mercato.gateway.cursors import SliceQuery
from mercato.gateway.money import Money, money
from mercato.gateway.route import Input, Output, Page, Route, RouteRequest
from mercato.gateway.routes.order_history import by
from mercato.gateway.routes.orders import Id, InternalNote, PublicReason, Quantity


class ReturnItemIn(Input):
    """A line of the order, by `line_id` (its `id` among the order's items) or by `product_id`."""

    quantity: Quantity
    line_id: Annotated[int, Meta(ge=1, le=contract.LINES_LIMIT)] | None = None
    product_id: Id | None = None


class ReturnIn(Input):
    """The items that are returned; without `items`, everything that was not returned yet."""

    items: Annotated[tuple[ReturnItemIn, ...], Meta(min_length=1, max_length=contract.LINES_LIMIT)] | None = None
    reason: PublicReason = ""
    internal_note: InternalNote = ""


class RefundQuery(Input):
    order_id: (
        Annotated[int, Meta(ge=1, le=MAX_ID, description="Needed for the ids rest and cancel, which each order has.")]
        | None
    ) = None


class ReturnedOut(Output):
    line_id: int | None
    product_id: int | None
    quantity: int


class RefundOut(Output):
    id: str
    order_id: int
    items: list[ReturnedOut]
    amount: Money
    status: Open[contract.RefundStatus]
    code: str | None
    reason: str
    payment_id: Annotated[
        int | None, Meta(description="null where no money is given back, and in the answer to a return.")
    ]
    created_at: datetime.datetime | None
    settled_at: Annotated[
        datetime.datetime | None, Meta(description="When it succeeded or was declined; null while it is pending.")
    ]
    by: Annotated[str, Meta(description="Role and account; customers are not shown the accounts of staff.")]
    internal_note: str
    asked: Annotated[Money, Meta(description="More than `amount` where less was left of what was paid.")]
    limit_reason: Annotated[str, Meta(description="Why `amount` is less than `asked`; empty where it is not.")]


def refund_out(refund: Refund) -> RefundOut:
    return RefundOut(
        id=refund.id,
        order_id=refund.order_id,
        items=[
            ReturnedOut(line_id=line.line_id, product_id=line.product_id, quantity=line.quantity)
            for line in refund.lines
        ],
        amount=money(refund.amount_minor, refund.currency),
        status=refund.status,
        code=refund.code,
        reason=refund.reason,
        payment_id=refund.payment_id,
        created_at=refund.created_at,
        settled_at=refund.settled_at,
        by=by(refund.actor_role, refund.actor_id),
        internal_note=refund.internal_note,
        asked=money(refund.amount_minor if refund.asked_minor is None else refund.asked_minor, refund.currency),
        limit_reason=refund.limit_reason,
    )


def refunds_out(found: RefundList) -> Page:
    return Page([refund_out(refund) for refund in found.refunds])


def _return(request: RouteRequest) -> contract.ReturnOrder:
    body: ReturnIn = request.body
    assert request.idempotency_key is not None
    errors = [
        FieldError(field=f"items[{i}]", message="needs line_id or product_id, to say which line is returned")
        for i, item in enumerate(body.items or ())
        if item.line_id is None and item.product_id is None
    ]
    if errors:
        raise InvalidRequest(errors=tuple(errors))
    return contract.ReturnOrder(
        id=request.path["id"],
        idempotency_key=request.idempotency_key,
        fingerprint=request.fingerprint,
        lines=tuple(
            ReturnLine(line_id=item.line_id, product_id=item.product_id, quantity=item.quantity)
            for item in body.items or ()
        ),
        reason=body.reason,
        internal_note=body.internal_note,
    )


def _refund(request: RouteRequest) -> contract.GetRefund:
    query: RefundQuery = request.query
    return contract.GetRefund(id=request.text["id"], order_id=query.order_id)


ROUTES: Final[tuple[Route, ...]] = (
    Route(
        method="POST",
        path="/orders/{id}/returns",
        operation=Orders.take_back,
        summary="Take goods of a delivered order back: restocked and refunded",
        roles=STAFF_ONLY,
        body=ReturnIn,
        body_optional=True,
        examples={"one of them": {"items": [{"line_id": 1, "quantity": 1}], "reason": "does not fit"}},
        request=_return,
        answer=refund_out,
        output=RefundOut,
        status=201,
        idempotency=True,
        idempotency_required=True,
        replayed=lambda refund: refund.replayed,
        errors=(
            order_refusals.OrderNotFound,
            order_refusals.IllegalMove,
            order_refusals.NotReturnable,
            order_refusals.PaymentInProgress,
        ),
    ),
    Route(
        method="GET",
        path="/orders/{id}/refunds",
        operation=Orders.refunds,
        summary="The refunds and returns of an order, by time",
        roles=SIGNED_IN,
        query=SliceQuery,
        request=lambda request: contract.ListRefunds(order_id=request.path["id"]),
        answer=refunds_out,
        output=list[RefundOut],
        errors=(order_refusals.OrderNotFound,),
    ),
    Route(
        method="GET",
        path="/refunds/{id}",
        operation=Orders.one_refund,
        summary="One refund or return",
        roles=SIGNED_IN,
        text={"id": contract.RefundId},
        query=RefundQuery,
        request=_refund,
        answer=refund_out,
        output=RefundOut,
        errors=(order_refusals.RefundNotFound,),
    ),
)
