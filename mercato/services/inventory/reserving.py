"""Reservations, a batch at a time: reserve, commit, release, restock, and what ends by itself.

Every batch is one transaction: lock (in the order that `store.py` gives), decide (`rules.Books`), write. A crash before
its commit leaves nothing; whoever comes again after it finds the reservation as it is, and nothing is done twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Final

from mercato.chassis import faults
from mercato.chassis.contract import Actor, Batch, InvalidRequest, ServiceError
from mercato.chassis.db import Database, Tx
from mercato.contracts.inventory import CommitStock, ReleaseStock, Reservation, ReserveStock, ReturnStock

from . import rules, store
from .rules import Books, Standing

EXPIRED_AT_ONCE: Final = 500

faults.declare(
    "inventory.reserve.before_commit",
    "inventory.reserve.after_commit",
    "inventory.commit.before_commit",
    "inventory.commit.after_commit",
    "inventory.release.before_commit",
    "inventory.release.after_commit",
    "inventory.restock.before_commit",
    "inventory.restock.after_commit",
    "inventory.expire.before_commit",
    "inventory.expire.after_commit",
)

Outcome = Reservation | ServiceError


class Reserving:
    """`hold_seconds`: how long stock is held for an order whose payment has not begun."""

    def __init__(self, database: Database, hold_seconds: float) -> None:
        self._database = database
        self._hold_seconds = hold_seconds

    # -------------------------------------------------------------------------------------------------------- reserve

    async def reserve(self, batch: Batch[ReserveStock]) -> Sequence[Outcome]:
        refusals = [rules.check_lines(request.lines) for request in batch]
        fit = [request for request, refusal in zip(batch, refusals, strict=True) if refusal is None]
        if not fit:
            return _merged(refusals, [])
        async with self._database.transaction() as tx:
            outcomes = await self._reserve(tx, fit)
            await faults.point("inventory.reserve.before_commit")
        await faults.point("inventory.reserve.after_commit")
        return _merged(refusals, outcomes)

    async def _reserve(self, tx: Tx, requests: Sequence[ReserveStock]) -> Sequence[Outcome]:
        firsts: dict[int, ReserveStock] = {}
        for request in requests:
            firsts.setdefault(request.order_id, request)
        for_payment = [request.for_payment for request in firsts.values()]
        opened = await store.open_reservations(tx, list(firsts), for_payment, self._hold_seconds)
        new = {reservation.order_id for reservation in opened}
        standing = await store.lock_reservations(tx, firsts.keys() - new)
        wanted = {line.product_id for order_id in new for line in firsts[order_id].lines}
        levels = await store.lock_levels(tx, wanted | _products(r for r in standing if r.is_over))
        books = Books(levels, standing, opened)
        outcomes = [books.reserve(request) for request in requests]
        await store.write(tx, books.close())
        return outcomes

    # ------------------------------------------------------------------------------------------------ commit, release

    async def commit(self, batch: Batch[CommitStock]) -> Sequence[Outcome]:
        async with self._database.transaction() as tx:
            books = await _open_books(tx, await store.lock_reservations(tx, {r.order_id for r in batch}))
            outcomes = [books.commit(r.order_id, actor) for r, actor in zip(batch, batch.actors, strict=True)]
            await store.write(tx, books.close())
            await faults.point("inventory.commit.before_commit")
        await faults.point("inventory.commit.after_commit")
        return outcomes

    async def release(self, batch: Batch[ReleaseStock]) -> Sequence[Outcome]:
        return await self.release_orders([request.order_id for request in batch])

    async def release_orders(self, order_ids: Sequence[int]) -> Sequence[Reservation]:
        """One reservation for each, in order: as it is by now, whoever released it."""
        wanted = set(order_ids)
        async with self._database.transaction() as tx:
            buried = await store.bury(tx, list(wanted))
            standing = await store.lock_reservations(tx, wanted - {reservation.order_id for reservation in buried})
            books = await _open_books(tx, [*buried, *standing])
            outcomes = [books.release(order_id) for order_id in order_ids]
            await store.write(tx, books.close())
            await faults.point("inventory.release.before_commit")
        await faults.point("inventory.release.after_commit")
        return outcomes

    # -------------------------------------------------------------------------------------------------------- restock

    async def restock(self, batch: Batch[ReturnStock]) -> Sequence[Outcome]:
        refusals = [rules.check_lines(request.lines) for request in batch]
        fit = [i for i, refusal in enumerate(refusals) if refusal is None]
        if not fit:
            return _merged(refusals, [])
        async with self._database.transaction() as tx:
            outcomes = await _restock(tx, [(batch[i], batch.actors[i]) for i in fit])
            await faults.point("inventory.restock.before_commit")
        await faults.point("inventory.restock.after_commit")
        return _merged(refusals, outcomes)

    # --------------------------------------------------------------------------------------------------------- expiry

    async def expire(self) -> int:
        """Ends a bounded number of reservations whose time is over; gives how many."""
        async with self._database.transaction() as tx:
            overdue = await store.lock_overdue(tx, EXPIRED_AT_ONCE)
            if not overdue:
                return 0
            books = await _open_books(tx, overdue)
            for reservation in overdue:
                books.expire(reservation.order_id)
            await store.write(tx, books.close())
            await faults.point("inventory.expire.before_commit")
        await faults.point("inventory.expire.after_commit")
        return len(overdue)

    async def expire_forever(self, every_seconds: float) -> None:
        while True:
            if await self.expire() < EXPIRED_AT_ONCE:
                await asyncio.sleep(every_seconds)


async def _restock(tx: Tx, requests: Sequence[tuple[ReturnStock, Actor]]) -> Sequence[Outcome]:
    standing = await store.lock_reservations(tx, {request.order_id for request, _ in requests})
    # Looked up under the lock of the reservation: a twin has either committed its return, or has not begun.
    done = await store.returns_made(tx, {(request.order_id, request.reference) for request, _ in requests})
    books = await _open_books(tx, standing)
    outcomes: list[Outcome] = []
    for request, actor in requests:
        identity = (request.order_id, request.reference)
        outcome = books.look(request.order_id) if identity in done else books.restock(request, actor)
        if isinstance(outcome, Reservation):
            done.add(identity)  # a twin in the same batch finds it done
        outcomes.append(outcome)
    await store.write(tx, books.close())
    return outcomes


async def _open_books(tx: Tx, standing: Sequence[Standing]) -> Books:
    return Books(await store.lock_levels(tx, _products(standing)), standing)


def _products(reservations: Iterable[Standing]) -> set[int]:
    return {line.product_id for reservation in reservations for line in reservation.lines}


def _merged(refusals: Sequence[InvalidRequest | None], outcomes: Sequence[Outcome]) -> list[Outcome]:
    """For each request what it was refused with, or the next of the outcomes."""
    others = iter(outcomes)
    return [next(others) if refusal is None else refusal for refusal in refusals]
