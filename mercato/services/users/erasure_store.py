"""The SQL statements that erase an account."""

from __future__ import annotations

import uuid

from mercato.chassis.postgres.database import Tx

from .store import RoleRow


async def is_live(tx: Tx, user_id: int, sid: uuid.UUID) -> bool:
    """Whether a user has this session, and it is live."""
    found = await tx.fetch_values(
        int,
        """
        SELECT id
          FROM sessions
         WHERE sid = $2 AND user_id = $1 AND ended_at IS NULL AND expires_at > now()
        """,
        user_id,
        sid,
    )
    return bool(found)


async def lock_to_erase(tx: Tx, user_id: int) -> list[RoleRow]:
    """The account, where it exists, and for staff all staff. The lock prevents inserts that refer to them."""
    return await tx.fetch(
        RoleRow,
        """
        SELECT u.id, u.role
          FROM users u
         WHERE u.id = $1
            OR (u.role = 'staff' AND EXISTS (SELECT FROM users WHERE id = $1 AND role = 'staff'))
         ORDER BY u.id
           FOR UPDATE OF u
        """,
        user_id,
    )


async def note_erased(tx: Tx, user_id: int) -> None:
    await tx.execute("INSERT INTO erased_accounts (user_id) VALUES ($1)", user_id)


async def is_erased(tx: Tx, user_id: int) -> bool:
    return bool(await tx.fetch_values(int, "SELECT user_id FROM erased_accounts WHERE user_id = $1", user_id))


async def delete_account(tx: Tx, user_id: int) -> str:
    """Deletes a locked account with all rows that refer to it; gives the e-mail address that it had."""
    found = await tx.fetch_values(str, "DELETE FROM users WHERE id = $1 RETURNING email", user_id)
    return found[0]
