"""Leases: a row of the database says until when one process, of all, may do some work."""

from __future__ import annotations

from .database import Tx


def holds(column: str, seconds: str) -> str:
    """The condition under which a lease of so many seconds, which ends at `column`, has not ended. Both are SQL.

    A lease that would last longer than any new one was written before the server's clock was set back: it has ended.
    """
    return f"{column} BETWEEN clock_timestamp() AND clock_timestamp() + make_interval(secs => 2 * {seconds})"


class Lease:
    """Leases for work that one process at a time should do: a row each in `table`, with `name` and `leased_until`.

    A process that dies keeps the lease until it ends. One that is paused continues while another process has the lease:
    the work of both must be correct nevertheless.
    """

    def __init__(self, table: str) -> None:
        # A process that waited for the row lock sees that the lease is taken: PostgreSQL checks the condition again.
        self._take = f"""
            INSERT INTO {table} AS t (name, leased_until)
            VALUES ($1, clock_timestamp() + make_interval(secs => $2))
                ON CONFLICT (name) DO UPDATE
               SET leased_until = excluded.leased_until
             WHERE NOT {holds("t.leased_until", "$2")}
            """  # noqa: S608

    async def take(self, tx: Tx, name: str, seconds: float) -> bool:
        """Takes the lease for so many seconds; gives whether this process has it. Of all that ask, one gets it."""
        return await tx.execute(self._take, name, seconds) == 1
