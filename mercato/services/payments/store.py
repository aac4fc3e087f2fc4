"""Every SQL statement of payments.

Locks are taken in one order by everybody: payments by id, then their operations, then accounts by account and currency.
Who holds the lock of a payment is the only one who begins or settles operations of it.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from mercato.chassis.contract import MAX_ID
from mercato.chassis.db import Row, Tx
from mercato.contracts.payments import ListPayments, OperationKind, OperationStatus, PaymentStep, Status

from .rules import Declined, Outcome, Succeeded, Unknown

ABOVE_ALL_IDS: Final = MAX_ID + 1

Pair = tuple[int, int]
"""An order and an attempt to pay it."""


class PaymentRow(Row):
    id: int
    order_id: int
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


class OperationRow(Row):
    id: int
    payment_id: int
    kind: OperationKind
    reference: str
    key: str
    amount_minor: int
    currency: str
    status: OperationStatus
    code: str | None
    is_old: bool
    """Begun so long ago that the provider may have forgotten its key."""


class KnownRow(Row):
    """An operation as the reconciliation compares it."""

    id: int
    payment_id: int
    kind: OperationKind
    key: str
    amount_minor: int
    currency: str
    status: OperationStatus
    payment_status: Status
    payment_code: str | None
    has_void: bool
    """Whether its payment has a void, in whatever state."""


class StepRow(Row):
    payment_id: int
    kind: OperationKind
    amount_minor: int
    currency: str
    status: OperationStatus
    code: str | None
    calls: int
    began_at: datetime.datetime
    settled_at: datetime.datetime | None


class ChangedRow(Row):
    id: int
    updated_at: datetime.datetime


class MismatchRow(Row):
    kind: str
    key: str


class CountRow(Row):
    kind: str
    count: int


class NewPayment(msgspec.Struct, frozen=True):
    """A payment that is about to be written, where its order has none with this attempt."""

    order_id: int
    attempt: int
    user_id: int
    method: str
    currency: str
    amount_minor: int
    status: Status = "pending"


class NewOperation(msgspec.Struct, frozen=True):
    """An operation that is about to be written."""

    payment_id: int
    kind: OperationKind
    reference: str
    key: str
    amount_minor: int
    currency: str
    status: OperationStatus = "intent"
    code: str | None = None


class Entry(msgspec.Struct, frozen=True):
    """A line of the ledger."""

    operation_id: int
    account: str
    side: str
    amount_minor: int
    currency: str


class Reported(msgspec.Struct, frozen=True):
    """A mismatch that is about to be written."""

    kind: str
    key: str
    detail: str


# --------------------------------------------------------------------------------------------------------- payments


async def open_payments(tx: Tx, payments: Sequence[NewPayment]) -> list[PaymentRow]:
    """Writes payments; what does not come back was there already, or its order has another that is alive.

    A payment that somebody else is writing at this moment is waited for: the unique keys are the lock.
    """
    return await tx.fetch(
        PaymentRow,
        """
        INSERT INTO payments (order_id, attempt, user_id, method, currency, amount_minor, status)
        SELECT n.order_id, n.attempt, n.user_id, n.method, n.currency, n.amount_minor, n.status
          FROM unnest($1::bigint[], $2::integer[], $3::bigint[], $4::text[], $5::text[], $6::bigint[], $7::text[])
               AS n (order_id, attempt, user_id, method, currency, amount_minor, status)
         ORDER BY n.order_id, n.attempt
        ON CONFLICT DO NOTHING
        RETURNING id, order_id, attempt, user_id, method, currency, amount_minor, authorized_minor, captured_minor,
                  refunded_minor, status, code, charge_id, version, created_at, updated_at
        """,
        [p.order_id for p in payments],
        [p.attempt for p in payments],
        [p.user_id for p in payments],
        [p.method for p in payments],
        [p.currency for p in payments],
        [p.amount_minor for p in payments],
        [p.status for p in payments],
    )


async def lock_attempts(tx: Tx, pairs: Sequence[Pair]) -> list[PaymentRow]:
    """The payments that exist. Until the end of the transaction nobody else changes them or begins operations."""
    # One look at the index for each pair: a join that was planned when the shop was new would read all payments.
    return await tx.fetch(
        PaymentRow,
        """
        SELECT id, order_id, attempt, user_id, method, currency, amount_minor, authorized_minor, captured_minor,
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
        [order_id for order_id, _ in pairs],
        [attempt for _, attempt in pairs],
    )


async def lock_payments(tx: Tx, ids: Sequence[int]) -> dict[int, PaymentRow]:
    """The same by id."""
    rows = await tx.fetch(
        PaymentRow,
        """
        SELECT id, order_id, attempt, user_id, method, currency, amount_minor, authorized_minor, captured_minor,
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
        SELECT id, order_id, attempt, user_id, method, currency, amount_minor, authorized_minor, captured_minor,
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
            SELECT id, order_id, attempt, user_id, method, currency, amount_minor, authorized_minor, captured_minor,
                   refunded_minor, status, code, charge_id, version, created_at, updated_at
              FROM payments
             WHERE id < $1""",
            " AND order_id = $3" if by_order else "",
            f" AND user_id = ${4 if by_order else 3}" if by_user else "",
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
        *((wanted.order_id,) if by_order else ()),
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
         WHERE p.id = n.id AND p.version <= n.version
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
    assert len(rows) == len(changed), "the rows are locked: nobody can have changed them in between"
    return {row.id: row.updated_at for row in rows}


# ------------------------------------------------------------------------------------------------------- operations


async def operations_of(tx: Tx, payment_ids: Sequence[int]) -> list[OperationRow]:
    return await tx.fetch(
        OperationRow,
        """
        SELECT id, payment_id, kind, reference, key, amount_minor, currency, status, code,
               began_at < now() - interval '23 hours' AS is_old
          FROM operations
         WHERE payment_id = ANY($1::bigint[])
        """,
        payment_ids,
    )


async def begin_operations(tx: Tx, operations: Sequence[NewOperation]) -> list[OperationRow]:
    """Writes operations, which the caller is about to ask the provider for."""
    return await tx.fetch(
        OperationRow,
        """
        INSERT INTO operations (payment_id, kind, reference, key, amount_minor, currency, calls, asked_at)
        SELECT n.payment_id, n.kind, n.reference, n.key, n.amount_minor, n.currency, 1, now()
          FROM unnest($1::bigint[], $2::text[], $3::text[], $4::text[], $5::bigint[], $6::text[])
               AS n (payment_id, kind, reference, key, amount_minor, currency)
         ORDER BY n.key
        RETURNING id, payment_id, kind, reference, key, amount_minor, currency, status, code, false AS is_old
        """,
        [o.payment_id for o in operations],
        [o.kind for o in operations],
        [o.reference for o in operations],
        [o.key for o in operations],
        [o.amount_minor for o in operations],
        [o.currency for o in operations],
    )


async def count_calls(tx: Tx, ids: Sequence[int]) -> None:
    """Notes that the caller is about to ask the provider for these again."""
    await tx.execute(
        """
        UPDATE operations SET calls = calls + 1, asked_at = now()
         WHERE id = ANY($1::bigint[]) AND status IN ('intent', 'unknown')
        """,
        ids,
    )


async def settle_operations(tx: Tx, outcomes: Mapping[int, Outcome]) -> set[int]:
    """Notes outcomes by operation; gives the operations that got one, or stay open, by this.

    One that is not among them was settled by somebody else first, whose word stands.
    """
    return set(
        await tx.fetch_values(
            int,
            """
            UPDATE operations o
               SET status = n.status, code = n.code, provider_id = n.provider_id,
                   settled_at = CASE WHEN n.status <> 'unknown' THEN clock_timestamp() END
              FROM unnest($1::bigint[], $2::text[], $3::text[], $4::bigint[]) AS n (id, status, code, provider_id)
             WHERE o.id = n.id AND o.status IN ('intent', 'unknown')
            RETURNING o.id
            """,
            list(outcomes),
            [status_of(outcome) for outcome in outcomes.values()],
            [outcome.code if isinstance(outcome, Declined) else None for outcome in outcomes.values()],
            [outcome.provider_id if isinstance(outcome, Succeeded) else None for outcome in outcomes.values()],
        )
    )


def status_of(outcome: Outcome) -> OperationStatus:
    """What is noted of an operation with this outcome."""
    match outcome:
        case Succeeded():
            return "succeeded"
        case Declined():
            return "declined"
        case Unknown():
            return "unknown"


async def lease_open(tx: Tx, quiet_seconds: float, limit: int) -> list[OperationRow]:
    """Operations whose outcome nobody has found out for a while; the caller is about to ask for them again.

    `asked_at` is the lease: who asks has so long before somebody else does, and longer each time. Rows that somebody
    is busy with are passed over.
    """
    return await tx.fetch(
        OperationRow,
        """
        UPDATE operations o
           SET calls = o.calls + 1, asked_at = now()
          FROM (SELECT id FROM operations
                 WHERE status IN ('intent', 'unknown') AND began_at < now() - make_interval(secs => $1)
                   AND (asked_at IS NULL OR asked_at < now() - make_interval(secs => $1 * least(calls, 12)))
                 ORDER BY began_at
                 LIMIT $2
                   FOR NO KEY UPDATE SKIP LOCKED) due
         WHERE o.id = due.id
        RETURNING o.id, o.payment_id, o.kind, o.reference, o.key, o.amount_minor, o.currency, o.status, o.code,
                  o.began_at < now() - interval '23 hours' AS is_old
        """,
        quiet_seconds,
        limit,
    )


async def trace(tx: Tx, order_id: int) -> list[PaymentStep]:
    rows = await tx.fetch(
        StepRow,
        """
        SELECT o.payment_id, o.kind, o.amount_minor, o.currency, o.status, o.code, o.calls, o.began_at, o.settled_at
          FROM operations o
          JOIN payments p ON p.id = o.payment_id
         WHERE p.order_id = $1
         ORDER BY o.began_at, o.id
        """,
        order_id,
    )
    return [PaymentStep(**msgspec.structs.asdict(row)) for row in rows]


# ----------------------------------------------------------------------------------------------------------- ledger


async def book(tx: Tx, entries: Sequence[Entry]) -> None:
    """Writes ledger entries and moves the balances of their accounts.

    All payments of a currency meet at the same few account rows. So this is the last statement before the commit, and
    a batch moves each balance once.
    """
    if not entries:
        return
    await tx.execute(
        """
        WITH booked AS (
            INSERT INTO ledger_entries (operation_id, account, side, amount_minor, currency)
            SELECT n.operation_id, n.account, n.side, n.amount_minor, n.currency
              FROM unnest($1::bigint[], $2::text[], $3::text[], $4::bigint[], $5::text[])
                   AS n (operation_id, account, side, amount_minor, currency)
            RETURNING account, currency, CASE side WHEN 'debit' THEN amount_minor ELSE -amount_minor END AS delta
        )
        INSERT INTO accounts AS a (account, currency, balance_minor)
        SELECT account, currency, sum(delta) FROM booked GROUP BY account, currency ORDER BY account, currency
        ON CONFLICT (account, currency) DO UPDATE SET balance_minor = a.balance_minor + excluded.balance_minor
        """,
        [e.operation_id for e in entries],
        [e.account for e in entries],
        [e.side for e in entries],
        [e.amount_minor for e in entries],
        [e.currency for e in entries],
    )


# --------------------------------------------------------------------------------------------------- reconciliation


async def take_cursor(tx: Tx, provider: str, seconds: float) -> int | None:
    """Where the comparison has come to. None: somebody else has taken it within so many seconds."""
    taken = await tx.fetch_values(
        int,
        """
        INSERT INTO reconciliation AS r (name, leased_until)
        VALUES ($1, now() + make_interval(secs => $2))
        ON CONFLICT (name) DO UPDATE SET leased_until = excluded.leased_until WHERE r.leased_until <= now()
        RETURNING after
        """,
        provider,
        seconds,
    )
    return taken[0] if taken else None


async def move_cursor(tx: Tx, provider: str, before: int, after: int) -> None:
    """Moves it on. Nothing happens where somebody who took over has moved it already."""
    await tx.execute("UPDATE reconciliation SET after = $3 WHERE name = $1 AND after = $2", provider, before, after)


KNOWN_SQL: Final[dict[str, str]] = {
    by: """
        SELECT o.id, o.payment_id, o.kind, o.key, o.amount_minor, o.currency, o.status, p.status AS payment_status,
               p.code AS payment_code,
               EXISTS (SELECT FROM operations v WHERE v.payment_id = o.payment_id AND v.kind = 'void') AS has_void
          FROM operations o
          JOIN payments p ON p.id = o.payment_id
         WHERE CONDITION
        """.replace("CONDITION", condition)
    for by, condition in {
        "key": "o.key = ANY($1::text[])",
        "place": """o.status = 'succeeded' AND o.provider_id > $2 AND o.provider_id <= $3
           AND split_part(p.method, ':', 1) = $1 ORDER BY o.provider_id LIMIT $4""",
        "beyond": """o.status = 'succeeded' AND o.provider_id > $2
           AND o.settled_at < now() - make_interval(secs => $3)
           AND split_part(p.method, ':', 1) = $1 ORDER BY o.provider_id LIMIT $4""",
    }.items()
}


async def known_by_keys(tx: Tx, keys: Sequence[str]) -> dict[str, KnownRow]:
    return {row.key: row for row in await tx.fetch(KnownRow, KNOWN_SQL["key"], keys)}


async def known_between(tx: Tx, provider: str, after: int, up_to: int, limit: int) -> dict[str, KnownRow]:
    """Our operations that have a place in that part of the provider's statement, by key."""
    return {row.key: row for row in await tx.fetch(KnownRow, KNOWN_SQL["place"], provider, after, up_to, limit)}


async def known_beyond(tx: Tx, provider: str, after: int, seconds: float, limit: int) -> dict[str, KnownRow]:
    """Our operations that were done so many seconds ago, and are still not on the statement, which ends at `after`."""
    return {row.key: row for row in await tx.fetch(KnownRow, KNOWN_SQL["beyond"], provider, after, seconds, limit)}


async def operations(tx: Tx, ids: Sequence[int]) -> list[OperationRow]:
    return await tx.fetch(
        OperationRow,
        """
        SELECT id, payment_id, kind, reference, key, amount_minor, currency, status, code,
               began_at < now() - interval '23 hours' AS is_old
          FROM operations
         WHERE id = ANY($1::bigint[])
        """,
        ids,
    )


async def report(tx: Tx, provider: str, mismatches: Sequence[Reported]) -> None:
    """Writes mismatches; one that was resolved and is back is open again."""
    await tx.execute(
        """
        INSERT INTO mismatches AS m (kind, key, provider, detail)
        SELECT n.kind, n.key, $1, n.detail FROM unnest($2::text[], $3::text[], $4::text[]) AS n (kind, key, detail)
         ORDER BY n.kind, n.key
        ON CONFLICT (kind, key) DO UPDATE SET detail = excluded.detail, resolved_at = NULL
        """,
        provider,
        [m.kind for m in mismatches],
        [m.key for m in mismatches],
        [m.detail for m in mismatches],
    )


async def open_mismatches(tx: Tx, provider: str, limit: int) -> list[MismatchRow]:
    """The oldest that are not resolved."""
    return await tx.fetch(
        MismatchRow,
        """
        SELECT kind, key FROM mismatches WHERE provider = $1 AND resolved_at IS NULL ORDER BY found_at LIMIT $2
        """,
        provider,
        limit,
    )


async def resolve(tx: Tx, mismatches: Sequence[MismatchRow]) -> None:
    await tx.execute(
        """
        UPDATE mismatches m SET resolved_at = now()
          FROM unnest($1::text[], $2::text[]) AS n (kind, key)
         WHERE m.kind = n.kind AND m.key = n.key AND m.resolved_at IS NULL
        """,
        [m.kind for m in mismatches],
        [m.key for m in mismatches],
    )


async def count_mismatches(tx: Tx) -> dict[str, int]:
    """How many of each kind are open."""
    rows = await tx.fetch(
        CountRow, "SELECT kind, count(*) AS count FROM mismatches WHERE resolved_at IS NULL GROUP BY kind"
    )
    return {row.kind: row.count for row in rows}
