"""The invariants of stock; `invariants.py` says what an invariant is, and when it holds."""

from __future__ import annotations

from typing import Final

from mercato.contracts.roles import GUEST_USER
from mercato.operations.audit.invariant import Invariant
from mercato.services.orders import rules as orders

STOCK: Final = (
    Invariant(
        "S1",
        "stock",
        "always",
        "No level is negative, and no more is reserved than is on hand",
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
        "What is reserved of a product is the sum of its held reservations",
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
        "At no version of a level was more sold than was on hand",
        # The versions of a level are in the order of its changes. All lines that one batch sold have one version.
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
        "Confirmed orders and committed reservations have the same lines",
        # A cancelled order that was confirmed before keeps its committed reservation, with all pieces returned.
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
        "Only pending orders hold stock",
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
        "Each sold line and each movement has a version that its level has had, and returned pieces have movements",
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
        "No product without a level has reservations or movements",
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
        "Every level with stock has a product",
        # A product is never deleted. It is missing after a restore of the database of products alone.
        """
        SELECT l.product_id, l.on_hand, l.updated_at
          FROM inventory.levels l
          LEFT JOIN products.products p ON p.id = l.product_id
         CROSS JOIN audit.clock c
         WHERE p.id IS NULL AND l.on_hand > 0 AND l.updated_at < c.settled_before
        """,
    ),
    Invariant(
        "S10",
        "stock",
        "always",
        "`guest_holds` has the quantities that the reservations of guests hold",
        # Rows of ended reservations stay until a guest reserves the product again.
        """
        SELECT g.order_id, g.product_id, g.quantity AS counted, h.quantity AS held
          FROM inventory.guest_holds g
          JOIN inventory.reservations r ON r.order_id = g.order_id AND r.state = 'held'
          LEFT JOIN audit.held_lines h ON h.order_id = g.order_id AND h.product_id = g.product_id
         WHERE g.quantity IS DISTINCT FROM h.quantity
        UNION ALL
        SELECT h.order_id, h.product_id, NULL, h.quantity
          FROM audit.held_lines h
          JOIN (SELECT DISTINCT order_id FROM inventory.guest_holds) c ON c.order_id = h.order_id
          LEFT JOIN inventory.guest_holds g ON g.order_id = h.order_id AND g.product_id = h.product_id
         WHERE g.order_id IS NULL
        """,
    ),
    Invariant(
        "S11",
        "stock",
        "always",
        "`guest_holds` has every held reservation of a guest's order, and no other",
        # An order that an account has claimed was placed by a guest: its reservation stays in the table.
        f"""
        SELECT h.order_id, h.product_id, o.user_id, g.quantity AS counted
          FROM audit.held_lines h
          JOIN inventory.reservations r ON r.order_id = h.order_id
          JOIN orders.orders o ON o.id = r.order_id AND o.nonce = r.nonce
          LEFT JOIN inventory.guest_holds g ON g.order_id = h.order_id AND g.product_id = h.product_id
         WHERE CASE WHEN o.user_id = {GUEST_USER} THEN g.order_id IS NULL
                    ELSE g.order_id IS NOT NULL AND NOT EXISTS (
                        SELECT FROM orders.history c
                         WHERE c.order_id = o.id AND '{orders.CLAIMED}' = ANY(c.events)) END
        """,  # noqa: S608  # only constants
    ),
)
