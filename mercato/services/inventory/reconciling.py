"""Finds stock that is held for an order that does not want it any more, and releases it.

A hold whose payment has begun has no end of its own: orders commits or releases it. Inventory asks orders about one
that has stood for a while, and releases it on the word of orders alone: the order is cancelled, or does not exist. Both
are final, so that it does not matter what happens between the answer and the release; and a release is done once,
whatever else releases.

What is held for an order that was sold is not touched: orders commits it when it continues that order
(`orders/reconciling.py`), and the audit reports it for as long as it stands (S6).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import structlog

from mercato.chassis.contract import MAX_ID, ServiceError
from mercato.chassis.hosting.rounds import repairs
from mercato.chassis.observability.telemetry import Telemetry
from mercato.chassis.postgres.database import Database
from mercato.contracts.orders import GetOrder, Order, OrderNotFound, Orders

from . import store
from .reserving import OrderKey, Reserving

RELEASED: Final = "hold_released"
ASKED_AT_ONCE: Final = 500

log = structlog.stdlib.get_logger("mercato.inventory")


class Reconciling:
    """`quiet_seconds`: how long a hold without an end must have stood before orders is asked about it."""

    def __init__(
        self,
        database: Database,
        orders: Orders,
        reserving: Reserving,
        telemetry: Telemetry,
        *,
        quiet_seconds: float,
    ) -> None:
        self._database = database
        self._orders = orders
        self._reserving = reserving
        self._quiet_seconds = quiet_seconds
        self._released = repairs(telemetry).labels(RELEASED)

    async def look(self, before: int | None) -> int | None:
        """Releases what is held for no order among a page of reservations; gives the place of the next page."""
        before = MAX_ID + 1 if before is None else before
        async with self._database.read() as tx:
            holds = await store.indefinite_holds(tx, before, self._quiet_seconds, ASKED_AT_ONCE)
            after = await store.end_of_page(tx, before)
        await self._release(
            [(order_id, holds[order_id]) for order_id, order in await self._ask([*holds]) if _is_over(order)]
        )
        return after

    async def _ask(self, order_ids: Sequence[int]) -> list[tuple[int, Order | ServiceError]]:
        """What orders says of each."""
        if not order_ids:
            return []
        orders = await self._orders.get.many([GetOrder(id=order_id) for order_id in order_ids])
        return list(zip(order_ids, orders, strict=True))

    async def _release(self, orders: Sequence[OrderKey]) -> None:
        if orders:
            await self._reserving.release_orders(orders)
            self._released.inc(len(orders))
            log.warning("holds_released", orders=[order_id for order_id, _ in orders])


def _is_over(order: Order | ServiceError) -> bool:
    """An error of the service, because it is unavailable, says nothing about the order."""
    return order.status == "cancelled" if isinstance(order, Order) else isinstance(order, OrderNotFound)
