"""One database and one role for each service, on any PostgreSQL that an administrator's DSN names.

A service's role owns its database and can connect to no other; nobody else can connect to it. Running this again
changes nothing but a password that is not the one it should be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final
from urllib.parse import quote, urlsplit, urlunsplit

import asyncpg  # pyright: ignore[reportMissingTypeStubs]  # see db.py

from .db import OLDEST_VERSION

CONNECT_SECONDS: Final = 10.0


class ProvisionError(Exception):
    """A sentence for the operator: what is wrong with the server or the DSN, and the way out."""


async def provision(
    admin_dsn: str, services: Sequence[str], password: Callable[[str], str], *, prefix: str = "mercato_"
) -> Mapping[str, str]:
    """Makes what is missing for `services`; gives the DSN of each. `password` gives the password of a role by its name.

    Raises `ProvisionError`.
    """
    connection = await _connect(admin_dsn)
    try:
        await _require_version(connection)
        dsns: dict[str, str] = {}
        for service in services:
            name = prefix + service
            dsns[service] = service_dsn(admin_dsn, name, password(name))
            await _ensure(connection, name, password(name), dsns[service])
        return dsns
    except asyncpg.InsufficientPrivilegeError as error:
        raise ProvisionError(
            f"the role in MERCATO_POSTGRES_DSN may not make roles and databases ({error}); give it CREATEROLE and CREATEDB"
        ) from error
    except (asyncpg.PostgresError, OSError) as error:
        raise ProvisionError(f"PostgreSQL could not make the databases: {error}") from error
    finally:
        await connection.close()


async def _connect(admin_dsn: str) -> Any:
    try:
        return await asyncpg.connect(admin_dsn, timeout=CONNECT_SECONDS)  # pyright: ignore[reportUnknownMemberType]
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ProvisionError(
            f"no connection with MERCATO_POSTGRES_DSN ({_without_password(admin_dsn)}): {reason}; "
            "check host, port, user and password"
        ) from error


async def _require_version(connection: Any) -> None:
    number = int(await connection.fetchval("SELECT current_setting('server_version_num')"))
    if number // 10_000 < OLDEST_VERSION:
        version = await connection.fetchval("SELECT current_setting('server_version')")
        raise ProvisionError(
            f"this server is PostgreSQL {version}; Mercato needs {OLDEST_VERSION} or newer: "
            "upgrade it, or leave MERCATO_POSTGRES_DSN away to use the embedded one"
        )


async def _ensure(connection: Any, name: str, password: str, dsn: str) -> None:
    role, secret = _identifier(name), _literal(password)
    if not await connection.fetchval("SELECT true FROM pg_roles WHERE rolname = $1", name):
        await _unless_there(connection, f"CREATE ROLE {role} LOGIN PASSWORD {secret}")
    if not await connection.fetchval("SELECT true FROM pg_database WHERE datname = $1", name):
        await _unless_there(connection, f"GRANT {role} TO CURRENT_USER")
        await _unless_there(connection, f"CREATE DATABASE {role} OWNER {role}")
        await connection.execute(f"REVOKE ALL ON DATABASE {role} FROM PUBLIC")
    if not await _opens(dsn):
        await connection.execute(f"ALTER ROLE {role} LOGIN PASSWORD {secret}")


async def _unless_there(connection: Any, statement: str) -> None:
    # Another process may be making the same thing at this moment; then it is there, which is what we want.
    try:
        await connection.execute(statement)
    except (asyncpg.DuplicateObjectError, asyncpg.DuplicateDatabaseError, asyncpg.UniqueViolationError):
        pass


async def _opens(dsn: str) -> bool:
    try:
        connection: Any = await asyncpg.connect(dsn, timeout=CONNECT_SECONDS)  # pyright: ignore[reportUnknownMemberType]
    except asyncpg.InvalidAuthorizationSpecificationError:
        return False
    await connection.close()
    return True


def service_dsn(admin_dsn: str, name: str, password: str) -> str:
    """The administrator's DSN with the user, password and database of a service."""
    parts = urlsplit(admin_dsn)
    where = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{quote(name)}:{quote(password)}@{where}", path=f"/{quote(name)}"))


def _without_password(dsn: str) -> str:
    parts = urlsplit(dsn)
    if parts.password is None:
        return dsn
    return urlunsplit(parts._replace(netloc=parts.netloc.replace(f":{parts.password}@", ":***@")))


def _identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _literal(text: str) -> str:
    assert "\\" not in text
    return "'" + text.replace("'", "''") + "'"
