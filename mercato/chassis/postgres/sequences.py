"""Moving a sequence past ids that others know already, while ids are taken from it."""

from __future__ import annotations

from typing import Any, Final, Protocol

from .database import Database, Tx

UNHEARD_IDS: Final = 1_000_000
"""A sequence that is behind belongs to a database that was restored: it has given more ids than others have heard of,
such as of accounts that never ordered. So many behind the last one that is known, it goes on."""

# In these two, the next id is the last value, or the one behind it where that was given already.
NEXT: Final = "SELECT last_value + is_called::integer FROM {name}"
# Blocks `nextval` until the transaction ends: no id is taken between the look and the move, and the sequence never
# goes backwards. It changes nothing.
_HOLD: Final = "ALTER SEQUENCE {name} CACHE 1"
_MOVE: Final = "SELECT setval($1::text::regclass, $2)"


class Session(Protocol):
    """A connection of the driver in a transaction, or what looks like one."""

    async def fetchval(self, sql: str, *values: object) -> Any: ...
    async def execute(self, sql: str, *values: object) -> object: ...


async def move_past(session: Session, name: str, newest: int) -> int | None:
    """Moves a sequence past an id that is known, never backwards, in the transaction of `session`.

    Gives the id that it would have given next; None where that is past `newest` already.
    """
    following = NEXT.format(name=name)
    if await session.fetchval(following) > newest:
        return None
    await session.execute(_HOLD.format(name=name))
    next_id: int = await session.fetchval(following)
    if next_id > newest:  # another process has moved it meanwhile
        return None
    await session.fetchval(_MOVE, name, newest + UNHEARD_IDS)
    return next_id


async def move_own_past(database: Database, name: str, newest: int) -> int | None:
    """The same for a sequence of a service, in a transaction of its own."""
    async with database.transaction() as tx:
        return await move_past(_Session(tx), name, newest)


class _Session:
    def __init__(self, tx: Tx) -> None:
        self._tx = tx

    async def fetchval(self, sql: str, *values: object) -> Any:
        [value] = await self._tx.fetch_values(int, sql, *values)
        return value

    async def execute(self, sql: str, *values: object) -> object:
        return await self._tx.execute(sql, *values)
