"""The SQL statements of the reconciliation of orders: parked sagas, a page at a time."""

from __future__ import annotations

from typing import Final

from mercato.chassis.contract import MAX_ID
from mercato.chassis.hosting.table_scan import PAGE
from mercato.chassis.postgres.database import Row, Tx
from mercato.chassis.sagas.store import Key, Saga
from mercato.contracts.orders import Payment, Status

NEWEST: Final[Key] = (MAX_ID + 1, "", "")
"""A key above those of all sagas."""


class ParkedRow(Row):
    """A saga that no process will wake, and the state of its order."""

    subject_id: int
    kind: str
    reference: str
    step: str
    state: str
    epoch: int
    version: int
    trace: str | None
    status: Status
    payment: Payment

    def saga(self) -> Saga:
        key = (self.subject_id, self.kind, self.reference)
        return Saga(key, self.step, self.state, epoch=self.epoch, version=self.version, trace=self.trace or "")


class KeyRow(Row):
    subject_id: int
    kind: str
    reference: str


async def parked(tx: Tx, before: Key | None, quiet_seconds: float) -> list[ParkedRow]:
    """The parked sagas of the page before a key, the newest first, that were not saved for `quiet_seconds`."""
    return await tx.fetch(
        ParkedRow,
        """
        WITH page AS MATERIALIZED (
            SELECT subject_id, kind, reference, step, state, epoch, version, trace, wake_at, driver, updated_at
              FROM sagas
             WHERE (subject_id, kind, reference) < ($1, $2, $3)
             ORDER BY subject_id DESC, kind DESC, reference DESC
             LIMIT $4
        )
        SELECT s.subject_id, s.kind, s.reference, s.step, s.state, s.epoch, s.version, s.trace, o.status, o.payment
          FROM page s
         CROSS JOIN LATERAL (SELECT status, payment FROM orders WHERE id = s.subject_id LIMIT 1) o
         WHERE s.wake_at IS NULL AND s.driver IS NULL AND s.updated_at < now() - make_interval(secs => $5)
        """,
        *(before or NEWEST),
        PAGE,
        quiet_seconds,
    )


async def end_of_page(tx: Tx, before: Key | None) -> Key | None:
    """The last key of that page; None where no page follows."""
    row = await tx.fetch_one(
        KeyRow,
        """
        SELECT subject_id, kind, reference
          FROM sagas
         WHERE (subject_id, kind, reference) < ($1, $2, $3)
         ORDER BY subject_id DESC, kind DESC, reference DESC
        OFFSET $4 - 1
         LIMIT 1
        """,
        *(before or NEWEST),
        PAGE,
    )
    return None if row is None else (row.subject_id, row.kind, row.reference)
