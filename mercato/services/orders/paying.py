"""The requests of clients about a checkout: pay, capture, void, cancel, confirm on account.

Each request reads the order and its checkout under their locks, and redirects the saga to another step, or starts one
where the order has none. The driver that had the saga is fenced: its next save is refused. `checkout.py` has the steps.
"""

from __future__ import annotations

import datetime
import functools
from collections.abc import Callable
from typing import Final, NoReturn

import msgspec

from mercato.chassis.contract import (
    Forbidden,
    OutcomeUnknown,
    ServiceError,
    as_service,
    check_version,
    current,
    trace_of,
)
from mercato.chassis.idempotency.batch import bounded_by_key
from mercato.chassis.idempotency.keys import Keyed, keyed
from mercato.chassis.observability import faults
from mercato.chassis.postgres.database import Database, Tx
from mercato.chassis.sagas import store as saga
from mercato.chassis.sagas.runner import Runner
from mercato.chassis.sagas.store import Next, Saga
from mercato.contracts.order_refusals import (
    AmountNotDue,
    Axis,
    NotPayable,
    OrderCancelled,
    OrderNotFound,
    PaymentDeclined,
    PaymentInProgress,
)
from mercato.contracts.orders import CancelOrder, CapturePart, GetGuestPayment, MovePayment, Order, PaidOrder, PayOrder
from mercato.contracts.payments import GetPayment, ListPayments, Payment as PaymentRecord, PaymentNotFound, Payments

from . import money_store, read_store, rules, steps, store
from .guests import Guests, without_email
from .locking import Locked, locked_order
from .payment_methods import PaymentMethods
from .read_store import OrderRecord
from .steps import CHECKOUT, WAITING, Checkout, Decision

PAY: Final = "orders.pay"
ANSWER_SECONDS: Final = 8.0
"""A request is answered when its checkout is idle, or after this time with the state that it has reached."""
HOLDING_SECONDS: Final = 1.0
"""Together with `ANSWER_SECONDS` below the ten seconds of a request."""
LOCK_SECONDS: Final = 2.0
"""How long a request with a key waits for another one that has the same key, or locks the same order."""

faults.declare(
    *(f"orders.{what}.{when}_commit" for what in ("pay", "cancel", "confirm") for when in ("before", "after"))
)

Decide = Callable[[Locked], Decision | None]
"""The step to which a locked checkout is redirected; None: it stays as it is."""


class BegunPayment(msgspec.Struct, frozen=True):
    """The payment that a request is about. `replayed`: an earlier request with its key has begun it."""

    attempt: int
    nonce: int
    """Of the order."""
    replayed: bool = False


class Paying:
    """Pays, captures, voids, cancels and confirms."""

    def __init__(
        self, database: Database, runner: Runner, payments: Payments, methods: PaymentMethods, guests: Guests
    ) -> None:
        self._database = database
        self._runner = runner
        self._payments = payments
        self._methods = methods
        self._guests = guests

    # --------------------------------------------------------------------------------------------------------- requests

    async def pay(self, request: PayOrder) -> PaidOrder:
        if request.access_token is None:
            return await self._pay(request)
        async with self._guests.acting(request.id, request.access_token):
            return await self._pay(request)

    async def _pay(self, request: PayOrder) -> PaidOrder:
        method = await self._methods.check_one(request.method)
        await self._wait_until_held(request.id)
        with bounded_by_key():
            begun = await self._begin_payment(request, method)
        await self.wait_until_idle(request.id)
        payment = await self._payment(request.id, begun)
        # The key has begun this payment: also where it was made, and refunded since, the payment is the answer.
        was_made = begun.replayed and payment.authorized_minor > 0 and payment.code is None
        if payment.status in ("failed", "voided") and not was_made:
            raise await self._refusal(payment, replayed=begun.replayed)
        return PaidOrder(payment=payment, replayed=begun.replayed)

    async def _begin_payment(self, request: PayOrder, method: str) -> BegunPayment:
        """Begins a payment, or finds the one that the key of the request has begun, however long ago."""
        key = keyed(request, current.get().actor)
        async with locked_order(self._database, request.id, lock_seconds=LOCK_SECONDS) as (tx, locked):
            redirected = None
            begun = await _payment_of_key(tx, key, locked.record) if key is not None else None
            if begun is None:
                decision = _begin_payment(request, method, locked)
                begun = BegunPayment(decision.state.attempt, locked.record.nonce)
                if key is not None:
                    await money_store.insert_payment_key(tx, key, request.id, begun.attempt)
                await money_store.begin_payment(tx, request.id, begun.attempt, locked.order.waived_minor)
                record = msgspec.structs.replace(locked.record, payment_attempt=begun.attempt)
                redirected = await self._redirect(tx, msgspec.structs.replace(locked, record=record), decision)
                await faults.point("orders.pay.before_commit")
        await faults.point("orders.pay.after_commit")
        if redirected is not None:
            self._runner.drive([redirected])
        return begun

    async def guest_payment(self, request: GetGuestPayment) -> PaymentRecord:
        """A payment of the order whose token is sent, not of another order that had its id.

        Raises `PaymentNotFound`.
        """
        with as_service():
            payment = await self._payments.get(GetPayment(id=request.payment_id))
        try:
            record = await self._guests.admitted(payment.order_id, request.access_token)
        except OrderNotFound:
            raise PaymentNotFound(payment_id=request.payment_id) from None
        with as_service():
            of_order = ListPayments(order_id=record.id, order_nonce=record.nonce, limit=200)
            page = await self._payments.list(of_order)
        for found in page.payments:
            if found.id == payment.id:
                return found
        raise PaymentNotFound(payment_id=request.payment_id)

    async def capture(self, request: MovePayment) -> PaidOrder:
        """Captures the whole amount of a payment that staff have authorized."""
        return await self.capture_part(CapturePart(payment_id=request.payment_id))

    async def capture_part(self, request: CapturePart) -> PaidOrder:
        """Captures an amount of a payment that staff have authorized, or all of it."""
        payment = await self._get(request.payment_id)
        await self._send(payment.order_id, "pay", functools.partial(_capture, payment, request))
        await self.wait_until_idle(payment.order_id)
        captured = await self._get(request.payment_id)
        if captured.status == "voided":  # the authorization has expired before
            raise await self._refusal(captured)
        return PaidOrder(payment=captured)

    async def void(self, request: MovePayment) -> PaidOrder:
        """Voids an authorization, and cancels its order: goods that are not paid for are not sold."""
        payment = await self._get(request.payment_id)
        await self._send(payment.order_id, "cancel", functools.partial(_void, payment))
        await self.wait_until_idle(payment.order_id)
        return PaidOrder(payment=await self._get(request.payment_id))

    async def cancel(self, request: CancelOrder) -> Order:
        """Cancels an order, and answers at once: the saga undoes payment and stock afterwards."""
        async with self._guests.acting(request.id, request.access_token):
            actor = current.get().actor
            if request.internal_note and rules.is_buyer(actor):
                raise Forbidden(operation="orders.cancel with an internal note", role=actor.role)
            order = await self._send(request.id, "cancel", functools.partial(_cancel, request))
        return order if request.access_token is None else without_email(order)

    async def confirm(self, order_id: int, version: int | None) -> Order:
        """Sells an order without a payment: the customer pays later, or elsewhere. Raises `OrderCancelled`."""
        await self._wait_until_held(order_id)
        await self._send(order_id, "confirm", functools.partial(_confirm, version))
        await self.wait_until_idle(order_id)
        async with self._database.read() as tx:
            order = (await read_store.get(tx, [order_id]))[order_id].order
        if order.status == "cancelled":
            raise OrderCancelled(order_id=order_id, reason=order.reason.code if order.reason else "requested")
        if order.status == "pending":
            raise OutcomeUnknown(operation="orders.move")
        return order

    async def _wait_until_held(self, order_id: int) -> None:
        """Waits while a checkout without a payment reserves the stock of an order that was just placed."""
        async with self._database.read() as tx:
            found = await saga.find(tx, (order_id, CHECKOUT, ""))
        if found and found.step == "reserve" and not msgspec.json.decode(found.state, type=Checkout).paying:
            await self.wait_until_idle(order_id, HOLDING_SECONDS)

    async def wait_until_idle(
        self, order_id: int, seconds: float = ANSWER_SECONDS, *, until_drained: bool = False
    ) -> None:
        """Returns when no process works on the checkout of an order, or after `seconds`.

        `until_drained`: raises `Unavailable` where this process has to stop meanwhile.
        """
        await self._runner.wait_until_idle((order_id, CHECKOUT, ""), WAITING, seconds, until_drained=until_drained)

    # ------------------------------------------------------------------------------------------- redirects and refusals

    async def _send(self, order_id: int, what: str, decide: Decide) -> Order:
        """Redirects a checkout to the step that `decide` gives. Gives the order as it is then."""
        async with locked_order(self._database, order_id) as (tx, locked):
            order, redirected = locked.order, None
            if decision := decide(locked):
                redirected = await self._redirect(tx, locked, decision)
                order = redirected.memo.order
                await faults.point(f"orders.{what}.before_commit")
        await faults.point(f"orders.{what}.after_commit")
        if redirected is not None:
            self._runner.drive([redirected])
        return order

    async def _redirect(self, tx: Tx, locked: Locked, decision: Decision) -> Saga:
        """Moves the saga of a locked order to a step, and the order with it. The caller drives it after the commit."""
        key, record = (locked.record.id, CHECKOUT, ""), locked.record
        outcome = Next(decision.step, steps.encoded(decision.state), running=True)
        if locked.checkout is None:
            redirected = Saga(key, outcome.step, outcome.state, trace=trace_of(current.get()))
            await saga.start(tx, [redirected], self._runner.driver)
        else:
            fenced = await saga.fence(tx, key, self._runner.driver)
            assert fenced is not None, "the row is locked"
            redirected = fenced
            redirected.trace = trace_of(current.get()) or fenced.trace
            await saga.save(tx, [(redirected, outcome)])
            redirected.advance(outcome)
        if decision.status:
            move = store.Move(
                locked.order,
                status=decision.status,
                reason=decision.reason,
                note=decision.reason.message if decision.reason else "",
                internal_note=decision.internal_note,
                epoch=redirected.epoch,
            )
            [moved] = await store.move(tx, [move], current.get().actor)
            assert moved, "the row is locked"
            record = msgspec.structs.replace(record, order=moved)
        redirected.memo = record
        return redirected

    async def _get(self, payment_id: int) -> PaymentRecord:
        with as_service():
            return await self._payments.get(GetPayment(id=payment_id))

    async def _refusal(self, payment: PaymentRecord, *, replayed: bool = False) -> ServiceError:
        """Why a payment was not made: the provider declined it, or its order was cancelled before."""
        async with self._database.read() as tx:
            order = (await read_store.get(tx, [payment.order_id]))[payment.order_id].order
        reason = order.reason
        if reason is not None and reason.code not in ("payment_declined", "payment_lost"):
            return OrderCancelled(order_id=order.id, reason=reason.code)
        return await self._declined(order, payment, replayed=replayed)

    async def refusal(self, record: OrderRecord) -> ServiceError | None:
        """Why an order was refused: its last payment was declined, or it was cancelled by the shop.

        None where neither is so, or it is not known yet. Calls payments only where a payment may have been declined.
        """
        order = record.order
        if refusal := rules.cancelled_as(order):
            return refusal
        if not record.payment_attempt or not rules.may_be_declined(order):
            return None
        if order.status == "pending" and not await self._payable_until(order):
            return None
        payment = await self._payment(order.id, BegunPayment(record.payment_attempt, record.nonce))
        return await self._declined(order, payment) if payment.status in ("failed", "voided") else None

    async def _declined(self, order: Order, payment: PaymentRecord, *, replayed: bool = False) -> PaymentDeclined:
        code = payment.code or (order.reason.provider_code if order.reason else None) or payment.status
        return PaymentDeclined(
            order_id=order.id,
            payment_id=payment.id,
            provider_code=code,
            payable_until=await self._payable_until(order),
            replayed=replayed,
        )

    async def _payable_until(self, order: Order) -> datetime.datetime | None:
        """The time until which the stock of an order is held for its next payment; None where it waits for none."""
        if order.status != "pending":
            return None
        async with self._database.read() as tx:
            return await saga.wakes_at(tx, (order.id, CHECKOUT, ""), "awaiting")

    async def _payment(self, order_id: int, begun: BegunPayment) -> PaymentRecord:
        with as_service():
            page = await self._payments.list(ListPayments(order_id=order_id, order_nonce=begun.nonce, limit=200))
        for payment in page.payments:
            if payment.attempt == begun.attempt:
                return payment
        # Payments was not called yet: out of stock, the order was cancelled, or the service is overloaded.
        async with self._database.read() as tx:
            order = (await read_store.get(tx, [order_id]))[order_id].order
        if order.status == "cancelled":
            raise OrderCancelled(order_id=order_id, reason=order.reason.code if order.reason else "requested")
        raise OutcomeUnknown(operation=PAY)


# ----------------------------------------------------------------------------------------------------------- decisions


async def _payment_of_key(tx: Tx, key: Keyed, record: OrderRecord) -> BegunPayment | None:
    """The payment that the key of a request has begun. Raises `IdempotencyKeyReused` for another request."""
    found = await money_store.payment_of_key(tx, key.identity)
    if found is None:
        return None
    key.check(found.fingerprint, order_id=(record.id, found.order_id))
    return BegunPayment(found.payment_attempt, record.nonce, replayed=True)


def _begin_payment(request: PayOrder, method: str, locked: Locked) -> Decision:
    """Raises why the order cannot be paid in this way."""
    actor = current.get().actor
    if not request.capture and rules.is_buyer(actor):
        # It holds stock that is not paid for, without a time limit: only staff may decide that.
        raise Forbidden(operation="orders.pay without capture", role=actor.role)
    _check_due(locked.order, request)
    _check_payable(locked)
    state = msgspec.structs.replace(
        locked.state,
        paying=True,
        method=method,
        attempt=locked.record.payment_attempt + 1,
        capture=request.capture,
        on_account=locked.record.on_account,
    )
    return Decision("reserve", "payment requested", state, running=True)


def _check_payable(locked: Locked) -> None:
    order = locked.order
    if order.status == "cancelled":
        raise OrderCancelled(order_id=order.id, reason=order.reason.code if order.reason else "requested")
    if order.payment != "unpaid":
        _raise_illegal(order, "payment", "paid")
    if locked.checkout is not None and locked.checkout.step != "awaiting":
        raise PaymentInProgress(order_id=order.id)
    if order.status != "pending" and not locked.record.on_account:
        raise NotPayable(order_id=order.id, why="it was sold without stock")
    if rules.due_minor(order) == 0:
        raise NotPayable(order_id=order.id, why="nothing is due, all goods that were to be paid were returned")


def _check_due(order: Order, request: PayOrder) -> None:
    currency = request.expected_currency
    shown = rules.minor_of(
        "expected_total", request.expected_total, request.expected_total_minor, currency or order.currency
    )
    if (shown is None or shown == rules.payable_minor(order)) and (currency is None or currency == order.currency):
        return
    raise AmountNotDue(
        order_id=order.id,
        expected_minor=rules.payable_minor(order) if shown is None else shown,
        expected_currency=currency or order.currency,
        due_minor=rules.payable_minor(order),
        due_currency=order.currency,
    )


def _capture(payment: PaymentRecord, request: CapturePart, locked: Locked) -> Decision | None:
    order, attempt = locked.order, locked.record.payment_attempt
    wanted_minor = rules.check_capture(order, payment, request)
    if payment.captured_minor:
        return rules.check_captured(payment, wanted_minor, payment.captured_minor)  # a repetition
    if rules.paid_minor(order) and payment.attempt == attempt:
        return rules.check_captured(
            payment, wanted_minor, rules.paid_minor(order)
        )  # the same, since `payment` was read
    if payment.attempt != attempt:
        _raise_illegal(order, "payment", "paid")
    step = locked.checkout.step if locked.checkout else None
    if step == "settle" and locked.state.capture:  # it is being captured at this moment
        return rules.check_captured(payment, wanted_minor, locked.state.capture_minor or payment.amount_minor)
    if step == "settle":  # its stock is being sold
        raise PaymentInProgress(order_id=order.id)
    if order.payment != "authorized" or step != "authorized":
        _raise_illegal(order, "payment", "paid")
    part_minor = None if wanted_minor == payment.amount_minor else wanted_minor
    state = msgspec.structs.replace(locked.state, capture=True, capture_minor=part_minor)
    return Decision("settle", "capture requested", state, running=True)


def _void(payment: PaymentRecord, locked: Locked) -> Decision | None:
    order, attempt = locked.order, locked.record.payment_attempt
    if payment.status == "voided" or (order.status == "cancelled" and payment.attempt == attempt):
        return None  # a repetition
    if order.payment != "authorized" or payment.attempt != attempt:
        _raise_illegal(order, "payment", "voided")
    rules.check_move(order, "status", "cancelled")
    return steps.cancelled_by(locked.state, "its payment was voided")


def _cancel(request: CancelOrder, locked: Locked) -> Decision | None:
    order = locked.order
    if order.status == "cancelled":
        return None  # a retry of a request whose answer was lost
    check_version(request.version, order.version)
    rules.check_move(order, "status", "cancelled")
    if locked.record.refund_pending_minor:
        raise PaymentInProgress(order_id=order.id)
    return steps.cancelled_by(locked.state, request.reason, request.internal_note)


def _confirm(version: int | None, locked: Locked) -> Decision | None:
    order = locked.order
    if order.status == "confirmed":
        return None
    check_version(version, order.version)
    rules.check_move(order, "status", "confirmed")
    if locked.checkout is None or locked.checkout.step != "awaiting":
        raise PaymentInProgress(order_id=order.id)
    state = msgspec.structs.replace(locked.state, on_account=True, confirmed_by=current.get().actor.id)
    return Decision("reserve", "confirmed by hand", state, running=True)


def _raise_illegal(order: Order, axis: Axis, wanted: str) -> NoReturn:
    raise rules.illegal(order, axis, wanted)
