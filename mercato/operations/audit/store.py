"""The last audit of a shop, where all its processes find it: a table that stays in the scratch database."""

from __future__ import annotations

import datetime

from mercato.chassis.postgres.database import Row, Tx


class LastRow(Row):
    at: datetime.datetime
    violations: str
    """JSON: how many of each invariant, also of those that hold."""


async def make_table(tx: Tx) -> None:
    # Two processes that make it at once: IF NOT EXISTS looks before it locks, and one of them would fail.
    await tx.execute("SELECT pg_advisory_xact_lock(hashtext('last_audit'))")
    await tx.execute(
        """
        CREATE TABLE IF NOT EXISTS last_audit (
            single boolean NOT NULL DEFAULT true CONSTRAINT last_audit_pkey PRIMARY KEY CHECK (single),
            began_at timestamptz NOT NULL,
            at timestamptz,
            violations text
        )
        """
    )


async def take_turn(tx: Tx, every_seconds: float) -> bool:
    """Whether it is this process that audits now: of all that ask, one does in so many seconds.

    Its turn is gone when it dies over it: the next one is whoever asks first when the time has come.
    """
    # Who waits for the row sees, once it has it, that the turn is taken: the clause is looked at again. A turn that
    # would begin after the next one was written before the server's clock was set back.
    taken = await tx.execute(
        """
        INSERT INTO last_audit AS last (began_at)
        VALUES (now())
            ON CONFLICT ON CONSTRAINT last_audit_pkey DO UPDATE
           SET began_at = excluded.began_at
         WHERE last.began_at <= excluded.began_at - make_interval(secs => $1)
            OR last.began_at > excluded.began_at + make_interval(secs => $1)
        """,
        every_seconds,
    )
    return taken == 1


async def save(tx: Tx, at: datetime.datetime, violations: str) -> None:
    # Of two that overlap, the newer copies count; those from before the clock was set back are not newer.
    await tx.execute(
        "UPDATE last_audit SET at = $1, violations = $2 WHERE at IS NULL OR at < $1 OR at > clock_timestamp()",
        at,
        violations,
    )


async def latest(tx: Tx) -> LastRow | None:
    return await tx.fetch_one(LastRow, "SELECT at, violations FROM last_audit WHERE at IS NOT NULL")
