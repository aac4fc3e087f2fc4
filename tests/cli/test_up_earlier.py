"""Databases of another version: refused with a sentence, left as they are, and still good for the version of theirs."""

from __future__ import annotations

import asyncio
import hashlib
import json
import subprocess
from collections.abc import Generator, Mapping
from pathlib import Path

import asyncpg
import pytest

from mercato import topology
from mercato.chassis.postgres.dsn import with_database
from mercato.chassis.postgres.migrations import migrate
from mercato.chassis.postgres.provisioning import provision
from mercato.testing.cluster import Cluster
from mercato.testing.command import COMMAND, ROOT, run_command
from mercato.testing.process import Process, cluster_of, data_folder

EARLIER = "b01daaaf3141c2b70d5c24552955744ad62b4a95"
"""The last commit before revisions had checksums."""


def fingerprint(data: Path) -> Mapping[str, tuple[int, bytes]]:
    """Each file of a data folder and of its cluster: when it was written, and what is in it."""
    files = {path for folder in (data, cluster_of(data)) for path in folder.rglob("*") if path.is_file()}
    return {str(path): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).digest()) for path in files}


def complaint(*command: str, environment: Mapping[str, str] | None = None) -> str:
    """The one sentence of a command that cannot do what it is asked to."""
    done = run_command(*command, environment=environment)
    assert done.returncode != 0
    [sentence] = done.stderr.splitlines()
    return sentence.removeprefix("mercato: ")


def assert_refused(data: Path) -> None:
    """By each command that would use the databases; and not a file changes."""
    before = fingerprint(data)
    with Process(data) as shop:
        sentences = [shop.refusal()]
    sentences += [complaint(*command, "--data", str(data)) for command in (["audit"], ["events", "tail"])]
    for sentence in sentences:
        assert f"The shop in {data} was made by an earlier commit of Mercato" in sentence
        assert "start it with the commit that made it, or begin a new shop in another folder (--data)" in sentence
    assert fingerprint(data) == before


@pytest.mark.long
def test_a_folder_without_the_mark_of_this_format_is_refused_and_left_as_it_is():
    with data_folder() as data:
        with Process(data) as shop:
            shop.ready().stop()
        record = json.loads((data / "postgres.json").read_bytes())
        del record["format"]
        (data / "postgres.json").write_text(json.dumps(record))

        assert_refused(data)


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """The code of the commit `EARLIER`."""
    if subprocess.run(["git", "cat-file", "-e", f"{EARLIER}^{{commit}}"], cwd=ROOT, capture_output=True).returncode:
        pytest.skip(f"the history of this checkout does not reach back to {EARLIER}")
    code = tmp_path / "earlier"
    code.mkdir()
    archive = subprocess.run(["git", "archive", EARLIER, "mercato"], cwd=ROOT, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", str(code)], input=archive, check=True)
    return code


@pytest.mark.slow
@pytest.mark.long
def test_a_folder_of_an_earlier_commit_still_serves_that_commit(earlier: Path):
    environment = {"PYTHONPATH": str(earlier)}
    with data_folder() as data:
        with Process(data, environment=environment, command=COMMAND) as shop, shop.ready().caller() as caller:
            order = caller.order("before-and-after").json["id"]
            shop.stop()

        assert_refused(data)

        with Process(data, environment=environment, command=COMMAND) as shop, shop.ready().caller() as caller:
            assert caller.get(f"/orders/{order}").status == 200
            assert caller.order("before-and-after").json["id"] == order
            shop.stop()


# ------------------------------------------------------------------------------------------------- on a server by DSN


@pytest.fixture
def admin_dsn(cluster: Cluster) -> Generator[str]:
    """A server with the databases of a shop, whose roles have passwords that no secret gives."""
    dsn = cluster.server.admin_dsn
    asyncio.run(make_databases(dsn))
    yield dsn
    for name in topology.SERVICES:
        asyncio.run(execute(dsn, f"DROP DATABASE IF EXISTS mercato_{name} WITH (FORCE)"))


async def make_databases(admin_dsn: str) -> None:
    dsns = await provision(admin_dsn, list(topology.SERVICES), lambda role: f"password of {role}")
    for name, dsn in dsns.items():
        await migrate(dsn, topology.migrations(name))


async def execute(dsn: str, statement: str) -> None:
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


async def state(admin_dsn: str) -> list[str]:
    """Databases, roles with their passwords, and every relation of two of the databases."""
    asked = {
        admin_dsn: """
            SELECT rolname || ' ' || coalesce(rolpassword, '') FROM pg_authid
            UNION ALL SELECT datname || ' ' || coalesce(datacl::text, '') FROM pg_database
            """
    }
    for name in ("orders", "payments"):
        asked[with_database(admin_dsn, f"mercato_{name}")] = "SELECT relname || ' ' || xmin FROM pg_class"
    found: list[str] = []
    for dsn, query in asked.items():
        connection = await asyncpg.connect(dsn)
        try:
            found += sorted(row[0] for row in await connection.fetch(query))
        finally:
            await connection.close()
    return found


@pytest.mark.long
def test_databases_of_another_version_are_refused_and_left_as_they_are(admin_dsn: str, tmp_path: Path):
    """Of seven databases one is of another version, and one is missing: none is made or changed."""
    asyncio.run(execute(admin_dsn, "DROP DATABASE mercato_users WITH (FORCE)"))
    for statement, words in (
        ("UPDATE revision_checksums SET checksum = 'another'", "was run with statements that are not those of this"),
        ("DROP TABLE revision_checksums", "was made by a commit of mercato from before its revisions had checksums"),
    ):
        asyncio.run(execute(with_database(admin_dsn, "mercato_orders"), statement))
        before = asyncio.run(state(admin_dsn))

        with Process(tmp_path / "data", environment={"MERCATO_POSTGRES_DSN": admin_dsn}) as shop:
            assert_says(shop.refusal(), words)
        assert asyncio.run(state(admin_dsn)) == before
    asyncio.run(execute(admin_dsn, "CREATE DATABASE mercato_users OWNER mercato_users"))
    assert_says(complaint("audit", "--dsn", admin_dsn), words)
    assert_says(complaint("events", "dead", "--dsn", admin_dsn), words)


def assert_says(sentence: str, words: str) -> None:
    assert "the database mercato_orders" in sentence
    assert words in sentence
    assert "start it with the commit of mercato that made it" in sentence
