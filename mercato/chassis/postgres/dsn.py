"""DSNs: the same server with another database, and the parts of a DSN without secrets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlencode, urlsplit, urlunsplit

DSN_FORM: Final = (
    "a DSN has the form postgresql://USER:PASSWORD@HOST:PORT/DATABASE, with %XX for special characters in the password"
)


LOCAL: Final = "localhost"
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


def servers(dsn: str) -> Sequence[tuple[str, int | None]]:
    """Host and port of each server that a DSN names, in its order, as the driver reads them; None: no port is named.

    `postgresql://USER:PASSWORD@one:5432,two:5432/DATABASE`, or `?host=one,two&port=5432`. Raises `ValueError`.
    """
    return _servers(urlsplit(dsn))


def _servers(parts: SplitResult) -> Sequence[tuple[str, int | None]]:
    named = parts.netloc.rpartition("@")[2]
    if named:  # the driver then passes over those behind the question mark
        return [(unquote(host), port) for host, port in map(_server, named.split(","))]
    asked = dict(parse_qsl(parts.query, strict_parsing=True) if parts.query else ())
    found = [_server(text) for text in asked.get("host", LOCAL).split(",")]
    ports = [int(port) for port in asked["port"].split(",")] if asked.get("port") else [None]
    if len(ports) not in (1, len(found)):
        raise ValueError(f"{len(found)} hosts have {len(ports)} ports")
    ports *= len(found) // len(ports)
    return [(host, own if port is None else port) for (host, own), port in zip(found, ports, strict=True)]


def _server(text: str) -> tuple[str, int | None]:
    if text.startswith("/"):  # the folder of a socket
        return text, None
    if text.startswith("["):
        host, _, port = text[1:].partition("]")
        port = port.removeprefix(":")
    else:
        host, _, port = text.partition(":")
    return host or LOCAL, int(port) if port else None


def lacks_certificates(dsn: str) -> str:
    """What is missing for the verification of the server that a DSN asks for, as the end of a sentence; empty: nothing.

    The driver takes the authorities from `sslrootcert`, else from a file in the home folder; not those of the system.
    """
    asked = dict(parse_qsl(urlsplit(dsn).query))
    if asked.get("sslmode") not in ("verify-ca", "verify-full"):
        return ""
    named = asked.get("sslrootcert")
    try:
        file = Path(named) if named is not None else Path.home() / ".postgresql/root.crt"
        is_there = file.is_file()
    except RuntimeError:  # the account has no home
        is_there = False
    if is_there:
        return ""
    reason = "without the certificates to do it by" if named is None else f"and {named} is not a file"
    return f"{reason}: add &sslrootcert=FILE, such as /etc/ssl/certs/ca-certificates.crt for public authorities"


def shown(dsn: str) -> str:
    """Hosts, ports and database of a DSN, without secrets. `NO_SECRETS` if the secret parts cannot be recognized."""
    try:
        parts = urlsplit(dsn)
        named = _servers(parts)
    except ValueError:
        return NO_SECRETS
    # A slash, question mark or number sign in a password would end the host for a parser.
    is_cut_short = "@" in parts.path + parts.query or parts.fragment
    if parts.scheme not in ("postgresql", "postgres") or is_cut_short:
        return NO_SECRETS
    where = ",".join(f"{host}{f':{port}' if port else ''}" for host, port in named)
    return f"{where}{parts.path.rstrip('/')}"
