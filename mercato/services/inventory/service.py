"""The operations of inventory, in contract order."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from mercato.chassis.contract import Batch, ServiceError
from mercato.chassis.db import Database
from mercato.contracts.inventory import (
    AdjustedLevel,
    AdjustLevel,
    CommitStock,
    GetLevel,
    Level,
    LevelPage,
    ListLevels,
    ReleaseStock,
    Reservation,
    ReserveStock,
    ReturnStock,
    SetLevel,
    StockLine,
    StockStep,
    StockTrace,
    TraceStock,
)
from mercato.contracts.products import GetProduct, Products

from . import rules, store
from .counting import Counting
from .reserving import Reserving


class InventoryService:
    """See `contracts/inventory.py` for what each operation promises."""

    def __init__(self, database: Database, products: Products, reserving: Reserving, counting: Counting) -> None:
        self._database = database
        self._products = products
        self._reserving = reserving
        self._counting = counting

    async def reserve(self, batch: Batch[ReserveStock]) -> Sequence[Reservation | ServiceError]:
        return await self._reserving.reserve(batch)

    async def commit(self, batch: Batch[CommitStock]) -> Sequence[Reservation | ServiceError]:
        return await self._reserving.commit(batch)

    async def release(self, batch: Batch[ReleaseStock]) -> Sequence[Reservation | ServiceError]:
        return await self._reserving.release(batch)

    async def restock(self, batch: Batch[ReturnStock]) -> Sequence[Reservation | ServiceError]:
        return await self._reserving.restock(batch)

    async def set(self, batch: Batch[SetLevel]) -> Sequence[Level | ServiceError]:
        return await self._counting.set(batch)

    async def adjust(self, batch: Batch[AdjustLevel]) -> Sequence[AdjustedLevel | ServiceError]:
        return await self._counting.adjust(batch)

    async def levels(self, batch: Batch[GetLevel]) -> Sequence[Level | ServiceError]:
        """A product that nobody has ever counted has nothing; whether there is such a product, products knows."""
        wanted = {request.product_id for request in batch}
        async with self._database.read() as tx:
            counted = await store.levels(tx, list(wanted))
        uncounted = sorted(wanted - counted.keys())
        asked = await self._products.get.many([GetProduct(id=i) for i in uncounted]) if uncounted else ()
        refusals = {i: found for i, found in zip(uncounted, asked, strict=True) if isinstance(found, ServiceError)}
        return [_level(request.product_id, counted, refusals) for request in batch]

    async def list(self, request: ListLevels) -> LevelPage:
        async with self._database.read() as tx:
            # One more than asked for tells whether there is a next page.
            levels = await store.list_levels(tx, request.below, request.after or 0, request.limit + 1)
        page = tuple(levels[: request.limit])
        return LevelPage(levels=page, next_after=page[-1].product_id if len(levels) > request.limit else None)

    async def trace(self, request: TraceStock) -> StockTrace:
        async with self._database.read() as tx:
            # The reservation first: what moves meanwhile can then only be shown too early, never be left out.
            reservation = await store.traced_reservation(tx, request.order_id)
            if reservation is None:
                return StockTrace(steps=())
            lines = await store.lines_of(tx, [request.order_id])
            movements = await store.traced_movements(tx, request.order_id)
        return StockTrace(steps=tuple(_steps(reservation, lines, movements)))


def _level(product_id: int, counted: dict[int, Level], refusals: dict[int, ServiceError]) -> Level | ServiceError:
    if product_id in refusals:
        return refusals[product_id].copy()
    return counted.get(product_id) or rules.never_counted(product_id)


def _steps(
    reservation: store.TracedReservationRow,
    lines: Sequence[store.LineRow],
    movements: Sequence[store.TracedMovementRow],
) -> list[StockStep]:
    held = tuple(StockLine(product_id=line.product_id, quantity=line.quantity) for line in lines)
    if not held:
        return []  # nothing was ever held: a release came before the reserve
    steps = [StockStep(what="held", lines=held, at=reservation.created_at)]
    if reservation.state == "released" or reservation.state == "expired":
        steps.append(StockStep(what=reservation.state, lines=held, at=reservation.updated_at))
    for (kind, _), group in itertools.groupby(movements, key=lambda movement: (movement.kind, movement.reference)):
        moved = tuple(group)
        back = tuple(StockLine(product_id=line.product_id, quantity=line.quantity) for line in moved)
        steps.append(StockStep(what="committed" if kind == "sale" else "returned", lines=back, at=moved[0].at))
    return steps
