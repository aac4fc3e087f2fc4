"""The SQL statements of the operations of payments: their intents, their results, and the transfers of money."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from mercato.chassis.postgres.database import Row, Tx
from mercato.contracts.payments import OperationKind, OperationStatus

from .rules import TRANSFERS, Declined, Succeeded
from .store import IntentRow, OperationId


class OperationRow(Row):
    """An operation of a payment: an intent, or settled."""

    payment_id: int
    kind: OperationKind
    reference: str
    amount_minor: int
    status: OperationStatus
    code: str | None


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
    """Counts another call of the provider, which the caller is about to make, with intents of locked payments."""
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
    """Leases intents that no process has called for a while, the oldest payments first, for another call.

    `asked_at` begins the lease: the next process leases the intent `quiet_seconds` later, and later after each call.
    Locked payments are skipped, with their intents: another transaction changes them. Intents are read in the order of
    the primary key.
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
    """Moves intents of locked payments that still exist to the operations, with their results.

    An operation that is not in the result was settled by another transaction first, whose record stays.
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
    """Marks intents of locked payments as `unknown`: the provider was called, and its answer has no result."""
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

    All payments of a currency lock the same few account rows. So this is the last statement before the commit, and a
    batch changes each balance once.
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
