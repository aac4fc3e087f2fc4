"""The databases of a new shop on several servers get their names on all of them, or on none."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack

import pytest
import pytest_asyncio

from mercato.chassis.postgres.dsn import with_database
from mercato.chassis.postgres.new_databases import SUFFIX, new_databases, take_names
from mercato.chassis.postgres.provisioning import ProvisionError
from mercato.testing.cluster import Cluster
from mercato.testing.tables import connected

PREFIXES = ("new_first_", "new_second_")
"""They stand for the two servers, with the database of each one's lock."""


@pytest_asyncio.fixture
async def admin_dsns(cluster: Cluster) -> AsyncGenerator[list[str]]:
    names = [f"{prefix}lock" for prefix in PREFIXES]
    for name in names:
        await cluster.execute(f"CREATE DATABASE {name}")
    yield [with_database(cluster.server.admin_dsn, name) for name in names]
    for name in [*names, *(await databases(cluster))]:
        await cluster.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
    for prefix in PREFIXES:
        await cluster.execute(f"DROP ROLE IF EXISTS {prefix}orders")


async def databases(cluster: Cluster) -> set[str]:
    async with connected(cluster.server.admin_dsn) as connection:
        found = await connection.fetch("SELECT datname FROM pg_database WHERE datname LIKE 'new\\_%orders%'")
    return {name for (name,) in found}


async def made(admin_dsns: list[str], cluster: Cluster, taken: str = "") -> None:
    """Makes the databases of orders on both; `taken` is a database that another process makes meanwhile."""
    async with AsyncExitStack() as stack:
        new = [
            await stack.enter_async_context(new_databases(dsn, ["orders"], lambda role: f"of {role}", prefix=prefix))
            for dsn, prefix in zip(admin_dsns, PREFIXES, strict=True)
        ]
        assert await databases(cluster) == {f"{prefix}orders{SUFFIX}" for prefix in PREFIXES}
        if taken:
            await cluster.execute(f"CREATE DATABASE {taken}")
        await take_names(new)


async def test_databases_get_their_names_on_all_servers(cluster: Cluster, admin_dsns: list[str]):
    await made(admin_dsns, cluster)

    assert await databases(cluster) == {f"{prefix}orders" for prefix in PREFIXES}


@pytest.mark.parametrize("prefix", PREFIXES)
async def test_a_name_that_is_taken_on_one_server_leaves_no_database_on_the_others(
    cluster: Cluster, admin_dsns: list[str], prefix: str
):
    with pytest.raises(ProvisionError, match="has databases of a shop already"):
        await made(admin_dsns, cluster, taken=f"{prefix}orders")

    assert await databases(cluster) == {f"{prefix}orders"}
