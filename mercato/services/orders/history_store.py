"""The SQL statements that read the history of orders."""

from __future__ import annotations

import datetime
from collections.abc import Sequence

from mercato.chassis.contract import Actor
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
    """One row for each transition, in order."""
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


class CancelledByRow(Row):
    order_id: int
    actor_role: str
    actor_id: int


async def cancelled_by(tx: Tx, order_ids: Sequence[int]) -> dict[int, Actor]:
    """The actor that cancelled each of these orders, by id of the order."""
    rows = await tx.fetch(
        CancelledByRow,
        """
        SELECT w.order_id, h.actor_role, h.actor_id
          FROM unnest($1::bigint[]) AS w (order_id)
         CROSS JOIN LATERAL (
            SELECT actor_role, actor_id
              FROM history
             WHERE order_id = w.order_id AND status = 'cancelled'
             ORDER BY version
             LIMIT 1
         ) h
        """,
        order_ids,
    )
    return {row.order_id: Actor(row.actor_role, row.actor_id) for row in rows}
