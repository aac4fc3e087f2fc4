"""Refunds of money that was paid, and returns of goods.

A refund is a row that stays (`refunds`), and a saga with one step while it is under way: restock the goods, if any were
returned, then refund the money, then record both on the order. The transaction that begins the refund reserves its
amount on the order, so that two refunds never refund the same money; it also counts the goods as returned, so that
they are never returned twice. The reference of a refund is derived from its key and unique: a repeated key, however
late, finds the refund that it has begun.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final

import msgspec

from mercato.chassis.contract import Actor, RuleBroken, ServiceError, as_service, current, trace_of
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
from .locking import Locked, locked_order
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
"""Answers of payments that a retry does not change."""

NOT_RETURNABLE: Final = (ReservationClosed, ReturnTooLarge, StockOfAnotherOrder)
"""Inventory has no such goods, and never will: the order is older than it. The money is refunded nevertheless."""


class RefundRun(msgspec.Struct):
    """One refund in one run of its step. `retry`: why it has to be tried again; `code`: why it was declined."""

    saga: Saga
    record: OrderRecord
    refund: RefundRecord
    retry: str | None = None
    code: str | None = None

    @property
    def order_id(self) -> int:
        return self.saga.subject_id


class RefundKey(Keyed, frozen=True):
    """The key of a refund. `reference` is derived from it and unique."""

    reference: str


class RefundDraft(msgspec.Struct, frozen=True):
    """The amount of a refund, and the goods that were returned for it."""

    amount_minor: int
    lines: tuple[ReturnLine, ...] = ()
    reason: str = ""
    internal_note: str = ""
    asked_minor: int | None = None
    """More than `amount_minor` where less is left; None: as much."""


class BegunRefund(msgspec.Struct, frozen=True):
    """The refund of a key. `saga`: this request has begun it; None: an earlier request with the key has."""

    order_id: int
    saga: Saga | None = None


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
        """Refunds money of a payment, without goods."""
        with as_service():
            payment = await self._payments.get(GetPayment(id=request.payment_id))

        order_id, key = payment.order_id, _key_of("orders.refund", request)
        with bounded_by_key():
            async with locked_order(self._database, order_id, lock_seconds=LOCK_SECONDS) as (tx, locked):
                old = await money_store.refund_of_key(tx, key.reference)
                if old is None:
                    locked.check_idle()
                    begun = await self._begin(tx, locked, key, _refund_draft(request, payment.attempt, locked))
                else:
                    _check_same_refund(key, old, order_id, request, payment.attempt)
                    begun = BegunRefund(old.order_id)
        return await self._answer(key, begun, request.payment_id)

    async def take_back(self, request: ReturnOrder) -> Refund:
        """Returns goods, and refunds what was paid for them."""

        key = _key_of("orders.take_back", request)
        with bounded_by_key():
            async with locked_order(self._database, request.id, lock_seconds=LOCK_SECONDS) as (tx, locked):
                old = await money_store.refund_of_key(tx, key.reference)
                if old is None:
                    locked.check_idle()
                    draft = await self._return(tx, locked, request.lines, request.reason, request.internal_note)
                    begun = await self._begin(tx, locked, key, draft)
                else:
                    key.check(old.fingerprint, order_id=(request.id, old.order_id))
                    begun = BegunRefund(old.order_id)
        return await self._answer(key, begun)

    async def return_rest(self, tx: Tx, locked: Locked) -> Saga:
        """Begins the return of all that is left, in the caller's transaction; the caller drives the saga afterwards."""
        return await self._start(tx, locked, None, await self._return(tx, locked, (), ""))

    # ---------------------------------------------------------------------------------------------------- how it begins

    async def _begin(self, tx: Tx, locked: Locked, key: RefundKey, draft: RefundDraft) -> BegunRefund:
        started = await self._start(tx, locked, key, draft)
        await faults.point("orders.refund.before_commit")
        return BegunRefund(locked.record.id, started)

    async def _answer(self, key: RefundKey, begun: BegunRefund, payment_id: int | None = None) -> Refund:
        """Drives a refund that was begun; answers when it is settled, or the time is over."""
        await faults.point("orders.refund.after_commit")
        if begun.saga is not None:
            self._runner.drive([begun.saga])
        saga_key = (begun.order_id, REFUND, key.reference)
        await self._runner.wait_until_idle(saga_key, (), ANSWER_SECONDS)
        async with self._database.read() as tx:
            found = (await money_store.refunds(tx, [saga_key]))[begun.order_id, key.reference]
        return shown(found, current.get().actor, payment_id, replayed=begun.saga is None)

    async def _start(self, tx: Tx, locked: Locked, key: RefundKey | None, draft: RefundDraft) -> Saga:
        """Reserves the amount, writes the refund and its saga. The caller has locked the order."""
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
        started = Saga((record.id, REFUND, refund.reference), "refund", "", trace=trace_of(current.get()))
        await saga.start(tx, [started], self._runner.driver)
        return started

    async def _return(
        self, tx: Tx, locked: Locked, wanted: Sequence[ReturnLine], reason: str, internal_note: str = ""
    ) -> RefundDraft:
        """Counts goods as returned; gives the draft of the refund of what was paid for them."""
        order, asked_minor, amount_minor = locked.order, 0, 0
        lines = rules.check_return(order, wanted or rules.not_returned(order))
        await money_store.set_returned(tx, order.id, rules.returned_after(order, lines))
        if order.payment in PAID:
            # Staff may have refunded a part of what was paid for these goods, or a part was never taken.
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
        left = [RefundRun(each, records[each.subject_id], refunds[each.subject_id, each.reference]) for each in sagas]
        while left:
            now, left = _one_an_order(left)
            self._runner.enter_service_context()
            await self._restock(now)
            await self._refund(now)
            await self._save(now)

    async def _restock(self, runs: Sequence[RefundRun]) -> None:
        """Restocks returned goods."""
        asked = [run for run in runs if run.refund.lines]
        if not asked:
            return
        await faults.point("refund.restock.before_call")
        answers = await self._inventory.restock.many([_restock(run) for run in asked])
        await faults.point("refund.restock.after_call")
        for run, answer in zip(asked, answers, strict=True):
            if isinstance(answer, ServiceError) and not isinstance(answer, NOT_RETURNABLE):
                run.retry = answer.code

    async def _refund(self, runs: Sequence[RefundRun]) -> None:
        """Refunds the money of those whose goods are restocked."""
        asked = [run for run in runs if run.refund.amount_minor and run.retry is None]
        if not asked:
            return
        await faults.point("refund.refund.before_call")
        answers = await self._payments.refund.many([_refund(run) for run in asked])
        await faults.point("refund.refund.after_call")
        for run, answer in zip(asked, answers, strict=True):
            if isinstance(answer, FINAL):
                run.code = answer.code
            elif isinstance(answer, ServiceError):
                run.retry = answer.code

    async def _save(self, runs: Sequence[RefundRun]) -> None:
        by_key = {run.saga.key: run for run in runs}
        async with self._runner.saving([(run.saga, self._next(run)) for run in runs]) as (tx, kept):
            settled = [run for each, _ in kept if (run := by_key[each.key]).retry is None]
            await money_store.settle_refunds(tx, [(run.refund, run.code) for run in settled])
            paid = [run for run in settled if run.refund.amount_minor]
            records = await read_store.lock(tx, [run.order_id for run in paid]) if paid else {}
            if given := [run for run in paid if run.code is None]:
                moved = await self._move(tx, [_move(run, records[run.order_id].order) for run in given], SHOP)
                money_store.emit_refunded(tx, list(map(_refunded, given, moved)))
            if declined := [(run.order_id, run.refund.amount_minor) for run in paid if run.code is not None]:
                await money_store.release_refunds(tx, declined)
            await faults.point("refund.save.before_commit")
        await faults.point("refund.save.after_commit")

    async def _move(self, tx: Tx, moves: Sequence[store.Move], actor: Actor) -> list[Order]:
        moved = [order for order in await store.move(tx, moves, actor) if order]
        if len(moved) < len(moves):
            raise RuleBroken("the rows are locked: no other transaction can have changed them in between")
        return moved

    def _next(self, run: RefundRun) -> Next:
        if run.retry is not None:
            return self._runner.retry_later(run.saga)
        return Next("refund", "", finished=True)


# -------------------------------------------------------------------------------------------------------------- details


def _key_of(operation: str, request: RefundOrder | ReturnOrder) -> RefundKey:
    principal, key = principal_of(current.get().actor), request.idempotency_key
    digest = hashlib.sha256(f"{operation}\0{principal}\0{key}".encode()).hexdigest()
    return RefundKey(principal, key, request.fingerprint, reference=digest[:24])


def _refund_draft(request: RefundOrder, attempt: int, locked: Locked) -> RefundDraft:
    """Raises what `rules.check_refund` raises. `attempt`: the number of the payment that is to be refunded."""
    left_minor = locked.record.refundable_minor if attempt == locked.record.payment_attempt else 0
    amount_minor = rules.check_refund(locked.order, request, left_minor)
    return RefundDraft(amount_minor, reason=request.reason, internal_note=request.internal_note)


def _check_same_refund(key: RefundKey, old: RefundRecord, order_id: int, request: RefundOrder, attempt: int) -> None:
    """Raises `IdempotencyKeyReused` where the refund of the key is not the one that the request asks for."""
    wanted_minor = rules.minor_of("amount", request.amount, request.amount_minor, old.currency)
    key.check(
        old.fingerprint,
        order_id=(order_id, old.order_id),
        payment_id=(attempt, old.payment_attempt),
        amount=(old.amount_minor if wanted_minor is None else wanted_minor, old.amount_minor),
    )


def _one_an_order(runs: Sequence[RefundRun]) -> tuple[list[RefundRun], list[RefundRun]]:
    """The first refund of each order, and the others: refunds of one order are executed one after the other."""
    firsts: dict[int, RefundRun] = {}
    others = [run for run in runs if firsts.setdefault(run.order_id, run) is not run]
    return list(firsts.values()), others


def _move(run: RefundRun, order: Order) -> store.Move:
    amount_minor = run.refund.amount_minor
    is_all = order.refunded_minor + amount_minor == rules.payable_minor(order)
    return store.Move(
        order,
        payment="refunded" if is_all else "partially_refunded",
        again="payment",
        refunded_minor=amount_minor,
        pending_minor=amount_minor,
        note=run.refund.reason,
        internal_note=run.refund.internal_note,
        limit_reason=run.refund.limit_reason,
        epoch=run.saga.epoch,
        tries=run.saga.tries,
    )


def _refunded(run: RefundRun, order: Order) -> Refunded:
    refund = run.refund
    return Refunded(order, refund.reference, refund.amount_minor, Actor(refund.actor_role, refund.actor_id))


def _restock(run: RefundRun) -> ReturnStock:
    lines = {line.id: line.product_id for line in run.record.order.lines}
    reference = run.saga.reference
    return ReturnStock(
        order_id=run.order_id,
        order_nonce=run.record.nonce,
        lines=tuple(
            StockLine(product_id=lines[line.line_id], quantity=line.quantity)
            for line in run.refund.lines
            if line.line_id is not None
        ),
        reference=reference,
        idempotency_key=f"order:{run.order_id}:restock:{reference}",
    )


def _refund(run: RefundRun) -> RefundPayment:
    reference = run.saga.reference
    return RefundPayment(
        order_id=run.order_id,
        order_nonce=run.record.nonce,
        attempt=run.refund.payment_attempt,
        amount_minor=run.refund.amount_minor,
        reference=reference,
        idempotency_key=f"order:{run.order_id}:refund:{reference}",
    )
