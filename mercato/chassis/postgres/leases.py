"""Whose turn it is, of all processes: a row of the database says until when one of them has it."""

from __future__ import annotations

from .database import Tx


def holds(column: str, seconds: str) -> str:
    """The condition under which a lease of so many seconds, which ends at `column`, has not ended. Both are SQL.

    One that would last longer than any that is given was written before the server's clock was set back: it has ended.
    """
    return f"{column} BETWEEN clock_timestamp() AND clock_timestamp() + make_interval(secs => 2 * {seconds})"


class Lease:
    """Turns at work that one process at a time should do: a row each in `table`, with `name` and `leased_until`.

    A process that dies has the turn until the lease ends. One that stands still goes on when another has the turn: what
    both do must be right nevertheless.
    """

    def __init__(self, table: str) -> None:
        # Who waits for the row sees, once it has it, that the turn is taken: the condition is looked at again.
        self._take = f"""
            INSERT INTO {table} AS t (name, leased_until)
            VALUES ($1, clock_timestamp() + make_interval(secs => $2))
                ON CONFLICT (name) DO UPDATE
               SET leased_until = excluded.leased_until
             WHERE NOT {holds("t.leased_until", "$2")}
            """  # noqa: S608

    async def take(self, tx: Tx, name: str, seconds: float) -> bool:
        """Whether this process has the turn, for so many seconds from now: of all that ask, one has."""
        return await tx.execute(self._take, name, seconds) == 1
