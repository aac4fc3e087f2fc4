"""The invariants of money; `invariants.py` says what an invariant is, and when it holds."""

from __future__ import annotations

from typing import Final

from mercato.operations.audit.invariant import Invariant

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
               NULL AS payment_id, a.balance_minor AS stored_minor, t.sum_minor
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
        "No order is charged twice: in sandbox.charges it has at most one that is not refunded, and one that is open",
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
        "sandbox.operations and payments.operations have the same operations with the same amounts",
        # A void has no amount of its own. An intent with which the sandbox is called again has a new `asked_at`.
        """
        SELECT coalesce(b.key, p.key) AS key, coalesce(b.kind, p.kind) AS kind, b.status AS sandbox,
               p.status AS payments, b.amount_minor AS sandbox_minor, p.amount_minor AS payments_minor
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
        "What the sandbox took for an order, less its refunds, is what the order says; nothing for a cancelled order",
        # The sandbox may have done a pending refund or not: both are right. What it did after `taken_at` is left out:
        # its copy may be newer than that of the orders.
        """
        SELECT o.id AS order_id, o.status, o.payment, coalesce(b.net_minor, 0) AS sandbox_minor, o.kept_minor
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
        "No operation of the sandbox, and no payment, is without an order",
        """
        SELECT 'sandbox' AS service, b.key AS reference, b.order_id,
               'orders was restored? see docs/operations.md: refund it at the provider, or deliver the order' AS way_out
          FROM sandbox.operations b
         CROSS JOIN audit.clock c
          LEFT JOIN orders.orders o ON o.id = b.order_id
         WHERE b.status = 'succeeded' AND b.created_at < c.settled_before AND o.id IS NULL
        UNION ALL
        SELECT 'payments', p.id::text, p.order_id, 'the same'
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
        "An order's total is the sum of its lines, and a line's total that of its pieces and tax, less its discount",
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
        "No charge stays open for an order that is cancelled, or is neither unpaid nor authorized",
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
        "No more is refunded than was captured: in sandbox.operations, in payments.payments and of an order",
        """
        SELECT 'sandbox' AS service, order_id
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
