"""The SQL statement that reads which orders were lost when this database was restored."""

from __future__ import annotations

from collections.abc import Sequence

from mercato.chassis.postgres.database import Row, Tx


class LostRow(Row):
    nonce: int
    order_id: int
    is_taken: bool
    """There is an order with this id again."""


async def lost(tx: Tx, nonces: Sequence[int]) -> dict[int, LostRow]:
    """Those of the nonces that lost orders had, by nonce."""
    rows = await tx.fetch(
        LostRow,
        """
        SELECT l.nonce, l.order_id, EXISTS (SELECT FROM orders o WHERE o.id = l.order_id) AS is_taken
          FROM lost_orders l
         WHERE l.nonce = ANY($1::bigint[])
        """,
        nonces,
    )
    return {row.nonce: row for row in rows}
