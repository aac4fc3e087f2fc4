"""The SQL statements that open, lock and write payments."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Final

from mercato.chassis.contract import RuleBroken
from mercato.chassis.postgres.database import Tx

from .store import COLUMNS, Attempt, ChangedRow, NewPayment, PaymentRow

OPEN_SQL: Final = f"""
    INSERT INTO payments (order_id, nonce, attempt, user_id, method, currency, amount_minor, status)
    SELECT n.order_id, n.nonce, n.attempt, n.user_id, n.method, n.currency, n.amount_minor, n.status
      FROM unnest($1::bigint[], $2::bigint[], $3::integer[], $4::bigint[], $5::text[], $6::text[], $7::bigint[],
                  $8::text[])
           AS n (order_id, nonce, attempt, user_id, method, currency, amount_minor, status)
     WHERE n.attempt = 1
        OR NOT EXISTS (SELECT FROM payments o WHERE o.order_id = n.order_id AND o.nonce <> n.nonce)
     ORDER BY n.order_id, n.attempt
    ON CONFLICT DO NOTHING
    RETURNING {COLUMNS}
"""  # noqa: S608  # of constants alone
LOCK_ATTEMPTS_SQL: Final = f"""
    SELECT {COLUMNS}
      FROM payments
     WHERE id = ANY(ARRAY(
        SELECT p.id
          FROM unnest($1::bigint[], $2::integer[]) AS w (order_id, attempt)
         CROSS JOIN LATERAL (
            SELECT id FROM payments WHERE order_id = w.order_id AND attempt = w.attempt LIMIT 1) p))
     ORDER BY id
       FOR NO KEY UPDATE
"""  # noqa: S608  # of constants alone
"""One index lookup for each attempt: a join that was planned when the shop was new would read all payments."""
LOCK_SQL: Final = f"""
    SELECT {COLUMNS} FROM payments WHERE id = ANY($1::bigint[]) ORDER BY id FOR NO KEY UPDATE
"""  # noqa: S608  # of constants alone


async def open_payments(tx: Tx, payments: Sequence[NewPayment]) -> list[PaymentRow]:
    """Writes payments. Those that are not in the result are not written, for the reasons in `store.begin_charges`."""
    return await tx.fetch(
        PaymentRow,
        OPEN_SQL,
        [p.order_id for p in payments],
        [p.nonce for p in payments],
        [p.attempt for p in payments],
        [p.user_id for p in payments],
        [p.method for p in payments],
        [p.currency for p in payments],
        [p.amount_minor for p in payments],
        [p.status for p in payments],
    )


async def used_by_others(tx: Tx, orders: Sequence[tuple[int, int]]) -> set[int]:
    """Of these order ids and nonces, the ids that have payments with another nonce."""
    return set(
        await tx.fetch_values(
            int,
            """
            SELECT w.order_id
              FROM unnest($1::bigint[], $2::bigint[]) AS w (order_id, nonce)
             CROSS JOIN LATERAL (
                SELECT id FROM payments WHERE order_id = w.order_id AND nonce <> w.nonce LIMIT 1) p
            """,
            [order_id for order_id, _ in orders],
            [nonce for _, nonce in orders],
        )
    )


async def newest_order_id(tx: Tx) -> int:
    """The highest order id that has a payment. There is one."""
    return (await tx.fetch_values(int, "SELECT max(order_id) FROM payments"))[0]


async def lock_attempts(tx: Tx, attempts: Sequence[Attempt]) -> list[PaymentRow]:
    """Locks the payments that exist: no other transaction changes them or begins operations before this one ends."""
    return await tx.fetch(
        PaymentRow,
        LOCK_ATTEMPTS_SQL,
        [order_id for order_id, _ in attempts],
        [attempt for _, attempt in attempts],
    )


async def lock_payments(tx: Tx, ids: Sequence[int]) -> dict[int, PaymentRow]:
    """Locks payments by id, as `lock_attempts` does."""
    return {row.id: row for row in await tx.fetch(PaymentRow, LOCK_SQL, ids)}


async def write_payments(tx: Tx, changed: Sequence[PaymentRow]) -> dict[int, datetime.datetime]:
    """Writes payments that this transaction has locked; gives the time of each change."""
    rows = await tx.fetch(
        ChangedRow,
        """
        UPDATE payments p
           SET status = n.status, code = n.code, charge_id = n.charge_id, authorized_minor = n.authorized_minor,
               captured_minor = n.captured_minor, refunded_minor = n.refunded_minor, version = n.version,
               updated_at = greatest(p.updated_at, clock_timestamp())
          FROM unnest($1::bigint[], $2::text[], $3::text[], $4::bigint[], $5::bigint[], $6::bigint[], $7::bigint[],
                      $8::integer[])
               AS n (id, status, code, charge_id, authorized_minor, captured_minor, refunded_minor, version)
         CROSS JOIN LATERAL (SELECT ctid AS tid FROM payments WHERE id = n.id LIMIT 1) k
         WHERE p.ctid = k.tid AND p.version <= n.version
        RETURNING p.id, p.updated_at
        """,
        [p.id for p in changed],
        [p.status for p in changed],
        [p.code for p in changed],
        [p.charge_id for p in changed],
        [p.authorized_minor for p in changed],
        [p.captured_minor for p in changed],
        [p.refunded_minor for p in changed],
        [p.version for p in changed],
    )
    if len(rows) != len(changed):
        raise RuleBroken("the rows are locked: no other transaction can have changed them in between")
    return {row.id: row.updated_at for row in rows}
