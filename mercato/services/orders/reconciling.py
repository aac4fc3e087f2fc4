"""Resumes stalled checkouts, and releases stock that is held for no order.

A saga is parked when no time and no driver will wake it. A parked saga is stalled where its order does not wait for a
request at its step. A sweeper reclaims the sagas of a process that dies, and nothing in this service parks a saga that
stalls: a stalled one has another cause, such as a faulty release, a restored database, or a manual change. Resuming is
safe nevertheless: a step calls with its usual keys, gets what was done with them as the answer, and decides by that.

A pending order without any saga is not resumed: which calls were made for it is unknown. The audit reports it (O4), as
it does every saga that is still stalled after a while.

An indefinite hold, whose payment has begun, does not expire: orders commits or releases it. This module scans such
holds once they are old, and releases those whose order is cancelled, or does not exist with this id and this nonce.
Both are final, so that nothing between the scan and the release can change it; and a release is done once, even where
others release as well. The hold of an order that was sold is not changed: the saga of that order commits it, and the
audit reports it until then (S6).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import structlog

from mercato.chassis.hosting.table_scan import repairs
from mercato.chassis.observability import faults
from mercato.chassis.observability.telemetry import Telemetry
from mercato.chassis.postgres.database import Database
from mercato.chassis.sagas import store as saga
from mercato.chassis.sagas.store import Key, Next, Saga
from mercato.contracts.inventory import Hold, Inventory, ListHolds, ReleaseStock, Reservation

from . import read_store, reconciliation_store, steps
from .steps import CHECKOUT

RESUMED: Final = "order_resumed"
RELEASED: Final = "hold_released"

faults.declare("orders.reconcile.before_commit", "orders.reconcile.after_commit")

log = structlog.stdlib.get_logger("mercato.orders")


class Reconciling:
    """`quiet_seconds`: how long a saga must not have been saved before it can count as stalled."""

    def __init__(self, database: Database, telemetry: Telemetry, *, quiet_seconds: float) -> None:
        self._database = database
        self._quiet_seconds = quiet_seconds
        self._resumed = repairs(telemetry).labels(RESUMED)

    async def resume_page(self, before: Key | None) -> Key | None:
        """Resumes the stalled sagas of a page; gives the place of the next page (`table_scan.py`).

        Two processes that find the same saga resume it once: of two saves of one version, the second is refused.
        """
        async with self._database.read() as tx:
            parked = await reconciliation_store.parked(tx, before, self._quiet_seconds)
            after = await reconciliation_store.end_of_page(tx, before)
        found = [(row, step) for row in parked if (step := _resumed(row))]
        if found:
            await self._resume([(row.saga(), Next(step, row.state, wake_s=0.0)) for row, step in found])
        return after

    async def _resume(self, found: list[tuple[Saga, Next]]) -> None:
        """Makes them due: any sweeper reclaims them at once."""
        async with self._database.transaction() as tx:
            resumed = await saga.save(tx, found)
            await faults.point("orders.reconcile.before_commit")
        await faults.point("orders.reconcile.after_commit")
        if resumed:
            self._resumed.inc(len(resumed))
            log.warning("orders_resumed", sagas=[key for key, _ in resumed])


class HoldReconciling:
    """`quiet_seconds`: how old an indefinite hold must be before it is scanned."""

    def __init__(self, database: Database, inventory: Inventory, telemetry: Telemetry, *, quiet_seconds: float) -> None:
        self._database = database
        self._inventory = inventory
        self._quiet_seconds = quiet_seconds
        self._released = repairs(telemetry).labels(RELEASED)

    async def release_page(self, before: int | None) -> int | None:
        """Releases the holds of a page that belong to no order; gives the place of the next page."""
        page = await self._inventory.holds(ListHolds(before=before, quiet_seconds=self._quiet_seconds))
        async with self._database.read() as tx:
            orders = await read_store.get(tx, [hold.order_id for hold in page.holds]) if page.holds else {}
        over = [hold for hold in page.holds if _is_over(hold, orders.get(hold.order_id))]
        if over:
            await self._release(over)
        return page.next_before

    async def _release(self, holds: Sequence[Hold]) -> None:
        requests = [
            ReleaseStock(order_id=h.order_id, idempotency_key=f"order:{h.order_id}:release", order_nonce=h.order_nonce)
            for h in holds
        ]
        outcomes = await self._inventory.release.many(requests)
        if released := [outcome.order_id for outcome in outcomes if isinstance(outcome, Reservation)]:
            self._released.inc(len(released))
            log.warning("holds_released", orders=released)


def _is_over(hold: Hold, record: read_store.OrderRecord | None) -> bool:
    return record is None or record.nonce != hold.order_nonce or record.order.status == "cancelled"


def _resumed(row: reconciliation_store.ParkedRow) -> str | None:
    """The step with which a parked saga continues; None: it waits rightly."""
    return steps.resumed(row.step, row.status, row.payment) if row.kind == CHECKOUT else row.step
