"""The SQL statements of lists of orders: one for each combination of filters that have an index.

Times, totals and texts have no index, since each order that is placed would have to write it. Ids rise with the time of
placing: a range of times is a range of ids, whose ends a bisection finds. A page scans at most `SCANNED_AT_ONCE` orders
of that range, and the next page continues after them.
"""

from __future__ import annotations

import datetime
import itertools
from typing import Final

import msgspec

from mercato.chassis.contract import MAX_ID
from mercato.chassis.postgres.database import Tx
from mercato.contracts.orders import SCANNED_AT_ONCE, ListOrders, Order

from . import rules
from .read_store import COLUMNS, OrderRow, record_of

ABOVE_ALL_IDS: Final = MAX_ID + 1


Filters = tuple[bool, bool, str | None, str | None, str | None]
"""Whether by user, whether by product; and by which status, payment, fulfilment."""


def _list_statements(columns: str) -> dict[Filters, str]:
    """One statement for each combination of filters: a list of orders by their `columns`; without any, their number.

    The states are constants in it. With `($1 IS NULL OR status = $1)` PostgreSQL soon makes one plan for all values,
    reads orders from the newest on and filters: the whole table for a customer with one order. With a constant it knows
    how rare a state is, also in a plan that is made once.
    """
    statuses, payments, fulfilments = ([None, *rules.AXES[axis]] for axis in ("status", "payment", "fulfilment"))
    combinations = itertools.product((False, True), (False, True), statuses, payments, fulfilments)
    return {filters: _list_statement(columns, filters) for filters in combinations}


def _list_statement(columns: str, filters: Filters) -> str:
    by_user, by_product, status, payment, fulfilment = filters
    source, order_id = "orders o WHERE o.id < $1", "o.id"
    if by_product and by_user:
        # Users have few orders, a product may have most of them: the orders of the user are filtered by the product.
        source += " AND (SELECT true FROM order_products WHERE product_id = $4 AND order_id = o.id LIMIT 1)"
    elif by_product:
        # The orders of a product, the newest first, each read by its id: never a sort of all of them.
        source, order_id = (
            "order_products p CROSS JOIN LATERAL (SELECT * FROM orders WHERE id = p.order_id LIMIT 1) o "
            "WHERE p.order_id < $1 AND p.product_id = $4",
            "p.order_id",
        )
    matched = "".join(
        (
            source,
            # A parameter that a statement does not use has no type: each statement names all of them.
            " AND o.user_id = $3" if by_user else " AND $3::bigint IS NULL",
            "" if by_product else " AND $4::bigint IS NULL",
            f" AND o.status = '{status}'" if status else "",
            f" AND o.payment = '{payment}'" if payment else "",
            f" AND o.fulfilment = '{fulfilment}'" if fulfilment else "",
        )
    )
    if columns:
        return f"SELECT {columns} FROM {matched} ORDER BY {order_id} DESC LIMIT $2"  # noqa: S608  # of constants alone
    return f"SELECT count(*) FROM (SELECT 1 FROM {matched} LIMIT $2) AS matched"  # noqa: S608  # of constants alone


LIST_SQL: Final[dict[Filters, str]] = _list_statements(COLUMNS)
COUNT_SQL: Final[dict[Filters, str]] = _list_statements("")


async def list_page(tx: Tx, wanted: ListOrders, limit: int) -> list[Order]:
    """Up to `limit` orders, the newest first."""
    by_user, by_product = wanted.user_id is not None, wanted.product_id is not None
    rows = await tx.fetch(
        OrderRow,
        LIST_SQL[by_user, by_product, wanted.status, wanted.payment, wanted.fulfilment],
        ABOVE_ALL_IDS if wanted.before is None else wanted.before,
        limit,
        wanted.user_id,
        wanted.product_id,
    )
    return [record_of(row).order for row in rows]


async def count(tx: Tx, wanted: ListOrders) -> int:
    """The number of all orders that match, whatever the page."""
    if is_scanned(wanted):
        return await _count_scanned(tx, msgspec.structs.replace(wanted, before=None))
    by_user, by_product = wanted.user_id is not None, wanted.product_id is not None
    found = await tx.fetch_values(
        int,
        COUNT_SQL[by_user, by_product, wanted.status, wanted.payment, wanted.fulfilment],
        ABOVE_ALL_IDS,
        None,
        wanted.user_id,
        wanted.product_id,
    )
    return found[0]


# ----------------------------------------------------------------------------------------- times, totals and texts

SKEW: Final = datetime.timedelta(minutes=1)
"""An order has the time at which its transaction began, and its id is drawn later: at most so much later."""


def is_scanned(wanted: ListOrders) -> bool:
    """Whether a list has filters without an index."""
    filters = (wanted.created_from, wanted.created_to, wanted.min_total_minor, wanted.max_total_minor, wanted.text)
    return any(value is not None for value in filters) or wanted.currency is not None


_SCANNED: Final = "FROM orders o WHERE o.id < $1 AND o.id > $2"
_OF_USER: Final = {False: " AND $3::bigint IS NULL", True: " AND o.user_id = $3"}

LAST_SCANNED_SQL: Final[dict[bool, str]] = {
    by_user: f"SELECT o.id {_SCANNED}{clause} ORDER BY o.id DESC OFFSET $4 LIMIT 1"  # of constants alone
    for by_user, clause in _OF_USER.items()
}

_MATCHED: Final[dict[bool, str]] = {
    by_user: f"""
      {_SCANNED}{clause}
       AND ($4::bigint IS NULL
            OR EXISTS (SELECT 1 FROM order_products p WHERE p.product_id = $4 AND p.order_id = o.id))
       AND ($5::text IS NULL OR o.status = $5)
       AND ($6::text IS NULL OR o.payment = $6)
       AND ($7::text IS NULL OR o.fulfilment = $7)
       AND ($8::timestamptz IS NULL OR o.created_at >= $8)
       AND ($9::timestamptz IS NULL OR o.created_at < $9)
       AND ($10::text IS NULL OR o.currency = $10)
       AND ($11::bigint IS NULL OR o.total_minor >= $11)
       AND ($12::bigint IS NULL OR o.total_minor <= $12)
       AND ($13::text IS NULL OR position(lower($13) IN lower(o.customer_note)) > 0)
    """  # noqa: S608  # of constants alone
    for by_user, clause in _OF_USER.items()
}

SCAN_SQL: Final[dict[bool, str]] = {
    by_user: f"SELECT {COLUMNS} {matched} ORDER BY o.id DESC LIMIT $14"  # of constants alone
    for by_user, matched in _MATCHED.items()
}

COUNT_SCANNED_SQL: Final[dict[bool, str]] = {
    by_user: f"SELECT count(*) {matched}"  # of constants alone
    for by_user, matched in _MATCHED.items()
}


async def scan_page(tx: Tx, wanted: ListOrders, limit: int) -> tuple[list[Order], int | None]:
    """Up to `limit` orders of the next `SCANNED_AT_ONCE`, the newest first; and their last id, if more follow."""
    by_user, (below, above, text) = wanted.user_id is not None, await _bounds(tx, wanted)
    ends = await tx.fetch_values(int, LAST_SCANNED_SQL[by_user], below, above, wanted.user_id, SCANNED_AT_ONCE - 1)
    rows = await tx.fetch(
        OrderRow,
        SCAN_SQL[by_user],
        below,
        max(above, ends[0] - 1) if ends else above,
        *_filters(wanted, text),
        limit,
    )
    return [record_of(row).order for row in rows], ends[0] if ends else None


async def _count_scanned(tx: Tx, wanted: ListOrders) -> int:
    """Without the bound of a page."""
    below, above, text = await _bounds(tx, wanted)
    found = await tx.fetch_values(
        int, COUNT_SCANNED_SQL[wanted.user_id is not None], below, above, *_filters(wanted, text)
    )
    return found[0]


async def _bounds(tx: Tx, wanted: ListOrders) -> tuple[int, int, str | None]:
    """The ids below and above which all orders of a list are, and the text that their notes have to contain."""
    below, above, text = ABOVE_ALL_IDS if wanted.before is None else wanted.before, 0, wanted.text
    if text is not None and text.isascii() and text.isdigit():
        found = int(text) if len(text) <= len(str(MAX_ID)) else ABOVE_ALL_IDS
        below, above, text = min(below, found + 1), found - 1, None
    if wanted.created_to is not None:
        below = min(below, await _last_until(tx, wanted.created_to + SKEW) + 1)
    if wanted.created_from is not None:
        above = max(above, await _last_until(tx, wanted.created_from - SKEW))
    return below, above, text


def _filters(wanted: ListOrders, text: str | None) -> tuple[object, ...]:
    """The parameters of `_MATCHED` from the third on."""
    return (
        wanted.user_id,
        wanted.product_id,
        wanted.status,
        wanted.payment,
        wanted.fulfilment,
        wanted.created_from,
        wanted.created_to,
        wanted.currency,
        wanted.min_total_minor,
        wanted.max_total_minor,
        text,
    )


async def _last_until(tx: Tx, time: datetime.datetime) -> int:
    """The last id of the orders until a time; 0 where there is none."""
    # Orders up to `low` are of that time or before, those from `high` on after it. Each iteration reads the first order
    # of the upper half, and halves the range between: ids have 53 bits.
    found = await tx.fetch_values(
        int,
        """
        WITH RECURSIVE halved (low, high) AS (
            SELECT 0::bigint, (SELECT coalesce(max(id), 0) + 1 FROM orders)
            UNION ALL
            SELECT CASE WHEN probe.created_at <= $1 THEN probe.id ELSE low END,
                   CASE WHEN probe.created_at <= $1 THEN high ELSE (low + high) / 2 END
              FROM halved
              LEFT JOIN LATERAL (
                SELECT o.id, o.created_at FROM orders o
                 WHERE o.id >= (low + high) / 2 AND o.id < high
                 ORDER BY o.id
                 LIMIT 1
              ) probe ON true
             WHERE high - low > 1
        )
        SELECT max(low) FROM halved
        """,
        time,
    )
    return found[0]
