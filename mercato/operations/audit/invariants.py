"""The invariants, each one a query that finds its violations. A shop is correct where no query finds a row.

`always` holds at every moment: it reads one database, or allows for events that are not delivered yet. `settled` holds
for what was not changed for a while: it compares what several services do one after the other, and leaves out work in
progress. In a shop where nothing runs, everything is settled.

The queries read the copies (`tables.py`) by the names of the services. `audit.clock` has one row: `taken_at`, before
every snapshot; `as_of`, the same while the shop runs, else its last activity: work that was due before it must be done;
`settled_before`; `sure_after`, since when nothing was purged.
"""

from __future__ import annotations

from typing import Final

from mercato.operations.audit.events import EVENTS
from mercato.operations.audit.invariant import Invariant
from mercato.operations.audit.money import MONEY
from mercato.operations.audit.stock import STOCK
from mercato.operations.ids import behind
from mercato.services.orders import rules as orders


def _legal_moves() -> str:
    """The moves of every axis as rows of VALUES."""
    moves = {
        (axis, before, after) for axis, table in orders.AXES.items() for before in table for after in table[before]
    }
    return ", ".join(f"('{axis}', '{before}', '{after}')" for axis, before, after in sorted(moves))


_PLACED: Final = ", ".join(f"'{state}'" for state in orders.PLACED.values())
"""The initial state of an order: status, payment, fulfilment."""

ORDERS: Final = (
    Invariant(
        "O1",
        "orders",
        "always",
        "Orders begin in the initial state, and make only legal moves",
        f"""
        SELECT t.order_id, t.version, moved.axis, moved.before, moved.after
          FROM audit.transitions t
         CROSS JOIN LATERAL (
            VALUES ('status', t.was_status, t.status), ('payment', t.was_payment, t.payment),
                   ('fulfilment', t.was_fulfilment, t.fulfilment)
         ) AS moved (axis, before, after)
          LEFT JOIN (VALUES {_legal_moves()}) AS legal (axis, before, after)
            ON legal.axis = moved.axis AND legal.before = moved.before AND legal.after = moved.after
         WHERE t.was_version IS NOT NULL AND moved.before <> moved.after AND legal.axis IS NULL
        UNION ALL
        SELECT order_id, version, 'placed', NULL, concat_ws(' ', status, payment, fulfilment)
          FROM audit.transitions
         WHERE was_version IS NULL AND (status, payment, fulfilment) <> ({_PLACED})
        """,  # noqa: S608  # only constants
    ),
    Invariant(
        "O2",
        "orders",
        "always",
        "An order's history has no gap, and each transition names the events of the axes that moved",
        """
        SELECT order_id, version, was_version, events
          FROM audit.transitions
         WHERE version <> coalesce(was_version, 0) + 1
            OR cardinality(events) = 0
            OR (was_version IS NULL AND events <> ARRAY['order.placed'])
            OR (was_status <> status AND 'order.' || status <> ALL (events))
            OR (was_payment <> payment AND 'order.' || payment <> ALL (events))
            OR (was_fulfilment <> fulfilment AND 'order.' || fulfilment <> ALL (events))
        """,
    ),
    Invariant(
        "O3",
        "orders",
        "always",
        "An order has the state of its last history entry",
        """
        SELECT o.id AS order_id, o.version, h.version AS history_version, o.status, o.payment, o.fulfilment
          FROM orders.orders o
          LEFT JOIN (
            SELECT DISTINCT ON (order_id) order_id, version, status, payment, fulfilment
              FROM orders.history
             ORDER BY order_id, version DESC
          ) h ON h.order_id = o.id
         WHERE (o.version, o.status, o.payment, o.fulfilment)
               IS DISTINCT FROM (h.version, h.status, h.payment, h.fulfilment)
        """,
    ),
    Invariant(
        "O4",
        "orders",
        "settled",
        "Every order ends, and its sagas end, unless it waits for its payment",
        # A failed attempt updates the saga, a move updates the order: ten attempts since its last move are too many. A
        # wait for a payment ends at `wake_at`.
        """
        SELECT o.id AS order_id, o.status, s.kind, s.step, s.tries, s.wake_at, o.refund_pending_minor
          FROM orders.orders o
          LEFT JOIN orders.sagas s ON s.subject_id = o.id AND s.kind = 'checkout'
         CROSS JOIN audit.clock c
         WHERE o.status = 'pending'
           AND NOT coalesce(s.step = 'awaiting' AND s.wake_at > least(c.settled_before, c.as_of), false)
           AND o.updated_at < c.settled_before AND (s.tries >= 10 OR coalesce(s.updated_at < c.settled_before, true))
        UNION ALL
        SELECT s.subject_id, o.status, s.kind, s.step, s.tries, s.wake_at, o.refund_pending_minor
          FROM orders.sagas s
          LEFT JOIN orders.orders o ON o.id = s.subject_id
         CROSS JOIN audit.clock c
         WHERE CASE WHEN s.driver IS NOT NULL OR s.wake_at IS NOT NULL
                    THEN s.step <> 'awaiting' OR o.status <> 'pending'
                    -- No process wakes it: it must wait for staff to capture.
                    ELSE (s.step, o.status, o.payment) IS DISTINCT FROM ('authorized', 'confirmed', 'authorized') END
           AND (s.updated_at < c.settled_before OR (s.tries >= 10 AND o.updated_at < c.settled_before))
           AND NOT (s.kind = 'checkout' AND coalesce(o.status = 'pending', false))
        UNION ALL
        SELECT o.id, o.status, NULL, NULL, NULL, NULL, o.refund_pending_minor
          FROM audit.orders o
          LEFT JOIN orders.sagas s ON s.subject_id = o.id AND s.kind = 'checkout'
         WHERE o.payment = 'authorized' AND o.settled AND s.subject_id IS NULL
        UNION ALL
        SELECT r.order_id, NULL, 'refund', r.reference, NULL, NULL, r.amount_minor
          FROM orders.refunds r
         CROSS JOIN audit.clock c
          LEFT JOIN orders.sagas s ON s.subject_id = r.order_id AND s.kind = 'refund' AND s.reference = r.reference
         WHERE r.status = 'pending' AND r.created_at < c.settled_before AND s.subject_id IS NULL
        """,
    ),
    Invariant(
        "O6",
        "orders",
        "always",
        "A key of a principal has one order",
        """
        SELECT principal, idempotency_key, count(*) AS orders
          FROM orders.orders
         WHERE idempotency_key IS NOT NULL
         GROUP BY principal, idempotency_key
        HAVING count(*) > 1
        """,
    ),
    Invariant(
        "O9",
        "orders",
        "always",
        "The refunded and pending amounts of an order are the sums of its refunds",
        # A cancelled order gave its money back without a row in `refunds`.
        """
        SELECT o.id AS order_id, o.refunded_minor, r.refunded, o.refund_pending_minor, r.pending
          FROM orders.orders o
          LEFT JOIN (
            SELECT order_id, coalesce(sum(amount_minor) FILTER (WHERE status = 'succeeded'), 0) AS refunded,
                   coalesce(sum(amount_minor) FILTER (WHERE status = 'pending'), 0) AS pending
              FROM orders.refunds
             GROUP BY order_id
          ) r ON r.order_id = o.id
         WHERE o.refund_pending_minor <> coalesce(r.pending, 0)
            OR o.refunded_minor < coalesce(r.refunded, 0)
            OR (o.status <> 'cancelled' AND o.refunded_minor <> coalesce(r.refunded, 0))
        """,
    ),
    Invariant(
        "O10",
        "orders",
        "always",
        "Every row of an order has its order, and `order_products` has each order under each of its products",
        """
        SELECT orphan.what, orphan.order_id
          FROM (
            SELECT 'history' AS what, order_id FROM orders.history
            UNION ALL SELECT 'refund', order_id FROM orders.refunds
            UNION ALL SELECT 'payment key', order_id FROM orders.payment_keys
            UNION ALL SELECT 'saga', subject_id FROM orders.sagas
          ) orphan
          LEFT JOIN orders.orders o ON o.id = orphan.order_id
         WHERE o.id IS NULL
        UNION ALL
        SELECT 'product', coalesce(l.order_id, p.order_id)
          FROM audit.order_lines l
          FULL JOIN orders.order_products p ON p.order_id = l.order_id AND p.product_id = l.product_id
         WHERE l.order_id IS NULL OR p.order_id IS NULL
        """,
    ),
    Invariant(
        "O11",
        "orders",
        "always",
        "Reservations and payments belong to this order, and to no earlier one with the same id",
        # After a restore of its database, orders may give an id again; the nonce of an order is random.
        """
        SELECT o.id AS order_id, 'stock' AS wrong
          FROM orders.orders o
          JOIN inventory.reservations r ON r.order_id = o.id
         WHERE r.nonce <> o.nonce
        UNION ALL
        SELECT o.id, 'payment ' || p.id
          FROM orders.orders o
          JOIN payments.payments p ON p.order_id = o.id
         WHERE p.nonce <> o.nonce
        """,
    ),
    Invariant(
        "O12",
        "orders",
        "always",
        "No service knows an id that its owner has not given yet, and would give to something else",
        # It happens after a restore of the owner's database alone. The next start moves its sequence.
        behind(),
    ),
)

IDEMPOTENCY: Final = (
    Invariant(
        "K3",
        "idempotency",
        "always",
        "No key is stored without its answer: key, change and answer are committed together",
        "SELECT service, principal, operation, key FROM audit.idempotency WHERE NOT answered",
    ),
)

SHOP: Final = (*MONEY, *STOCK, *ORDERS, *IDEMPOTENCY, *EVENTS)
"""The invariants that need only the databases. Those that need the answers of clients are in `clients.py`."""
