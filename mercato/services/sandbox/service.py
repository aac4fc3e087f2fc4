"""The operations of the sandbox, in contract order, and the loop that finishes what is `processing`.

A batch is one transaction. In it

1. the charges that the requests name are locked, in the order of their ids,
2. keys that were used before give the operation that they stand for, with one more call counted,
3. new keys are decided one after the other, each on the charge as the one before has left it, and written.

What goes wrong on purpose (an answer that is lost, a failure of the bank) is decided outside of it: before, when
nothing is to be done, or after the commit, when only the answer changes.
"""

from __future__ import annotations

import asyncio
import enum
import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from mercato.chassis import faults
from mercato.chassis.clock import Randomness
from mercato.chassis.contract import Batch, ServiceError
from mercato.chassis.db import Database, Tx
from mercato.contracts.sandbox import (
    AnswerLost,
    AuthorizeCharge,
    BankFailed,
    CaptureCharge,
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
from .rules import Asked
from .store import ChargeRow, Done, OperationRow

KINDS: Final[tuple[OperationKind, ...]] = ("authorize", "capture", "void", "refund")
TRIES: Final = 3
FINISHED_AT_ONCE: Final = 256
FINISH_EVERY_SECONDS: Final = 0.2

for _flow in (*KINDS, "finish"):
    faults.declare(f"sandbox.{_flow}.before_commit", f"sandbox.{_flow}.after_commit")

Request = AuthorizeCharge | CaptureCharge | VoidCharge | RefundCharge
Outcome = SandboxOperation | ServiceError


class Options(msgspec.Struct, frozen=True):
    """What the operator of the bank can set."""

    failure_rate: Annotated[float, Meta(ge=0, le=1)] = 0.0
    """The share of calls that go wrong, whatever the method: they fail before anything, they fail after everything, or
    their answer is lost; a third each."""
    statement_delay_seconds: Annotated[float, Meta(ge=0)] = 60.0


class Trouble(enum.Enum):
    """What goes wrong with a call, by chance."""

    FAILS_BEFORE = enum.auto()
    FAILS_AFTER = enum.auto()
    ANSWER_LOST = enum.auto()


class KeyTaken(Exception):
    """Somebody else wrote one of the keys between our look and our insert. Rolls back; the next look finds it."""


class SandboxService:
    """See `contracts/sandbox.py` for what each operation promises."""

    def __init__(self, database: Database, options: Options, randomness: Randomness) -> None:
        self._database = database
        self._options = options
        self._randomness = randomness

    async def authorize(self, batch: Batch[AuthorizeCharge]) -> Sequence[Outcome]:
        return await self._answer("authorize", batch)

    async def capture(self, batch: Batch[CaptureCharge]) -> Sequence[Outcome]:
        return await self._answer("capture", batch)

    async def void(self, batch: Batch[VoidCharge]) -> Sequence[Outcome]:
        return await self._answer("void", batch)

    async def refund(self, batch: Batch[RefundCharge]) -> Sequence[Outcome]:
        return await self._answer("refund", batch)

    async def look_up(self, batch: Batch[LookUpOperation]) -> Sequence[Outcome]:
        async with self._database.read() as tx:
            found = await store.by_keys(tx, [request.key for request in batch])
        return [_spoken(found[r.key]) if r.key in found else OperationUnknown(key=r.key) for r in batch]

    async def statement(self, request: ListOperations) -> Statement:
        async with self._database.read() as tx:
            rows = await store.listed(tx, request.after, request.limit, self._options.statement_delay_seconds)
        final = tuple(_listed(row) for row in itertools.takewhile(lambda row: row.is_final, rows))
        return Statement(operations=final, next_after=final[-1].id if final else request.after)

    # ----------------------------------------------------------------------------------------------------- trouble

    async def _answer(self, kind: OperationKind, requests: Sequence[Request]) -> Sequence[Outcome]:
        troubles = [self._trouble() for _ in requests]
        heard = [r for r, trouble in zip(requests, troubles, strict=True) if trouble is not Trouble.FAILS_BEFORE]
        outcomes = iter(await self._carry_out(kind, heard) if heard else [])
        answers: list[Outcome] = []
        for trouble in troubles:
            outcome = BankFailed() if trouble is Trouble.FAILS_BEFORE else next(outcomes)
            if trouble is Trouble.FAILS_AFTER:
                outcome = BankFailed()
            elif trouble is Trouble.ANSWER_LOST:
                outcome = AnswerLost()
            answers.append(outcome)
        return answers

    def _trouble(self) -> Trouble | None:
        rate = self._options.failure_rate
        if not rate:
            return None
        drawn = int.from_bytes(self._randomness.token(8), "big") / 2**64
        return list(Trouble)[int(drawn / rate * len(Trouble))] if drawn < rate else None

    # ---------------------------------------------------------------------------------------------------- one batch

    async def _carry_out(self, kind: OperationKind, requests: Sequence[Request]) -> Sequence[Outcome]:
        for _ in range(TRIES):
            try:
                return await self._try_to_carry_out(kind, requests)
            except KeyTaken:
                continue
        return [BankFailed() for _ in requests]

    async def _try_to_carry_out(self, kind: OperationKind, requests: Sequence[Request]) -> Sequence[Outcome]:
        async with self._database.transaction() as tx:
            named = {r.charge_id for r in requests if not isinstance(r, AuthorizeCharge)}
            charges = await store.lock_charges(tx, sorted(named)) if named else {}
            asked = [_asked(kind, request, charges) for request in requests]
            heard = await _without_first_calls(tx, asked)
            calls = Counter(a.key for a in heard if isinstance(a, Asked))
            known = await store.count_calls(tx, calls) if calls else {}
            new = _new_operations(heard, calls, known)
            known |= await _write(tx, kind, new, charges)
            await faults.point(f"sandbox.{kind}.before_commit")
        await faults.point(f"sandbox.{kind}.after_commit")
        return _answers(heard, calls, known)

    # -------------------------------------------------------------------------------------------------- processing

    async def finish_for_ever(self) -> None:
        """Finishes operations when their time is over: the loop of methods that are slow."""
        while True:
            if await self.finish_due() < FINISHED_AT_ONCE:
                await asyncio.sleep(FINISH_EVERY_SECONDS)

    async def finish_due(self) -> int:
        """Finishes up to `FINISHED_AT_ONCE` operations that are due; gives how many there were."""
        async with self._database.read() as tx:
            due = await store.due(tx, FINISHED_AT_ONCE)
        if not due:
            return 0
        async with self._database.transaction() as tx:
            charges = await store.lock_charges(tx, sorted({o.charge_id for o in due if o.charge_id is not None}))
            before = dict(charges)
            codes: dict[int, str | None] = {}
            for operation in await store.lock_processing(tx, [o.id for o in due]):
                codes[operation.id] = _code_of(operation, charges)
            await store.write_charges(tx, [c for c in charges.values() if c is not before[c.id]])
            await store.finish(tx, codes)
            await faults.point("sandbox.finish.before_commit")
        await faults.point("sandbox.finish.after_commit")
        return len(due)


# ----------------------------------------------------------------------------------------------------------- details


def _asked(kind: OperationKind, request: Request, charges: dict[int, ChargeRow]) -> Asked | ServiceError:
    if isinstance(request, AuthorizeCharge):
        return rules.authorization(request)
    charge = charges.get(request.charge_id)
    return rules.of_charge(kind, request, charge) if charge else ChargeUnknown(charge_id=request.charge_id)


async def _without_first_calls(tx: Tx, asked: Sequence[Asked | ServiceError]) -> list[Asked | ServiceError]:
    """The same, where the first call of an operation that fails at first is a `BankFailed`."""
    failing = {a.key for a in asked if isinstance(a, Asked) and a.method == rules.ERROR_THEN_OK}
    if not failing:
        return list(asked)
    first = await store.remember_first_calls(tx, sorted(failing))
    heard: list[Asked | ServiceError] = []
    for each in asked:
        if isinstance(each, Asked) and each.key in first:
            first.remove(each.key)
            heard.append(BankFailed())
        else:
            heard.append(each)
    return heard


def _new_operations(
    asked: Sequence[Asked | ServiceError], calls: Counter[str], known: dict[str, OperationRow]
) -> list[Done]:
    """One for each key that nobody has used, in the order of the requests; nothing is decided yet."""
    new: dict[str, Done] = {}
    for each in asked:
        if isinstance(each, Asked) and each.key not in known and each.key not in new:
            delay_ms = rules.delay_ms(each.method)
            status = "succeeded" if delay_ms is None else "processing"
            new[each.key] = Done(each, calls[each.key], status, delay_ms=delay_ms)
    return list(new.values())


async def _write(
    tx: Tx, kind: OperationKind, new: Sequence[Done], charges: dict[int, ChargeRow]
) -> dict[str, OperationRow]:
    """Decides and writes. Raises `KeyTaken`."""
    if not new:
        return {}
    before = dict(charges)
    decided = [done if done.status == "processing" else _decided(done, charges) for done in new]
    opening = [d for d in decided if kind == "authorize" and d.status == "succeeded"]
    others = [d for d in decided if kind != "authorize" or d.status != "succeeded"]
    written = await store.open_charges(tx, opening) if opening else {}
    if others:
        written |= await store.insert_operations(tx, others)
    if len(written) < len(new):
        raise KeyTaken
    await store.write_charges(tx, [c for c in charges.values() if c is not before[c.id]])
    return written


def _decided(done: Done, charges: dict[int, ChargeRow]) -> Done:
    code = _code_of(done.asked, charges)
    return msgspec.structs.replace(done, status="declined", code=code) if code else done


def _code_of(operation: Asked | OperationRow, charges: dict[int, ChargeRow]) -> str | None:
    """Carries an operation out on its charge in `charges`; the code with which it is declined, if it is."""
    if operation.charge_id is None:
        return rules.NO_AUTHORIZATION.get(operation.method)
    charge, code = rules.carry_out(charges[operation.charge_id], operation.kind, operation.amount_minor)
    charges[charge.id] = charge
    return code


def _answers(
    asked: Sequence[Asked | ServiceError], calls: Counter[str], known: dict[str, OperationRow]
) -> list[Outcome]:
    """What each request hears, the calls with one key in their order."""
    heard: Counter[str] = Counter()
    answers: list[Outcome] = []
    for each in asked:
        if isinstance(each, ServiceError):
            answers.append(each)
            continue
        operation = known[each.key]
        heard[each.key] += 1
        call = operation.calls - calls[each.key] + heard[each.key]
        if not _is_same(each, operation):
            answers.append(SandboxKeyReused(key=each.key))
        elif each.method == rules.LOST_ANSWER and call == 1:
            answers.append(AnswerLost())
        else:
            answers.append(_spoken(operation))
    return answers


def _is_same(asked: Asked, known: OperationRow) -> bool:
    opens = asked.kind == "authorize"
    return (
        asked.kind == known.kind
        and (opens or asked.charge_id == known.charge_id)
        and (asked.order_id, asked.amount_minor) == (known.order_id, known.amount_minor)
        and (asked.currency, asked.method) == (known.currency, known.method)
    )


def _spoken(row: OperationRow) -> SandboxOperation:
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
