"""Every SQL statement of the sandbox.

Operations on charges lock the charges by id, then the existing operations by key, then write new keys. Operations
that open charges lock no charge: they write new keys in order, then lock the existing operations by key. The INSERT
waits for a transaction that is writing the same key, and then does not return it.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence

import msgspec

from mercato.chassis.postgres.database import Row, Tx
from mercato.simulators.bank.contract import OperationKind, OperationStatus

from .rules import RequestedOperation, State


class ChargeRow(Row):
    id: int
    order_id: int
    method: str
    currency: str
    authorized_minor: int
    captured_minor: int
    refunded_minor: int
    state: State


class OperationRow(Row):
    id: int
    key: str
    kind: OperationKind
    charge_id: int | None
    order_id: int
    amount_minor: int
    currency: str
    method: str
    status: OperationStatus
    code: str | None
    calls: int
    created_at: datetime.datetime


class ListedRow(Row):
    id: int
    key: str
    kind: OperationKind
    charge_id: int | None
    order_id: int
    amount_minor: int
    currency: str
    status: OperationStatus
    code: str | None
    created_at: datetime.datetime
    is_final: bool


class NewOperation(msgspec.Struct, frozen=True):
    """An operation that is not written yet, with its result."""

    requested: RequestedOperation
    calls: int
    status: OperationStatus
    code: str | None = None
    delay_ms: int | None = None


# ---------------------------------------------------------------------------------------------------------- charges


async def lock_charges(tx: Tx, ids: Sequence[int]) -> dict[int, ChargeRow]:
    """The charges that exist. No other transaction changes them until this one ends."""
    rows = await tx.fetch(
        ChargeRow,
        """
        SELECT id, order_id, method, currency, authorized_minor, captured_minor, refunded_minor, state
          FROM charges
         WHERE id = ANY($1::bigint[])
         ORDER BY id
           FOR NO KEY UPDATE
        """,
        ids,
    )
    return {row.id: row for row in rows}


async def write_charges(tx: Tx, charges: Sequence[ChargeRow]) -> None:
    """Writes charges that this transaction has locked."""
    if not charges:
        return
    await tx.execute(
        """
        UPDATE charges c
           SET state = n.state, captured_minor = n.captured_minor, refunded_minor = n.refunded_minor
          FROM unnest($1::bigint[], $2::text[], $3::bigint[], $4::bigint[])
               AS n (id, state, captured_minor, refunded_minor)
         WHERE c.id = n.id
        """,
        [c.id for c in charges],
        [c.state for c in charges],
        [c.captured_minor for c in charges],
        [c.refunded_minor for c in charges],
    )


# ------------------------------------------------------------------------------------------------------- operations


async def remember_first_calls(tx: Tx, keys: Sequence[str]) -> set[str]:
    """The keys with which no call was made before."""
    return set(
        await tx.fetch_values(
            str,
            """
            INSERT INTO first_calls (key)
            SELECT k.key FROM unnest($1::text[]) AS k (key) ORDER BY k.key
            ON CONFLICT (key) DO NOTHING
            RETURNING key
            """,
            keys,
        )
    )


async def count_calls(tx: Tx, calls: Mapping[str, int]) -> dict[str, OperationRow]:
    """The existing operations, by key, after adding so many calls to each."""
    rows = await tx.fetch(
        OperationRow,
        """
        WITH known AS MATERIALIZED (
            SELECT id, key FROM operations WHERE key = ANY($1::text[]) ORDER BY key FOR NO KEY UPDATE
        )
        UPDATE operations o
           SET calls = o.calls + a.calls
          FROM known
          JOIN unnest($1::text[], $2::integer[]) AS a (key, calls) ON a.key = known.key
         WHERE o.id = known.id
        RETURNING o.id, o.key, o.kind, o.charge_id, o.order_id, o.amount_minor, o.currency, o.method, o.status, o.code,
                  o.calls, o.created_at
        """,
        list(calls),
        list(calls.values()),
    )
    return {row.key: row for row in rows}


async def insert_operations(tx: Tx, new: Sequence[NewOperation]) -> dict[str, OperationRow]:
    """Writes operations on existing charges; by key. A key that was taken is not in the result."""
    rows = await tx.fetch(
        OperationRow,
        """
        INSERT INTO operations
               (key, kind, charge_id, order_id, amount_minor, currency, method, status, code, calls, ready_at)
        SELECT n.key, n.kind, n.charge_id, n.order_id, n.amount_minor, n.currency, n.method, n.status, n.code, n.calls,
               now() + make_interval(secs => n.delay_ms / 1000.0)
          FROM unnest($1::text[], $2::text[], $3::bigint[], $4::bigint[], $5::bigint[], $6::text[], $7::text[],
                      $8::text[], $9::text[], $10::integer[], $11::integer[])
               AS n (key, kind, charge_id, order_id, amount_minor, currency, method, status, code, calls, delay_ms)
         ORDER BY n.key
        ON CONFLICT (key) DO NOTHING
        RETURNING id, key, kind, charge_id, order_id, amount_minor, currency, method, status, code, calls, created_at
        """,
        [n.requested.key for n in new],
        [n.requested.kind for n in new],
        [n.requested.charge_id for n in new],
        [n.requested.order_id for n in new],
        [n.requested.amount_minor for n in new],
        [n.requested.currency for n in new],
        [n.requested.method for n in new],
        [n.status for n in new],
        [n.code for n in new],
        [n.calls for n in new],
        [n.delay_ms for n in new],
    )
    return {row.key: row for row in rows}


async def open_charges(tx: Tx, new: Sequence[NewOperation]) -> dict[str, OperationRow]:
    """Writes operations that open charges, and the charges of those that succeeded; by key.

    A charge that is opened by `charge` is captured from the start. A key that was taken is not in the result, and has
    opened nothing.
    """
    rows = await tx.fetch(
        OperationRow,
        """
        WITH numbered AS MATERIALIZED (
            SELECT CASE n.status WHEN 'succeeded' THEN nextval('charges_id_seq') END AS charge_id, n.*
              FROM unnest($1::text[], $2::text[], $3::bigint[], $4::bigint[], $5::text[], $6::text[], $7::text[],
                          $8::text[], $9::integer[], $10::integer[])
                   AS n (key, kind, order_id, amount_minor, currency, method, status, code, calls, delay_ms)
        ), written AS (
            INSERT INTO operations
                   (key, kind, charge_id, order_id, amount_minor, currency, method, status, code, calls, ready_at)
            SELECT key, kind, charge_id, order_id, amount_minor, currency, method, status, code, calls,
                   now() + make_interval(secs => delay_ms / 1000.0)
              FROM numbered
             ORDER BY key
            ON CONFLICT (key) DO NOTHING
            RETURNING id, key, kind, charge_id, order_id, amount_minor, currency, method, status, code, calls,
                      created_at
        ), opened AS (
            INSERT INTO charges (id, order_id, method, currency, authorized_minor, captured_minor, state)
            SELECT charge_id, order_id, method, currency, amount_minor,
                   CASE kind WHEN 'charge' THEN amount_minor ELSE 0 END,
                   CASE kind WHEN 'charge' THEN 'captured' ELSE 'open' END
              FROM written
             WHERE charge_id IS NOT NULL
        )
        SELECT id, key, kind, charge_id, order_id, amount_minor, currency, method, status, code, calls, created_at
          FROM written
        """,
        [n.requested.key for n in new],
        [n.requested.kind for n in new],
        [n.requested.order_id for n in new],
        [n.requested.amount_minor for n in new],
        [n.requested.currency for n in new],
        [n.requested.method for n in new],
        [n.status for n in new],
        [n.code for n in new],
        [n.calls for n in new],
        [n.delay_ms for n in new],
    )
    return {row.key: row for row in rows}


# ------------------------------------------------------------------------------------------------------- processing


async def due(tx: Tx, limit: int) -> list[OperationRow]:
    """Operations whose delay has passed by the database's clock."""
    return await tx.fetch(
        OperationRow,
        """
        SELECT id, key, kind, charge_id, order_id, amount_minor, currency, method, status, code, calls, created_at
          FROM operations
         WHERE status = 'processing' AND ready_at <= now()
         ORDER BY ready_at
         LIMIT $1
        """,
        limit,
    )


async def lock_processing(tx: Tx, ids: Sequence[int]) -> list[OperationRow]:
    """The operations that no other process has finished in the meantime, by id. Their charges are locked already."""
    rows = await tx.fetch(
        OperationRow,
        """
        SELECT id, key, kind, charge_id, order_id, amount_minor, currency, method, status, code, calls, created_at
          FROM operations
         WHERE id = ANY($1::bigint[]) AND status = 'processing'
         ORDER BY key
           FOR NO KEY UPDATE
        """,
        ids,
    )
    return sorted(rows, key=lambda row: row.id)


async def finish(tx: Tx, codes: Mapping[int, str | None]) -> None:
    """Settles operations by id: declined with a code, or succeeded. An authorize or charge then opens its charge."""
    await tx.execute(
        """
        WITH settled AS MATERIALIZED (
            SELECT o.id, n.code, o.kind, o.order_id, o.method, o.currency, o.amount_minor,
                   CASE WHEN o.kind IN ('authorize', 'charge') AND n.code IS NULL THEN nextval('charges_id_seq')
                        ELSE o.charge_id END AS charge_id,
                   o.kind IN ('authorize', 'charge') AND n.code IS NULL AS is_opened
              FROM unnest($1::bigint[], $2::text[]) AS n (id, code)
              JOIN operations o ON o.id = n.id
        ), opened AS (
            INSERT INTO charges (id, order_id, method, currency, authorized_minor, captured_minor, state)
            SELECT charge_id, order_id, method, currency, amount_minor,
                   CASE kind WHEN 'charge' THEN amount_minor ELSE 0 END,
                   CASE kind WHEN 'charge' THEN 'captured' ELSE 'open' END
              FROM settled
             WHERE is_opened
        )
        UPDATE operations o
           SET status = CASE WHEN s.code IS NULL THEN 'succeeded' ELSE 'declined' END,
               code = s.code,
               charge_id = s.charge_id
          FROM settled s
         WHERE o.id = s.id
        """,
        list(codes),
        list(codes.values()),
    )


# ---------------------------------------------------------------------------------------------------------- reading


async def by_keys(tx: Tx, keys: Sequence[str]) -> dict[str, OperationRow]:
    rows = await tx.fetch(
        OperationRow,
        """
        SELECT id, key, kind, charge_id, order_id, amount_minor, currency, method, status, code, calls, created_at
          FROM operations
         WHERE key = ANY($1::text[])
        """,
        keys,
    )
    return {row.key: row for row in rows}


async def listed(tx: Tx, after: int, limit: int, delay_seconds: float) -> list[ListedRow]:
    """Operations by id. Only those before the first that is not final are on the statement.

    Ids are drawn before the commit: while a transaction as old as the delay still writes, a missing id may still
    appear, and nothing is final.
    """
    return await tx.fetch(
        ListedRow,
        """
        SELECT id, key, kind, charge_id, order_id, amount_minor, currency, status, code, created_at,
               status <> 'processing' AND created_at <= now() - make_interval(secs => $3) AND NOT EXISTS (
                   SELECT FROM pg_stat_activity
                    WHERE datname = current_database() AND backend_xid IS NOT NULL
                      AND xact_start <= now() - make_interval(secs => $3)) AS is_final
          FROM operations
         WHERE id > $1
         ORDER BY id
         LIMIT $2
        """,
        after,
        limit,
        delay_seconds,
    )
