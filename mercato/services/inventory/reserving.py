"""Reservations, a batch at a time: reserve, commit, release, restock, and expiry.

A batch that fits as a whole is one statement (`fast_path.py`). Any other batch is rolled back and decided request by
request, in order, still in one transaction: insert and lock (in the order of `store.py`), decide
(`rules.StockLedger`), write. A crash before the commit changes nothing; a request that is repeated after the commit
finds the reservation, and nothing is done twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Literal

from mercato.chassis.contract import Actor, Batch, InvalidRequest, ServiceError
from mercato.chassis.messaging.events import Outgoing
from mercato.chassis.observability import faults
from mercato.chassis.postgres.database import Database, Tx
from mercato.contracts.inventory import (
    AnotherOrder,
    CommitStock,
    ReleaseStock,
    Reservation,
    ReservationState,
    ReserveStock,
    ReturnStock,
    StockLine,
)

from . import fast_path, rules, store
from .fast_path import NewReservation
from .rules import ReservedLine, StockLedger, StoredReservation

EXPIRED_AT_ONCE: Final = 500

BEFORE_COMMIT: Final = {
    "committed": "inventory.commit.before_commit",
    "released": "inventory.release.before_commit",
}
AFTER_COMMIT: Final = {
    "committed": "inventory.commit.after_commit",
    "released": "inventory.release.after_commit",
}

faults.declare(
    "inventory.reserve.before_commit",
    "inventory.reserve.after_commit",
    *BEFORE_COMMIT.values(),
    *AFTER_COMMIT.values(),
    "inventory.restock.before_commit",
    "inventory.restock.after_commit",
    "inventory.expire.before_commit",
    "inventory.expire.after_commit",
)

Outcome = Reservation | ServiceError
OrderKey = tuple[int, int]
"""Id and nonce of an order."""


class DoesNotFitError(Exception):
    """A batch cannot be taken as a whole: its transaction must be rolled back."""


class Reserving:
    """`hold_seconds`: how long stock is held for an order whose payment has not begun."""

    def __init__(self, database: Database, hold_seconds: float) -> None:
        self._database = database
        self._hold_seconds = hold_seconds

    # -------------------------------------------------------------------------------------------------------- reserve

    async def reserve(self, batch: Batch[ReserveStock]) -> Sequence[Outcome]:
        """Each gets its reservation, or a refusal.

        These are `OutOfStock`, `HoldLimitReached`, `ReservationClosed`, `AnotherOrder`, `InvalidRequest`.
        """
        refusals = [rules.check_lines(request.lines) or rules.check_bound(request) for request in batch]
        valid = [request for request, refusal in zip(batch, refusals, strict=True) if refusal is None]
        if not valid:
            return _merged(refusals, [])
        guests = [request for request in valid if request.guest]
        others = [request for request in valid if not request.guest] if guests else valid
        outcomes: Sequence[Outcome] = await self._reserve_others(others) if others else ()
        if guests:
            # Separately: the holds of guests are counted, which the single statement for the others does not do.
            of_guests = iter(await self._reserve_each(guests, guests=True))
            of_others = iter(outcomes)
            outcomes = [next(of_guests if request.guest else of_others) for request in valid]
        await faults.point("inventory.reserve.after_commit")
        return _merged(refusals, outcomes)

    async def _reserve_others(self, requests: Sequence[ReserveStock]) -> Sequence[Outcome]:
        try:
            return await self._reserve_all(requests)
        except DoesNotFitError:
            return await self._reserve_each(requests)

    async def _reserve_all(self, requests: Sequence[ReserveStock]) -> Sequence[Outcome]:
        new = {request.order_id: _new(request) for request in requests}
        if len(new) < len(requests):
            raise DoesNotFitError
        wanted = Counter[int]()
        for reservation in new.values():
            for line in reservation.lines:
                wanted[line.product_id] += line.quantity
        async with self._database.transaction() as tx:
            levels = await fast_path.reserve_all(
                tx, list(new.values()), wanted, self._hold_seconds, rules.needed_on_hand(requests)
            )
            if len(levels) < len(wanted):
                raise DoesNotFitError
            expires_in_s = self._hold_seconds - levels[0].elapsed_s
            held = [
                Reservation(
                    order_id=request.order_id,
                    state="held",
                    lines=rules.in_product_order(request.lines),
                    expires_in_s=None if request.for_payment else expires_in_s,
                )
                for request in requests
            ]
            tx.emit([*(_event(h, 1) for h in held), *_exhausted(levels, wanted)])
            await faults.point("inventory.reserve.before_commit")
        return held

    async def _reserve_each(self, requests: Sequence[ReserveStock], *, guests: bool = False) -> Sequence[Outcome]:
        firsts: dict[int, ReserveStock] = {}
        for request in requests:
            firsts.setdefault(request.order_id, request)
        async with self._database.transaction() as tx:
            inserted = await store.insert_reservations(tx, [*map(_new, firsts.values())], self._hold_seconds)
            locked = await store.lock_reservations(tx, firsts.keys() - {r.order_id for r in inserted})
            touched = [*inserted, *(reservation for reservation in locked if reservation.is_overdue)]
            levels = await store.lock_levels(tx, _products(touched))
            held = await store.held_by_guests(tx, _products(inserted)) if guests else None
            ledger = StockLedger(levels, locked, inserted, held)
            outcomes = [ledger.reserve(request) for request in requests]
            await store.name_newest_order(tx, [one for one in outcomes if isinstance(one, AnotherOrder)])
            await store.write(tx, ledger.write_set())
            if guests and (kept := ledger.kept()):
                await store.insert_guest_holds(tx, kept)
            await faults.point("inventory.reserve.before_commit")
        return outcomes

    # ------------------------------------------------------------------------------------------------ commit, release

    async def commit(self, batch: Batch[CommitStock]) -> Sequence[Outcome]:
        """Each gets its reservation, committed, or `ReservationClosed` or `AnotherOrder`."""
        return await self._end([(request.order_id, request.order_nonce) for request in batch], "committed")

    async def release(self, batch: Batch[ReleaseStock]) -> Sequence[Outcome]:
        """Each gets its current reservation, however it ended, or `AnotherOrder`."""
        return await self._end([(request.order_id, request.order_nonce) for request in batch], "released")

    async def _end(self, orders: Sequence[OrderKey], state: Literal["committed", "released"]) -> Sequence[Outcome]:
        try:
            outcomes = await self._end_all(orders, state)
        except DoesNotFitError:
            outcomes = await self._end_each(orders, state)
        await faults.point(AFTER_COMMIT[state])
        return outcomes

    async def _end_all(self, orders: Sequence[OrderKey], state: Literal["committed", "released"]) -> Sequence[Outcome]:
        nonces = dict(orders)
        if any(nonces[order_id] != nonce for order_id, nonce in orders):
            raise DoesNotFitError
        async with self._database.transaction() as tx:
            ended = await _end_all_held(tx, nonces, state)
            await faults.point(BEFORE_COMMIT[state])
        return [ended[order_id] for order_id, _ in orders]

    async def _end_each(self, orders: Sequence[OrderKey], state: Literal["committed", "released"]) -> Sequence[Outcome]:
        nonces: dict[int, int] = {}
        for order_id, nonce in orders:
            nonces.setdefault(order_id, nonce)
        async with self._database.transaction() as tx:
            tombstones = await store.insert_tombstones(tx, nonces) if state == "released" else []
            locked = await store.lock_reservations(tx, nonces.keys() - {r.order_id for r in tombstones})
            levels = await store.lock_levels(tx, _products(r for r in locked if r.state == "held"))
            ledger = StockLedger(levels, [*tombstones, *locked])
            decide = ledger.commit if state == "committed" else ledger.release
            outcomes = [decide(order_id, nonce) for order_id, nonce in orders]
            await store.write(tx, ledger.write_set())
            await faults.point(BEFORE_COMMIT[state])
        return outcomes

    # -------------------------------------------------------------------------------------------------------- restock

    async def restock(self, batch: Batch[ReturnStock]) -> Sequence[Outcome]:
        """Each gets its reservation, or a refusal.

        These are `ReturnTooLarge`, `ReservationClosed`, `AnotherOrder`, `ReturnReferenceReused`, `InvalidRequest`.
        """
        refusals = [rules.check_lines(request.lines) for request in batch]
        valid = [i for i, refusal in enumerate(refusals) if refusal is None]
        if not valid:
            return _merged(refusals, [])
        async with self._database.transaction() as tx:
            outcomes = await _return_items(tx, [(batch[i], batch.actors[i]) for i in valid])
            await faults.point("inventory.restock.before_commit")
        await faults.point("inventory.restock.after_commit")
        return _merged(refusals, outcomes)

    # --------------------------------------------------------------------------------------------------------- expiry

    async def expire(self) -> int:
        """Ends up to `EXPIRED_AT_ONCE` expired reservations; gives how many."""
        async with self._database.transaction() as tx:
            overdue = await store.lock_overdue(tx, EXPIRED_AT_ONCE)
            if not overdue:
                return 0
            await _end_all_held(tx, overdue, "expired")
            await faults.point("inventory.expire.before_commit")
        await faults.point("inventory.expire.after_commit")
        return len(overdue)


async def _return_items(tx: Tx, requests: Sequence[tuple[ReturnStock, Actor]]) -> Sequence[Outcome]:
    locked = await store.lock_reservations(tx, {request.order_id for request, _ in requests})
    # Read under the lock of the reservation: a concurrent duplicate has committed its return, or has not begun.
    done = await store.returns_made(tx, {(request.order_id, request.reference) for request, _ in requests})
    ledger = StockLedger(await store.lock_levels(tx, _products(locked)), locked)
    outcomes: list[Outcome] = []
    for request, actor in requests:
        identity = (request.order_id, request.reference)
        outcome = ledger.return_items(request, actor, done.get(identity))
        if isinstance(outcome, Reservation):
            done.setdefault(identity, rules.in_product_order(request.lines))  # for a duplicate in the same batch
        outcomes.append(outcome)
    await store.write(tx, ledger.write_set())
    return outcomes


async def _end_all_held(tx: Tx, nonces: Mapping[int, int], state: ReservationState) -> Mapping[int, Reservation]:
    """Ends reservations. Raises `DoesNotFitError` unless all of them are held, for orders of these nonces."""
    rows = await fast_path.end_all_held(tx, nonces, state)
    if len(rows) < len(nonces):
        raise DoesNotFitError
    ended = [
        Reservation(
            order_id=row.order_id,
            state=state,
            lines=tuple(
                [
                    StockLine(product_id=product_id, quantity=quantity)
                    for product_id, quantity in zip(row.product_ids, row.quantities, strict=True)
                ]
            ),
            expires_in_s=None,
        )
        for row in rows
    ]
    moved = [_event(reservation, row.version) for reservation, row in zip(ended, rows, strict=True)]
    tx.emit([*moved, *(() if state == "committed" else _available(rows))])
    return {reservation.order_id: reservation for reservation in ended}


# -------------------------------------------------------------------------------------------------------------- events


def _event(reservation: Reservation, version: int) -> Outgoing:
    return rules.reservation_event(reservation.state, reservation.order_id, version, reservation.lines)


def _exhausted(levels: Iterable[fast_path.ReservedLevelRow], taken: Mapping[int, int]) -> Iterable[Outgoing]:
    for level in levels:
        before = level.available + taken[level.product_id]
        if event := rules.availability_event(level.product_id, level.version, before=before, after=level.available):
            yield event


def _available(rows: Iterable[fast_path.EndedRow]) -> Iterable[Outgoing]:
    """The events of products that had no available pieces before these reservations ended."""
    freed = Counter[int]()
    levels: dict[int, tuple[int, int]] = {}
    for row in rows:
        for i, product_id in enumerate(row.product_ids):
            freed[product_id] += row.quantities[i]
            levels[product_id] = row.level_versions[i], row.available[i]
    for product_id, (version, available) in sorted(levels.items()):
        before = available - freed[product_id]
        if event := rules.availability_event(product_id, version, before=before, after=available):
            yield event


# ------------------------------------------------------------------------------------------------------------- details


def _new(request: ReserveStock) -> NewReservation:
    lines = [ReservedLine(line.product_id, line.quantity) for line in rules.in_product_order(request.lines)]
    return NewReservation(request.order_id, request.order_nonce, request.for_payment, tuple(lines))


def _products(reservations: Iterable[StoredReservation]) -> set[int]:
    return {line.product_id for reservation in reservations for line in reservation.lines}


def _merged(refusals: Sequence[InvalidRequest | None], outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The refusal of each request, or the next of the outcomes."""
    others = iter(outcomes)
    return [next(others) if refusal is None else refusal for refusal in refusals]
