"""An order and its checkout, locked for a request: no driver saves, and no other request moves it, meanwhile.

One lock order, for every transaction of this service: the saga if there is one, then the order. A request that finds no
saga locks the order and looks for a saga again: sagas of an order are made under its lock, so that none can appear from
then on. Where one has appeared in between, the request lets go of the order and begins again.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import msgspec

from mercato.chassis.contract import Overloaded, current
from mercato.chassis.postgres.database import Database, Tx
from mercato.chassis.sagas import store as saga
from mercato.chassis.sagas.store import Saga
from mercato.contracts.order_refusals import OrderNotFound, PaymentInProgress
from mercato.contracts.orders import Order

from . import read_store, rules
from .read_store import OrderRecord
from .steps import CHECKOUT, Checkout

T = TypeVar("T")

ROUNDS: Final = 20
"""Each needs a checkout that begins and ends in the middle of this request."""


class Locked(msgspec.Struct, frozen=True):
    """An order, and its checkout where one is under way or waits."""

    record: OrderRecord
    checkout: Saga | None
    state: Checkout

    @property
    def order(self) -> Order:
        return self.record.order

    def check_idle(self) -> None:
        """Raises `PaymentInProgress` where the checkout is at work: its next save starts from where the order is."""
        if self.checkout is not None and self.checkout.step not in ("awaiting", "authorized"):
            raise PaymentInProgress(order_id=self.record.id)


class _CheckoutAppeared(Exception):
    """A checkout was begun between the two looks for it."""


async def in_lock(
    database: Database, order_id: int, work: Callable[[Tx, Locked], Awaitable[T]], *, lock_seconds: float | None = None
) -> T:
    """Runs `work` in a transaction in which the order and its checkout are locked; gives what it gives.

    Raises `OrderNotFound` also for an order that the caller may not see, and what `work` raises; with `lock_seconds`,
    `LockTimeout` where another transaction holds a lock for longer.
    """
    for _ in range(ROUNDS):
        try:
            async with database.transaction() as tx:
                if lock_seconds is not None:
                    await read_store.bound_lock_waits(tx, lock_seconds)
                return await work(tx, await _lock(tx, order_id))
        except _CheckoutAppeared:
            continue
    raise Overloaded(operation="orders")


async def _lock(tx: Tx, order_id: int) -> Locked:
    key = (order_id, CHECKOUT, "")
    checkout = await saga.lock(tx, key)
    record = (await read_store.lock(tx, [order_id])).get(order_id)
    order = rules.visible(record.order if record else None, order_id, current.get().actor)
    if record is None or isinstance(order, OrderNotFound):
        raise OrderNotFound(order_id=order_id)
    if checkout is None:
        if await saga.find(tx, key) is not None:
            raise _CheckoutAppeared
        return Locked(record, None, Checkout(attempt=record.payment_attempt))
    return Locked(record, checkout, msgspec.json.decode(checkout.state, type=Checkout))
