"""The SQL statements that write orders: placing and moving, each a batch at a time.

Those of payments and refunds are in `money_store.py`, those that read orders in `read_store.py`.
"""

from __future__ import annotations

import datetime
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

import msgspec

from mercato.chassis.contract import Actor
from mercato.chassis.idempotency.keys import Keyed
from mercato.chassis.messaging import events
from mercato.chassis.postgres.database import Row, Tx
from mercato.contracts.order_refusals import Axis
from mercato.contracts.orders import CancelReason, Fulfilment, Order, OrderChanged, OrderLine, Payment, Status

from . import rules
from .read_store import StoredLine

_encode: Final = msgspec.json.Encoder().encode


# ---------------------------------------------------------------------------------------------------------- placing


class NewOrder(msgspec.Struct, frozen=True):
    """An order that is about to be written: `order` as it will be, but for id and times; and its checkout (`state`)."""

    order: Order
    nonce: int
    payment_attempt: int
    state: str
    actor: Actor
    keyed: Keyed | None
    limits: rules.BuyerLimits = rules.UNLIMITED
    former_id: int | None = None
    """The id that it had before it was lost (`lost_orders.py`), or 0; None: it was not compared with lost orders."""
    trace: str | None = None
    """Of its checkout (`Saga.trace`)."""


class PlacedRow(Row):
    n: int
    """Its place in the batch, counted from 1."""
    id: int
    epoch: int
    created_at: datetime.datetime
    open_units: list[int] | None


INSERTED: Final[Mapping[str, tuple[str, Callable[[NewOrder], object]]]] = {
    "user_id": ("bigint", operator.attrgetter("order.user_id")),
    "currency": ("text", operator.attrgetter("order.currency")),
    "total_minor": ("bigint", operator.attrgetter("order.total_minor")),
    "customer_note": ("text", operator.attrgetter("order.customer_note")),
    "guest_email": ("text", operator.attrgetter("order.guest_email")),
    "nonce": ("bigint", operator.attrgetter("nonce")),
    "payment_attempt": ("integer", operator.attrgetter("payment_attempt")),
    "lines": ("json", lambda new: _stored_lines(new.order.lines)),
    "principal": ("text", lambda new: new.keyed and new.keyed.principal),
    "idempotency_key": ("text", lambda new: new.keyed and new.keyed.key),
    "fingerprint": ("bytea", lambda new: new.keyed and new.keyed.fingerprint),
}
"""The columns of a new order: type and value."""

BESIDE: Final[Mapping[str, tuple[str, Callable[[NewOrder], object]]]] = {
    "product_ids": ("text", lambda new: _products(new.order.lines)),
    "actor_role": ("text", operator.attrgetter("actor.role")),
    "actor_id": ("bigint", operator.attrgetter("actor.id")),
    "state": ("text", operator.attrgetter("state")),
    "trace": ("text", operator.attrgetter("trace")),
    "former_id": ("bigint", operator.attrgetter("former_id")),
}
"""The values of a new order for the other tables: type and value."""

_ARRAYS: Final = {**INSERTED, **BESIDE}

LIMITED: Final = {"buyer": "integer", "most_open": "integer", "before": "text"}
"""The bounds of each order (`rules.Limited`): types. `before` is written as `product_ids` are."""

_TYPES: Final = {**{name: kind for name, (kind, _) in _ARRAYS.items()}, **LIMITED}

INSERT_SQL: Final = f"""
    WITH bounded AS MATERIALIZED (
        SELECT set_config('lock_timeout', '2s', true) AS wait
    ), opened AS MATERIALIZED (
        -- Locks these buyers until the commit, then counts: another batch of theirs waits, and then sees these orders.
        -- `wait` is read so that the timeout is set before the lock is asked for.
        SELECT b.* FROM bounded CROSS JOIN LATERAL open_orders(CASE WHEN wait <> '' THEN $4::bigint[] END) AS b
    ), numbered AS MATERIALIZED (
        SELECT coalesce(nullif(o.former_id, 0), nextval('orders_id_seq')) AS id, nextval('saga_epochs') AS epoch, o.*,
               CASE WHEN o.before IS NULL OR opened.units = '{{}}' THEN o.before::bigint[] ELSE ARRAY(
                   SELECT coalesce((opened.units ->> (o.user_id || ':' || l.product_id))::bigint, 0) + l.before
                     FROM unnest(o.product_ids::bigint[], o.before::bigint[]) WITH ORDINALITY
                          AS l (product_id, before, n)
                    ORDER BY l.n
               ) END AS open_units
          FROM opened
         CROSS JOIN unnest({", ".join(f"${n}::{kind}[]" for n, kind in enumerate(_TYPES.values(), 5))})
               WITH ORDINALITY AS o ({", ".join(_TYPES)}, n)
         WHERE coalesce(opened.counts[o.buyer], 0) <= o.most_open
           AND (o.former_id IS NOT NULL OR NOT EXISTS (SELECT FROM lost_orders l WHERE l.nonce = o.nonce))
    ), placed AS (
        INSERT INTO orders (id, open_units, {", ".join(INSERTED)})
        SELECT id, open_units, {", ".join(INSERTED)}
          FROM numbered
         ORDER BY principal, idempotency_key
    ), listed AS (
        INSERT INTO order_products (product_id, order_id)
        SELECT product_id, id FROM numbered, unnest(product_ids::bigint[]) AS product_id
    ), noted AS (
        INSERT INTO history (order_id, version, status, payment, fulfilment, events, actor_role, actor_id)
        SELECT id, 1, 'pending', 'unpaid', 'unfulfilled', '{{order.placed}}', actor_role, actor_id FROM numbered
    ), started AS (
        INSERT INTO sagas (subject_id, kind, reference, step, state, trace, epoch, driver)
        SELECT id, $1, '', $2, state, trace, epoch, $3 FROM numbered
    )
    SELECT n, id, epoch, now() AS created_at, open_units FROM numbered ORDER BY n
"""  # noqa: S608  # of constants alone


async def insert(tx: Tx, orders: Sequence[NewOrder], kind: str, step: str, driver: int) -> list[PlacedRow]:
    """Writes orders, the first row of their history and the sagas that `driver` will drive.

    Gives ids, epochs and times in the order given; no row for an order whose buyer has too many open ones, nor for one
    that may have been lost.
    Raises `UniqueViolation` where a key has an order already. Waits for concurrent transactions with the same key or
    the same limited buyer; raises `LockTimeout` where that takes more than 2 seconds.
    """
    values = [list(map(value, orders)) for _, value in _ARRAYS.values()]
    buyers, limited = rules.limited([(new.order, new.limits) for new in orders])
    bounds: tuple[list[object], ...] = (
        [one.buyer for one in limited],
        [one.most_open for one in limited],
        [None if one.before is None else _array(one.before) for one in limited],
    )
    return await tx.fetch(PlacedRow, INSERT_SQL, kind, step, driver, buyers, *values, *bounds)


async def emit_placed(tx: Tx, orders: Sequence[Order]) -> None:
    tx.emit([event_of("order.placed", order) for order in orders])


def _stored_lines(lines: Sequence[OrderLine]) -> str:
    return _encode(
        [
            StoredLine(
                line.id,
                line.product_id,
                line.sku,
                line.name,
                line.quantity,
                line.unit_price_minor,
                line.discount_minor,
                line.tax_minor,
                line.line_total_minor,
            )
            for line in lines
        ]
    ).decode()


def _products(lines: Sequence[OrderLine]) -> str:
    return _array([line.product_id for line in lines])


def _array(values: Iterable[int]) -> str:
    """The text of a PostgreSQL array: arrays of different lengths cannot be passed as an array of arrays."""
    return "{" + ",".join(map(str, values)) + "}"


# ----------------------------------------------------------------------------------------------------------- moving


class Move(msgspec.Struct, frozen=True):
    """A move of one order along one or more axes, from the states of `order`. None: no move along this axis."""

    order: Order
    status: Status | None = None
    payment: Payment | None = None
    fulfilment: Fulfilment | None = None
    reason: CancelReason | None = None
    note: str = ""
    """For the history."""
    actor: Actor | None = None
    """The actor of this move, where it is not the one of the other moves."""
    again: Axis | None = None
    """The axis of which a further part reaches the state that the order is in: one more partial refund or return."""
    refunded_minor: int = 0
    """Refunded with this move."""
    pending_minor: int = 0
    """How much of `refunded_minor` was reserved before (`reserve_refund`)."""
    is_waiving: bool = False
    """`waived_minor` of `order` is new, and written with the move."""
    on_account: bool = False
    """The move confirms the order without a payment."""
    epoch: int | None = None
    tries: int = 0
    """`epoch` and `tries` of the saga whose step makes the move."""
    internal_note: str = ""
    """For the history; only staff see it."""
    limit_reason: str = ""
    """For the history: of a refund that gives less than was asked."""


class MovedRow(Row):
    id: int
    version: int
    updated_at: datetime.datetime
    fulfilment: Fulfilment
    refunded_minor: int


async def move(tx: Tx, moves: Sequence[Move], actor: Actor) -> list[Order | None]:
    """Moves orders, writes their history and emits their events; gives them as they are now, in order.

    None, and nothing written, for an order that is not in the states where its move starts. Each order is in at most
    one move. The caller holds the lock of each order's saga, or of the order itself. Only declared moves are made.
    """
    for wanted in moves:
        rules.check_declared(wanted.order, wanted.status, wanted.payment, wanted.fulfilment)
    alike: dict[_Transition, list[Move]] = {}
    for wanted in moves:
        alike.setdefault(_transition(wanted, wanted.actor or actor), []).append(wanted)
    waived = [m.order for m in moves if m.is_waiving]
    if len(alike) > 1 or waived:  # several statements: all rows are locked before, in the order of their ids
        await tx.execute(
            "SELECT FROM orders WHERE id = ANY($1::bigint[]) ORDER BY id FOR NO KEY UPDATE", [m.order.id for m in moves]
        )
    if waived:
        await _waive(tx, waived)
    moved: dict[int, MovedRow] = {}
    for transition, some in alike.items():
        moved |= {row.id: row for row in await _move_together(tx, transition, some)}
        # A row that another transaction has changed meanwhile has another ctid than the statement has read. That change
        # may only have shipped the order: the next statement reads the new ctid, and its guards decide.
        if missing := [m for m in some if m.order.id not in moved]:
            moved |= {row.id: row for row in await _move_together(tx, transition, missing)}
    orders = [_moved(m, moved[m.order.id]) if m.order.id in moved else None for m in moves]
    emitted = [
        event_of(type_, now)
        for wanted, now in zip(moves, orders, strict=True)
        if now
        for type_ in rules.events_of(wanted.order, now, wanted.again)
    ]
    tx.emit(emitted)
    return orders


async def _waive(tx: Tx, orders: Sequence[Order]) -> None:
    """Writes `waived_minor` of orders that the caller has locked."""
    await tx.execute(
        """
        UPDATE orders o
           SET waived_minor = w.waived_minor
          FROM unnest($1::bigint[], $2::bigint[]) AS w (id, waived_minor)
         CROSS JOIN LATERAL (SELECT ctid AS place FROM orders WHERE id = w.id LIMIT 1) k
         WHERE o.ctid = k.place
        """,
        [order.id for order in orders],
        [order.waived_minor for order in orders],
    )


class _Transition(msgspec.Struct, frozen=True):
    """What several moves have in common: one parameter for all of them, instead of an array."""

    before: tuple[str, str, str]
    after: tuple[str, str, str]
    events: tuple[str, ...]
    reason: str | None
    note: str
    on_account: bool
    actor: Actor
    internal_note: str
    limit_reason: str


def _transition(wanted: Move, actor: Actor) -> _Transition:
    order = wanted.order
    after = (wanted.status or order.status, wanted.payment or order.payment, wanted.fulfilment or order.fulfilment)
    return _Transition(
        before=(order.status, order.payment, order.fulfilment),
        after=after,
        events=tuple(rules.events_between((order.status, order.payment, order.fulfilment), after, wanted.again)),
        reason=None if wanted.reason is None else _encode(wanted.reason).decode(),
        note=wanted.note,
        on_account=wanted.on_account,
        actor=actor,
        internal_note=wanted.internal_note,
        limit_reason=wanted.limit_reason,
    )


MOVE_SQL: Final = """
    WITH moved AS (
        UPDATE orders o
           SET status = $9,
               payment = $10,
               fulfilment = CASE WHEN $11 <> $8 THEN $11 ELSE o.fulfilment END,
               reason = coalesce($13, o.reason),
               on_account = o.on_account OR $15,
               refunded_minor = o.refunded_minor + w.refunded_minor,
               refund_pending_minor = o.refund_pending_minor - w.pending_minor,
               version = o.version + 1,
               -- Not the time of the transaction's start: it may be before that of a change it has waited for.
               updated_at = greatest(o.updated_at, clock_timestamp())
          FROM (
            SELECT w.*, k.place
              FROM unnest($1::bigint[], $2::bigint[], $3::bigint[], $4::bigint[], $5::integer[])
                   AS w (id, refunded_minor, pending_minor, epoch, tries)
             CROSS JOIN LATERAL (SELECT ctid AS place FROM orders WHERE id = w.id LIMIT 1) k
          ) w
         WHERE o.ctid = w.place AND o.status = $6 AND o.payment = $7
           -- Goods are shipped without the saga: a payment can move all the same.
           AND (o.fulfilment = $8 OR $11 = $8)
        RETURNING o.id, o.version, o.updated_at, o.status, o.payment, o.fulfilment, o.refunded_minor,
                  w.epoch, w.tries
    ), noted AS (
        INSERT INTO history (order_id, version, status, payment, fulfilment, events, note, actor_role, actor_id,
                             epoch, tries, at, internal_note, limit_reason)
        SELECT id, version, status, payment, fulfilment, $12::text[], $14, $16, $17, epoch, tries, updated_at, $18,
               $19
          FROM moved
    )
    SELECT id, version, updated_at, fulfilment, refunded_minor FROM moved
"""
"""$1 to $5: columns of the moves. $6 to $8: their states before; $9 to $11: after; from $12 on: what they share."""


async def _move_together(tx: Tx, transition: _Transition, moves: Sequence[Move]) -> list[MovedRow]:
    """Moves orders of one transition. An order without a row is not in the states before, or was changed."""
    ordered = sorted(moves, key=lambda m: m.order.id)
    return await tx.fetch(
        MovedRow,
        MOVE_SQL,
        [m.order.id for m in ordered],
        [m.refunded_minor for m in ordered],
        [m.pending_minor for m in ordered],
        [m.epoch for m in ordered],
        [m.tries for m in ordered],
        *transition.before,
        *transition.after,
        list(transition.events),
        transition.reason,
        transition.note,
        transition.on_account,
        transition.actor.role,
        transition.actor.id,
        transition.internal_note,
        transition.limit_reason,
    )


def event_of(type_: str, order: Order) -> events.Outgoing:
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
        waived_minor=order.waived_minor,
    )
    return events.Outgoing(type=type_, subject="order", subject_id=order.id, version=order.version, data=data)


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
