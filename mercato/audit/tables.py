"""What an audit copies, and the views over the copies that the invariants share.

Only tables that an invariant needs, and of these only the columns: no password, no session, no address, no stored
answer and no payload of an event ever leaves its own database.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Final

from mercato.audit.history import COLUMNS as HISTORY_COLUMNS
from mercato.audit.history import ClientOperation, as_row
from mercato.chassis.copying import Copies, Table
from mercato.chassis.events import KEPT_DAYS
from mercato.chassis.outbox import LEASE_SECONDS

OUTBOX: Final = (
    Table("outbox", ("id", "type", "subject", "subject_id", "version", "at", "published_at")),
    Table("outbox_retries", ("event_id", "consumer", "tries", "retry_at")),
    Table("relays", ("leased_until",)),
)
DEAD_LETTERS: Final = Table(
    "dead_letters", ("consumer", "source", "event_id", "type", "subject", "subject_id", "tries", "at", "replayed_at")
)
IDEMPOTENCY: Final = Table("idempotency", ("principal", "operation", "key", "answer IS NOT NULL AS answered"))

WANTED: Final[Mapping[str, Sequence[Table]]] = {
    # Whoever hears of something is copied before whoever says it. The snapshots are taken at once; this is for readers.
    "events": (
        Table(
            "feed",
            ("position", "source", "event_id", "type", "subject", "subject_id", "version", "at", "received_at"),
        ),
        DEAD_LETTERS,
    ),
    "products": (
        Table("inbox", ("consumer", "source", "event_id", "subject", "subject_id", "version", "handled", "at")),
        DEAD_LETTERS,
    ),
    "orders": (
        Table(
            "orders",
            (
                "id",
                "user_id",
                "status",
                "payment",
                "fulfilment",
                "total_minor",
                "refunded_minor",
                "refund_pending_minor",
                "created_at",
                "updated_at",
                "version",
                "principal",
                "idempotency_key",
            ),
        ),
        Table("order_lines", ("order_id", "product_id", "quantity", "returned", "unit_price_minor")),
        Table("order_history", ("order_id", "version", "axis", "before", "after", "at")),
        Table("sagas", ("kind", "subject_id", "reference", "step", "tries", "wake_at", "created_at", "updated_at")),
        IDEMPOTENCY,
        *OUTBOX,
    ),
    "inventory": (
        Table("levels", ("product_id", "on_hand", "reserved")),
        Table("reservations", ("order_id", "state", "updated_at")),
        Table("reservation_lines", ("order_id", "product_id", "quantity", "returned")),
        Table("movements", ("id", "product_id", "kind", "delta", "order_id", "reference")),
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
            ),
        ),
        Table(
            "operations",
            (
                "id",
                "payment_id",
                "kind",
                "reference",
                "key",
                "amount_minor",
                "currency",
                "status",
                "began_at",
                "asked_at",
                "settled_at",
            ),
        ),
        Table("accounts", ("account", "currency", "balance_minor")),
        Table("ledger_entries", ("operation_id", "account", "side", "amount_minor", "currency")),
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
"""By service."""

SUBSCRIPTIONS: Final[Mapping[str, Sequence[str] | None]] = {
    "events.feed": None,
    "products.in_stock": ("stock.available", "stock.exhausted"),
}
"""What each consumer wants to hear; None: everything."""

SURE_DAYS: Final = KEPT_DAYS - 1
"""Published events, and the feed, are kept for `KEPT_DAYS`: what is younger than this must be there on both sides."""

CLOCK: Final = """
    CREATE UNLOGGED TABLE audit.clock AS
    SELECT $1::timestamptz AS taken_at, shop.as_of,
           CASE WHEN $2::float8 > 0 THEN shop.as_of - make_interval(secs => $2) ELSE 'infinity' END AS settled_before,
           $1::timestamptz - make_interval(days => $3::integer) AS sure_after
      FROM (
        SELECT CASE WHEN $4::boolean THEN coalesce(least(sign.at, $1::timestamptz), $1::timestamptz)
                    ELSE $1::timestamptz END AS as_of
          FROM audit.last_sign sign
      ) shop
"""

# Nobody goes on with anything while a shop is stopped: what was a minute old then is a minute old now. Its relays renew
# their leases every second, so that of a shop that was killed the moment is known, and its writes tell of one that gave
# its leases back. What the feed and the inboxes hold is no sign: a replay writes there without a shop.
LAST_SIGN: Final = f"""
    CREATE VIEW audit.last_sign AS
    SELECT max(at) AS at
      FROM (
        SELECT max(updated_at) AS at FROM orders.orders
        UNION ALL SELECT max(updated_at) FROM orders.sagas
        UNION ALL SELECT max(updated_at) FROM inventory.reservations
        UNION ALL SELECT max(greatest(began_at, asked_at, settled_at)) FROM payments.operations
        UNION ALL SELECT max(created_at) FROM sandbox.operations
        UNION ALL SELECT max(greatest(at, published_at)) FROM orders.outbox
        UNION ALL SELECT max(greatest(at, published_at)) FROM inventory.outbox
        UNION ALL SELECT max(greatest(at, published_at)) FROM payments.outbox
        UNION ALL SELECT max(leased_until) - interval '{LEASE_SECONDS} s' FROM orders.relays
        UNION ALL SELECT max(leased_until) - interval '{LEASE_SECONDS} s' FROM inventory.relays
        UNION ALL SELECT max(leased_until) - interval '{LEASE_SECONDS} s' FROM payments.relays
      ) signs
"""  # noqa: S608  # of constants alone

VIEWS: Final = """
    CREATE VIEW audit.orders AS
    SELECT o.*,
           -- The first saga is as old as checkouts are. What was placed before has no stock and no events, except from
           -- when on its own checkout has begun.
           CASE WHEN o.created_at >= first.at THEN o.created_at ELSE own.created_at END AS checkout_since,
           -- What is under way touches the order, or its saga.
           greatest(o.updated_at, touched.at) < c.settled_before AS settled
      FROM orders.orders o
     CROSS JOIN audit.clock c
     CROSS JOIN (SELECT min(created_at) AS at FROM orders.sagas) first
      LEFT JOIN (SELECT subject_id, max(updated_at) AS at FROM orders.sagas GROUP BY subject_id) touched
        ON touched.subject_id = o.id
      LEFT JOIN orders.sagas own ON own.subject_id = o.id AND own.kind = 'checkout' AND own.reference = '';

    CREATE VIEW audit.outbox AS
    SELECT 'orders' AS source, e.* FROM orders.outbox e
    UNION ALL SELECT 'inventory', e.* FROM inventory.outbox e
    UNION ALL SELECT 'payments', e.* FROM payments.outbox e;

    CREATE VIEW audit.retries AS
    SELECT 'orders' AS source, r.* FROM orders.outbox_retries r
    UNION ALL SELECT 'inventory', r.* FROM inventory.outbox_retries r
    UNION ALL SELECT 'payments', r.* FROM payments.outbox_retries r;

    -- What each consumer has done, and in which order (`nth`). The feed is its own inbox.
    CREATE VIEW audit.handled AS
    SELECT 'events.feed' AS consumer, source, event_id, subject, subject_id, version, position AS nth, received_at AS at
      FROM events.feed
    UNION ALL
    SELECT consumer, source, event_id, subject, subject_id, version, handled, at FROM products.inbox;

    CREATE VIEW audit.letters AS
    SELECT * FROM events.dead_letters UNION ALL SELECT * FROM products.dead_letters;

    CREATE VIEW audit.dead AS
    SELECT * FROM audit.letters WHERE replayed_at IS NULL;

    -- It came out of order, perhaps after its outbox row was gone.
    CREATE VIEW audit.replayed AS
    SELECT consumer, source, event_id FROM audit.letters WHERE replayed_at IS NOT NULL;

    CREATE VIEW audit.idempotency AS
    SELECT 'orders' AS service, i.* FROM orders.idempotency i
    UNION ALL SELECT 'inventory', i.* FROM inventory.idempotency i;
"""


async def prepare(
    copies: Copies,
    *,
    settled_seconds: float,
    history: Sequence[ClientOperation] | None,
    is_stopped: bool = False,
) -> datetime.datetime:
    """Puts beside the copies what the invariants need besides: the time, the subscriptions, the clients' history.

    Gives the moment as of which is judged: that of the copies; of a stopped shop, that of its last sign of life.
    """
    # With 0 nothing is too young: the shop stands still, and everything must have come to its end.
    await copies.execute("CREATE SCHEMA audit")
    await copies.execute(LAST_SIGN)
    await copies.execute(CLOCK, copies.taken_at, settled_seconds, SURE_DAYS, is_stopped)
    subscribed = [(consumer, type_) for consumer, types in SUBSCRIPTIONS.items() for type_ in types or (None,)]
    await copies.fill("audit", "subscriptions", {"consumer": "text", "type": "text"}, subscribed)
    await copies.fill("history", "ops", HISTORY_COLUMNS, [as_row(operation) for operation in history or ()])
    await copies.execute(VIEWS)
    await copies.execute("ANALYZE audit.clock, audit.subscriptions, history.ops")
    [clock] = await copies.fetch("SELECT as_of FROM audit.clock")
    return clock["as_of"]
