"""The operations of orders, in contract order."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from mercato.chassis import faults
from mercato.chassis.contract import Actor, Batch, ServiceError, current
from mercato.chassis.db import Database, Tx
from mercato.chassis.runner import Runner
from mercato.chassis.saga import Saga
from mercato.contracts.orders import (
    AwaitOrder,
    Axis,
    CancelOrder,
    GetHistory,
    GetOrder,
    GetTimeline,
    History,
    ListOrders,
    MoveOrder,
    MovePayment,
    Order,
    OrderNotFound,
    OrderPage,
    PaidOrder,
    PayOrder,
    PlacedOrder,
    PlaceOrder,
    Refund,
    RefundOrder,
    ReturnOrder,
    Timeline,
)
from mercato.contracts.roles import CUSTOMER

from . import rules, store
from .paying import Paying, check_version
from .placing import Placing
from .refunding import Refunding, check_still, lock_checkout
from .timeline import Tracing

faults.declare("orders.move.before_commit", "orders.move.after_commit")


class OrdersService:
    """See `contracts/orders.py` for what each operation promises."""

    def __init__(
        self,
        database: Database,
        runner: Runner,
        *,
        placing: Placing,
        paying: Paying,
        refunding: Refunding,
        tracing: Tracing,
    ) -> None:
        self._database = database
        self._runner = runner
        self._placing = placing
        self._paying = paying
        self._refunding = refunding
        self._tracing = tracing

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
        """Status and fulfilment by hand. Confirming and cancelling, which concern stock and money, are of checkout."""
        version = request.version
        if request.status in ("cancelled", "confirmed") and request.fulfilment is not None:
            await self._check_both(request)
        if request.status == "cancelled":
            order = await self._paying.cancel(CancelOrder(id=request.id, version=version))
        elif request.status == "confirmed":
            order = await self._paying.confirm(request.id, version)
        else:
            return await self._move(request, version)
        if request.fulfilment is None:
            return order
        return await self._move(MoveOrder(id=request.id, fulfilment=request.fulfilment), None)

    async def _check_both(self, request: MoveOrder) -> None:
        """Both axes move or none: the second is judged before the first, which commits by itself, has moved."""
        order = await self._seen(request.id)
        assert request.status is not None
        after = msgspec.structs.replace(order, status=request.status)
        if request.fulfilment is not None and request.fulfilment != order.fulfilment:
            rules.check_move(after, "fulfilment", request.fulfilment)

    async def _move(self, request: MoveOrder, version: int | None) -> Order:
        returning: Saga | None = None
        async with self._database.transaction() as tx:
            # What a checkout saves next starts from where the order is now. Goods are shipped whatever it does.
            concerns_checkout = request.status is not None or request.fulfilment == "returned"
            checkout = await lock_checkout(tx, request.id) if concerns_checkout else None
            order = await self._locked(tx, request.id)
            check_version(order, version)
            is_moving = request.status is not None and request.status != order.status
            is_returning = request.fulfilment == "returned" and order.fulfilment != "returned"
            if request.status is not None and is_moving:
                rules.check_move(order, "status", request.status)
            if checkout is not None and (is_moving or is_returning):
                check_still(checkout)
            if request.status is not None:
                order = await _move_one(tx, order, "status", store.Move(order, status=request.status))
            if is_returning:
                returning = await self._refunding.take_back_rest(tx, order)
                [order] = (await store.get(tx, [order.id])).values()
            elif request.fulfilment is not None:
                order = await _move_one(tx, order, "fulfilment", store.Move(order, fulfilment=request.fulfilment))
            await faults.point("orders.move.before_commit")
        await faults.point("orders.move.after_commit")
        if returning is not None:
            self._runner.drive([returning])
        return order

    async def cancel(self, request: CancelOrder) -> Order:
        return await self._paying.cancel(request)

    async def history(self, request: GetHistory) -> History:
        async with self._database.read() as tx:
            order = (await store.get(tx, [request.id])).get(request.id)
            _raise_if_error(_visible(order, request.id, current.get().actor))
            return History(entries=tuple(await store.history(tx, request.id)))

    async def settled(self, request: AwaitOrder) -> Order:
        await self._seen(request.id)
        await self._paying.rest(request.id, request.wait_ms / 1_000)
        return await self._seen(request.id)

    async def timeline(self, request: GetTimeline) -> Timeline:
        await self._seen(request.id)
        return await self._tracing.timeline(request.id)

    async def pay(self, request: PayOrder) -> PaidOrder:
        return await self._paying.pay(request)

    async def capture(self, request: MovePayment) -> PaidOrder:
        return await self._paying.capture(request)

    async def void(self, request: MovePayment) -> PaidOrder:
        return await self._paying.void(request)

    async def refund(self, request: RefundOrder) -> Refund:
        return await self._refunding.refund(request)

    async def take_back(self, request: ReturnOrder) -> Refund:
        return await self._refunding.take_back(request)

    async def _seen(self, order_id: int) -> Order:
        async with self._database.read() as tx:
            order = (await store.get(tx, [order_id])).get(order_id)
        return _raise_if_error(_visible(order, order_id, current.get().actor))

    async def _locked(self, tx: Tx, order_id: int) -> Order:
        return _raise_if_error(_visible(await store.get_locked(tx, order_id), order_id, current.get().actor))


async def _move_one(tx: Tx, order: Order, axis: Axis, move: store.Move) -> Order:
    """The move of a locked order along one axis."""
    wanted: str = getattr(move, axis)
    if getattr(order, axis) == wanted:
        return order  # a retry of a move whose answer was lost
    rules.check_move(order, axis, wanted)
    [moved] = await store.move(tx, [move], current.get().actor)
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
