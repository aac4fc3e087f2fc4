"""The shop under test: the real command, started again whenever it has ended, and the processes below it.

Only processes that belong to a run which was started here are ever signalled, by pid and starting time.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import time
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Self

import aiohttp
import asyncpg
import msgspec

from mercato.cli.keeping import RESTARTS, WITHIN_SECONDS
from mercato.cli.split import read_record
from mercato.embedded_postgres import processes
from mercato.testing.command import COMMAND
from mercato.testing.process import Identity, Process, command_line
from system.chaos.schedule import ProcessFault

ENVIRONMENT: Final = {
    # Short, so that whatever waits for a time to be over does so several times in a minute.
    "MERCATO_ORDERS_LEASE_SECONDS": "1.5",
    "MERCATO_ORDERS_PAYMENT_SECONDS": "6",
    "MERCATO_INVENTORY_HOLD_SECONDS": "6",
    # Two customers place all orders.
    "MERCATO_ORDERS_CUSTOMER_OPEN_ORDERS": "0",
    "MERCATO_ORDERS_CUSTOMER_HELD_UNITS": "0",
    "MERCATO_ORDERS_CUSTOMER_HELD_PERCENT": "0",
    "MERCATO_PAYMENTS_SWEEP_SECONDS": "1",
    "MERCATO_PAYMENTS_RECONCILE_SECONDS": "3",
    "MERCATO_PAYMENTS_STATEMENT_LAG_SECONDS": "20",
    "MERCATO_SANDBOX_STATEMENT_DELAY_SECONDS": "5",
    "MERCATO_SANDBOX_FAILURE_RATE": "0.05",
    # What must hold at every moment is asked all the time, not in the end alone.
    "MERCATO_AUDIT_SECONDS": "15",
}
WORKERS: Final = 2
POLL_SECONDS: Final = 0.02
STOP_SECONDS: Final = 20.0
METRICS_SECONDS: Final = 0.5
ALARM: Final = "invariant_violated"
"""What the shop's own audit logs when something does not hold."""
COUNTED: Final = {"takeovers": "mercato_saga_taken_over_total", "fenced": "mercato_saga_fenced_total"}


class Run:
    """One run of the command: from its start to its end."""

    def __init__(self, data: Path, options: Sequence[str]) -> None:
        self.process = Process(data, *options, environment=ENVIRONMENT, command=COMMAND)
        self.started_at = time.monotonic()
        self.may_end = False
        """Whether a fault was injected after which it is right to end."""
        self.counted: Counter[tuple[str, str]] = Counter()
        """By URL and what is counted."""
        self._nats_kills = deque[float](maxlen=RESTARTS + 1)

    def note_nats_kill(self) -> None:
        """Notes when the NATS server of this shop is killed: one that dies too often within a minute ends the shop."""
        times = self._nats_kills
        times.append(time.monotonic())
        self.may_end = self.may_end or (len(times) > RESTARTS and times[-1] - times[0] < WITHIN_SECONDS)


class ProcessReport(msgspec.Struct, frozen=True):
    """What happened to the processes, for the report."""

    faults: dict[str, int]
    starts: int
    ready_seconds: list[float]
    unexplained: list[str]
    takeovers: int
    fenced: int
    errors_logged: dict[str, int]


class ShopUnderTest:
    """Keeps a shop running on `data`, and injects faults. `up` is set, and `url` true, while it takes requests."""

    def __init__(self, data: Path, transport: str | None = None) -> None:
        """`transport`: each service is a process of its own, twice, over `nats`, `http` or `grpc`; None: workers."""
        self.data = data
        self.is_split = transport is not None
        self._options = (
            ("--transport", transport, "--placement", "cluster") if transport else ("--workers", str(WORKERS))
        )
        self.up = asyncio.Event()
        self.up_at = 0.0
        """The monotonic time of the last `up`."""
        self.url = ""
        self._runs: list[Run] = []
        self._ready_seconds: list[float] = []
        self._faults: Counter[str] = Counter()
        self._paused: set[Identity] = set()
        self._unexplained: list[str] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._starting: asyncio.Future[Run] | None = None
        self._stopping = False

    async def __aenter__(self) -> Self:
        self._tasks += [asyncio.create_task(self._keep()), asyncio.create_task(self._count_for_ever())]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stopping = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._starting is not None:
            await asyncio.wait([self._starting])
        self._go_on()
        # The last one first: what it has started serves the data that the earlier ones have served, too.
        for run in reversed(self._runs):
            await asyncio.to_thread(run.process.__exit__)

    # ---------------------------------------------------------------------------------------------------------- keeping

    async def _keep(self) -> None:
        while not self._stopping:
            # Shielded: a process that is being started when everything ends must be known, or it would stay.
            self._starting = asyncio.ensure_future(asyncio.to_thread(self._start))
            run = await asyncio.shield(self._starting)
            # Fails where a fault was injected meanwhile.
            with contextlib.suppress(AssertionError):
                await asyncio.to_thread(run.process.ready)
                self.up_at = time.monotonic()
                self._ready_seconds.append(self.up_at - run.started_at)
                self.url = run.process.url
                self.up.set()
            while run.process.is_running:  # a process that was not started here does not report its end
                await asyncio.sleep(POLL_SECONDS)
            self.up.clear()
            self.url = ""
            if not run.may_end and not self._stopping:
                self._unexplained.append(f"run {len(self._runs)} has ended by itself: {_last_words(run.process)}")

    def _start(self) -> Run:
        run = Run(self.data, self._options)
        self._runs.append(run)
        return run

    async def stop(self) -> None:
        """Ends it as a person would; nothing may be left of this run or of any before."""
        self._stopping = True
        self._go_on()
        run = self._runs[-1]
        run.process.signal(signal.SIGTERM)
        code = await asyncio.to_thread(run.process.exit_code, STOP_SECONDS)
        if code != 0:
            self._unexplained.append(f"the last run has ended with {code}: {_last_words(run.process)}")
        for number, one in enumerate(self._runs, 1):
            try:
                await asyncio.to_thread(one.process.assert_gone)
            except AssertionError as left:
                self._unexplained.append(f"of run {number}, this lives on: {left}")

    # ------------------------------------------------------------------------------------------------- fault injection

    async def inject(self, fault: ProcessFault) -> None:
        """Injects a fault into a process. Where there is none of that kind, nothing happens, and none is counted."""
        if not self._runs or not self._runs[-1].process.is_running:
            return
        run = self._runs[-1]
        if fault.kind == "terminate":
            run.may_end = run.may_end or not self.up.is_set()
            await self._terminate(run.process, fault.choice)
            return
        tree = await asyncio.to_thread(run.process.tree)
        targets: Sequence[Identity | None] = {
            "owner": [tree.owner],
            "guard": [tree.guard],
            "postmaster": [tree.postmaster],
            "nats": [p for p in tree.others if "nats-server" in command_line(p.pid)],
            "worker": [*tree.workers, *tree.instances.values()],
            "backend": [*tree.backends],
            "pause": [*tree.workers, *tree.instances.values()],
        }[fault.kind]
        found = sorted((target for target in targets if target), key=lambda target: target.pid)
        if not found:
            return
        target = found[int(fault.choice * len(found))]
        if fault.kind == "pause":
            self._tasks.append(asyncio.create_task(self._pause(target, fault.pause_s)))
        else:
            # PostgreSQL survives the death of any process but the one that recovers it. A shop that cannot reach it
            # while it starts says so, and ends.
            harmless = fault.kind == "backend" and "startup" not in command_line(target.pid)
            # What dies of a shop that is split is started again; a start does not wait for it for ever.
            harmless = harmless or (self.is_split and fault.kind in ("worker", "nats"))
            run.may_end = run.may_end or not (harmless and self.up.is_set())
            if fault.kind == "nats":
                run.note_nats_kill()
            processes.send(target, signal.SIGKILL)
        self._faults[fault.kind] += 1

    async def _pause(self, target: Identity, seconds: float) -> None:
        processes.send(target, signal.SIGSTOP)
        self._paused.add(target)
        await asyncio.sleep(seconds)
        processes.send(target, signal.SIGCONT)
        self._paused.discard(target)

    def _go_on(self) -> None:
        for target in self._paused:
            processes.send(target, signal.SIGCONT)
        self._paused.clear()

    async def _terminate(self, process: Process, choice: float) -> None:
        """Ends one connection, or all of one service, in the middle of whatever it does."""
        with contextlib.suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError, TimeoutError, ValueError):
            connection = await asyncpg.connect(process.dsn("orders"), timeout=2)
            try:
                ended = await connection.fetchval(
                    """
                    WITH clients AS (
                        SELECT pid, datname, row_number() OVER (ORDER BY datname, pid) - 1 AS n, count(*) OVER () AS all
                          FROM pg_stat_activity
                         WHERE datname LIKE 'mercato%' AND pid <> pg_backend_pid()
                    ), chosen AS (SELECT * FROM clients WHERE n = floor($1 * "all"))
                    SELECT count(pg_terminate_backend(c.pid))
                      FROM clients c
                      JOIN chosen h ON h.pid = c.pid OR ($2 AND h.datname = c.datname)
                    """,
                    choice,
                    choice * 1000 % 1 < 0.5,
                )
                self._faults["terminate"] += bool(ended)
            finally:
                connection.terminate()

    # --------------------------------------------------------------------------------------------------------- counting

    async def _count_for_ever(self) -> None:
        """What the processes of a run have counted is gone with them: it is looked at all the time."""
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2)) as session:
            while True:
                await asyncio.sleep(METRICS_SECONDS)
                run, url = self._runs[-1] if self._runs else None, self.url
                if run is None or not url:
                    continue
                with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
                    for counting in self._counting(url):
                        async with session.get(f"{counting}/metrics", headers={"Connection": "close"}) as answer:
                            text = await answer.text()
                        for name, metric in COUNTED.items():
                            found = re.findall(rf'^{metric}{{service="orders"}} (\S+)', text, re.MULTILINE)
                            seen = run.counted[counting, name]
                            run.counted[counting, name] = max(seen, int(sum(map(float, found))))

    def _counting(self, url: str) -> Sequence[str]:
        """The processes that drive sagas, by their URLs: each life of a process has a port of its own."""
        record = read_record(self.data) if self.is_split else None
        return [u for name, u in record.urls.items() if name.startswith("orders")] if record else [url]

    @property
    def injected(self) -> dict[str, int]:
        return dict(self._faults)

    def report(self) -> ProcessReport:
        """What has happened so far."""
        total: Counter[str] = Counter()
        for run in self._runs:
            for (_, name), count in run.counted.items():
                total[name] += count
        logged = self._errors_logged()
        alarms = [text for text in logged if text.startswith(ALARM)]
        return ProcessReport(
            faults=dict(self._faults),
            starts=len(self._runs),
            ready_seconds=self._ready_seconds,
            unexplained=[*self._unexplained, *alarms],
            takeovers=total["takeovers"],
            fenced=total["fenced"],
            errors_logged=dict(logged.most_common(20)),
        )

    def _errors_logged(self) -> Counter[str]:
        found: Counter[str] = Counter()
        for run in self._runs:
            for line in run.process.errors:
                if not line.startswith("{"):
                    continue
                with contextlib.suppress(msgspec.DecodeError):
                    entry = msgspec.json.decode(line)
                    if entry.get("level") == "error":
                        found[_headline(entry)] += 1
        return found

    def log(self) -> str:
        """All that the runs have written."""
        parts = [f"--- run {number}\n{run.process.output}" for number, run in enumerate(self._runs, 1)]
        return "\n".join(parts)


def _headline(entry: dict[str, Any]) -> str:
    """What a log entry is about, without what is different each time."""
    cause = (entry.get("exception") or "").strip().rpartition("\n")[2]
    words = [entry.get("event", ""), entry.get("operation", ""), entry.get("invariant", ""), cause]
    return re.sub(r"0x[0-9a-f]+|Task-\d+", "...", " ".join(word for word in words if word))[:200]


def _last_words(process: Process) -> str:
    return " | ".join(process.complaints[-3:] or process.lines[-1:])
