"""The rows of payments, and the SQL statements of a charge of a new payment, a batch at a time.

Other operations are written by `payment_store.py` and `operation_store.py`; what clients read, by `list_store.py`.

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

from mercato.chassis.postgres.database import Row, Tx
from mercato.contracts.payments import OperationKind, Status

from .rules import Succeeded

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


COLUMNS: Final = ", ".join(PaymentRow.__struct_fields__)


class OpenedRow(Row):
    id: int
    order_id: int
    created_at: datetime.datetime


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


async def begin_charges(tx: Tx, payments: Sequence[NewPayment], keys: Sequence[str]) -> list[OpenedRow]:
    """Writes payments, each with the intent of its charge and the key for it. At most one payment for each order.

    A payment is not in the result where the attempt exists, where its order has another live payment, or where the
    earlier attempts belong to an order with another nonce. The statement waits for another transaction that writes the
    same attempt: the unique keys are the lock.
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

    A payment that is not in the result was settled by another transaction first, whose record stays. The update locks
    the payments by id; where it has waited for another transaction it checks the status again.
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
