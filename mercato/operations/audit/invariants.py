"""What must hold, each as one query that finds whatever breaks it. A shop is correct where none finds a row.

`always` holds at every moment: it looks at one database, or takes into account that events are on their way. `settled`
holds for what nobody has touched for a while: it compares what several services do one after the other, and leaves out
what is under way. With nothing running at all, everything is settled.

The queries read the copies (`tables.py`) by the names of the services. `audit.clock` has one row: `taken_at`, before
every snapshot; `as_of`, the same while the shop runs, else its last sign of life: whatever should have been done by a
certain time should have been done by then; `settled_before`; `sure_after`, since when nothing has been cleaned up.
"""

from __future__ import annotations

from typing import Final

from mercato.operations.audit.events import EVENTS
from mercato.operations.audit.invariant import Invariant
from mercato.operations.ids import behind
from mercato.services.orders import rules as orders


def _legal_moves() -> str:
    """The moves of every axis as rows of VALUES."""
    moves = {
        (axis, before, after) for axis, table in orders.AXES.items() for before in table for after in table[before]
    }
    return ", ".join(f"('{axis}', '{before}', '{after}')" for axis, before, after in sorted(moves))


_PLACED: Final = ", ".join(f"'{state}'" for state in orders.PLACED.values())
"""Where every order begins: status, payment, fulfilment."""

MONEY: Final = (
    Invariant(
        "M1",
        "money",
        "always",
        "Each charge, capture and refund that succeeded has its transfer with its amount, and no other transfer exists",
        """
        SELECT coalesce(o.payment_id, t.payment_id) AS payment_id, coalesce(o.kind, t.kind) AS kind,
               coalesce(o.reference, t.reference) AS reference, o.amount_minor AS operation_minor,
               t.amount_minor AS transfer_minor, t.debit, t.credit
          FROM (
            SELECT payment_id, kind, reference, currency, amount_minor,
                   CASE kind WHEN 'refund' THEN 'refunds' ELSE 'provider' END AS debit,
                   CASE kind WHEN 'refund' THEN 'provider' ELSE 'sales' END AS credit
              FROM payments.operations
             WHERE status = 'succeeded' AND kind IN ('charge', 'capture', 'refund') AND amount_minor > 0
          ) o
          FULL JOIN payments.transfers t
            ON t.payment_id = o.payment_id AND t.kind = o.kind AND t.reference = o.reference
         WHERE (t.debit, t.credit, t.amount_minor, t.currency)
               IS DISTINCT FROM (o.debit, o.credit, o.amount_minor, o.currency)
        """,
    ),
    Invariant(
        "M2",
        "money",
        "always",
        "An account's balance is the sum of its transfers, and a payment's amounts are those of its operations",
        """
        SELECT coalesce(a.account, t.account) AS account, coalesce(a.currency, t.currency) AS currency,
               NULL AS payment_id, a.balance_minor AS kept_minor, t.sum_minor
          FROM payments.accounts a
          FULL JOIN (
            SELECT account, currency, sum(amount_minor) AS sum_minor
              FROM (
                SELECT debit AS account, currency, amount_minor FROM payments.transfers
                UNION ALL
                SELECT credit, currency, -amount_minor FROM payments.transfers
              ) sides
             GROUP BY account, currency
          ) t ON t.account = a.account AND t.currency = a.currency
         WHERE coalesce(a.balance_minor, 0) <> coalesce(t.sum_minor, 0)
        UNION ALL
        SELECT NULL, NULL, p.id, p.captured_minor - p.refunded_minor, coalesce(o.captured_minor - o.refunded_minor, 0)
          FROM payments.payments p
          LEFT JOIN (
            SELECT payment_id,
                   coalesce(sum(amount_minor) FILTER (WHERE kind IN ('charge', 'capture')), 0) AS captured_minor,
                   coalesce(sum(amount_minor) FILTER (WHERE kind = 'refund'), 0) AS refunded_minor
              FROM payments.operations
             WHERE status = 'succeeded'
             GROUP BY payment_id
          ) o ON o.payment_id = p.id
         WHERE (p.captured_minor, p.refunded_minor)
               <> (coalesce(o.captured_minor, 0), coalesce(o.refunded_minor, 0))
        """,
    ),
    Invariant(
        "M3",
        "money",
        "always",
        "No order is charged twice: by the bank's books it has one charge that is kept, and one that is open, at most",
        """
        SELECT order_id, 'captured' AS what, count(*) AS times
          FROM sandbox.charges
         WHERE state = 'captured' AND (captured_minor > refunded_minor OR captured_minor = 0)
         GROUP BY order_id
        HAVING count(*) > 1
        UNION ALL
        SELECT order_id, 'open', count(*)
          FROM sandbox.charges
         WHERE state = 'open'
         GROUP BY order_id
        HAVING count(*) > 1
        UNION ALL
        SELECT order_id, 'one charge captured', count(*)
          FROM sandbox.operations
         WHERE kind IN ('charge', 'capture') AND status = 'succeeded'
         GROUP BY order_id, charge_id
        HAVING count(*) > 1
        """,
    ),
    Invariant(
        "M4",
        "money",
        "settled",
        "The bank's statement and our books have the same operations with the same amounts",
        # A void has no amount of its own. An intent with which the bank is being called again was touched just now.
        """
        SELECT coalesce(b.key, p.key) AS key, coalesce(b.kind, p.kind) AS kind, b.status AS bank, p.status AS ours,
               b.amount_minor AS bank_minor, p.amount_minor AS ours_minor
          FROM sandbox.operations b
          FULL JOIN (
            SELECT key, kind, status, amount_minor, currency, settled_at AS touched_at FROM payments.operations
            UNION ALL
            SELECT key, kind, status, amount_minor, currency, asked_at FROM payments.intents
          ) p ON p.key = b.key
         CROSS JOIN audit.clock c
         WHERE greatest(b.created_at, b.ready_at, p.touched_at) < c.settled_before
           AND CASE
                   WHEN b.status = 'succeeded' AND p.status = 'succeeded' THEN
                       (b.kind, b.currency) <> (p.kind, p.currency)
                       OR (b.kind <> 'void' AND b.amount_minor <> p.amount_minor)
                   ELSE coalesce(b.status = 'succeeded', false) <> coalesce(p.status = 'succeeded', false)
               END
        """,
    ),
    Invariant(
        "M5",
        "money",
        "settled",
        "What the bank has taken for an order, less what it gave back, is what the order says; nothing, if cancelled",
        # A refund that is under way may have happened at the bank or not: between the two, both are right. What the
        # bank did after `taken_at` is left out: its copy may be a moment younger than that of the orders.
        """
        SELECT o.id AS order_id, o.status, o.payment, coalesce(b.net_minor, 0) AS bank_minor, o.kept_minor
          FROM (
            SELECT *, CASE WHEN payment IN ('paid', 'partially_refunded', 'refunded')
                           THEN total_minor - waived_minor - refunded_minor ELSE 0 END AS kept_minor
              FROM audit.orders
          ) o
          LEFT JOIN (
            SELECT order_id,
                   sum(CASE WHEN kind IN ('charge', 'capture') THEN amount_minor
                            WHEN kind = 'refund' THEN -amount_minor
                            ELSE 0 END) AS net_minor
              FROM sandbox.operations
             CROSS JOIN audit.clock c
             WHERE status = 'succeeded' AND created_at <= c.taken_at
             GROUP BY order_id
          ) b ON b.order_id = o.id
         WHERE o.settled
           AND (coalesce(b.net_minor, 0) NOT BETWEEN o.kept_minor - o.refund_pending_minor AND o.kept_minor
                OR (o.status = 'cancelled' AND b.net_minor <> 0))
        """,
    ),
    Invariant(
        "M6",
        "money",
        "settled",
        "No money is asked for without an order",
        """
        SELECT 'bank' AS books, b.key AS reference, b.order_id
          FROM sandbox.operations b
         CROSS JOIN audit.clock c
          LEFT JOIN orders.orders o ON o.id = b.order_id
         WHERE b.status = 'succeeded' AND b.created_at < c.settled_before AND o.id IS NULL
        UNION ALL
        SELECT 'ours', p.id::text, p.order_id
          FROM payments.payments p
         CROSS JOIN audit.clock c
          LEFT JOIN orders.orders o ON o.id = p.order_id
         WHERE p.created_at < c.settled_before AND o.id IS NULL
        """,
    ),
    Invariant(
        "M7",
        "money",
        "always",
        "An order's total is the sum of its lines, and a line's total that of its pieces, its discount and its tax",
        """
        SELECT o.id AS order_id, o.total_minor, l.sum_minor, l.wrong_lines
          FROM orders.orders o
          LEFT JOIN (
            SELECT order_id, sum(total_minor) AS sum_minor,
                   count(*) FILTER (
                       WHERE total_minor <> quantity * unit_price_minor - discount_minor + tax_minor
                          OR returned NOT BETWEEN 0 AND quantity) AS wrong_lines
              FROM audit.order_lines
             GROUP BY order_id
          ) l ON l.order_id = o.id
         WHERE o.total_minor IS DISTINCT FROM l.sum_minor OR o.total_minor < 0 OR l.wrong_lines > 0
        """,
    ),
    Invariant(
        "M8",
        "money",
        "settled",
        "Nothing stays reserved on a card for an order that is cancelled, or whose payment is over",
        """
        SELECT b.id AS charge_id, o.id AS order_id, o.status, o.payment
          FROM sandbox.charges b
          JOIN audit.orders o ON o.id = b.order_id
         CROSS JOIN audit.clock c
         WHERE b.state = 'open' AND b.created_at < c.settled_before AND o.settled
           AND (o.status = 'cancelled' OR o.payment NOT IN ('unpaid', 'authorized'))
        """,
    ),
    Invariant(
        "M9",
        "money",
        "always",
        "Never is more given back than was taken: not by the bank, not in our books, not of an order",
        """
        SELECT 'bank' AS books, order_id
          FROM sandbox.operations
         WHERE status = 'succeeded'
         GROUP BY order_id
        HAVING coalesce(sum(amount_minor) FILTER (WHERE kind = 'refund'), 0)
               > coalesce(sum(amount_minor) FILTER (WHERE kind IN ('charge', 'capture')), 0)
        UNION ALL
        SELECT 'payments', order_id
          FROM payments.payments
         WHERE refunded_minor > captured_minor OR captured_minor > authorized_minor OR authorized_minor > amount_minor
        UNION ALL
        SELECT 'orders', id FROM orders.orders WHERE refunded_minor + refund_pending_minor > total_minor - waived_minor
        """,
    ),
    Invariant(
        "M10",
        "money",
        "always",
        "Operations, intents and transfers have a payment, which is pending while its authorize or charge is an intent",
        # There are no foreign keys between the tables whose rows one statement writes.
        """
        SELECT n.payment_id, n.kind, n.reference, 'no payment' AS wrong
          FROM (
            SELECT payment_id, kind, reference FROM payments.operations
            UNION ALL SELECT payment_id, kind, reference FROM payments.intents
            UNION ALL SELECT payment_id, kind, reference FROM payments.transfers
          ) n
          LEFT JOIN payments.payments p ON p.id = n.payment_id
         WHERE p.id IS NULL
        UNION ALL
        SELECT p.id, i.kind, i.reference, 'is ' || p.status
          FROM payments.payments p
          LEFT JOIN payments.intents i ON i.payment_id = p.id AND i.kind IN ('authorize', 'charge')
         WHERE (p.status = 'pending') <> (i.payment_id IS NOT NULL)
        UNION ALL
        SELECT o.payment_id, i.kind, i.reference, 'settled and an intent'
          FROM payments.operations o
          JOIN payments.intents i
            ON i.payment_id = o.payment_id AND i.kind = o.kind AND i.reference = o.reference
        UNION ALL
        SELECT a.payment_id, NULL, NULL, 'authorized and charged'
          FROM payments.operations a
          JOIN payments.operations b ON b.payment_id = a.payment_id AND b.kind = 'charge'
         WHERE a.kind = 'authorize'
        """,
    ),
)

STOCK: Final = (
    Invariant(
        "S1",
        "stock",
        "always",
        "No level is below nothing, and no more is reserved than there is",
        "SELECT * FROM inventory.levels WHERE on_hand < 0 OR reserved < 0 OR reserved > on_hand",
    ),
    Invariant(
        "S2",
        "stock",
        "always",
        "What is on hand is the sum of all movements less what was sold",
        """
        SELECT l.product_id, l.on_hand, coalesce(c.sum, 0) AS sum
          FROM inventory.levels l
          LEFT JOIN (SELECT product_id, sum(delta) AS sum FROM audit.stock_changes GROUP BY product_id) c
            ON c.product_id = l.product_id
         WHERE l.on_hand <> coalesce(c.sum, 0)
        """,
    ),
    Invariant(
        "S3",
        "stock",
        "always",
        "What is reserved is the sum of what is held for orders",
        """
        SELECT l.product_id, l.reserved, h.held
          FROM inventory.levels l
          LEFT JOIN (SELECT product_id, sum(quantity) AS held FROM audit.held_lines GROUP BY product_id) h
            ON h.product_id = l.product_id
         WHERE l.reserved <> coalesce(h.held, 0)
        """,
    ),
    Invariant(
        "S4",
        "stock",
        "always",
        "At no moment was more sold than there was",
        # The versions of a level are in the order of its changes. What one batch sold shares a version.
        """
        SELECT product_id, level_version, on_hand
          FROM (
            SELECT product_id, level_version,
                   sum(sum(delta)) OVER (PARTITION BY product_id ORDER BY level_version) AS on_hand
              FROM audit.stock_changes GROUP BY product_id, level_version
          ) then_
         WHERE on_hand < 0
        """,
    ),
    Invariant(
        "S5",
        "stock",
        "settled",
        "What was sold is what was ordered: confirmed orders and committed reservations have the same lines",
        # A cancelled order that was confirmed before keeps its committed reservation, of which everything came back.
        """
        SELECT order_id, product_id, o.status, l.quantity AS ordered, r.quantity AS sold,
               l.returned AS order_returned, r.returned AS stock_returned
          FROM (
            SELECT n.order_id, n.product_id, n.quantity, n.returned
              FROM audit.order_lines n
              JOIN audit.orders o ON o.id = n.order_id
             WHERE o.status IN ('confirmed', 'completed')
          ) l
          FULL JOIN (SELECT * FROM audit.reservation_lines WHERE state = 'committed') r USING (order_id, product_id)
          LEFT JOIN audit.orders o ON o.id = order_id
         CROSS JOIN audit.clock c
         WHERE coalesce(o.settled, true) AND coalesce(r.updated_at < c.settled_before, true)
           AND CASE WHEN o.status = 'cancelled' THEN r.returned <> r.quantity
                    ELSE (l.quantity, l.returned) IS DISTINCT FROM (r.quantity, r.returned) END
        """,
    ),
    Invariant(
        "S6",
        "stock",
        "settled",
        "Stock is held for pending orders alone",
        """
        SELECT r.order_id, o.status, r.updated_at
          FROM inventory.reservations r
          LEFT JOIN audit.orders o ON o.id = r.order_id
         CROSS JOIN audit.clock c
         WHERE r.state = 'held' AND r.updated_at < c.settled_before AND coalesce(o.settled, true)
           AND o.status IS DISTINCT FROM 'pending'
        """,
    ),
    Invariant(
        "S7",
        "stock",
        "always",
        "Each sold line and each movement has a version that its level has had, and what came back is on the shelf",
        """
        SELECT c.order_id, c.product_id, c.level_version, l.version,
               NULL::integer AS returned, NULL::bigint AS came_back
          FROM audit.stock_changes c
          JOIN inventory.levels l ON l.product_id = c.product_id
         WHERE coalesce(c.level_version NOT BETWEEN 1 AND l.version, true)
        UNION ALL
        SELECT coalesce(n.order_id, m.order_id), coalesce(n.product_id, m.product_id), n.level_version, NULL,
               n.returned, m.came_back
          FROM (
            SELECT * FROM audit.reservation_lines WHERE state = 'committed' OR returned > 0 OR level_version IS NOT NULL
          ) n
          FULL JOIN audit.came_back m ON m.order_id = n.order_id AND m.product_id = n.product_id
         WHERE n.state IS DISTINCT FROM 'committed' OR n.returned <> coalesce(m.came_back, 0) OR n.returned > n.quantity
        """,
    ),
    Invariant(
        "S8",
        "stock",
        "always",
        "Nothing was held, sold or moved of a product that has no level",
        """
        SELECT c.order_id, c.product_id
          FROM (
            SELECT order_id, product_id FROM audit.stock_changes
            UNION ALL SELECT order_id, product_id FROM audit.held_lines
          ) c
          LEFT JOIN inventory.levels l ON l.product_id = c.product_id
         WHERE l.product_id IS NULL
        """,
    ),
    Invariant(
        "S9",
        "stock",
        "settled",
        "Stock is of products that exist",
        # A product is never deleted: its database was restored alone, from before it was entered.
        """
        SELECT l.product_id, l.on_hand, l.updated_at
          FROM inventory.levels l
          LEFT JOIN products.products p ON p.id = l.product_id
         CROSS JOIN audit.clock c
         WHERE p.id IS NULL AND l.on_hand > 0 AND l.updated_at < c.settled_before
        """,
    ),
)

ORDERS: Final = (
    Invariant(
        "O1",
        "orders",
        "always",
        "Orders make legal moves only, from where every order begins",
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
        """,  # noqa: S608  # of constants alone
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
        "An order is where its history ends",
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
        "Every order comes to an end, and so does the work for it, unless it waits for its payment",
        # A failed try touches the saga, a move the order: ten tries since its last move are too many. A wait for
        # a payment ends when its time is over: `wake_at`.
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
                    -- No process will wake it: it must wait for staff to capture.
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
        "One key of one principal has made one order",
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
        "An order has refunded, and reserves for refunds, what its refunds say",
        # A cancelled order has given back what it had taken, without a refund of its own.
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
        "What belongs to an order has its order, and an order stands under each of its products",
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
        "Stock and payments were made for this order, and for no earlier one of the same number",
        # After a restore of its database, orders gives numbers again; the random part of an order it does not.
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
        "No service knows an id that its owner has yet to give: else it would stand for two things",
        # After a restore of the owner's database alone. The next start moves its sequence.
        behind(),
    ),
)

IDEMPOTENCY: Final = (
    Invariant(
        "K3",
        "idempotency",
        "always",
        "No key waits for its answer: key, change and answer are committed together",
        "SELECT service, principal, operation, key FROM audit.idempotency WHERE NOT answered",
    ),
)

SHOP: Final = (*MONEY, *STOCK, *ORDERS, *IDEMPOTENCY, *EVENTS)
"""What the databases can answer by themselves. What takes the word of the clients is in `clients.py`."""
