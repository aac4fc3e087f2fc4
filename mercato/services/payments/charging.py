"""Money in three parts, a batch at a time.

1. intend    One transaction. Lock the payments, decide the next step of each (`rules.next_step`), write the operation
             with its key and the status `intent`. An operation that exists is used again, never a second one.
2. ask       The provider, outside of any transaction. Whoever dies here leaves the intent behind.
3. record    One transaction. Note the outcome of each operation that nobody else has settled, then what follows from
             it: the payment, the event, the ledger.

Then again from 1, for those whose goal takes another step: a void first finds out what became of the authorize.

Guaranteed
    - A provider hears of an operation only after its key is committed, and always hears the same key.
    - An operation is settled once, by the first who writes down its outcome; the others read what it has led to.
    - An outcome that is not known is never taken for one that is: the caller hears `OutcomePending`, and the sweeper
      asks again with the same key until it is.

A key is repeated blindly for 23 hours. Providers forget keys after a day, and would take an old one for a new
operation: from then on it is looked up first, and sent again only if the provider says that it never heard of it.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final

import msgspec
import structlog

from mercato.chassis import events, faults
from mercato.chassis.contract import ServiceError
from mercato.chassis.db import Database, Tx
from mercato.chassis.events import Outgoing
from mercato.contracts.payments import (
    AnotherPaymentLive,
    AttemptNotFound,
    OperationKind,
    OutcomePending,
    Payment,
    PaymentChanged,
)

from . import rules, store
from .provider import Asked, Provider
from .rules import Ask, Goal, Outcome, Succeeded, Unknown
from .store import NewOperation, NewPayment, OperationRow, Pair, PaymentRow

KINDS: Final[tuple[OperationKind, ...]] = ("authorize", "capture", "void", "refund")
ROUNDS: Final = 4
"""The longest way is three steps: find out about an authorize, find out about a capture, void."""
SWEPT_AT_ONCE: Final = 256

PLACES: Final = (
    "before_intent_commit",
    "after_intent_commit",
    "before_call",
    "after_call",
    "before_record_commit",
    "after_record_commit",
)
FLOWS: Final = (*KINDS, "sweep", "give_back")
"""Who goes through the three parts: the operations, what takes over after a crash, what repairs."""

faults.declare(*(f"payments.{flow}.{place}" for flow in FLOWS for place in PLACES))
faults.declare("payments.reconcile.before_record_commit", "payments.reconcile.after_record_commit")

log = structlog.stdlib.get_logger("mercato.payments")

Answer = Payment | ServiceError


class Wish:
    """One request on its way to its goal. `outcome` is None until it is there, or cannot get there."""

    __slots__ = ("goal", "opening", "outcome", "pair", "step")

    def __init__(self, pair: Pair, goal: Goal, opening: NewPayment | None = None) -> None:
        self.pair = pair
        self.goal = goal
        self.opening = opening
        """The payment to write where there is none; None where that is an error."""
        self.outcome: Answer | None = None
        self.step: Step | None = None
        """What this round asks the provider for."""

    def settled(self) -> Answer:
        return self.outcome or self.pending()

    def pending(self) -> OutcomePending:
        return OutcomePending(operation=self.goal.kind, order_id=self.pair[0])

    def missing(self) -> ServiceError:
        if self.goal.kind == "authorize":
            return AnotherPaymentLive(order_id=self.pair[0])
        return AttemptNotFound(order_id=self.pair[0], attempt=self.pair[1])

    def judge(self, payment: PaymentRow, operations: Iterable[rules.OperationState]) -> Ask | None:
        """The next step; None where there is none, and `outcome` is set."""
        step = rules.next_step(self.goal, payment, operations)
        if isinstance(step, Ask):
            return step
        self.outcome = payment_of(payment) if step is None else step
        return None


class Step(msgspec.Struct, frozen=True, eq=False):
    """An operation that is about to be asked for, and what else its payment had when that was decided."""

    operation: OperationRow
    payment: PaymentRow
    others: tuple[rules.OperationState, ...] = ()

    @property
    def is_old(self) -> bool:
        return self.operation.is_old

    @property
    def provider(self) -> str:
        return provider_of(self.payment.method)

    def asked(self) -> Asked:
        charge_id = None if self.operation.kind == "authorize" else self.payment.charge_id
        return Asked(
            key=self.operation.key,
            order_id=self.payment.order_id,
            charge_id=charge_id,
            amount_minor=self.operation.amount_minor,
            currency=self.operation.currency,
            method=self.payment.method,
        )


class Charging:
    """`providers` by the name that methods have before their colon."""

    def __init__(self, database: Database, providers: Mapping[str, Provider]) -> None:
        self._database = database
        self._providers = providers

    def knows(self, method: str) -> bool:
        """Whether there is a provider for a method."""
        return provider_of(method) in self._providers

    async def reach(self, flow: OperationKind, wishes: Sequence[Wish]) -> list[Answer]:
        """Brings each payment where its wish wants it. One answer for each, in order."""
        for _ in range(ROUNDS):
            left = [wish for wish in wishes if wish.outcome is None]
            if not left:
                break
            await self._intend(flow, left)
            asking = [wish for wish in left if wish.step is not None]
            outcomes = await self._ask(flow, [wish.step for wish in asking if wish.step])
            settled = await self._record(flow, [wish.step for wish in asking if wish.step], outcomes)
            for wish in asking:
                _follow(wish, outcomes, settled)
        return [wish.settled() for wish in wishes]

    # -------------------------------------------------------------------------------------------------- 1. intend

    async def _intend(self, flow: str, wishes: Sequence[Wish]) -> None:
        """Gives each wish its `step`, committed, or its outcome."""
        async with self._database.transaction() as tx:
            payments, opened = await _find(tx, wishes)
            known = await _operations(tx, payments.values(), opened)
            keys: dict[int, str] = {}
            new: dict[str, NewOperation] = {}
            for n, wish in enumerate(wishes):
                wish.step = None
                payment = payments.get(wish.pair)
                if payment is None:
                    wish.outcome = wish.missing()
                elif ask := wish.judge(payment, known[payment.id].values()):
                    operation = known[payment.id].get((ask.kind, ask.reference)) or _new(payment, ask)
                    if isinstance(operation, NewOperation):
                        # The next wish of this batch for this payment has to reckon with it.
                        new[operation.key] = known[payment.id][ask.kind, ask.reference] = operation
                    keys[n] = operation.key
            begun = await _begin(tx, list(new.values()), known, set(keys.values()))
            for n, key in keys.items():
                payment = payments[wishes[n].pair]
                wishes[n].step = Step(begun[key], payment, tuple(known[payment.id].values()))
            await faults.point(f"payments.{flow}.before_intent_commit")
        await faults.point(f"payments.{flow}.after_intent_commit")

    # ----------------------------------------------------------------------------------------------------- 2. ask

    async def _ask(self, flow: str, steps: Sequence[Step]) -> dict[int, Outcome]:
        """Outcomes by operation."""
        if not steps:
            return {}
        await faults.point(f"payments.{flow}.before_call")
        outcomes: dict[int, Outcome] = {}
        unique = {step.operation.id: step for step in steps}
        if old := [step for step in unique.values() if step.is_old]:
            outcomes |= await self._look_up(old)
        groups: dict[tuple[str, OperationKind], list[Step]] = defaultdict(list)
        for step in unique.values():
            if step.operation.id not in outcomes:
                groups[step.provider, step.operation.kind].append(step)
        for answered in await asyncio.gather(*(self._ask_one(*group, some) for group, some in groups.items())):
            outcomes |= answered
        await faults.point(f"payments.{flow}.after_call")
        return outcomes

    async def _ask_one(self, provider: str, kind: OperationKind, steps: Sequence[Step]) -> dict[int, Outcome]:
        verbs = self._providers[provider]
        ask = {"authorize": verbs.authorize, "capture": verbs.capture, "void": verbs.void, "refund": verbs.refund}
        answers = await ask[kind]([step.asked() for step in steps])
        return {step.operation.id: answer for step, answer in zip(steps, answers, strict=True)}

    async def _look_up(self, steps: Sequence[Step]) -> dict[int, Outcome]:
        """What is known of keys that must not be repeated blindly. Those that may be are not in it."""
        outcomes: dict[int, Outcome] = {}
        by_provider: dict[str, list[Step]] = defaultdict(list)
        for step in steps:
            by_provider[step.provider].append(step)
        for provider, some in by_provider.items():
            found = await self._providers[provider].look_up([step.operation.key for step in some])
            for step, listed in zip(some, found, strict=True):
                if listed is not None:
                    outcomes[step.operation.id] = listed if isinstance(listed, Unknown) else listed.outcome
        return outcomes

    # -------------------------------------------------------------------------------------------------- 3. record

    async def _record(self, flow: str, steps: Sequence[Step], outcomes: Mapping[int, Outcome]) -> dict[int, PaymentRow]:
        """Notes outcomes and what follows from them. The payments as they are now, by operation that this settled."""
        operations = {step.operation.id: step.operation for step in steps if step.operation.id in outcomes}
        if not operations:
            return {}
        async with self._database.transaction() as tx:
            recorded = await _settle(tx, operations, outcomes)
            await faults.point(f"payments.{flow}.before_record_commit")
        await faults.point(f"payments.{flow}.after_record_commit")
        return recorded

    # --------------------------------------------------------------------------------------------------- take over

    async def sweep(self, quiet_seconds: float) -> int:
        """Asks again for operations whose outcome nobody has found out; gives how many there were.

        This is what finishes the work of a process that died between the parts, and what an answer that was lost waits
        for if nobody asks again.
        """
        async with self._database.transaction() as tx:
            due = await store.lease_open(tx, quiet_seconds, SWEPT_AT_ONCE)
            payments = await store.payments(tx, [operation.payment_id for operation in due]) if due else {}
            await faults.point("payments.sweep.before_intent_commit")
        await faults.point("payments.sweep.after_intent_commit")
        steps = [Step(operation, payments[operation.payment_id]) for operation in due]
        try:
            await self._finish("sweep", steps)
        except ServiceError:
            raise  # the database or the provider is away: each alone would only wait as often
        except Exception:  # an edge: one operation that cannot be finished must not hold back the others for ever
            for step in steps:
                await self._finish_alone(step)
        return len(due)

    async def _finish(self, flow: str, steps: Sequence[Step]) -> None:
        await self._record(flow, steps, await self._ask(flow, steps))

    async def _finish_alone(self, step: Step) -> None:
        try:
            await self._finish("sweep", [step])
        except ServiceError:
            raise
        except Exception:  # an edge, as above
            log.exception("operation_not_finished", key=step.operation.key)

    # ------------------------------------------------------------------------------------------------------ repair

    async def record_outcomes(self, outcomes: Mapping[int, Outcome]) -> int:
        """Writes down what the provider's statement says of operations that are open; gives how many it settled."""
        async with self._database.transaction() as tx:
            operations = await store.operations(tx, list(outcomes))
            settled = await _settle(tx, {o.id: o for o in operations}, outcomes)
            await faults.point("payments.reconcile.before_record_commit")
        await faults.point("payments.reconcile.after_record_commit")
        return len(settled)

    async def give_back(self, charges: Mapping[int, int]) -> int:
        """Voids authorizations that the provider holds for payments that are closed; gives how many it voided.

        `charges` by payment. The key is that of every void of the payment, so that two who find it void it once.
        """
        async with self._database.transaction() as tx:
            payments = await store.lock_payments(tx, sorted(charges))
            closed = {i: _with_charge(p, charges[i]) for i, p in payments.items() if p.status in rules.CLOSED}
            known = await _operations(tx, closed.values())
            voidless = [p for p in closed.values() if ("void", "") not in known[p.id]]
            await store.write_payments(tx, [p for p in voidless if p is not payments[p.id]])
            voids = [_new(p, Ask("void", "", p.amount_minor)) for p in voidless]
            steps = [Step(o, closed[o.payment_id]) for o in await store.begin_operations(tx, voids)]
            await faults.point("payments.give_back.before_intent_commit")
        await faults.point("payments.give_back.after_intent_commit")
        outcomes = await self._ask("give_back", steps)
        await self._record("give_back", steps, outcomes)
        return sum(isinstance(outcome, Succeeded) for outcome in outcomes.values())


# ------------------------------------------------------------------------------------------------- details of part 1


async def _find(tx: Tx, wishes: Sequence[Wish]) -> tuple[dict[Pair, PaymentRow], set[int]]:
    """The payments of the wishes, locked; and the ids of those that were opened for it."""
    found: dict[Pair, PaymentRow] = {}
    openings = {wish.pair: wish.opening for wish in wishes if wish.opening}
    if openings:
        opened = await store.open_payments(tx, list(openings.values()))
        found |= {(row.order_id, row.attempt): row for row in opened}
        await events.emit(tx, [_event(row) for row in opened if row.status in rules.EVENTS])
    for wish in wishes:
        wish.opening = None  # it is there from now on, or its order has another
    fresh = {row.id for row in found.values()}
    missing = {wish.pair for wish in wishes} - found.keys()
    if missing:
        found |= {(row.order_id, row.attempt): row for row in await store.lock_attempts(tx, sorted(missing))}
    return found, fresh


Known = dict[int, dict[tuple[str, str], OperationRow | NewOperation]]
"""Operations by payment, and by kind and reference."""


async def _operations(tx: Tx, payments: Iterable[PaymentRow], opened: Collection[int] = ()) -> Known:
    """All operations of the payments. Those that this transaction has opened have none yet."""
    known: Known = {payment.id: {} for payment in payments}
    if old := [payment_id for payment_id in known if payment_id not in opened]:
        for operation in await store.operations_of(tx, old):
            known[operation.payment_id][operation.kind, operation.reference] = operation
    return known


def _new(payment: PaymentRow, ask: Ask) -> NewOperation:
    return NewOperation(
        payment_id=payment.id,
        kind=ask.kind,
        reference=ask.reference,
        key=rules.key_of(payment.id, ask.kind, ask.reference),
        amount_minor=ask.amount_minor,
        currency=payment.currency,
    )


async def _begin(tx: Tx, new: Sequence[NewOperation], known: Known, keys: set[str]) -> dict[str, OperationRow]:
    """The operations with these keys, by key: those in `new` are written, the others are asked for once more."""
    begun = {row.key: row for row in await store.begin_operations(tx, new)} if new else {}
    again = {
        operation.key: operation
        for operations in known.values()
        for operation in operations.values()
        if isinstance(operation, OperationRow) and operation.key in keys
    }
    if again:
        await store.count_calls(tx, [operation.id for operation in again.values()])
    return begun | again


# ------------------------------------------------------------------------------------------------- details of part 3


async def _settle(
    tx: Tx, operations: Mapping[int, OperationRow], outcomes: Mapping[int, Outcome]
) -> dict[int, PaymentRow]:
    """The payments as they are after it, by operation that this settled."""
    payments = await store.lock_payments(tx, sorted({o.payment_id for o in operations.values()}))
    noted = await store.settle_operations(tx, {i: outcomes[i] for i in operations})
    settled = [operations[i] for i in sorted(noted) if not isinstance(outcomes[i], Unknown)]
    after, changes, entries = dict(payments), list[Outgoing](), list[store.Entry]()
    for operation in settled:
        before = after[operation.payment_id]
        payment = after[operation.payment_id] = rules.settle(before, operation, outcomes[operation.id])
        if payment.version != before.version:
            changes.append(_event(payment))
        if isinstance(outcomes[operation.id], Succeeded):
            entries += _entries(operation)
    changed = [payment for payment in after.values() if payment is not payments[payment.id]]
    if changed:
        times = await store.write_payments(tx, changed)
        after |= {p.id: msgspec.structs.replace(p, updated_at=times[p.id]) for p in changed}
    await events.emit(tx, changes)
    await store.book(tx, entries)
    return {operation.id: after[operation.payment_id] for operation in settled}


def _entries(operation: OperationRow) -> list[store.Entry]:
    return [
        store.Entry(operation.id, account, side, amount_minor, operation.currency)
        for account, side, amount_minor in rules.entries(operation.kind, operation.amount_minor)
    ]


def _follow(wish: Wish, outcomes: Mapping[int, Outcome], settled: Mapping[int, PaymentRow]) -> None:
    """Settles a wish whose step has led to its goal. One whose step somebody else has settled looks again."""
    assert wish.step
    operation = wish.step.operation
    outcome = outcomes[operation.id]
    if isinstance(outcome, Unknown):
        wish.outcome = wish.pending()
    elif operation.id in settled:
        code = outcome.code if isinstance(outcome, rules.Declined) else None
        done = msgspec.structs.replace(operation, status=store.status_of(outcome), code=code)
        others = [o for o in wish.step.others if (o.kind, o.reference) != (done.kind, done.reference)]
        wish.judge(settled[operation.id], [*others, done])


def _with_charge(payment: PaymentRow, charge_id: int) -> PaymentRow:
    return payment if payment.charge_id == charge_id else msgspec.structs.replace(payment, charge_id=charge_id)


# ------------------------------------------------------------------------------------------------------------ words


def provider_of(method: str) -> str:
    return method.partition(":")[0]


def payment_of(row: PaymentRow) -> Payment:
    return Payment(
        id=row.id,
        order_id=row.order_id,
        attempt=row.attempt,
        user_id=row.user_id,
        method=row.method,
        currency=row.currency,
        amount_minor=row.amount_minor,
        authorized_minor=row.authorized_minor,
        captured_minor=row.captured_minor,
        refunded_minor=row.refunded_minor,
        status=row.status,
        code=row.code,
        created_at=row.created_at,
        updated_at=row.updated_at,
        version=row.version,
    )


def _event(row: PaymentRow) -> Outgoing:
    changed = PaymentChanged(
        payment_id=row.id,
        order_id=row.order_id,
        status=row.status,
        code=row.code,
        currency=row.currency,
        amount_minor=row.amount_minor,
        captured_minor=row.captured_minor,
        refunded_minor=row.refunded_minor,
        version=row.version,
    )
    return Outgoing(rules.EVENTS[row.status], "payment", row.id, row.version, changed)
