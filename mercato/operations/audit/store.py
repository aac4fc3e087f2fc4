"""The result of the last audit, for all processes of the shop: a table that stays in the scratch database."""

from __future__ import annotations

import datetime
from typing import Final

from mercato.chassis.postgres.database import Row, Tx
from mercato.chassis.postgres.leases import Lease


class LastRow(Row):
    at: datetime.datetime
    violations: str
    """JSON: the number of violations of each invariant, also of those that hold."""


TURN: Final = Lease("audits")
"""The lease of the process that audits. It is in the row of the last audit."""

LAST: Final = "last"


async def make_table(tx: Tx) -> None:
    # Without the lock, one of two concurrent processes fails: IF NOT EXISTS checks before it locks.
    await tx.execute("SELECT pg_advisory_xact_lock(hashtext('audits'))")
    await tx.execute(
        """
        CREATE TABLE IF NOT EXISTS audits (
            name text CONSTRAINT audits_pkey PRIMARY KEY,
            leased_until timestamptz NOT NULL,
            at timestamptz,
            violations text
        )
        """
    )


async def save(tx: Tx, at: datetime.datetime, violations: str) -> None:
    # Of two overlapping audits, the one with newer copies counts. A time in the future is from before the clock was
    # set back, and does not count.
    await tx.execute(
        """
        UPDATE audits SET at = $2, violations = $3
         WHERE name = $1 AND (at IS NULL OR at < $2 OR at > clock_timestamp())
        """,
        LAST,
        at,
        violations,
    )


async def latest(tx: Tx) -> LastRow | None:
    return await tx.fetch_one(LastRow, "SELECT at, violations FROM audits WHERE name = $1 AND at IS NOT NULL", LAST)
