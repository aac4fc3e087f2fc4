"""The invariants of events: see `invariants.py`. The copies of outboxes and of the feed have a row for each event."""

from __future__ import annotations

from typing import Final

from mercato.operations.audit.invariant import Invariant

EVENTS: Final = (
    Invariant(
        "E1",
        "events",
        "settled",
        "Every consumer has read every event that it subscribes to, and no event stays parked after its retry is due",
        # Of the parked events of a subject, the first has the time of its retry; the others wait for it ('infinity').
        """
        SELECT s.consumer, e.source, e.id AS event_id, e.type, e.subject, e.subject_id, e.at
          FROM audit.outbox e
          JOIN audit.subscriptions s ON s.type IS NULL OR s.type = e.type
         CROSS JOIN audit.clock c
          LEFT JOIN audit.cursors k ON k.consumer = s.consumer AND k.source = e.source
         WHERE e.at < c.settled_before AND e.id > coalesce(k.position, 0)
        UNION ALL
        SELECT p.consumer, p.source, p.event_id, p.type, p.subject, p.subject_id, NULL
          FROM audit.parked p
          LEFT JOIN (
            SELECT DISTINCT f.consumer, f.source, f.subject, f.subject_id
              FROM audit.parked f
             CROSS JOIN audit.clock c
             WHERE f.dead_at IS NULL AND f.retry_at > c.settled_before AND f.retry_at < 'infinity'
          ) retried
            ON (retried.consumer, retried.source, retried.subject, retried.subject_id)
             = (p.consumer, p.source, p.subject, p.subject_id)
         WHERE p.dead_at IS NULL AND retried.source IS NULL
        """,
    ),
    Invariant(
        "E2",
        "events",
        "always",
        "Every event that a consumer has read had its effect, or is parked or dead",
        """
        SELECT e.consumer, e.source, e.id AS event_id, e.type, e.subject, e.subject_id
          FROM audit.consumed e
         CROSS JOIN audit.clock c
          LEFT JOIN events.feed f
            ON (f.source, f.event_id, f.type, f.subject, f.subject_id, f.version)
             = (e.source, e.id, e.type, e.subject, e.subject_id, e.version)
         WHERE e.consumer = 'events.feed' AND e.at > c.sure_after AND f.event_id IS NULL
        UNION ALL
        SELECT e.consumer, e.source, e.id, e.type, e.subject, e.subject_id
          FROM audit.consumed e
          JOIN products.products p ON p.id = e.subject_id
         WHERE e.consumer = 'products.in_stock'
           AND (p.stock_version < e.version
                OR (p.stock_version = e.version AND p.in_stock <> (e.type = 'stock.available')))
        UNION ALL
        SELECT e.consumer, e.source, e.id, e.type, e.subject, e.subject_id
          FROM audit.consumed e
         CROSS JOIN audit.clock c
          LEFT JOIN users.security_log l
            ON (l.kind, l.subject, l.at)
             = (CASE e.type WHEN 'refund.succeeded' THEN 'refunded' ELSE 'price_changed' END,
                e.subject || ' ' || e.subject_id, e.at)
         WHERE e.consumer = 'users.security_log' AND e.at > c.sure_after AND l.at IS NULL
        """,
    ),
    Invariant(
        "E3",
        "events",
        "always",
        "The feed has no event that was not emitted",
        # A consumer reads an event after its commit: an event that was received by `taken_at` is in every snapshot. A
        # replayed event is kept for longer than its outbox row.
        """
        SELECT f.source, f.event_id, f.subject, f.subject_id
          FROM events.feed f
         CROSS JOIN audit.clock c
          LEFT JOIN audit.outbox e ON e.source = f.source AND e.id = f.event_id
         WHERE f.received_at <= c.taken_at AND f.received_at > c.sure_after AND e.id IS NULL
           AND ('events.feed', f.source, f.event_id) NOT IN (SELECT consumer, source, event_id FROM audit.replayed)
        """,
    ),
    Invariant(
        "E4",
        "events",
        "always",
        "An event is in the feed once",
        """
        SELECT source, event_id, count(*) AS times
          FROM events.feed
         GROUP BY source, event_id
        HAVING count(*) > 1
        """,
    ),
    Invariant(
        "E5",
        "events",
        "always",
        "The feed has the events of a subject in the order of their commits, except for replayed dead ones",
        # One change may emit two events of the same version.
        """
        SELECT source, event_id, subject, subject_id, version, version_before
          FROM (
            SELECT f.*, lag(version) OVER in_order AS version_before, lag(event_id) OVER in_order AS event_before
              FROM events.feed f
             WHERE ('events.feed', source, event_id) NOT IN (SELECT consumer, source, event_id FROM audit.replayed)
            WINDOW in_order AS (PARTITION BY source, subject, subject_id ORDER BY position)
          ) fed
         WHERE (version, event_id) < (version_before, event_before)
        """,
    ),
    Invariant(
        "E6",
        "events",
        "always",
        "There are no dead events",
        """
        SELECT consumer, source, event_id, type, subject, subject_id, tries, dead_at
          FROM audit.parked
         WHERE dead_at IS NOT NULL AND replayed_at IS NULL
        """,
    ),
    Invariant(
        "E7",
        "events",
        "always",
        "Each transition of an order has emitted its events, once each",
        """
        SELECT h.order_id, h.version, h.type, count(e.type) AS times
          FROM (SELECT order_id, version, at, unnest(events) AS type FROM orders.history) h
         CROSS JOIN audit.clock c
          LEFT JOIN audit.outbox e
            ON e.source = 'orders' AND e.subject = 'order' AND e.subject_id = h.order_id AND e.version = h.version
           AND e.type = h.type
         WHERE h.at > c.sure_after
         GROUP BY h.order_id, h.version, h.type
        HAVING count(e.type) <> 1
        """,
    ),
    Invariant(
        "E8",
        "events",
        "always",
        "A product is in stock where its level has available pieces, once the level's newest event had its effect",
        """
        SELECT p.id AS product_id, p.in_stock, p.stock_version, l.on_hand, l.reserved
          FROM products.products p
          JOIN inventory.levels l ON l.product_id = p.id
          JOIN (
            SELECT subject_id, max(version) AS version
              FROM inventory.outbox
             WHERE type IN ('stock.available', 'stock.exhausted')
             GROUP BY subject_id
          ) newest ON newest.subject_id = p.id AND newest.version = p.stock_version
         WHERE p.in_stock <> (l.on_hand > l.reserved) AND l.on_hand >= l.reserved
        """,
    ),
    Invariant(
        "E9",
        "events",
        "always",
        "A change of price, and a refund, is in the security log at most once",
        # A transaction changes the price of a product once, and settles one refund of an order. So the time of its
        # outbox row, which the entry has, identifies the event.
        """
        SELECT kind, subject, at, count(*) AS times
          FROM users.security_log
         GROUP BY kind, subject, at
        HAVING count(*) > 1
        """,
    ),
)
