"""The SQL statements that count the entries of lists of the users service, on all pages."""

from __future__ import annotations

from mercato.chassis.postgres.database import Tx
from mercato.contracts.roles import Role


async def users(tx: Tx, role: Role | None) -> int:
    if role is None:
        found = await tx.fetch_values(int, """SELECT count(*) FROM users""")
    else:
        found = await tx.fetch_values(int, """SELECT count(*) FROM users WHERE role = $1""", role)
    return found[0]


async def sessions_of(tx: Tx, user_id: int) -> int:
    """The number of live sessions, as in `store.sessions_of`."""
    found = await tx.fetch_values(
        int,
        """SELECT count(*) FROM sessions WHERE user_id = $1 AND ended_at IS NULL AND expires_at > now()""",
        user_id,
    )
    return found[0]


async def security_log(tx: Tx, account_id: int | None) -> int:
    """All entries, or those about an account or of its actions. Each half reads one index."""
    if account_id is None:
        found = await tx.fetch_values(int, """SELECT count(*) FROM security_log""")
    else:
        found = await tx.fetch_values(
            int,
            """
            SELECT (SELECT count(*) FROM security_log WHERE account_id = $1)
                   + (SELECT count(*) FROM security_log WHERE actor_id = $1 AND actor_id <> account_id)
            """,
            account_id,
        )
    return found[0]
