"""Every SQL statement of the users service. A function takes `tx` first and returns frozen rows.

Locks are taken in this order: letters (`letter_store.py`), accounts, credentials, sessions, refresh tokens, the last
position of the log of ended sessions; many rows of one table by ascending id.
"""

from __future__ import annotations

import datetime
import uuid
from typing import Final

from mercato.chassis.postgres.database import Row, Tx
from mercato.contracts.roles import Role

from . import rules

CLEANED_AT_ONCE: Final = 1_000
EMAIL_KEY = "users_email_key"


class UserRow(Row, frozen=True, gc=False):
    id: int
    email: str
    name: str
    role: Role
    created_at: datetime.datetime
    updated_at: datetime.datetime
    version: int
    email_proven: bool


class RoleRow(Row, frozen=True, gc=False):
    id: int
    role: Role


class CredentialsRow(Row, frozen=True, gc=False):
    user_id: int
    email: str
    password_hash: str
    version: int


class SessionRow(Row, frozen=True, gc=False):
    id: int
    """Only for this database: after a restore it gives the same ids again."""
    sid: uuid.UUID
    """The public id: 128 random bits."""
    user_id: int


class ListedSessionRow(Row, frozen=True, gc=False):
    sid: uuid.UUID
    created_at: datetime.datetime
    last_used_at: datetime.datetime
    expires_at: datetime.datetime


class EndedRow(Row, frozen=True, gc=False):
    last: int
    position: int | None
    sid: uuid.UUID | None


# ------------------------------------------------------------------------------------------------------------ accounts


async def add_user(tx: Tx, email: str, name: str, role: Role) -> UserRow:
    """Adds an account. Raises UniqueViolation of `EMAIL_KEY`."""
    row = await tx.fetch_one(
        UserRow,
        """
        INSERT INTO users (email, name, role)
        VALUES ($1, $2, $3)
        RETURNING id, email, name, role, created_at, updated_at, version, email_proven_at IS NOT NULL AS email_proven
        """,
        email,
        name,
        role,
    )
    assert row is not None, "INSERT without ON CONFLICT returns its row, or raises"
    return row


async def users(tx: Tx, ids: list[int]) -> list[UserRow]:
    """The accounts that exist, in any order."""
    return await tx.fetch(
        UserRow,
        """
        SELECT id, email, name, role, created_at, updated_at, version, email_proven_at IS NOT NULL AS email_proven
          FROM users
         WHERE id = ANY($1::bigint[])
        """,
        ids,
    )


async def user(tx: Tx, user_id: int) -> UserRow | None:
    return next(iter(await users(tx, [user_id])), None)


async def page(tx: Tx, after: int, limit: int) -> list[UserRow]:
    return await tx.fetch(
        UserRow,
        """
        SELECT id, email, name, role, created_at, updated_at, version, email_proven_at IS NOT NULL AS email_proven
          FROM users
         WHERE id > $1
         ORDER BY id
         LIMIT $2
        """,
        after,
        limit,
    )


async def page_of_role(tx: Tx, role: Role, after: int, limit: int) -> list[UserRow]:
    # A statement of its own: with `$1 IS NULL OR role = $1` the planner does not use the index of (role, id).
    return await tx.fetch(
        UserRow,
        """
        SELECT id, email, name, role, created_at, updated_at, version, email_proven_at IS NOT NULL AS email_proven
          FROM users
         WHERE role = $1 AND id > $2
         ORDER BY id
         LIMIT $3
        """,
        role,
        after,
        limit,
    )


async def change_profile(
    tx: Tx, user_id: int, email: str | None, name: str | None, version: int | None
) -> UserRow | None:
    """The changed user; None for an unknown id or another version. Raises UniqueViolation of `EMAIL_KEY`."""
    return await tx.fetch_one(
        UserRow,
        """
        UPDATE users
           SET email = coalesce($2, email), name = coalesce($3, name), updated_at = now(), version = version + 1,
               email_proven_at = CASE WHEN lower(coalesce($2, email)) = lower(email) THEN email_proven_at END
         WHERE id = $1 AND version = coalesce($4, version)
        RETURNING id, email, name, role, created_at, updated_at, version, email_proven_at IS NOT NULL AS email_proven
        """,
        user_id,
        email,
        name,
        version,
    )


async def change_role(tx: Tx, user_id: int, role: Role, version: int | None) -> UserRow | None:
    """The changed user; None for an unknown id or another version."""
    return await tx.fetch_one(
        UserRow,
        """
        UPDATE users
           SET role = $2, updated_at = now(), version = version + 1
         WHERE id = $1 AND version = coalesce($3, version)
        RETURNING id, email, name, role, created_at, updated_at, version, email_proven_at IS NOT NULL AS email_proven
        """,
        user_id,
        role,
        version,
    )


async def lock_accounts(tx: Tx, ids: list[int]) -> list[RoleRow]:
    """The accounts that exist, with their roles. No other transaction changes them until this one ends."""
    return await tx.fetch(
        RoleRow,
        """
        SELECT id, role
          FROM users
         WHERE id = ANY($1::bigint[])
         ORDER BY id
           FOR NO KEY UPDATE
        """,
        ids,
    )


async def lock_accounts_and_staff(tx: Tx, ids: list[int]) -> list[RoleRow]:
    """`lock_accounts`, and all staff.

    Of two members who concurrently take the role from each other, the second waits here, and then gets its new role,
    because PostgreSQL reads a row again once it has its lock.
    """
    return await tx.fetch(
        RoleRow,
        """
        SELECT u.id, u.role
          FROM users u
         WHERE u.id IN (
            SELECT unnest($1::bigint[])
             UNION
            SELECT s.id FROM users s WHERE s.role = 'staff'
         )
         ORDER BY u.id
           FOR NO KEY UPDATE OF u
        """,
        ids,
    )


# --------------------------------------------------------------------------------------------------------- credentials


async def add_credentials(tx: Tx, user_id: int, password_hash: str) -> None:
    await tx.execute(
        """
        INSERT INTO credentials (user_id, password_hash)
        VALUES ($1, $2)
        """,
        user_id,
        password_hash,
    )


async def user_by_email(tx: Tx, spellings: list[str]) -> UserRow | None:
    """The account with one of the spellings of an address; the first spelling that an account has."""
    return await tx.fetch_one(
        UserRow,
        """
        SELECT id, email, name, role, created_at, updated_at, version, email_proven_at IS NOT NULL AS email_proven
          FROM users
         WHERE lower(email) = ANY(ARRAY(SELECT lower(spelling) FROM unnest($1::text[]) AS spelling))
         ORDER BY array_position(ARRAY(SELECT lower(spelling) FROM unnest($1::text[]) AS spelling), lower(email))
         LIMIT 1
        """,
        spellings,
    )


async def credentials_by_email(tx: Tx, spellings: list[str]) -> CredentialsRow | None:
    """As `user_by_email`, the credentials."""
    return await tx.fetch_one(
        CredentialsRow,
        """
        SELECT c.user_id, u.email, c.password_hash, c.version
          FROM users u
          JOIN credentials c ON c.user_id = u.id
         WHERE lower(u.email) = ANY(ARRAY(SELECT lower(spelling) FROM unnest($1::text[]) AS spelling))
         ORDER BY array_position(ARRAY(SELECT lower(spelling) FROM unnest($1::text[]) AS spelling), lower(u.email))
         LIMIT 1
        """,
        spellings,
    )


async def credentials_by_user(tx: Tx, user_id: int) -> CredentialsRow | None:
    return await tx.fetch_one(
        CredentialsRow,
        """
        SELECT c.user_id, u.email, c.password_hash, c.version
          FROM users u
          JOIN credentials c ON c.user_id = u.id
         WHERE u.id = $1
        """,
        user_id,
    )


async def lock_credentials(tx: Tx, user_id: int, version: int) -> bool:
    """False where the password was changed after `version` was read. Locks it until this transaction ends."""
    found = await tx.fetch_values(
        int,
        """
        SELECT user_id
          FROM credentials
         WHERE user_id = $1 AND version = $2
           FOR SHARE
        """,
        user_id,
        version,
    )
    return bool(found)


async def rehash(tx: Tx, user_id: int, version: int, password_hash: str) -> None:
    """Replaces the hash by another one of the same password."""
    await tx.execute(
        """
        UPDATE credentials
           SET password_hash = $3
         WHERE user_id = $1 AND version = $2
        """,
        user_id,
        version,
        password_hash,
    )


async def change_password(tx: Tx, user_id: int, version: int, password_hash: str) -> bool:
    """False where the password was changed after `version` was read and checked."""
    changed = await tx.execute(
        """
        UPDATE credentials
           SET password_hash = $3, version = version + 1, changed_at = now()
         WHERE user_id = $1 AND version = $2
        """,
        user_id,
        version,
        password_hash,
    )
    return changed == 1


# ------------------------------------------------------------------------------------------------------------ sessions


async def start_session(
    tx: Tx, user_id: int, version: int, sid: uuid.UUID, length: datetime.timedelta
) -> SessionRow | None:
    """Starts a session; None where the password was changed after `version` was read.

    The locks order this statement and a change of the password or the role: the change ends this session too, or this
    statement waits for it.
    """
    return await tx.fetch_one(
        SessionRow,
        """
        INSERT INTO sessions (user_id, sid, expires_at)
        SELECT u.id, $3, now() + $4::interval
          FROM users u
          JOIN credentials c ON c.user_id = u.id
         WHERE u.id = $1 AND c.version = $2
           FOR SHARE OF u, c
        RETURNING id, sid, user_id
        """,
        user_id,
        version,
        sid,
        length,
    )


async def lock_session(tx: Tx, token_hash: bytes) -> SessionRow | None:
    """The live session of a refresh token, used or not. Locked against other refreshes and its end."""
    return await tx.fetch_one(
        SessionRow,
        """
        SELECT s.id, s.sid, s.user_id
          FROM refresh_tokens t
          JOIN sessions s ON s.id = t.session_id
         WHERE t.hash = $1 AND s.ended_at IS NULL AND s.expires_at > now()
           FOR NO KEY UPDATE OF s
        """,
        token_hash,
    )


async def sessions_of(tx: Tx, user_id: int, after: uuid.UUID | None, limit: int) -> list[ListedSessionRow]:
    """The live sessions of a user, the newest first: those that are older than their session `after`."""
    return await tx.fetch(
        ListedSessionRow,
        """
        SELECT s.sid, s.created_at, coalesce(t.issued_at, s.created_at) AS last_used_at, s.expires_at
          FROM sessions s
          LEFT JOIN LATERAL (SELECT max(issued_at) AS issued_at FROM refresh_tokens WHERE session_id = s.id) t ON true
         WHERE s.user_id = $1
           AND s.ended_at IS NULL
           AND s.expires_at > now()
           AND ($2::uuid IS NULL OR s.id < (SELECT id FROM sessions WHERE sid = $2 AND user_id = $1))
         ORDER BY s.id DESC
         LIMIT $3
        """,
        user_id,
        after,
        limit,
    )


async def lock_session_of(tx: Tx, user_id: int, sid: uuid.UUID) -> list[int]:
    """The live session of a user with this public id."""
    return await tx.fetch_values(
        int,
        """
        SELECT id
          FROM sessions
         WHERE sid = $2 AND user_id = $1 AND ended_at IS NULL AND expires_at > now()
           FOR NO KEY UPDATE
        """,
        user_id,
        sid,
    )


async def lock_other_sessions_of(tx: Tx, user_id: int, sid: uuid.UUID) -> list[int]:
    """The live sessions of a user, except one."""
    return await tx.fetch_values(
        int,
        """
        SELECT id
          FROM sessions
         WHERE user_id = $1 AND sid <> $2 AND ended_at IS NULL
         ORDER BY id
           FOR NO KEY UPDATE
        """,
        user_id,
        sid,
    )


async def lock_sessions_of(tx: Tx, user_id: int, *, except_with: bytes = b"") -> list[int]:
    """The live sessions of a user, except the one whose unused refresh token has the hash `except_with`."""
    return await tx.fetch_values(
        int,
        """
        SELECT s.id
          FROM sessions s
         WHERE s.user_id = $1
           AND s.ended_at IS NULL
           AND NOT EXISTS (
               SELECT FROM refresh_tokens t WHERE t.hash = $2 AND t.session_id = s.id AND t.used_at IS NULL
           )
         ORDER BY s.id
           FOR NO KEY UPDATE OF s
        """,
        user_id,
        except_with,
    )


async def end_sessions(tx: Tx, session_ids: list[int], reason: str) -> None:
    """Ends live, locked sessions, and appends them to the log. One of the last statements of a transaction.

    The lock that orders the log is held from here to the commit.
    """
    await tx.execute(
        """
        WITH ended AS (
            UPDATE sessions
               SET ended_at = now(), end_reason = $2
             WHERE id = ANY($1::bigint[]) AND ended_at IS NULL
            RETURNING id, sid
        ), last AS (
            INSERT INTO ended_sessions_last AS l (position)
            SELECT count(*) FROM ended HAVING count(*) > 0
                ON CONFLICT ON CONSTRAINT ended_sessions_last_pkey DO UPDATE
               SET position = l.position + excluded.position
            RETURNING position
        )
        INSERT INTO ended_sessions (position, sid)
        SELECT last.position + 1 - row_number() OVER (ORDER BY ended.id DESC), ended.sid
          FROM ended
         CROSS JOIN last
        """,
        session_ids,
        reason,
    )


async def ended_sessions(tx: Tx, after: int, limit: int) -> list[EndedRow]:
    """The entry at the position `after`, if it still exists, and up to `limit` after it, by ascending position.

    There is at least one row, with the last given position; its `sid` is None where there are no entries.
    """
    return await tx.fetch(
        EndedRow,
        """
        SELECT coalesce(last.position, 0) AS last, e.position, e.sid
          FROM (SELECT 1) AS always
          LEFT JOIN ended_sessions_last last ON last.single
          LEFT JOIN LATERAL (
            SELECT position, sid FROM ended_sessions WHERE position >= $1 ORDER BY position LIMIT $2 + 1
          ) e ON true
         ORDER BY e.position
        """,
        after,
        limit,
    )


async def delete_old_ended_sessions(tx: Tx, limit: int = CLEANED_AT_ONCE) -> int:
    """Deletes up to `limit` of the oldest entries whose access tokens have expired; gives how many."""
    return await tx.execute(
        """
        DELETE FROM ended_sessions
         WHERE ended_at < now() - $1::interval
           AND position IN (
            SELECT position FROM ended_sessions ORDER BY position LIMIT $2 FOR UPDATE SKIP LOCKED
         )
        """,
        rules.ENDED_KEPT,
        limit,
    )


async def add_refresh_token(tx: Tx, session_id: int, token_hash: bytes) -> None:
    await tx.execute(
        """
        INSERT INTO refresh_tokens (hash, session_id)
        VALUES ($1, $2)
        """,
        token_hash,
        session_id,
    )


async def use_refresh_token(tx: Tx, token_hash: bytes) -> bool:
    """False where it was used before. The guard decides between two concurrent uses."""
    used = await tx.execute(
        """
        UPDATE refresh_tokens
           SET used_at = now()
         WHERE hash = $1 AND used_at IS NULL
        """,
        token_hash,
    )
    return used == 1


async def is_repeated(tx: Tx, used: bytes, successor: bytes, within: datetime.timedelta) -> bool:
    """Whether a token was used less than `within` ago, and has this successor."""
    found = await tx.fetch_values(
        int,
        """
        SELECT t.session_id
          FROM refresh_tokens t
          JOIN refresh_tokens s ON s.hash = $2 AND s.session_id = t.session_id
         WHERE t.hash = $1 AND t.used_at > now() - $3::interval
        """,
        used,
        successor,
        within,
    )
    return bool(found)


async def delete_old_refresh_tokens(tx: Tx, limit: int = CLEANED_AT_ONCE) -> int:
    """Deletes up to `limit` tokens of sessions that ended `SESSION_KEPT` ago; gives how many."""
    return await tx.execute(
        """
        DELETE FROM refresh_tokens
         WHERE hash IN (
            SELECT t.hash
              FROM sessions s
              JOIN refresh_tokens t ON t.session_id = s.id
             WHERE LEAST(s.ended_at, s.expires_at) < now() - $1::interval
             LIMIT $2
               FOR UPDATE OF t SKIP LOCKED
         )
        """,
        rules.SESSION_KEPT,
        limit,
    )


async def delete_old_sessions(tx: Tx, limit: int = CLEANED_AT_ONCE) -> int:
    """Deletes up to `limit` sessions without tokens that ended `SESSION_KEPT` ago; gives how many."""
    return await tx.execute(
        """
        DELETE FROM sessions
         WHERE id IN (
            SELECT s.id
              FROM sessions s
             WHERE LEAST(s.ended_at, s.expires_at) < now() - $1::interval
               AND NOT EXISTS (SELECT FROM refresh_tokens t WHERE t.session_id = s.id)
             LIMIT $2
               FOR UPDATE OF s SKIP LOCKED
         )
        """,
        rules.SESSION_KEPT,
        limit,
    )


# ----------------------------------------------------------------------------------------------------------- demo data


async def lock_users(tx: Tx) -> None:
    """Locks all users against writes until this transaction ends; reads continue."""
    await tx.execute("LOCK TABLE users IN SHARE ROW EXCLUSIVE MODE")


async def is_empty(tx: Tx) -> bool:
    return not await tx.fetch_values(int, "SELECT id FROM users UNION ALL SELECT user_id FROM erased_accounts LIMIT 1")


async def add_demo_users(tx: Tx, ids: list[int], emails: list[str], names: list[str], password_hash: str) -> None:
    """Customers with given ids, all with the same password."""
    await tx.execute(
        """
        WITH added AS (
            INSERT INTO users (id, email, name)
            SELECT * FROM unnest($1::bigint[], $2::text[], $3::text[])
            RETURNING id
        )
        INSERT INTO credentials (user_id, password_hash)
        SELECT id, $4 FROM added
        """,
        ids,
        emails,
        names,
        password_hash,
    )
