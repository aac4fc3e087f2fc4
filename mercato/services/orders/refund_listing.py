"""The refunds and returns of an order, for callers that may see it."""

from __future__ import annotations

from collections.abc import Sequence

from mercato.chassis.contract import Actor, as_service, current
from mercato.chassis.postgres.database import Database
from mercato.contracts.order_refusals import OrderNotFound, RefundNotFound
from mercato.contracts.orders import GetRefund, ListPaymentRefunds, ListRefunds, Refund, RefundList
from mercato.contracts.payments import GetPayment, ListPayments, Payments

from . import history_store, money_store, read_store, rules
from .history_store import HistoryRow
from .money_store import CANCEL, RefundRecord
from .read_store import OrderRecord


class RefundListing:
    """Reads the ids of payments from payments: orders stores only the number of each payment of an order."""

    def __init__(self, database: Database, payments: Payments) -> None:
        self._database = database
        self._payments = payments

    async def of_order(self, request: ListRefunds) -> RefundList:
        return RefundList(refunds=tuple(await self._refunds(request.order_id)))

    async def of_payment(self, request: ListPaymentRefunds) -> RefundList:
        """Calls payments as the caller: it refuses the payments of other users."""
        payment = await self._payments.get(GetPayment(id=request.payment_id))
        found = await self._refunds(payment.order_id)
        return RefundList(refunds=tuple(refund for refund in found if refund.payment_id == payment.id))

    async def one(self, request: GetRefund) -> Refund:
        """Raises `RefundNotFound`, also for one of an order that the caller may not see."""
        try:
            found = await self._refunds(request.order_id or await self._order_of(request.id))
        except OrderNotFound:
            found = []
        for refund in found:
            if refund.id == request.id:
                return refund
        raise RefundNotFound(refund_id=request.id)

    async def _order_of(self, refund_id: str) -> int:
        async with self._database.read() as tx:
            refund = await money_store.refund_of_key(tx, refund_id)
        if refund is None:
            raise RefundNotFound(refund_id=refund_id)
        return refund.order_id

    async def _refunds(self, order_id: int) -> list[Refund]:
        actor = current.get().actor
        async with self._database.read() as tx:
            record = await read_store.visible_record(tx, order_id, actor)
            found = await money_store.refunds_of(tx, order_id)
            if record.order.status == "cancelled":
                found += _of_cancelling(record, found, await history_store.history(tx, order_id))
        if not found:
            return []
        with as_service():
            page = await self._payments.list(ListPayments(order_id=order_id, order_nonce=record.nonce, limit=200))
        ids = {payment.attempt: payment.id for payment in page.payments}
        return [
            shown(refund, actor, ids.get(refund.payment_attempt) if refund.amount_minor else None) for refund in found
        ]


def shown(refund: RefundRecord, actor: Actor, payment_id: int | None, *, replayed: bool = False) -> Refund:
    """A refund as `actor` may see it: customers see neither the account of staff nor the internal note."""
    return Refund(
        id=refund.reference,
        order_id=refund.order_id,
        lines=refund.lines,
        amount_minor=refund.amount_minor,
        currency=refund.currency,
        status=refund.status,
        code=refund.code,
        reason=refund.reason,
        replayed=replayed,
        payment_id=payment_id,
        created_at=refund.created_at,
        settled_at=refund.settled_at,
        actor_role=refund.actor_role,
        actor_id=rules.shown_actor_id(refund.actor_role, refund.actor_id, actor),
        internal_note=refund.internal_note if not rules.is_buyer(actor) else "",
        asked_minor=refund.asked_minor,
        limit_reason=refund.limit_reason,
    )


def _of_cancelling(
    record: OrderRecord, refunds: Sequence[RefundRecord], history: Sequence[HistoryRow]
) -> list[RefundRecord]:
    """The refund by which the order was cancelled: all that was refunded, less the amounts of its other refunds."""
    order = record.order
    amount_minor = order.refunded_minor - sum(r.amount_minor for r in refunds if r.status == "succeeded")
    if amount_minor == 0:
        return []
    [began, *_] = [row for row in history if row.status == "cancelled"]
    [ended, *_] = [row for row in history if row.status == "cancelled" and row.payment == "refunded"]
    return [
        RefundRecord(
            order_id=order.id,
            reference=CANCEL,
            lines=(),
            amount_minor=amount_minor,
            currency=order.currency,
            payment_attempt=record.payment_attempt,
            status="succeeded",
            code=None,
            reason=order.reason.message if order.reason else "",
            fingerprint=None,
            actor_role=began.actor_role,
            actor_id=began.actor_id,
            created_at=began.at,
            settled_at=ended.at,
            internal_note=began.internal_note,
            asked_minor=amount_minor,
            limit_reason="",
        )
    ]
