"""The SQL statement of an order's trace: the operations of the provider, and their results."""

from __future__ import annotations

import datetime

import msgspec

from mercato.chassis.postgres.database import Row, Tx
from mercato.contracts.payments import OperationKind, OperationStatus, PaymentStep


class StepRow(Row):
    payment_id: int
    kind: OperationKind
    amount_minor: int
    currency: str
    status: OperationStatus
    code: str | None
    calls: int
    began_at: datetime.datetime
    settled_at: datetime.datetime | None


async def trace(tx: Tx, order_id: int, nonce: int | None) -> list[PaymentStep]:
    rows = await tx.fetch(
        StepRow,
        """
        SELECT s.payment_id, s.kind, s.amount_minor, s.currency, s.status, s.code, s.calls, s.began_at, s.settled_at
          FROM payments p
         CROSS JOIN LATERAL (
            SELECT payment_id, kind, amount_minor, currency, status, code, calls, began_at, settled_at
              FROM operations
             WHERE payment_id = p.id
            UNION ALL
            SELECT payment_id, kind, amount_minor, currency, status, NULL, calls, began_at, NULL
              FROM intents
             WHERE payment_id = p.id
         ) s
         WHERE p.order_id = $1 AND ($2::bigint IS NULL OR p.nonce = $2)
         ORDER BY s.began_at, s.settled_at
        """,
        order_id,
        nonce,
    )
    return [PaymentStep(**msgspec.structs.asdict(row)) for row in rows]
