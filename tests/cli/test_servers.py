"""How the servers of a shop are named: each service is on exactly one, and no password is in a message."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from mercato import topology
from mercato.chassis.hosting.settings import Settings
from mercato.cli.servers import given, parsed
from mercato.cli.starting import CannotStart

FIRST = "postgresql://admin:hunter2@first/postgres?sslmode=require"
SECOND = "postgres://admin:hunter2@second/postgres?options=-c%20jit%3Doff"
ALL = ",".join(topology.SERVICES)


def test_a_dsn_alone_has_all_services():
    assert parsed([FIRST]).by_dsn == {FIRST: list(topology.SERVICES)}


@pytest.mark.parametrize(
    "dsns",
    [
        [FIRST, f"orders,payments={SECOND}"],
        [FIRST, f"payments, orders={SECOND}"],
        [f"orders={SECOND}", f"payments={SECOND}", FIRST],
    ],
)
def test_the_services_of_a_server_are_named_and_all_others_are_on_the_one_without_names(dsns: Sequence[str]):
    servers = parsed(dsns)
    assert servers.by_dsn[SECOND] == ["payments", "orders"]
    assert servers.by_dsn[FIRST] == [name for name in topology.SERVICES if name not in ("orders", "payments")]
    assert servers.first == (SECOND if dsns[0].startswith("orders") else FIRST)


def test_options_count_and_else_the_variable_with_spaces_between():
    settings = Settings.model_validate({"postgres_dsn": f"orders={SECOND}\n {FIRST}"})
    named = given((), settings)
    assert named is not None
    assert dict(named.by_dsn) == dict(parsed([FIRST, f"orders={SECOND}"]).by_dsn)
    assert given((FIRST,), settings) == parsed([FIRST])
    assert given((), Settings()) is None


@pytest.mark.parametrize(
    ("dsns", "words"),
    [
        ([FIRST, SECOND], "names 2 servers without their services: write --dsn users,products=DSN --dsn DSN"),
        ([f"order={SECOND}", FIRST], "names 'order', which is no service: users, products, inventory"),
        ([f"orders={SECOND}", f"orders={FIRST}", FIRST], "names two servers for orders: it has one database"),
        ([f"{ALL.replace('users,', '')}={SECOND}"], "names no server for users: add --dsn DSN, the server of all"),
        ([f"{ALL}={SECOND}", FIRST], "names a server for each service, and one without: leave that out"),
    ],
)
def test_servers_that_cannot_be_are_refused(dsns: Sequence[str], words: str):
    with pytest.raises(CannotStart) as refusal:
        parsed(dsns)
    assert words in str(refusal.value)
    assert "hunter2" not in str(refusal.value)
