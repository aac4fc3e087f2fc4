"""What staff say that there is: set (counted), adjust (received, written off).

An adjustment is made once for its key. The answer is kept for a day; the key itself stays on the movement, and refuses
a second adjustment for ever.
"""

from __future__ import annotations

from typing import Final

import msgspec

from mercato.chassis import faults, idempotency
from mercato.chassis.codec import decode_outcome, encode_outcome
from mercato.chassis.contract import IdempotencyKeyReused, RequestInProgress, current
from mercato.chassis.db import Database, LockTimeout, Tx
from mercato.chassis.idempotency import Keyed
from mercato.contracts.inventory import AdjustedLevel, AdjustLevel, Level, SetLevel
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


class Counting:
    """Asks products whether a product exists, and writes to the database of inventory."""

    def __init__(self, database: Database, products: Products) -> None:
        self._database = database
        self._products = products

    # ------------------------------------------------------------------------------------------------------------ set

    async def set(self, request: SetLevel) -> Level:
        """Raises `ProductNotFound`, `StaleVersion` or `BelowReserved`."""
        await self._products.get(GetProduct(id=request.product_id))
        async with self._database.transaction() as tx:
            level = await _locked(tx, request.product_id)
            rules.check_version(request.version, level.version)
            if level.version and level.on_hand == request.on_hand:
                return level  # as many as were thought, or a retry whose answer was lost
            level = await count(tx, level, _counted(level, request))
            await faults.point("inventory.set.before_commit")
        await faults.point("inventory.set.after_commit")
        return level

    # --------------------------------------------------------------------------------------------------------- adjust

    async def adjust(self, request: AdjustLevel) -> AdjustedLevel:
        """Raises `InvalidRequest`, `ProductNotFound`, `BelowReserved`, `IdempotencyKeyReused`, `RequestInProgress`."""
        rules.check_delta(request.delta)
        principal = idempotency.principal_of(current.get().actor)
        keyed = Keyed(principal, request.idempotency_key, request.fingerprint)
        async with self._database.read() as tx:
            done = await _recalled(tx, keyed)
        if done:
            return done
        await self._products.get(GetProduct(id=request.product_id))
        try:
            async with self._database.transaction() as tx:
                adjusted = await _adjust(tx, request, keyed)
                await faults.point("inventory.adjust.before_commit")
        except LockTimeout:
            raise RequestInProgress from None
        await faults.point("inventory.adjust.after_commit")
        return adjusted


async def count(tx: Tx, level: Level, movement: Movement) -> Level:
    """Enters a movement for a locked level; gives the level as it is then. Raises what `Books.count` raises."""
    books = Books([level])
    books.count(movement)
    changed = await store.write(tx, books.close())
    return changed[level.product_id]


async def _locked(tx: Tx, product_id: int) -> Level:
    """The level, locked; one that nobody has counted is there at version 0 from now on, for this transaction alone."""
    await store.open_levels(tx, [product_id])
    # Of two who count for the first time at once, the second has waited, and sees here what the first has counted.
    [level] = await store.lock_levels(tx, [product_id])
    return level


def _counted(level: Level, request: SetLevel) -> Movement:
    return Movement(
        product_id=request.product_id,
        kind="adjustment" if level.version else "receipt",
        delta=request.on_hand - level.on_hand,
        actor=current.get().actor,
        reason=request.reason,
    )


async def _adjust(tx: Tx, request: AdjustLevel, keyed: Keyed) -> AdjustedLevel:
    if keyed.identity not in await idempotency.claim(tx, OPERATION, [keyed]):
        done = await _recalled(tx, keyed)
        assert done, "whose claim was waited for has committed an answer with it"
        return done
    reference = f"key:{keyed.principal}:{keyed.key}"
    level = await _locked(tx, request.product_id)
    old = await store.adjustment(tx, reference)
    if old:
        adjusted = _replayed_late(old, request, level)
    else:
        adjusted = AdjustedLevel(level=await count(tx, level, _adjustment(request, reference)))
    await idempotency.remember(tx, OPERATION, [keyed], [encode_outcome(adjusted)])
    return adjusted


def _adjustment(request: AdjustLevel, reference: str) -> Movement:
    return Movement(
        product_id=request.product_id,
        kind="receipt" if request.delta > 0 else "adjustment",
        delta=request.delta,
        actor=current.get().actor,
        reference=reference,
        reason=request.reason,
    )


def _replayed_late(old: store.AdjustmentRow, request: AdjustLevel, level: Level) -> AdjustedLevel:
    """The key was used longer than a day ago. What it did is known, what was answered is not any more."""
    if (old.product_id, old.delta, old.reason) != (request.product_id, request.delta, request.reason):
        raise IdempotencyKeyReused
    return AdjustedLevel(level=level, replayed=True)


async def _recalled(tx: Tx, keyed: Keyed) -> AdjustedLevel | None:
    """What was answered for this key within the day. Raises `IdempotencyKeyReused`."""
    [stored] = await idempotency.recall(tx, OPERATION, [keyed])
    if stored is None:
        return None
    if isinstance(stored, IdempotencyKeyReused):
        raise stored
    adjusted = decode_outcome(AdjustedLevel, stored)
    assert isinstance(adjusted, AdjustedLevel), "refusals are not stored"
    return msgspec.structs.replace(adjusted, replayed=True)
