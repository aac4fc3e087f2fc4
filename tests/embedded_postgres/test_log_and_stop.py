"""What the embedded PostgreSQL writes into its log, and the time that its stop may take."""

# Nothing else runs on the loop.

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import stat
import sys
from pathlib import Path

import asyncpg
import pytest

from embedded_postgres.test_postgres import PASSWORD, alive, ask, data, empty, home, quietly, running
from embedded_postgres.test_recovery import killed_server, recovering, slowed
from mercato.embedded_postgres import EmbeddedPostgres, server_log
from mercato.embedded_postgres.guarded import Guarded
from mercato.testing.waiting import BOUND_SECONDS

__all__ = ["data", "empty"]

pytestmark = [
    pytest.mark.asyncio,
    pytest.mark.postgres,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc"),
]

SECRET = "of.a.customer@example.com"


def log_of(data: Path) -> str:
    return (data / "postgres.log").read_text()


async def test_the_log_is_private_also_one_that_was_not(data: Path):
    (data / "postgres.log").touch(mode=0o644)
    (data / "postgres.log").chmod(0o644)

    async with running(data):
        assert stat.S_IMODE((data / "postgres.log").stat().st_mode) == 0o600


async def test_the_log_has_what_failed_and_no_values(data: Path):
    async with running(data) as server:
        await ask(server, "CREATE TABLE people (email text PRIMARY KEY CHECK (email <> 'no'))")
        await ask(server, f"INSERT INTO people VALUES ('{SECRET}')")
        connection = await asyncpg.connect(server.admin_dsn)
        with pytest.raises(asyncpg.UniqueViolationError):
            await connection.execute(f"INSERT INTO people VALUES ('{SECRET}')")
        with pytest.raises(asyncpg.UniqueViolationError):
            await connection.execute("INSERT INTO people VALUES ($1)", SECRET)
        with pytest.raises(asyncpg.UndefinedTableError):
            await connection.execute(f"INSERT INTO nowhere VALUES ('{SECRET}')")
        await connection.close()

    log = log_of(data)
    assert 'duplicate key value violates unique constraint "people_pkey"' in log
    assert 'relation "nowhere" does not exist' in log
    assert SECRET not in log


async def test_the_log_of_a_server_that_runs_is_bounded(data: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(server_log, "BYTES_MAX", 20_000)
    monkeypatch.setattr(server_log, "LOOK_SECONDS", 0.02)
    former = data / "postgres.log.1"
    async with running(data) as server:
        for _ in range(2):
            former.unlink(missing_ok=True)
            await ask(server, "DO $$ BEGIN FOR i IN 1..500 LOOP RAISE LOG 'a line of the log'; END LOOP; END $$")
            async with asyncio.timeout(BOUND_SECONDS):
                while not (former.exists() and (data / "postgres.log").stat().st_size < server_log.BYTES_MAX):
                    await asyncio.sleep(0.02)
            assert former.stat().st_size <= server_log.BYTES_MAX
            assert stat.S_IMODE(former.stat().st_mode) == 0o600


async def test_a_log_that_cannot_be_kept_is_emptied_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As on a disk that is full, which needs the space."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(server_log, "BYTES_MAX", 10)
    monkeypatch.setattr(server_log.shutil, "copyfileobj", full)
    log = tmp_path / "postgres.log"
    log.write_bytes(bytes(20))

    assert server_log.rotate(log)
    assert log.stat().st_size == 0


async def test_a_start_that_waits_for_a_recovery_writes_nothing_into_the_log(data: Path):
    await killed_server(data)
    before = len(log_of(data))

    with slowed(data, run_s=0.001, stop_s=0.1, seconds=3.0):
        async with running(data):
            pass

    assert "database system is ready" in log_of(data)[before:]
    assert "FATAL" not in log_of(data)[before:]


def checkpointer(data: Path) -> int:
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            title = (process / "cmdline").read_bytes()
            if title.startswith(b"postgres: checkpointer") and os.readlink(process / "cwd") == f"{home(data)}/postgres":
                return int(process.name)
    raise AssertionError("no checkpointer")


LONG_CHECKPOINT = """
import os, signal, subprocess, sys
def finish(*_):
    title = "postgres: checkpointer performing shutdown checkpoint"
    work = "import time; [time.sleep(0.1) for _ in range(50)]"
    subprocess.run([title, "-c", work], executable=sys.executable)
    os._exit(0)
signal.signal(signal.SIGINT, finish)
print("pausing", file=sys.stderr, flush=True)
while True:
    signal.pause()
"""
"""A server whose shutdown writes a checkpoint for five seconds."""


@pytest.mark.parametrize("is_patient", [True, False])
async def test_a_stop_waits_for_a_checkpoint_that_goes_on_and_the_death_of_the_owner_does_not(
    tmp_path: Path, is_patient: bool
):
    with (tmp_path / "log").open("wb") as log:
        server = await Guarded.start([sys.executable, "-c", LONG_CHECKPOINT], None, errors=log.fileno())
    async with asyncio.timeout(BOUND_SECONDS):
        while "pausing" not in (tmp_path / "log").read_text():
            await asyncio.sleep(0.02)

    if is_patient:
        server.ask_to_finish()
    else:
        server.ask_to_stop()  # as the end of the pipe, which is all that is left of an owner that died

    # A busy machine may need longer for SIGQUIT than is left to it.
    at_once = ("it was killed by SIGQUIT", "it was killed by SIGKILL")
    assert await server.ended() in (("it exited with code 0",) if is_patient else at_once)


async def test_a_stopped_server_has_written_its_checkpoint(data: Path):
    async with running(data) as server:
        await ask(server, "CREATE TABLE numbers AS SELECT generate_series(1, 100000)")
        assert checkpointer(data), "the guard looks for it"
    assert "database system is shut down" in log_of(data)
    before = len(log_of(data))
    async with running(data):
        assert "was not properly shut down" not in log_of(data)[before:]


async def test_a_stop_does_not_wait_for_a_server_that_does_nothing(data: Path):
    server = await EmbeddedPostgres.start(data, password=PASSWORD, progress=quietly)
    stopped = checkpointer(data)
    os.kill(stopped, signal.SIGSTOP)

    await asyncio.wait_for(server.stop(), BOUND_SECONDS)

    assert alive(data) == []
    assert recovering(data) is None
