"""The settings of the sessions of a service's role, with or without a pooler in between.

Settings belong to the role: `provision` gives them to it. A pooler in transaction mode refuses them at the start of a
connection, and a `SET` would be left on a session that the next caller gets. Sessions that read whole tables, which
migrations and copies do, take them back with `WHOLE_TABLES`.

A pooler has to keep prepared statements: each batch runs them, and in transaction mode its transactions meet now one
session, now another. PgBouncer does so from version 1.21 on, with `max_prepared_statements` above 0. It shows in the
names of statements, which it replaces by its own.

A DSN may name several servers, of which one takes writes: `Servers` finds it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from typing import Any, Final, cast
from urllib.parse import parse_qs, urlsplit

import asyncpg  # pyright: ignore[reportMissingTypeStubs]  # it has no types

from .dsn import servers, with_database, with_settings

SAME_EVERYWHERE: Final = {
    # Statements rely on these, so that other defaults of a server, a database or an administrator must not apply.
    # `default_transaction_read_only` is left out: an operator stops all writes by it; `Database.problem` reports it.
    "default_transaction_isolation": "read committed",
    "default_transaction_deferrable": "off",
    "search_path": "public",
    "TimeZone": "UTC",
}

SETTINGS: Final = {
    **SAME_EVERYWHERE,
    # Batches are short statements that are run very often: compiling them costs more than it saves.
    "jit": "off",
    # They find their rows by keys. A plan is made once for a session, perhaps when the table was new and reading all
    # of it was the cheapest way; it must not stay so when there are a million rows.
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    # Planning a short statement takes as long as running it. One plan for all values is what all of them are written
    # for; without this, PostgreSQL plans those again and again that cost less for few values than for ten.
    "plan_cache_mode": "force_generic_plan",
    # Events are written as literals, in which a backslash is a backslash.
    "standard_conforming_strings": "on",
    # A process that was stopped in the middle of a transaction must not hold others up for ever.
    "idle_in_transaction_session_timeout": "10s",
}

WHOLE_TABLES: Final = {
    "enable_seqscan": "on",
    "enable_hashjoin": "on",
    "enable_mergejoin": "on",
    "plan_cache_mode": "auto",
    "idle_in_transaction_session_timeout": "0",
}

ENCODING: Final = "UTF8"
NEW_ENCODING: Final = "it holds text in all letters; name another server, or rename that database and restore a backup"

CONNECT_SECONDS: Final = 10.0
CONNECT_POLL_SECONDS: Final = 0.1
SERVER_SECONDS: Final = 2.0
"""Where a DSN names several servers, how long one is waited for before the next is tried: one whose machine is dead
does not even refuse. Two of them fit into the time that a batch waits for a connection."""

_WRONG: Final = """
    SELECT array_agg(wanted.name ORDER BY wanted.name)
    FROM unnest($1::text[], $2::text[]) AS wanted (name, value)
    WHERE current_setting(wanted.name) IS DISTINCT FROM wanted.value
"""


class NoPrimary(ConnectionError):
    """None of the servers of a DSN takes writes: perhaps a standby is about to be promoted."""


class Servers:
    """The servers that a DSN names. The one that has served is tried first, until another has.

    By itself the driver waits for the first one until its time is over, and tries no other; and without
    `target_session_attrs` it takes a standby. Where a DSN names several servers, it means the primary.
    """

    def __init__(self, dsn: str) -> None:
        self._servers: list[tuple[str, int | None]] = []
        self._attributes: Mapping[str, str] = {}
        with contextlib.suppress(ValueError):  # the driver says what is wrong with it
            self._servers = list(servers(dsn))
            if "target_session_attrs" not in parse_qs(urlsplit(dsn).query):
                self._attributes = {"target_session_attrs": "primary"}

    async def connect(self, dsn: str, *, timeout: float, **options: Any) -> Any:
        """A connection of the driver, within so many seconds. Raises its errors, and `NoPrimary`."""
        if len(self._servers) < 2:
            return await self._connect(dsn, timeout=timeout, **options)
        end = time.monotonic() + timeout
        failures: list[Exception] = []
        turns = [(server, SERVER_SECONDS) for server in self._servers]
        for server, seconds in turns:
            left = end - time.monotonic()
            try:
                return await self._connect_to(server, dsn, timeout=min(seconds, left), **options)
            except (OSError, asyncpg.PostgresError) as error:
                # Also a refusal: a standby does not know yet the role or database that its primary has just made.
                failures.append(error)
                if isinstance(error, TimeoutError) and seconds < left:  # busy, perhaps: again, after the others
                    turns.append((server, timeout))
        raise max(reversed(failures), key=_says)

    def put_last(self, address: tuple[str, int] | str) -> None:
        """From now on, the server with the address of a connection is tried last."""
        self._servers.sort(key=lambda server: _is_at(server, address))

    async def _connect_to(self, server: tuple[str, int | None], dsn: str, **options: Any) -> Any:
        host, port = server
        address = {"host": host} if port is None else {"host": host, "port": port}
        connection = await self._connect(dsn, **address, **self._attributes, **options)
        self._servers.sort(key=lambda each: each != server)
        return connection

    @staticmethod
    async def _connect(dsn: str, **options: Any) -> Any:
        try:
            return await cast(Any, asyncpg).connect(dsn, **options)
        except asyncpg.TargetServerAttributeNotMatched as error:
            raise NoPrimary(str(error)) from error


def _is_at(server: tuple[str, int | None], address: tuple[str, int] | str) -> bool:
    host, port = server
    if isinstance(address, str):  # the path of a socket
        return address.rpartition("/")[0] == host and (port is None or address.endswith(f".{port}"))
    return address[0] == host and (port is None or address[1] == port)


def _says(error: Exception) -> int:
    """How much the error of one of several servers says: a refusal most, then that none of them is the primary."""
    if isinstance(error, asyncpg.PostgresError) and not isinstance(error, _DOWN):
        return 3
    if isinstance(error, NoPrimary):
        return 2
    return 0 if isinstance(error, TimeoutError) else 1


_DOWN: Final = (asyncpg.PostgresConnectionError, asyncpg.OperatorInterventionError)


async def connect(dsn: str, settings: Mapping[str, str] | None = None) -> Any:
    """One connection of the driver that belongs to no pool; `settings` are those of its session.

    Waits at most `CONNECT_SECONDS`, also for a server that starts or recovers from a crash: it answers, and takes no
    sessions yet; and for one to become the primary. Raises the errors of the driver, and `ValueError` for a DSN that it
    cannot read.
    """
    end = time.monotonic() + CONNECT_SECONDS
    named = Servers(dsn)
    while True:
        left = max(CONNECT_POLL_SECONDS, end - time.monotonic())
        try:
            return await named.connect(dsn, timeout=left, server_settings=dict(settings or {}))
        except (asyncpg.CannotConnectNowError, NoPrimary):
            if time.monotonic() + CONNECT_POLL_SECONDS > end:
                raise
            await asyncio.sleep(CONNECT_POLL_SECONDS)


def as_administrator(admin_dsn: str, database: str) -> str:
    """The DSN of a database as the administrator opens it, whose role has no settings of ours: the sessions have."""
    return with_settings(with_database(admin_dsn, database), SAME_EVERYWHERE)


async def wrong_settings(connection: Any) -> list[str]:
    """The names of `SETTINGS` that a session of a service's role has with another value."""
    return await connection.fetchval(_WRONG, list(SETTINGS), list(SETTINGS.values())) or []


async def is_pooled(connection: Any) -> bool:
    """Whether a pooler is between the driver and the server: it sends its own process id."""
    return await connection.fetchval("SELECT pg_backend_pid()") != connection.get_server_pid()


async def problem(dsn: str) -> str:
    """Why a service cannot work through `dsn`, as the end of a sentence; empty if it can.

    Raises the errors of the driver.
    """
    connection = await connect(dsn)
    try:
        async with connection.transaction():  # one session for all that follows
            if await _hands_on_statements(connection):
                return (
                    "goes through a pooler that keeps no prepared statements: it needs PgBouncer 1.21 or newer, in "
                    "transaction mode and with max_prepared_statements above 0; or name the server itself"
                )
            wrong = await wrong_settings(connection)
            encoding = await connection.fetchval("SELECT current_setting('server_encoding')")
        if encoding != ENCODING:
            return f"has the encoding {encoding} instead of {ENCODING}: {NEW_ENCODING}"
        if wrong:
            return (
                f"has other settings ({', '.join(wrong)}) than `mercato migrate` gives to its role: run that first, "
                "and let a pooler connect anew (RECONNECT)"
            )
        return ""
    finally:
        await connection.close()


async def _hands_on_statements(connection: Any) -> bool:
    """Whether a pooler passes names of statements to the server unchanged."""
    try:
        statement = await connection.prepare("SELECT name FROM pg_prepared_statements")
        names = [row["name"] for row in await statement.fetch()]
        return statement.get_name() in names and await is_pooled(connection)
    except (asyncpg.DuplicatePreparedStatementError, asyncpg.InvalidSQLStatementNameError):
        return True
