"""Reads what a load has cost: CPU time from /proc, and rows, WAL and disk from the statistics of PostgreSQL.

CPU time comes from `schedstat`, which counts nanoseconds: it holds on a machine that is busy with other things, where
rates do not. Counts of rows come from `pg_stat_user_tables` of every database of a shop, whatever tables it has.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from pathlib import Path
from typing import Any, Final, cast

import asyncpg
import msgspec

from bench.throughput.figures import Counted, TableCount

STATISTICS_SECONDS: Final = 11.0
"""A backend reports what it has counted at the latest ten seconds after it became idle."""
IDLE_SHARE: Final = 0.08
"""Of one core: what is less is no work of an order. A shop that is idle takes a hundredth."""
IDLE_SAMPLE_SECONDS: Final = 0.25
IDLE_SAMPLES: Final = 4
IDLE_LIMIT_SECONDS: Final = 180.0
LONE_COMMITS: Final = 20

_driver = cast("Any", asyncpg)


class NotIdle(Exception):
    """The shop was still at work when it should have been done."""


# ------------------------------------------------------------------------------------------------------------ CPU time


class Spending(msgspec.Struct, frozen=True):
    """CPU time so far in nanoseconds by process id, and what each of the processes is."""

    ns: Mapping[int, int]
    names: Mapping[int, str]


def tree(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += tree(int(child))
    return found


def spent_by(pids: list[int], name: Callable[[int], str]) -> Spending:
    """What these processes have spent."""
    return Spending({pid: _schedstat(pid) for pid in pids}, {pid: name(pid) for pid in pids})


def command_line(pid: int) -> str:
    """Empty for a process that has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


async def spent_by_server(admin_dsn: str, postmaster: int) -> Spending:
    """What a server has spent, by the database of each backend. `(ended)`: processes that are gone."""
    async with connected(admin_dsn) as connection:
        activity = await connection.fetch("SELECT pid, datname, backend_type FROM pg_stat_activity")
    names = {
        row["pid"]: row["datname"] if row["backend_type"] == "client backend" else f"({row['backend_type']})"
        for row in activity
    }
    names[postmaster] = "(postmaster)"
    spending = spent_by(tree(postmaster), lambda pid: names.get(pid) or "(other)")
    ended = {0: _ended_children_of(postmaster)}
    return Spending({**spending.ns, **ended}, {**spending.names, 0: "(ended)"})


async def until_idle(pids: Callable[[], list[int]]) -> None:
    """Waits until these processes have done nothing for about a second. Raises `NotIdle` after three minutes.

    Only time on a core counts: on a busy machine even processes with nothing to do wait for one now and then.
    """
    end = time.monotonic() + IDLE_LIMIT_SECONDS
    calm = 0
    before, at = _on_core(pids()), time.monotonic()
    while calm < IDLE_SAMPLES:
        await asyncio.sleep(IDLE_SAMPLE_SECONDS)
        after, now = _on_core(pids()), time.monotonic()
        worked = {pid: ns - before.get(pid, ns) for pid, ns in after.items()}
        share = sum(worked.values()) / 1e9 / (now - at)
        calm = calm + 1 if share < IDLE_SHARE else 0
        before, at = after, now
        if now > end:
            most = command_line(max(worked, key=lambda pid: worked[pid]))
            raise NotIdle(
                f"{IDLE_LIMIT_SECONDS:.0f} s after its load the shop still takes {share:.0%} of a core, "
                f"most of it by {most!r}"
            )


def _on_core(pids: list[int]) -> dict[int, int]:
    return {pid: _schedstat(pid) for pid in pids}


def _schedstat(pid: int) -> int:
    """Nanoseconds on a core, over all threads that live; zero for a process that has ended."""
    on_core = 0
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                on_core += int((task / "schedstat").read_text().partition(" ")[0])
    return on_core


def _ended_children_of(pid: int) -> int:
    """CPU time of the children of a process that have ended, in nanoseconds; the kernel counts it in ticks."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[13]) + int(fields[14])) * (1_000_000_000 // os.sysconf("SC_CLK_TCK"))


# ---------------------------------------------------------------------------------------------------------- PostgreSQL


@contextlib.asynccontextmanager
async def connected(dsn: str, database: str = "postgres") -> AsyncGenerator[Any]:
    """A connection of the administrator to a database of the server that `dsn` names."""
    connection = await _driver.connect(dsn.replace("/postgres?", f"/{database}?"))
    try:
        yield connection
    finally:
        await connection.close()


async def counted(admin_dsn: str, prefix: str) -> Counted:
    """What the databases whose names begin with `prefix` have written so far.

    For exact counts the shop has been idle for `STATISTICS_SECONDS`.
    """
    tables: dict[str, TableCount] = {}
    async with connected(admin_dsn) as connection:
        databases = await connection.fetch(
            """
            SELECT datname, pg_database_size(d.oid) AS size, xact_commit
              FROM pg_database d JOIN pg_stat_database USING (datname)
             WHERE starts_with(datname, $1)
            """,
            prefix,
        )
        wal_bytes = await connection.fetchval("SELECT pg_current_wal_insert_lsn() - '0/0'")
    for database in databases:
        async with connected(admin_dsn, database["datname"]) as connection:
            for row in await connection.fetch(
                """
                SELECT relname, n_tup_ins, n_tup_upd, n_tup_hot_upd, n_tup_del,
                       (SELECT count(*) FROM pg_index WHERE indrelid = relid) AS indexes
                  FROM pg_stat_user_tables
                """
            ):
                name = f"{database['datname'].removeprefix(prefix)}.{row['relname']}"
                tables[name] = TableCount(
                    inserted=row["n_tup_ins"],
                    updated=row["n_tup_upd"],
                    hot_updated=row["n_tup_hot_upd"],
                    deleted=row["n_tup_del"],
                    indexes=row["indexes"],
                )
    return Counted(
        wal_bytes=int(wal_bytes),
        disk_bytes={row["datname"].removeprefix(prefix): row["size"] for row in databases},
        commits={row["datname"].removeprefix(prefix): row["xact_commit"] for row in databases},
        tables=tables,
    )


async def checkpoint(admin_dsn: str) -> None:
    """So that full-page images after a checkpoint of its own do not fall on the load that comes next but one."""
    async with connected(admin_dsn) as connection:
        await connection.execute("CHECKPOINT")


async def vacuum(admin_dsn: str, prefix: str) -> None:
    """Does the pending work of autovacuum in the databases whose names begin with `prefix` now, before later loads.

    What is left to autovacuum comes from the load that is counted.
    """
    async with connected(admin_dsn) as connection:
        names = await connection.fetch("SELECT datname FROM pg_database WHERE starts_with(datname, $1)", prefix)
    for row in names:
        async with connected(admin_dsn, row["datname"]) as connection:
            await connection.execute("VACUUM (ANALYZE)")


async def delay_commits(admin_dsn: str, milliseconds: float) -> float:
    """Makes each commit take so much longer; gives what a lone commit takes then, in microseconds.

    PostgreSQL's own delay before a flush of the WAL, which commits that come meanwhile share, as they would share the
    flush of a slow disk. 0 ends it.
    """
    async with connected(admin_dsn) as connection:
        await connection.execute(f"ALTER SYSTEM SET commit_delay = {round(milliseconds * 1_000)}")
        await connection.execute("ALTER SYSTEM SET commit_siblings = 0")
        await connection.execute("SELECT pg_reload_conf()")
    await asyncio.sleep(0.5)  # every backend reads it with its next statement
    async with connected(admin_dsn) as connection:
        taken: list[float] = []
        for _ in range(LONE_COMMITS):
            began = time.perf_counter()
            await connection.execute("SELECT pg_logical_emit_message(true, 'bench', 'a commit that writes WAL')")
            taken.append(time.perf_counter() - began)
    return statistics.median(taken) * 1e6


def fsync_us(folder: Path) -> float:
    """Median time of writing and syncing 8 KiB in a folder, microseconds."""
    file = folder / "sync"
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        taken: list[float] = []
        for _ in range(50):
            began = time.perf_counter()
            os.pwrite(descriptor, bytes(8192), 0)
            os.fdatasync(descriptor)
            taken.append(time.perf_counter() - began)
        return round(statistics.median(taken) * 1e6, 1)
    finally:
        os.close(descriptor)
        file.unlink()
