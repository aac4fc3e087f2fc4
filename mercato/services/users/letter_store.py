"""Every SQL statement about letters: the links that prove an address, or let its owner set a password."""

from __future__ import annotations

import datetime
import uuid
from typing import Final

from mercato.chassis.postgres.database import Row, Tx

CLEANED_AT_ONCE: Final = 1_000
KEPT: Final = datetime.timedelta(days=8)
"""Longer than any link is of use."""


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
    """A letter to be sent at once; none where the address got `limit` of its kind `within` the time before now.

    Without an account it is written all the same, and never sent: who asks cannot tell by the time that it takes. Where
    the account is being erased, the statement waits, and writes none.
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
    """Letters to be sent now, in any order. Other processes leave them alone for the time of `lease`."""
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
    """`outcome`: `sent`, `refused` or `given_up`. It is not tried again."""
    await tx.execute(
        "UPDATE letters SET outcome = $2, settled_at = now(), wake_at = NULL WHERE id = $1", letter_id, outcome
    )


async def delay(tx: Tx, letter_id: uuid.UUID, pause: datetime.timedelta) -> None:
    await tx.execute("UPDATE letters SET wake_at = now() + $2::interval WHERE id = $1", letter_id, pause)


async def link(tx: Tx, letter_id: uuid.UUID, kind: str, life: datetime.timedelta) -> LinkRow | None:
    """The link of a letter that is at most `life` old; used ones too. Others wait that would use it."""
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
    """All unused links of a kind that an account has are of no use any more."""
    await tx.execute(
        "UPDATE letters SET used_at = now() WHERE user_id = $1 AND kind = $2 AND used_at IS NULL", user_id, kind
    )


async def prove_email(tx: Tx, user_id: int) -> None:
    """The account's owner reads what is sent to its address."""
    await tx.execute("UPDATE users SET email_proven_at = now() WHERE id = $1 AND email_proven_at IS NULL", user_id)


async def set_password(tx: Tx, user_id: int, password_hash: str) -> None:
    """Also of an account that has none yet."""
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
    """The links of the account are not used until this transaction ends."""
    await tx.fetch_values(int, "SELECT 1 FROM letters WHERE user_id = $1 ORDER BY id FOR NO KEY UPDATE", user_id)


async def delete_letters_to(tx: Tx, address: str) -> None:
    """All letters to an address, also those that were asked for while no account had it."""
    await tx.execute("DELETE FROM letters WHERE address = lower($1)", address)


async def delete_old_letters(tx: Tx, limit: int = CLEANED_AT_ONCE) -> int:
    """How many letters whose links are of no use any more were deleted."""
    return await tx.execute(
        """
        DELETE FROM letters
         WHERE id IN (SELECT id FROM letters WHERE created_at < now() - $1::interval ORDER BY created_at LIMIT $2)
        """,
        KEPT,
        limit,
    )
