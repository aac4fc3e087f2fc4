"""The operations that read payments, check a method and change the owner. Those that move money: `charging.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from mercato.chassis.contract import Actor, Batch, Empty, InvalidRequest, ServiceError, current
from mercato.chassis.postgres.database import Database
from mercato.contracts.payments import (
    AssignPayments,
    CheckedMethod,
    CheckMethod,
    GetPayment,
    ListPayments,
    Method,
    Payment,
    PaymentNotFound,
    PaymentPage,
    PaymentTrace,
    TracePayments,
)
from mercato.contracts.roles import CUSTOMER, may_see

from . import claim_store, list_store, trace_store
from .charging import Answer, Charging, payment_of
from .store import PaymentRow


class Options(msgspec.Struct, frozen=True):
    """What an operator may set: `MERCATO_PAYMENTS_DEFAULT_METHOD` and so on."""

    default_method: Method = "sandbox:ok"
    """The method of a payment whose request names none."""
    sweep_seconds: Annotated[float, Meta(ge=0.01, le=86_400)] = 5.0
    """How long after a call the provider is called again for an operation whose result is not known."""
    reconcile_seconds: Annotated[float, Meta(ge=0.01, le=86_400)] = 60.0
    """The pause between two comparisons of the provider's statement with the payments."""
    statement_lag_seconds: Annotated[float, Meta(ge=0, le=30 * 86_400)] = 600.0
    """How long after its settlement an operation must be on the provider's statement."""


class PaymentsService:
    """See `contracts/payments.py` for what each operation promises."""

    def __init__(self, database: Database, charging: Charging, options: Options) -> None:
        self._database = database
        self._charging = charging
        self._options = options

    async def check_method(self, batch: Batch[CheckMethod]) -> Sequence[CheckedMethod | InvalidRequest]:
        methods = [request.method or self._options.default_method for request in batch]
        return [self._charging.check_method(method) or CheckedMethod(method=method) for method in methods]

    async def get(self, batch: Batch[GetPayment]) -> Sequence[Answer]:
        async with self._database.read() as tx:
            found = await list_store.payments(tx, list({request.id for request in batch}))
        return [
            _visible(found.get(request.id), request.id, actor)
            for request, actor in zip(batch, batch.actors, strict=True)
        ]

    async def list(self, request: ListPayments) -> PaymentPage:
        actor = current.get().actor
        if actor.role == CUSTOMER:
            if request.user_id is not None and request.user_id != actor.id:
                return PaymentPage(payments=(), total=0 if request.count else None)
            request = msgspec.structs.replace(request, user_id=actor.id)
        async with self._database.read() as tx:
            # One payment more than asked for: whether there is a next page.
            rows = await list_store.list_page(tx, request, request.limit + 1)
        page = tuple(payment_of(row) for row in rows[: request.limit])
        total = await self._database.count(lambda tx: list_store.count(tx, request)) if request.count else None
        return PaymentPage(payments=page, next_before=page[-1].id if len(rows) > request.limit else None, total=total)

    async def trace(self, request: TracePayments) -> PaymentTrace:
        async with self._database.read() as tx:
            return PaymentTrace(steps=tuple(await trace_store.trace(tx, request.order_id, request.order_nonce)))

    async def assign(self, batch: Batch[AssignPayments]) -> Sequence[Empty]:
        async with self._database.transaction() as tx:
            await claim_store.assign(tx, batch)
        return [Empty() for _ in batch]


def _visible(row: PaymentRow | None, payment_id: int, actor: Actor) -> Payment | ServiceError:
    """A payment of another user is answered exactly like one that does not exist."""
    if row is None or not may_see(actor, row.user_id):
        return PaymentNotFound(payment_id=payment_id)
    return payment_of(row)
