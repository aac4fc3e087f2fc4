"""Every SQL statement of orders."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Sequence
from typing import Final

import msgspec

from mercato.chassis.contract import MAX_ID, Actor
from mercato.chassis.db import Row, Tx
from mercato.contracts.orders import Axis, Fulfilment, HistoryEntry, ListOrders, Order, OrderLine, Payment, Status

from . import rules

ABOVE_ALL_IDS: Final = MAX_ID + 1


class NewOrder(msgspec.Struct, frozen=True):
    """An order that is about to be written."""

    user_id: int
    currency: str
    total_minor: int
    lines: tuple[OrderLine, ...]
    actor: Actor
    principal: str | None
    idempotency_key: str | None
    fingerprint: bytes | None


class PlacedRow(Row):
    id: int
    created_at: datetime.datetime


class OrderRow(Row):
    id: int
    user_id: int
    status: Status
    payment: Payment
    fulfilment: Fulfilment
    currency: str
    total_minor: int
    created_at: datetime.datetime
    updated_at: datetime.datetime
    version: int


class LineRow(Row):
    order_id: int
    product_id: int
    sku: str
    name: str
    quantity: int
    unit_price_minor: int


class HistoryRow(Row):
    version: int
    axis: Axis
    before: str | None
    after: str
    reason: str
    actor_role: str
    actor_id: int
    at: datetime.datetime


class MovedRow(Row):
    version: int
    updated_at: datetime.datetime


class KeyedRow(Row):
    order_id: int
    principal: str
    key: str
    fingerprint: bytes


class KeyedOrder(msgspec.Struct, frozen=True):
    """What was placed with a key, and for which request."""

    order: Order
    fingerprint: bytes


# ---------------------------------------------------------------------------------------------------------- placing


async def insert(tx: Tx, orders: Sequence[NewOrder]) -> list[PlacedRow]:
    """Writes orders, their lines and the first entry of their history; gives ids and times in the order given."""
    lines = [(n, position, line) for n, order in enumerate(orders, 1) for position, line in enumerate(order.lines)]
    return await tx.fetch(
        PlacedRow,
        """
        WITH numbered AS MATERIALIZED (
            SELECT nextval('orders_id_seq') AS id, o.*
              FROM unnest($1::bigint[], $2::text[], $3::bigint[], $4::text[], $5::text[], $6::bytea[], $7::text[],
                          $8::bigint[])
                   WITH ORDINALITY
                   AS o (user_id, currency, total_minor, principal, key, fingerprint, actor_role, actor_id, n)
        ), placed AS (
            INSERT INTO orders (id, user_id, currency, total_minor, principal, idempotency_key, fingerprint)
            SELECT id, user_id, currency, total_minor, principal, key, fingerprint FROM numbered
             ORDER BY principal, key
        ), lined AS (
            INSERT INTO order_lines (order_id, product_id, position, sku, name, quantity, unit_price_minor)
            SELECT o.id, l.product_id, l.position, l.sku, l.name, l.quantity, l.unit_price_minor
              FROM unnest($9::bigint[], $10::smallint[], $11::bigint[], $12::text[], $13::text[], $14::integer[],
                          $15::bigint[])
                   AS l (n, position, product_id, sku, name, quantity, unit_price_minor)
              JOIN numbered o USING (n)
        ), noted AS (
            INSERT INTO order_history (order_id, version, axis, after, actor_role, actor_id)
            SELECT id, 1, 'status', 'pending', actor_role, actor_id FROM numbered
        )
        SELECT id, now() AS created_at FROM numbered ORDER BY n
        """,
        [o.user_id for o in orders],
        [o.currency for o in orders],
        [o.total_minor for o in orders],
        [o.principal for o in orders],
        [o.idempotency_key for o in orders],
        [o.fingerprint for o in orders],
        [o.actor.role for o in orders],
        [o.actor.id for o in orders],
        [n for n, _, _ in lines],
        [position for _, position, _ in lines],
        [line.product_id for _, _, line in lines],
        [line.sku for _, _, line in lines],
        [line.name for _, _, line in lines],
        [line.quantity for _, _, line in lines],
        [line.unit_price_minor for _, _, line in lines],
    )


async def by_keys(tx: Tx, principals: Sequence[str], keys: Sequence[str]) -> dict[tuple[str, str], KeyedOrder]:
    """The one order that was ever placed with each key, as it was placed, by principal and key."""
    # One look at the index for each key: a join that was planned when the shop was new would read all orders.
    rows = await tx.fetch(
        KeyedRow,
        """
        SELECT o.id AS order_id, o.principal, o.idempotency_key AS key, o.fingerprint
          FROM unnest($1::text[], $2::text[]) AS w (principal, key)
         CROSS JOIN LATERAL (
            SELECT id, principal, idempotency_key, fingerprint
              FROM orders
             WHERE principal = w.principal AND idempotency_key = w.key AND idempotency_key IS NOT NULL
             LIMIT 1
         ) o
        """,
        principals,
        keys,
    )
    orders = await get(tx, [row.order_id for row in rows]) if rows else {}
    return {
        (row.principal, row.key): KeyedOrder(rules.as_placed(orders[row.order_id]), row.fingerprint) for row in rows
    }


# ---------------------------------------------------------------------------------------------------------- reading


async def get(tx: Tx, ids: Sequence[int]) -> dict[int, Order]:
    """The orders that exist, by id."""
    rows = await tx.fetch(
        OrderRow,
        """
        SELECT id, user_id, status, payment, fulfilment, currency, total_minor, created_at, updated_at, version
          FROM orders
         WHERE id = ANY($1::bigint[])
        """,
        ids,
    )
    return await _with_lines(tx, rows)


async def get_locked(tx: Tx, order_id: int) -> Order | None:
    """An order that nobody else moves before this transaction ends."""
    rows = await tx.fetch(
        OrderRow,
        """
        SELECT id, user_id, status, payment, fulfilment, currency, total_minor, created_at, updated_at, version
          FROM orders
         WHERE id = $1
           FOR NO KEY UPDATE
        """,
        order_id,
    )
    return (await _with_lines(tx, rows)).get(order_id)


def _list_statements() -> dict[Filters, str]:
    """One statement for each combination of filters.

    The states stand in it as constants. With `($1 IS NULL OR status = $1)` PostgreSQL soon makes one plan for all
    values, reads orders from the newest on and filters: the whole table for a customer with one order. With a constant
    it knows how rare a state is, also in a plan that is made once.
    """
    statuses, payments, fulfilments = ([None, *rules.AXES[axis]] for axis in ("status", "payment", "fulfilment"))
    return {
        (by_user, status, payment, fulfilment): "".join(
            (
                """
                SELECT id, user_id, status, payment, fulfilment, currency, total_minor, created_at, updated_at, version
                  FROM orders
                 WHERE id < $1""",
                " AND user_id = $3" if by_user else "",
                f" AND status = '{status}'" if status else "",
                f" AND payment = '{payment}'" if payment else "",
                f" AND fulfilment = '{fulfilment}'" if fulfilment else "",
                " ORDER BY id DESC LIMIT $2",
            )
        )
        for by_user, status, payment, fulfilment in itertools.product((False, True), statuses, payments, fulfilments)
    }


Filters = tuple[bool, str | None, str | None, str | None]
"""Whether by user; and by which status, payment, fulfilment."""

LIST_SQL: Final[dict[Filters, str]] = _list_statements()


async def list_page(tx: Tx, wanted: ListOrders, limit: int) -> list[Order]:
    """Up to `limit` orders, the newest first."""
    by_user = wanted.user_id is not None
    rows = await tx.fetch(
        OrderRow,
        LIST_SQL[by_user, wanted.status, wanted.payment, wanted.fulfilment],
        ABOVE_ALL_IDS if wanted.before is None else wanted.before,
        limit,
        *((wanted.user_id,) if by_user else ()),
    )
    found = await _with_lines(tx, rows)
    return [found[row.id] for row in rows]


async def _with_lines(tx: Tx, rows: Sequence[OrderRow]) -> dict[int, Order]:
    # A second statement sees the same lines as the first saw orders: lines are written with their order, and for good.
    lines: dict[int, list[OrderLine]] = {row.id: [] for row in rows}
    for line in await tx.fetch(
        LineRow,
        """
        SELECT order_id, product_id, sku, name, quantity, unit_price_minor
          FROM order_lines
         WHERE order_id = ANY($1::bigint[])
         ORDER BY order_id, position
        """,
        list(lines),
    ):
        lines[line.order_id].append(
            OrderLine(
                product_id=line.product_id,
                sku=line.sku,
                name=line.name,
                quantity=line.quantity,
                unit_price_minor=line.unit_price_minor,
                line_total_minor=line.unit_price_minor * line.quantity,
            )
        )
    return {
        row.id: Order(
            id=row.id,
            user_id=row.user_id,
            status=row.status,
            payment=row.payment,
            fulfilment=row.fulfilment,
            currency=row.currency,
            total_minor=row.total_minor,
            lines=tuple(lines[row.id]),
            created_at=row.created_at,
            updated_at=row.updated_at,
            version=row.version,
        )
        for row in rows
    }


async def history(tx: Tx, order_id: int) -> list[HistoryEntry]:
    rows = await tx.fetch(
        HistoryRow,
        """
        SELECT version, axis, before, after, reason, actor_role, actor_id, at
          FROM order_history
         WHERE order_id = $1
         ORDER BY version
        """,
        order_id,
    )
    return [HistoryEntry(**msgspec.structs.asdict(row)) for row in rows]


# ----------------------------------------------------------------------------------------------------------- moving

MOVE_SQL: Final[dict[Axis, str]] = {
    axis: """
        WITH moved AS (
            UPDATE orders
               SET AXIS = $2, version = version + 1, updated_at = greatest(updated_at, clock_timestamp())
             WHERE id = $1 AND AXIS = ANY($3::text[]) AND version = $4
            RETURNING id, version, updated_at
        ), noted AS (
            INSERT INTO order_history (order_id, version, axis, before, after, reason, actor_role, actor_id, at)
            SELECT id, version, 'AXIS', $5::text, $2, $6::text, $7::text, $8::bigint, updated_at FROM moved
        )
        SELECT version, updated_at FROM moved
        """.replace("AXIS", axis)
    for axis in rules.AXES
}
# The time is not that of the transaction's start: who waited for the lock began before what it waited for.


async def move(
    tx: Tx, order: Order, axis: Axis, wanted: str, sources: Sequence[str], *, actor: Actor, reason: str = ""
) -> Order | None:
    """Moves one axis and notes it; gives the order as it is now.

    None, and nothing done, when the order is not any more as `order` says.
    """
    moved = await tx.fetch_one(
        MovedRow,
        MOVE_SQL[axis],
        order.id,
        wanted,
        sources,
        order.version,
        getattr(order, axis),
        reason,
        actor.role,
        actor.id,
    )
    if moved is None:
        return None
    return msgspec.structs.replace(order, **{axis: wanted}, version=moved.version, updated_at=moved.updated_at)
