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
from mercato.contracts.inventory import Inventory, ReturnStock, StockLine
from mercato.contracts.orders import (
    Order,
    OrderNotFound,
    Payment,
    PaymentInProgress,
    Refund,
    RefundOrder,
    RefundStatus,
    ReturnLine,
    ReturnOrder,
)
from mercato.contracts.payments import (
    GetPayment,
    Payments,
    PaymentStateConflict,
    RefundDeclined,
    RefundPayment,
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
            amount = rules.check_refund(order, request, await store.refundable(tx, order.id))
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

    async def hold_still(self, tx: Tx, order_id: int) -> None:
        """Keeps a checkout from moving, before its order is locked: money that is given back must not be on its way.

        Raises `OrderNotFound`, and `PaymentInProgress` for one that is under way.
        """
        checkout = await saga.lock(tx, (order_id, CHECKOUT, ""))
        if checkout is None:
            raise OrderNotFound(order_id=order_id)
        if checkout.step not in ("done", "awaiting", "authorized"):
            raise PaymentInProgress(order_id=order_id)

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
        await self.hold_still(tx, key[0])
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
        # One after the other: there are few, and two of one order would stand in each other's way.
        for refund in sagas:
            self._runner.act()
            try:
                await self._give_one_back(refund, msgspec.json.decode(refund.state, type=Giving))
            except ServiceError as error:  # the next one is another order's
                async with self._runner.saving([(refund, self._runner.again(refund, f"retried {error.code}"))]):
                    pass

    async def _give_one_back(self, refund: Saga, giving: Giving) -> None:
        order_id, code = refund.subject_id, None
        if giving.lines:
            await faults.point("refund.restock.before_call")
            await self._inventory.restock(_restock(order_id, refund.reference, giving))
            await faults.point("refund.restock.after_call")
        if giving.amount_minor:
            await faults.point("refund.refund.before_call")
            try:
                await self._payments.refund(_refund(order_id, refund.reference, giving))
            except (RefundDeclined, RefundTooLarge, PaymentStateConflict) as error:
                code = error.code
            await faults.point("refund.refund.after_call")
        done = Next("done", _with_code(giving, code), "given back" if code is None else f"declined {code}")
        async with self._runner.saving([(refund, done)]) as (tx, kept):
            if kept and giving.amount_minor:
                if code is None:
                    await _note_refund(tx, order_id, giving)
                else:
                    await store.forget_refund(tx, order_id, giving.amount_minor)
            await faults.point("refund.save.before_commit")
        await faults.point("refund.save.after_commit")

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
                await store.announce_refund(tx, order.id, amount)
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


def _asked(operation: str, key: str, fingerprint: bytes) -> Asked:
    keyed = Keyed(idempotency.principal_of(current.get().actor), key, fingerprint)
    digest = hashlib.sha256("\0".join((operation, *keyed.identity)).encode()).hexdigest()
    return Asked(operation, keyed, digest[:24])


async def _attempt(tx: Tx, order_id: int) -> int:
    """The number of the payment that an order was paid with; 0 where it was not."""
    checkout = await saga.find(tx, (order_id, CHECKOUT, ""))
    return msgspec.json.decode(checkout.state, type=Checkout).attempt if checkout else 0


async def _note_refund(tx: Tx, order_id: int, giving: Giving) -> None:
    order = await store.get_locked(tx, order_id)
    assert order is not None, "orders are not deleted"
    amount = giving.amount_minor
    state: Payment = "refunded" if order.refunded_minor + amount == order.total_minor else "partially_refunded"
    move = store.Move(
        order, payment=state, again="payment", refunded_minor=amount, pending_minor=amount, note=giving.reason
    )
    assert all(await store.move(tx, [move], SHOP)), "the row is locked"


def _restock(order_id: int, reference: str, giving: Giving) -> ReturnStock:
    lines = tuple(StockLine(product_id=line.product_id, quantity=line.quantity) for line in giving.lines)
    key = f"order:{order_id}:restock:{reference}"
    return ReturnStock(order_id=order_id, lines=lines, reference=reference, idempotency_key=key)


def _refund(order_id: int, reference: str, giving: Giving) -> RefundPayment:
    return RefundPayment(
        order_id=order_id,
        attempt=giving.attempt,
        amount_minor=giving.amount_minor,
        reference=reference,
        idempotency_key=f"order:{order_id}:refund:{reference}",
    )


def _with_code(giving: Giving, code: str | None) -> str:
    return msgspec.json.encode(msgspec.structs.replace(giving, code=code)).decode()


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
