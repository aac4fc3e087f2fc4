"""All databases at one moment: no transaction is half in it, and none is held up for long."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from typing import Any, cast

import asyncpg
import pytest
import pytest_asyncio

from mercato import topology
from mercato.operations import copying
from mercato.operations.copying import CopyError, Moment, connected, one_moment
from mercato.testing.cluster import Cluster


@pytest_asyncio.fixture
async def dsns(cluster: Cluster) -> AsyncGenerator[Mapping[str, str]]:
    """Two databases with a table `notes`."""
    names = {"first": "events", "second": "sandbox"}
    made = {name: await cluster.fresh_database(of, topology.migrations(of)) for name, of in names.items()}
    for dsn in made.values():
        async with connected(dsn, "a test") as connection:
            await connection.execute("CREATE TABLE notes (number int)")
    yield made
    for dsn in made.values():
        await cluster.release_database(dsn)


async def numbers(moment: Moment, name: str) -> list[int]:
    connection, _ = moment.snapshots[name]
    return [number for (number,) in await connection.fetch("SELECT number FROM notes ORDER BY number")]


async def test_a_transaction_that_writes_is_waited_for(dsns: Mapping[str, str]):
    writer = await cast(Any, asyncpg).connect(dsns["first"])
    must_wait = asyncio.Event()

    async def write() -> None:
        await must_wait.wait()
        await writer.execute("COMMIT")

    await writer.execute("BEGIN; INSERT INTO notes VALUES (1)")
    writing = asyncio.create_task(write())
    async with one_moment(dsns, progress=lambda _line: must_wait.set()) as moment:
        assert await numbers(moment, "first") == [1]
        assert moment.tries > 1
        # Writes go on while the snapshots are read, which do not see them.
        await writer.execute("INSERT INTO notes VALUES (2)")
        assert await numbers(moment, "first") == [1]
    await writing
    await writer.close()


async def test_a_transaction_without_an_end_is_not_waited_for(dsns: Mapping[str, str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(copying, "PAUSE_TRIES", 2)
    writer = await cast(Any, asyncpg).connect(dsns["second"])
    await writer.execute("BEGIN; INSERT INTO notes VALUES (1)")

    with pytest.raises(CopyError, match="try again when there is less to do"):
        async with one_moment(dsns, progress=lambda _line: None):
            pass
    await writer.execute("COMMIT")
    await writer.close()
