"""The operations of payments, in contract order, and the loops: the sweep and the reconciliation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from mercato.chassis.contract import Actor, Batch, InvalidRequest, ServiceError, current
from mercato.chassis.postgres.database import Database
from mercato.contracts.payments import (
    AuthorizePayment,
    CapturePayment,
    ChargePayment,
    CheckedMethod,
    CheckMethod,
    GetPayment,
    ListPayments,
    Method,
    Payment,
    PaymentNotFound,
    PaymentPage,
    PaymentTrace,
    RefundPayment,
    Status,
    TracePayments,
    VoidPayment,
)
from mercato.contracts.roles import CUSTOMER, may_see

from . import store, trace_store
from .charging import Answer, Charging, PaymentRequest, payment_of
from .rules import Target
from .store import NewPayment

ROUND_SECONDS: Final = 30.0
"""What a round of a loop may take: longer than the deadlines of what it calls."""


AUTHORIZE: Final = Target("authorize")
CHARGE: Final = Target("charge")
CAPTURE: Final = Target("capture")
VOID: Final = Target("void")
OpeningRequest = AuthorizePayment | ChargePayment


class Options(msgspec.Struct, frozen=True):
    """What the operator can set."""

    default_method: Method = "sandbox:ok"
    """What an order is paid with where its buyer names no method."""
    sweep_seconds: Annotated[float, Meta(gt=0)] = 5.0
    """After so long the provider is called again for an operation whose result is not known."""
    reconcile_seconds: Annotated[float, Meta(gt=0)] = 60.0
    statement_lag_seconds: Annotated[float, Meta(ge=0)] = 600.0
    """After so long an operation must be on the provider's statement."""


class PaymentsService:
    """See `contracts/payments.py` for what each operation promises."""

    def __init__(self, database: Database, charging: Charging, options: Options) -> None:
        self._database = database
        self._charging = charging
        self._options = options

    async def check_method(self, batch: Batch[CheckMethod]) -> Sequence[CheckedMethod | InvalidRequest]:
        methods = [request.method or self._options.default_method for request in batch]
        return [self._charging.check_method(method) or CheckedMethod(method=method) for method in methods]

    async def authorize(self, batch: Batch[AuthorizePayment]) -> Sequence[Answer]:
        requests = [self._opening_request(request, AUTHORIZE) for request in batch]
        return await self._charging.execute("authorize", requests)

    async def charge(self, batch: Batch[ChargePayment]) -> Sequence[Answer]:
        return await self._charging.charge([self._opening_request(request, CHARGE) for request in batch])

    async def capture(self, batch: Batch[CapturePayment]) -> Sequence[Answer]:
        requests = [PaymentRequest(_attempt(request), request.order_nonce, CAPTURE) for request in batch]
        return await self._charging.execute("capture", requests)

    async def void(self, batch: Batch[VoidPayment]) -> Sequence[Answer]:
        requests = [PaymentRequest(_attempt(r), r.order_nonce, VOID, _new_payment(r, "voided")) for r in batch]
        return await self._charging.execute("void", requests)

    async def refund(self, batch: Batch[RefundPayment]) -> Sequence[Answer]:
        requests = [
            PaymentRequest(_attempt(r), r.order_nonce, Target("refund", r.reference, r.amount_minor)) for r in batch
        ]
        return await self._charging.execute("refund", requests)

    async def get(self, batch: Batch[GetPayment]) -> Sequence[Answer]:
        async with self._database.read() as tx:
            found = await store.payments(tx, list({request.id for request in batch}))
        return [
            _visible(found.get(request.id), request.id, actor)
            for request, actor in zip(batch, batch.actors, strict=True)
        ]

    async def list(self, request: ListPayments) -> PaymentPage:
        actor = current.get().actor
        if actor.role == CUSTOMER:
            if request.user_id is not None and request.user_id != actor.id:
                return PaymentPage(payments=())
            request = msgspec.structs.replace(request, user_id=actor.id)
        async with self._database.read() as tx:
            # One more than asked for tells whether there is a next page.
            rows = await store.list_page(tx, request, request.limit + 1)
        page = tuple(payment_of(row) for row in rows[: request.limit])
        return PaymentPage(payments=page, next_before=page[-1].id if len(rows) > request.limit else None)

    async def trace(self, request: TracePayments) -> PaymentTrace:
        async with self._database.read() as tx:
            return PaymentTrace(steps=tuple(await trace_store.trace(tx, request.order_id, request.order_nonce)))

    def _opening_request(self, request: OpeningRequest, target: Target) -> PaymentRequest:
        wanted = PaymentRequest(_attempt(request), request.order_nonce, target, _new_payment(request, "pending"))
        wanted.answer = self._charging.check_method(request.method)
        return wanted


def _attempt(request: OpeningRequest | CapturePayment | VoidPayment | RefundPayment) -> store.Attempt:
    return request.order_id, request.attempt


def _new_payment(request: OpeningRequest | VoidPayment, status: Status) -> NewPayment:
    """The payment that is written where there is none. A `voided` one is a tombstone."""
    return NewPayment(
        order_id=request.order_id,
        nonce=request.order_nonce,
        attempt=request.attempt,
        user_id=request.user_id,
        method=request.method,
        currency=request.currency,
        amount_minor=request.amount_minor,
        status=status,
    )


def _visible(row: store.PaymentRow | None, payment_id: int, actor: Actor) -> Payment | ServiceError:
    """Another's payment answers exactly like one that does not exist."""
    if row is None or not may_see(actor, row.user_id):
        return PaymentNotFound(payment_id=payment_id)
    return payment_of(row)
