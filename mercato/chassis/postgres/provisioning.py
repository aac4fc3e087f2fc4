"""One database and one role for each service, on any PostgreSQL that an administrator's DSN names.

A service's role owns its database and can connect to no other; no other service's role can connect to it. Running this
again repairs only what differs: a password, or a right that an interrupted run did not revoke.
Processes that start together wait for each other: PostgreSQL fails if two change the same role or rights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final
from urllib.parse import quote, urlsplit, urlunsplit

import asyncpg  # pyright: ignore[reportMissingTypeStubs]  # it has no types

from mercato.chassis.postgres.dsn import DSN_FORM, lacks_certificates, shown

from .connections import OLDEST_VERSION
from .sessions import ENCODING, NEW_ENCODING, SETTINGS, as_administrator, connect, is_pooled, wrong_settings

BUILTIN_LOCALES: Final = 17
"""The first PostgreSQL with built-in locales."""
LOCK_KEY: Final = 0x70726F76  # "prov"
LOCK_SECONDS: Final = 60.0


_SETTINGS_OF: Final = """
    SELECT split_part(setting, '=', 1) AS name, split_part(setting, '=', 2) AS value
    FROM pg_db_role_setting JOIN pg_roles ON oid = setrole, unnest(setconfig) AS setting
    WHERE rolname = $1 AND setdatabase = 0
"""


_OTHER_ENCODING: Final = """
    SELECT datname::text AS datname, pg_encoding_to_char(encoding)::text AS encoding
    FROM pg_database
    WHERE datname = ANY($1::text[]) AND pg_encoding_to_char(encoding) <> $2
    ORDER BY datname
    LIMIT 1
"""

_CONNECTIONS: Final = """
    SELECT current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int
         - current_setting('reserved_connections')::int
"""


class ProvisionError(Exception):
    """A sentence for the operator: what is wrong with the server or the DSN, and how to fix it."""


async def provision(
    admin_dsn: str,
    services: Sequence[str],
    password: Callable[[str], str],
    *,
    prefix: str = "mercato_",
    suffix: str = "",
) -> Mapping[str, str]:
    """Creates missing roles and databases; gives the DSN of each service. `password` gives a role's password by name.

    A database has the name of its role and `suffix`. Raises `ProvisionError`.
    """
    connection = await connect_as_administrator(admin_dsn)
    try:
        await _require_version(connection)
        await _require_server(connection)
        await connection.execute("SELECT pg_advisory_lock($1)", LOCK_KEY, timeout=LOCK_SECONDS)
        await _require_encoding(connection, [prefix + service + suffix for service in services])
        dsns: dict[str, str] = {}
        for service in services:
            name = prefix + service
            dsns[service] = service_dsn(admin_dsn, name, password(name), database=name + suffix)
            await _ensure(connection, name, name + suffix, password(name), dsns[service])
        return dsns
    except asyncpg.InsufficientPrivilegeError as error:
        raise ProvisionError(
            f"the role in MERCATO_POSTGRES_DSN may not make roles and databases ({error}); "
            "give it CREATEROLE and CREATEDB"
        ) from error
    except TimeoutError as error:
        raise ProvisionError(
            f"another process has been making the databases for {LOCK_SECONDS:.0f} s, or the server does not answer; "
            "try again"
        ) from error
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
        raise ProvisionError(f"PostgreSQL could not make the databases: {error}") from error
    finally:
        await connection.close()  # and with it the lock


async def provisioned(
    admin_dsn: str, services: Sequence[str], *, prefix: str = "mercato_", suffix: str = ""
) -> Mapping[str, str]:
    """Those of the databases that exist already: the DSN of each, as the administrator opens it. Changes nothing.

    Raises `ProvisionError`.
    """
    connection = await connect_as_administrator(admin_dsn)
    try:
        await _require_version(connection)
        names = set(await connection.fetchval("SELECT array_agg(datname::text) FROM pg_database"))
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
        raise ProvisionError(f"PostgreSQL could not name its databases: {error}") from error
    finally:
        await connection.close()
    found = {service: prefix + service + suffix for service in services}
    return {service: as_administrator(admin_dsn, name) for service, name in found.items() if name in names}


async def connect_as_administrator(admin_dsn: str) -> Any:
    """A connection for making databases. Raises `ProvisionError`."""
    if missing := _lacks_certificates(admin_dsn):
        raise ProvisionError(f"MERCATO_POSTGRES_DSN ({shown(admin_dsn)}) asks to verify the server, {missing}")
    try:
        return await connect(admin_dsn)
    except ValueError as error:  # its text may contain a part of the password
        raise ProvisionError(f"MERCATO_POSTGRES_DSN ({shown(admin_dsn)}) cannot be used: {DSN_FORM}") from error
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ProvisionError(
            f"no connection with MERCATO_POSTGRES_DSN ({shown(admin_dsn)}): {reason}; "
            "check host, port, user and password"
        ) from error


def _lacks_certificates(admin_dsn: str) -> str:
    with contextlib.suppress(ValueError):  # it is not a DSN, which the connection finds
        return lacks_certificates(admin_dsn)
    return ""


async def _require_version(connection: Any) -> None:
    number = int(await connection.fetchval("SELECT current_setting('server_version_num')"))
    if number // 10_000 < OLDEST_VERSION:
        version = await connection.fetchval("SELECT current_setting('server_version')")
        raise ProvisionError(
            f"this server is PostgreSQL {version}; Mercato needs {OLDEST_VERSION} or newer: "
            "upgrade it, or leave MERCATO_POSTGRES_DSN away to use the embedded one"
        )


async def _require_server(connection: Any) -> None:
    if await is_pooled(connection):
        raise ProvisionError(
            "MERCATO_POSTGRES_DSN goes through a pooler; databases are made at the server itself: name that one, and "
            "the pooler by --pooler of `mercato migrate`"
        )


async def _ensure(connection: Any, name: str, database: str, password: str, dsn: str) -> None:
    role, secret = identifier(name), _literal(password)
    if not await connection.fetchval("SELECT true FROM pg_roles WHERE rolname = $1", name):
        await connection.execute(f"CREATE ROLE {role} LOGIN PASSWORD {secret}")
    if not await connection.fetchval("SELECT true FROM pg_database WHERE datname = $1", database):
        await connection.execute(f"GRANT {role} TO CURRENT_USER")
        await create_database(connection, database, owner=name)
    # Checked at each run: CREATE DATABASE lets every role connect, and cannot run in one transaction with the REVOKE.
    if await connection.fetchval("SELECT has_database_privilege('public', $1, 'CONNECT')", database):
        await connection.execute(f"REVOKE ALL ON DATABASE {identifier(database)} FROM PUBLIC")
    has = {(row["name"], row["value"]) for row in await connection.fetch(_SETTINGS_OF, name)}
    for setting, value in sorted(SETTINGS.items() - has):
        await connection.execute(f"ALTER ROLE {role} SET {setting} = {_literal(value)}")
    if not await _opens(dsn):
        await connection.execute(f"ALTER ROLE {role} LOGIN PASSWORD {secret}")
        await _opens(dsn)


async def _opens(dsn: str) -> bool:
    """Whether the role can connect. Raises `ProvisionError` if DSN or database override the role's settings."""
    try:
        connection = await connect(dsn)
    except asyncpg.InvalidAuthorizationSpecificationError:
        return False
    wrong = await wrong_settings(connection)
    await connection.close()
    if wrong:
        raise ProvisionError(
            f"sessions at {shown(dsn)} have other settings ({', '.join(wrong)}) than their role: take those back that "
            "stand in the DSN, or that ALTER ROLE ... IN DATABASE has given (RESET ALL)"
        )
    return True


async def create_database(connection: Any, name: str, *, owner: str | None = None) -> None:
    """A database in UTF-8 whose text sorts and folds alike on every server, whatever its template.

    Servers before 17 have no built-in locale; there it is that of the C library, or plain C.
    """
    create = f"CREATE DATABASE {identifier(name)} TEMPLATE template0 ENCODING '{ENCODING}'"
    if owner is not None:
        create += f" OWNER {identifier(owner)}"
    if connection.get_server_version().major >= BUILTIN_LOCALES:
        await connection.execute(f"{create} LOCALE_PROVIDER builtin BUILTIN_LOCALE 'C.UTF-8' LOCALE 'C'")
        return
    create += " LOCALE_PROVIDER libc LC_COLLATE 'C'"
    try:
        await connection.execute(f"{create} LC_CTYPE 'C.UTF-8'")
    except asyncpg.WrongObjectTypeError:  # the machine has no such locale
        await connection.execute(f"{create} LC_CTYPE 'C'")


async def _require_encoding(connection: Any, databases: Sequence[str]) -> None:
    """Checks the existing databases before any is created."""
    other = await connection.fetchrow(_OTHER_ENCODING, list(databases), ENCODING)
    if other is not None:
        raise ProvisionError(
            f"the database {other['datname']} has the encoding {other['encoding']} instead of {ENCODING}: "
            f"{NEW_ENCODING}"
        )


async def connections_taken(admin_dsn: str) -> int:
    """How many connections of ordinary roles the server accepts. Raises `ProvisionError`."""
    connection = await connect_as_administrator(admin_dsn)
    try:
        return int(await connection.fetchval(_CONNECTIONS))
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
        raise ProvisionError(f"PostgreSQL does not say how many connections it takes: {error}") from error
    finally:
        await connection.close()


def service_dsn(admin_dsn: str, name: str, password: str, *, database: str = "") -> str:
    """The administrator's DSN with the user, password and database of a service; the last is named as the first."""
    parts = urlsplit(admin_dsn)
    where = parts.netloc.rpartition("@")[2]
    user = f"{quote(name, safe='')}:{quote(password, safe='')}"
    return urlunsplit(parts._replace(netloc=f"{user}@{where}", path=f"/{quote(database or name)}"))


def identifier(name: str) -> str:
    """A name, quoted for SQL."""
    return '"' + name.replace('"', '""') + '"'


def _literal(text: str) -> str:
    assert "\\" not in text
    return "'" + text.replace("'", "''") + "'"
