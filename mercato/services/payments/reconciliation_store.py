"""The SQL statements of the reconciliation: its cursor, the operations that it compares, and the mismatches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from mercato.chassis.postgres.database import Row, Tx
from mercato.chassis.postgres.leases import Lease
from mercato.contracts.payments import OperationKind, OperationStatus, Status

from .rules import KeyParts
from .store import OperationId


class RecordedRow(Row):
    """An operation or intent as the reconciliation compares it."""

    payment_id: int
    kind: OperationKind
    reference: str
    key: str
    amount_minor: int
    currency: str
    status: OperationStatus
    payment_status: Status
    payment_code: str | None
    has_void: bool
    """Whether its payment has a void, in any state."""

    @property
    def id(self) -> OperationId:
        return self.payment_id, self.kind, self.reference


class MismatchRow(Row):
    kind: str
    key: str


class CountRow(Row):
    kind: str
    count: int


class Reported(msgspec.Struct, frozen=True):
    """A mismatch that is about to be written."""

    kind: str
    key: str
    detail: str


# ---------------------------------------------------------------------------------------------------------- cursor


TURN: Final = Lease("reconciliation")
"""The lease of the process that compares with a provider, by the provider's name."""


async def cursor(tx: Tx, provider: str) -> int:
    """The position in the provider's statement up to which it was compared."""
    return (await tx.fetch_values(int, "SELECT after FROM reconciliation WHERE name = $1", provider))[0]


async def move_cursor(tx: Tx, provider: str, before: int, after: int) -> None:
    """Moves the cursor. Changes nothing where another process has moved it already."""
    await tx.execute("UPDATE reconciliation SET after = $3 WHERE name = $1 AND after = $2", provider, before, after)


# -------------------------------------------------------------------------------------------------- comparison

RECORDED_SQL: Final[dict[str, str]] = {
    by: """
        SELECT o.payment_id, o.kind, o.reference, o.key, o.amount_minor, o.currency, o.status,
               p.status AS payment_status, p.code AS payment_code,
               EXISTS (SELECT FROM operations v WHERE v.payment_id = p.id AND v.kind = 'void')
               OR EXISTS (SELECT FROM intents v WHERE v.payment_id = p.id AND v.kind = 'void') AS has_void
          FROM SOURCE
        """.replace("SOURCE", source)
    for by, source in {
        # The parts of the key identify the payment and the operation; the stored key confirms them.
        "key": """unnest($1::text[], $2::bigint[], $3::integer[], $4::text[], $5::text[])
               AS w (key, order_id, attempt, kind, reference)
         CROSS JOIN LATERAL (
            SELECT id, status, code FROM payments WHERE order_id = w.order_id AND attempt = w.attempt LIMIT 1) p
         CROSS JOIN LATERAL (
            SELECT payment_id, kind, reference, key, amount_minor, currency, status
              FROM operations
             WHERE payment_id = p.id AND kind = w.kind AND reference = w.reference AND key = w.key
            UNION ALL
            SELECT payment_id, kind, reference, key, amount_minor, currency, status
              FROM intents
             WHERE payment_id = p.id AND reference = w.reference AND kind = w.kind AND key = w.key
         ) o""",
        "place": """operations o
          JOIN payments p ON p.id = o.payment_id
         WHERE o.provider_id > $2 AND o.provider_id <= $3
           AND split_part(p.method, ':', 1) = $1
         ORDER BY o.provider_id
         LIMIT $4""",
        "beyond": """operations o
          JOIN payments p ON p.id = o.payment_id
         WHERE o.provider_id > $2 AND o.settled_at < now() - make_interval(secs => $3)
           AND split_part(p.method, ':', 1) = $1
         ORDER BY o.provider_id
         LIMIT $4""",
    }.items()
}


async def recorded_by_keys(tx: Tx, keys: Mapping[str, KeyParts]) -> dict[str, RecordedRow]:
    """The operations and intents that have these keys, by key."""
    rows = await tx.fetch(
        RecordedRow,
        RECORDED_SQL["key"],
        list(keys),
        [parts.order_id for parts in keys.values()],
        [parts.attempt for parts in keys.values()],
        [parts.kind for parts in keys.values()],
        [parts.reference for parts in keys.values()],
    )
    return {row.key: row for row in rows}


async def recorded_between(tx: Tx, provider: str, after: int, up_to: int, limit: int) -> dict[str, RecordedRow]:
    """Our operations whose provider ids are in that part of the provider's statement, by key."""
    return {row.key: row for row in await tx.fetch(RecordedRow, RECORDED_SQL["place"], provider, after, up_to, limit)}


async def recorded_beyond(tx: Tx, provider: str, after: int, seconds: float, limit: int) -> dict[str, RecordedRow]:
    """Our operations that were settled more than `seconds` ago, with provider ids after the end of the statement."""
    return {
        row.key: row for row in await tx.fetch(RecordedRow, RECORDED_SQL["beyond"], provider, after, seconds, limit)
    }


# -------------------------------------------------------------------------------------------------- mismatches


async def report(tx: Tx, provider: str, mismatches: Sequence[Reported]) -> None:
    """Writes mismatches; opens one again that was resolved before."""
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
    """The oldest mismatches that are not resolved."""
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
    """The number of open mismatches of each kind."""
    rows = await tx.fetch(
        CountRow, "SELECT kind, count(*) AS count FROM mismatches WHERE resolved_at IS NULL GROUP BY kind"
    )
    return {row.kind: row.count for row in rows}
