"""Every SQL statement of orders."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from mercato.chassis import events
from mercato.chassis.contract import MAX_ID, Actor
from mercato.chassis.db import Row, Tx
from mercato.chassis.rounds import PAGE
from mercato.chassis.saga import Key, Saga
from mercato.contracts.orders import (
    Axis,
    CancelReason,
    Fulfilment,
    HistoryEntry,
    ListOrders,
    Order,
    OrderChanged,
    OrderLine,
    Payment,
    ReturnLine,
    Status,
)

from . import rules

ABOVE_ALL_IDS: Final = MAX_ID + 1
NEWEST: Final[Key] = (ABOVE_ALL_IDS, "", "")
"""Before which all sagas are."""


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
    refunded_minor: int
    refund_pending_minor: int
    reason: str | None


class LineRow(Row):
    order_id: int
    product_id: int
    sku: str
    name: str
    quantity: int
    unit_price_minor: int
    returned: int


class HistoryRow(Row):
    version: int
    axis: Axis
    before: str | None
    after: str
    reason: str
    actor_role: str
    actor_id: int
    at: datetime.datetime


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
        ), ids AS MATERIALIZED (
            SELECT array_agg(id ORDER BY n) AS by_n FROM numbered
        ), lined AS (
            INSERT INTO order_lines (order_id, product_id, position, sku, name, quantity, unit_price_minor)
            SELECT (SELECT by_n FROM ids)[l.n], l.product_id, l.position, l.sku, l.name, l.quantity, l.unit_price_minor
              FROM unnest($9::bigint[], $10::smallint[], $11::bigint[], $12::text[], $13::text[], $14::integer[],
                          $15::bigint[])
                   AS l (n, position, product_id, sku, name, quantity, unit_price_minor)
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
        SELECT id, user_id, status, payment, fulfilment, currency, total_minor, created_at, updated_at, version,
               refunded_minor, refund_pending_minor, reason
          FROM orders
         WHERE id = ANY($1::bigint[])
        """,
        ids,
    )
    return await _with_lines(tx, rows)


async def get_locked(tx: Tx, order_id: int) -> Order | None:
    """An order that nobody else moves before this transaction ends."""
    return (await lock(tx, [order_id])).get(order_id)


async def lock(tx: Tx, ids: Sequence[int]) -> dict[int, Order]:
    """Orders that nobody else moves before this transaction ends, by id."""
    rows = await tx.fetch(
        OrderRow,
        """
        SELECT id, user_id, status, payment, fulfilment, currency, total_minor, created_at, updated_at, version,
               refunded_minor, refund_pending_minor, reason
          FROM orders
         WHERE id = ANY($1::bigint[])
         ORDER BY id
           FOR NO KEY UPDATE
        """,
        ids,
    )
    return await _with_lines(tx, rows)


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
                SELECT id, user_id, status, payment, fulfilment, currency, total_minor, created_at, updated_at, version,
                       refunded_minor, refund_pending_minor, reason
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
    # A second statement sees the same lines as the first saw orders: lines are written with their order, and for good;
    # but how many have come back may be newer.
    lines: dict[int, list[OrderLine]] = {row.id: [] for row in rows}
    for line in await tx.fetch(
        LineRow,
        """
        SELECT order_id, product_id, sku, name, quantity, unit_price_minor, returned
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
                returned=line.returned,
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
            refunded_minor=row.refunded_minor,
            reason=None if row.reason is None else msgspec.json.decode(row.reason, type=CancelReason),
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


class Move(msgspec.Struct, frozen=True):
    """A move of one order along one or more axes, from where `order` is. None: this axis stays."""

    order: Order
    status: Status | None = None
    payment: Payment | None = None
    fulfilment: Fulfilment | None = None
    reason: CancelReason | None = None
    note: str = ""
    """For the history, in the words of whoever moves it."""
    actor: Actor | None = None
    """Who moves this one, where it is somebody else than who moves the others."""
    again: Axis | None = None
    """The axis of which a further part reaches the state that the order is in: one more partial refund or return."""
    refunded_minor: int = 0
    """Given back with this move."""
    pending_minor: int = 0
    """How much of `refunded_minor` was announced before (`announce_refund`)."""


class MovedRow(Row):
    id: int
    version: int
    updated_at: datetime.datetime
    fulfilment: Fulfilment
    refunded_minor: int


async def move(tx: Tx, moves: Sequence[Move], actor: Actor) -> list[Order | None]:
    """Moves orders, notes it, and tells it; gives them as they are now, in order.

    None, and nothing done, for one that is not any more where its move starts. An order stands in one move at most. The
    caller holds the lock of each order's saga, or of the order itself. Only declared moves are made.
    """
    for wanted in moves:
        rules.assert_declared(wanted.order, wanted.status, wanted.payment, wanted.fulfilment)
    rows = await tx.fetch(
        MovedRow,
        """
        WITH moved AS (
            UPDATE orders o
               SET status = w.status,
                   payment = w.payment,
                   fulfilment = CASE WHEN w.fulfilment <> w.was_fulfilment THEN w.fulfilment ELSE o.fulfilment END,
                   reason = coalesce(w.reason, o.reason),
                   refunded_minor = o.refunded_minor + w.refunded_minor,
                   refund_pending_minor = o.refund_pending_minor - w.pending_minor,
                   version = o.version + 1,
                   -- Not the time of the transaction's start: who waited for the lock began before what it waited for.
                   updated_at = greatest(o.updated_at, clock_timestamp())
              FROM unnest($1::bigint[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[],
                          $8::text[], $9::bigint[], $10::bigint[], $11::text[], $12::text[], $13::text[], $14::bigint[])
                   AS w (id, was_status, status, was_payment, payment, was_fulfilment, fulfilment, reason,
                         refunded_minor, pending_minor, note, again, actor_role, actor_id)
             WHERE o.id = w.id AND o.status = w.was_status AND o.payment = w.was_payment
               -- Goods are shipped while nobody looks: that does not stand in the way of money.
               AND (o.fulfilment = w.was_fulfilment OR w.fulfilment = w.was_fulfilment)
            RETURNING o.id, o.version, o.updated_at, o.fulfilment, o.refunded_minor, o.status, o.payment,
                      w.was_status, w.was_payment, w.was_fulfilment, w.fulfilment AS wanted_fulfilment, w.note,
                      w.again, w.actor_role, w.actor_id
        ), noted AS (
            INSERT INTO order_history (order_id, version, axis, before, after, reason, actor_role, actor_id, at)
            SELECT m.id, m.version, a.axis, a.before, a.after, m.note, m.actor_role, m.actor_id, m.updated_at
              FROM moved m
             CROSS JOIN LATERAL (
                VALUES ('status', m.was_status, m.status),
                       ('payment', m.was_payment, m.payment),
                       -- What was shipped meanwhile is noted already, by whoever shipped it.
                       ('fulfilment', m.was_fulfilment, m.wanted_fulfilment)
             ) AS a (axis, before, after)
             WHERE a.before <> a.after OR a.axis = m.again
        )
        SELECT id, version, updated_at, fulfilment, refunded_minor FROM moved
        """,
        [m.order.id for m in moves],
        [m.order.status for m in moves],
        [m.status or m.order.status for m in moves],
        [m.order.payment for m in moves],
        [m.payment or m.order.payment for m in moves],
        [m.order.fulfilment for m in moves],
        [m.fulfilment or m.order.fulfilment for m in moves],
        [None if m.reason is None else msgspec.json.encode(m.reason).decode() for m in moves],
        [m.refunded_minor for m in moves],
        [m.pending_minor for m in moves],
        [m.note for m in moves],
        [m.again for m in moves],
        [(m.actor or actor).role for m in moves],
        [(m.actor or actor).id for m in moves],
    )
    moved = {row.id: row for row in rows}
    orders = [_moved(m, moved[m.order.id]) if m.order.id in moved else None for m in moves]
    told = [
        _event(type_, now)
        for wanted, now in zip(moves, orders, strict=True)
        if now
        for type_ in rules.events_of(wanted.order, now, wanted.again)
    ]
    await events.emit(tx, told)
    return orders


def _event(type_: str, order: Order) -> events.Outgoing:
    data = OrderChanged(
        order_id=order.id,
        user_id=order.user_id,
        status=order.status,
        payment=order.payment,
        fulfilment=order.fulfilment,
        currency=order.currency,
        total_minor=order.total_minor,
        refunded_minor=order.refunded_minor,
        version=order.version,
        reason=order.reason,
    )
    return events.Outgoing(type=type_, subject="order", subject_id=order.id, version=order.version, data=data)


async def tell_placed(tx: Tx, orders: Sequence[Order]) -> None:
    """Writes the first event of each order."""
    await events.emit(tx, [_event("order.placed", order) for order in orders])


# --------------------------------------------------------------------------------------------------- refunds, returns


async def announce_refund(tx: Tx, order_id: int, amount_minor: int) -> bool:
    """Sets aside what is about to be refunded. False, and nothing done, where so much is not left.

    Two refunds that are asked for at once cannot have the same money: the second sees what the first has set aside.
    """
    return bool(
        await tx.execute(
            """
            UPDATE orders
               SET refund_pending_minor = refund_pending_minor + $2
             WHERE id = $1 AND refunded_minor + refund_pending_minor + $2 <= total_minor
            """,
            order_id,
            amount_minor,
        )
    )


async def forget_refunds(tx: Tx, amounts: Mapping[int, int]) -> None:
    """Takes back what was set aside for refunds that came to nothing: minor units by order, which the caller locks."""
    await tx.execute(
        """
        UPDATE orders o
           SET refund_pending_minor = refund_pending_minor - w.amount_minor
          FROM unnest($1::bigint[], $2::bigint[]) AS w (order_id, amount_minor)
         WHERE o.id = w.order_id
        """,
        list(amounts),
        list(amounts.values()),
    )


async def refundable(tx: Tx, order_id: int) -> int:
    """What is left of an order's total that was neither refunded nor is about to be, in minor units."""
    left = await tx.fetch_values(
        int, "SELECT total_minor - refunded_minor - refund_pending_minor FROM orders WHERE id = $1", order_id
    )
    return left[0]


async def refund_is_pending(tx: Tx, order_id: int) -> bool:
    return (await tx.fetch_values(bool, "SELECT refund_pending_minor > 0 FROM orders WHERE id = $1", order_id))[0]


async def take_back(tx: Tx, order_id: int, lines: Sequence[ReturnLine]) -> bool:
    """Counts goods as returned. False where any line has not so many left: then the caller rolls back."""
    changed = await tx.execute(
        """
        UPDATE order_lines l
           SET returned = l.returned + w.quantity
          FROM unnest($2::bigint[], $3::integer[]) AS w (product_id, quantity)
         WHERE l.order_id = $1 AND l.product_id = w.product_id AND l.returned + w.quantity <= l.quantity
        """,
        order_id,
        [line.product_id for line in lines],
        [line.quantity for line in lines],
    )
    return changed == len(lines)


def _moved(wanted: Move, row: MovedRow) -> Order:
    order = wanted.order
    return msgspec.structs.replace(
        order,
        status=wanted.status or order.status,
        payment=wanted.payment or order.payment,
        fulfilment=row.fulfilment,
        reason=wanted.reason or order.reason,
        refunded_minor=row.refunded_minor,
        version=row.version,
        updated_at=row.updated_at,
    )


# --------------------------------------------------------------------------------------------------- reconciliation


class KeyRow(Row):
    subject_id: int
    kind: str
    reference: str


class AsleepRow(Row):
    """A saga that nobody will wake, and where its order is."""

    subject_id: int
    kind: str
    reference: str
    step: str
    state: str
    epoch: int
    version: int
    status: Status
    payment: Payment

    def saga(self) -> Saga:
        key = (self.subject_id, self.kind, self.reference)
        return Saga(key, self.step, self.state, epoch=self.epoch, version=self.version)


async def asleep(tx: Tx, before: Key | None, quiet_seconds: float) -> list[AsleepRow]:
    """Of the page of sagas before a key, the newest first: those that may have to be carried on."""
    return await tx.fetch(
        AsleepRow,
        """
        WITH page AS MATERIALIZED (
            SELECT subject_id, kind, reference, step, state, epoch, version, wake_at, updated_at
              FROM sagas
             WHERE (subject_id, kind, reference) < ($1, $2, $3)
             ORDER BY subject_id DESC, kind DESC, reference DESC
             LIMIT $4
        )
        SELECT s.subject_id, s.kind, s.reference, s.step, s.state, s.epoch, s.version, o.status, o.payment
          FROM page s
         CROSS JOIN LATERAL (SELECT status, payment FROM orders WHERE id = s.subject_id LIMIT 1) o
         WHERE s.wake_at IS NULL AND s.updated_at < now() - make_interval(secs => $5)
           AND (s.step <> 'done' OR (s.kind = 'checkout' AND (o.status = 'pending' OR o.payment = 'authorized')))
        """,
        *(before or NEWEST),
        PAGE,
        quiet_seconds,
    )


async def end_of_page(tx: Tx, before: Key | None) -> Key | None:
    """The last key of that page; None where there are no more behind it."""
    row = await tx.fetch_one(
        KeyRow,
        """
        SELECT subject_id, kind, reference
          FROM sagas
         WHERE (subject_id, kind, reference) < ($1, $2, $3)
         ORDER BY subject_id DESC, kind DESC, reference DESC
        OFFSET $4 - 1
         LIMIT 1
        """,
        *(before or NEWEST),
        PAGE,
    )
    return None if row is None else (row.subject_id, row.kind, row.reference)
