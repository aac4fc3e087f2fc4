"""The SQL statement that reads what has become of an order."""

from __future__ import annotations

import datetime

from mercato.chassis.postgres.database import Row, Tx
from mercato.contracts.orders import Fulfilment, Payment, Status


class HistoryRow(Row):
    version: int
    status: Status
    payment: Payment
    fulfilment: Fulfilment
    events: list[str]
    note: str
    actor_role: str
    actor_id: int
    epoch: int | None
    tries: int
    at: datetime.datetime
    internal_note: str
    limit_reason: str


async def history(tx: Tx, order_id: int) -> list[HistoryRow]:
    """A row a transition, in order."""
    return await tx.fetch(
        HistoryRow,
        """
        SELECT version, status, payment, fulfilment, events, note, actor_role, actor_id, epoch, tries, at,
               internal_note, limit_reason
          FROM history
         WHERE order_id = $1
         ORDER BY version
        """,
        order_id,
    )
