"""Checkout: from an order to money, exactly once. `steps.py` decides which step is next; this module executes it.

Each step takes a batch of orders, calls inventory and payments for all of them at once, and saves the outcome in one
transaction: the saga's next step or its end, the move of the order, its history, its events. Every call carries a key
made of stored data, and the called service executes it once: a step that was interrupted can run again.

A paid order takes seven transactions, each for a whole batch: place; reserve; record the intent, charge at the bank,
record the result; commit the stock; save.

    crash ...                               stored                   who continues
    after the order's commit                order, saga              a sweeper: reserve
    after the stock was held                a hold                   a sweeper: reserve answers with the same hold
    after the provider took the money       a charge                 a sweeper: charge answers with the same payment
    after the stock was sold                a sale, a charge         a sweeper: each call answers with what was done
    after the pivot of a manual capture     order confirmed          a sweeper: settle, forward only
    in the middle of an unwind              order cancelled          a sweeper: unwind, from its beginning
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeVar

import msgspec
import structlog

from mercato.chassis.contract import SERVICE_ROLE, Actor, Message, ServiceError
from mercato.chassis.observability import faults
from mercato.chassis.postgres.database import Database, Tx
from mercato.chassis.postgres.sequences import move_own_past
from mercato.chassis.sagas.runner import Runner
from mercato.chassis.sagas.store import Next, Saga
from mercato.contracts.inventory import (
    AnotherOrder as StockOfAnotherOrder,
    CommitStock,
    CustomerBound,
    Inventory,
    ReleaseStock,
    ReserveStock,
    ReturnStock,
    StockLine,
)
from mercato.contracts.orders import Order
from mercato.contracts.payments import (
    AnotherOrder as PaymentOfAnotherOrder,
    AuthorizePayment,
    CapturePart,
    CapturePayment,
    ChargePayment,
    Payment as PaymentRecord,
    Payments,
    RefundDeclined,
    RefundPayment,
    VoidPayment,
)
from mercato.contracts.roles import GUEST_USER, STAFF

from . import history_store, money_store, read_store, rules, steps, store
from .money_store import CANCEL, Refunded
from .read_store import OrderRecord
from .rules import Limits
from .steps import CHECKOUT, Checkout, Decision, RetryLater

Q = TypeVar("Q", bound=Message)
A = TypeVar("A", bound=Message)

log = structlog.stdlib.get_logger("mercato.orders")

SHOP: Final = Actor(SERVICE_ROLE)
"""The actor of moves that no client asked for: the step before leads to them."""

ORDER_IDS: Final = "orders_id_seq"

CALLS: Final = ("reserve", "charge", "authorize", "commit", "capture", "void", "refund", "release", "restock")
SAVES: Final = ("reserve", "settle", "waiting", "unwind")

faults.declare(
    *(f"checkout.{call}.{when}_call" for call in CALLS for when in ("before", "after")),
    *(f"checkout.{step}.{when}_commit" for step in SAVES for when in ("before", "after")),
)


class CheckoutRun(msgspec.Struct):
    """One order in one run of a step. `decision` is None until an answer decides."""

    saga: Saga
    record: OrderRecord
    state: Checkout
    decision: Decision | RetryLater | None = None
    payment: PaymentRecord | None = None
    """In an unwind: the payment after it was voided or refunded."""
    is_kept: bool = False
    """In an unwind: the provider has declined to refund the payment."""

    @property
    def id(self) -> int:
        return self.record.order.id

    @property
    def order(self) -> Order:
        return self.record.order


class CheckoutSteps:
    """The steps of checkout. `window_s`: how long after its placing an order can be paid."""

    def __init__(
        self,
        database: Database,
        runner: Runner,
        *,
        inventory: Inventory,
        payments: Payments,
        window_s: float,
        limits: Limits,
    ) -> None:
        self._database = database
        self._runner = runner
        self._inventory = inventory
        self._payments = payments
        self._window_s = window_s
        self._limits = limits
        runner.register(
            CHECKOUT,
            {"reserve": self.reserve, "awaiting": self.expire, "settle": self.settle, "unwind": self.unwind},
        )

    # -------------------------------------------------------------------------------------------------------- the steps

    async def reserve(self, sagas: Sequence[Saga]) -> None:
        """Holds the stock, charges where there is a payment to make, and sells the stock."""
        runs = await self._load(sagas)
        reserved = await self._call("reserve", self._inventory.reserve.many, runs, self._reserve)
        await self._move_sequence_past(reserved)
        for run, answer in reserved:
            run.decision = steps.after_reserve(run.order, run.state, answer, self._window_s)
        paying = [run for run in _undecided(runs) if run.state.paying]
        await self._pay(paying)
        for run, answer in await self._call("commit", self._inventory.commit.many, _undecided(runs), _commit):
            run.decision = steps.after_commit(run.order, run.state, answer)
        await self._save("reserve", runs)

    async def settle(self, sagas: Sequence[Saga]) -> None:
        """Sells what is held, and captures what was authorized."""
        runs = await self._load(sagas)
        for run, answer in await self._call("commit", self._inventory.commit.many, runs, _commit):
            run.decision = steps.after_commit(run.order, run.state, answer)
        wholes = [run for run in _undecided(runs) if run.state.capture_minor is None]
        parts = [run for run in _undecided(runs) if run.state.capture_minor is not None]
        for run, answer in (
            *await self._call("capture", self._payments.capture.many, wholes, _capture),
            *await self._call("capture", self._payments.capture_part.many, parts, _capture_part),
        ):
            run.decision = steps.after_capture(run.order, run.state, answer)
        await self._save("settle", runs)

    async def expire(self, sagas: Sequence[Saga]) -> None:
        """Cancels orders that were not paid in time."""
        runs = await self._load(sagas)
        for run in runs:
            run.decision = steps.after_awaiting(run.state)
        await self._save("waiting", runs)

    async def unwind(self, sagas: Sequence[Saga]) -> None:
        """Undoes what was done for cancelled orders: the payment first, which hurts customers most, then the stock."""
        runs = await self._load(sagas)
        await self._undo_payments(runs)
        released = await self._undo("release", self._inventory.release.many, _undecided(runs), _release)
        for run, reservation in released:
            run.decision = steps.after_release(reservation)
        sold = [run for run, reservation in released if reservation.state == "committed" and _lines_to_restock(run)]
        await self._undo("restock", self._inventory.restock.many, sold, _restock)
        for run in _undecided(runs):
            run.decision = steps.after_unwind(run.order, run.state, run.payment, is_kept=run.is_kept)
        await self._save("unwind", runs)

    # ----------------------------------------------------------------------------------------------- parts of the steps

    async def _load(self, sagas: Sequence[Saga]) -> list[CheckoutRun]:
        if missing := [saga.subject_id for saga in sagas if saga.memo is None]:
            async with self._database.read() as tx:
                found = await read_store.get(tx, missing)
            for saga in sagas:
                saga.memo = saga.memo or found[saga.subject_id]
        return [CheckoutRun(saga, saga.memo, steps.decoded(saga.state)) for saga in sagas]

    def _reserve(self, run: CheckoutRun) -> ReserveStock:
        return ReserveStock(
            order_id=run.id,
            order_nonce=run.record.nonce,
            lines=_lines(run.order),
            for_payment=steps.is_final(run.order, run.state),
            idempotency_key=f"order:{run.id}:reserve",
            guest=run.order.user_id == GUEST_USER,
            customer_bound=self._bound(run),
        )

    def _bound(self, run: CheckoutRun) -> CustomerBound | None:
        limits = self._limits.staff if run.state.by_staff else self._limits.customers
        if run.record.open_units is None or not limits.bounds_units:
            return None
        return CustomerBound(units=limits.held_units, share_percent=limits.held_percent, before=run.record.open_units)

    async def _pay(self, runs: Sequence[CheckoutRun]) -> None:
        charging = [run for run in runs if run.state.capture]
        charged = await self._call("charge", self._payments.charge.many, charging, _charge)
        for run, answer in charged:
            run.decision = steps.after_charge(run.order, run.state, answer, self._window_s)
        authorizing = [run for run in runs if not run.state.capture]
        authorized = await self._call("authorize", self._payments.authorize.many, authorizing, _authorize)
        for run, answer in authorized:
            run.decision = steps.after_authorize(run.order, run.state, answer, self._window_s)
        await self._move_sequence_past([*charged, *authorized])

    async def _move_sequence_past(self, answers: Sequence[tuple[CheckoutRun, Message | ServiceError]]) -> None:
        """Moves the ids past those that other services know: this database was restored from an older backup."""
        refused = [a for _, a in answers if isinstance(a, (StockOfAnotherOrder, PaymentOfAnotherOrder))]
        if not refused:
            return
        newest = max(refused, key=lambda answer: answer.newest_order_id)
        next_id = await move_own_past(self._database, ORDER_IDS, newest.newest_order_id)
        if next_id is not None:
            by, known_id = newest.code.partition(".")[0], newest.newest_order_id
            log.warning(
                "sequence_moved", owner="orders", sequence=ORDER_IDS, known_by=by, next_id=next_id, known_id=known_id
            )

    async def _undo_payments(self, runs: Sequence[CheckoutRun]) -> None:
        """Voids payments whose result is not known, which settles them first, and refunds those that were captured."""
        # Without a method this checkout has begun no payment; earlier ones have ended.
        open_ = [run for run in runs if run.order.payment not in rules.REFUNDABLE and run.state.method is not None]
        for run, payment in await self._undo("void", self._payments.void.many, open_, _void):
            run.payment = payment
        captured = [run for run in _undecided(runs) if _minor_to_refund(run)]
        for run, answer in await self._call("refund", self._payments.refund.many, captured, _refund):
            if not isinstance(answer, ServiceError):
                run.payment = answer
            elif isinstance(answer, RefundDeclined):
                # Final: the stock is released nevertheless, and staff settle the money (the audit reports it, M5).
                run.is_kept = True
                log.error("cancelled_order_keeps_money", order_id=run.id, payment_id=answer.payment_id)
            else:
                run.decision = RetryLater(answer.code)

    async def _call(
        self,
        what: str,
        call: Callable[[Sequence[Q]], Awaitable[Sequence[A | ServiceError]]],
        runs: Sequence[CheckoutRun],
        request: Callable[[CheckoutRun], Q],
    ) -> list[tuple[CheckoutRun, A | ServiceError]]:
        """Calls another service once for all of them; gives each with its answer."""
        if not runs:
            return []
        await faults.point(f"checkout.{what}.before_call")
        answers = await call([request(run) for run in runs])
        await faults.point(f"checkout.{what}.after_call")
        return list(zip(runs, answers, strict=True))

    async def _undo(
        self,
        what: str,
        call: Callable[[Sequence[Q]], Awaitable[Sequence[A | ServiceError]]],
        runs: Sequence[CheckoutRun],
        request: Callable[[CheckoutRun], Q],
    ) -> list[tuple[CheckoutRun, A]]:
        """Undoes one thing; gives those that are undone. The others are tried again: each call can be repeated.

        Nothing is undone where the other service answers for an earlier order that had the same id.
        """
        undone: list[tuple[CheckoutRun, A]] = []
        for run, answer in await self._call(what, call, runs, request):
            if not isinstance(answer, ServiceError):
                undone.append((run, answer))
            elif not isinstance(answer, (StockOfAnotherOrder, PaymentOfAnotherOrder)):
                run.decision = RetryLater(answer.code)
        return undone

    async def _save(self, step: str, runs: Sequence[CheckoutRun]) -> None:
        """Writes the decisions, and moves the orders, in one transaction."""
        by_key = {run.saga.key: run for run in runs}
        async with self._runner.saving([(run.saga, self._next(run)) for run in runs]) as (tx, kept):
            moves = [move for saga, _ in kept if (move := _move(by_key[saga.key]))]
            moved = await store.move(tx, moves, SHOP) if moves else []
            assert all(moved), "status and payment of an order move under the lock of its saga alone"
            if step == "unwind":
                await _emit_refunded(tx, [(o, m.refunded_minor) for o, m in zip(moved, moves, strict=True) if o])
            await faults.point(f"checkout.{step}.before_commit")
        for order in moved:
            if order:
                run = by_key[order.id, CHECKOUT, ""]
                run.saga.memo = msgspec.structs.replace(run.record, order=order)
        await faults.point(f"checkout.{step}.after_commit")

    def _next(self, run: CheckoutRun) -> Next:
        decision = run.decision
        assert decision is not None, "a step left an order without a decision"
        if isinstance(decision, RetryLater):
            return self._runner.retry_later(run.saga, decision.not_before)
        return Next(
            decision.step,
            run.saga.state if decision.state is run.state else steps.encoded(decision.state),
            running=decision.running,
            wake_s=decision.wake_s,
            wake_at=decision.wake_at,
            finished=decision.finished,
        )


def _undecided(runs: Sequence[CheckoutRun]) -> list[CheckoutRun]:
    return [run for run in runs if run.decision is None]


async def _emit_refunded(tx: Tx, orders: Sequence[tuple[Order, int]]) -> None:
    """Emits the events of refunds by cancelling. `orders`: each with the refunded amount in minor units."""
    refunded = [(order, amount_minor) for order, amount_minor in orders if amount_minor]
    if not refunded:
        return
    actors = await history_store.cancelled_by(tx, [order.id for order, _ in refunded])
    money_store.emit_refunded(tx, [Refunded(o, CANCEL, amount_minor, actors[o.id]) for o, amount_minor in refunded])


def _move(run: CheckoutRun) -> store.Move | None:
    decision = run.decision
    if not isinstance(decision, Decision) or not (decision.status or decision.payment):
        return None
    is_on_account = run.state.on_account and decision.status == "confirmed"
    order = run.order
    is_waiving = decision.waived_minor is not None and decision.waived_minor != order.waived_minor
    if is_waiving:
        order = msgspec.structs.replace(order, waived_minor=decision.waived_minor)
    return store.Move(
        order,
        is_waiving=is_waiving,
        status=decision.status,
        payment=decision.payment,
        reason=decision.reason,
        refunded_minor=decision.refunded_minor,
        note=decision.note,
        actor=Actor(STAFF, run.state.confirmed_by) if is_on_account else None,
        on_account=is_on_account,
        epoch=run.saga.epoch,
        tries=run.saga.tries,
    )


# --------------------------------------------------------------------------------------------------------- the requests


def _lines(order: Order) -> tuple[StockLine, ...]:
    return tuple([StockLine(product_id=line.product_id, quantity=line.quantity) for line in order.lines])


def _lines_to_restock(run: CheckoutRun) -> tuple[StockLine, ...]:
    """The lines of a sold order that were not returned yet."""
    return tuple(
        StockLine(product_id=line.product_id, quantity=line.quantity - line.returned)
        for line in run.order.lines
        if line.quantity > line.returned
    )


def _minor_to_refund(run: CheckoutRun) -> int:
    """The amount that was captured and not refunded: as a paid order records it, else as its payment does."""
    if run.order.payment in rules.REFUNDABLE:
        return rules.payable_minor(run.order) - run.order.refunded_minor
    return run.payment.captured_minor - run.payment.refunded_minor if run.payment else 0


def _charge(run: CheckoutRun) -> ChargePayment:
    assert run.state.method is not None
    return ChargePayment(
        order_id=run.id,
        order_nonce=run.record.nonce,
        attempt=run.state.attempt,
        user_id=run.order.user_id,
        amount_minor=rules.payable_minor(run.order),
        currency=run.order.currency,
        method=run.state.method,
        idempotency_key=f"order:{run.id}:charge:{run.state.attempt}",
    )


def _authorize(run: CheckoutRun) -> AuthorizePayment:
    assert run.state.method is not None
    return AuthorizePayment(
        order_id=run.id,
        order_nonce=run.record.nonce,
        attempt=run.state.attempt,
        user_id=run.order.user_id,
        amount_minor=rules.payable_minor(run.order),
        currency=run.order.currency,
        method=run.state.method,
        idempotency_key=f"order:{run.id}:authorize:{run.state.attempt}",
    )


def _commit(run: CheckoutRun) -> CommitStock:
    return CommitStock(order_id=run.id, order_nonce=run.record.nonce, idempotency_key=f"order:{run.id}:commit")


def _capture(run: CheckoutRun) -> CapturePayment:
    return CapturePayment(
        order_id=run.id,
        order_nonce=run.record.nonce,
        attempt=run.state.attempt,
        idempotency_key=f"order:{run.id}:capture:{run.state.attempt}",
    )


def _capture_part(run: CheckoutRun) -> CapturePart:
    assert run.state.capture_minor is not None
    return CapturePart(
        order_id=run.id,
        order_nonce=run.record.nonce,
        attempt=run.state.attempt,
        amount_minor=run.state.capture_minor,
        idempotency_key=f"order:{run.id}:capture:{run.state.attempt}",
    )


def _void(run: CheckoutRun) -> VoidPayment:
    assert run.state.method is not None
    return VoidPayment(
        order_id=run.id,
        order_nonce=run.record.nonce,
        attempt=run.state.attempt,
        user_id=run.order.user_id,
        amount_minor=rules.payable_minor(run.order),
        currency=run.order.currency,
        method=run.state.method,
        idempotency_key=f"order:{run.id}:void:{run.state.attempt}",
    )


def _refund(run: CheckoutRun) -> RefundPayment:
    return RefundPayment(
        order_id=run.id,
        order_nonce=run.record.nonce,
        attempt=run.state.attempt,
        amount_minor=_minor_to_refund(run),
        reference=CANCEL,
        idempotency_key=f"order:{run.id}:refund:cancel",
    )


def _release(run: CheckoutRun) -> ReleaseStock:
    return ReleaseStock(order_id=run.id, order_nonce=run.record.nonce, idempotency_key=f"order:{run.id}:release")


def _restock(run: CheckoutRun) -> ReturnStock:
    return ReturnStock(
        order_id=run.id,
        order_nonce=run.record.nonce,
        lines=_lines_to_restock(run),
        reference="cancel",
        idempotency_key=f"order:{run.id}:restock:cancel",
    )
