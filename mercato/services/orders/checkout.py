"""Checkout: from an order to money, exactly once. Which step is next is decided in `steps.py`; here it is executed.

Each step takes a batch of orders, asks inventory and payments for all of them at once, and saves the outcome in one
transaction: the saga's next step or its end, the move of the order, its history, its events. Every call carries a key
made of stored data and is executed once by the service that is asked: a step that was cut short runs again.

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
"""The actor of moves that no client asked for: they follow from the step before."""

ORDER_IDS: Final = "orders_id_seq"

CALLS: Final = ("reserve", "charge", "authorize", "commit", "capture", "void", "refund", "release", "restock")
SAVES: Final = ("reserve", "settle", "waiting", "unwind")

faults.declare(
    *(f"checkout.{call}.{when}_call" for call in CALLS for when in ("before", "after")),
    *(f"checkout.{step}.{when}_commit" for step in SAVES for when in ("before", "after")),
)


class Work(msgspec.Struct):
    """One order in one step. `decision` is None until an answer decides."""

    saga: Saga
    record: OrderRecord
    state: Checkout
    decision: Decision | RetryLater | None = None
    payment: PaymentRecord | None = None
    """Of an unwind: the payment as it is after it was voided or refunded."""
    is_kept: bool = False
    """Of an unwind: the provider has declined to refund the payment."""

    @property
    def id(self) -> int:
        return self.record.order.id

    @property
    def order(self) -> Order:
        return self.record.order


class CheckoutSteps:
    """The steps of checkout. `window_s`: until how long after its placing an order can be paid."""

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
        works = await self._load(sagas)
        reserved = await self._call("reserve", self._inventory.reserve.many, works, self._reserve)
        await self._go_on_behind(reserved)
        for work, answer in reserved:
            work.decision = steps.after_reserve(work.order, work.state, answer, self._window_s)
        paying = [work for work in _undecided(works) if work.state.paying]
        await self._pay(paying)
        for work, answer in await self._call("commit", self._inventory.commit.many, _undecided(works), _commit):
            work.decision = steps.after_commit(work.order, work.state, answer)
        await self._save("reserve", works)

    async def settle(self, sagas: Sequence[Saga]) -> None:
        """Sells what is held, and captures what was authorized."""
        works = await self._load(sagas)
        for work, answer in await self._call("commit", self._inventory.commit.many, works, _commit):
            work.decision = steps.after_commit(work.order, work.state, answer)
        wholes = [work for work in _undecided(works) if work.state.capture_minor is None]
        parts = [work for work in _undecided(works) if work.state.capture_minor is not None]
        for work, answer in (
            *await self._call("capture", self._payments.capture.many, wholes, _capture),
            *await self._call("capture", self._payments.capture_part.many, parts, _capture_part),
        ):
            work.decision = steps.after_capture(work.order, work.state, answer)
        await self._save("settle", works)

    async def expire(self, sagas: Sequence[Saga]) -> None:
        """Cancels orders that were not paid in time."""
        works = await self._load(sagas)
        for work in works:
            work.decision = steps.after_waiting(work.state)
        await self._save("waiting", works)

    async def unwind(self, sagas: Sequence[Saga]) -> None:
        """Undoes what was done for cancelled orders: money first, for it hurts most, then stock."""
        works = await self._load(sagas)
        await self._undo_payments(works)
        released = await self._undo("release", self._inventory.release.many, _undecided(works), _release)
        for work, reservation in released:
            work.decision = steps.after_release(reservation)
        sold = [work for work, reservation in released if reservation.state == "committed" and _lines_to_restock(work)]
        await self._undo("restock", self._inventory.restock.many, sold, _restock)
        for work in _undecided(works):
            work.decision = steps.after_unwind(work.order, work.state, work.payment, is_kept=work.is_kept)
        await self._save("unwind", works)

    # ------------------------------------------------------------------------------------------------------ their parts

    async def _load(self, sagas: Sequence[Saga]) -> list[Work]:
        if missing := [saga.subject_id for saga in sagas if saga.memo is None]:
            async with self._database.read() as tx:
                found = await read_store.get(tx, missing)
            for saga in sagas:
                saga.memo = saga.memo or found[saga.subject_id]
        return [Work(saga, saga.memo, steps.decoded(saga.state)) for saga in sagas]

    def _reserve(self, work: Work) -> ReserveStock:
        return ReserveStock(
            order_id=work.id,
            order_nonce=work.record.nonce,
            lines=_lines(work.order),
            for_payment=steps.is_final(work.order, work.state),
            idempotency_key=f"order:{work.id}:reserve",
            guest=work.order.user_id == GUEST_USER,
            customer_bound=self._bound(work),
        )

    def _bound(self, work: Work) -> CustomerBound | None:
        limits = self._limits.staff if work.state.by_staff else self._limits.customers
        if work.record.open_units is None or not limits.bounds_units:
            return None
        return CustomerBound(units=limits.held_units, share_percent=limits.held_percent, before=work.record.open_units)

    async def _pay(self, works: Sequence[Work]) -> None:
        charging = [work for work in works if work.state.capture]
        charged = await self._call("charge", self._payments.charge.many, charging, _charge)
        for work, answer in charged:
            work.decision = steps.after_charge(work.order, work.state, answer, self._window_s)
        authorizing = [work for work in works if not work.state.capture]
        authorized = await self._call("authorize", self._payments.authorize.many, authorizing, _authorize)
        for work, answer in authorized:
            work.decision = steps.after_authorize(work.order, work.state, answer, self._window_s)
        await self._go_on_behind([*charged, *authorized])

    async def _go_on_behind(self, answers: Sequence[tuple[Work, Message | ServiceError]]) -> None:
        """Gives no id again that another service knows: the database of orders was restored from an older backup."""
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

    async def _undo_payments(self, works: Sequence[Work]) -> None:
        """Voids payments whose end is not known, which settles them first, and refunds those that were captured."""
        # Without a method this checkout has begun no payment; earlier ones have ended.
        open_ = [work for work in works if work.order.payment not in rules.REFUNDABLE and work.state.method is not None]
        for work, payment in await self._undo("void", self._payments.void.many, open_, _void):
            work.payment = payment
        captured = [work for work in _undecided(works) if _minor_to_refund(work)]
        for work, answer in await self._call("refund", self._payments.refund.many, captured, _refund):
            if not isinstance(answer, ServiceError):
                work.payment = answer
            elif isinstance(answer, RefundDeclined):
                # For good: the stock is released all the same, and people have to settle the money (M5).
                work.is_kept = True
                log.error("cancelled_order_keeps_money", order_id=work.id, payment_id=answer.payment_id)
            else:
                work.decision = RetryLater(answer.code)

    async def _call(
        self,
        what: str,
        call: Callable[[Sequence[Q]], Awaitable[Sequence[A | ServiceError]]],
        works: Sequence[Work],
        request: Callable[[Work], Q],
    ) -> list[tuple[Work, A | ServiceError]]:
        """Asks for all of them in one call; gives each with its answer."""
        if not works:
            return []
        await faults.point(f"checkout.{what}.before_call")
        answers = await call([request(work) for work in works])
        await faults.point(f"checkout.{what}.after_call")
        return list(zip(works, answers, strict=True))

    async def _undo(
        self,
        what: str,
        call: Callable[[Sequence[Q]], Awaitable[Sequence[A | ServiceError]]],
        works: Sequence[Work],
        request: Callable[[Work], Q],
    ) -> list[tuple[Work, A]]:
        """Undoes one thing; gives those that are undone. The others are tried again: all of it can be repeated.

        What another service holds for an earlier order with the same id is left alone: there is nothing to undo.
        """
        undone: list[tuple[Work, A]] = []
        for work, answer in await self._call(what, call, works, request):
            if not isinstance(answer, ServiceError):
                undone.append((work, answer))
            elif not isinstance(answer, (StockOfAnotherOrder, PaymentOfAnotherOrder)):
                work.decision = RetryLater(answer.code)
        return undone

    async def _save(self, step: str, works: Sequence[Work]) -> None:
        """Writes the decisions, and moves the orders, in one transaction."""
        by_key = {work.saga.key: work for work in works}
        async with self._runner.saving([(work.saga, self._next(work)) for work in works]) as (tx, kept):
            moves = [move for saga, _ in kept if (move := _move(by_key[saga.key]))]
            moved = await store.move(tx, moves, SHOP) if moves else []
            assert all(moved), "status and payment of an order move under the lock of its saga only"
            if step == "unwind":
                await _emit_refunded(tx, [(o, m.refunded_minor) for o, m in zip(moved, moves, strict=True) if o])
            await faults.point(f"checkout.{step}.before_commit")
        for order in moved:
            if order:
                work = by_key[order.id, CHECKOUT, ""]
                work.saga.memo = msgspec.structs.replace(work.record, order=order)
        await faults.point(f"checkout.{step}.after_commit")

    def _next(self, work: Work) -> Next:
        decision = work.decision
        assert decision is not None, "a step left an order without a decision"
        if isinstance(decision, RetryLater):
            return self._runner.retry_later(work.saga, decision.not_before)
        return Next(
            decision.step,
            work.saga.state if decision.state is work.state else steps.encoded(decision.state),
            running=decision.running,
            wake_s=decision.wake_s,
            wake_at=decision.wake_at,
            finished=decision.finished,
        )


def _undecided(works: Sequence[Work]) -> list[Work]:
    return [work for work in works if work.decision is None]


async def _emit_refunded(tx: Tx, orders: Sequence[tuple[Order, int]]) -> None:
    """Of cancelled orders with what was given back for it, in minor units."""
    refunded = [(order, amount_minor) for order, amount_minor in orders if amount_minor]
    if not refunded:
        return
    actors = await history_store.cancelled_by(tx, [order.id for order, _ in refunded])
    money_store.emit_refunded(tx, [Refunded(o, CANCEL, amount_minor, actors[o.id]) for o, amount_minor in refunded])


def _move(work: Work) -> store.Move | None:
    decision = work.decision
    if not isinstance(decision, Decision) or not (decision.status or decision.payment):
        return None
    is_on_account = work.state.on_account and decision.status == "confirmed"
    order = work.order
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
        actor=Actor(STAFF, work.state.confirmed_by) if is_on_account else None,
        on_account=is_on_account,
        epoch=work.saga.epoch,
        tries=work.saga.tries,
    )


# --------------------------------------------------------------------------------------------------------- the requests


def _lines(order: Order) -> tuple[StockLine, ...]:
    return tuple([StockLine(product_id=line.product_id, quantity=line.quantity) for line in order.lines])


def _lines_to_restock(work: Work) -> tuple[StockLine, ...]:
    """What of a sold order was not returned yet."""
    return tuple(
        StockLine(product_id=line.product_id, quantity=line.quantity - line.returned)
        for line in work.order.lines
        if line.quantity > line.returned
    )


def _minor_to_refund(work: Work) -> int:
    """What was captured and not refunded: of a paid order as it says itself, else as its payment says."""
    if work.order.payment in rules.REFUNDABLE:
        return rules.payable_minor(work.order) - work.order.refunded_minor
    return work.payment.captured_minor - work.payment.refunded_minor if work.payment else 0


def _charge(work: Work) -> ChargePayment:
    assert work.state.method is not None
    return ChargePayment(
        order_id=work.id,
        order_nonce=work.record.nonce,
        attempt=work.state.attempt,
        user_id=work.order.user_id,
        amount_minor=rules.payable_minor(work.order),
        currency=work.order.currency,
        method=work.state.method,
        idempotency_key=f"order:{work.id}:charge:{work.state.attempt}",
    )


def _authorize(work: Work) -> AuthorizePayment:
    assert work.state.method is not None
    return AuthorizePayment(
        order_id=work.id,
        order_nonce=work.record.nonce,
        attempt=work.state.attempt,
        user_id=work.order.user_id,
        amount_minor=rules.payable_minor(work.order),
        currency=work.order.currency,
        method=work.state.method,
        idempotency_key=f"order:{work.id}:authorize:{work.state.attempt}",
    )


def _commit(work: Work) -> CommitStock:
    return CommitStock(order_id=work.id, order_nonce=work.record.nonce, idempotency_key=f"order:{work.id}:commit")


def _capture(work: Work) -> CapturePayment:
    return CapturePayment(
        order_id=work.id,
        order_nonce=work.record.nonce,
        attempt=work.state.attempt,
        idempotency_key=f"order:{work.id}:capture:{work.state.attempt}",
    )


def _capture_part(work: Work) -> CapturePart:
    assert work.state.capture_minor is not None
    return CapturePart(
        order_id=work.id,
        order_nonce=work.record.nonce,
        attempt=work.state.attempt,
        amount_minor=work.state.capture_minor,
        idempotency_key=f"order:{work.id}:capture:{work.state.attempt}",
    )


def _void(work: Work) -> VoidPayment:
    assert work.state.method is not None
    return VoidPayment(
        order_id=work.id,
        order_nonce=work.record.nonce,
        attempt=work.state.attempt,
        user_id=work.order.user_id,
        amount_minor=rules.payable_minor(work.order),
        currency=work.order.currency,
        method=work.state.method,
        idempotency_key=f"order:{work.id}:void:{work.state.attempt}",
    )


def _refund(work: Work) -> RefundPayment:
    return RefundPayment(
        order_id=work.id,
        order_nonce=work.record.nonce,
        attempt=work.state.attempt,
        amount_minor=_minor_to_refund(work),
        reference=CANCEL,
        idempotency_key=f"order:{work.id}:refund:cancel",
    )


def _release(work: Work) -> ReleaseStock:
    return ReleaseStock(order_id=work.id, order_nonce=work.record.nonce, idempotency_key=f"order:{work.id}:release")


def _restock(work: Work) -> ReturnStock:
    return ReturnStock(
        order_id=work.id,
        order_nonce=work.record.nonce,
        lines=_lines_to_restock(work),
        reference="cancel",
        idempotency_key=f"order:{work.id}:restock:cancel",
    )
