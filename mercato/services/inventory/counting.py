"""Levels that staff set (counted) or adjust (received, written off), a batch at a time.

Both ask products once for all that a batch names. Then one transaction locks the levels, enters each request into the
ledger in the order of the batch, and writes the result at once. A refused request leaves nothing and does not affect
its neighbours.

An adjustment is made once for its key. These steps each settle some of a batch, and the next sees what is left:

1. validate  What changes nothing.
2. recall    A key that was used within a day has its answer already. One that was used longer ago stands on its
             movement for ever: what it did is known, what was answered is not any more. Either may belong to another
             request.
3. look up   Products that do not exist.
4. write     One transaction: claim the keys, lock, decide, write, store the answers under the keys. Keys of what the
             ledger refuses are released: they may be sent again when the reason is gone.
5. replay    Further requests with a key of this same batch get what the first with that key got, or the error that the
             key belongs to that other request.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final

import msgspec

from mercato.chassis.contract import Actor, Batch, IdempotencyKeyReused, InvalidRequest, RequestInProgress, ServiceError
from mercato.chassis.idempotency import keys as idempotency
from mercato.chassis.idempotency.keys import Keyed
from mercato.chassis.observability import faults
from mercato.chassis.postgres.database import Database, LockTimeout, Tx
from mercato.chassis.rpc.codec import decode_outcome, encode_outcome
from mercato.contracts.inventory import AdjustedLevel, AdjustLevel, BelowReserved, Level, SetLevel
from mercato.contracts.products import GetProduct, Products

from . import rules, store
from .rules import Movement, StockLedger

OPERATION: Final = "inventory.adjust"

faults.declare(
    "inventory.set.before_commit",
    "inventory.set.after_commit",
    "inventory.adjust.before_commit",
    "inventory.adjust.after_commit",
)


class AdjustmentAttempt:
    """One adjustment on its way through the steps. `outcome` is None until a step settles it."""

    __slots__ = ("actor", "is_old", "keyed", "outcome", "request")

    def __init__(self, request: AdjustLevel, actor: Actor) -> None:
        self.request = request
        self.actor = actor
        self.keyed = Keyed(idempotency.principal_of(actor), request.idempotency_key, request.fingerprint)
        self.is_old = False
        """True where it was made longer than a day ago: the answer is the level as it is by now."""
        self.outcome: AdjustedLevel | ServiceError | None = None

    @property
    def reference(self) -> str:
        """How its movement keeps the key."""
        return f"key:{self.keyed.principal}:{self.keyed.key}"

    def recognise(self, old: store.AdjustmentRow) -> None:
        """Its key is on this movement: of the same adjustment, or of another."""
        asked = self.request
        self.is_old = (old.product_id, old.delta, old.reason) == (asked.product_id, asked.delta, asked.reason)
        if not self.is_old:
            self.outcome = IdempotencyKeyReused()

    def replay(self, first: AdjustmentAttempt) -> None:
        """Settles it with the answer of the first of its batch with its key."""
        answer = first.settled()
        if self.keyed.fingerprint != first.keyed.fingerprint:
            self.outcome = IdempotencyKeyReused()
        elif isinstance(answer, AdjustedLevel):
            self.outcome = msgspec.structs.replace(answer, replayed=True)
        else:
            self.outcome = answer.copy()

    def settled(self) -> AdjustedLevel | ServiceError:
        assert self.outcome is not None, "a step left a request without an answer"
        return self.outcome


class Counting:
    """Asks products whether a product exists, and writes to the database of inventory."""

    def __init__(self, database: Database, products: Products) -> None:
        self._database = database
        self._products = products

    # ------------------------------------------------------------------------------------------------------------ set

    async def set(self, batch: Batch[SetLevel]) -> Sequence[Level | ServiceError]:
        """Each gets its level, or `ProductNotFound`, `StaleVersion` or `BelowReserved`."""
        missing = await self._missing(request.product_id for request in batch)
        known = [(r, actor) for r, actor in zip(batch, batch.actors, strict=True) if r.product_id not in missing]
        outcomes = iter(await self._set(known) if known else ())
        return [missing[r.product_id].copy() if r.product_id in missing else next(outcomes) for r in batch]

    async def _set(self, requests: Sequence[tuple[SetLevel, Actor]]) -> Sequence[Level | ServiceError]:
        async with self._database.transaction() as tx:
            # A request with a version has seen a level: where there is none, it is stale and nothing is counted.
            starting = {request.product_id for request, _ in requests if request.version is None}
            ledger = await _open_ledger(tx, {request.product_id for request, _ in requests}, starting)
            outcomes = [_set(ledger, request, actor) for request, actor in requests]
            written = await store.write(tx, ledger.write_set())
            await faults.point("inventory.set.before_commit")
        await faults.point("inventory.set.after_commit")
        return [_as_written(outcome, written) for outcome in outcomes]

    # --------------------------------------------------------------------------------------------------------- adjust

    async def adjust(self, batch: Batch[AdjustLevel]) -> Sequence[AdjustedLevel | ServiceError]:
        """Each gets its level, or `InvalidRequest`, `ProductNotFound` or `BelowReserved`.

        Or what is wrong with its key: `IdempotencyKeyReused`, `RequestInProgress`.
        """
        attempts = [AdjustmentAttempt(request, actor) for request, actor in zip(batch, batch.actors, strict=True)]
        _validate(attempts)
        await self._recall(_open(attempts))
        await self._look_up(_open(attempts))
        await self._write(_open(attempts))
        return [attempt.settled() for attempt in attempts]

    async def _recall(self, attempts: Sequence[AdjustmentAttempt]) -> None:
        if not attempts:
            return
        async with self._database.read() as tx:
            await _settle_from_store(tx, attempts)
            # In this order: a duplicate that commits in between is found by its movement, and then again by its claim.
            if unanswered := _open(attempts):
                made = await store.adjustments(tx, [a.reference for a in unanswered])
                for attempt in unanswered:
                    if old := made.get(attempt.reference):
                        attempt.recognise(old)

    async def _look_up(self, attempts: Sequence[AdjustmentAttempt]) -> None:
        missing = await self._missing(a.request.product_id for a in attempts)
        for attempt in attempts:
            if refusal := missing.get(attempt.request.product_id):
                attempt.outcome = refusal.copy()

    async def _write(self, attempts: Sequence[AdjustmentAttempt]) -> None:
        if not attempts:
            return
        firsts: dict[tuple[str, str], AdjustmentAttempt] = {}
        for attempt in attempts:
            firsts.setdefault(attempt.keyed.identity, attempt)
        try:
            async with self._database.transaction() as tx:
                ours = await idempotency.claim(tx, OPERATION, [first.keyed for first in firsts.values()])
                # A duplicate has waited for the first in the claim, and gets its answer.
                taken = [a for a in attempts if a.keyed.identity not in ours]
                await _settle_from_store(tx, taken)
                assert not _open(taken), "a transaction that claims a key commits an answer with it, or releases it"
                await _adjust(tx, _open(firsts.values()))
                await faults.point("inventory.adjust.before_commit")
        except LockTimeout:
            if len(attempts) > 1:
                raise  # the chassis runs each alone; then it is clear whose key is held
            attempts[0].outcome = RequestInProgress()
            return
        await faults.point("inventory.adjust.after_commit")
        for attempt in _open(attempts):
            attempt.replay(firsts[attempt.keyed.identity])

    # ------------------------------------------------------------------------------------------------------- products

    async def _missing(self, product_ids: Iterable[int]) -> dict[int, ServiceError]:
        """The products that cannot be counted, and why: they do not exist, or products does not answer."""
        asked = sorted(set(product_ids))
        found = await self._products.get.many([GetProduct(id=i) for i in asked])
        return {i: product for i, product in zip(asked, found, strict=True) if isinstance(product, ServiceError)}


# ----------------------------------------------------------------------------------------------------------- ledger


async def _open_ledger(tx: Tx, product_ids: Collection[int], starting: Collection[int]) -> StockLedger:
    """The ledger of these levels, locked.

    Of `starting`, those that were never counted are at version 0 from now on, for this transaction alone: the caller
    counts something there.
    """
    if starting:
        await store.insert_levels(tx, sorted(starting))
    # Of two first counts at once, the second has waited, and sees here what the first has counted.
    return StockLedger(await store.lock_levels(tx, product_ids))


def _set(ledger: StockLedger, request: SetLevel, actor: Actor) -> Level | ServiceError:
    level = ledger.level(request.product_id)
    if stale := rules.check_version(request.version, level.version):
        return stale
    if level.version and level.on_hand == request.on_hand:
        return level  # as many as were thought, or a retry whose answer was lost
    movement = Movement(
        product_id=request.product_id,
        kind="adjustment" if level.version else "receipt",
        delta=request.on_hand - level.on_hand,
        actor=actor,
        reason=request.reason,
    )
    return _counted(ledger, movement)


async def _adjust(tx: Tx, attempts: Sequence[AdjustmentAttempt]) -> None:
    """Makes the adjustments of keys that this transaction has claimed, and settles each."""
    if not attempts:
        return
    # Where there is nothing, the first that adds something always can; one that only takes away is refused.
    starting = {a.request.product_id for a in attempts if a.request.delta > 0 and not a.is_old}
    ledger = await _open_ledger(tx, {a.request.product_id for a in attempts}, starting)
    outcomes = [_adjusted(ledger, attempt) for attempt in attempts]
    written = await store.write(tx, ledger.write_set())
    for attempt, outcome in zip(attempts, outcomes, strict=True):
        level = _as_written(outcome, written)
        done = isinstance(level, Level)
        attempt.outcome = AdjustedLevel(level=level, replayed=attempt.is_old) if done else level
    await _remember(tx, attempts)


def _adjusted(ledger: StockLedger, attempt: AdjustmentAttempt) -> Level | ServiceError:
    request = attempt.request
    if attempt.is_old:
        return ledger.level(request.product_id)
    movement = Movement(
        product_id=request.product_id,
        kind="receipt" if request.delta > 0 else "adjustment",
        delta=request.delta,
        actor=attempt.actor,
        reference=attempt.reference,
        reason=request.reason,
    )
    return _counted(ledger, movement)


def _counted(ledger: StockLedger, movement: Movement) -> Level | ServiceError:
    try:
        return ledger.count(movement)
    except (BelowReserved, InvalidRequest) as refusal:
        return refusal


def _as_written(outcome: Level | ServiceError, written: Mapping[int, Level]) -> Level | ServiceError:
    """What the ledger has answered, with the time of the change where there was any before it."""
    if isinstance(outcome, ServiceError) or outcome.updated_at is not None or outcome.version == 0:
        return outcome
    return msgspec.structs.replace(outcome, updated_at=written[outcome.product_id].updated_at)


# --------------------------------------------------------------------------------------------------------------- keys


async def _settle_from_store(tx: Tx, attempts: Sequence[AdjustmentAttempt]) -> None:
    """Settles those whose answer is stored: within the day, and a little longer."""
    if not attempts:
        return
    found = await idempotency.recall(tx, OPERATION, [a.keyed for a in attempts])
    for attempt, stored in zip(attempts, found, strict=True):
        if isinstance(stored, bytes):
            adjusted = decode_outcome(AdjustedLevel, stored)
            assert isinstance(adjusted, AdjustedLevel), "refusals are not stored"
            attempt.outcome = msgspec.structs.replace(adjusted, replayed=True)
        elif stored is not None:
            attempt.outcome = stored


async def _remember(tx: Tx, attempts: Sequence[AdjustmentAttempt]) -> None:
    """Stores what was done under the keys, and releases the keys of what was refused."""
    made = [(a.keyed, encode_outcome(a.outcome)) for a in attempts if isinstance(a.outcome, AdjustedLevel)]
    refused = [a.keyed for a in attempts if isinstance(a.outcome, ServiceError)]
    if made:
        await idempotency.remember(tx, OPERATION, [keyed for keyed, _ in made], [answer for _, answer in made])
    if refused:
        await idempotency.release(tx, OPERATION, refused)


# ------------------------------------------------------------------------------------------------------------ details


def _open(attempts: Iterable[AdjustmentAttempt]) -> list[AdjustmentAttempt]:
    return [a for a in attempts if a.outcome is None]


def _validate(attempts: Iterable[AdjustmentAttempt]) -> None:
    for attempt in attempts:
        attempt.outcome = rules.check_delta(attempt.request.delta)
