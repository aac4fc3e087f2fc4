"""Payments are brought to a target state in three parts, a batch at a time.

1. record intent     One transaction. Lock the payments, decide the next operation of each (`rules.next_operation`), and
                     write its intent with the key for the provider. An operation that was begun before is continued.
2. call provider     Outside of any transaction. A process that dies here leaves the intents behind.
3. record result     One transaction. Each intent that is still there becomes an operation with its result; what
                     follows from it is written with it: the payment, the transfer, the event.

The parts repeat for a payment whose target takes another operation: a void first settles an authorize or a charge.

Nearly all requests charge a payment that does not exist yet, and need no decision: parts 1 and 3 are one statement each
for the whole batch (`_charge_new_payments`). These statements do not change payments that do not fit (the attempt
exists, the card is declined, another process was faster); those take the general way.

Guaranteed
    - The provider is called with an operation only after its key is committed, and always with the same key.
    - An operation is settled once, by the first transaction that records its result; others read the payment as it is.
    - An unknown result is never treated as a known one: the answer is `OutcomePending`, and the sweep calls again with
      the same key until the result is known.

For 23 hours a key is repeated without a question. Providers forget keys after a day, and would take an old one for a
new operation: from then on it is looked up first, and sent again only if the provider says that it does not know it.
"""

from __future__ import annotations

import asyncio
import datetime
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final

import msgspec

from mercato.chassis.contract import Batch, FieldError, InvalidRequest, ServiceError
from mercato.chassis.messaging.events import Outgoing
from mercato.chassis.observability import faults
from mercato.chassis.postgres.database import Database, Tx
from mercato.contracts.payments import (
    AnotherOrder,
    AnotherPaymentLive,
    AttemptNotFound,
    AttemptReused,
    AuthorizePayment,
    CapturePart,
    CapturePayment,
    ChargePayment,
    OperationKind,
    OutcomePending,
    Payment,
    PaymentChanged,
    RefundPayment,
    Status,
    VoidPayment,
)

from . import operation_store, payment_store, rules, store
from .operation_store import NewIntent, OperationRow
from .provider import Provider, ProviderRequest, provider_of
from .rules import Declined, NextOperation, ProviderResult, Succeeded, Target, Unknown
from .store import Attempt, IntentRow, NewPayment, OpenedRow, OperationId, PaymentRow

AUTHORIZE, CHARGE, CAPTURE, VOID = Target("authorize"), Target("charge"), Target("capture"), Target("void")

KINDS: Final[tuple[OperationKind, ...]] = ("authorize", "charge", "capture", "void", "refund")
VOIDED_WITH: Final = ("user_id", "currency")
OPENED_WITH: Final = (*VOIDED_WITH, "amount_minor", "method")
ROUNDS: Final = 4
"""The longest sequence is three operations: settle an authorize, settle a capture, void."""

PLACES: Final = (
    "before_intent_commit",
    "after_intent_commit",
    "before_call",
    "after_call",
    "before_record_commit",
    "after_record_commit",
)
FLOWS: Final = (*KINDS, "sweep", "void_authorization")
"""What executes the three parts: the requests, the sweep after a crash, a repair of the reconciliation."""

faults.declare(*(f"payments.{flow}.{place}" for flow in FLOWS for place in PLACES))

Answer = Payment | ServiceError
OpeningRequest = AuthorizePayment | ChargePayment
Request = OpeningRequest | CapturePayment | CapturePart | VoidPayment | RefundPayment
Results = Mapping[OperationId, ProviderResult]
Settled = Mapping[OperationId, PaymentRow]
"""The payments as they are now, by the operation that this process has settled."""


class PaymentRequest:
    """A request to bring a payment to a target state. `answer` is None until the payment is there, or cannot be."""

    __slots__ = ("answer", "asked", "attempt", "nonce", "opening", "target")

    def __init__(self, request: Request, target: Target, opening: NewPayment | None = None) -> None:
        self.attempt: Attempt = (request.order_id, request.attempt)
        self.nonce = request.order_nonce
        self.target = target
        self.opening = self.asked = opening
        """The payment to write where there is none; None where that is an error."""
        self.answer: Answer | None = None

    def differing(self, payment: PaymentRow) -> str:
        """The field in which the payment of its attempt is another; empty where it is the same."""
        if self.asked is None:
            return ""
        # A void names the amount and the method only for its tombstone: it voids whatever was authorized.
        compared = VOIDED_WITH if self.target.kind == "void" else OPENED_WITH
        return next((name for name in compared if getattr(self.asked, name) != getattr(payment, name)), "")

    def pending(self, settles_at: datetime.datetime | None = None) -> OutcomePending:
        return OutcomePending(operation=self.target.kind, order_id=self.attempt[0], settles_at=settles_at)

    def decide(self, payment: PaymentRow, operations: Iterable[rules.OperationState]) -> NextOperation | None:
        """The next operation; None where there is none, and `answer` is set."""
        following = rules.next_operation(self.target, payment, operations)
        if isinstance(following, NextOperation):
            return following
        self.answer = payment_of(payment) if following is None else following
        return None

    def follow(self, call: ProviderCall, results: Results, settled: Settled) -> None:
        """Sets the answer if the call has led to the target. What another process settled, the next round reads."""
        intent = call.intent
        result = results[intent.id]
        if isinstance(result, Unknown):
            self.answer = self.pending(result.settles_at)
        elif payment := settled.get(intent.id):
            code = result.code if isinstance(result, Declined) else None
            done = OperationRow(*intent.id, intent.amount_minor, rules.status_of(result), code)
            others = [o for o in call.others if (o.kind, o.reference) != (done.kind, done.reference)]
            self.decide(payment, [*others, done])


class ProviderCall(msgspec.Struct, frozen=True, eq=False, gc=False):
    """An intent with which the provider is about to be called, its payment, and the other operations of that."""

    intent: IntentRow
    payment: PaymentRow
    others: tuple[rules.OperationState, ...] = ()

    def request(self) -> ProviderRequest:
        return ProviderRequest(
            key=self.intent.key,
            order_id=self.payment.order_id,
            charge_id=None if self.intent.kind in rules.OPENING else self.payment.charge_id,
            amount_minor=self.intent.amount_minor,
            currency=self.intent.currency,
            method=self.payment.method,
        )


BegunRequest = tuple[PaymentRequest, ProviderCall]
"""A request whose intent is committed, and the call of the provider with it."""


def _new_payment(request: OpeningRequest | VoidPayment, status: Status) -> NewPayment:
    """The payment to write where there is none. A `voided` one is a tombstone."""
    return NewPayment(
        order_id=request.order_id,
        nonce=request.order_nonce,
        attempt=request.attempt,
        user_id=request.user_id,
        method=request.method,
        currency=request.currency,
        amount_minor=request.amount_minor,
        status=status,
    )


class Charging:
    """`providers` by the name that methods have before their colon."""

    def __init__(self, database: Database, providers: Mapping[str, Provider]) -> None:
        self._database = database
        self._providers = providers

    def check_method(self, method: str) -> InvalidRequest | None:
        """The refusal of a method: no provider has it, or its provider has no such token."""
        provider = self._providers.get(provider_of(method))
        wrong = provider.check_method(method) if provider else "no payment provider is behind this method"
        return InvalidRequest(errors=(FieldError(field="payment_method", message=wrong),)) if wrong else None

    # ----------------------------------------------------------------------- operations, as in `contracts/payments.py`

    async def authorize(self, batch: Batch[AuthorizePayment]) -> Sequence[Answer]:
        return await self._execute("authorize", [self._opening(request, AUTHORIZE) for request in batch])

    async def charge(self, batch: Batch[ChargePayment]) -> Sequence[Answer]:
        requests = [self._opening(request, CHARGE) for request in batch]
        if fitting := _new_payments(requests):
            await self._charge_new_payments(fitting)
        return await self._execute("charge", requests)

    async def capture(self, batch: Batch[CapturePayment]) -> Sequence[Answer]:
        return await self._execute("capture", [PaymentRequest(r, CAPTURE) for r in batch])

    async def capture_part(self, batch: Batch[CapturePart]) -> Sequence[Answer]:
        requests = [PaymentRequest(r, Target("capture", amount_minor=r.amount_minor)) for r in batch]
        return await self._execute("capture", requests)

    async def void(self, batch: Batch[VoidPayment]) -> Sequence[Answer]:
        requests = [PaymentRequest(r, VOID, _new_payment(r, "voided")) for r in batch]
        return await self._execute("void", requests)

    async def refund(self, batch: Batch[RefundPayment]) -> Sequence[Answer]:
        requests = [PaymentRequest(r, Target("refund", r.reference, r.amount_minor)) for r in batch]
        return await self._execute("refund", requests)

    def _opening(self, request: OpeningRequest, target: Target) -> PaymentRequest:
        opening = PaymentRequest(request, target, _new_payment(request, "pending"))
        opening.answer = self.check_method(request.method)
        return opening

    async def _execute(self, flow: OperationKind, requests: Sequence[PaymentRequest]) -> list[Answer]:
        """Brings each payment to the target of its request. One answer for each request, in order."""
        for _ in range(ROUNDS):
            unanswered = [request for request in requests if request.answer is None]
            if not unanswered:
                break
            begun = await self._record_intents(flow, unanswered)
            calls = [call for _, call in begun]
            results = await self.call_provider(flow, calls)
            settled = await self.record_results(flow, calls, results)
            for request, call in begun:
                request.follow(call, results, settled)
        return [request.answer or request.pending() for request in requests]

    # -------------------------------------------------------------------------------------------- charges that are new

    async def _charge_new_payments(self, requests: Sequence[PaymentRequest]) -> None:
        """Writes and charges new payments, and answers their requests; the other requests stay as they are."""
        openings = [request.opening for request in requests if request.opening]
        keys = [rules.key_of(p.order_id, p.nonce, p.attempt, "charge") for p in openings]
        async with self._database.transaction() as tx:
            opened = {row.order_id: row for row in await store.begin_charges(tx, openings, keys)}
            await faults.point("payments.charge.before_intent_commit")
        await faults.point("payments.charge.after_intent_commit")
        begun = [
            (request, _first_call(opened[opening.order_id], opening, key))
            for request, opening, key in zip(requests, openings, keys, strict=True)
            if opening.order_id in opened
        ]
        calls = [call for _, call in begun]
        results = await self.call_provider("charge", calls)
        captured = await self._record_charges(calls, results)
        others = [call for call in calls if not isinstance(results[call.intent.id], Succeeded)]
        settled = await self.record_results("charge", others, results)
        for request, call in begun:
            if payment := captured.get(call.payment.id):
                request.answer = payment_of(payment)
            else:
                request.follow(call, results, settled)

    async def _record_charges(self, calls: Sequence[ProviderCall], results: Results) -> dict[int, PaymentRow]:
        """Records the charges that succeeded; gives the payments that this has captured, by id."""
        succeeded: dict[int, Succeeded] = {}
        for call in calls:
            if isinstance(result := results[call.intent.id], Succeeded):
                succeeded[call.payment.id] = result
        if not succeeded:
            return {}
        async with self._database.transaction() as tx:
            times = await store.record_charges(tx, succeeded)
            captured = {
                call.payment.id: _at(
                    rules.after_result(call.payment, call.intent, succeeded[call.payment.id]), updated_at
                )
                for call in calls
                if (updated_at := times.get(call.payment.id))
            }
            tx.emit([_event(payment) for payment in captured.values()])
            await faults.point("payments.charge.before_record_commit")
        await faults.point("payments.charge.after_record_commit")
        return captured

    # ------------------------------------------------------------------------------------------------ 1. record intent

    async def _record_intents(self, flow: str, requests: Sequence[PaymentRequest]) -> list[BegunRequest]:
        """Answers requests, or commits their intents; gives those with an intent, each with its call."""
        async with self._database.transaction() as tx:
            batch = await _find(tx, requests)
            for request in requests:
                payment = batch.payments.get(request.attempt)
                if payment is None:
                    request.answer = batch.missing(request)
                elif payment.nonce != request.nonce:
                    request.answer = AnotherOrder(order_id=payment.order_id)
                elif field := request.differing(payment):
                    request.answer = AttemptReused(order_id=payment.order_id, attempt=payment.attempt, field=field)
                else:
                    batch.decide(request, payment)
            begun = await batch.write(tx, requests)
            if refused := [r.answer for r in requests if isinstance(r.answer, AnotherOrder)]:
                newest_order_id = await payment_store.newest_order_id(tx)
                for refusal in refused:
                    refusal.newest_order_id = newest_order_id
            await faults.point(f"payments.{flow}.before_intent_commit")
        await faults.point(f"payments.{flow}.after_intent_commit")
        return begun

    # ------------------------------------------------------------------------------------------------ 2. call provider

    async def call_provider(self, flow: str, calls: Sequence[ProviderCall]) -> dict[OperationId, ProviderResult]:
        """Results by operation, one for each call."""
        if not calls:
            return {}
        await faults.point(f"payments.{flow}.before_call")
        results: dict[OperationId, ProviderResult] = {}
        if old := [call for call in calls if call.intent.is_old]:
            results |= await self._look_up(old)
        groups: dict[tuple[str, OperationKind], dict[OperationId, ProviderCall]] = defaultdict(dict)
        for call in calls:
            if call.intent.id not in results:
                groups[provider_of(call.payment.method), call.intent.kind][call.intent.id] = call
        for answered in await asyncio.gather(*(self._call_one(*group, some) for group, some in groups.items())):
            results |= answered
        await faults.point(f"payments.{flow}.after_call")
        return results

    async def _call_one(
        self, provider: str, kind: OperationKind, calls: Mapping[OperationId, ProviderCall]
    ) -> dict[OperationId, ProviderResult]:
        verbs = self._providers[provider]
        call = {
            "authorize": verbs.authorize,
            "charge": verbs.charge,
            "capture": verbs.capture,
            "void": verbs.void,
            "refund": verbs.refund,
        }[kind]
        return dict(zip(calls, await call([call.request() for call in calls.values()]), strict=True))

    async def _look_up(self, calls: Sequence[ProviderCall]) -> dict[OperationId, ProviderResult]:
        """The results of old keys that the provider knows. The other keys may be sent again."""
        results: dict[OperationId, ProviderResult] = {}
        by_provider: dict[str, list[ProviderCall]] = defaultdict(list)
        for call in calls:
            by_provider[provider_of(call.payment.method)].append(call)
        for provider, some in by_provider.items():
            found = await self._providers[provider].look_up([call.intent.key for call in some])
            for call, line in zip(some, found, strict=True):
                if line is not None:
                    results[call.intent.id] = line if isinstance(line, Unknown) else line.result
        return results

    # ------------------------------------------------------------------------------------------------ 3. record result

    async def record_results(self, flow: str, calls: Sequence[ProviderCall], results: Results) -> Settled:
        """Records results, and the changes of payments that follow from them."""
        if not calls:
            return {}
        async with self._database.transaction() as tx:
            settled = await settle(tx, {call.intent.id: results[call.intent.id] for call in calls})
            await faults.point(f"payments.{flow}.before_record_commit")
        await faults.point(f"payments.{flow}.after_record_commit")
        return settled


# --------------------------------------------------------------------------------------------- details of new charges


def _new_payments(requests: Sequence[PaymentRequest]) -> list[PaymentRequest]:
    """The requests that may charge a new payment: of orders that are in the batch once, and of an amount above 0."""
    times = Counter(request.attempt[0] for request in requests)
    return [r for r in requests if not r.answer and r.opening and r.opening.amount_minor and times[r.attempt[0]] == 1]


def _first_call(row: OpenedRow, opening: NewPayment, key: str) -> ProviderCall:
    payment = PaymentRow(
        id=row.id,
        order_id=opening.order_id,
        nonce=opening.nonce,
        attempt=opening.attempt,
        user_id=opening.user_id,
        method=opening.method,
        currency=opening.currency,
        amount_minor=opening.amount_minor,
        authorized_minor=0,
        captured_minor=0,
        refunded_minor=0,
        status="pending",
        code=None,
        charge_id=None,
        version=1,
        created_at=row.created_at,
        updated_at=row.created_at,
    )
    return ProviderCall(IntentRow(row.id, "charge", "", key, opening.amount_minor, opening.currency, False), payment)


# -------------------------------------------------------------------------------------------------- details of part 1

Operations = dict[tuple[str, str], OperationRow | NewIntent]
"""All operations of a payment, by kind and reference."""


class _Batch:
    """The payments of a batch, locked, with their operations; and the changes to write."""

    def __init__(
        self, payments: dict[Attempt, PaymentRow], known: dict[int, Operations], used_by_others: Collection[int]
    ) -> None:
        self.payments = payments
        self._known = known
        self._used_by_others = used_by_others
        self._moved: dict[int, PaymentRow] = {}
        self._events: list[Outgoing] = []
        self._new: dict[OperationId, NewIntent] = {}
        self._calling: list[tuple[PaymentRequest, PaymentRow, OperationId]] = []

    def missing(self, request: PaymentRequest) -> ServiceError:
        order_id, attempt = request.attempt
        if order_id in self._used_by_others:
            return AnotherOrder(order_id=order_id)
        if request.target.kind in rules.OPENING:
            return AnotherPaymentLive(order_id=order_id)
        return AttemptNotFound(order_id=order_id, attempt=attempt)

    def decide(self, request: PaymentRequest, payment: PaymentRow) -> None:
        """Sets the answer of the request, or collects its call. The next request for the payment sees the changes."""
        known = self._known[payment.id]
        following = request.decide(payment, known.values())
        while following and payment.amount_minor == 0:
            payment = self._move(rules.after_result(payment, following, rules.NOT_ASKED))
            following = request.decide(payment, known.values())
        if following is None:
            return
        id_ = (payment.id, following.kind, following.reference)
        if id_[1:] not in known:
            known[id_[1:]] = self._new[id_] = new_intent(payment, following)
        self._calling.append((request, payment, id_))

    def _move(self, payment: PaymentRow) -> PaymentRow:
        self.payments[payment.order_id, payment.attempt] = self._moved[payment.id] = payment
        self._events.append(_event(payment))
        return payment

    async def write(self, tx: Tx, requests: Sequence[PaymentRequest]) -> list[BegunRequest]:
        """Writes payments of 0 and intents; gives the requests with a call. Sets the change times in the answers."""
        written = await write_payments(tx, list(self._moved.values()))
        for request in requests:
            if isinstance(request.answer, Payment) and (payment := written.get(request.answer.id)):
                request.answer = payment_of(payment)
        intents: dict[OperationId, IntentRow] = {}
        if self._new:
            intents |= {row.id: row for row in await operation_store.begin_operations(tx, list(self._new.values()))}
        if begun := {id_ for _, _, id_ in self._calling} - self._new.keys():
            intents |= {row.id: row for row in await operation_store.count_calls(tx, sorted(begun))}
        tx.emit(self._events)
        return [
            (request, ProviderCall(intents[id_], payment, tuple(self._known[payment.id].values())))
            for request, payment, id_ in self._calling
        ]


async def _find(tx: Tx, requests: Sequence[PaymentRequest]) -> _Batch:
    """Writes the payments of requests that open one, and locks the others."""
    openings: dict[Attempt, NewPayment] = {}
    for request in requests:
        if request.opening:
            openings.setdefault(request.attempt, request.opening)
            request.opening = None  # from now on the payment exists, or its order has another one
    opened = await payment_store.open_payments(tx, list(openings.values())) if openings else []
    tx.emit([_event(row) for row in opened if row.status in rules.EVENTS])
    payments = {(row.order_id, row.attempt): row for row in opened}
    if missing := {request.attempt for request in requests} - payments.keys():
        payments |= {(row.order_id, row.attempt): row for row in await payment_store.lock_attempts(tx, sorted(missing))}
    absent = [(r.attempt[0], r.nonce) for r in requests if r.attempt not in payments]
    used_by_others = await payment_store.used_by_others(tx, absent) if absent else set[int]()
    new = {row.id for row in opened}
    known = await operations(tx, [row.id for row in payments.values() if row.id not in new])
    known |= {id_: {} for id_ in new}
    return _Batch(payments, known, used_by_others)


async def operations(tx: Tx, payment_ids: Collection[int]) -> dict[int, Operations]:
    known: dict[int, Operations] = {payment_id: {} for payment_id in payment_ids}
    if known:
        for operation in await operation_store.operations_of(tx, list(known)):
            known[operation.payment_id][operation.kind, operation.reference] = operation
    return known


def new_intent(payment: PaymentRow, following: NextOperation) -> NewIntent:
    return NewIntent(
        payment_id=payment.id,
        kind=following.kind,
        reference=following.reference,
        key=rules.key_of(payment.order_id, payment.nonce, payment.attempt, following.kind, following.reference),
        amount_minor=following.amount_minor,
        currency=payment.currency,
    )


# -------------------------------------------------------------------------------------------------- details of part 3


async def settle(tx: Tx, results: Results) -> dict[OperationId, PaymentRow]:
    """Records results of intents; gives the changed payments, by operation that this transaction settled."""
    payments = await payment_store.lock_payments(tx, sorted({payment_id for payment_id, _, _ in results}))
    if unknown := [id_ for id_, result in results.items() if isinstance(result, Unknown)]:
        await operation_store.mark_unknown(tx, unknown)
    known = {id_: result for id_, result in results.items() if not isinstance(result, Unknown)}
    settled = await operation_store.settle_operations(tx, known) if known else []
    after, changes = dict(payments), list[Outgoing]()
    for operation in settled:
        before = after[operation.payment_id]
        payment = after[operation.payment_id] = rules.after_result(before, operation, known[operation.id])
        if payment.version != before.version:
            changes.append(_event(payment))
    after |= await write_payments(tx, [p for p in after.values() if p is not payments[p.id]])
    tx.emit(changes)
    await operation_store.transfer(tx, [o for o in settled if isinstance(known[o.id], Succeeded)])
    return {operation.id: after[operation.payment_id] for operation in settled}


async def write_payments(tx: Tx, changed: Sequence[PaymentRow]) -> dict[int, PaymentRow]:
    if not changed:
        return {}
    times = await payment_store.write_payments(tx, changed)
    return {payment.id: _at(payment, times[payment.id]) for payment in changed}


# ----------------------------------------------------------------------------------------------------------- payments


def _at(payment: PaymentRow, updated_at: datetime.datetime) -> PaymentRow:
    return msgspec.structs.replace(payment, updated_at=updated_at)


def payment_of(row: PaymentRow) -> Payment:
    return msgspec.convert(row, Payment, from_attributes=True)


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
