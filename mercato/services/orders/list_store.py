"""The SQL statements of lists of orders: one for each combination of filters that have an index.

Times, totals and texts have none, for it would be written with each order that is placed. Ids rise with the time of
placing: a range of times is a range of ids, whose ends are found by halving. In it, a page looks through so many orders
and no more, and the next goes on behind them.
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


def _list_statements(columns: str) -> dict[Filters, str]:
    """One statement for each combination of filters: a list of orders by their `columns`; without any, their number.

    The states stand in it as constants. With `($1 IS NULL OR status = $1)` PostgreSQL soon makes one plan for all
    values, reads orders from the newest on and filters: the whole table for a customer with one order. With a constant
    it knows how rare a state is, also in a plan that is made once.
    """
    statuses, payments, fulfilments = ([None, *rules.AXES[axis]] for axis in ("status", "payment", "fulfilment"))
    return {
        (by_user, by_product, status, payment, fulfilment): "".join(
            (
                f"SELECT {columns} FROM " if columns else "SELECT count(*) FROM (SELECT 1 FROM ",  # noqa: S608  # of constants alone
                # The orders of a product, the newest first, each looked up: never a sort of all of them.
                "order_products p CROSS JOIN LATERAL (SELECT * FROM orders WHERE id = p.order_id LIMIT 1) o "
                "WHERE p.order_id < $1 AND p.product_id = $4"
                if by_product and not by_user
                else "orders o WHERE o.id < $1",
                # Of a user, the other way round: users have few orders, a product may have most of them.
                " AND (SELECT true FROM order_products WHERE product_id = $4 AND order_id = o.id LIMIT 1)"
                if by_product and by_user
                else "",
                # A parameter that the statement does not use has no type: it is named in all of them.
                " AND o.user_id = $3" if by_user else " AND $3::bigint IS NULL",
                "" if by_product else " AND $4::bigint IS NULL",
                f" AND o.status = '{status}'" if status else "",
                f" AND o.payment = '{payment}'" if payment else "",
                f" AND o.fulfilment = '{fulfilment}'" if fulfilment else "",
                f" ORDER BY {'p.order_id' if by_product and not by_user else 'o.id'} DESC" if columns else "",
                " LIMIT $2" if columns else " LIMIT $2) AS matched",
            )
        )
        for by_user, by_product, status, payment, fulfilment in itertools.product(
            (False, True), (False, True), statuses, payments, fulfilments
        )
    }


Filters = tuple[bool, bool, str | None, str | None, str | None]
"""Whether by user, whether by product; and by which status, payment, fulfilment."""

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
    """All orders that a list holds, whatever the page."""
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
"""An order has the time at which its transaction began, and an id of a moment later: so far apart at most."""


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
    """Up to `limit` orders, the newest first, of the next `SCANNED_AT_ONCE`; and the last of these, if more follow."""
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
    """Below and above which ids all orders of a list are, and which text they have to have besides."""
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
    """What `_MATCHED` takes from its third value on."""
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
    # Orders up to `low` are of that time or before, those from `high` on after it. Each round looks at the first order
    # of the upper half, and halves what is between: ids have 53 bits.
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
