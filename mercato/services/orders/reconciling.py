"""Finds parked checkouts whose order is not where it may rest, and resumes them.

A process that dies leaves sagas that a sweeper takes over, and nothing in this service parks a saga whose order is not
at rest. What is found here has another cause: a release with a fault, a database that was restored, a change by hand.
Resuming is safe all the same: a step asks with its usual keys, hears what was done with them, and decides by that.

A pending order without any saga is not resumed: what was asked for it is unknown. The audit reports it (O4), as it does
whatever is still not at rest after a while.
"""

from __future__ import annotations

from typing import Final

import structlog

from mercato.chassis.hosting.rounds import repairs
from mercato.chassis.observability import faults
from mercato.chassis.observability.telemetry import Telemetry
from mercato.chassis.postgres.database import Database
from mercato.chassis.sagas import store as saga
from mercato.chassis.sagas.store import Key, Next, Saga

from . import reconciliation_store, steps
from .steps import CHECKOUT

RESUMED: Final = "order_resumed"

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


def _resumed(row: reconciliation_store.ParkedRow) -> str | None:
    """The step at which a parked saga goes on; None: it is parked rightly."""
    return steps.resumed(row.step, row.status, row.payment) if row.kind == CHECKOUT else row.step
