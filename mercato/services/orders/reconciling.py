"""Orders that nobody carries on are found, and carried on.

Whoever dies leaves a lease behind that runs out, and a sweeper takes over; nothing in this service lets a saga sleep
whose order is not at rest. What is found here was caused by something else: a release that had a mistake, a database
that was restored, a hand that wanted to help. Carrying it on is safe all the same. A step asks with the keys that it
has always had, hears what was done with them, and decides by that; what was done already is not done again.

An order without any saga is not helped: nobody knows any more whether something was asked for it. The audit reports it
(O4), as it does whatever is still not at rest after a while.
"""

from __future__ import annotations

from typing import Final

import structlog

from mercato.chassis import faults, saga
from mercato.chassis.db import Database
from mercato.chassis.saga import Key, Next, Saga
from mercato.chassis.telemetry import Telemetry

from . import steps, store

RESUMED: Final = "order_resumed"

faults.declare("orders.reconcile.before_commit", "orders.reconcile.after_commit")

log = structlog.stdlib.get_logger("mercato.orders")


class Reconciling:
    """`quiet_seconds`: how long nothing must have happened to a saga before it counts as left."""

    def __init__(self, database: Database, telemetry: Telemetry, *, lease_seconds: float, quiet_seconds: float) -> None:
        self._database = database
        self._lease_seconds = lease_seconds
        self._quiet_seconds = quiet_seconds
        self._resumed = telemetry.reconciled.labels(RESUMED)

    async def look(self, before: Key | None) -> Key | None:
        """Carries on what was left among a page of sagas; gives the place of the next one (`rounds.py`).

        Two processes that find the same carry it on once: of two saves of one version, the second is refused.
        """
        async with self._database.read() as tx:
            asleep = await store.asleep(tx, before, self._quiet_seconds)
            after = await store.end_of_page(tx, before)
        left = [(row, step) for row in asleep if (step := steps.resumed(row.kind, row.step, row.status, row.payment))]
        if left:
            await self._resume([(row.saga(), Next(step, row.state, "resumed", wake_s=0.0)) for row, step in left])
        return after

    async def _resume(self, left: list[tuple[Saga, Next]]) -> None:
        """Any sweeper takes them over at once."""
        async with self._database.transaction() as tx:
            resumed = await saga.save(tx, left, self._lease_seconds)
            await faults.point("orders.reconcile.before_commit")
        await faults.point("orders.reconcile.after_commit")
        if resumed:
            self._resumed.inc(len(resumed))
            log.warning("orders_resumed", sagas=[key for key, _ in resumed])
