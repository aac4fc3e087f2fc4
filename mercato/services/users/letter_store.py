"""The SQL statements of letters, whose links prove an address, or let its owner set a password."""

from __future__ import annotations

import datetime
import uuid
from typing import Final

from mercato.chassis.postgres.database import Row, Tx

CLEANED_AT_ONCE: Final = 1_000
KEPT: Final = datetime.timedelta(days=8)
"""Longer than any link is valid."""


class LetterRow(Row, frozen=True, gc=False):
    id: uuid.UUID
    kind: str
    user_id: int
    address: str
    name: str
    tries: int
    age: datetime.timedelta


class LinkRow(Row, frozen=True, gc=False):
    """A link whose account still has the address that it was sent to. `password_hash`: None without a password."""

    user_id: int
    email: str
    used_at: datetime.datetime | None
    password_hash: str | None


async def add_letter(
    tx: Tx, letter_id: uuid.UUID, kind: str, address: str, user_id: int | None, within: datetime.timedelta, limit: int
) -> None:
    """Adds a letter, which is due at once, unless the address got `limit` of its kind `within` the time before now.

    Without an account it is written too, but never sent, so that the time of the answer does not reveal whether there
    is an account. While the account is being erased, the statement waits, and then writes no letter.
    """
    await tx.execute(
        """
        WITH account AS (
            SELECT id FROM users WHERE id = $4::bigint FOR KEY SHARE
        )
        INSERT INTO letters (id, kind, address, user_id, wake_at)
        SELECT $1, $2, lower($3), $4::bigint, CASE WHEN $4::bigint IS NULL THEN NULL ELSE now() END
         WHERE ($4::bigint IS NULL OR EXISTS (SELECT FROM account))
           AND (SELECT count(*) FROM letters
                 WHERE address = lower($3) AND kind = $2 AND created_at > now() - $5::interval) < $6
        """,
        letter_id,
        kind,
        address,
        user_id,
        within,
        limit,
    )


async def claim_due(tx: Tx, limit: int, lease: datetime.timedelta) -> list[LetterRow]:
    """Letters that are due, in any order. Other processes do not get them for the time of `lease`."""
    return await tx.fetch(
        LetterRow,
        """
        UPDATE letters AS l
           SET wake_at = now() + $2::interval, tries = l.tries + 1
          FROM users AS u
         WHERE u.id = l.user_id
           AND l.id IN (
               SELECT id FROM letters WHERE wake_at <= now() ORDER BY wake_at LIMIT $1 FOR UPDATE SKIP LOCKED
           )
        RETURNING l.id, l.kind, l.user_id, l.address, u.name, l.tries, now() - l.created_at AS age
        """,
        limit,
        lease,
    )


async def settle(tx: Tx, letter_id: uuid.UUID, outcome: str) -> None:
    """`outcome`: `sent`, `refused` or `given_up`. It is not sent again."""
    await tx.execute(
        "UPDATE letters SET outcome = $2, settled_at = now(), wake_at = NULL WHERE id = $1", letter_id, outcome
    )


async def delay(tx: Tx, letter_id: uuid.UUID, pause: datetime.timedelta) -> None:
    await tx.execute("UPDATE letters SET wake_at = now() + $2::interval WHERE id = $1", letter_id, pause)


async def link(tx: Tx, letter_id: uuid.UUID, kind: str, life: datetime.timedelta) -> LinkRow | None:
    """The link of a letter that is at most `life` old, also a used one. It is locked until the commit."""
    return await tx.fetch_one(
        LinkRow,
        """
        SELECT l.user_id, u.email, l.used_at, c.password_hash
          FROM letters l
          JOIN users u ON u.id = l.user_id
          LEFT JOIN credentials c ON c.user_id = u.id
         WHERE l.id = $1 AND l.kind = $2 AND l.created_at > now() - $3::interval AND lower(u.email) = l.address
           FOR NO KEY UPDATE OF l
        """,
        letter_id,
        kind,
        life,
    )


async def use_links(tx: Tx, user_id: int, kind: str) -> None:
    """Marks all unused links of a kind of an account as used."""
    await tx.execute(
        "UPDATE letters SET used_at = now() WHERE user_id = $1 AND kind = $2 AND used_at IS NULL", user_id, kind
    )


async def prove_email(tx: Tx, user_id: int) -> None:
    """Marks the account's address as proven."""
    await tx.execute("UPDATE users SET email_proven_at = now() WHERE id = $1 AND email_proven_at IS NULL", user_id)


async def set_password(tx: Tx, user_id: int, password_hash: str) -> None:
    """Sets the password, also of an account without one."""
    await tx.execute(
        """
        INSERT INTO credentials (user_id, password_hash)
        VALUES ($1, $2)
        ON CONFLICT (user_id) DO UPDATE
           SET password_hash = $2, version = credentials.version + 1, changed_at = now()
        """,
        user_id,
        password_hash,
    )


async def lock_letters_of(tx: Tx, user_id: int) -> None:
    """Locks the links of the account against use until this transaction ends."""
    await tx.fetch_values(int, "SELECT 1 FROM letters WHERE user_id = $1 ORDER BY id FOR NO KEY UPDATE", user_id)


async def delete_letters_to(tx: Tx, address: str) -> None:
    """Deletes all letters to an address, also those from before an account had it."""
    await tx.execute("DELETE FROM letters WHERE address = lower($1)", address)


async def delete_old_letters(tx: Tx, limit: int = CLEANED_AT_ONCE) -> int:
    """Deletes up to `limit` letters whose links have expired; gives how many."""
    return await tx.execute(
        """
        DELETE FROM letters
         WHERE id IN (SELECT id FROM letters WHERE created_at < now() - $1::interval ORDER BY created_at LIMIT $2)
        """,
        KEPT,
        limit,
    )
