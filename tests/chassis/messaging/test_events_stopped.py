"""A process that stops (SIGSTOP) while it commits events, and a server that dies right after a commit was seen."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from chassis.messaging.harness import MIGRATIONS, SOURCE, Changed, OutboxRow
from mercato.chassis.messaging.events import Outgoing
from mercato.chassis.postgres.database import Database
from mercato.chassis.postgres.migrations import migrate
from mercato.embedded_postgres import EmbeddedPostgres, remove_cluster
from mercato.testing import databases
from mercato.testing.cluster import Cluster

STOPS = 40
DELAY_SECONDS = 1.0
"""By the requirement. A commit takes milliseconds; a writer that waited for the stopped process would never end."""


opened = functools.partial(databases.opened, name=SOURCE, size=2)


@pytest_asyncio.fixture
async def dsn(cluster: Cluster) -> AsyncGenerator[str]:
    async with databases.fresh_dsn(cluster, "messaging", MIGRATIONS) as made:
        yield made


def changed(subject_id: int, version: int) -> Outgoing:
    return Outgoing("thing.changed", "thing", subject_id, version, Changed(n=version))


WRITER = """
import asyncio, sys
from chassis.messaging.harness import Changed
from mercato.chassis.postgres.database import Database
from mercato.chassis.messaging.events import Outgoing
from mercato.chassis.observability.telemetry import Telemetry

async def main():
    database = Database(sys.argv[1], "shop", Telemetry(), size=1)
    await database.open()
    version = 0
    while True:
        version += 1
        async with database.transaction() as tx:
            tx.emit([Outgoing("thing.changed", "thing", 1, version, Changed(n=version))] * 20)
        if version == 1:
            print("writes", flush=True)

asyncio.run(main())
"""


@contextlib.asynccontextmanager
async def writer(dsn: str) -> AsyncGenerator[int]:
    """Another process, which writes events without a pause; gives its pid."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", WRITER, dsn, stdout=asyncio.subprocess.PIPE, env=environment
    )
    assert process.stdout
    try:
        assert await process.stdout.readline() == b"writes\n"
        yield process.pid
    finally:
        process.kill()
        await process.wait()


async def test_a_process_that_is_stopped_while_it_commits_holds_up_no_other(dsn: str):
    """Wherever it is stopped, the server needs nothing more from it to commit what it has the lock for."""
    delays: list[float] = []
    async with opened(dsn) as database, writer(dsn) as pid:
        for n in range(STOPS):
            await asyncio.sleep(random.uniform(0.005, 0.03))
            os.kill(pid, signal.SIGSTOP)
            try:
                began = time.monotonic()
                async with asyncio.timeout(5 * DELAY_SECONDS), database.transaction() as tx:
                    await tx.execute("SET LOCAL lock_timeout = '100ms'")  # there is no false refusal, either
                    tx.emit([changed(2, n)])
                delays.append(time.monotonic() - began)
            finally:
                os.kill(pid, signal.SIGCONT)
    assert max(delays) < DELAY_SECONDS


@pytest.fixture
def folder() -> Iterator[Path]:
    """A data folder that the server's account reaches."""
    with tempfile.TemporaryDirectory(prefix="mercato-test-") as outer:
        Path(outer).chmod(0o755)
        made = Path(outer) / "postgres"
        made.mkdir(mode=0o755)
        yield made
        remove_cluster(made)


@contextlib.asynccontextmanager
async def served(folder: Path) -> AsyncGenerator[tuple[EmbeddedPostgres, Database]]:
    server = await EmbeddedPostgres.start(folder, password="test", progress=lambda _line: None)
    try:
        await migrate(server.admin_dsn, MIGRATIONS)
        async with opened(server.admin_dsn) as database:
            yield server, database
    finally:
        await server.stop()


async def test_a_position_that_was_seen_is_never_given_to_another_event(folder: Path):
    """The server dies right after a reader has seen a row, again and again."""
    seen: dict[int, str] = {}
    for round_ in range(3):
        async with served(folder) as (server, database):
            assert await rows_of(database) == seen
            for n in range(10):
                async with database.transaction() as tx:
                    tx.emit([changed(round_, n)])
            found = await rows_of(database)
            assert len(found) == len(seen) + 10
            seen = found
            os.kill(server.pid, signal.SIGQUIT)  # it ends at once, and writes nothing more
    async with served(folder) as (_, database):
        assert await rows_of(database) == seen


async def rows_of(database: Database) -> dict[int, str]:
    async with database.read() as tx:
        return {row.id: row.events for row in await tx.fetch(OutboxRow, "SELECT id, events FROM outbox")}
