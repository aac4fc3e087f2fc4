"""The operations that read orders, and those with which staff move them. The others: `placing.py`, `paying.py`,
`refunding.py`, `claiming.py`, `timeline.py`."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from mercato.chassis.contract import Actor, Batch, ServiceError, check_version, current
from mercato.chassis.observability import faults
from mercato.chassis.postgres.database import Database, Tx
from mercato.chassis.sagas.runner import Runner
from mercato.chassis.sagas.store import Saga
from mercato.contracts.order_history import History
from mercato.contracts.order_refusals import Axis, OrderNotFound, PaymentInProgress
from mercato.contracts.orders import (
    AwaitOrder,
    CancelOrder,
    GetHistory,
    GetOrder,
    ListOrders,
    MoveOrder,
    Order,
    OrderPage,
)
from mercato.contracts.roles import CUSTOMER

from . import history_store, list_store, read_store, rules, store
from .guests import Guests, without_email
from .locking import Locked, locked_order
from .paying import Paying
from .refunding import Refunding
from .timeline import entries_of

faults.declare("orders.move.before_commit", "orders.move.after_commit")


class OrdersService:
    """See `contracts/orders.py` for what each operation promises."""

    def __init__(
        self,
        database: Database,
        runner: Runner,
        *,
        paying: Paying,
        refunding: Refunding,
        guests: Guests,
    ) -> None:
        self._database = database
        self._runner = runner
        self._paying = paying
        self._refunding = refunding
        self._guests = guests

    async def get(self, batch: Batch[GetOrder]) -> Sequence[Order | ServiceError]:
        async with self._database.read() as tx:
            found = await read_store.get(tx, list({request.id for request in batch}))
        return [
            rules.visible(found[request.id].order if request.id in found else None, request.id, actor)
            if request.access_token is None
            else self._of_guest(found.get(request.id), request)
            for request, actor in zip(batch, batch.actors, strict=True)
        ]

    def _of_guest(self, record: read_store.OrderRecord | None, request: GetOrder) -> Order | OrderNotFound:
        if record is None or not self._guests.admits(record, request.access_token):
            return OrderNotFound(order_id=request.id)
        return without_email(record.order)

    async def list(self, request: ListOrders) -> OrderPage:
        actor = current.get().actor
        if actor.role == CUSTOMER:
            if request.user_id is not None and request.user_id != actor.id:
                return OrderPage(orders=(), total=0 if request.count else None)
            request = _only_own(request, actor)
        async with self._database.read() as tx:
            # One order more than asked for: whether there is a next page.
            following = None
            if list_store.is_scanned(request):
                orders, following = await list_store.scan_page(tx, request, request.limit + 1)
            else:
                orders = await list_store.list_page(tx, request, request.limit + 1)
        page = tuple(orders[: request.limit])
        total = await self._database.count(lambda tx: list_store.count(tx, request)) if request.count else None
        following = page[-1].id if len(orders) > request.limit else following
        return OrderPage(orders=page, next_before=following, total=total)

    async def move(self, request: MoveOrder) -> Order:
        """Moves status and fulfilment. Confirming and cancelling redirect the checkout, which moves stock and money."""
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
        """Both axes move or none: the second is validated before the first moves, which commits by itself."""
        order = await self._visible_order(request.id)
        assert request.status is not None
        after = msgspec.structs.replace(order, status=request.status)
        if request.fulfilment is not None and request.fulfilment != order.fulfilment:
            rules.check_move(after, "fulfilment", request.fulfilment)

    async def _move(self, request: MoveOrder, version: int | None) -> Order:
        async with locked_order(self._database, request.id) as (tx, locked):
            check_version(version, locked.order.version)
            _check_not_under_way(request, locked)
            order, returning = await self._move_locked(tx, request, locked)
            await faults.point("orders.move.before_commit")
        await faults.point("orders.move.after_commit")
        if returning is not None:
            self._runner.drive([returning])
        return order

    async def _move_locked(self, tx: Tx, request: MoveOrder, locked: Locked) -> tuple[Order, Saga | None]:
        """Moves a locked order. Gives the order as it is now and, where its goods are returned, the saga of that."""
        order = locked.order
        if request.status is not None:
            order = await _move_one(tx, order, "status", store.Move(order, status=request.status))
        if _is_returning(request, order):
            record = msgspec.structs.replace(locked.record, order=order)
            returning = await self._refunding.return_rest(tx, msgspec.structs.replace(locked, record=record))
            return (await read_store.get(tx, [order.id]))[order.id].order, returning
        if request.fulfilment is not None:
            order = await _move_one(tx, order, "fulfilment", store.Move(order, fulfilment=request.fulfilment))
        return order, None

    async def history(self, request: GetHistory) -> History:
        async with self._guests.acting(request.id, request.access_token), self._database.read() as tx:
            actor = current.get().actor
            await read_store.visible_record(tx, request.id, actor)
            return History(entries=entries_of(await history_store.history(tx, request.id), actor))

    async def settled(self, request: AwaitOrder) -> Order:
        async with self._guests.acting(request.id, request.access_token):
            await self._visible_order(request.id)
            await self._paying.wait_until_idle(request.id, request.wait_ms / 1_000, until_drained=True)
            record = await self._record(request.id)
            if request.refusals and (refusal := await self._paying.refusal(record)):
                raise refusal
        return record.order if request.access_token is None else without_email(record.order)

    async def _visible_order(self, order_id: int) -> Order:
        return (await self._record(order_id)).order

    async def _record(self, order_id: int) -> read_store.OrderRecord:
        async with self._database.read() as tx:
            return await read_store.visible_record(tx, order_id, current.get().actor)


def _check_not_under_way(request: MoveOrder, locked: Locked) -> None:
    """Raises `IllegalMove`, or `PaymentInProgress` where a checkout or a refund under way excludes the move."""
    order = locked.order
    is_moving = request.status is not None and request.status != order.status
    if request.status is not None and is_moving:
        rules.check_move(order, "status", request.status)
    if is_moving or _is_returning(request, order):
        locked.check_idle()
    wanted = {request.status if is_moving else None, request.fulfilment}
    if order.fulfilment == "unfulfilled" and wanted & rules.REFUNDED_BLOCKS and locked.record.is_being_refunded:
        raise PaymentInProgress(order_id=order.id)


def _is_returning(request: MoveOrder, order: Order) -> bool:
    return request.fulfilment == "returned" and order.fulfilment != "returned"


async def _move_one(tx: Tx, order: Order, axis: Axis, move: store.Move) -> Order:
    """The move of a locked order along one axis."""
    wanted: str = getattr(move, axis)
    if getattr(order, axis) == wanted:
        return order  # a retry of a move whose answer was lost
    rules.check_move(order, axis, wanted)
    [moved] = await store.move(tx, [move], current.get().actor)
    assert moved, "the row is locked: no other transaction can have moved it in between"
    return moved


def _only_own(request: ListOrders, actor: Actor) -> ListOrders:
    return msgspec.structs.replace(request, user_id=actor.id)
