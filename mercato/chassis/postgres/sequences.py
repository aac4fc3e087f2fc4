"""Moves a sequence past ids that other services already know, while ids are taken from it."""

from __future__ import annotations

from typing import Any, Final, Protocol

from .database import Database, Tx

UNKNOWN_IDS: Final = 1_000_000
"""A sequence that is behind belongs to a restored database: before, it had given more ids than other services know, for
instance of accounts that never ordered. It continues so many ids after the last known one."""

# The next id is the last value, or the one after it if that was already given.
NEXT: Final = "SELECT last_value + is_called::integer FROM {name}"
# Blocks `nextval` until the transaction ends: no id is taken between reading and moving, and the sequence never
# goes backwards. It changes nothing.
_HOLD: Final = "ALTER SEQUENCE {name} CACHE 1"
_MOVE: Final = "SELECT setval($1::text::regclass, $2)"


class SqlSession(Protocol):
    """A connection of the driver in a transaction, or an adapter with its methods."""

    async def fetchval(self, sql: str, *values: object) -> Any: ...
    async def execute(self, sql: str, *values: object) -> object: ...


async def move_past(session: SqlSession, name: str, newest: int) -> int | None:
    """Moves a sequence past a known id, never backwards, in the transaction of `session`.

    Gives the id that it would have given next; None if that is already past `newest`.
    """
    following = NEXT.format(name=name)
    if await session.fetchval(following) > newest:
        return None
    await session.execute(_HOLD.format(name=name))
    next_id: int = await session.fetchval(following)
    if next_id > newest:  # another process has moved it meanwhile
        return None
    await session.fetchval(_MOVE, name, newest + UNKNOWN_IDS)
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
