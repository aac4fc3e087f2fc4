"""Databases and roles: one of each for a service, and no way from one to the other."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator
from typing import Any
from urllib.parse import unquote, urlsplit

import asyncpg
import pytest
import pytest_asyncio

from mercato.chassis.postgres.provisioning import ProvisionError, _require_version, provision, service_dsn
from mercato.testing.cluster import Cluster

SERVICES = ["first", "second"]
numbers = itertools.count(1)


class Place:
    """A prefix of its own on the server of the run."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.admin_dsn = cluster.server.admin_dsn
        self.prefix = f"provision{next(numbers)}_"

    async def provision(self, word: str = "pass/word @:%'1") -> Any:
        return await provision(self.admin_dsn, SERVICES, lambda role: f"{word} {role}", prefix=self.prefix)

    async def remove(self) -> None:
        for service in SERVICES:
            await self.cluster.execute(f'DROP DATABASE IF EXISTS "{self.prefix}{service}" WITH (FORCE)')
            await self.cluster.execute(f'DROP ROLE IF EXISTS "{self.prefix}{service}"')


@pytest_asyncio.fixture
async def place(cluster: Cluster) -> AsyncGenerator[Place]:
    made = Place(cluster)
    yield made
    await made.remove()


async def ask(dsn: str, query: str) -> Any:
    connection = await asyncpg.connect(dsn)
    try:
        return await connection.fetchval(query)
    finally:
        await connection.close()


async def test_each_service_owns_its_database_and_has_no_other_rights(place: Place):
    dsns = await place.provision()
    for service in SERVICES:
        dsn, name = dsns[service], place.prefix + service
        assert await ask(dsn, "SELECT current_database()") == name
        assert await ask(dsn, "SELECT current_user") == name
        powers = "rolsuper OR rolcreaterole OR rolcreatedb OR rolreplication OR rolbypassrls"
        assert await ask(dsn, f"SELECT {powers} FROM pg_roles WHERE rolname = current_user") is False
        await ask(dsn, "CREATE TABLE mine (a int)")


async def test_no_service_reaches_the_database_of_another(place: Place):
    dsns = await place.provision()
    for service, other in (SERVICES, SERVICES[::-1]):
        dsn = dsns[service].replace(f"/{place.prefix}{service}?", f"/{place.prefix}{other}?")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await ask(dsn, "SELECT 1")


async def test_running_it_again_changes_nothing(place: Place):
    dsns = await place.provision()
    await ask(dsns["first"], "CREATE TABLE kept (a int)")
    assert await place.provision() == dsns
    assert await ask(dsns["first"], "SELECT count(*) FROM kept") == 0


async def test_another_password_is_corrected(place: Place):
    before = await place.provision("old")
    after = await place.provision("new")
    assert await ask(after["first"], "SELECT 1") == 1
    with pytest.raises(asyncpg.InvalidPasswordError):
        await ask(before["first"], "SELECT 1")


async def test_a_run_that_was_cut_short_is_completed(place: Place):
    """CREATE DATABASE lets every role connect; a crash right after it must not leave it so."""
    for step in (
        f'CREATE ROLE "{place.prefix}first" LOGIN',
        f'CREATE DATABASE "{place.prefix}first" OWNER "{place.prefix}first"',
    ):
        await place.cluster.execute(step)
    dsns = await place.provision()
    assert await ask(dsns["first"], "SELECT 1") == 1
    dsn = dsns["second"].replace(f"/{place.prefix}second?", f"/{place.prefix}first?")
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await ask(dsn, "SELECT 1")


async def test_processes_that_start_together_do_not_disturb_each_other(place: Place):
    results = await asyncio.gather(*(place.provision() for _ in range(6)))
    assert all(result == results[0] for result in results)
    results = await asyncio.gather(*(place.provision("another") for _ in range(6)))
    assert await ask(results[0]["first"], "SELECT 1") == 1


async def test_an_administrator_without_superuser_is_enough(place: Place):
    admin = f"{place.prefix}admin"
    await place.cluster.execute(f"CREATE ROLE \"{admin}\" LOGIN CREATEROLE CREATEDB PASSWORD 'p'")
    try:
        place.admin_dsn = service_dsn(place.cluster.server.admin_dsn, admin, "p").replace(f"/{admin}?", "/postgres?")
        for word in ("one", "two"):
            dsns = await place.provision(word)
            assert await ask(dsns["second"], "SELECT 1") == 1
    finally:
        await place.remove()
        await place.cluster.execute(f'DROP ROLE "{admin}"')


async def test_an_administrator_without_rights_gets_an_error_that_names_them(place: Place):
    dsns = await place.provision()
    with pytest.raises(ProvisionError, match="CREATEROLE and CREATEDB"):
        await provision(dsns["first"], ["third"], lambda role: "p", prefix=place.prefix)


async def test_no_connection_is_explained_without_the_password():
    with pytest.raises(ProvisionError, match=r"\(/nowhere/postgres\).*check host, port") as caught:
        await provision("postgresql://mercato:geheim@/postgres?host=/nowhere", SERVICES, str)
    assert "geheim" not in str(caught.value)


@pytest.mark.parametrize("dsn", ["postgresql://mercato:geheim/1@host/postgres", "host=/nowhere password=geheim"])
async def test_what_is_no_dsn_is_explained_without_the_password(dsn: str):
    with pytest.raises(ProvisionError, match="a DSN has the form") as caught:
        await provision(dsn, SERVICES, str)
    assert "geheim" not in str(caught.value)


class OldServer:
    """Answers as a PostgreSQL of another version would."""

    def __init__(self, number: int, version: str) -> None:
        self.settings = {"server_version_num": str(number), "server_version": version}

    async def fetchval(self, query: str) -> str:
        return next(value for name, value in self.settings.items() if f"'{name}'" in query)


@pytest.mark.parametrize(("number", "version"), [(150_012, "15.12"), (90_624, "9.6.24")])
async def test_an_old_server_is_refused_with_its_version(number: int, version: str):
    with pytest.raises(ProvisionError, match=f"PostgreSQL {version}; Mercato needs 16"):
        await _require_version(OldServer(number, version))


@pytest.mark.parametrize("number", [160_000, 180_004, 200_001])
async def test_a_new_enough_server_is_accepted(number: int):
    await _require_version(OldServer(number, "x"))


def test_a_password_with_any_character_survives_the_dsn():
    word = "a/b@c:d?e#f%20g"
    parts = urlsplit(
        service_dsn("postgresql://admin:x@db.example:5433/postgres?sslmode=require", "mercato_users", word)
    )
    assert (parts.username, unquote(parts.password or ""), parts.hostname, parts.port, parts.path, parts.query) == (
        "mercato_users", word, "db.example", 5433, "/mercato_users", "sslmode=require",
    )  # fmt: skip
