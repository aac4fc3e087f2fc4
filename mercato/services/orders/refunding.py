"""Giving back: money that was paid, and goods that come back for it.

A refund is a saga of its own, with one step: put the goods back on the shelf, if any came, then give the money back,
then note it on the order. What it will give back is set aside on the order in the transaction that begins it, so that
two refunds never have the same money, and goods never come back twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import msgspec

from mercato.chassis import faults, idempotency, saga
from mercato.chassis.contract import IdempotencyKeyReused, RequestInProgress, ServiceError, current
from mercato.chassis.db import Database, LockTimeout, Tx
from mercato.chassis.idempotency import Keyed
from mercato.chassis.rpc import as_service
from mercato.chassis.runner import Runner
from mercato.chassis.saga import Next, Saga
from mercato.contracts.inventory import Inventory, ReservationClosed, ReturnStock, ReturnTooLarge, StockLine
from mercato.contracts.orders import (
    Order,
    OrderNotFound,
    PaymentInProgress,
    Refund,
    RefundOrder,
    RefundStatus,
    ReturnLine,
    ReturnOrder,
)
from mercato.contracts.payments import (
    AttemptNotFound,
    GetPayment,
    Payments,
    PaymentStateConflict,
    RefundDeclined,
    RefundPayment,
    RefundReferenceReused,
    RefundTooLarge,
)

from . import rules, store
from .checkout import SHOP
from .paying import ANSWER_SECONDS
from .steps import CHECKOUT, Checkout

REFUND: Final = "refund"
REST: Final = "rest"
"""The reference of the return that takes back whatever is left."""

faults.declare(
    *(f"orders.refund.{when}_commit" for when in ("before", "after")),
    *(f"refund.{call}.{when}_call" for call in ("restock", "refund") for when in ("before", "after")),
    *(f"refund.save.{when}_commit" for when in ("before", "after")),
)


class Giving(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a refund remembers."""

    amount_minor: int
    """0: only goods come back; they were never paid for."""
    currency: str
    attempt: int
    """Of the payment that it gives back from."""
    lines: tuple[ReturnLine, ...] = ()
    reason: str = ""
    code: str | None = None
    """Why it was declined."""
    fingerprint: str = ""
    """Of the request that began it, in hexadecimal."""


class Work(msgspec.Struct):
    """One refund on its way through its step. `retry`: why it has to be tried again; `code`: why it was declined."""

    saga: Saga
    giving: Giving
    retry: str | None = None
    code: str | None = None

    @property
    def order_id(self) -> int:
        return self.saga.subject_id


FINAL: Final = (AttemptNotFound, PaymentStateConflict, RefundDeclined, RefundReferenceReused, RefundTooLarge)
"""Answers of payments that will not be another one the next time."""


class Refunding:
    """Refunds and returns, and the step of their saga."""

    def __init__(self, database: Database, runner: Runner, *, inventory: Inventory, payments: Payments) -> None:
        self._database = database
        self._runner = runner
        self._inventory = inventory
        self._payments = payments
        runner.register(REFUND, {"refund": self._give_back})

    # ---------------------------------------------------------------------------------------------------- what is asked

    async def refund(self, request: RefundOrder) -> Refund:
        """Money alone, of a payment."""
        with as_service():
            payment = await self._payments.get(GetPayment(id=request.payment_id))

        async def begin(tx: Tx, order: Order) -> Giving:
            left = await store.refundable(tx, order.id) if payment.attempt == await _attempt(tx, order.id) else 0
            amount = rules.check_refund(order, request, left)
            announced = await store.announce_refund(tx, order.id, amount)
            assert announced, "the order is locked, and so much was left"
            return Giving(amount, order.currency, payment.attempt, reason=request.reason)

        asked = _asked("orders.refund", request.idempotency_key, request.fingerprint)
        return await self._begin(payment.order_id, asked, begin)

    async def take_back(self, request: ReturnOrder) -> Refund:
        """Goods, and what they cost."""

        async def begin(tx: Tx, order: Order) -> Giving:
            return await self._take_back(tx, order, request.lines, request.reason)

        asked = _asked("orders.take_back", request.idempotency_key, request.fingerprint)
        return await self._begin(request.id, asked, begin)

    async def take_back_rest(self, tx: Tx, order: Order) -> Saga:
        """The return of all that is left, in the caller's transaction, after which the caller has it driven."""
        return await self._start(tx, (order.id, REFUND, REST), await self._take_back(tx, order, (), ""))

    # ---------------------------------------------------------------------------------------------------- how it begins

    async def _begin(self, order_id: int, asked: Asked, begin: Begin) -> Refund:
        """Begins a refund, or finds the one that its key has begun; answers when it is done, or the time is over."""
        key = (order_id, REFUND, asked.reference)
        started: Saga | None = None
        try:
            async with self._database.transaction() as tx:
                if await idempotency.claim_one(tx, asked.operation, asked.keyed) is None:
                    started = await self._begin_once(tx, key, asked, begin)
                    await idempotency.remember(tx, asked.operation, [asked.keyed], [asked.reference.encode()])
                await faults.point("orders.refund.before_commit")
        except LockTimeout:
            raise RequestInProgress from None
        await faults.point("orders.refund.after_commit")
        if started is not None:
            self._runner.drive([started])
        await self._runner.at_rest(key, (), ANSWER_SECONDS)
        async with self._database.read() as tx:
            found = await saga.find(tx, key)
        assert found is not None, "a key that was claimed has its refund"
        return _answer(found, replayed=started is None)

    async def _begin_once(self, tx: Tx, key: saga.Key, asked: Asked, begin: Begin) -> Saga | None:
        """None where the key has begun its refund long ago, and only its stored answer is past its day."""
        check_still(await lock_checkout(tx, key[0]))
        order = await store.get_locked(tx, key[0])
        assert order is not None, "it has a checkout"
        if (old := await saga.find(tx, key)) is not None:
            if msgspec.json.decode(old.state, type=Giving).fingerprint != asked.keyed.fingerprint.hex():
                raise IdempotencyKeyReused
            return None
        giving = await begin(tx, order)
        return await self._start(tx, key, msgspec.structs.replace(giving, fingerprint=asked.keyed.fingerprint.hex()))

    async def _start(self, tx: Tx, key: saga.Key, giving: Giving) -> Saga:
        started = Saga(key, "refund", msgspec.json.encode(giving).decode())
        await saga.start(tx, [started], self._runner.lease_seconds)
        return started

    # ----------------------------------------------------------------------------------------------------- the one step

    async def _give_back(self, sagas: Sequence[Saga]) -> None:
        left = [Work(refund, msgspec.json.decode(refund.state, type=Giving)) for refund in sagas]
        while left:
            now, left = _one_an_order(left)
            self._runner.act()
            await self._restock(now)
            await self._refund(now)
            await self._save(now)

    async def _restock(self, works: Sequence[Work]) -> None:
        """Puts the goods that came back on the shelf."""
        asked = [work for work in works if work.giving.lines]
        if not asked:
            return
        await faults.point("refund.restock.before_call")
        answers = await self._inventory.restock.many([_restock(work) for work in asked])
        await faults.point("refund.restock.after_call")
        for work, answer in zip(asked, answers, strict=True):
            # Inventory knows of no such goods, and never will: the order is older than it. The money is due anyway.
            if isinstance(answer, ServiceError) and not isinstance(answer, (ReservationClosed, ReturnTooLarge)):
                work.retry = answer.code

    async def _refund(self, works: Sequence[Work]) -> None:
        """Gives the money back, of those whose goods are on the shelf."""
        asked = [work for work in works if work.giving.amount_minor and work.retry is None]
        if not asked:
            return
        await faults.point("refund.refund.before_call")
        answers = await self._payments.refund.many([_refund(work) for work in asked])
        await faults.point("refund.refund.after_call")
        for work, answer in zip(asked, answers, strict=True):
            if isinstance(answer, FINAL):
                work.code = answer.code
            elif isinstance(answer, ServiceError):
                work.retry = answer.code

    async def _save(self, works: Sequence[Work]) -> None:
        by_key = {work.saga.key: work for work in works}
        async with self._runner.saving([(work.saga, self._next(work)) for work in works]) as (tx, kept):
            done = [work for saga, _ in kept if (work := by_key[saga.key]).retry is None and work.giving.amount_minor]
            orders = await store.lock(tx, [work.order_id for work in done]) if done else {}
            if noted := [_move(work, orders[work.order_id]) for work in done if work.code is None]:
                assert all(await store.move(tx, noted, SHOP)), "the rows are locked"
            if declined := {work.order_id: work.giving.amount_minor for work in done if work.code is not None}:
                await store.forget_refunds(tx, declined)
            await faults.point("refund.save.before_commit")
        await faults.point("refund.save.after_commit")

    def _next(self, work: Work) -> Next:
        if work.retry is not None:
            return self._runner.again(work.saga, f"retried {work.retry}")
        state = msgspec.json.encode(msgspec.structs.replace(work.giving, code=work.code)).decode()
        return Next("done", state, "given back" if work.code is None else f"declined {work.code}")

    async def _take_back(self, tx: Tx, order: Order, lines: Sequence[ReturnLine], reason: str) -> Giving:
        """Counts the goods as returned, and sets aside what they cost."""
        lines = lines or rules.not_returned(order)
        rules.check_return(order, lines)
        taken = await store.take_back(tx, order.id, lines)
        assert taken, "the order is locked, and its lines were checked"
        amount = 0
        if order.payment in rules.REFUNDABLE:
            # Part of what these goods cost may have been refunded by hand already.
            amount = min(rules.worth(order, lines), await store.refundable(tx, order.id))
            if amount:
                announced = await store.announce_refund(tx, order.id, amount)
                assert announced, "the order is locked, and so much was left"
        complete = rules.is_all(order, lines)
        move = (
            store.Move(order, fulfilment="returned", note=reason)
            if complete
            else store.Move(order, again="fulfilment", note=reason)
        )
        assert all(await store.move(tx, [move], current.get().actor)), "the row is locked"
        return Giving(amount, order.currency, await _attempt(tx, order.id), lines=tuple(lines), reason=reason)


# -------------------------------------------------------------------------------------------------------------- details


class Asked(msgspec.Struct, frozen=True):
    """A request under its key. `reference` is what stands for the key for ever, within one order."""

    operation: str
    keyed: Keyed
    reference: str


Begin = Callable[[Tx, Order], Awaitable[Giving]]


async def lock_checkout(tx: Tx, order_id: int) -> Saga:
    """Keeps a checkout from moving: before its order is locked. Raises `OrderNotFound`."""
    checkout = await saga.lock(tx, (order_id, CHECKOUT, ""))
    if checkout is None:
        raise OrderNotFound(order_id=order_id)
    return checkout


def check_still(checkout: Saga) -> None:
    """Raises `PaymentInProgress` for one that is under way: what it saves next starts from where the order is now."""
    if checkout.step not in ("done", "awaiting", "authorized"):
        raise PaymentInProgress(order_id=checkout.subject_id)


def _asked(operation: str, key: str, fingerprint: bytes) -> Asked:
    keyed = Keyed(idempotency.principal_of(current.get().actor), key, fingerprint)
    digest = hashlib.sha256("\0".join((operation, *keyed.identity)).encode()).hexdigest()
    return Asked(operation, keyed, digest[:24])


async def _attempt(tx: Tx, order_id: int) -> int:
    """The number of the payment that an order was paid with; 0 where it was not."""
    checkout = await saga.find(tx, (order_id, CHECKOUT, ""))
    return msgspec.json.decode(checkout.state, type=Checkout).attempt if checkout else 0


def _one_an_order(works: Sequence[Work]) -> tuple[list[Work], list[Work]]:
    """The first of each order, and the others: those of one order are noted one after the other."""
    firsts: dict[int, Work] = {}
    others = [work for work in works if firsts.setdefault(work.order_id, work) is not work]
    return list(firsts.values()), others


def _move(work: Work, order: Order) -> store.Move:
    giving = work.giving
    is_all = order.refunded_minor + giving.amount_minor == order.total_minor
    return store.Move(
        order,
        payment="refunded" if is_all else "partially_refunded",
        again="payment",
        refunded_minor=giving.amount_minor,
        pending_minor=giving.amount_minor,
        note=giving.reason,
    )


def _restock(work: Work) -> ReturnStock:
    reference = work.saga.reference
    return ReturnStock(
        order_id=work.order_id,
        lines=tuple(StockLine(product_id=line.product_id, quantity=line.quantity) for line in work.giving.lines),
        reference=reference,
        idempotency_key=f"order:{work.order_id}:restock:{reference}",
    )


def _refund(work: Work) -> RefundPayment:
    reference = work.saga.reference
    return RefundPayment(
        order_id=work.order_id,
        attempt=work.giving.attempt,
        amount_minor=work.giving.amount_minor,
        reference=reference,
        idempotency_key=f"order:{work.order_id}:refund:{reference}",
    )


def _answer(refund: Saga, *, replayed: bool) -> Refund:
    giving = msgspec.json.decode(refund.state, type=Giving)
    status: RefundStatus = "pending"
    if refund.step == "done":
        status = "succeeded" if giving.code is None else "declined"
    return Refund(
        id=refund.reference,
        order_id=refund.subject_id,
        lines=giving.lines,
        amount_minor=giving.amount_minor,
        currency=giving.currency,
        status=status,
        code=giving.code,
        reason=giving.reason,
        replayed=replayed,
    )
