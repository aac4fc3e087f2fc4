"""The databases of a new shop on a server: all get their names at once, or none.

They are created with a suffix, filled, and renamed in one transaction. The next process drops those that a killed one
has left. A lock excludes a second process: advisory, of the session, in the database of the administrator's DSN.

On several servers there is a transaction on each, one after the other, when all databases are filled. A failure of one
renames those of the servers before it back. A process that is killed in between leaves some servers renamed, and the
next one refuses to write over them: drop those databases, and repeat.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any, Final

import asyncpg  # pyright: ignore[reportMissingTypeStubs]  # it has no types

from mercato.chassis.postgres.dsn import shown

from .provisioning import ProvisionError, connect_as_administrator, identifier, provision, provisioned
from .sessions import as_administrator

SUFFIX: Final = "_restoring"
LOCK_KEY: Final = 0x72657374  # "rest"


class NewDatabases:
    """The new databases: DSNs by service, `dsns` with the administrator's role, `owned` with the service's."""

    def __init__(self, connection: Any, admin_dsn: str, services: Sequence[str], prefix: str) -> None:
        self.dsns: Mapping[str, str] = {s: as_administrator(admin_dsn, prefix + s + SUFFIX) for s in services}
        self.owned: Mapping[str, str] = {}
        self._connection = connection
        self._admin_dsn = admin_dsn
        self._names = [prefix + service for service in services]

    async def take_names(self) -> None:
        """Renames all databases. Raises `ProvisionError` if a name is taken meanwhile, and then renames none."""
        try:
            async with self._connection.transaction():
                for name in self._names:
                    await self._connection.execute(
                        f"ALTER DATABASE {identifier(name + SUFFIX)} RENAME TO {identifier(name)}"
                    )
        except asyncpg.DuplicateDatabaseError as error:
            raise ProvisionError(f"{_taken(self._admin_dsn)}: {error}") from error

    async def give_back_names(self) -> None:
        """Undoes `take_names`, also while a process is connected."""
        for name in self._names:
            await self._connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1", name
            )
            await self._connection.execute(f"ALTER DATABASE {identifier(name)} RENAME TO {identifier(name + SUFFIX)}")

    async def drop(self) -> None:
        """Drops those that were not renamed."""
        for name in self._names:
            await self._connection.execute(f"DROP DATABASE IF EXISTS {identifier(name + SUFFIX)} WITH (FORCE)")


async def take_names(made: Sequence[NewDatabases]) -> None:
    """Renames the databases on all servers, or none. Raises `ProvisionError`."""
    taken: list[NewDatabases] = []
    try:
        for each in made:
            await each.take_names()
            taken.append(each)
    except BaseException:
        for each in taken:
            await each.give_back_names()
        raise


@contextlib.asynccontextmanager
async def new_databases(
    admin_dsn: str, services: Sequence[str], password: Callable[[str], str], *, prefix: str = "mercato_"
) -> AsyncGenerator[NewDatabases]:
    """Empty databases of `services`, each owned by its role, for the block to fill; it ends with `take_names`.

    If the block fails before, they are dropped; the roles stay. Raises `ProvisionError`; if one of the databases
    exists, before any is created.
    """
    connection = await connect_as_administrator(admin_dsn)
    try:
        if not await connection.fetchval("SELECT pg_try_advisory_lock($1)", LOCK_KEY):
            raise ProvisionError(f"another restore runs on {shown(admin_dsn)}: wait for it")
        if there := await provisioned(admin_dsn, services, prefix=prefix):
            raise ProvisionError(f"{_taken(admin_dsn)}: {prefix}{next(iter(there))}")
        made = NewDatabases(connection, admin_dsn, services, prefix)
        try:
            await made.drop()
            made.owned = await provision(admin_dsn, services, password, prefix=prefix, suffix=SUFFIX)
            yield made
        finally:
            await made.drop()
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
        raise ProvisionError(f"PostgreSQL could not make the databases: {error}") from error
    finally:
        await connection.close()  # and with it the lock


def _taken(admin_dsn: str) -> str:
    return f"{shown(admin_dsn)} has databases of a shop already, and a shop is never written over: name another server"
