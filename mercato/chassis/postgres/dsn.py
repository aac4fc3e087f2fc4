"""DSNs: the same server with another database, and the parts of a DSN without secrets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final
from urllib.parse import parse_qsl, quote, urlencode, urlsplit, urlunsplit

DSN_FORM: Final = (
    "a DSN has the form postgresql://USER:PASSWORD@HOST:PORT/DATABASE, with %XX for special characters in the password"
)


NO_SECRETS: Final = "the given DSN"
"""Shown instead of a DSN whose secret parts cannot be recognized."""


def with_database(dsn: str, name: str) -> str:
    """The same server and role, another database."""
    return urlunsplit(urlsplit(dsn)._replace(path=f"/{quote(name, safe='')}"))


def with_settings(dsn: str, settings: Mapping[str, str]) -> str:
    """The same server, role and database, whose sessions have these settings."""
    parts = urlsplit(dsn)
    return urlunsplit(parts._replace(query=urlencode({**dict(parse_qsl(parts.query)), **settings})))


def with_server(dsn: str, host: str, port: int) -> str:
    """The same role and database through another address."""
    parts = urlsplit(dsn)
    user, at, _ = parts.netloc.rpartition("@")
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    query = urlencode([(name, value) for name, value in parse_qsl(parts.query) if name not in ("host", "port")])
    return urlunsplit(parts._replace(netloc=user + at + address, query=query))


def shown(dsn: str) -> str:
    """Host, port and database of a DSN, without secrets. `NO_SECRETS` if the secret parts cannot be recognized."""
    try:
        parts = urlsplit(dsn)
        asked = dict(parse_qsl(parts.query, strict_parsing=True) if parts.query else ())
        host, port = asked.get("host", parts.hostname), asked.get("port", parts.port)
    except ValueError:
        return NO_SECRETS
    # A slash, question mark or number sign in a password would end the host for a parser.
    is_cut_short = "@" in parts.path + parts.query or parts.fragment
    if parts.scheme not in ("postgresql", "postgres") or is_cut_short:
        return NO_SECRETS
    return f"{host or 'localhost'}{f':{port}' if port else ''}{parts.path.rstrip('/')}"
