"""The SQL statements of the security log. Entries have ids: no e-mail address, password or token."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Final

import msgspec

from mercato.chassis.contract import Actor
from mercato.chassis.postgres.database import Row, Tx
from mercato.contracts.users import SecurityKind

CLEANED_AT_ONCE: Final = 1_000
KEPT: Final = datetime.timedelta(days=90)


class NewEntry(msgspec.Struct, frozen=True):
    """`account_id`: the account that it is about; 0: unknown. `address`: that of the client; empty: unknown."""

    kind: SecurityKind
    account_id: int
    actor: Actor
    address: str = ""
    detail: str = ""
    subject: str = ""
    at: datetime.datetime | None = None
    """None: the time of the transaction."""


class EntryRow(Row, frozen=True, gc=False):
    id: int
    at: datetime.datetime
    kind: SecurityKind
    account_id: int
    actor_role: str
    actor_id: int
    address: str
    subject: str
    detail: str


async def add(tx: Tx, entries: Sequence[NewEntry]) -> None:
    """Writes entries in the transaction of their change."""
    await tx.execute(
        """
        INSERT INTO security_log (at, kind, account_id, actor_role, actor_id, address, subject, detail)
        SELECT coalesce(at, now()), kind, account_id, actor_role, actor_id, address, subject, detail
          FROM unnest(
              $1::timestamptz[], $2::text[], $3::bigint[], $4::text[], $5::bigint[], $6::text[], $7::text[], $8::text[]
          ) AS e (at, kind, account_id, actor_role, actor_id, address, subject, detail)
        """,
        [entry.at for entry in entries],
        [entry.kind for entry in entries],
        [entry.account_id for entry in entries],
        [entry.actor.role for entry in entries],
        [entry.actor.id for entry in entries],
        [entry.address for entry in entries],
        [entry.subject for entry in entries],
        [entry.detail for entry in entries],
    )


async def page(tx: Tx, before: int, limit: int) -> list[EntryRow]:
    """The entries with ids below `before`, the newest first."""
    return await tx.fetch(
        EntryRow,
        """
        SELECT id, at, kind, account_id, actor_role, actor_id, address, subject, detail
          FROM security_log
         WHERE id < $1
         ORDER BY id DESC
         LIMIT $2
        """,
        before,
        limit,
    )


async def page_of_account(tx: Tx, account_id: int, before: int, limit: int) -> list[EntryRow]:
    """As `page`, but only entries about an account or of its actions. Each half reads one index."""
    return await tx.fetch(
        EntryRow,
        """
        (SELECT id, at, kind, account_id, actor_role, actor_id, address, subject, detail
           FROM security_log
          WHERE account_id = $1 AND id < $2
          ORDER BY id DESC
          LIMIT $3)
         UNION ALL
        (SELECT id, at, kind, account_id, actor_role, actor_id, address, subject, detail
           FROM security_log
          WHERE actor_id = $1 AND actor_id <> account_id AND id < $2
          ORDER BY id DESC
          LIMIT $3)
         ORDER BY id DESC
         LIMIT $3
        """,
        account_id,
        before,
        limit,
    )


async def delete_old_entries(tx: Tx, limit: int = CLEANED_AT_ONCE) -> int:
    """Deletes up to `limit` entries older than `KEPT`; gives how many."""
    return await tx.execute(
        """
        DELETE FROM security_log
         WHERE id IN (
            SELECT id FROM security_log WHERE at < now() - $1::interval ORDER BY at LIMIT $2 FOR UPDATE SKIP LOCKED
         )
        """,
        KEPT,
        limit,
    )
