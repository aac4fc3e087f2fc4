"""Refunds of money that was paid, and returns of goods.

A refund is a row that stays (`refunds`), and a saga with one step while it is under way: restock the goods, if any were
returned, then refund the money, then write both ends on the order. The amount is reserved on the order in the
transaction that begins the refund, so that two refunds never have the same money; goods are counted as returned there,
so that they are never returned twice. The reference of a refund is derived from its key and unique: a key that comes
again, however late, finds the refund that it has begun.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final

import msgspec

from mercato.chassis.contract import Actor, RuleBroken, ServiceError, as_service, current
from mercato.chassis.idempotency.batch import bounded_by_key
from mercato.chassis.idempotency.keys import Keyed, principal_of
from mercato.chassis.observability import faults
from mercato.chassis.postgres.database import Database, Tx
from mercato.chassis.sagas import store as saga
from mercato.chassis.sagas.runner import Runner
from mercato.chassis.sagas.store import Next, Saga
from mercato.contracts.inventory import (
    AnotherOrder as StockOfAnotherOrder,
    Inventory,
    ReservationClosed,
    ReturnStock,
    ReturnTooLarge,
    StockLine,
)
from mercato.contracts.orders import PAID, Order, Refund, RefundOrder, ReturnLine, ReturnOrder
from mercato.contracts.payments import (
    AnotherOrder as PaymentOfAnotherOrder,
    AttemptNotFound,
    GetPayment,
    Payments,
    PaymentStateConflict,
    RefundDeclined,
    RefundPayment,
    RefundReferenceReused,
    RefundTooLarge,
)

from . import money_store, read_store, rules, store
from .checkout import SHOP
from .locking import Locked, in_lock
from .money_store import NewRefund, Refunded, RefundRecord
from .paying import ANSWER_SECONDS, LOCK_SECONDS
from .read_store import OrderRecord
from .refund_listing import shown

REFUND: Final = "refund"
REST: Final = "rest"
"""The reference of the return of all that is left."""

faults.declare(
    *(f"orders.refund.{when}_commit" for when in ("before", "after")),
    *(f"refund.{call}.{when}_call" for call in ("restock", "refund") for when in ("before", "after")),
    *(f"refund.save.{when}_commit" for when in ("before", "after")),
)

FINAL: Final = (
    AttemptNotFound,
    PaymentOfAnotherOrder,
    PaymentStateConflict,
    RefundDeclined,
    RefundReferenceReused,
    RefundTooLarge,
)
"""Answers of payments that will be the same the next time."""

NOT_RETURNABLE: Final = (ReservationClosed, ReturnTooLarge, StockOfAnotherOrder)
"""Inventory knows of no such goods, and never will: the order is older than it. The money is due all the same."""


class Work(msgspec.Struct):
    """One refund in its step. `retry`: why it has to be tried again; `code`: why it was declined."""

    saga: Saga
    record: OrderRecord
    refund: RefundRecord
    retry: str | None = None
    code: str | None = None

    @property
    def order_id(self) -> int:
        return self.saga.subject_id


class RefundKey(Keyed, frozen=True):
    """The key of a refund. `reference` stands for it for ever."""

    reference: str


class RefundDraft(msgspec.Struct, frozen=True):
    """What a refund gives back: an amount, and the goods that were returned for it."""

    amount_minor: int
    lines: tuple[ReturnLine, ...] = ()
    reason: str = ""
    internal_note: str = ""
    asked_minor: int | None = None
    """More than `amount_minor` where so much is not left; None: as much."""


BeginRefund = Callable[[Tx, Locked], Awaitable[Saga]]
Compared = Mapping[str, tuple[object, object]]
"""Of each field, what a request has, and what the refund of its key has."""


class Refunding:
    """Refunds and returns, and the step of their saga."""

    def __init__(self, database: Database, runner: Runner, *, inventory: Inventory, payments: Payments) -> None:
        self._database = database
        self._runner = runner
        self._inventory = inventory
        self._payments = payments
        runner.register(REFUND, {"refund": self._execute})

    # ------------------------------------------------------------------------------------------------------- requests

    async def refund(self, request: RefundOrder) -> Refund:
        """Money alone, of a payment."""
        with as_service():
            payment = await self._payments.get(GetPayment(id=request.payment_id))

        async def begin(tx: Tx, locked: Locked) -> Saga:
            is_paid_with = payment.attempt == locked.record.payment_attempt
            left_minor = locked.record.refundable_minor if is_paid_with else 0
            amount_minor = rules.check_refund(locked.order, request, left_minor)
            draft = RefundDraft(amount_minor, reason=request.reason, internal_note=request.internal_note)
            return await self._start(tx, locked, key, draft)

        def compared(old: RefundRecord) -> Compared:
            wanted = rules.minor_of("amount", request.amount, request.amount_minor, old.currency)
            return {
                "payment_id": (payment.attempt, old.payment_attempt),
                "amount": (old.amount_minor if wanted is None else wanted, old.amount_minor),
            }

        key = _key_of("orders.refund", request)
        return await self._begin(payment.order_id, key, begin, compared, request.payment_id)

    async def take_back(self, request: ReturnOrder) -> Refund:
        """Goods, and what was paid for them."""

        async def begin(tx: Tx, locked: Locked) -> Saga:
            draft = await self._return(tx, locked, request.lines, request.reason, request.internal_note)
            return await self._start(tx, locked, key, draft)

        key = _key_of("orders.take_back", request)
        return await self._begin(request.id, key, begin, lambda _: {})

    async def take_back_rest(self, tx: Tx, locked: Locked) -> Saga:
        """The return of all that is left, in the caller's transaction, after which the caller drives the saga."""
        return await self._start(tx, locked, None, await self._return(tx, locked, (), ""))

    # ---------------------------------------------------------------------------------------------------- how it begins

    async def _begin(
        self,
        order_id: int,
        key: RefundKey,
        begin: BeginRefund,
        compared: Callable[[RefundRecord], Compared],
        payment_id: int | None = None,
    ) -> Refund:
        """Begins a refund, or finds the one that its key has begun; answers when it is settled, or the time is over.

        Raises `IdempotencyKeyReused` where that one is of another order, or another by what `compared` gives.
        """

        async def work(tx: Tx, locked: Locked) -> tuple[int, Saga | None]:
            if (old := await money_store.refund_of_key(tx, key.reference)) is not None:
                key.check(old.fingerprint, **{"order_id": (order_id, old.order_id), **compared(old)})
                return old.order_id, None
            locked.check_idle()
            started = await begin(tx, locked)
            await faults.point("orders.refund.before_commit")
            return order_id, started

        with bounded_by_key():
            order_id, started = await in_lock(self._database, order_id, work, lock_seconds=LOCK_SECONDS)
        await faults.point("orders.refund.after_commit")
        if started is not None:
            self._runner.drive([started])
        saga_key = (order_id, REFUND, key.reference)
        await self._runner.wait_until_idle(saga_key, (), ANSWER_SECONDS)
        async with self._database.read() as tx:
            found = (await money_store.refunds(tx, [saga_key]))[order_id, key.reference]
        return shown(found, current.get().actor, payment_id, replayed=started is None)

    async def _start(self, tx: Tx, locked: Locked, key: RefundKey | None, draft: RefundDraft) -> Saga:
        """Reserves the amount, writes the refund and its saga. The order is locked."""
        record = locked.record
        asked_minor = draft.amount_minor if draft.asked_minor is None else draft.asked_minor
        if draft.amount_minor:
            is_reserved = await money_store.reserve_refund(tx, record.id, draft.amount_minor)
            assert is_reserved, "the order is locked, and so much was left"
        refund = NewRefund(
            order_id=record.id,
            reference=REST if key is None else key.reference,
            lines=draft.lines,
            amount_minor=draft.amount_minor,
            currency=record.order.currency,
            payment_attempt=record.payment_attempt,
            reason=draft.reason,
            fingerprint=None if key is None else key.fingerprint,
            internal_note=draft.internal_note,
            asked_minor=asked_minor,
            limit_reason=rules.limit_reason(locked.order, asked_minor, draft.amount_minor),
        )
        await money_store.insert_refund(tx, refund, current.get().actor)
        started = Saga((record.id, REFUND, refund.reference), "refund", "")
        await saga.start(tx, [started], self._runner.driver)
        return started

    async def _return(
        self, tx: Tx, locked: Locked, wanted: Sequence[ReturnLine], reason: str, internal_note: str = ""
    ) -> RefundDraft:
        """Counts goods as returned, and says what was paid for them."""
        order, asked_minor, amount_minor = locked.order, 0, 0
        lines = rules.check_return(order, wanted or rules.not_returned(order))
        await money_store.set_returned(tx, order.id, rules.returned_after(order, lines))
        if order.payment in PAID:
            # Part of what was paid for these goods may have been refunded by hand already, or was never taken.
            asked_minor = rules.refund_value(order, lines)
            amount_minor = min(asked_minor, locked.record.refundable_minor)
        limit_reason = rules.limit_reason(order, asked_minor, amount_minor)
        is_complete = rules.is_all(order, lines)
        move = store.Move(
            order,
            fulfilment="returned" if is_complete else None,
            again=None if is_complete else "fulfilment",
            note=reason,
            internal_note=internal_note,
            limit_reason=limit_reason,
        )
        await self._move(tx, [move], current.get().actor)
        return RefundDraft(amount_minor, lines, reason, internal_note, asked_minor)

    # ----------------------------------------------------------------------------------------------------- the one step

    async def _execute(self, sagas: Sequence[Saga]) -> None:
        async with self._database.read() as tx:
            refunds = await money_store.refunds(tx, [each.key for each in sagas])
            records = await read_store.get(tx, list({each.subject_id for each in sagas}))
        left = [Work(each, records[each.subject_id], refunds[each.subject_id, each.reference]) for each in sagas]
        while left:
            now, left = _one_an_order(left)
            self._runner.enter_service_context()
            await self._restock(now)
            await self._refund(now)
            await self._save(now)

    async def _restock(self, works: Sequence[Work]) -> None:
        """Puts returned goods on the shelf."""
        asked = [work for work in works if work.refund.lines]
        if not asked:
            return
        await faults.point("refund.restock.before_call")
        answers = await self._inventory.restock.many([_restock(work) for work in asked])
        await faults.point("refund.restock.after_call")
        for work, answer in zip(asked, answers, strict=True):
            if isinstance(answer, ServiceError) and not isinstance(answer, NOT_RETURNABLE):
                work.retry = answer.code

    async def _refund(self, works: Sequence[Work]) -> None:
        """Refunds the money, of those whose goods are on the shelf."""
        asked = [work for work in works if work.refund.amount_minor and work.retry is None]
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
            settled = [work for each, _ in kept if (work := by_key[each.key]).retry is None]
            await money_store.settle_refunds(tx, [(work.refund, work.code) for work in settled])
            paid = [work for work in settled if work.refund.amount_minor]
            records = await read_store.lock(tx, [work.order_id for work in paid]) if paid else {}
            if given := [work for work in paid if work.code is None]:
                moved = await self._move(tx, [_move(work, records[work.order_id].order) for work in given], SHOP)
                money_store.emit_refunded(tx, list(map(_refunded, given, moved)))
            if declined := [(work.order_id, work.refund.amount_minor) for work in paid if work.code is not None]:
                await money_store.release_refunds(tx, declined)
            await faults.point("refund.save.before_commit")
        await faults.point("refund.save.after_commit")

    async def _move(self, tx: Tx, moves: Sequence[store.Move], actor: Actor) -> list[Order]:
        moved = [order for order in await store.move(tx, moves, actor) if order]
        if len(moved) < len(moves):
            raise RuleBroken("the rows are locked: no other transaction can have changed them in between")
        return moved

    def _next(self, work: Work) -> Next:
        if work.retry is not None:
            return self._runner.retry_later(work.saga)
        return Next("refund", "", finished=True)


# -------------------------------------------------------------------------------------------------------------- details


def _key_of(operation: str, request: RefundOrder | ReturnOrder) -> RefundKey:
    principal, key = principal_of(current.get().actor), request.idempotency_key
    digest = hashlib.sha256(f"{operation}\0{principal}\0{key}".encode()).hexdigest()
    return RefundKey(principal, key, request.fingerprint, reference=digest[:24])


def _one_an_order(works: Sequence[Work]) -> tuple[list[Work], list[Work]]:
    """The first of each order, and the others: those of one order are executed one after the other."""
    firsts: dict[int, Work] = {}
    others = [work for work in works if firsts.setdefault(work.order_id, work) is not work]
    return list(firsts.values()), others


def _move(work: Work, order: Order) -> store.Move:
    amount_minor = work.refund.amount_minor
    is_all = order.refunded_minor + amount_minor == rules.payable_minor(order)
    return store.Move(
        order,
        payment="refunded" if is_all else "partially_refunded",
        again="payment",
        refunded_minor=amount_minor,
        pending_minor=amount_minor,
        note=work.refund.reason,
        internal_note=work.refund.internal_note,
        limit_reason=work.refund.limit_reason,
        epoch=work.saga.epoch,
        tries=work.saga.tries,
    )


def _refunded(work: Work, order: Order) -> Refunded:
    refund = work.refund
    return Refunded(order, refund.reference, refund.amount_minor, Actor(refund.actor_role, refund.actor_id))


def _restock(work: Work) -> ReturnStock:
    lines = {line.id: line.product_id for line in work.record.order.lines}
    reference = work.saga.reference
    return ReturnStock(
        order_id=work.order_id,
        order_nonce=work.record.nonce,
        lines=tuple(
            StockLine(product_id=lines[line.line_id], quantity=line.quantity)
            for line in work.refund.lines
            if line.line_id is not None
        ),
        reference=reference,
        idempotency_key=f"order:{work.order_id}:restock:{reference}",
    )


def _refund(work: Work) -> RefundPayment:
    reference = work.saga.reference
    return RefundPayment(
        order_id=work.order_id,
        order_nonce=work.record.nonce,
        attempt=work.refund.payment_attempt,
        amount_minor=work.refund.amount_minor,
        reference=reference,
        idempotency_key=f"order:{work.order_id}:refund:{reference}",
    )
