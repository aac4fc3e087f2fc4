"""Levels that staff set (counted) or adjust (received, written off), a batch at a time.

Both call products once for all products of a batch. Then one transaction locks the levels, applies each request to the
ledger in the order of the batch, and writes the result at once. A refused request changes nothing and does not affect
the others.

Adjustments are a keyed batch (`chassis/idempotency/batch.py`) with these steps:

recall    A key that was used within a day has its stored answer. A key that was used earlier stays in its movement for
          ever: that has the adjustment but not the answer, so the answer is the current level.
prepare   Refuse a delta of 0, and products that do not exist.
write     One transaction: claim the keys, lock, decide, write, store the answers under the keys. Keys of requests that
          the ledger refuses are released.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final

import msgspec

from mercato.chassis.contract import Actor, Batch, InvalidRequest, ServiceError, StaleVersion, check_version
from mercato.chassis.idempotency import keys as idempotency
from mercato.chassis.idempotency.batch import KeyedAttempt, KeyedBatch, StoredAnswer, unsettled
from mercato.chassis.idempotency.keys import Identity
from mercato.chassis.observability import faults
from mercato.chassis.postgres.database import Database, Tx
from mercato.chassis.rpc.codec import decode_outcome, encode_outcome
from mercato.contracts.inventory import AdjustedLevel, AdjustLevel, BelowReserved, Level, SetLevel
from mercato.contracts.products import GetProduct, ProductNotFound, Products

from . import rules, store
from .rules import Movement, StockLedger

OPERATION: Final = "inventory.adjust"

faults.declare(
    "inventory.set.before_commit",
    "inventory.set.after_commit",
    "inventory.adjust.before_commit",
    "inventory.adjust.after_commit",
)


Adjustment = KeyedAttempt[AdjustLevel, AdjustedLevel, None]


class Counting:
    """Sets levels. Calls products to check that a product exists, and writes to the database of inventory."""

    def __init__(self, database: Database, products: Products) -> None:
        self._database = database
        self._known = KnownProducts(database, products)

    async def set(self, batch: Batch[SetLevel]) -> Sequence[Level | ServiceError]:
        """Each gets its level, or `ProductNotFound`, `StaleVersion` or `BelowReserved`."""
        missing = await self._known.missing(request.product_id for request in batch)
        known = [(r, actor) for r, actor in zip(batch, batch.actors, strict=True) if r.product_id not in missing]
        outcomes = iter(await self._set(known) if known else ())
        return [missing[r.product_id].copy() if r.product_id in missing else next(outcomes) for r in batch]

    async def _set(self, requests: Sequence[tuple[SetLevel, Actor]]) -> Sequence[Level | ServiceError]:
        async with self._database.transaction() as tx:
            # The client of a request with a version has seen a level: without a level, the version is stale.
            starting = {request.product_id for request, _ in requests if request.version is None}
            ledger = await _open_ledger(tx, {request.product_id for request, _ in requests}, starting)
            outcomes = [_set(ledger, request, actor) for request, actor in requests]
            written = await store.write(tx, ledger.write_set())
            await faults.point("inventory.set.before_commit")
        await faults.point("inventory.set.after_commit")
        return [_as_written(outcome, written) for outcome in outcomes]


class Adjusting(KeyedBatch[AdjustLevel, AdjustedLevel, None]):
    """Adjusts levels: each answer is a level, or `InvalidRequest`, `ProductNotFound` or `BelowReserved`."""

    def __init__(self, database: Database, products: Products) -> None:
        self._database = database
        self._known = KnownProducts(database, products)

    async def recall(self, attempts: Sequence[Adjustment]) -> Mapping[Identity, StoredAnswer[AdjustedLevel]]:
        keys = [attempt.keyed for attempt in attempts if attempt.keyed]
        async with self._database.read() as tx:
            rows = await idempotency.recall(tx, OPERATION, keys)
            # In this order: a duplicate that commits in between is found by its movement.
            old = [attempt for attempt in attempts if attempt.identity not in rows]
            movements = await store.adjustments(tx, [_reference(attempt) for attempt in old]) if old else {}
            levels = await store.levels(tx, [row.product_id for row in movements.values()]) if movements else {}
        found = {
            attempt.identity: _stored(attempt, row.fingerprint, _decoded(row.answer))
            for attempt in attempts
            if (row := rows.get(attempt.identity))
        }
        for attempt in old:
            if row := movements.get(_reference(attempt)):
                found[attempt.identity] = _recognised(attempt, row, levels[row.product_id])
        return found

    async def prepare(self, attempts: Sequence[Adjustment]) -> None:
        for attempt in attempts:
            attempt.answer = rules.check_delta(attempt.request.delta)
        possible = unsettled(attempts)
        missing = await self._known.missing(attempt.request.product_id for attempt in possible)
        for attempt in possible:
            if refusal := missing.get(attempt.request.product_id):
                attempt.answer = refusal.copy()

    async def write(self, attempts: Sequence[Adjustment]) -> None:
        async with self._database.transaction() as tx:
            keys = await idempotency.claim(tx, OPERATION, [attempt.keyed for attempt in attempts if attempt.keyed])
            claimed = [attempt for attempt in attempts if attempt.identity in keys]
            answers = await _adjust(tx, claimed) if claimed else ()
            await faults.point("inventory.adjust.before_commit")
        await faults.point("inventory.adjust.after_commit")
        for attempt, answer in zip(claimed, answers, strict=True):
            attempt.answer = answer


class KnownProducts:
    """The products that can be counted: those that exist, and those that have a level."""

    def __init__(self, database: Database, products: Products) -> None:
        self._database = database
        self._products = products

    async def missing(self, product_ids: Iterable[int]) -> dict[int, ServiceError]:
        """The products that cannot be counted, and why: they do not exist, or products does not answer."""
        wanted = sorted(set(product_ids))
        found = await self._products.get.many([GetProduct(id=i) for i in wanted])
        missing = {i: product for i, product in zip(wanted, found, strict=True) if isinstance(product, ServiceError)}
        if unknown := [i for i, error in missing.items() if isinstance(error, ProductNotFound)]:
            # A product that was lost in a restore of its database still has a level: its pieces can be written off.
            async with self._database.read() as tx:
                counted = await store.levels(tx, unknown)
            return {i: error for i, error in missing.items() if i not in counted}
        return missing


# ----------------------------------------------------------------------------------------------------------- ledger


async def _open_ledger(tx: Tx, product_ids: Collection[int], starting: Collection[int]) -> StockLedger:
    """The ledger of these levels, locked.

    Of `starting`, products that were never counted get a level at version 0. Only this transaction sees it, and the
    caller must count something there.
    """
    if starting:
        await store.insert_levels(tx, sorted(starting))
    # Of two concurrent first counts, the second has waited in the insert, and sees the result of the first here.
    return StockLedger(await store.lock_levels(tx, product_ids))


def _set(ledger: StockLedger, request: SetLevel, actor: Actor) -> Level | ServiceError:
    level = ledger.level(request.product_id)
    try:
        check_version(request.version, level.version)
    except StaleVersion as stale:
        return stale
    if level.version and level.on_hand == request.on_hand:
        return level  # the count confirms the level, or is a retry whose answer was lost
    movement = Movement(
        product_id=request.product_id,
        kind="adjustment" if level.version else "receipt",
        delta=request.on_hand - level.on_hand,
        actor=actor,
        reason=request.reason,
    )
    return _counted(ledger, movement)


async def _adjust(tx: Tx, attempts: Sequence[Adjustment]) -> Sequence[AdjustedLevel | ServiceError]:
    """Makes the adjustments of keys that this transaction has claimed; gives the answers, in order."""
    # Without a level, an adjustment that adds pieces starts one; one that removes pieces is refused.
    starting = {a.request.product_id for a in attempts if a.request.delta > 0}
    ledger = await _open_ledger(tx, {a.request.product_id for a in attempts}, starting)
    outcomes = [_adjusted(ledger, attempt) for attempt in attempts]
    written = await store.write(tx, ledger.write_set())
    answers: list[AdjustedLevel | ServiceError] = []
    for outcome in outcomes:
        level = _as_written(outcome, written)
        answers.append(level if isinstance(level, ServiceError) else AdjustedLevel(level=level))
    await _remember(tx, attempts, answers)
    return answers


def _adjusted(ledger: StockLedger, attempt: Adjustment) -> Level | ServiceError:
    request = attempt.request
    movement = Movement(
        product_id=request.product_id,
        kind="receipt" if request.delta > 0 else "adjustment",
        delta=request.delta,
        actor=attempt.actor,
        reference=_reference(attempt),
        reason=request.reason,
    )
    return _counted(ledger, movement)


def _counted(ledger: StockLedger, movement: Movement) -> Level | ServiceError:
    try:
        return ledger.count(movement)
    except (BelowReserved, InvalidRequest) as refusal:
        return refusal


def _as_written(outcome: Level | ServiceError, written: Mapping[int, Level]) -> Level | ServiceError:
    """The answer of the ledger, with the time of the write for a level that was changed."""
    if isinstance(outcome, ServiceError) or outcome.updated_at is not None or outcome.version == 0:
        return outcome
    return msgspec.structs.replace(outcome, updated_at=written[outcome.product_id].updated_at)


# --------------------------------------------------------------------------------------------------------------- keys


def _reference(attempt: Adjustment) -> str:
    """The reference of its movement, which has the key."""
    principal, key = attempt.identity
    return f"key:{principal}:{key}"


def _decoded(answer: bytes) -> AdjustedLevel:
    adjusted = decode_outcome(AdjustedLevel, answer)
    assert isinstance(adjusted, AdjustedLevel), "refusals are not stored"
    return adjusted


def _stored(attempt: Adjustment, fingerprint: bytes, answer: AdjustedLevel) -> StoredAnswer[AdjustedLevel]:
    is_same = attempt.request.product_id == answer.level.product_id
    return StoredAnswer(fingerprint, answer, "" if is_same else "product_id")


def _recognised(attempt: Adjustment, row: store.AdjustmentRow, level: Level) -> StoredAnswer[AdjustedLevel]:
    """The stored result of an old key, whose fingerprint is not stored any more: its fields are compared instead."""
    request = attempt.request
    fields = ("product_id", "delta", "reason")
    differing = next((name for name in fields if getattr(row, name) != getattr(request, name)), "")
    return StoredAnswer(request.fingerprint, AdjustedLevel(level=level), differing)


async def _remember(tx: Tx, attempts: Sequence[Adjustment], answers: Sequence[AdjustedLevel | ServiceError]) -> None:
    """Stores the answers under their keys, and releases the keys of refused requests."""
    settled = [(attempt.keyed, answer) for attempt, answer in zip(attempts, answers, strict=True) if attempt.keyed]
    made = [(keyed, encode_outcome(answer)) for keyed, answer in settled if isinstance(answer, AdjustedLevel)]
    refused = [keyed for keyed, answer in settled if isinstance(answer, ServiceError)]
    if made:
        await idempotency.remember(tx, OPERATION, [keyed for keyed, _ in made], [answer for _, answer in made])
    if refused:
        await idempotency.release(tx, OPERATION, refused)
