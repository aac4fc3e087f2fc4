"""Checkout: from an order to money, exactly once. What comes after what is in `steps.py`; here it is done.

Each step takes a batch of orders, asks inventory and payments for all of them at once, and saves what came of it in one
transaction: the saga's next step, the move of the order, its history, its event. Whatever a step asks for carries a key
made of the order, and is done once by whoever is asked: a step that was cut short runs again as if for the first time.

    crash ...                               what is there            who goes on
    after the order's commit                order, saga              the sweeper: reserve
    after the stock was held                a hold                   the sweeper: reserve hears of the same hold
    after the provider said yes             an authorization         the sweeper: authorize hears of the same payment
    after the pivot                         order confirmed          the sweeper: settle, forward only
    after the stock was sold, or captured   a sale, a capture        the sweeper: settle hears that it was done
    in the middle of an unwind              order cancelled          the sweeper: unwind, from its beginning
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeVar

import msgspec
import structlog

from mercato.chassis import faults
from mercato.chassis.contract import Actor, Message, ServiceError
from mercato.chassis.db import Database
from mercato.chassis.rpc import SERVICE_ROLE
from mercato.chassis.runner import Runner
from mercato.chassis.saga import Next, Saga
from mercato.contracts.inventory import (
    CommitStock,
    Inventory,
    ReleaseStock,
    Reservation,
    ReserveStock,
    ReturnStock,
    StockLine,
)
from mercato.contracts.orders import Order
from mercato.contracts.payments import (
    AuthorizePayment,
    CapturePayment,
    Payments,
    RefundDeclined,
    RefundPayment,
    VoidPayment,
)
from mercato.contracts.payments import Payment as PaymentRecord
from mercato.contracts.roles import STAFF

from . import steps, store
from .steps import CHECKOUT, Checkout, Decision, TryAgain

Q = TypeVar("Q", bound=Message)
A = TypeVar("A", bound=Message)

log = structlog.stdlib.get_logger("mercato.orders")

SHOP: Final = Actor(SERVICE_ROLE)
"""Who moves orders here: nobody asked for this step, it follows from the one before."""

CALLS: Final = ("reserve", "authorize", "commit", "capture", "void", "refund", "release", "restock")
SAVES: Final = ("reserve", "settle", "waiting", "unwind")

faults.declare(
    *(f"checkout.{call}.{when}_call" for call in CALLS for when in ("before", "after")),
    *(f"checkout.{step}.{when}_commit" for step in SAVES for when in ("before", "after")),
)


class Work(msgspec.Struct):
    """One order on its way through one step."""

    saga: Saga
    order: Order
    state: Checkout
    decision: Decision | TryAgain | None = None
    payment: PaymentRecord | None = None

    @property
    def id(self) -> int:
        return self.order.id


class CheckoutSteps:
    """The steps of checkout. `window_s`: how long an order waits for its payment once its hold no longer expires."""

    def __init__(
        self, database: Database, runner: Runner, *, inventory: Inventory, payments: Payments, window_s: float
    ) -> None:
        self._database = database
        self._runner = runner
        self._inventory = inventory
        self._payments = payments
        self._window_s = window_s
        runner.register(
            CHECKOUT,
            {"reserve": self.reserve, "awaiting": self.wait_no_longer, "settle": self.settle, "unwind": self.unwind},
        )

    # -------------------------------------------------------------------------------------------------------- the steps

    async def reserve(self, sagas: Sequence[Saga]) -> None:
        """Holds the stock, authorizes where there is a payment to make, and confirms: up to the pivot, and over it."""
        works = await self._load(sagas)
        for work, answer in await self._ask("reserve", self._inventory.reserve.many, works, _reserve):
            work.decision = steps.after_reserve(work.order, work.state, answer, self._window_s)
        paying = [work for work in works if work.decision is None]
        for work, answer in await self._ask("authorize", self._payments.authorize.many, paying, _authorize):
            work.decision = steps.after_authorize(work.order, work.state, answer, self._window_s)
        await self._save("reserve", works)

    async def settle(self, sagas: Sequence[Saga]) -> None:
        """Sells what is held, and takes the money."""
        works = await self._load(sagas)
        for work, answer in await self._ask("commit", self._inventory.commit.many, works, _commit):
            work.decision = steps.after_commit(work.order, work.state, answer)
        capturing = [work for work in works if work.decision is None]
        for work, answer in await self._ask("capture", self._payments.capture.many, capturing, _capture):
            work.decision = steps.after_capture(work.order, work.state, answer)
        await self._save("settle", works)

    async def wait_no_longer(self, sagas: Sequence[Saga]) -> None:
        """Cancels what nobody has paid in time."""
        works = await self._load(sagas)
        for work in works:
            work.decision = steps.after_waiting(work.order, work.state)
        await self._save("waiting", works)

    async def unwind(self, sagas: Sequence[Saga]) -> None:
        """Undoes what was done for a cancelled order: money first, for it hurts most, then stock."""
        works = await self._load(sagas)
        paid = [work for work in works if work.state.attempt]
        await self._undo("void", self._payments.void.many, paid, _void, _keep_payment)
        captured = [work for work in paid if work.payment and _left_minor(work.payment)]
        for work, answer in await self._ask("refund", self._payments.refund.many, captured, _refund):
            if not isinstance(answer, ServiceError):
                work.payment = answer
            elif isinstance(answer, RefundDeclined):
                # For good: the stock goes back all the same, and somebody has to look after the money (M5).
                log.error("cancelled_order_keeps_money", order_id=work.id, payment_id=answer.payment_id)
            else:
                work.decision = TryAgain(answer.code)
        sold: list[Work] = []

        def keep_sold(work: Work, reservation: Reservation) -> None:
            if reservation.state == "committed" and _left_lines(work.order):
                sold.append(work)

        await self._undo("release", self._inventory.release.many, _open(works), _release, keep_sold)
        await self._undo("restock", self._inventory.restock.many, sold, _restock, _nothing_more)
        for work in _open(works):
            work.decision = steps.after_unwind(work.order, work.state, work.payment)
        await self._save("unwind", works)

    # ------------------------------------------------------------------------------------------------------ their parts

    async def _load(self, sagas: Sequence[Saga]) -> list[Work]:
        if missing := [saga.subject_id for saga in sagas if saga.memo is None]:
            async with self._database.read() as tx:
                found = await store.get(tx, missing)
            for saga in sagas:
                saga.memo = saga.memo or found[saga.subject_id]
        return [Work(saga, saga.memo, msgspec.json.decode(saga.state, type=Checkout)) for saga in sagas]

    async def _ask(
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
        keep: Callable[[Work, A], None],
    ) -> None:
        """Undoes one thing; what cannot be undone now is tried again, from the beginning: all of it can be repeated."""
        for work, answer in await self._ask(what, call, works, request):
            if isinstance(answer, ServiceError):
                work.decision = TryAgain(answer.code)
            else:
                keep(work, answer)

    async def _save(self, step: str, works: Sequence[Work]) -> None:
        """Writes what the step has come to, and moves the orders, in one transaction."""
        by_key = {work.saga.key: work for work in works}
        async with self._runner.saving([(work.saga, self._next(work)) for work in works]) as (tx, kept):
            moves = [move for saga, _ in kept if (move := _move(by_key[saga.key]))]
            moved = await store.move(tx, moves, SHOP) if moves else []
            assert all(moved), "nobody moves status and payment of an order without its saga"
            await faults.point(f"checkout.{step}.before_commit")
        for order in moved:
            if order:
                by_key[order.id, CHECKOUT, ""].saga.memo = order
        await faults.point(f"checkout.{step}.after_commit")

    def _next(self, work: Work) -> Next:
        decision = work.decision
        assert decision is not None, "a step left an order without a decision"
        if isinstance(decision, TryAgain):
            return self._runner.again(work.saga, f"retried {decision.outcome}")
        return Next(
            decision.step,
            steps.encoded(decision.state),
            decision.outcome,
            running=decision.running,
            wake_s=decision.wake_s,
        )


def _move(work: Work) -> store.Move | None:
    decision = work.decision
    if not isinstance(decision, Decision):
        return None
    if not (decision.status or decision.payment):
        return None
    return store.Move(
        work.order,
        status=decision.status,
        payment=decision.payment,
        reason=decision.reason,
        refunded_minor=decision.refunded_minor,
        note=decision.outcome,
        actor=Actor(STAFF, work.state.confirmed_by) if _is_by_hand(work, decision) else None,
    )


def _is_by_hand(work: Work, decision: Decision) -> bool:
    return work.state.on_account and decision.status == "confirmed"


# ---------------------------------------------------------------------------------------------------- what is asked for


def _lines(order: Order) -> tuple[StockLine, ...]:
    return tuple(StockLine(product_id=line.product_id, quantity=line.quantity) for line in order.lines)


def _left_lines(order: Order) -> tuple[StockLine, ...]:
    """What of a sold order has not come back yet."""
    return tuple(
        StockLine(product_id=line.product_id, quantity=line.quantity - line.returned)
        for line in order.lines
        if line.quantity > line.returned
    )


def _left_minor(payment: PaymentRecord) -> int:
    return payment.captured_minor - payment.refunded_minor


def _reserve(work: Work) -> ReserveStock:
    final = work.state.paying or work.state.on_account
    return ReserveStock(
        order_id=work.id,
        lines=_lines(work.order),
        for_payment=final,
        idempotency_key=f"order:{work.id}:reserve",
    )


def _authorize(work: Work) -> AuthorizePayment:
    assert work.state.method is not None
    return AuthorizePayment(
        order_id=work.id,
        attempt=work.state.attempt,
        user_id=work.order.user_id,
        amount_minor=work.order.total_minor,
        currency=work.order.currency,
        method=work.state.method,
        idempotency_key=f"order:{work.id}:authorize:{work.state.attempt}",
    )


def _commit(work: Work) -> CommitStock:
    return CommitStock(order_id=work.id, idempotency_key=f"order:{work.id}:commit")


def _capture(work: Work) -> CapturePayment:
    return CapturePayment(
        order_id=work.id,
        attempt=work.state.attempt,
        idempotency_key=f"order:{work.id}:capture:{work.state.attempt}",
    )


def _void(work: Work) -> VoidPayment:
    assert work.state.method is not None
    return VoidPayment(
        order_id=work.id,
        attempt=work.state.attempt,
        user_id=work.order.user_id,
        amount_minor=work.order.total_minor,
        currency=work.order.currency,
        method=work.state.method,
        idempotency_key=f"order:{work.id}:void:{work.state.attempt}",
    )


def _refund(work: Work) -> RefundPayment:
    assert work.payment
    return RefundPayment(
        order_id=work.id,
        attempt=work.state.attempt,
        amount_minor=_left_minor(work.payment),
        reference="cancel",
        idempotency_key=f"order:{work.id}:refund:cancel",
    )


def _release(work: Work) -> ReleaseStock:
    return ReleaseStock(order_id=work.id, idempotency_key=f"order:{work.id}:release")


def _restock(work: Work) -> ReturnStock:
    return ReturnStock(
        order_id=work.id,
        lines=_left_lines(work.order),
        reference="cancel",
        idempotency_key=f"order:{work.id}:restock:cancel",
    )


# ----------------------------------------------------------------------------------------------------- what is answered


def _open(works: Sequence[Work]) -> list[Work]:
    return [work for work in works if work.decision is None]


def _keep_payment(work: Work, payment: PaymentRecord) -> None:
    work.payment = payment


def _nothing_more(_work: Work, _answer: object) -> None:
    pass
