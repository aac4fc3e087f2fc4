"""What staff say that there is, a batch at a time: set (counted), adjust (received, written off).

Both ask products once for all that a batch names. Then one transaction locks the levels, enters each request into the
books in the order of the batch, and writes what has come of it at once. A request that is refused leaves nothing, and
its neighbours never hear of it.

An adjustment is made once for its key. These steps each settle some of a batch, and the next sees what is left:

1. judge     What changes nothing.
2. recall    A key that was used within a day has its answer already. One that was used longer ago stands on its
             movement for ever: what it did is known, what was answered is not any more. Either may belong to another
             request.
3. look up   Products that do not exist.
4. write     One transaction: claim the keys, lock, enter, write, store the answers under the keys. Keys of what the
             books refuse are given back: they may be sent again when the reason is gone.
5. echo      Further requests with a key of this same batch hear what the first with that key heard, or that it belongs
             to that other request.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final

import msgspec

from mercato.chassis import faults, idempotency
from mercato.chassis.codec import decode_outcome, encode_outcome
from mercato.chassis.contract import Actor, Batch, IdempotencyKeyReused, InvalidRequest, RequestInProgress, ServiceError
from mercato.chassis.db import Database, LockTimeout, Tx
from mercato.chassis.idempotency import Keyed
from mercato.contracts.inventory import AdjustedLevel, AdjustLevel, BelowReserved, Level, SetLevel
from mercato.contracts.products import GetProduct, Products

from . import rules, store
from .rules import Books, Movement

OPERATION: Final = "inventory.adjust"

faults.declare(
    "inventory.set.before_commit",
    "inventory.set.after_commit",
    "inventory.adjust.before_commit",
    "inventory.adjust.after_commit",
)


class Attempted:
    """One adjustment on its way through the steps. `outcome` is None until a step settles it."""

    __slots__ = ("actor", "is_old", "keyed", "outcome", "request")

    def __init__(self, request: AdjustLevel, actor: Actor) -> None:
        self.request = request
        self.actor = actor
        self.keyed = Keyed(idempotency.principal_of(actor), request.idempotency_key, request.fingerprint)
        self.is_old = False
        """True where it was made longer than a day ago: it only wants to hear how things are."""
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

    def echo(self, first: Attempted) -> None:
        """Settles it with what the first of its batch with its key has heard."""
        heard = first.settled()
        if self.keyed.fingerprint != first.keyed.fingerprint:
            self.outcome = IdempotencyKeyReused()
        elif isinstance(heard, AdjustedLevel):
            self.outcome = msgspec.structs.replace(heard, replayed=True)
        else:
            self.outcome = heard.copy()

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
        """Each hears its level, or `ProductNotFound`, `StaleVersion` or `BelowReserved`."""
        missing = await self._missing(request.product_id for request in batch)
        known = [(r, actor) for r, actor in zip(batch, batch.actors, strict=True) if r.product_id not in missing]
        outcomes = iter(await self._set(known) if known else ())
        return [missing[r.product_id].copy() if r.product_id in missing else next(outcomes) for r in batch]

    async def _set(self, requests: Sequence[tuple[SetLevel, Actor]]) -> Sequence[Level | ServiceError]:
        async with self._database.transaction() as tx:
            # Who names a version has seen a level: where there is none, the version is stale and nothing is counted.
            starting = {request.product_id for request, _ in requests if request.version is None}
            books = await _open_books(tx, {request.product_id for request, _ in requests}, starting)
            heard = [_set(books, request, actor) for request, actor in requests]
            written = await store.write(tx, books.close())
            await faults.point("inventory.set.before_commit")
        await faults.point("inventory.set.after_commit")
        return [_as_written(outcome, written) for outcome in heard]

    # --------------------------------------------------------------------------------------------------------- adjust

    async def adjust(self, batch: Batch[AdjustLevel]) -> Sequence[AdjustedLevel | ServiceError]:
        """Each hears its level, or `InvalidRequest`, `ProductNotFound` or `BelowReserved`.

        Or what is wrong with its key: `IdempotencyKeyReused`, `RequestInProgress`.
        """
        attempts = [Attempted(request, actor) for request, actor in zip(batch, batch.actors, strict=True)]
        _judge(attempts)
        await self._recall(_open(attempts))
        await self._look_up(_open(attempts))
        await self._write(_open(attempts))
        return [attempted.settled() for attempted in attempts]

    async def _recall(self, attempts: Sequence[Attempted]) -> None:
        if not attempts:
            return
        async with self._database.read() as tx:
            await _settle_from_store(tx, attempts)
            # In this order: a twin that commits in between is found by its movement, and then again by its claim.
            if unanswered := _open(attempts):
                made = await store.adjustments(tx, [a.reference for a in unanswered])
                for attempted in unanswered:
                    if old := made.get(attempted.reference):
                        attempted.recognise(old)

    async def _look_up(self, attempts: Sequence[Attempted]) -> None:
        missing = await self._missing(a.request.product_id for a in attempts)
        for attempted in attempts:
            if refusal := missing.get(attempted.request.product_id):
                attempted.outcome = refusal.copy()

    async def _write(self, attempts: Sequence[Attempted]) -> None:
        if not attempts:
            return
        firsts: dict[tuple[str, str], Attempted] = {}
        for attempted in attempts:
            firsts.setdefault(attempted.keyed.identity, attempted)
        try:
            async with self._database.transaction() as tx:
                ours = await idempotency.claim(tx, OPERATION, [first.keyed for first in firsts.values()])
                # Who comes second has waited for the first in the claim, and hears its answer.
                taken = [a for a in attempts if a.keyed.identity not in ours]
                await _settle_from_store(tx, taken)
                assert not _open(taken), "who claims a key commits an answer with it, or gives it back"
                await _adjust(tx, _open(firsts.values()))
                await faults.point("inventory.adjust.before_commit")
        except LockTimeout:
            if len(attempts) > 1:
                raise  # the chassis runs each alone; then it is clear whose key is held
            attempts[0].outcome = RequestInProgress()
            return
        await faults.point("inventory.adjust.after_commit")
        for attempted in _open(attempts):
            attempted.echo(firsts[attempted.keyed.identity])

    # ------------------------------------------------------------------------------------------------------- products

    async def _missing(self, product_ids: Iterable[int]) -> dict[int, ServiceError]:
        """The products that cannot be counted, and why: they do not exist, or nobody answers."""
        asked = sorted(set(product_ids))
        found = await self._products.get.many([GetProduct(id=i) for i in asked])
        return {i: product for i, product in zip(asked, found, strict=True) if isinstance(product, ServiceError)}


# ------------------------------------------------------------------------------------------------------- in the books


async def _open_books(tx: Tx, product_ids: Collection[int], starting: Collection[int]) -> Books:
    """The books of these levels, locked.

    Of `starting`, those that nobody has counted are at version 0 from now on, for this transaction alone: the caller
    counts something there.
    """
    if starting:
        await store.open_levels(tx, sorted(starting))
    # Of two who count for the first time at once, the second has waited, and sees here what the first has counted.
    return Books(await store.lock_levels(tx, product_ids))


def _set(books: Books, request: SetLevel, actor: Actor) -> Level | ServiceError:
    level = books.level(request.product_id)
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
    return _counted(books, movement)


async def _adjust(tx: Tx, attempts: Sequence[Attempted]) -> None:
    """Makes the adjustments of keys that this transaction has claimed, and settles each."""
    if not attempts:
        return
    # Where there is nothing, the first that adds something always can; who only takes away is refused.
    starting = {a.request.product_id for a in attempts if a.request.delta > 0 and not a.is_old}
    books = await _open_books(tx, {a.request.product_id for a in attempts}, starting)
    heard = [_adjusted(books, attempted) for attempted in attempts]
    written = await store.write(tx, books.close())
    for attempted, outcome in zip(attempts, heard, strict=True):
        level = _as_written(outcome, written)
        done = isinstance(level, Level)
        attempted.outcome = AdjustedLevel(level=level, replayed=attempted.is_old) if done else level
    await _remember(tx, attempts)


def _adjusted(books: Books, attempted: Attempted) -> Level | ServiceError:
    request = attempted.request
    if attempted.is_old:
        return books.level(request.product_id)
    movement = Movement(
        product_id=request.product_id,
        kind="receipt" if request.delta > 0 else "adjustment",
        delta=request.delta,
        actor=attempted.actor,
        reference=attempted.reference,
        reason=request.reason,
    )
    return _counted(books, movement)


def _counted(books: Books, movement: Movement) -> Level | ServiceError:
    try:
        return books.count(movement)
    except (BelowReserved, InvalidRequest) as refusal:
        return refusal


def _as_written(outcome: Level | ServiceError, written: Mapping[int, Level]) -> Level | ServiceError:
    """What the books have answered, with the time of the change where there was any before it."""
    if isinstance(outcome, ServiceError) or outcome.updated_at is not None or outcome.version == 0:
        return outcome
    return msgspec.structs.replace(outcome, updated_at=written[outcome.product_id].updated_at)


# --------------------------------------------------------------------------------------------------------------- keys


async def _settle_from_store(tx: Tx, attempts: Sequence[Attempted]) -> None:
    """Settles those whose answer is stored: within the day, and a little longer."""
    if not attempts:
        return
    found = await idempotency.recall(tx, OPERATION, [a.keyed for a in attempts])
    for attempted, stored in zip(attempts, found, strict=True):
        if isinstance(stored, bytes):
            adjusted = decode_outcome(AdjustedLevel, stored)
            assert isinstance(adjusted, AdjustedLevel), "refusals are not stored"
            attempted.outcome = msgspec.structs.replace(adjusted, replayed=True)
        elif stored is not None:
            attempted.outcome = stored


async def _remember(tx: Tx, attempts: Sequence[Attempted]) -> None:
    """Stores what was done under the keys, and gives back the keys of what was refused."""
    made = [(a.keyed, encode_outcome(a.outcome)) for a in attempts if isinstance(a.outcome, AdjustedLevel)]
    refused = [a.keyed for a in attempts if isinstance(a.outcome, ServiceError)]
    if made:
        await idempotency.remember(tx, OPERATION, [keyed for keyed, _ in made], [answer for _, answer in made])
    if refused:
        await idempotency.release(tx, OPERATION, refused)


# ------------------------------------------------------------------------------------------------------------ details


def _open(attempts: Iterable[Attempted]) -> list[Attempted]:
    return [a for a in attempts if a.outcome is None]


def _judge(attempts: Iterable[Attempted]) -> None:
    for attempted in attempts:
        attempted.outcome = rules.check_delta(attempted.request.delta)
