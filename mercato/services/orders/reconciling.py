"""Finds parked checkouts whose order is not where it may rest, and resumes them; and stock that is held for no order.

A process that dies leaves sagas that a sweeper takes over, and nothing in this service parks a saga whose order is not
at rest. What is found here has another cause: a release with a fault, a database that was restored, a change by hand.
Resuming is safe all the same: a step asks with its usual keys, hears what was done with them, and decides by that.

A pending order without any saga is not resumed: what was asked for it is unknown. The audit reports it (O4), as it does
whatever is still not at rest after a while.

A hold whose payment has begun has no end of its own: orders commits or releases it. Orders scans the holds that have
stood for a while, and releases those of which it knows that they are over: the order is cancelled, or there is none
with this id and this nonce. Both are final, so that it does not matter what happens between the scan and the release;
and a release is done once, whatever else releases. What is held for an order that was sold is not touched: the saga of
that order commits it, and the audit reports it for as long as it stands (S6).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import structlog

from mercato.chassis.hosting.rounds import repairs
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
    """`quiet_seconds`: how long a saga must not have been saved before it counts as left."""

    def __init__(self, database: Database, telemetry: Telemetry, *, quiet_seconds: float) -> None:
        self._database = database
        self._quiet_seconds = quiet_seconds
        self._resumed = repairs(telemetry).labels(RESUMED)

    async def look(self, before: Key | None) -> Key | None:
        """Resumes what is found among a page of sagas; gives the place of the next page (`rounds.py`).

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
        """Any sweeper takes them over at once."""
        async with self._database.transaction() as tx:
            resumed = await saga.save(tx, found)
            await faults.point("orders.reconcile.before_commit")
        await faults.point("orders.reconcile.after_commit")
        if resumed:
            self._resumed.inc(len(resumed))
            log.warning("orders_resumed", sagas=[key for key, _ in resumed])


class HoldReconciling:
    """`quiet_seconds`: how long a hold without an end must have stood before it is looked at."""

    def __init__(self, database: Database, inventory: Inventory, telemetry: Telemetry, *, quiet_seconds: float) -> None:
        self._database = database
        self._inventory = inventory
        self._quiet_seconds = quiet_seconds
        self._released = repairs(telemetry).labels(RELEASED)

    async def look(self, before: int | None) -> int | None:
        """Releases what is held for no order among a page of holds; gives the place of the next page."""
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
    """The step at which a parked saga goes on; None: it is parked rightly."""
    return steps.resumed(row.step, row.status, row.payment) if row.kind == CHECKOUT else row.step
