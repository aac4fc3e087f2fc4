"""`mercato restore --dsn`: a new shop on a PostgreSQL that is run by its operator."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncGenerator, Generator, Mapping
from pathlib import Path

import pytest
import pytest_asyncio

from cli.test_audit import make_shop
from cli.test_backup import done, finished, place, refused, start
from mercato import topology
from mercato.chassis.postgres.new_databases import LOCK_KEY, SUFFIX
from mercato.testing.cluster import Cluster
from mercato.testing.process import Process, data_folder
from mercato.testing.tables import connected

__all__ = ["place"]

pytestmark = [pytest.mark.long, pytest.mark.asyncio(loop_scope="session")]


@pytest.fixture(scope="module")
def shop() -> Generator[Path]:
    with data_folder() as data:
        asyncio.run(make_shop(data))
        yield data


@pytest_asyncio.fixture(loop_scope="session")
async def server() -> AsyncGenerator[Cluster]:
    """A server without a shop."""
    server = await Cluster.start()
    yield server
    await server.stop()


async def names(server: Cluster) -> set[str]:
    async with connected(server.server.admin_dsn) as connection:
        found = await connection.fetch("SELECT datname FROM pg_database WHERE datname LIKE 'mercato%'")
    return {name for (name,) in found}


WHOLE = {f"mercato_{service}" for service in topology.SERVICES}


async def test_a_shop_is_restored_onto_a_server_and_starts_there(shop: Path, place: Path, server: Cluster):
    dsn = server.server.admin_dsn
    backup = await asyncio.to_thread(done, "backup", place / "shop", "--data", shop)

    restored = await asyncio.to_thread(done, "restore", place / "shop", "--dsn", dsn)

    assert restored["holds"]
    assert restored["rows"] == backup["rows"]
    assert "test-password" not in restored["server"]
    assert await names(server) >= WHOLE
    assert not any(name.endswith(SUFFIX) for name in await names(server))

    def runs() -> None:
        with Process(place / "data", environment={"MERCATO_POSTGRES_DSN": dsn}) as running:
            assert running.ready().caller().get("/orders/1").status == 200
            running.stop()

    await asyncio.to_thread(runs)
    sentence = await asyncio.to_thread(refused, "restore", place / "shop", "--dsn", dsn)
    assert "has databases of a shop already" in sentence
    assert "test-password" not in sentence
    assert await names(server) >= WHOLE


async def test_a_killed_restore_leaves_no_shop_and_the_next_one_works(shop: Path, place: Path, server: Cluster):
    dsn = server.server.admin_dsn
    environment = {"MERCATO_POSTGRES_DSN": dsn}
    await asyncio.to_thread(done, "backup", place / "shop", "--data", shop)

    def killed() -> None:
        running = start("restore", place / "shop", environment=environment)
        assert running.stdout is not None
        while "restoring payments" not in (line := running.stdout.readline()):
            assert line, "it ended before it restored payments"
        running.send_signal(signal.SIGKILL)
        running.communicate()

    await asyncio.to_thread(killed)

    assert not await names(server) & WHOLE
    assert {f"{name}{SUFFIX}" for name in WHOLE} <= await names(server)
    assert (await asyncio.to_thread(done, "restore", place / "shop", environment=environment))["holds"]
    assert not any(name.endswith(SUFFIX) for name in await names(server))


async def test_an_interrupted_restore_leaves_no_database(shop: Path, place: Path, server: Cluster):
    await asyncio.to_thread(done, "backup", place / "shop", "--data", shop)

    def interrupted() -> int:
        running = start("restore", place / "shop", "--dsn", server.server.admin_dsn)
        assert running.stdout is not None
        while "restoring payments" not in (line := running.stdout.readline()):
            assert line, "it ended before it restored payments"
        running.send_signal(signal.SIGINT)
        return finished(running)[0]

    assert await asyncio.to_thread(interrupted) == 130
    assert await names(server) == set()


async def test_two_concurrent_restores_do_not_share_a_server(shop: Path, place: Path, server: Cluster):
    await asyncio.to_thread(done, "backup", place / "shop", "--data", shop)
    async with connected(server.server.admin_dsn) as other:
        await other.execute(f"SELECT pg_advisory_lock({LOCK_KEY})")
        sentence = await asyncio.to_thread(refused, "restore", place / "shop", "--dsn", server.server.admin_dsn)

    assert "another restore runs on" in sentence
    assert await names(server) == set()


@pytest.mark.parametrize(
    ("options", "environment", "words"),
    [
        ((), {}, "name a folder for the new shop with --data, or a server with --dsn"),
        (("--data", "/nowhere/new", "--dsn", "postgresql://localhost/x"), {}, "a new shop is in one place"),
        (("--data", "/nowhere/new"), {"MERCATO_POSTGRES_DSN": "postgresql://localhost/x"}, "without --data"),
        (("--dsn", "postgresql://someone:hunter2@127.0.0.1:1/x"), {}, "no connection with"),
    ],
)
async def test_the_target_of_a_restore_is_given_once(
    place: Path, shop: Path, options: tuple[str, ...], environment: Mapping[str, str], words: str
):
    await asyncio.to_thread(done, "backup", place / "shop", "--data", shop)

    code, _, errors = await asyncio.to_thread(
        lambda: finished(start("restore", place / "shop", *options, "--json", environment=environment))
    )

    assert code == 2
    [sentence] = errors.splitlines()
    assert words in sentence
    assert "hunter2" not in sentence
    assert os.listdir(place) == ["shop"]
