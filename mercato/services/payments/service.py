"""The operations of payments, in contract order, and the loops that finish what was left and compare the books."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from mercato.chassis.clock import Clock
from mercato.chassis.contract import Actor, Batch, FieldError, InvalidRequest, ServiceError, current
from mercato.chassis.db import Database
from mercato.chassis.rpc import SERVICE_ROLE, acting
from mercato.contracts.payments import (
    AuthorizePayment,
    CapturePayment,
    GetPayment,
    ListPayments,
    Payment,
    PaymentNotFound,
    PaymentPage,
    PaymentTrace,
    RefundPayment,
    TracePayments,
    VoidPayment,
)
from mercato.contracts.roles import CUSTOMER

from . import rules, store
from .charging import SWEPT_AT_ONCE, Answer, Charging, Wish, payment_of
from .reconciling import Reconciling
from .rules import Goal
from .store import NewPayment

ROUND_SECONDS: Final = 30.0
"""What a round of a loop may take: longer than the deadlines of what it calls."""


class Options(msgspec.Struct, frozen=True):
    """What the operator can set."""

    sweep_seconds: Annotated[float, Meta(gt=0)] = 5.0
    """After so long an operation whose outcome is not known is asked for again."""
    reconcile_seconds: Annotated[float, Meta(gt=0)] = 60.0
    statement_lag_seconds: Annotated[float, Meta(ge=0)] = 600.0
    """After so long an operation must be on the provider's statement."""


class PaymentsService:
    """See `contracts/payments.py` for what each operation promises."""

    def __init__(
        self, database: Database, charging: Charging, reconciling: Reconciling, options: Options, clock: Clock
    ) -> None:
        self._database = database
        self._charging = charging
        self._reconciling = reconciling
        self._options = options
        self._clock = clock

    async def authorize(self, batch: Batch[AuthorizePayment]) -> Sequence[Answer]:
        answers: list[Answer | None] = [self._check_method(request.method) for request in batch]
        asked = [n for n, answer in enumerate(answers) if answer is None]
        wishes = [Wish(_pair(batch[n]), Goal("authorize"), _opening(batch[n])) for n in asked]
        for n, answer in zip(asked, await self._charging.reach("authorize", wishes), strict=True):
            answers[n] = answer
        return [answer for answer in answers if answer is not None]

    async def capture(self, batch: Batch[CapturePayment]) -> Sequence[Answer]:
        return await self._charging.reach("capture", [Wish(_pair(request), Goal("capture")) for request in batch])

    async def void(self, batch: Batch[VoidPayment]) -> Sequence[Answer]:
        wishes = [Wish(_pair(request), Goal("void"), _tombstone(request)) for request in batch]
        return await self._charging.reach("void", wishes)

    async def refund(self, batch: Batch[RefundPayment]) -> Sequence[Answer]:
        wishes = [Wish(_pair(request), Goal("refund", request.reference, request.amount_minor)) for request in batch]
        return await self._charging.reach("refund", wishes)

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
            return PaymentTrace(steps=tuple(await store.trace(tx, request.order_id)))

    def _check_method(self, method: str) -> InvalidRequest | None:
        if self._charging.knows(method):
            return None
        return InvalidRequest(errors=(FieldError(field="method", message="no provider is behind this method"),))

    # ------------------------------------------------------------------------------------------------------- loops

    async def sweep_for_ever(self) -> None:
        """Takes over what was left in the middle, here or by a process that is gone."""
        while True:
            self._begin_round()
            if await self._charging.sweep(self._options.sweep_seconds) < SWEPT_AT_ONCE:
                await asyncio.sleep(self._options.sweep_seconds)

    async def reconcile_for_ever(self) -> None:
        """Compares the books with the providers' once a period. A row with a lease says which process does."""
        while True:
            await asyncio.sleep(self._options.reconcile_seconds)
            self._begin_round()
            await self._reconciling.round()

    def _begin_round(self) -> None:
        """Calls of this loop come from the shop itself, and have so long."""
        current.set(acting(Actor(SERVICE_ROLE), clock=self._clock, seconds=ROUND_SECONDS))


def _pair(request: AuthorizePayment | CapturePayment | VoidPayment | RefundPayment) -> store.Pair:
    return request.order_id, request.attempt


def _opening(request: AuthorizePayment | VoidPayment) -> NewPayment:
    return NewPayment(
        order_id=request.order_id,
        attempt=request.attempt,
        user_id=request.user_id,
        method=request.method,
        currency=request.currency,
        amount_minor=request.amount_minor,
    )


def _tombstone(request: VoidPayment) -> NewPayment:
    """What is written where there is no payment to void: an authorize that comes later finds it void."""
    return msgspec.structs.replace(_opening(request), status="voided")


def _visible(row: store.PaymentRow | None, payment_id: int, actor: Actor) -> Payment | ServiceError:
    """Another's payment answers exactly like one that does not exist."""
    if row is None or not rules.may_see(actor, row.user_id):
        return PaymentNotFound(payment_id=payment_id)
    return payment_of(row)
