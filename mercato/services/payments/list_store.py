"""The SQL statements that read payments: by id, and lists with their number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from mercato.chassis.contract import MAX_ID
from mercato.chassis.postgres.database import Tx
from mercato.contracts.payments import ListPayments

from .store import COLUMNS, PaymentRow

ABOVE_ALL_IDS: Final = MAX_ID + 1

GET_SQL: Final = f"SELECT {COLUMNS} FROM payments WHERE id = ANY($1::bigint[])"  # noqa: S608  # of constants alone


async def payments(tx: Tx, ids: Sequence[int]) -> dict[int, PaymentRow]:
    return {row.id: row for row in await tx.fetch(PaymentRow, GET_SQL, ids)}


LIST_SQL: Final[dict[tuple[bool, bool], str]] = {
    (by_order, by_user): "".join(
        (
            f"SELECT {COLUMNS} FROM payments WHERE id < $1",  # noqa: S608  # of constants alone
            " AND order_id = $3 AND ($4::bigint IS NULL OR nonce = $4)" if by_order else "",
            f" AND user_id = ${5 if by_order else 3}" if by_user else "",
            " ORDER BY id DESC LIMIT $2",
        )
    )
    for by_order in (False, True)
    for by_user in (False, True)
}
"""By whether the list filters by order and by user: each has its own statement, and so its own plan."""


async def list_page(tx: Tx, wanted: ListPayments, limit: int) -> list[PaymentRow]:
    """Up to `limit` payments, the newest first."""
    by_order, by_user = wanted.order_id is not None, wanted.user_id is not None
    return await tx.fetch(
        PaymentRow,
        LIST_SQL[by_order, by_user],
        ABOVE_ALL_IDS if wanted.before is None else wanted.before,
        limit,
        *((wanted.order_id, wanted.order_nonce) if by_order else ()),
        *((wanted.user_id,) if by_user else ()),
    )


COUNT_SQL: Final[dict[tuple[bool, bool], str]] = {
    (False, False): "SELECT count(*) FROM payments",
    (False, True): "SELECT count(*) FROM payments WHERE user_id = $1",
    (True, False): "SELECT count(*) FROM payments WHERE order_id = $1 AND ($2::bigint IS NULL OR nonce = $2)",
    (True, True): """
        SELECT count(*) FROM payments WHERE order_id = $1 AND ($2::bigint IS NULL OR nonce = $2) AND user_id = $3
    """,
}
"""By whether the list filters by order and by user, as `LIST_SQL`."""


async def count(tx: Tx, wanted: ListPayments) -> int:
    """The number of all payments that match, whatever the page."""
    by_order, by_user = wanted.order_id is not None, wanted.user_id is not None
    found = await tx.fetch_values(
        int,
        COUNT_SQL[by_order, by_user],
        *((wanted.order_id, wanted.order_nonce) if by_order else ()),
        *((wanted.user_id,) if by_user else ()),
    )
    return found[0]
