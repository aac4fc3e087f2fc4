"""The operations of the sandbox, in contract order, and the loop that finishes what is `processing`.

A batch is one transaction. Authorize and charge open charges, which depends only on the request: one statement writes
the operations and their charges, and a second one counts the calls of keys that were used before. Capture, void and
refund

1. lock the charges that the requests name, in the order of their ids,
2. read the operations of keys that were used before, and count one more call of each,
3. decide new keys one after the other, each on the charge as the previous one has left it, and write them.

Simulated failures (a lost answer, a failure of the bank) are decided outside of the transaction: before it, when
nothing is done, or after the commit, when only the answer changes.
"""

from __future__ import annotations

import datetime
import enum
import itertools
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Annotated, Final, TypeVar

import msgspec
from msgspec import Meta

from mercato.chassis.contract import Batch, Message, ServiceError
from mercato.chassis.observability import faults
from mercato.chassis.observability.clock import Randomness
from mercato.chassis.postgres.database import Database, Tx
from mercato.simulators.bank.contract import (
    AnswerLost,
    AuthorizeCharge,
    BankFailed,
    CaptureCharge,
    ChargeCard,
    ChargeUnknown,
    ListOperations,
    LookUpOperation,
    OperationKind,
    OperationUnknown,
    RefundCharge,
    SandboxKeyReused,
    SandboxOperation,
    Statement,
    VoidCharge,
)

from . import rules, store
from .rules import ChargeRequest, OpeningRequest, RequestedOperation
from .store import ChargeRow, NewOperation, OperationRow

KINDS: Final[tuple[OperationKind, ...]] = ("authorize", "charge", "capture", "void", "refund")
TRIES: Final = 3
FINISHED_AT_ONCE: Final = 256
FINISH_EVERY_SECONDS: Final = 0.5

for _flow in (*KINDS, "finish"):
    faults.declare(f"sandbox.{_flow}.before_commit", f"sandbox.{_flow}.after_commit")

Q = TypeVar("Q", bound=Message)
Answer = SandboxOperation | ServiceError


class Options(msgspec.Struct, frozen=True):
    """The settings of the bank."""

    failure_rate: Annotated[float, Meta(ge=0, le=1)] = 0.0
    """The share of calls of any method that fail: before the operation, after it, or with a lost answer; a third each.
    """
    statement_delay_seconds: Annotated[float, Meta(ge=0, le=30 * 86_400)] = 60.0
    """The delay until an operation is on the bank's statement."""


class Failure(enum.Enum):
    """A random failure of a call."""

    FAILS_BEFORE = enum.auto()
    FAILS_AFTER = enum.auto()
    ANSWER_LOST = enum.auto()


class KeyTaken(Exception):
    """Another transaction wrote one of the keys after this one had read them. Rolls back; the next attempt finds it."""


class SandboxService:
    """See `contract.py` for what each operation promises."""

    def __init__(self, database: Database, options: Options, randomness: Randomness) -> None:
        self._database = database
        self._options = options
        self._randomness = randomness

    async def authorize(self, batch: Batch[AuthorizeCharge]) -> Sequence[Answer]:
        return await self._answer(batch, lambda requests: self._open("authorize", requests))

    async def charge(self, batch: Batch[ChargeCard]) -> Sequence[Answer]:
        return await self._answer(batch, lambda requests: self._open("charge", requests))

    async def capture(self, batch: Batch[CaptureCharge]) -> Sequence[Answer]:
        return await self._answer(batch, lambda requests: self._change("capture", requests))

    async def void(self, batch: Batch[VoidCharge]) -> Sequence[Answer]:
        return await self._answer(batch, lambda requests: self._change("void", requests))

    async def refund(self, batch: Batch[RefundCharge]) -> Sequence[Answer]:
        return await self._answer(batch, lambda requests: self._change("refund", requests))

    async def look_up(self, batch: Batch[LookUpOperation]) -> Sequence[Answer]:
        async with self._database.read() as tx:
            found = await store.by_keys(tx, [request.key for request in batch])
        return [_answer_of(found[r.key]) if r.key in found else OperationUnknown(key=r.key) for r in batch]

    async def statement(self, request: ListOperations) -> Statement:
        async with self._database.read() as tx:
            rows = await store.listed(tx, request.after, request.limit, self._options.statement_delay_seconds)
        final = tuple(_listed(row) for row in itertools.takewhile(lambda row: row.is_final, rows))
        return Statement(operations=final, next_after=final[-1].id if final else request.after)

    # ---------------------------------------------------------------------------------------------------- failures

    async def _answer(
        self, requests: Sequence[Q], run: Callable[[Sequence[Q]], Awaitable[Sequence[Answer]]]
    ) -> Sequence[Answer]:
        """Runs the requests that do not fail before; replaces answers of those that fail after by errors."""
        if not self._options.failure_rate:
            return await run(requests)
        failures = [self._failure() for _ in requests]
        received = [r for r, failure in zip(requests, failures, strict=True) if failure is not Failure.FAILS_BEFORE]
        done = iter(await run(received) if received else [])
        answers: list[Answer] = []
        for failure in failures:
            answer = BankFailed() if failure is Failure.FAILS_BEFORE else next(done)
            if failure is Failure.FAILS_AFTER:
                answer = BankFailed()
            elif failure is Failure.ANSWER_LOST:
                answer = AnswerLost()
            answers.append(answer)
        return answers

    def _failure(self) -> Failure | None:
        rate = self._options.failure_rate
        drawn = int.from_bytes(self._randomness.token(8), "big") / 2**64
        return list(Failure)[int(drawn / rate * len(Failure))] if drawn < rate else None

    # ---------------------------------------------------------------------------------------------------- one batch

    async def _open(self, kind: OperationKind, requests: Sequence[OpeningRequest]) -> Sequence[Answer]:
        requested = [rules.opening(kind, request) for request in requests]
        async with self._database.transaction() as tx:
            accepted = await _without_first_calls(tx, requested)
            calls = Counter(r.key for r in accepted if isinstance(r, RequestedOperation))
            known = await store.open_charges(tx, _opening_operations(accepted, calls)) if calls else {}
            if repeated := {key: n for key, n in calls.items() if key not in known}:
                known |= await store.count_calls(tx, repeated)
            await faults.point(f"sandbox.{kind}.before_commit")
        await faults.point(f"sandbox.{kind}.after_commit")
        return _answers(accepted, calls, known)

    async def _change(self, kind: OperationKind, requests: Sequence[ChargeRequest]) -> Sequence[Answer]:
        for _ in range(TRIES):
            try:
                return await self._try_to_change(kind, requests)
            except KeyTaken:
                continue
        return [BankFailed() for _ in requests]

    async def _try_to_change(self, kind: OperationKind, requests: Sequence[ChargeRequest]) -> Sequence[Answer]:
        async with self._database.transaction() as tx:
            charges = await store.lock_charges(tx, sorted({request.charge_id for request in requests}))
            accepted = await _without_first_calls(tx, [_on_charge(kind, request, charges) for request in requests])
            calls = Counter(r.key for r in accepted if isinstance(r, RequestedOperation))
            known = await store.count_calls(tx, calls) if calls else {}
            known |= await _write_changes(tx, _new_operations(accepted, calls, known), charges)
            await faults.point(f"sandbox.{kind}.before_commit")
        await faults.point(f"sandbox.{kind}.after_commit")
        return _answers(accepted, calls, known)

    # -------------------------------------------------------------------------------------------------- processing

    async def finish_due(self) -> int:
        """Finishes up to `FINISHED_AT_ONCE` operations of slow methods; gives how many there were."""
        async with self._database.read() as tx:
            due = await store.due(tx, FINISHED_AT_ONCE)
        if not due:
            return 0
        async with self._database.transaction() as tx:
            charges = await store.lock_charges(tx, sorted({o.charge_id for o in due if o.charge_id is not None}))
            locked = await store.lock_processing(tx, [o.id for o in due])
            changed, codes = _carry_out(locked, charges)
            await store.write_charges(tx, changed)
            await store.finish(tx, {o.id: code for o, code in zip(locked, codes, strict=True)})
            await faults.point("sandbox.finish.before_commit")
        await faults.point("sandbox.finish.after_commit")
        return len(due)


# ----------------------------------------------------------------------------------------------------------- details


def _on_charge(
    kind: OperationKind, request: ChargeRequest, charges: Mapping[int, ChargeRow]
) -> RequestedOperation | ServiceError:
    charge = charges.get(request.charge_id)
    return rules.on_charge(kind, request, charge) if charge else ChargeUnknown(charge_id=request.charge_id)


async def _without_first_calls(
    tx: Tx, requested: Sequence[RequestedOperation | ServiceError]
) -> list[RequestedOperation | ServiceError]:
    """The requests, with `BankFailed` in place of the first call of each operation whose method fails at first."""
    failing = {r.key for r in requested if isinstance(r, RequestedOperation) and r.method == rules.ERROR_THEN_OK}
    if not failing:
        return list(requested)
    first = await store.remember_first_calls(tx, sorted(failing))
    accepted: list[RequestedOperation | ServiceError] = []
    for each in requested:
        if isinstance(each, RequestedOperation) and each.key in first:
            first.remove(each.key)
            accepted.append(BankFailed())
        else:
            accepted.append(each)
    return accepted


def _new_operations(
    accepted: Sequence[RequestedOperation | ServiceError],
    calls: Mapping[str, int],
    known: Mapping[str, OperationRow],
) -> list[NewOperation]:
    """An undecided operation for each new key, in the order of the requests."""
    new: dict[str, NewOperation] = {}
    for each in accepted:
        if isinstance(each, RequestedOperation) and each.key not in known and each.key not in new:
            delay_ms = rules.delay_ms(each.method)
            status = "succeeded" if delay_ms is None else "processing"
            new[each.key] = NewOperation(each, calls[each.key], status, delay_ms=delay_ms)
    return list(new.values())


def _opening_operations(
    accepted: Sequence[RequestedOperation | ServiceError], calls: Mapping[str, int]
) -> list[NewOperation]:
    """An operation with its result for each key."""
    return [
        _with_code(new, rules.DECLINED[new.requested.kind].get(new.requested.method))
        for new in _new_operations(accepted, calls, {})
    ]


async def _write_changes(
    tx: Tx, new: Sequence[NewOperation], charges: Mapping[int, ChargeRow]
) -> dict[str, OperationRow]:
    """Decides and writes. Raises `KeyTaken`."""
    if not new:
        return {}
    settled = [operation.requested for operation in new if operation.status != "processing"]
    changed, codes = _carry_out(settled, charges)
    code_of = {requested.key: code for requested, code in zip(settled, codes, strict=True)}
    written = await store.insert_operations(tx, [_with_code(each, code_of.get(each.requested.key)) for each in new])
    if len(written) < len(new):
        raise KeyTaken
    await store.write_charges(tx, changed)
    return written


def _with_code(new: NewOperation, code: str | None) -> NewOperation:
    return msgspec.structs.replace(new, status="declined", code=code) if code else new


def _carry_out(
    operations: Sequence[RequestedOperation | OperationRow], charges: Mapping[int, ChargeRow]
) -> tuple[list[ChargeRow], list[str | None]]:
    """Carries operations out one after the other; gives the changed charges, and the code of each decline, or None."""
    changed: dict[int, ChargeRow] = {}
    codes: list[str | None] = []
    for operation in operations:
        if operation.charge_id is None:
            codes.append(rules.DECLINED[operation.kind].get(operation.method))
            continue
        before = changed.get(operation.charge_id, charges[operation.charge_id])
        after, code = rules.carry_out(before, operation.kind, operation.amount_minor)
        if after is not before:
            changed[after.id] = after
        codes.append(code)
    return list(changed.values()), codes


def _answers(
    accepted: Sequence[RequestedOperation | ServiceError], calls: Mapping[str, int], known: Mapping[str, OperationRow]
) -> list[Answer]:
    """The answer to each request; of several with one key, the first in the batch counts as the first call."""
    answered: Counter[str] = Counter()
    answers: list[Answer] = []
    for each in accepted:
        if isinstance(each, ServiceError):
            answers.append(each)
            continue
        operation = known[each.key]
        answered[each.key] += 1
        call = operation.calls - calls[each.key] + answered[each.key]
        if not _is_same(each, operation):
            answers.append(SandboxKeyReused(key=each.key))
        elif each.method == rules.LOST_ANSWER and call == 1:
            answers.append(AnswerLost())
        else:
            answers.append(_answer_of(operation))
    return answers


def _is_same(requested: RequestedOperation, known: OperationRow) -> bool:
    opens = requested.kind in rules.OPENING
    return (
        requested.kind == known.kind
        and (opens or requested.charge_id == known.charge_id)
        and (requested.order_id, requested.amount_minor) == (known.order_id, known.amount_minor)
        and (requested.currency, requested.method) == (known.currency, known.method)
    )


def _answer_of(row: OperationRow) -> SandboxOperation:
    return SandboxOperation(
        id=row.id,
        key=row.key,
        kind=row.kind,
        charge_id=row.charge_id,
        order_id=row.order_id,
        amount_minor=row.amount_minor,
        currency=row.currency,
        status=row.status,
        code=row.code,
        created_at=row.created_at,
        settles_at=_settles_at(row),
    )


def _settles_at(row: OperationRow) -> datetime.datetime | None:
    delay_ms = rules.delay_ms(row.method)
    if row.status != "processing" or delay_ms is None:
        return None
    return row.created_at + datetime.timedelta(milliseconds=delay_ms, seconds=FINISH_EVERY_SECONDS)


def _listed(row: store.ListedRow) -> SandboxOperation:
    return SandboxOperation(
        id=row.id,
        key=row.key,
        kind=row.kind,
        charge_id=row.charge_id,
        order_id=row.order_id,
        amount_minor=row.amount_minor,
        currency=row.currency,
        status=row.status,
        code=row.code,
        created_at=row.created_at,
    )
