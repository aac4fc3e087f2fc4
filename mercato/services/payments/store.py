"""Every SQL statement of payments.

A payment's row is its lock: operations and intents of a payment are begun and settled by the transaction that holds it.
Locks are taken in one order: payments by id, then their intents, then accounts by account and currency.

Intents are a small table with a high turnover, of which the planner may think that reading all of it is cheapest: each
statement looks rows up one by one in the primary key (LATERAL with LIMIT, or = ANY of an array), whatever it estimates.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from mercato.chassis.contract import MAX_ID, RuleBroken
from mercato.chassis.postgres.database import Row, Tx
from mercato.contracts.payments import AnotherOrder, ListPayments, OperationKind, OperationStatus, Status

from .rules import TRANSFERS, Declined, ProviderResult, Succeeded, Unknown

ABOVE_ALL_IDS: Final = MAX_ID + 1

Attempt = tuple[int, int]
"""An order and the number of an attempt to pay it."""
OperationId = tuple[int, OperationKind, str]
"""A payment, a kind and a reference: the operation, whether it is an intent or settled."""


class PaymentRow(Row):
    id: int
    order_id: int
    nonce: int
    attempt: int
    user_id: int
    method: str
    currency: str
    amount_minor: int
    authorized_minor: int
    captured_minor: int
    refunded_minor: int
    status: Status
    code: str | None
    charge_id: int | None
    version: int
    created_at: datetime.datetime
    updated_at: datetime.datetime


class OpenedRow(Row):
    id: int
    order_id: int
    created_at: datetime.datetime


class OperationRow(Row):
    """An operation of a payment: an intent, or settled."""

    payment_id: int
    kind: OperationKind
    reference: str
    amount_minor: int
    status: OperationStatus
    code: str | None


class IntentRow(Row):
    """An operation that the provider is about to be called with."""

    payment_id: int
    kind: OperationKind
    reference: str
    key: str
    amount_minor: int
    currency: str
    is_old: bool
    """Begun so long ago that the provider may have forgotten its key."""

    @property
    def id(self) -> OperationId:
        return self.payment_id, self.kind, self.reference


class SettledRow(Row):
    """An operation whose result this transaction has recorded."""

    payment_id: int
    kind: OperationKind
    reference: str
    amount_minor: int
    currency: str

    @property
    def id(self) -> OperationId:
        return self.payment_id, self.kind, self.reference


class ChangedRow(Row):
    id: int
    updated_at: datetime.datetime


class NewPayment(msgspec.Struct, frozen=True, gc=False):
    """A payment that is about to be written, where its order has none with this attempt."""

    order_id: int
    nonce: int
    attempt: int
    user_id: int
    method: str
    currency: str
    amount_minor: int
    status: Status = "pending"


class NewIntent(msgspec.Struct, frozen=True, gc=False):
    """An operation that is about to begin."""

    payment_id: int
    kind: OperationKind
    reference: str
    key: str
    amount_minor: int
    currency: str
    status: OperationStatus = "intent"
    code: str | None = None


# ---------------------------------------------------------------------------------------------------------- charges


async def begin_charges(tx: Tx, payments: Sequence[NewPayment], keys: Sequence[str]) -> list[OpenedRow]:
    """Writes payments, each with the intent of its charge and the key for it. At most one payment for each order.

    A payment is not in the result where the attempt exists, where its order has another live payment, or where the
    earlier attempts belong to an order with another nonce. Another transaction that is writing the same attempt is
    waited for: the unique keys are the lock.
    """
    return await tx.fetch(
        OpenedRow,
        """
        WITH opened AS (
            INSERT INTO payments (order_id, nonce, attempt, user_id, method, currency, amount_minor)
            SELECT n.order_id, n.nonce, n.attempt, n.user_id, n.method, n.currency, n.amount_minor
              FROM unnest($1::bigint[], $2::bigint[], $3::integer[], $4::bigint[], $5::text[], $6::text[], $7::bigint[])
                   AS n (order_id, nonce, attempt, user_id, method, currency, amount_minor)
             WHERE n.attempt = 1
                OR NOT EXISTS (SELECT FROM payments o WHERE o.order_id = n.order_id AND o.nonce <> n.nonce)
             ORDER BY n.order_id
            ON CONFLICT DO NOTHING
            RETURNING id, order_id, currency, amount_minor, created_at
        ), begun AS (
            INSERT INTO intents (payment_id, kind, key, amount_minor, currency)
            SELECT id, 'charge', ($8::text[])[array_position($1::bigint[], order_id)], amount_minor, currency
              FROM opened
        )
        SELECT id, order_id, created_at FROM opened
        """,
        [p.order_id for p in payments],
        [p.nonce for p in payments],
        [p.attempt for p in payments],
        [p.user_id for p in payments],
        [p.method for p in payments],
        [p.currency for p in payments],
        [p.amount_minor for p in payments],
        keys,
    )


async def record_charges(tx: Tx, results: Mapping[int, Succeeded]) -> dict[int, datetime.datetime]:
    """Records charges that succeeded, by payment: operation, payment, transfer, balances. Gives the time of each.

    A payment that is not in the result was settled by another transaction first, whose record stands. The update locks
    the payments by id; where it has waited for another transaction it looks at the status again.
    """
    results = dict(sorted(results.items()))
    rows = await tx.fetch(
        ChangedRow,
        """
        WITH moved AS (
            UPDATE payments p
               SET status = 'captured', authorized_minor = p.amount_minor, captured_minor = p.amount_minor,
                   charge_id = w.charge_id, version = p.version + 1,
                   updated_at = greatest(p.updated_at, clock_timestamp())
              FROM unnest($1::bigint[], $3::bigint[]) AS w (id, charge_id)
             CROSS JOIN LATERAL (SELECT ctid AS tid FROM payments WHERE id = w.id LIMIT 1) k
             WHERE p.ctid = k.tid AND p.status = 'pending'
               AND (SELECT i.kind FROM intents i WHERE i.payment_id = p.id AND i.reference = '' LIMIT 1) = 'charge'
            RETURNING p.id, p.updated_at
        ), settled AS (
            DELETE FROM intents i
             WHERE i.payment_id = ANY(ARRAY(SELECT id FROM moved)) AND i.reference = ''
            RETURNING i.payment_id, i.kind, i.key, i.amount_minor, i.currency, i.calls, i.began_at
        ), recorded AS (
            INSERT INTO operations
                   (payment_id, kind, key, amount_minor, currency, status, provider_id, calls, began_at)
            SELECT payment_id, kind, key, amount_minor, currency, 'succeeded',
                   ($2::bigint[])[array_position($1::bigint[], payment_id)], calls, began_at
              FROM settled
        ), transferred AS (
            INSERT INTO transfers (payment_id, kind, debit, credit, amount_minor, currency)
            SELECT payment_id, kind, 'provider', 'sales', amount_minor, currency FROM settled
        ), balanced AS (
            INSERT INTO accounts AS a (account, currency, balance_minor)
            SELECT s.account, t.currency, s.sign * t.amount_minor
              FROM (VALUES ('provider', 1), ('sales', -1)) AS s (account, sign)
             CROSS JOIN (
                SELECT currency, sum(amount_minor) AS amount_minor FROM settled GROUP BY currency
             ) t
             ORDER BY s.account, t.currency
            ON CONFLICT (account, currency) DO UPDATE SET balance_minor = a.balance_minor + excluded.balance_minor
        )
        SELECT id, updated_at FROM moved
        """,
        list(results),
        [result.provider_id for result in results.values()],
        [result.charge_id for result in results.values()],
    )
    return {row.id: row.updated_at for row in rows}


# --------------------------------------------------------------------------------------------------------- payments


async def open_payments(tx: Tx, payments: Sequence[NewPayment]) -> list[PaymentRow]:
    """Writes payments. What is not in the result is not, for the reasons that `begin_charges` has."""
    return await tx.fetch(
        PaymentRow,
        """
        INSERT INTO payments (order_id, nonce, attempt, user_id, method, currency, amount_minor, status)
        SELECT n.order_id, n.nonce, n.attempt, n.user_id, n.method, n.currency, n.amount_minor, n.status
          FROM unnest($1::bigint[], $2::bigint[], $3::integer[], $4::bigint[], $5::text[], $6::text[], $7::bigint[],
                      $8::text[])
               AS n (order_id, nonce, attempt, user_id, method, currency, amount_minor, status)
         WHERE n.attempt = 1
            OR NOT EXISTS (SELECT FROM payments o WHERE o.order_id = n.order_id AND o.nonce <> n.nonce)
         ORDER BY n.order_id, n.attempt
        ON CONFLICT DO NOTHING
        RETURNING id, order_id, nonce, attempt, user_id, method, currency, amount_minor, authorized_minor,
                  captured_minor, refunded_minor, status, code, charge_id, version, created_at, updated_at
        """,
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


async def name_newest_order(tx: Tx, refused: Sequence[AnotherOrder]) -> None:
    """Puts into refusals the highest order id that has a payment."""
    if refused:
        [newest] = await tx.fetch_values(int, "SELECT max(order_id) FROM payments")
        for refusal in refused:
            refusal.newest_order_id = newest


async def lock_attempts(tx: Tx, attempts: Sequence[Attempt]) -> list[PaymentRow]:
    """The payments that exist. Until the end of the transaction no other one changes them or begins operations."""
    # One look at the index for each: a join that was planned when the shop was new would read all payments.
    return await tx.fetch(
        PaymentRow,
        """
        SELECT id, order_id, nonce, attempt, user_id, method, currency, amount_minor, authorized_minor, captured_minor,
               refunded_minor, status, code, charge_id, version, created_at, updated_at
          FROM payments
         WHERE id = ANY(ARRAY(
            SELECT p.id
              FROM unnest($1::bigint[], $2::integer[]) AS w (order_id, attempt)
             CROSS JOIN LATERAL (
                SELECT id FROM payments WHERE order_id = w.order_id AND attempt = w.attempt LIMIT 1) p))
         ORDER BY id
           FOR NO KEY UPDATE
        """,
        [order_id for order_id, _ in attempts],
        [attempt for _, attempt in attempts],
    )


async def lock_payments(tx: Tx, ids: Sequence[int]) -> dict[int, PaymentRow]:
    """The same by id."""
    rows = await tx.fetch(
        PaymentRow,
        """
        SELECT id, order_id, nonce, attempt, user_id, method, currency, amount_minor, authorized_minor, captured_minor,
               refunded_minor, status, code, charge_id, version, created_at, updated_at
          FROM payments
         WHERE id = ANY($1::bigint[])
         ORDER BY id
           FOR NO KEY UPDATE
        """,
        ids,
    )
    return {row.id: row for row in rows}


async def payments(tx: Tx, ids: Sequence[int]) -> dict[int, PaymentRow]:
    rows = await tx.fetch(
        PaymentRow,
        """
        SELECT id, order_id, nonce, attempt, user_id, method, currency, amount_minor, authorized_minor, captured_minor,
               refunded_minor, status, code, charge_id, version, created_at, updated_at
          FROM payments
         WHERE id = ANY($1::bigint[])
        """,
        ids,
    )
    return {row.id: row for row in rows}


LIST_SQL: Final[dict[tuple[bool, bool], str]] = {
    (by_order, by_user): "".join(
        (
            """
            SELECT id, order_id, nonce, attempt, user_id, method, currency, amount_minor, authorized_minor,
                   captured_minor, refunded_minor, status, code, charge_id, version, created_at, updated_at
              FROM payments
             WHERE id < $1""",
            " AND order_id = $3 AND ($4::bigint IS NULL OR nonce = $4)" if by_order else "",
            f" AND user_id = ${5 if by_order else 3}" if by_user else "",
            " ORDER BY id DESC LIMIT $2",
        )
    )
    for by_order in (False, True)
    for by_user in (False, True)
}
"""By whether an order and whether a user is asked for: each its own statement, so that each has its own plan."""


async def list_page(tx: Tx, wanted: ListPayments, limit: int) -> list[PaymentRow]:
    """Up to `limit` payments, the newest first."""
    by_order, by_user = wanted.order_id is not None, wanted.user_id is not None
    return await tx.fetch(
        PaymentRow,
        LIST_SQL[by_order, by_user],
        ABOVE_ALL_IDS if wanted.before is None else wanted.before,
        limit,
        *((wanted.order_id, wanted.order_nonce) if by_order else ()),
        *((wanted.user_id,) if by_user else ()),
    )


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


# ---------------------------------------------------------------------------------------------------------- intents


async def operations_of(tx: Tx, payment_ids: Sequence[int]) -> list[OperationRow]:
    """All operations of the payments, settled or not."""
    return await tx.fetch(
        OperationRow,
        """
        SELECT payment_id, kind, reference, amount_minor, status, code
          FROM operations
         WHERE payment_id = ANY($1::bigint[])
        UNION ALL
        SELECT payment_id, kind, reference, amount_minor, status, NULL
          FROM intents
         WHERE payment_id = ANY($1::bigint[])
        """,
        payment_ids,
    )


async def begin_operations(tx: Tx, intents: Sequence[NewIntent]) -> list[IntentRow]:
    """Writes intents of locked payments: the caller is about to call the provider."""
    return await tx.fetch(
        IntentRow,
        """
        INSERT INTO intents (payment_id, kind, reference, key, amount_minor, currency)
        SELECT n.payment_id, n.kind, n.reference, n.key, n.amount_minor, n.currency
          FROM unnest($1::bigint[], $2::text[], $3::text[], $4::text[], $5::bigint[], $6::text[])
               AS n (payment_id, kind, reference, key, amount_minor, currency)
        RETURNING payment_id, kind, reference, key, amount_minor, currency, false AS is_old
        """,
        [i.payment_id for i in intents],
        [i.kind for i in intents],
        [i.reference for i in intents],
        [i.key for i in intents],
        [i.amount_minor for i in intents],
        [i.currency for i in intents],
    )


async def count_calls(tx: Tx, ids: Sequence[OperationId]) -> list[IntentRow]:
    """Notes that the caller is about to call the provider again with these intents of locked payments."""
    return await tx.fetch(
        IntentRow,
        """
        UPDATE intents i
           SET calls = i.calls + 1, asked_at = now()
          FROM unnest($1::bigint[], $2::text[]) AS n (payment_id, reference)
         CROSS JOIN LATERAL (
            SELECT ctid AS tid FROM intents WHERE payment_id = n.payment_id AND reference = n.reference LIMIT 1) k
         WHERE i.ctid = k.tid
        RETURNING i.payment_id, i.kind, i.reference, i.key, i.amount_minor, i.currency,
                  i.began_at < now() - interval '23 hours' AS is_old
        """,
        [payment_id for payment_id, _, _ in ids],
        [reference for _, _, reference in ids],
    )


async def lease_intents(tx: Tx, quiet_seconds: float, limit: int) -> list[IntentRow]:
    """Intents that were left alone for a while, the oldest payments first; the caller is about to call again.

    `asked_at` is the lease: the next caller waits so long after it, and longer each time. Locked payments are skipped,
    with their intents: another transaction is at work on them. The primary key is the order in which they are read.
    """
    return await tx.fetch(
        IntentRow,
        """
        UPDATE intents i
           SET calls = i.calls + 1, asked_at = now()
          FROM (SELECT due.ctid AS tid
                  FROM intents due
                 CROSS JOIN LATERAL (
                    SELECT id FROM payments WHERE id = due.payment_id LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED) p
                 WHERE due.asked_at < now() - make_interval(secs => $1 * least(due.calls, 12))
                 ORDER BY due.payment_id, due.reference
                 LIMIT $2
                   FOR NO KEY UPDATE OF due SKIP LOCKED) k
         WHERE i.ctid = k.tid
        RETURNING i.payment_id, i.kind, i.reference, i.key, i.amount_minor, i.currency,
                  i.began_at < now() - interval '23 hours' AS is_old
        """,
        quiet_seconds,
        limit,
    )


# ---------------------------------------------------------------------------------------------------------- results


async def settle_operations(tx: Tx, results: Mapping[OperationId, Succeeded | Declined]) -> list[SettledRow]:
    """Moves intents of locked payments to the operations, with their results; those that are still intents.

    What is not in the result was settled by another transaction first, whose record stands.
    """
    return await tx.fetch(
        SettledRow,
        """
        WITH settled AS (
            DELETE FROM intents i
             USING unnest($1::bigint[], $2::text[], $3::text[], $4::text[], $5::text[], $6::bigint[])
                   AS n (payment_id, kind, reference, status, code, provider_id)
             CROSS JOIN LATERAL (
                SELECT ctid AS tid FROM intents
                 WHERE payment_id = n.payment_id AND reference = n.reference AND kind = n.kind LIMIT 1) k
             WHERE i.ctid = k.tid
            RETURNING i.payment_id, i.kind, i.reference, i.key, i.amount_minor, i.currency, n.status, n.code,
                      n.provider_id, i.calls, i.began_at
        )
        INSERT INTO operations (payment_id, kind, reference, key, amount_minor, currency, status, code, provider_id,
                                calls, began_at)
        SELECT payment_id, kind, reference, key, amount_minor, currency, status, code, provider_id, calls, began_at
          FROM settled
         ORDER BY provider_id
        RETURNING payment_id, kind, reference, amount_minor, currency
        """,
        [payment_id for payment_id, _, _ in results],
        [kind for _, kind, _ in results],
        [reference for _, _, reference in results],
        ["succeeded" if isinstance(result, Succeeded) else "declined" for result in results.values()],
        [result.code if isinstance(result, Declined) else None for result in results.values()],
        [result.provider_id if isinstance(result, Succeeded) else None for result in results.values()],
    )


async def mark_unknown(tx: Tx, ids: Sequence[OperationId]) -> None:
    """Notes of intents of locked payments that the provider was called, and its answer tells no result."""
    await tx.execute(
        """
        UPDATE intents i
           SET status = 'unknown'
          FROM unnest($1::bigint[], $2::text[], $3::text[]) AS n (payment_id, kind, reference)
         CROSS JOIN LATERAL (
            SELECT ctid AS tid FROM intents
             WHERE payment_id = n.payment_id AND reference = n.reference AND kind = n.kind LIMIT 1) k
         WHERE i.ctid = k.tid AND i.status = 'intent'
        """,
        [payment_id for payment_id, _, _ in ids],
        [kind for _, kind, _ in ids],
        [reference for _, _, reference in ids],
    )


async def transfer(tx: Tx, operations: Sequence[SettledRow]) -> None:
    """Writes the transfers of operations that moved money, and changes the balances of their accounts.

    All payments of a currency meet at the same few account rows. So this is the last statement before the commit, and
    a batch changes each balance once.
    """
    moving = [o for o in operations if o.kind in TRANSFERS and o.amount_minor]
    if not moving:
        return
    await tx.execute(
        """
        WITH transferred AS (
            INSERT INTO transfers (payment_id, kind, reference, debit, credit, amount_minor, currency)
            SELECT n.payment_id, n.kind, n.reference, n.debit, n.credit, n.amount_minor, n.currency
              FROM unnest($1::bigint[], $2::text[], $3::text[], $4::text[], $5::text[], $6::bigint[], $7::text[])
                   AS n (payment_id, kind, reference, debit, credit, amount_minor, currency)
            RETURNING debit, credit, amount_minor, currency
        )
        INSERT INTO accounts AS a (account, currency, balance_minor)
        SELECT s.account, s.currency, sum(s.amount_minor)
          FROM (
            SELECT debit AS account, currency, amount_minor FROM transferred
            UNION ALL
            SELECT credit, currency, -amount_minor FROM transferred
          ) s
         GROUP BY s.account, s.currency
         ORDER BY s.account, s.currency
        ON CONFLICT (account, currency) DO UPDATE SET balance_minor = a.balance_minor + excluded.balance_minor
        """,
        [o.payment_id for o in moving],
        [o.kind for o in moving],
        [o.reference for o in moving],
        [TRANSFERS[o.kind][0] for o in moving],
        [TRANSFERS[o.kind][1] for o in moving],
        [o.amount_minor for o in moving],
        [o.currency for o in moving],
    )


def status_of(result: ProviderResult) -> OperationStatus:
    """The status of an operation with this result."""
    match result:
        case Succeeded():
            return "succeeded"
        case Declined():
            return "declined"
        case Unknown():
            return "unknown"
