"""An order and its checkout, locked for a request: no driver saves, and no other request moves it, meanwhile.

Every transaction of this service locks in one order: the saga if there is one, then the order. A request that finds no
saga locks the order and reads the saga again: sagas of an order are inserted under its lock, so that none can appear
from then on. Where one has appeared in between, the request rolls back and begins again.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import Final

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

TRIES: Final = 20
"""A try fails only where a checkout begins between its two reads of the saga."""


class Locked(msgspec.Struct, frozen=True):
    """An order, and its checkout where one is under way or waits."""

    record: OrderRecord
    checkout: Saga | None
    state: Checkout

    @property
    def order(self) -> Order:
        return self.record.order

    def check_idle(self) -> None:
        """Raises `PaymentInProgress` where the checkout is at work: its next save starts from the order as it is."""
        if self.checkout is not None and self.checkout.step not in ("awaiting", "authorized"):
            raise PaymentInProgress(order_id=self.record.id)


class _CheckoutAppeared(Exception):
    """A checkout was begun between the two reads of its saga."""


@contextlib.asynccontextmanager
async def locked_order(
    database: Database, order_id: int, *, lock_seconds: float | None = None
) -> AsyncGenerator[tuple[Tx, Locked]]:
    """A transaction in which the order and its checkout are locked.

    Raises `OrderNotFound` also for an order that the caller may not see; with `lock_seconds`, `LockTimeout` where
    another transaction holds a lock for longer.
    """
    for _ in range(TRIES):
        try:
            async with database.transaction() as tx:
                if lock_seconds is not None:
                    await read_store.bound_lock_waits(tx, lock_seconds)
                yield tx, await _lock(tx, order_id)
                return
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
