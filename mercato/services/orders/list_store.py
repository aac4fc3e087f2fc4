"""The SQL statements of lists of orders: one for each combination of filters."""

from __future__ import annotations

import itertools
from typing import Final

from mercato.chassis.contract import MAX_ID
from mercato.chassis.postgres.database import Tx
from mercato.contracts.orders import ListOrders, Order

from . import rules
from .store import COLUMNS, OrderRow, record_of

ABOVE_ALL_IDS: Final = MAX_ID + 1


def _list_statements() -> dict[Filters, str]:
    """One statement for each combination of filters.

    The states stand in it as constants. With `($1 IS NULL OR status = $1)` PostgreSQL soon makes one plan for all
    values, reads orders from the newest on and filters: the whole table for a customer with one order. With a constant
    it knows how rare a state is, also in a plan that is made once.
    """
    statuses, payments, fulfilments = ([None, *rules.AXES[axis]] for axis in ("status", "payment", "fulfilment"))
    return {
        (by_user, by_product, status, payment, fulfilment): "".join(
            (
                f"SELECT {COLUMNS} FROM ",  # noqa: S608  # of constants alone
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
                f" ORDER BY {'p.order_id' if by_product and not by_user else 'o.id'} DESC LIMIT $2",
            )
        )
        for by_user, by_product, status, payment, fulfilment in itertools.product(
            (False, True), (False, True), statuses, payments, fulfilments
        )
    }


Filters = tuple[bool, bool, str | None, str | None, str | None]
"""Whether by user, whether by product; and by which status, payment, fulfilment."""

LIST_SQL: Final[dict[Filters, str]] = _list_statements()


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
