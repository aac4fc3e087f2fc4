"""The tables that an audit copies, and the views over the copies that the invariants share.

It copies only the tables and columns that an invariant needs: no password, session, address, stored answer or payload
of an event leaves its own database.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Final

from mercato.chassis.messaging.events import KEPT_DAYS
from mercato.operations.audit.history import COLUMNS as HISTORY_COLUMNS, ClientOperation, as_row
from mercato.operations.copying import Copies, Table
from mercato.operations.ids import SEQUENCES

# A row for each event of an outbox row. Positions as in `chassis/messaging/rows.py`: 12 bits for the place.
_EVENTS: Final = """
    CROSS JOIN LATERAL ROWS FROM (
        json_to_recordset(r.events::json) AS (type text, subject text, subject_id bigint, version bigint)
    ) WITH ORDINALITY AS e (type, subject, subject_id, version, n)
"""
OUTBOX: Final = (
    Table(
        "outbox",
        ("r.id << 12 | e.n - 1 AS id", "e.type", "e.subject", "e.subject_id", "e.version", "r.at"),
        f"outbox r {_EVENTS}",
    ),
    Table("outbox_readers", ("seen_at",)),
)
FEED: Final = Table(
    "feed",
    (
        "r.position << 12 | e.n - 1 AS position",
        "r.source",
        "r.outbox_id << 12 | r.place + e.n - 1 AS event_id",
        "e.type",
        "e.subject",
        "e.subject_id",
        "e.version",
        "r.at",
        "r.received_at",
    ),
    f"feed r {_EVENTS}",
)
CONSUMER: Final = (
    Table("cursors", ("consumer", "source", "position")),
    Table(
        "parked",
        (
            "consumer",
            "source",
            "position AS event_id",
            "type",
            "subject",
            "subject_id",
            "tries",
            "retry_at",
            "dead_at",
            "replayed_at",
        ),
    ),
)

# Only entries that come from events, without the address.
SECURITY_LOG: Final = Table(
    "security_log",
    ("e.kind", "e.subject", "e.at"),
    f"security_log e WHERE e.kind IN ('price_changed', 'refunded') AND e.at > now() - interval '{KEPT_DAYS} days'",
)


def _next_ids(service: str) -> tuple[Table, ...]:
    # A sequence belongs to no snapshot. It is read after all snapshots are taken, so it is never behind their rows.
    return tuple(Table(each.name, ("last_value", "is_called")) for each in SEQUENCES if each.owner == service)


IDEMPOTENCY: Final = Table("idempotency", ("principal", "operation", "key", "answer IS NOT NULL AS answered"))

WANTED: Final[Mapping[str, Sequence[Table]]] = {
    # Consumers before their sources, in the order of reading. The snapshots are taken at once, so the order has no
    # effect.
    "events": (FEED, *CONSUMER),
    "products": (Table("products", ("id", "in_stock", "stock_version")), *CONSUMER, *OUTBOX, *_next_ids("products")),
    "users": (SECURITY_LOG, *CONSUMER, *_next_ids("users")),
    "orders": (
        Table(
            "orders",
            (
                "id",
                "nonce",
                "user_id",
                "status",
                "payment",
                "fulfilment",
                "total_minor",
                "refunded_minor",
                "refund_pending_minor",
                "waived_minor",
                "created_at",
                "updated_at",
                "version",
                "principal",
                "idempotency_key",
                "(SELECT json_agg(line::jsonb - 'sku' - 'name') FROM json_array_elements(lines) AS line) AS lines",
                "returned",
            ),
        ),
        Table("order_products", ("product_id", "order_id")),
        Table("history", ("order_id", "version", "status", "payment", "fulfilment", "events", "at")),
        Table("refunds", ("order_id", "reference", "amount_minor", "status", "created_at")),
        Table("payment_keys", ("principal", "key", "order_id")),
        Table("sagas", ("kind", "subject_id", "reference", "step", "tries", "driver", "wake_at", "updated_at")),
        Table("saga_drivers", ("renewed_at",)),
        *_next_ids("orders"),
        *OUTBOX,
    ),
    "inventory": (
        Table("levels", ("product_id", "on_hand", "reserved", "version", "updated_at")),
        Table(
            "reservations",
            ("order_id", "state", "updated_at", "product_ids", "quantities", "level_versions", "returned", "nonce"),
        ),
        Table("guest_holds", ("product_id", "order_id", "quantity")),
        Table("movements", ("id", "product_id", "kind", "delta", "order_id", "reference", "level_version")),
        IDEMPOTENCY,
        *OUTBOX,
    ),
    "payments": (
        Table(
            "payments",
            (
                "id",
                "order_id",
                "attempt",
                "status",
                "amount_minor",
                "authorized_minor",
                "captured_minor",
                "refunded_minor",
                "created_at",
                "nonce",
            ),
        ),
        Table(
            "operations",
            (
                "payment_id",
                "kind",
                "reference",
                "key",
                "amount_minor",
                "currency",
                "status",
                "settled_at",
            ),
        ),
        Table(
            "intents",
            ("payment_id", "kind", "reference", "key", "amount_minor", "currency", "status", "asked_at"),
        ),
        Table("accounts", ("account", "currency", "balance_minor")),
        Table("transfers", ("payment_id", "kind", "reference", "debit", "credit", "amount_minor", "currency")),
        *_next_ids("payments"),
        *OUTBOX,
    ),
    "sandbox": (
        Table(
            "charges",
            (
                "id",
                "order_id",
                "currency",
                "authorized_minor",
                "captured_minor",
                "refunded_minor",
                "state",
                "created_at",
            ),
        ),
        Table(
            "operations",
            (
                "id",
                "key",
                "kind",
                "charge_id",
                "order_id",
                "amount_minor",
                "currency",
                "status",
                "ready_at",
                "created_at",
            ),
        ),
    ),
}
"""The tables by service."""

SUBSCRIPTIONS: Final[Mapping[str, Sequence[str] | None]] = {
    "events.feed": None,
    "products.in_stock": ("stock.available", "stock.exhausted"),
    "users.security_log": ("product.price_changed", "refund.succeeded"),
}
"""The types of events to which each consumer subscribes; None: all."""

SURE_DAYS: Final = KEPT_DAYS - 1
"""Published events, and the feed, are kept for `KEPT_DAYS`: younger events must be in the outbox and in the feed."""

CLOCK: Final = """
    CREATE UNLOGGED TABLE audit.clock AS
    SELECT $1::timestamptz AS taken_at, shop.as_of,
           CASE WHEN $2::float8 > 0 THEN shop.as_of - make_interval(secs => $2) ELSE 'infinity' END AS settled_before,
           $1::timestamptz - make_interval(days => $3::integer) AS sure_after
      FROM (
        SELECT CASE WHEN $4::boolean THEN least(activity.at, $1::timestamptz, $5::timestamptz)
                    ELSE $1::timestamptz END AS as_of
          FROM audit.last_activity activity
      ) shop
"""

# In a stopped shop nothing continues, so ages are counted back from its last activity. The consumers of a running shop
# update `outbox_readers` every few seconds. The feed and the tables of consumers do not count: a replay writes there
# without a running shop.
LAST_ACTIVITY: Final = """
    CREATE VIEW audit.last_activity AS
    SELECT max(at) AS at
      FROM (
        SELECT max(updated_at) AS at FROM orders.orders
        UNION ALL SELECT max(updated_at) FROM orders.sagas
        UNION ALL SELECT max(renewed_at) FROM orders.saga_drivers
        UNION ALL SELECT max(updated_at) FROM inventory.reservations
        UNION ALL SELECT max(settled_at) FROM payments.operations
        UNION ALL SELECT max(asked_at) FROM payments.intents
        UNION ALL SELECT max(created_at) FROM sandbox.operations
        UNION ALL SELECT max(at) FROM orders.outbox
        UNION ALL SELECT max(at) FROM inventory.outbox
        UNION ALL SELECT max(at) FROM payments.outbox
        UNION ALL SELECT max(at) FROM products.outbox
        UNION ALL SELECT max(seen_at) FROM orders.outbox_readers
        UNION ALL SELECT max(seen_at) FROM inventory.outbox_readers
        UNION ALL SELECT max(seen_at) FROM payments.outbox_readers
        UNION ALL SELECT max(seen_at) FROM products.outbox_readers
      ) activities
"""

VIEWS: Final = """
    CREATE VIEW audit.orders AS
    SELECT o.*,
           -- Work in progress updates the order, or its saga.
           greatest(o.updated_at, touched.at) < c.settled_before AS settled
      FROM orders.orders o
     CROSS JOIN audit.clock c
      LEFT JOIN (SELECT subject_id, max(updated_at) AS at FROM orders.sagas GROUP BY subject_id) touched
        ON touched.subject_id = o.id;

    CREATE VIEW audit.order_lines AS
    SELECT o.id AS order_id, l.id, l.product_id, l.quantity, l.unit_price_minor, l.discount_minor, l.tax_minor,
           l.total_minor, coalesce(o.returned[l.id], 0) AS returned
      FROM orders.orders o
     CROSS JOIN json_to_recordset(o.lines) AS l (
           id integer, product_id bigint, quantity integer, unit_price_minor bigint, discount_minor bigint,
           tax_minor bigint, total_minor bigint);

    -- Each transition with the one before it.
    CREATE VIEW audit.transitions AS
    SELECT h.*, lag(h.version) OVER steps AS was_version, lag(h.status) OVER steps AS was_status,
           lag(h.payment) OVER steps AS was_payment, lag(h.fulfilment) OVER steps AS was_fulfilment
      FROM orders.history h
    WINDOW steps AS (PARTITION BY h.order_id ORDER BY h.version);

    -- The lines of reservations.
    CREATE VIEW audit.reservation_lines AS
    SELECT r.order_id, r.state, r.updated_at, l.product_id, l.quantity, l.level_version,
           coalesce(l.returned, 0) AS returned
      FROM inventory.reservations r
     CROSS JOIN unnest(r.product_ids, r.quantities, r.level_versions, r.returned)
           AS l (product_id, quantity, level_version, returned);

    CREATE VIEW audit.held_lines AS
    SELECT * FROM audit.reservation_lines WHERE state = 'held';

    CREATE VIEW audit.came_back AS
    SELECT order_id, product_id, sum(delta) AS came_back
      FROM inventory.movements
     WHERE kind = 'return'
     GROUP BY order_id, product_id;

    -- All changes of the pieces on hand, with the version of the level right after each.
    CREATE VIEW audit.stock_changes AS
    SELECT order_id, product_id, level_version, delta FROM inventory.movements
    UNION ALL
    SELECT order_id, product_id, level_version, -quantity FROM audit.reservation_lines WHERE state = 'committed';

    CREATE VIEW audit.outbox AS
    SELECT 'orders' AS source, e.* FROM orders.outbox e
    UNION ALL SELECT 'inventory', e.* FROM inventory.outbox e
    UNION ALL SELECT 'payments', e.* FROM payments.outbox e
    UNION ALL SELECT 'products', e.* FROM products.outbox e;

    CREATE VIEW audit.cursors AS
    SELECT * FROM events.cursors
    UNION ALL SELECT * FROM products.cursors
    UNION ALL SELECT * FROM users.cursors;

    CREATE VIEW audit.parked AS
    SELECT * FROM events.parked
    UNION ALL SELECT * FROM products.parked
    UNION ALL SELECT * FROM users.parked;

    -- Events that came out of order, perhaps after their outbox rows were purged.
    CREATE VIEW audit.replayed AS
    SELECT consumer, source, event_id FROM audit.parked WHERE replayed_at IS NOT NULL;

    -- Events before the cursor of a consumer that are neither parked nor dead: they must have had their effect.
    CREATE VIEW audit.consumed AS
    SELECT s.consumer, e.*
      FROM audit.outbox e
      JOIN audit.subscriptions s ON s.type IS NULL OR s.type = e.type
      JOIN audit.cursors c ON c.consumer = s.consumer AND c.source = e.source AND c.position >= e.id
      LEFT JOIN audit.parked p
        ON p.consumer = s.consumer AND p.source = e.source AND p.event_id = e.id AND p.replayed_at IS NULL
     WHERE p.event_id IS NULL;

    CREATE VIEW audit.idempotency AS
    SELECT 'inventory' AS service, i.* FROM inventory.idempotency i;
"""


async def prepare(
    copies: Copies,
    *,
    settled_seconds: float,
    history: Sequence[ClientOperation] | None,
    is_stopped: bool = False,
    stopped_at: datetime.datetime | None = None,
) -> datetime.datetime:
    """Adds what the invariants need besides the copies: the time, the subscriptions, the clients' history.

    Gives the reference time of the checks: that of the copies; of a stopped shop, that of its last activity, and not
    later than `stopped_at`.
    """
    # With 0 nothing is too young: the shop is idle, and everything must have ended.
    await copies.execute("CREATE SCHEMA audit")
    await copies.execute(LAST_ACTIVITY)
    await copies.execute(CLOCK, copies.taken_at, settled_seconds, SURE_DAYS, is_stopped, stopped_at)
    subscribed = [(consumer, type_) for consumer, types in SUBSCRIPTIONS.items() for type_ in types or (None,)]
    await copies.fill("audit", "subscriptions", {"consumer": "text", "type": "text"}, subscribed)
    await copies.fill("history", "ops", HISTORY_COLUMNS, [as_row(operation) for operation in history or ()])
    await copies.execute(VIEWS)
    await copies.execute("ANALYZE audit.clock, audit.subscriptions, history.ops")
    [clock] = await copies.fetch("SELECT as_of FROM audit.clock")
    return clock["as_of"]
