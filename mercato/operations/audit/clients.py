"""Invariants between the databases and the answers that clients got: their queries also read `history.ops`."""

from __future__ import annotations

from typing import Final

from mercato.operations.audit.invariant import Invariant

CLIENTS: Final = (
    Invariant(
        "O5",
        "clients",
        "always",
        "No order with which a client was answered is missing",
        """
        SELECT c.op_id, c.order_id
          FROM history.ops c
          LEFT JOIN orders.orders o ON o.id = c.order_id
         WHERE c.route = 'POST /orders' AND c.status IN (200, 201, 202) AND o.id IS NULL
        """,
    ),
    Invariant(
        "O7",
        "clients",
        "always",
        "No order exists without a request of a client",
        # An order without a key and without an answer can belong to any unanswered request of its buyer.
        """
        SELECT o.id AS order_id, o.principal, o.idempotency_key
          FROM orders.orders o
         CROSS JOIN (SELECT min(invoked_at) AS at FROM history.ops) first
         WHERE o.created_at >= first.at
           AND NOT EXISTS (
            SELECT FROM history.ops c
             WHERE c.route = 'POST /orders' AND c.principal = o.principal AND c.idempotency_key = o.idempotency_key
           )
           AND NOT EXISTS (SELECT FROM history.ops c WHERE c.route = 'POST /orders' AND c.order_id = o.id)
           AND NOT (o.idempotency_key IS NULL AND EXISTS (
            SELECT FROM history.ops c
             WHERE c.route = 'POST /orders' AND c.idempotency_key IS NULL AND c.outcome <> 'final'
               AND c.user_id IN (0, o.user_id)
           ))
        """,
    ),
    Invariant(
        "O8",
        "clients",
        "always",
        "No client sees an order go back to an earlier version",
        """
        SELECT earlier.op_id AS saw, earlier.version, later.op_id AS then_saw, later.version AS then_version
          FROM history.ops earlier
          JOIN history.ops later ON later.order_id = earlier.order_id AND later.route = earlier.route
         WHERE earlier.route = 'GET /orders/{id}' AND earlier.status = 200 AND later.status = 200
           AND earlier.completed_at < later.invoked_at AND later.version < earlier.version
        """,
    ),
    Invariant(
        "K1",
        "clients",
        "always",
        "The same request with the same key has one answer",
        """
        SELECT principal, route, idempotency_key, count(DISTINCT (status, answer)) AS answers
          FROM history.ops
         WHERE idempotency_key IS NOT NULL AND outcome = 'final'
         GROUP BY principal, route, idempotency_key, fingerprint
        HAVING count(DISTINCT (status, answer)) > 1
        """,
    ),
    Invariant(
        "K2",
        "clients",
        "always",
        "A different request with a used key is refused with 422 for a day",
        """
        SELECT first.op_id AS first, other.op_id AS other, other.status
          FROM history.ops first
          JOIN history.ops other
            ON (other.principal, other.route, other.idempotency_key)
             = (first.principal, first.route, first.idempotency_key)
         WHERE first.outcome = 'final' AND first.status <> 422 AND other.outcome = 'final'
           AND other.fingerprint <> first.fingerprint AND other.status <> 422
           AND other.invoked_at BETWEEN first.completed_at AND first.completed_at + interval '24 hours'
        """,
    ),
    Invariant(
        "X1",
        "clients",
        "always",
        "Only its owner and staff see an order",
        """
        SELECT c.op_id, c.route, c.user_id, o.id AS order_id, o.user_id AS owner
          FROM history.ops c
          JOIN orders.orders o ON o.id = c.order_id
         WHERE c.status < 300 AND c.user_id <> o.user_id AND c.role NOT IN ('staff', 'service')
           -- The guest saw it before an account claimed it.
           AND NOT (c.user_id = 0 AND EXISTS (
            SELECT FROM orders.history h WHERE h.order_id = o.id AND 'order.claimed' = ANY (h.events)
           ))
        """,
    ),
)
