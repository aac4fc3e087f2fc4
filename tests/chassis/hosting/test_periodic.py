"""Rounds follow each other: at once where there is more to do, later where not, and after any failure."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable

import pytest
from structlog.testing import capture_logs

from mercato.chassis.contract import SERVICE_ROLE, Unavailable, current
from mercato.chassis.hosting import periodic
from mercato.chassis.hosting.periodic import LONGEST_RETRY_SECONDS, PeriodicTask, cleaning
from mercato.chassis.observability.clock import SystemClock
from mercato.chassis.observability.telemetry import Telemetry
from mercato.chassis.postgres.database import Tx
from mercato.testing import databases
from mercato.testing.cluster import Cluster

AT_ONCE = 0.0


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long each pause was to last; none of them does."""
    asked: list[float] = []

    class Asyncio:
        @staticmethod
        async def sleep(seconds: float) -> None:
            asked.append(seconds)
            await asyncio.sleep(0)

    monkeypatch.setattr(periodic, "asyncio", Asyncio)
    monkeypatch.setattr(periodic.random, "uniform", lambda _low, _high: 1.0)
    return asked


class Rounds:
    """Work whose rounds end as `outcomes` say, one after the other; the task is over with the last."""

    def __init__(self, *outcomes: int | Exception) -> None:
        self.outcomes = iter(outcomes)
        self.over = asyncio.Event()

    async def __call__(self) -> int:
        outcome = next(self.outcomes, None)
        if outcome is None:
            self.over.set()
            await asyncio.Event().wait()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome or 0


@contextlib.asynccontextmanager
async def running(task: PeriodicTask, telemetry: Telemetry) -> AsyncGenerator[None]:
    running = asyncio.create_task(task.run("shop", SystemClock(), telemetry))
    try:
        yield
    finally:
        running.cancel()
        await asyncio.wait([running])


async def run_through(
    rounds: Rounds,
    *,
    limit: int | None = None,
    delay_seconds: float = AT_ONCE,
    on_failure: Callable[[Exception], None] | None = None,
) -> Telemetry:
    telemetry = Telemetry()
    task = PeriodicTask("work", rounds, 60.0, limit=limit, delay_seconds=delay_seconds, on_failure=on_failure)
    async with running(task, telemetry):
        await rounds.over.wait()
    return telemetry


async def test_a_round_that_reached_its_limit_is_followed_at_once(pauses: list[float]):
    await run_through(Rounds(5, 4, 5, 0), limit=5, delay_seconds=7.0)

    assert pauses == [7.0, 0, 60.0, 0, 60.0]


async def test_without_a_limit_each_round_is_followed_by_a_pause(pauses: list[float]):
    await run_through(Rounds(1_000, 0))

    assert pauses == [AT_ONCE, 60.0, 60.0]


async def test_failures_are_followed_by_longer_and_longer_pauses(pauses: list[float]):
    await run_through(Rounds(*[Unavailable(service="shop")] * 6, 0, ValueError("once")))

    assert pauses[1:] == [0.5, 1.0, 2.0, 4.0, LONGEST_RETRY_SECONDS, LONGEST_RETRY_SECONDS, 60.0, 0.5]


async def test_a_task_may_have_a_longest_pause_of_its_own(pauses: list[float]):
    rounds = Rounds(*[Unavailable(service="shop")] * 3)
    async with running(PeriodicTask("work", rounds, 60.0, longest_retry_seconds=0.8), Telemetry()):
        await rounds.over.wait()

    assert pauses[1:] == [0.5, 0.8, 0.8]


async def test_pauses_differ_from_process_to_process():
    rounds, started = Rounds(0, 0, 0), asyncio.get_running_loop().time()
    async with running(PeriodicTask("work", rounds, 0.01), Telemetry()):
        await rounds.over.wait()

    assert asyncio.get_running_loop().time() - started >= 3 * 0.8 * 0.01
    assert len({periodic._varied(60.0) for _ in range(10)}) == 10


async def test_rounds_are_counted_by_how_they_ended(pauses: list[float]):
    telemetry = await run_through(Rounds(1, Unavailable(service="shop"), ValueError("x"), 1))

    def count(outcome: str) -> float | None:
        labels = {"service": "shop", "task": "work", "outcome": outcome}
        return telemetry.registry.get_sample_value("mercato_periodic_rounds_total", labels)

    assert (count("done"), count("failed")) == (2.0, 2.0)


async def test_a_reason_is_logged_when_it_is_new(pauses: list[float]):
    away, wrong = Unavailable(service="shop"), ValueError("a mistake")
    with capture_logs() as logs:
        await run_through(Rounds(away, away, wrong, wrong, away, 0, away))

    assert [entry["event"] for entry in logs] == ["task_waits", "task_failed", "task_waits", "task_waits"]
    assert [entry["exc_info"] for entry in logs if entry["event"] == "task_failed"] == [wrong]
    assert {(entry["service"], entry["task"]) for entry in logs} == {("shop", "work")}


async def test_on_failure_is_called_with_each_failure(pauses: list[float]):
    away, failures = Unavailable(service="shop"), list[Exception]()
    with capture_logs() as logs:
        await run_through(Rounds(away, away, 0), on_failure=failures.append)

    assert (failures, logs) == ([away, away], [])


async def test_calls_of_a_round_come_from_the_service_and_have_a_deadline_of_their_own():
    deadlines: list[float] = []
    over = asyncio.Event()

    async def work() -> int:
        assert current.get().actor.role == SERVICE_ROLE
        assert current.get().deadline <= SystemClock.monotonic() + 9.0
        deadlines.append(current.get().deadline)
        if len(deadlines) == 3:
            over.set()
        return 0

    began = SystemClock.monotonic()
    async with running(PeriodicTask("work", work, 0.05, round_seconds=9.0), Telemetry()):
        await over.wait()

    assert deadlines[0] >= began + 9.0
    assert deadlines == sorted(set(deadlines))


async def test_cleaning_takes_turns_at_what_there_is_to_delete(cluster: Cluster):
    left = {"tokens": 5, "sessions": 2}

    def deleting(what: str) -> Callable[[Tx], Awaitable[int]]:
        async def delete(tx: Tx) -> int:
            assert await tx.fetch_values(int, "SELECT 1") == [1]
            deleted = min(left[what], 3)
            left[what] -= deleted
            return deleted

        return delete

    async with databases.opened(cluster.server.admin_dsn, "shop") as database:
        clean = cleaning(database, deleting("tokens"), deleting("sessions"))

        assert [await clean() for _ in range(3)] == [3, 2, 0]
    assert left == {"tokens": 0, "sessions": 0}
