"""What clients ask of a checkout: pay, capture, void, cancel, confirm on account.

Each request looks at the order and its checkout under their locks, and redirects the saga to another step, or begins
one where the order has none. The driver that had the saga has lost it: its next save is refused. The steps are in
`checkout.py`.
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
)
from mercato.chassis.idempotency.batch import bounded_by_key
from mercato.chassis.idempotency.keys import keyed
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
from .locking import Locked, in_lock
from .payment_methods import PaymentMethods
from .read_store import OrderRecord
from .steps import CHECKOUT, RESTING, Checkout, Decision

PAY: Final = "orders.pay"
ANSWER_SECONDS: Final = 8.0
"""A request is answered when its checkout is idle, or after so long with how far it has come."""
HOLDING_SECONDS: Final = 1.0
"""Together with it below the ten seconds of a request."""
LOCK_SECONDS: Final = 2.0
"""How long a request with a key waits for another one with the same key, or about the same order."""

faults.declare(
    *(f"orders.{what}.{when}_commit" for what in ("pay", "cancel", "confirm") for when in ("before", "after"))
)

Decide = Callable[[Locked], Decision | None]
"""Where a checkout is sent; None: it stays as it is."""


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

    # ---------------------------------------------------------------------------------------------------- what is asked

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
        # A payment that was made, and refunded since, is what its key stands for.
        was_made = begun.replayed and payment.authorized_minor > 0 and payment.code is None
        if payment.status in ("failed", "voided") and not was_made:
            raise await self._refusal(payment, replayed=begun.replayed)
        return PaidOrder(payment=payment, replayed=begun.replayed)

    async def _begin_payment(self, request: PayOrder, method: str) -> BegunPayment:
        """Begins a payment, or finds the one that the key of the request has begun, however long ago."""

        async def begin(tx: Tx, locked: Locked) -> tuple[BegunPayment, Saga | None]:
            if key is not None and (found := await money_store.payment_of_key(tx, key.identity)):
                key.check(found.fingerprint, order_id=(request.id, found.order_id))
                return BegunPayment(found.payment_attempt, locked.record.nonce, replayed=True), None
            decision = _begin_payment(request, method, locked)
            attempt = decision.state.attempt
            if key is not None:
                await money_store.insert_payment_key(tx, key, request.id, attempt)
            await money_store.begin_payment(tx, request.id, attempt, locked.order.waived_minor)
            record = msgspec.structs.replace(locked.record, payment_attempt=attempt)
            redirected = await self._redirect(tx, msgspec.structs.replace(locked, record=record), decision)
            await faults.point("orders.pay.before_commit")
            return BegunPayment(attempt, record.nonce), redirected

        key = keyed(request, current.get().actor)
        begun, redirected = await in_lock(self._database, request.id, begin, lock_seconds=LOCK_SECONDS)
        await faults.point("orders.pay.after_commit")
        if redirected is not None:
            self._runner.drive([redirected])
        return begun

    async def guest_payment(self, request: GetGuestPayment) -> PaymentRecord:
        """A payment of the order that the token opens, not of another order that had its id.

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
        """Takes all the money of a payment that was authorized by hand."""
        return await self.capture_part(CapturePart(payment_id=request.payment_id))

    async def capture_part(self, request: CapturePart) -> PaidOrder:
        """Takes an amount of a payment that was authorized by hand, or all."""
        payment = await self._get(request.payment_id)
        await self._send(payment.order_id, "pay", functools.partial(_capture, payment, request))
        await self.wait_until_idle(payment.order_id)
        captured = await self._get(request.payment_id)
        if captured.status == "voided":  # it ran out before
            raise await self._refusal(captured)
        return PaidOrder(payment=captured)

    async def void(self, request: MovePayment) -> PaidOrder:
        """Gives an authorization back: an order that is not paid for is not sold."""
        payment = await self._get(request.payment_id)
        await self._send(payment.order_id, "cancel", functools.partial(_void, payment))
        await self.wait_until_idle(payment.order_id)
        return PaidOrder(payment=await self._get(request.payment_id))

    async def cancel(self, request: CancelOrder) -> Order:
        """Answers at once; money and stock follow."""
        async with self._guests.acting(request.id, request.access_token):
            actor = current.get().actor
            if request.internal_note and rules.is_buyer(actor):
                raise Forbidden(operation="orders.cancel with an internal note", role=actor.role)
            order = await self._send(request.id, "cancel", functools.partial(_cancel, request))
        return order if request.access_token is None else without_email(order)

    async def confirm(self, order_id: int, version: int | None) -> Order:
        """Sells an order without a payment: it will be paid later, or elsewhere. Raises `OrderCancelled`."""
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
        """Waits for the stock of an order that was just placed, which is being held at this moment."""
        async with self._database.read() as tx:
            found = await saga.find(tx, (order_id, CHECKOUT, ""))
        if found and found.step == "reserve" and not msgspec.json.decode(found.state, type=Checkout).paying:
            await self.wait_until_idle(order_id, HOLDING_SECONDS)

    async def wait_until_idle(
        self, order_id: int, seconds: float = ANSWER_SECONDS, *, until_drained: bool = False
    ) -> None:
        """Returns when no process works on the checkout of an order, or when the time is over.

        `until_drained`: raises `Unavailable` where this process is asked to stop meanwhile.
        """
        await self._runner.wait_until_idle((order_id, CHECKOUT, ""), RESTING, seconds, until_drained=until_drained)

    # --------------------------------------------------------------------------------------------------- how it is done

    async def _send(self, order_id: int, what: str, decide: Decide) -> Order:
        """Redirects a checkout to where `decide` says. Gives the order as it is then."""

        async def send(tx: Tx, locked: Locked) -> tuple[Order, Saga | None]:
            decision = decide(locked)
            if decision is None:
                return locked.order, None
            redirected = await self._redirect(tx, locked, decision)
            await faults.point(f"orders.{what}.before_commit")
            return redirected.memo.order, redirected

        order, redirected = await in_lock(self._database, order_id, send)
        await faults.point(f"orders.{what}.after_commit")
        if redirected is not None:
            self._runner.drive([redirected])
        return order

    async def _redirect(self, tx: Tx, locked: Locked, decision: Decision) -> Saga:
        """Sends the saga of a locked order to a step, and moves the order. The caller drives it after the commit."""
        key, record = (locked.record.id, CHECKOUT, ""), locked.record
        outcome = Next(decision.step, steps.encoded(decision.state), running=True)
        if locked.checkout is None:
            redirected = Saga(key, outcome.step, outcome.state)
            await saga.start(tx, [redirected], self._runner.driver)
        else:
            seized = await saga.seize(tx, key, self._runner.driver)
            assert seized is not None, "the row is locked"
            redirected = seized
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
        """Why a payment came to nothing: the provider declined it, or its order ended before it was made."""
        async with self._database.read() as tx:
            order = (await read_store.get(tx, [payment.order_id]))[payment.order_id].order
        reason = order.reason
        if reason is not None and reason.code not in ("payment_declined", "payment_lost"):
            return OrderCancelled(order_id=order.id, reason=reason.code)
        return await self._declined(order, payment, replayed=replayed)

    async def refusal(self, record: OrderRecord) -> ServiceError | None:
        """Why an order was refused: its last payment was declined, or it was cancelled by the shop.

        None where that is not so, or not known yet. Asks payments only about an order with a payment that was declined.
        """
        order = record.order
        if refusal := rules.cancelled_as(order):
            return refusal
        if not record.payment_attempt or not rules.may_be_declined(order):
            return None
        if order.status == "pending" and not await self._rests(order):
            return None
        payment = await self._payment(order.id, BegunPayment(record.payment_attempt, record.nonce))
        return await self._declined(order, payment) if payment.status in ("failed", "voided") else None

    async def _declined(self, order: Order, payment: PaymentRecord, *, replayed: bool = False) -> PaymentDeclined:
        code = payment.code or (order.reason.provider_code if order.reason else None) or payment.status
        return PaymentDeclined(
            order_id=order.id,
            payment_id=payment.id,
            provider_code=code,
            payable_until=await self._rests(order),
            replayed=replayed,
        )

    async def _rests(self, order: Order) -> datetime.datetime | None:
        """Until when the stock of an order is held for its next payment; None where it waits for none."""
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
        # The provider was not asked yet: the stock was gone, the order was cancelled, or there is too much to do.
        async with self._database.read() as tx:
            order = (await read_store.get(tx, [order_id]))[order_id].order
        if order.status == "cancelled":
            raise OrderCancelled(order_id=order_id, reason=order.reason.code if order.reason else "requested")
        raise OutcomeUnknown(operation=PAY)


# ------------------------------------------------------------------------------------------------------ what is decided


def _begin_payment(request: PayOrder, method: str, locked: Locked) -> Decision:
    """Raises what speaks against the payment."""
    actor = current.get().actor
    if not request.capture and rules.is_buyer(actor):
        # It sells stock that is not paid for, without an end: staff decide that.
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
        raise NotPayable(order_id=order.id, why="nothing is due, all that was to be paid has come back")


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
