"""Finds and ends the processes that serve a cluster; not those that only have the pid of a former one.

A pid alone proves nothing: it is reused, and a `postmaster.pid` file outlives its server. On Linux a PostgreSQL process
is recognized by its name and its working directory, which is the cluster's folder for the postmaster and each of its
children; elsewhere by the output of `ps` for the pid in `postmaster.pid`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from pathlib import Path

IS_LINUX = sys.platform.startswith("linux")
QUIT_SECONDS = 1.5
KILL_SECONDS = 3.0
FORMER_STOP_SECONDS = 10.0
ORPHANS_GRACE_SECONDS = 1.0
STATUS_LINE = 7
"""The line of `postmaster.pid`, counted from 0."""


class ServerProcess(msgspec.Struct, frozen=True):
    """A process and its start time, in the system's format: together they are never reused."""

    pid: int
    started: str


def process_at(pid: int) -> ServerProcess | None:
    """The process that has this pid now; None if there is none. A zombie, which waits to be reaped, is none."""
    if not IS_LINUX:
        started = _ps(pid, "lstart=")
        return ServerProcess(pid, started) if started else None
    fields = _stat_fields(pid)
    return None if fields is None or fields[0] in ("Z", "X") else ServerProcess(pid, fields[19])


def serving(cluster: Path) -> list[ServerProcess]:
    """The live PostgreSQL processes of this cluster, postmaster and backends."""
    cluster = cluster.resolve()
    if IS_LINUX:
        pids = [int(entry) for entry in os.listdir("/proc") if entry.isdigit() and _serves(int(entry), cluster)]
    else:
        pid = postmaster_pid(cluster)
        pids = [pid] if pid is not None and str(cluster) in _ps(pid, "command=") else []
    return [process for pid in pids if (process := process_at(pid)) is not None]


def postmaster_pid(cluster: Path) -> int | None:
    """The pid in `postmaster.pid`, which may be free, or another process's by now."""
    try:
        return int((cluster / "postmaster.pid").read_text().split("\n", 1)[0])
    except (OSError, ValueError):
        return None


def takes_connections(cluster: Path, pid: int) -> bool:
    """Whether `postmaster.pid` says that the server accepts connections; it logs each attempt that comes too early."""
    try:
        lines = (cluster / "postmaster.pid").read_text().splitlines()
    except (OSError, ValueError):
        return False
    return len(lines) > STATUS_LINE and lines[0] == str(pid) and lines[STATUS_LINE].strip() == "ready"


def is_taken(pid: int) -> bool:
    """Whether any process has this pid: also a zombie, also one of another user."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def send(process: ServerProcess, number: signal.Signals) -> None:
    """Signal this process, unless it has ended, or its pid belongs to another process by now."""
    with contextlib.suppress(ProcessLookupError):
        if not IS_LINUX:
            if process_at(process.pid) == process:
                os.kill(process.pid, number)
            return
        # A descriptor holds on to the process, so that nothing can take its pid between the check and the signal.
        descriptor = os.pidfd_open(process.pid)
        try:
            if process_at(process.pid) == process:
                signal.pidfd_send_signal(descriptor, number)
        finally:
            os.close(descriptor)


async def end_leftovers(cluster: Path, postmaster: ServerProcess | None) -> None:
    """End the processes of a server without a guard: SIGQUIT, then SIGKILL; bounded by a few seconds."""
    started = time.monotonic()
    quit_sent: set[ServerProcess] = set()
    while left := _left(cluster, postmaster):
        elapsed = time.monotonic() - started
        if elapsed > KILL_SECONDS:
            return
        for process in left:
            if elapsed > QUIT_SECONDS:
                send(process, signal.SIGKILL)
            elif process not in quit_sent:
                send(process, signal.SIGQUIT)
                quit_sent.add(process)
        await asyncio.sleep(0.02)


async def former_server_gone(cluster: Path) -> int | None:
    """Wait until no server runs on the cluster; after 10 s gives the pid of the server that still does.

    The guard of a server whose owner was killed stops it, which takes a moment. Backends without a postmaster cannot
    finish their work, and a new server could not start besides them: they are ended.
    """
    started = time.monotonic()
    while left := serving(cluster):
        elapsed = time.monotonic() - started
        if elapsed > FORMER_STOP_SECONDS:
            return left[0].pid
        if elapsed > ORPHANS_GRACE_SECONDS and postmaster_pid(cluster) not in {process.pid for process in left}:
            await end_leftovers(cluster, None)
        await asyncio.sleep(0.05)
    return None


def _left(cluster: Path, postmaster: ServerProcess | None) -> list[ServerProcess]:
    left = serving(cluster)
    if postmaster is not None and postmaster not in left and process_at(postmaster.pid) == postmaster:
        left.append(postmaster)
    return left


def _serves(pid: int, cluster: Path) -> bool:
    try:
        folder = os.readlink(f"/proc/{pid}/cwd")
    except OSError:
        return False  # Gone, or another user's: ours are always readable to us.
    return folder == str(cluster) and _name(pid) == "postgres"


def _name(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm") as comm:
            return comm.read().strip()
    except OSError:
        return ""


def _stat_fields(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from `state` on; the name before it may itself hold blanks and brackets."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()
    except OSError:
        return None


def _ps(pid: int, column: str) -> str:
    answer = subprocess.run(["/bin/ps", "-p", str(pid), "-o", column], capture_output=True, text=True, check=False)
    return answer.stdout.strip()
