"""A server that recovers: it is waited for as long as it goes on, and no longer."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Generator
from pathlib import Path

import pytest

from embedded_postgres.test_postgres import PASSWORD, alive, ask, data, empty, home, quietly, running
from mercato.embedded_postgres import EmbeddedPostgres, SupervisorError, postgres, server_log

__all__ = ["data", "empty"]

pytestmark = [
    pytest.mark.asyncio,
    pytest.mark.postgres,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc"),
]


RECORDS = 1_000_000
"""Of its log, for the recovery to read."""


async def killed_server(data: Path, records: int = 1) -> None:
    """Leaves a cluster in `data` whose next server has to recover."""
    server = await EmbeddedPostgres.start(data, password=PASSWORD, progress=quietly)
    await ask(
        server,
        f"SELECT count(pg_logical_emit_message(false, 'test', 'before the crash')) FROM generate_series(1, {records})",
    )
    os.kill(server.pid, signal.SIGKILL)
    await server.died()


def recovering(data: Path) -> int | None:
    """The process that recovers the cluster of `data`."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        postmaster = int((home(data) / "postgres" / "postmaster.pid").read_text().split()[0])
        for pid in Path(f"/proc/{postmaster}/task/{postmaster}/children").read_text().split():
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"postgres: startup"):
                return int(pid)
    return None


@contextlib.contextmanager
def slowed(data: Path, *, run_s: float, stop_s: float, seconds: float) -> Generator[None]:
    """The process that recovers runs `run_s` and is stopped for `stop_s` in turns, for `seconds`.

    After that, or at the end of the block, it goes on.
    """
    over = threading.Event()

    def slow() -> None:
        pid = None
        while pid is None and not over.is_set():
            pid = recovering(data)
        end = time.monotonic() + seconds
        with contextlib.suppress(ProcessLookupError):
            while pid is not None and time.monotonic() < end and not over.is_set():
                os.kill(pid, signal.SIGSTOP)
                over.wait(stop_s)
                os.kill(pid, signal.SIGCONT)
                time.sleep(run_s)
            if pid is not None:
                os.kill(pid, signal.SIGCONT)

    thread = threading.Thread(target=slow)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextlib.contextmanager
def nothing_to_read(cluster: Path) -> Generator[None]:
    """A recovery of this cluster waits for ever: it first reads `backup_label`, a pipe that nothing writes to."""
    pipe, owner = cluster / "backup_label", cluster.stat()
    os.mkfifo(pipe)
    os.chown(pipe, owner.st_uid, owner.st_gid)
    yield
    pipe.unlink()


@pytest.mark.long
async def test_a_recovery_that_goes_on_is_waited_for(data: Path, monkeypatch: pytest.MonkeyPatch):
    await killed_server(data, RECORDS)
    monkeypatch.setattr(postgres, "READY_SECONDS", 2.0)
    monkeypatch.setitem(postgres.SETTINGS, "log_startup_progress_interval", "100ms")
    reported: list[tuple[float, str]] = []

    with slowed(data, run_s=0.001, stop_s=0.1, seconds=4.0):
        async with running(data, lambda line: reported.append((time.monotonic(), line))) as server:
            ready_at = time.monotonic()
            assert await ask(server, "SELECT 1") == 1

    waiting = next(at for at, line in reported if line.startswith("waiting for PostgreSQL, which is recovering"))
    states = [line for _, line in reported if line.startswith("PostgreSQL is recovering: ")]
    assert ready_at - waiting > 2.0
    assert len(states) == len(set(states)) > 1
    assert all("elapsed time: " in line for line in states)


async def test_a_recovery_that_stands_still_ends_the_start_and_leaves_nothing(
    data: Path, monkeypatch: pytest.MonkeyPatch
):
    await killed_server(data)
    monkeypatch.setattr(postgres, "READY_SECONDS", 2.0)

    with (
        nothing_to_read(home(data) / "postgres"),
        pytest.raises(SupervisorError, match=r"is not ready after 2 s: see .*postgres.log, and start again"),
    ):
        await EmbeddedPostgres.start(data, password=PASSWORD, progress=quietly)

    assert alive(data) == []
    async with running(data) as server:
        assert await ask(server, "SELECT 1") == 1


async def test_its_files_are_brought_to_the_disk_by_one_call_where_that_reports_errors(data: Path):
    async with running(data) as server:
        used = await ask(server, "SHOW recovery_init_sync_method")

    assert used == postgres._sync_method(sys.platform, os.uname().release)
    assert [
        postgres._sync_method(*machine)
        for machine in (
            ("linux", "6.18.44-generic"),
            ("linux", "5.8"),
            ("linux", "5.4.0-150"),
            ("linux", "unheard of"),
            ("darwin", "24.1.0"),
        )
    ] == ["syncfs", "syncfs", "fsync", "fsync", "fsync"]


@pytest.mark.parametrize(
    "refusal",
    [
        "the database system is starting up",
        "the database system is in recovery mode",
        "the database system is not yet accepting connections",
        "the database system is shutting down",
    ],
)
async def test_what_the_server_says_to_early_callers_is_no_reason_for_its_failure(tmp_path: Path, refusal: str):
    output = (
        "2026-01-01 00:00:00.000 UTC [1] FATAL:  could not open file\n"
        f"2026-01-01 00:00:00.100 UTC [2] FATAL:  {refusal}\n"
    )

    assert server_log.reason(output, tmp_path) == "could not open file"
