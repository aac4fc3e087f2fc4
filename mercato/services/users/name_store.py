"""The SQL statement that finds an account by its name."""

from __future__ import annotations

from mercato.chassis.postgres.database import Tx

from .store import CredentialsRow


async def credentials_by_name(tx: Tx, name: str) -> CredentialsRow | None:
    """The credentials of the oldest account with this name: a newer account with the name does not replace it."""
    return await tx.fetch_one(
        CredentialsRow,
        """
        SELECT c.user_id, u.email, c.password_hash, c.version
          FROM users u
          JOIN credentials c ON c.user_id = u.id
         WHERE u.name = $1
         ORDER BY u.id
         LIMIT 1
        """,
        name,
    )
