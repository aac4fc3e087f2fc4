"""The operations of orders, in contract order."""

from __future__ import annotations

from collections.abc import Sequence

from mercato.chassis import faults
from mercato.chassis.contract import Actor, Batch, ServiceError, StaleVersion, current
from mercato.chassis.db import Database, Tx
from mercato.contracts.orders import (
    Axis,
    CancelOrder,
    GetHistory,
    GetOrder,
    History,
    ListOrders,
    MoveOrder,
    Order,
    OrderNotFound,
    OrderPage,
    PlacedOrder,
    PlaceOrder,
)
from mercato.contracts.roles import CUSTOMER

from . import rules, store
from .placing import Placing

faults.declare("orders.move.before_commit", "orders.move.after_commit")


class OrdersService:
    """See `contracts/orders.py` for what each operation promises."""

    def __init__(self, database: Database, placing: Placing) -> None:
        self._database = database
        self._placing = placing

    async def place(self, batch: Batch[PlaceOrder]) -> Sequence[PlacedOrder | ServiceError]:
        return await self._placing.place(batch)

    async def get(self, batch: Batch[GetOrder]) -> Sequence[Order | ServiceError]:
        async with self._database.read() as tx:
            found = await store.get(tx, list({request.id for request in batch}))
        return [
            _visible(found.get(request.id), request.id, actor)
            for request, actor in zip(batch, batch.actors, strict=True)
        ]

    async def list(self, request: ListOrders) -> OrderPage:
        actor = current.get().actor
        if actor.role == CUSTOMER:
            if request.user_id is not None and request.user_id != actor.id:
                return OrderPage(orders=())
            request = _only_own(request, actor)
        async with self._database.read() as tx:
            # One more than asked for tells whether there is a next page.
            orders = await store.list_page(tx, request, request.limit + 1)
        page = tuple(orders[: request.limit])
        return OrderPage(orders=page, next_before=page[-1].id if len(orders) > request.limit else None)

    async def move(self, request: MoveOrder) -> Order:
        wanted: list[tuple[Axis, str]] = []
        if request.status is not None:
            wanted.append(("status", request.status))
        if request.fulfilment is not None:
            wanted.append(("fulfilment", request.fulfilment))
        async with self._database.transaction() as tx:
            order = await self._locked(tx, request.id, request.version)
            for axis, state in wanted:
                order = await self._move(tx, order, axis, state)
            await faults.point("orders.move.before_commit")
        await faults.point("orders.move.after_commit")
        return order

    async def cancel(self, request: CancelOrder) -> Order:
        async with self._database.transaction() as tx:
            order = await self._locked(tx, request.id, request.version)
            if order.status != "cancelled":
                rules.check_cancel(order, current.get().actor)
            order = await self._move(tx, order, "status", "cancelled", request.reason)
            await faults.point("orders.move.before_commit")
        await faults.point("orders.move.after_commit")
        return order

    async def history(self, request: GetHistory) -> History:
        async with self._database.read() as tx:
            order = (await store.get(tx, [request.id])).get(request.id)
            _raise_if_error(_visible(order, request.id, current.get().actor))
            return History(entries=tuple(await store.history(tx, request.id)))

    async def _locked(self, tx: Tx, order_id: int, version: int | None) -> Order:
        order = _raise_if_error(_visible(await store.get_locked(tx, order_id), order_id, current.get().actor))
        if version is not None and version != order.version:
            raise StaleVersion(expected=version, actual=order.version)
        return order

    async def _move(self, tx: Tx, order: Order, axis: Axis, wanted: str, reason: str = "") -> Order:
        if getattr(order, axis) == wanted:
            return order  # a retry of a move whose answer was lost
        rules.check_move(order, axis, wanted)
        sources = rules.sources(axis, wanted)
        moved = await store.move(tx, order, axis, wanted, sources, actor=current.get().actor, reason=reason)
        assert moved, "the row is locked: nobody can have moved it in between"
        return moved


def _visible(order: Order | None, order_id: int, actor: Actor) -> Order | ServiceError:
    """Another's order answers exactly like one that does not exist."""
    if order is None or not rules.may_see(actor, order.user_id):
        return OrderNotFound(order_id=order_id)
    return order


def _raise_if_error(order: Order | ServiceError) -> Order:
    if isinstance(order, ServiceError):
        raise order
    return order


def _only_own(request: ListOrders, actor: Actor) -> ListOrders:
    return ListOrders(
        user_id=actor.id,
        status=request.status,
        payment=request.payment,
        fulfilment=request.fulfilment,
        before=request.before,
        limit=request.limit,
    )
