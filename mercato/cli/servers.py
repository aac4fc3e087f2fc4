"""The PostgreSQL servers of a shop, as `--dsn` and MERCATO_POSTGRES_DSN name them.

--dsn DSN                                          one server has the databases of all services
--dsn users,products=DSN --dsn DSN                 that of some services is elsewhere, all others are on the last
MERCATO_POSTGRES_DSN='users,products=DSN DSN'      the same, where no other account of the machine reads the passwords
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from mercato import topology
from mercato.chassis.hosting import settings as config
from mercato.cli.starting import CannotStart

FORM: Final = re.compile(r"([^=:/]+)=(postgres(?:ql)?:.*)", re.DOTALL)
"""The services of a server, and its DSN."""
EXAMPLE: Final = "--dsn users,products=DSN --dsn DSN"


class Servers(msgspec.Struct, frozen=True):
    """An administrator's DSN of each server of a shop, and the services whose databases it has."""

    by_dsn: Mapping[str, Sequence[str]]
    """In the order in which they were given."""

    @property
    def first(self) -> str:
        return next(iter(self.by_dsn))

    @property
    def are_several(self) -> bool:
        return len(self.by_dsn) > 1


def given(dsns: Sequence[str], settings: config.Settings) -> Servers | None:
    """The servers in the options, else in the environment; None: none is named. Raises `CannotStart`."""
    if not dsns and settings.postgres_dsn is not None:
        dsns = settings.postgres_dsn.get_secret_value().split()
    return parsed(dsns) if dsns else None


def parsed(dsns: Sequence[str]) -> Servers:
    """Raises `CannotStart` unless each service is on exactly one server. No DSN is in the message."""
    named: dict[str, str] = {}
    rest: list[str] = []
    order: list[str] = []
    for entry in dsns:
        matched = FORM.fullmatch(entry)
        dsn = matched[2] if matched else entry
        order.append(dsn)
        if matched is None:
            rest.append(dsn)
            continue
        for name in filter(None, re.split(r"[ ,]+", matched[1])):
            if name not in topology.SERVICES:
                raise CannotStart(f"--dsn names {name!r}, which is no service: {', '.join(topology.SERVICES)}")
            if name in named:
                raise CannotStart(f"--dsn names two servers for {name}: it has one database")
            named[name] = dsn
    if len(rest) > 1:
        raise CannotStart(f"--dsn names {len(rest)} servers without their services: write {EXAMPLE}")
    others = [name for name in topology.SERVICES if name not in named]
    if others and not rest:
        raise CannotStart(f"--dsn names no server for {', '.join(others)}: add --dsn DSN, the server of all others")
    if rest and not others:
        raise CannotStart("--dsn names a server for each service, and one without: leave that out")
    where = {**dict.fromkeys(others, rest[0] if rest else ""), **named}
    return Servers({dsn: [name for name in topology.SERVICES if where[name] == dsn] for dsn in dict.fromkeys(order)})
