"""The SQL statement that makes an account the owner of the payments of a guest's order."""

from __future__ import annotations

from collections.abc import Sequence

from mercato.chassis.postgres.database import Tx
from mercato.contracts.payments import AssignPayments


async def assign(tx: Tx, requests: Sequence[AssignPayments]) -> None:
    """Payments that an account owns already are not changed."""
    await tx.execute(
        """
        UPDATE payments p
           SET user_id = l.owner, version = p.version + 1, updated_at = greatest(p.updated_at, clock_timestamp())
          FROM (
            SELECT o.id, w.owner
              FROM unnest($1::bigint[], $2::bigint[], $3::bigint[]) AS w (order_id, nonce, owner)
              JOIN payments o ON o.order_id = w.order_id AND o.nonce = w.nonce AND o.user_id = 0
             ORDER BY o.id
               FOR NO KEY UPDATE OF o
          ) l
         WHERE p.id = l.id
        """,
        [request.order_id for request in requests],
        [request.order_nonce for request in requests],
        [request.user_id for request in requests],
    )
