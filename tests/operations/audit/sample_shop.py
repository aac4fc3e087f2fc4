"""A small shop in which everything is right, written by hand into the databases of all services.

    order 1    paid, delivered, completed                   2 of product 1
    order 2    delivered, one piece came back               1 of product 1, 3 of product 2
    order 3    authorized, then cancelled before its stock was committed
    order 4    waits for its payment, after one that was declined; its stock is held
    order 5    paid by one charge, then cancelled: everything came back
    order 6    sold on account
    order 7    of a guest, waits for its payment; its stock is held

All of it happened an hour ago.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from typing import Any

import msgspec

from mercato import topology
from mercato.chassis.postgres import outbox_row
from mercato.chassis.postgres.outbox_row import OutboxEvent
from mercato.operations.audit.history import ClientOperation
from mercato.operations.audit.tables import WANTED
from mercato.testing.cluster import Cluster
from mercato.testing.tables import connected

THEN = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=1)
"""A past of any length will do: a file may be imported long before its tests run. What is still to come is counted from
when the databases are filled."""

# id, user, status, payment, fulfilment, total, refunded, version, key
ORDERS = (
    (1, 1, "completed", "paid", "delivered", 1000, 0, 6, "k1"),
    (2, 1, "confirmed", "partially_refunded", "delivered", 800, 100, 6, "k2"),
    (3, 2, "cancelled", "voided", "unfulfilled", 500, 0, 3, "k3"),
    (4, 2, "pending", "unpaid", "unfulfilled", 100, 0, 1, "k4"),
    (5, 2, "cancelled", "refunded", "unfulfilled", 100, 100, 4, "k5"),
    (6, 1, "confirmed", "unpaid", "unfulfilled", 500, 0, 2, None),
    (7, 0, "pending", "unpaid", "unfulfilled", 500, 0, 1, None),
)

# order, product, quantity, returned, unit price
LINES = ((1, 1, 2, 0, 500), (2, 1, 1, 0, 500), (2, 2, 3, 1, 100), (3, 1, 1, 0, 500), (4, 2, 1, 0, 100),
         (5, 2, 1, 0, 100), (6, 1, 1, 0, 500), (7, 1, 1, 0, 500))  # fmt: skip

PLACED = ("status", None, "pending")
AUTHORIZED = (("status", "pending", "confirmed"), ("payment", "unpaid", "authorized"))
PAID = ("payment", "authorized", "paid")
SHIPPED = ("fulfilment", "unfulfilled", "shipped")
DELIVERED = ("fulfilment", "shipped", "delivered")

# Of each order, the moves that each version made.
HISTORY: Mapping[int, tuple[tuple[tuple[str, str | None, str], ...], ...]] = {
    1: ((PLACED,), AUTHORIZED, (PAID,), (SHIPPED,), (DELIVERED,), (("status", "confirmed", "completed"),)),
    2: ((PLACED,), AUTHORIZED, (PAID,), (SHIPPED,), (DELIVERED,),
        (("payment", "paid", "partially_refunded"), ("fulfilment", "delivered", "delivered"))),
    3: ((PLACED,), AUTHORIZED, (("status", "confirmed", "cancelled"), ("payment", "authorized", "voided"))),
    4: ((PLACED,),),
    5: ((PLACED,), AUTHORIZED, (PAID,), (("status", "confirmed", "cancelled"), ("payment", "paid", "refunded"))),
    6: ((PLACED,), (("status", "pending", "confirmed"),)),
    7: ((PLACED,),),
}  # fmt: skip

# order, state, lines (product, quantity, returned, version of the level)
RESERVATIONS = (
    (1, "committed", ((1, 2, 0, 3),)),
    (2, "committed", ((1, 1, 0, 3), (2, 3, 1, 3))),
    (3, "released", ((1, 1, 0, None),)),
    (4, "held", ((2, 1, 0, None),)),
    (5, "committed", ((2, 1, 1, 5),)),
    (6, "committed", ((1, 1, 0, 5),)),
    (7, "held", ((1, 1, 0, None),)),
)

# id, product, kind, delta, order, reference, version of the level
MOVEMENTS = (
    (1, 1, "receipt", 100, None, None, 1),
    (2, 2, "receipt", 50, None, None, 1),
    (3, 2, "return", 1, 2, "r1", 4),
    (4, 2, "return", 1, 5, "cancelled", 6),
)

# product, on hand, reserved, version
LEVELS = ((1, 96, 1, 6), (2, 48, 1, 7))

# id, order, amount, authorized, captured, refunded, status, operations (kind, amount, reference, status)
PAYMENTS = (
    (1, 1, 1000, 1000, 1000, 0, "captured", (("authorize", 1000, "", "succeeded"), ("capture", 1000, "", "succeeded"))),
    (2, 2, 800, 800, 800, 100, "partially_refunded", (("authorize", 800, "", "succeeded"),
        ("capture", 800, "", "succeeded"), ("refund", 100, "r1", "succeeded"))),
    (3, 3, 500, 500, 0, 0, "voided", (("authorize", 500, "", "succeeded"), ("void", 500, "", "succeeded"))),
    (4, 4, 100, 0, 0, 0, "failed", (("authorize", 100, "", "declined"),)),
    (5, 5, 100, 100, 100, 100, "refunded", (("charge", 100, "", "succeeded"),
        ("refund", 100, "cancelled", "succeeded"))),
)  # fmt: skip

# Of the bank. The number of a charge is that of its payment: id, order, authorized, captured, refunded, state.
CHARGES = (
    (1, 1, 1000, 1000, 0, "captured"),
    (2, 2, 800, 800, 100, "captured"),
    (3, 3, 500, 0, 0, "voided"),
    (5, 5, 100, 100, 100, "captured"),
)

ACCOUNTS = (("provider", 1700), ("sales", -1900), ("refunds", 200))
SIDES = {"refund": ("refunds", "provider")}
"""Debit and credit of a transfer."""

STOCK_NEWS = ((1, 1, "stock.available", "product", 1, 1), (2, 2, "stock.available", "product", 2, 1))
"""Events of inventory that products subscribes to: first of all events, id, ..., subject, subject_id, version."""

PRICE_NEWS = ("product.price_changed", "product", 1, 2)
REFUND_NEWS = ("refund.succeeded", "order", 2, len(HISTORY[2]))
"""Events that come into the security log: type, subject, subject_id, version."""

Event = tuple[int, str, str, int, int]
"""Id of its outbox row, type, subject, subject id, version."""


def outboxes() -> dict[str, list[Event]]:
    orders = [
        (event_type(*move), order, version)
        for order, versions in HISTORY.items()
        for version, moves in enumerate(versions, 1)
        for move in moves
    ]
    stock = [(type_, subject, id_, version) for _, _, type_, subject, id_, version in STOCK_NEWS]
    for order, state, _ in RESERVATIONS:
        stock.append(("stock.held", "reservation", order, 1))
        if state != "held":
            stock.append((f"stock.{state}", "reservation", order, 2))
    money = [(f"payment.{kind}", "payment", payment, n)
             for payment, *_, operations in PAYMENTS for n, (kind, *_) in enumerate(operations, 2)]  # fmt: skip
    return {
        "orders": [
            *((n, type_, "order", order, version) for n, (type_, order, version) in enumerate(orders, 1)),
            (len(orders) + 1, *REFUND_NEWS),
        ],
        "inventory": [(n, *event) for n, event in enumerate(stock, 1)],
        "payments": [(n, *event) for n, event in enumerate(money, 1)],
        "products": [(1, *PRICE_NEWS)],
    }


def event_type(axis: str, before: str | None, after: str) -> str:
    """The type of the event that a move makes."""
    if before is None:
        return "order.placed"
    return "order.partially_returned" if axis == "fulfilment" and before == after else f"order.{after}"


async def build(cluster: Cluster) -> dict[str, str]:
    """Fresh databases of all services with the sample shop in them; gives their DSNs, which the caller releases."""
    dsns = {name: await cluster.fresh_database(name, topology.migrations(name)) for name in WANTED}
    await fill(dsns)
    return dsns


async def fill(dsns: Mapping[str, str]) -> None:
    """Writes the sample shop into databases that are migrated and empty."""
    for name, write in FILLS.items():
        async with connected(dsns[name]) as connection:
            await write(connection)


def transitions() -> list[tuple[int, int, str, str, str, list[str]]]:
    """Order, version, the state of each axis after it, and the events of each transition."""
    rows: list[tuple[int, int, str, str, str, list[str]]] = []
    for order, versions in HISTORY.items():
        states = {"status": "pending", "payment": "unpaid", "fulfilment": "unfulfilled"}
        for version, moves in enumerate(versions, 1):
            states |= {axis: after for axis, _, after in moves}
            status, payment, fulfilment = states.values()
            rows.append((order, version, status, payment, fulfilment, [event_type(*move) for move in moves]))
    return rows


def lines_of(order: int) -> str:
    """The JSON of an order's lines."""
    lines = [line for line in LINES if line[0] == order]
    return json.dumps([
        {"id": n, "product_id": product, "sku": "sku", "name": "name", "quantity": quantity, "unit_price_minor": unit,
         "discount_minor": 0, "tax_minor": 0, "total_minor": quantity * unit}
        for n, (_, product, quantity, _, unit) in enumerate(lines, 1)
    ])  # fmt: skip


async def _fill_orders(connection: Any) -> None:
    due_at = await connection.fetchval("SELECT now() + interval '15 minutes'")
    await connection.executemany(
        """
        INSERT INTO orders (id, user_id, status, payment, fulfilment, total_minor, refunded_minor, version, principal,
                            idempotency_key, fingerprint, currency, created_at, updated_at, lines, returned, nonce)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, CASE WHEN $9::text IS NULL THEN NULL ELSE 'user:' || $2::bigint END,
                $9, CASE WHEN $9::text IS NULL THEN NULL ELSE 'f'::bytea END, 'USD', $10, $10, $11, $12, $1)
        """,
        [(*order, THEN, lines_of(order[0]), [line[3] for line in LINES if line[0] == order[0]]) for order in ORDERS],
    )
    await connection.executemany(
        "INSERT INTO order_products (product_id, order_id) VALUES ($2, $1)", [line[:2] for line in LINES]
    )
    await connection.executemany(
        """
        INSERT INTO history (order_id, version, status, payment, fulfilment, events, actor_role, actor_id, at)
        VALUES ($1, $2, $3, $4, $5, $6, 'service', 0, $7)
        """,
        [(*row, THEN) for row in transitions()],
    )
    await connection.execute(
        """
        INSERT INTO refunds (order_id, reference, lines, amount_minor, currency, payment_attempt, status, actor_role,
                             actor_id, settled_at)
        VALUES (2, 'r1', '[]', 100, 'USD', 1, 'succeeded', 'staff', 9, now())
        """
    )
    await connection.execute(
        """
        INSERT INTO sagas (kind, subject_id, reference, step, state, wake_at, updated_at)
        VALUES ('checkout', 4, '', 'awaiting', '{}', $1, $2), ('checkout', 7, '', 'awaiting', '{}', $1, $2)
        """,
        due_at,
        THEN,
    )
    await _fill_outbox(connection, outboxes()["orders"])


async def _fill_inventory(connection: Any) -> None:
    await connection.executemany(
        "INSERT INTO levels (product_id, on_hand, reserved, version, updated_at) VALUES ($1, $2, $3, $4, $5)",
        [(*level, THEN) for level in LEVELS],
    )
    await connection.executemany(
        """
        INSERT INTO reservations (order_id, nonce, state, product_ids, quantities, returned, level_versions, ended_at,
                                  updated_at)
        VALUES ($1, $1, $2, $3, $4, CASE WHEN $2 = 'committed' THEN $5::integer[] END,
                CASE WHEN $2 = 'committed' THEN $6::bigint[] END, CASE WHEN $2 <> 'held' THEN $7::timestamptz END, $7)
        """,
        [(order, state, *map(list, zip(*lines, strict=True)), THEN) for order, state, lines in RESERVATIONS],
    )
    await connection.executemany(
        """
        INSERT INTO movements (id, product_id, kind, delta, order_id, reference, level_version, actor_role, actor_id,
                               at)
        VALUES ($1, $2, $3, $4, $5, $6, $7, 'service', 0, $8)
        """,
        [(*movement, THEN) for movement in MOVEMENTS],
    )
    await connection.execute("INSERT INTO guest_holds (order_id, product_id, quantity) VALUES (7, 1, 1)")
    await _fill_outbox(connection, outboxes()["inventory"])


async def _fill_payments(connection: Any) -> None:
    await connection.executemany(
        """
        INSERT INTO payments (id, order_id, amount_minor, authorized_minor, captured_minor, refunded_minor, status,
                              nonce, attempt, user_id, method, currency, created_at)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $2, 1, 1, 'sandbox:ok', 'USD', $8)
        """,
        [(*payment[:7], THEN) for payment in PAYMENTS],
    )
    await connection.executemany(
        """
        INSERT INTO operations (payment_id, kind, amount_minor, reference, status, code, provider_id, key, currency,
                                calls, began_at, settled_at)
        VALUES ($2, $3, $4, $5, $6, CASE WHEN $6 = 'declined' THEN 'card_declined' END,
                CASE WHEN $6 = 'succeeded' THEN $1::bigint END, $7, 'USD', 1, $8, $8)
        """,
        [(n, payment, kind, amount, reference, status, key, THEN)
         for n, payment, _, kind, amount, reference, status, key in operations()],
    )  # fmt: skip
    await connection.executemany("INSERT INTO accounts VALUES ($1, 'USD', $2)", ACCOUNTS)
    await connection.executemany(
        """
        INSERT INTO transfers (payment_id, kind, reference, debit, credit, amount_minor, currency)
        VALUES ($1, $2, $3, $4, $5, $6, 'USD')
        """,
        [
            (payment, kind, reference, *SIDES.get(kind, ("provider", "sales")), amount)
            for _, payment, _, kind, amount, reference, _, _ in operations()
            if kind in ("charge", "capture", "refund")
        ],
    )
    await _fill_outbox(connection, outboxes()["payments"])


async def _fill_sandbox(connection: Any) -> None:
    await connection.executemany(
        """
        INSERT INTO charges (id, order_id, authorized_minor, captured_minor, refunded_minor, state, method, currency,
                             created_at)
        VALUES ($1, $2, $3, $4, $5, $6, 'sandbox:ok', 'USD', $7)
        """,
        [(*charge, THEN) for charge in CHARGES],
    )
    await connection.executemany(
        """
        INSERT INTO operations (id, charge_id, order_id, kind, amount_minor, status, code, key, currency, method,
                                created_at)
        VALUES ($1, $2, $3, $4, $5, $6, CASE WHEN $6 = 'declined' THEN 'card_declined' END, $7, 'USD', 'sandbox:ok', $8)
        """,
        [
            (n, payment if status == "succeeded" else None, order, kind, amount, status, key, THEN)
            for n, payment, order, kind, amount, _, status, key in operations()
        ],
    )


async def _fill_events(connection: Any) -> None:
    await connection.executemany(
        """
        INSERT INTO feed (source, outbox_id, place, count, events, at, received_at) VALUES ($1, $2, 0, 1, $3, $4, $4)
        """,
        [(source, event[0], _row(event), THEN) for source, events in outboxes().items() for event in events],
    )
    for source, events in outboxes().items():
        await _set_cursor(connection, "events.feed", source, events)


async def _fill_products(connection: Any) -> None:
    await connection.executemany(
        """
        INSERT INTO products (id, sku, name, description, price_minor, currency, category, in_stock, stock_version)
        VALUES ($1, 'sku-' || $1::bigint, 'Thing', '', 100, 'USD', 'things', true, $2)
        """,
        [(id_, version) for *_, id_, version in STOCK_NEWS],
    )
    await _set_cursor(connection, "products.in_stock", "inventory", outboxes()["inventory"])
    await _fill_outbox(connection, outboxes()["products"])


async def _fill_users(connection: Any) -> None:
    await connection.executemany(
        """
        INSERT INTO security_log (at, kind, account_id, actor_role, actor_id, address, subject, detail)
        VALUES ($1, $2, 0, 'staff', 9, $3, $4, '')
        """,
        [
            (THEN, "price_changed", "", "product 1"),
            (THEN, "refunded", "", "order 2"),
            (THEN, "signed_in", "192.0.2.7", ""),
            (THEN, "signed_in", "192.0.2.7", ""),
        ],
    )
    for source in ("orders", "products"):
        await _set_cursor(connection, "users.security_log", source, outboxes()[source])


async def _set_cursor(connection: Any, consumer: str, source: str, events: list[Event]) -> None:
    """Behind everything."""
    await connection.execute(
        "INSERT INTO cursors VALUES ($1, $2, $3, $4)", consumer, source, outbox_row.end_of_row(events[-1][0]), THEN
    )


async def _fill_outbox(connection: Any, events: list[Event]) -> None:
    await connection.executemany(
        "INSERT INTO outbox (id, events, at) VALUES ($1, $2, $3)", [(event[0], _row(event), THEN) for event in events]
    )


def _row(event: Event) -> str:
    """A row of this event alone."""
    _, type_, subject, subject_id, version = event
    [row] = outbox_row.pack(
        [OutboxEvent(type_, subject, subject_id, version, msgspec.Raw(b'{"secret": "of an event"}'))]
    )
    return row


def operations() -> list[tuple[int, int, int, str, int, str, str, str]]:
    """Id, payment, order, kind, amount, reference, status and key of everything that the bank was asked for."""
    asked = [(payment, order, *operation) for payment, order, *_, operations in PAYMENTS for operation in operations]
    return [
        (n, payment, order, kind, amount, reference, status, ":".join(filter(None, (str(payment), kind, reference))))
        for n, (payment, order, kind, amount, reference, status) in enumerate(asked, 1)
    ]


FILLS = {
    "orders": _fill_orders,
    "inventory": _fill_inventory,
    "payments": _fill_payments,
    "sandbox": _fill_sandbox,
    "events": _fill_events,
    "products": _fill_products,
    "users": _fill_users,
}


def client_history() -> list[ClientOperation]:
    """What the buyers have seen: each has placed its orders, looked at them, and asked once more with the same key."""
    seen: list[ClientOperation] = []
    for id_, user, _, _, _, _, _, version, key in ORDERS:
        placed = _seen(f"place {id_}", user, "POST /orders", id_, 1, 201, key)
        seen += [
            placed,
            _seen(f"look {id_}", user, "GET /orders/{id}", id_, version, 200, None, minutes=1),
            *([_seen(f"again {id_}", user, "POST /orders", id_, 1, 201, key, minutes=2)] if key else []),
        ]
    seen.append(_seen("staff look 1", 0, "GET /orders/{id}", 1, 6, 200, None, minutes=3, role="staff"))
    return seen


def _seen(
    op_id: str, user: int, route: str, order: int, version: int, status: int, key: str | None, *,
    minutes: int = 0, role: str = "customer",
) -> ClientOperation:  # fmt: skip
    invoked_at = THEN + datetime.timedelta(minutes=minutes)
    return ClientOperation(
        op_id=op_id, principal=f"user:{user}" if user else role, user_id=user, role=role, route=route,
        invoked_at=invoked_at, outcome="final", completed_at=invoked_at + datetime.timedelta(seconds=1), status=status,
        idempotency_key=key, fingerprint=f"request {order}", answer=f"order {order}", order_id=order, version=version,
    )  # fmt: skip
