"""What people ask of a checkout: pay, capture, void, cancel, confirm on account.

Each of them looks, while nobody else moves it, where the order is, and sends its saga another way. Whoever drove it
until then has lost it: what such a driver still has to save is refused. What happens next is in `checkout.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Final, NoReturn

import msgspec

from mercato.chassis import faults, idempotency, saga
from mercato.chassis.contract import (
    Forbidden,
    OutcomeUnknown,
    RequestInProgress,
    ServiceError,
    StaleVersion,
    current,
)
from mercato.chassis.db import Database, LockTimeout, Tx
from mercato.chassis.idempotency import Keyed
from mercato.chassis.rpc import as_service
from mercato.chassis.runner import Runner
from mercato.chassis.saga import Next
from mercato.contracts.orders import (
    AmountNotDue,
    Axis,
    CancelOrder,
    IllegalMove,
    MovePayment,
    NotPayable,
    Order,
    OrderCancelled,
    OrderNotFound,
    PaidOrder,
    PaymentDeclined,
    PaymentInProgress,
    PayOrder,
)
from mercato.contracts.payments import GetPayment, ListPayments, Payments
from mercato.contracts.payments import Payment as PaymentRecord
from mercato.contracts.roles import CUSTOMER

from . import rules, steps, store
from .steps import CHECKOUT, RESTING, Checkout, Decision

PAY: Final = "orders.pay"
ANSWER_SECONDS: Final = 8.0
"""Who asks hears of the end, or after so long how far it has come."""
HOLDING_SECONDS: Final = 1.0
"""Together with it below the ten seconds of a request."""

faults.declare(
    *(f"orders.{what}.{when}_commit" for what in ("pay", "cancel", "confirm") for when in ("before", "after"))
)


class Standing(msgspec.Struct, frozen=True):
    """An order and its checkout, locked."""

    order: Order
    step: str
    state: Checkout


Decide = Callable[[Tx, Standing], Awaitable[Decision | None]]


class Paying:
    """Pays, captures, voids, cancels and confirms."""

    def __init__(self, database: Database, runner: Runner, payments: Payments) -> None:
        self._database = database
        self._runner = runner
        self._payments = payments

    # ---------------------------------------------------------------------------------------------------- what is asked

    async def pay(self, request: PayOrder) -> PaidOrder:
        begun = _Begun()
        await self._until_held(request.id)
        try:
            await self._redirect(request.id, "pay", functools.partial(_begin_payment, request, begun))
        except LockTimeout:
            raise RequestInProgress from None
        await self.rest(request.id)
        payment = await self._payment(request.id, begun.attempt)
        # A payment that was made, and given back since, is what its key has to tell.
        was_made = begun.replayed and payment.authorized_minor > 0 and payment.code is None
        if payment.status in ("failed", "voided") and not was_made:
            raise await self._refusal(payment)
        return PaidOrder(payment=payment, replayed=begun.replayed)

    async def capture(self, request: MovePayment) -> PaidOrder:
        """Takes the money of a payment that was authorized by hand."""
        payment = await self._get(request.payment_id)
        await self._redirect(payment.order_id, "pay", functools.partial(_capture, payment))
        await self.rest(payment.order_id)
        captured = await self._get(request.payment_id)
        if captured.status == "voided":  # it ran out before
            raise await self._refusal(captured)
        return PaidOrder(payment=captured)

    async def void(self, request: MovePayment) -> PaidOrder:
        """Gives an authorization back: an order that is not paid for is not sold."""
        payment = await self._get(request.payment_id)
        await self._redirect(payment.order_id, "cancel", functools.partial(_void, payment))
        await self.rest(payment.order_id)
        return PaidOrder(payment=await self._get(request.payment_id))

    async def cancel(self, request: CancelOrder) -> Order:
        """Answers at once; money and stock follow."""
        return await self._redirect(request.id, "cancel", functools.partial(_cancel, request.reason, request.version))

    async def confirm(self, order_id: int, version: int | None) -> Order:
        """Sells an order without a payment: it will be paid later, or elsewhere. Raises `OrderCancelled`."""
        await self._until_held(order_id)
        await self._redirect(order_id, "confirm", functools.partial(_confirm, version))
        await self.rest(order_id)
        async with self._database.read() as tx:
            order = (await store.get(tx, [order_id]))[order_id]
        if order.status == "cancelled":
            raise OrderCancelled(order_id=order_id, reason=order.reason.code if order.reason else "requested")
        if order.status == "pending":
            raise OutcomeUnknown(operation="orders.move")
        return order

    async def _until_held(self, order_id: int) -> None:
        """Waits for the stock of an order that was just placed: it is being held at this moment."""
        async with self._database.read() as tx:
            found = await saga.find(tx, (order_id, CHECKOUT, ""))
        if found and found.step == "reserve" and not msgspec.json.decode(found.state, type=Checkout).paying:
            await self.rest(order_id, HOLDING_SECONDS)

    async def rest(self, order_id: int, seconds: float = ANSWER_SECONDS) -> None:
        """Returns when nothing is under way for the checkout of an order, or when the time is over."""
        await self._runner.at_rest((order_id, CHECKOUT, ""), RESTING, seconds)

    # --------------------------------------------------------------------------------------------------- how it is done

    async def _redirect(self, order_id: int, what: str, decide: Decide) -> Order:
        """Sends a checkout where `decide` says; None: it stays on its way. Gives the order as it is then."""
        actor, key = current.get().actor, (order_id, CHECKOUT, "")
        lease_s = self._runner.lease_seconds
        async with self._database.transaction() as tx:
            found = await saga.lock(tx, key)
            order = await store.get_locked(tx, order_id)
            if order is None or found is None or not rules.may_see(actor, order.user_id):
                raise OrderNotFound(order_id=order_id)
            state = msgspec.json.decode(found.state, type=Checkout)
            decision = await decide(tx, Standing(order, found.step, state))
            if decision is None:
                return order
            taken = await saga.seize(tx, key, lease_s)
            assert taken is not None, "the row is locked"
            came_to = Next(
                decision.step, steps.encoded(decision.state), decision.outcome, running=True, wake_s=decision.wake_s
            )
            await saga.save(tx, [(taken, came_to)], lease_s)
            if decision.status:
                move = store.Move(order, status=decision.status, reason=decision.reason, note=_note(decision))
                [moved] = await store.move(tx, [move], actor)
                assert moved, "the row is locked"
                order = moved
            await faults.point(f"orders.{what}.before_commit")
        await faults.point(f"orders.{what}.after_commit")
        taken.advance(came_to)
        taken.memo = order
        self._runner.drive([taken])
        return order

    async def _get(self, payment_id: int) -> PaymentRecord:
        with as_service():
            return await self._payments.get(GetPayment(id=payment_id))

    async def _refusal(self, payment: PaymentRecord) -> ServiceError:
        """Why a payment came to nothing: the provider declined it, or its order ended before it was made."""
        async with self._database.read() as tx:
            order = (await store.get(tx, [payment.order_id]))[payment.order_id]
        reason = order.reason
        if reason is not None and reason.code not in ("payment_declined", "payment_lost"):
            return OrderCancelled(order_id=order.id, reason=reason.code)
        code = payment.code or (reason.provider_code if reason else None) or payment.status
        return PaymentDeclined(order_id=order.id, payment_id=payment.id, provider_code=code)

    async def _payment(self, order_id: int, attempt: int) -> PaymentRecord:
        with as_service():
            page = await self._payments.list(ListPayments(order_id=order_id, limit=200))
        for payment in page.payments:
            if payment.attempt == attempt:
                return payment
        # The provider was not asked yet: the stock was gone, the order was cancelled, or there is too much to do.
        async with self._database.read() as tx:
            order = (await store.get(tx, [order_id]))[order_id]
        if order.status == "cancelled":
            raise OrderCancelled(order_id=order_id, reason=order.reason.code if order.reason else "requested")
        raise OutcomeUnknown(operation=PAY)


# ------------------------------------------------------------------------------------------------------ what is decided


class _Begun(msgspec.Struct):
    """Which payment the answer is about."""

    attempt: int = 0
    replayed: bool = False


async def _begin_payment(request: PayOrder, begun: _Begun, tx: Tx, standing: Standing) -> Decision | None:
    keyed = None
    if request.idempotency_key is not None:
        principal = idempotency.principal_of(current.get().actor)
        keyed = Keyed(principal, request.idempotency_key, request.fingerprint)
        stored = await idempotency.claim_one(tx, PAY, keyed)
        if stored is not None:
            begun.attempt, begun.replayed = int(stored), True
            return None
    order, state = standing.order, standing.state
    actor = current.get().actor
    if not request.capture and actor.role == CUSTOMER:
        # Stock that is sold and not paid for, for as long as somebody likes: staff decide that.
        raise Forbidden(operation="orders.pay without capture", role=actor.role)
    _check_due(order, request)
    _check_payable(standing)
    begun.attempt = state.attempt + 1
    if keyed:
        await idempotency.remember(tx, PAY, [keyed], [str(begun.attempt).encode()])
    paying = msgspec.structs.replace(
        state, paying=True, method=request.method, attempt=begun.attempt, capture=request.capture, with_order=False
    )
    return Decision("reserve", "payment asked for", paying, running=True)


def _check_payable(standing: Standing) -> None:
    order = standing.order
    if order.status == "cancelled":
        raise OrderCancelled(order_id=order.id, reason=order.reason.code if order.reason else "requested")
    if order.payment != "unpaid":
        _raise_illegal(order, "payment", "paid")
    if standing.step not in ("awaiting", "done"):
        raise PaymentInProgress(order_id=order.id)
    sold_without_stock = order.status != "pending" and not standing.state.on_account
    if sold_without_stock or any(line.returned for line in order.lines):
        raise NotPayable(order_id=order.id)


def _check_due(order: Order, request: PayOrder) -> None:
    shown, currency = request.expected_total_minor, request.expected_currency
    if (shown is None or shown == order.total_minor) and (currency is None or currency == order.currency):
        return
    raise AmountNotDue(
        order_id=order.id,
        expected_minor=order.total_minor if shown is None else shown,
        expected_currency=currency or order.currency,
        due_minor=order.total_minor,
        due_currency=order.currency,
    )


async def _capture(payment: PaymentRecord, _tx: Tx, standing: Standing) -> Decision | None:
    order = standing.order
    paid = order.payment in ("paid", "partially_refunded", "refunded") and payment.attempt == standing.state.attempt
    if paid or payment.status in ("captured", "partially_refunded", "refunded"):
        return None  # a repetition
    if payment.attempt != standing.state.attempt:
        _raise_illegal(order, "payment", "paid")
    if standing.step == "settle":
        return None  # it is being captured at this moment
    if order.payment != "authorized" or standing.step != "authorized":
        _raise_illegal(order, "payment", "paid")
    state = msgspec.structs.replace(standing.state, capture=True)
    return Decision("settle", "capture asked for", state, running=True)


async def _void(payment: PaymentRecord, _tx: Tx, standing: Standing) -> Decision | None:
    order = standing.order
    if payment.status == "voided" or (order.status == "cancelled" and payment.attempt == standing.state.attempt):
        return None  # a repetition
    if order.payment != "authorized" or payment.attempt != standing.state.attempt:
        _raise_illegal(order, "payment", "voided")
    rules.check_move(order, "status", "cancelled")
    return steps.cancelled_by(order, standing.state, "its payment was voided")


async def _cancel(message: str, version: int | None, tx: Tx, standing: Standing) -> Decision | None:
    order = standing.order
    if order.status == "cancelled":
        return None  # a retry of one whose answer was lost
    check_version(order, version)
    rules.check_move(order, "status", "cancelled")
    if await store.refund_is_pending(tx, order.id):
        raise PaymentInProgress(order_id=order.id)
    return steps.cancelled_by(order, standing.state, message)


async def _confirm(version: int | None, _tx: Tx, standing: Standing) -> Decision | None:
    order = standing.order
    if order.status == "confirmed":
        return None
    check_version(order, version)
    rules.check_move(order, "status", "confirmed")
    if standing.step != "awaiting":
        raise PaymentInProgress(order_id=order.id)
    state = msgspec.structs.replace(standing.state, on_account=True, confirmed_by=current.get().actor.id)
    return Decision("reserve", "confirmed by hand", state, running=True)


def check_version(order: Order, version: int | None) -> None:
    if version is not None and version != order.version:
        raise StaleVersion(expected=version, actual=order.version)


def _note(decision: Decision) -> str:
    return decision.reason.message if decision.reason else ""


def _raise_illegal(order: Order, axis: Axis, wanted: str) -> NoReturn:
    legal = rules.legal_moves(order, axis)
    raise IllegalMove(order_id=order.id, axis=axis, current=getattr(order, axis), wanted=wanted, legal=legal)
