"""The SQL statements that count payments, whatever the page of their list."""

from __future__ import annotations

from typing import Final

from mercato.chassis.postgres.database import Tx
from mercato.contracts.payments import ListPayments

COUNT_SQL: Final[dict[tuple[bool, bool], str]] = {
    (False, False): "SELECT count(*) FROM payments",
    (False, True): "SELECT count(*) FROM payments WHERE user_id = $1",
    (True, False): "SELECT count(*) FROM payments WHERE order_id = $1 AND ($2::bigint IS NULL OR nonce = $2)",
    (True, True): """
        SELECT count(*) FROM payments WHERE order_id = $1 AND ($2::bigint IS NULL OR nonce = $2) AND user_id = $3
    """,
}
"""By whether an order and whether a user is asked for, as `store.LIST_SQL`."""


async def payments(tx: Tx, wanted: ListPayments) -> int:
    by_order, by_user = wanted.order_id is not None, wanted.user_id is not None
    found = await tx.fetch_values(
        int,
        COUNT_SQL[by_order, by_user],
        *((wanted.order_id, wanted.order_nonce) if by_order else ()),
        *((wanted.user_id,) if by_user else ()),
    )
    return found[0]
