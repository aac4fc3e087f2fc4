"""The read operations of inventory. Those that change stock are in `reserving.py` and `counting.py`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Final

from mercato.chassis.contract import MAX_ID, Batch, ServiceError
from mercato.chassis.postgres.database import Database
from mercato.contracts.inventory import (
    GetLevel,
    HoldPage,
    Level,
    LevelPage,
    ListHolds,
    ListLevels,
    StockLine,
    StockStep,
    StockTrace,
    TraceStock,
)
from mercato.contracts.products import GetProduct, Products

from . import rules, store

ABOVE_ALL_IDS: Final = MAX_ID + 1


class Reading:
    """See `contracts/inventory.py` for what each operation promises."""

    def __init__(self, database: Database, products: Products) -> None:
        self._database = database
        self._products = products

    async def levels(self, batch: Batch[GetLevel]) -> Sequence[Level | ServiceError]:
        """A product that was never counted has an empty level, or `ProductNotFound` from products."""
        wanted = {request.product_id for request in batch}
        async with self._database.read() as tx:
            counted = await store.levels(tx, list(wanted))
        uncounted = sorted(wanted - counted.keys())
        answers = await self._products.get.many([GetProduct(id=i) for i in uncounted]) if uncounted else ()
        refusals = {i: found for i, found in zip(uncounted, answers, strict=True) if isinstance(found, ServiceError)}
        return [_level(request.product_id, counted, refusals) for request in batch]

    async def list(self, request: ListLevels) -> LevelPage:
        async with self._database.read() as tx:
            # One more than requested shows whether there is a next page.
            levels = await store.list_levels(tx, request.below, request.after or 0, request.limit + 1)
        page = tuple(levels[: request.limit])
        total = None
        if request.count:
            total = await self._database.count(lambda tx: store.count_levels(tx, request.below))
        following = page[-1].product_id if len(levels) > request.limit else None
        return LevelPage(levels=page, next_after=following, total=total)

    async def holds(self, request: ListHolds) -> HoldPage:
        before = ABOVE_ALL_IDS if request.before is None else request.before
        async with self._database.read() as tx:
            holds = await store.indefinite_holds(tx, before, request.quiet_seconds)
            return HoldPage(holds=tuple(holds), next_before=await store.end_of_page(tx, before))

    async def trace(self, request: TraceStock) -> StockTrace:
        async with self._database.read() as tx:
            # The reservation is read first: a return that commits in between is then shown early, and never missed.
            reservation = await store.traced_reservation(tx, request.order_id)
            if reservation is None or reservation.nonce != request.order_nonce:
                return StockTrace(steps=())
            returns = await store.traced_returns(tx, request.order_id) if reservation.state == "committed" else []
        return StockTrace(steps=tuple(_steps(reservation, returns)))


def _level(product_id: int, counted: dict[int, Level], refusals: dict[int, ServiceError]) -> Level | ServiceError:
    if product_id in refusals:
        return refusals[product_id].copy()
    return counted.get(product_id) or rules.never_counted(product_id)


def _steps(reservation: store.TracedReservationRow, returns: Sequence[store.TracedReturnRow]) -> list[StockStep]:
    held = tuple(map(_line, reservation.product_ids, reservation.quantities))
    if not held:
        return []  # a tombstone: nothing was ever held
    steps = [StockStep(what="held", lines=held, at=reservation.created_at)]
    if reservation.state != "held":
        assert reservation.ended_at is not None
        steps.append(StockStep(what=reservation.state, lines=held, at=reservation.ended_at))
    for _, group in itertools.groupby(returns, key=lambda line: line.reference):
        lines = tuple(group)
        returned = tuple(_line(line.product_id, line.quantity) for line in lines)
        steps.append(StockStep(what="returned", lines=returned, at=lines[0].at))
    return steps


def _line(product_id: int, quantity: int) -> StockLine:
    return StockLine(product_id=product_id, quantity=quantity)
