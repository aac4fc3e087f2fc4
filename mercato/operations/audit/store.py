"""The last audit of a shop, where all its processes find it: a table that stays in the scratch database."""

from __future__ import annotations

import datetime
from typing import Final

from mercato.chassis.postgres.database import Row, Tx
from mercato.chassis.postgres.leases import Lease


class LastRow(Row):
    at: datetime.datetime
    violations: str
    """JSON: how many of each invariant, also of those that hold."""


TURN: Final = Lease("audits")
"""Which process audits next. The row of the last audit is that of the turn, too."""

LAST: Final = "last"


async def make_table(tx: Tx) -> None:
    # Two processes that make it at once: IF NOT EXISTS looks before it locks, and one of them would fail.
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
    # Of two that overlap, the newer copies count; those from before the clock was set back are not newer.
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
