"""What must hold, each as one query that finds whatever breaks it. A shop is correct where none finds a row.

`always` holds at every moment: it looks at one database, or takes into account that events are on their way. `settled`
holds for what nobody has touched for a while: it compares what several services do one after the other, and leaves out
what is under way. With nothing running at all, everything is settled.

The queries read the copies (`tables.py`) by the names of the services. `audit.clock` has one row: `taken_at`, before
every snapshot; `as_of`, the same while the shop runs, else its last sign of life: whatever should have been done by a
certain time should have been done by then; `settled_before`; `sure_after`, since when nothing has been cleaned up.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from mercato.services.orders import rules as orders

Group = Literal["money", "stock", "orders", "idempotency", "events", "clients"]


class Invariant(msgspec.Struct, frozen=True):
    """`title` says what must hold; `sql` gives a row for each place where it does not."""

    name: str
    group: Group
    when: Literal["always", "settled"]
    title: str
    sql: str


def _legal_moves() -> str:
    """The moves of every axis as rows of VALUES, and that each axis begins from nowhere where an order is placed."""
    moves = {
        *((axis, before, after) for axis, table in orders.AXES.items() for before in table for after in table[before]),
        # A part of a delivery comes back: it is noted, and the order stays where it is.
        *(("fulfilment", state, state) for state in orders.sources("fulfilment", "returned")),
    }
    rows = [f"('{axis}', '{before}', '{after}')" for axis, before, after in sorted(moves)]
    return ", ".join([*rows, *(f"('{axis}', NULL, '{state}')" for axis, state in orders.PLACED.items())])


_PLACED: Final = ", ".join(f"('{axis}', '{state}')" for axis, state in orders.PLACED.items())

MONEY: Final = (
    Invariant(
        "M1",
        "money",
        "always",
        "Every capture and refund stands in the ledger with its amount, and its entries add up to nothing",
        """
        SELECT coalesce(e.operation_id, o.id) AS operation_id, o.expected_minor, e.provider_minor, e.sum_minor
          FROM (
            SELECT id, currency, CASE kind WHEN 'capture' THEN amount_minor ELSE -amount_minor END AS expected_minor
              FROM payments.operations
             WHERE status = 'succeeded' AND kind IN ('capture', 'refund') AND amount_minor > 0
          ) o
          FULL JOIN (
            SELECT operation_id, currency, sum(signed) AS sum_minor,
                   sum(signed) FILTER (WHERE account = 'provider') AS provider_minor
              FROM (
                SELECT *, CASE side WHEN 'debit' THEN amount_minor ELSE -amount_minor END AS signed
                  FROM payments.ledger_entries
              ) entries
             GROUP BY operation_id, currency
          ) e ON e.operation_id = o.id AND e.currency = o.currency
         WHERE e.sum_minor IS DISTINCT FROM 0 OR e.provider_minor IS DISTINCT FROM o.expected_minor
        """,
    ),
    Invariant(
        "M2",
        "money",
        "always",
        "An account's balance is the sum of its entries, and a payment's amounts are those of its operations",
        """
        SELECT coalesce(a.account, e.account) AS account, coalesce(a.currency, e.currency) AS currency,
               NULL AS payment_id, a.balance_minor AS kept_minor, e.sum_minor
          FROM payments.accounts a
          FULL JOIN (
            SELECT account, currency, sum(CASE side WHEN 'debit' THEN amount_minor ELSE -amount_minor END) AS sum_minor
              FROM payments.ledger_entries
             GROUP BY account, currency
          ) e ON e.account = a.account AND e.currency = a.currency
         WHERE coalesce(a.balance_minor, 0) <> coalesce(e.sum_minor, 0)
        UNION ALL
        SELECT NULL, NULL, p.id, p.captured_minor - p.refunded_minor, coalesce(o.captured_minor - o.refunded_minor, 0)
          FROM payments.payments p
          LEFT JOIN (
            SELECT payment_id, coalesce(sum(amount_minor) FILTER (WHERE kind = 'capture'), 0) AS captured_minor,
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
         WHERE kind = 'capture' AND status = 'succeeded'
         GROUP BY order_id, charge_id
        HAVING count(*) > 1
        """,
    ),
    Invariant(
        "M4",
        "money",
        "settled",
        "The bank's statement and our books have the same operations with the same amounts",
        # A void has no amount of its own. An operation that is being asked for again was touched just now.
        """
        SELECT coalesce(b.key, p.key) AS key, coalesce(b.kind, p.kind) AS kind, b.status AS bank, p.status AS ours,
               b.amount_minor AS bank_minor, p.amount_minor AS ours_minor
          FROM sandbox.operations b
          FULL JOIN payments.operations p ON p.key = b.key
         CROSS JOIN audit.clock c
         WHERE greatest(b.created_at, b.ready_at, p.began_at, p.asked_at, p.settled_at) < c.settled_before
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
                           THEN total_minor - refunded_minor ELSE 0 END AS kept_minor
              FROM audit.orders
          ) o
          LEFT JOIN (
            SELECT order_id,
                   sum(CASE kind WHEN 'capture' THEN amount_minor WHEN 'refund' THEN -amount_minor ELSE 0 END)
                   AS net_minor
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
        "An order's total is the sum of its lines",
        """
        SELECT o.id AS order_id, o.total_minor, l.sum_minor
          FROM orders.orders o
          LEFT JOIN (
            SELECT order_id, sum(quantity * unit_price_minor) AS sum_minor FROM orders.order_lines GROUP BY order_id
          ) l ON l.order_id = o.id
         WHERE o.total_minor IS DISTINCT FROM l.sum_minor OR o.total_minor < 0
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
               > coalesce(sum(amount_minor) FILTER (WHERE kind = 'capture'), 0)
        UNION ALL
        SELECT 'payments', order_id
          FROM payments.payments
         WHERE refunded_minor > captured_minor OR captured_minor > authorized_minor OR authorized_minor > amount_minor
        UNION ALL
        SELECT 'orders', id FROM orders.orders WHERE refunded_minor + refund_pending_minor > total_minor
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
        "What is on hand is the sum of all movements",
        """
        SELECT coalesce(l.product_id, m.product_id) AS product_id, l.on_hand, m.sum
          FROM inventory.levels l
          FULL JOIN (SELECT product_id, sum(delta) AS sum FROM inventory.movements GROUP BY product_id) m
            ON m.product_id = l.product_id
         WHERE coalesce(l.on_hand, 0) <> coalesce(m.sum, 0)
        """,
    ),
    Invariant(
        "S3",
        "stock",
        "always",
        "What is reserved is the sum of what is held for orders",
        """
        SELECT coalesce(l.product_id, h.product_id) AS product_id, l.reserved, h.held
          FROM inventory.levels l
          FULL JOIN (
            SELECT n.product_id, sum(n.quantity) AS held
              FROM inventory.reservation_lines n
              JOIN inventory.reservations r ON r.order_id = n.order_id
             WHERE r.state = 'held'
             GROUP BY n.product_id
          ) h ON h.product_id = l.product_id
         WHERE coalesce(l.reserved, 0) <> coalesce(h.held, 0)
        """,
    ),
    Invariant(
        "S4",
        "stock",
        "always",
        "At no moment was more sold than there was",
        # The id of a movement is taken while its level is locked: it counts a product's movements in their true order.
        """
        SELECT product_id, id AS movement_id, on_hand
          FROM (
            SELECT product_id, id, sum(delta) OVER (PARTITION BY product_id ORDER BY id) AS on_hand
              FROM inventory.movements
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
              FROM orders.order_lines n
              JOIN audit.orders o ON o.id = n.order_id
             WHERE o.status IN ('confirmed', 'completed') AND o.checkout_since IS NOT NULL
          ) l
          FULL JOIN (
            SELECT n.order_id, n.product_id, n.quantity, n.returned, v.updated_at
              FROM inventory.reservation_lines n
              JOIN inventory.reservations v ON v.order_id = n.order_id
             WHERE v.state = 'committed'
          ) r USING (order_id, product_id)
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
        "Each committed line was taken from the shelf once, and what came back of it was put there",
        """
        SELECT coalesce(n.order_id, m.order_id) AS order_id, coalesce(n.product_id, m.product_id) AS product_id,
               n.quantity, m.sales, m.sold, n.returned, m.came_back
          FROM (
            SELECT l.*
              FROM inventory.reservation_lines l
              JOIN inventory.reservations r ON r.order_id = l.order_id
             WHERE r.state = 'committed'
          ) n
          FULL JOIN (
            SELECT order_id, product_id, count(*) FILTER (WHERE kind = 'sale') AS sales,
                   coalesce(-sum(delta) FILTER (WHERE kind = 'sale'), 0) AS sold,
                   coalesce(sum(delta) FILTER (WHERE kind = 'return'), 0) AS came_back
              FROM inventory.movements
             WHERE kind IN ('sale', 'return')
             GROUP BY order_id, product_id
          ) m ON m.order_id = n.order_id AND m.product_id = n.product_id
         WHERE (m.sales, m.sold, m.came_back) IS DISTINCT FROM (1, n.quantity, n.returned)
        """,
    ),
)

ORDERS: Final = (
    Invariant(
        "O1",
        "orders",
        "always",
        "Orders make legal moves only",
        f"""
        SELECT h.order_id, h.version, h.axis, h.before, h.after
          FROM orders.order_history h
          LEFT JOIN (VALUES {_legal_moves()}) AS legal (axis, before, after)
            ON legal.axis = h.axis AND legal.after = h.after AND legal.before IS NOT DISTINCT FROM h.before
         WHERE legal.axis IS NULL
        """,  # noqa: S608  # of constants alone
    ),
    Invariant(
        "O2",
        "orders",
        "always",
        "An order's history has no gap: each move of an axis starts where the last one ended, each version is there",
        # One version may move several axes. The first move of an axis starts where every order is placed.
        f"""
        SELECT order_id, version, axis, before, came_from AS expected
          FROM (
            SELECT order_id, version, axis, before,
                   lag(after) OVER (PARTITION BY order_id, axis ORDER BY version) AS came_from
              FROM orders.order_history
          ) chained
          JOIN (VALUES {_PLACED}) AS placed (axis, state) USING (axis)
         WHERE before IS DISTINCT FROM came_from
           AND NOT (came_from IS NULL AND before = placed.state)
        UNION ALL
        SELECT order_id, max(version), 'versions', min(version)::text, count(DISTINCT version)::text
          FROM orders.order_history
         GROUP BY order_id
        HAVING min(version) <> 1 OR max(version) <> count(DISTINCT version)
        """,  # noqa: S608  # of constants alone
    ),
    Invariant(
        "O3",
        "orders",
        "always",
        "An order is where its history ends",
        f"""
        SELECT o.id AS order_id, o.axis, o.state, coalesce(h.after, placed.state) AS history,
               o.version, last.version AS history_version
          FROM (
            SELECT id, version, axis, state
              FROM orders.orders
             CROSS JOIN LATERAL (
                VALUES ('status', status), ('payment', payment), ('fulfilment', fulfilment)
             ) AS axes (axis, state)
          ) o
          JOIN (VALUES {_PLACED}) AS placed (axis, state) USING (axis)
          LEFT JOIN (
            SELECT DISTINCT ON (order_id, axis) order_id, axis, after
              FROM orders.order_history
             ORDER BY order_id, axis, version DESC
          ) h ON h.order_id = o.id AND h.axis = o.axis
          LEFT JOIN (SELECT order_id, max(version) AS version FROM orders.order_history GROUP BY order_id) last
            ON last.order_id = o.id
         WHERE o.state <> coalesce(h.after, placed.state) OR o.version IS DISTINCT FROM last.version
        """,  # noqa: S608  # of constants alone
    ),
    Invariant(
        "O4",
        "orders",
        "settled",
        "Every order comes to an end, and so does what is done for it, unless it waits for its payment",
        # Trying in vain touches the saga, moving touches the order: ten tries since its last move are too many. A wait
        # for a payment ends when its time is over: `wake_at`.
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
         WHERE CASE WHEN s.wake_at IS NOT NULL THEN s.step <> 'awaiting' OR o.status <> 'pending'
                    -- Nobody will wake it: it must have come to its end, or wait for staff to capture.
                    ELSE s.step NOT IN ('awaiting', 'authorized', 'done')
                         OR (s.kind = 'checkout' AND s.step = 'done' AND o.payment = 'authorized') END
           AND (s.updated_at < c.settled_before OR (s.tries >= 10 AND o.updated_at < c.settled_before))
           AND NOT (s.kind = 'checkout' AND coalesce(o.status = 'pending', false))
        UNION ALL
        SELECT o.id, o.status, NULL, NULL, NULL, NULL, o.refund_pending_minor
          FROM orders.orders o
          LEFT JOIN (SELECT DISTINCT subject_id FROM orders.sagas WHERE wake_at IS NOT NULL) alive
            ON alive.subject_id = o.id
         WHERE o.refund_pending_minor > 0 AND alive.subject_id IS NULL
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

EVENTS: Final = (
    Invariant(
        "E1",
        "events",
        "settled",
        "Every event is published",
        # What failed is tried again after a while, and holds back (until 'infinity') what comes after it about the same
        # subject.
        """
        SELECT e.source, e.id AS event_id, e.type, e.subject, e.subject_id, e.at
          FROM audit.outbox e
         CROSS JOIN audit.clock c
          LEFT JOIN (
            SELECT DISTINCT f.source, f.subject, f.subject_id
              FROM audit.retries r
              JOIN audit.outbox f ON f.source = r.source AND f.id = r.event_id
             CROSS JOIN audit.clock k
             WHERE r.retry_at > k.settled_before AND r.retry_at < 'infinity'
          ) retried ON (retried.source, retried.subject, retried.subject_id) = (e.source, e.subject, e.subject_id)
         WHERE e.published_at IS NULL AND e.at < c.settled_before AND retried.source IS NULL
        """,
    ),
    Invariant(
        "E2",
        "events",
        "settled",
        "Every published event was taken by each consumer that wants it, or lies among its dead letters",
        """
        SELECT s.consumer, e.source, e.id AS event_id, e.type, e.subject, e.subject_id
          FROM audit.outbox e
          JOIN audit.subscriptions s ON s.type IS NULL OR s.type = e.type
         CROSS JOIN audit.clock c
          LEFT JOIN audit.handled h ON h.consumer = s.consumer AND h.source = e.source AND h.event_id = e.id
          LEFT JOIN audit.dead d ON d.consumer = s.consumer AND d.source = e.source AND d.event_id = e.id
         WHERE e.published_at < c.settled_before AND e.at > c.sure_after
           AND h.event_id IS NULL AND d.event_id IS NULL
        """,
    ),
    Invariant(
        "E3",
        "events",
        "always",
        "Nobody has heard of what has not happened",
        # Who hears of an event begins to after it was committed: by `taken_at`, it was in every snapshot. A dead letter
        # is kept for longer than the outbox row of its event.
        """
        SELECT h.consumer, h.source, h.event_id, h.subject, h.subject_id
          FROM audit.handled h
         CROSS JOIN audit.clock c
          LEFT JOIN audit.outbox e ON e.source = h.source AND e.id = h.event_id
         WHERE h.at <= c.taken_at AND h.at > c.sure_after AND e.id IS NULL
           AND (h.consumer, h.source, h.event_id) NOT IN (SELECT consumer, source, event_id FROM audit.replayed)
        """,
    ),
    Invariant(
        "E4",
        "events",
        "always",
        "An event has its effect once on each consumer",
        """
        SELECT consumer, source, event_id, count(*) AS times
          FROM audit.handled
         GROUP BY consumer, source, event_id
        HAVING count(*) > 1
        """,
    ),
    Invariant(
        "E5",
        "events",
        "always",
        "Each consumer hears of one subject in the order in which it happened, but for dead letters that were replayed",
        # One change may make two events of the same version.
        """
        SELECT consumer, source, event_id, subject, subject_id, version, version_before
          FROM (
            SELECT h.*, lag(version) OVER told AS version_before, lag(event_id) OVER told AS event_before
              FROM audit.handled h
             WHERE (consumer, source, event_id) NOT IN (SELECT consumer, source, event_id FROM audit.replayed)
            WINDOW told AS (PARTITION BY consumer, source, subject, subject_id ORDER BY nth)
          ) heard
         WHERE (version, event_id) < (version_before, event_before)
        """,
    ),
    Invariant(
        "E6",
        "events",
        "always",
        "There are no dead letters",
        "SELECT consumer, source, event_id, type, subject, subject_id, tries, at FROM audit.dead",
    ),
    Invariant(
        "E7",
        "events",
        "always",
        "Every move of an order was told, along each of its axes",
        """
        SELECT h.order_id, h.version, h.axis, h.after
          FROM orders.order_history h
          JOIN audit.orders o ON o.id = h.order_id AND h.at >= o.checkout_since
         CROSS JOIN audit.clock c
          LEFT JOIN orders.outbox e
            ON e.subject = 'order' AND e.subject_id = h.order_id AND e.version = h.version
           AND e.type = CASE WHEN h.before IS NULL THEN 'order.placed'
                             WHEN h.axis = 'fulfilment' AND h.before = h.after THEN 'order.partially_returned'
                             ELSE 'order.' || h.after END
         WHERE h.at > c.sure_after AND e.id IS NULL
        """,
    ),
)

SHOP: Final = (*MONEY, *STOCK, *ORDERS, *IDEMPOTENCY, *EVENTS)
"""What the databases can answer by themselves. What takes the word of the clients is in `clients.py`."""
