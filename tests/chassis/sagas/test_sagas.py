"""Sagas: every step is finished, its effect is there once, and who has lost a saga changes nothing any more."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import functools
import itertools
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence, Sized
from pathlib import Path
from typing import Final

import pytest
import pytest_asyncio

from mercato.chassis.contract import Unavailable
from mercato.chassis.hosting.periodic import PeriodicTask
from mercato.chassis.observability.clock import SystemClock
from mercato.chassis.observability.telemetry import Telemetry
from mercato.chassis.postgres.database import Database, Row
from mercato.chassis.sagas import store as saga
from mercato.chassis.sagas.runner import (
    BACKLOG_LIMIT,
    BATCH_SIZE,
    FIRST_PAUSE_SECONDS,
    LANES,
    LONGEST_PAUSE_SECONDS,
    SWEPT_AT_ONCE,
    Runner,
)
from mercato.chassis.sagas.store import Key, Next, Saga
from mercato.testing import databases
from mercato.testing.cluster import Cluster
from mercato.testing.waiting import until, until_blocked, without_waiting

MIGRATIONS: Final = Path(__file__).with_name("migrations_with_sagas")
KIND: Final = "errand"
LEASE_SECONDS: Final = 1.0
LONG_LEASE_SECONDS: Final = 60.0
IDLE_SECONDS: Final = 30.0
NO_PROCESS: Final = 7
"""A driver without a lease, as after a crash."""


class SagaStanding(Row):
    step: str
    state: str
    epoch: int
    version: int
    tries: int
    driver: int | None
    wakes: bool


class Driver:
    """A process that drives sagas of three steps: fetch, bring, done. Each step leaves one effect.

    `during` is what happens to a batch in the middle of a step, before it is saved.
    """

    def __init__(self, harness: SagaHarness, name: str, lease_seconds: float = LEASE_SECONDS) -> None:
        self.name = name
        self.telemetry = Telemetry()
        self.runner = Runner(
            harness.database,
            clock=SystemClock(),
            telemetry=self.telemetry,
            lease_seconds=lease_seconds,
        )
        self.runner.register(KIND, {"fetch": self._fetch, "bring": self._bring})
        self.during: Callable[[str, Sequence[Saga]], Awaitable[None]] | None = None
        self.batches: list[tuple[str, int]] = []
        self.loops: list[asyncio.Task[None]] = []

    def begin(self, *, sweeping: bool = True) -> None:
        tasks = [PeriodicTask("drive", self.runner.drive_next, 0.0, limit=0) for _ in range(LANES)]
        if sweeping:
            tasks.append(PeriodicTask("sweep", self.runner.sweep, 0.02, limit=SWEPT_AT_ONCE))
        clock = SystemClock()
        self.loops = [asyncio.create_task(task.run("errands", clock, self.telemetry)) for task in tasks]

    async def stop(self) -> None:
        """As if its process ended: what it was in the middle of is not finished."""
        for loop in self.loops:
            loop.cancel()
        await asyncio.gather(*self.loops, return_exceptions=True)

    def count(self, what: str) -> float:
        return self.telemetry.registry.get_sample_value(f"mercato_saga_{what}_total", {"service": "errands"}) or 0.0

    async def _fetch(self, sagas: Sequence[Saga]) -> None:
        await self._step("fetch", sagas, "bring", running=True)

    async def _bring(self, sagas: Sequence[Saga]) -> None:
        await self._step("bring", sagas, "done", running=False)

    async def _step(self, step: str, sagas: Sequence[Saga], following: str, *, running: bool) -> None:
        self.batches.append((step, len(sagas)))
        if self.during:
            await self.during(step, sagas)
            sagas = [each for each in sagas if each.live]
        outcomes = [
            (each, Next(following, each.state + step[0], running=running, finished=not running)) for each in sagas
        ]
        async with self.runner.saving(outcomes) as (tx, kept):
            await tx.execute(
                """
                INSERT INTO effects (subject_id, step, driver)
                SELECT unnest($1::bigint[]), $2, $3
                """,
                [each.subject_id for each, _ in kept],
                step,
                self.name,
            )


class SagaHarness:
    """The database of a service with sagas, and its processes."""

    def __init__(self, dsn: str, database: Database) -> None:
        self.dsn = dsn
        self.database = database
        self.drivers: list[Driver] = []

    def driver(self, name: str = "first", lease_seconds: float = LEASE_SECONDS) -> Driver:
        made = Driver(self, name, lease_seconds)
        self.drivers.append(made)
        return made

    async def started(self, driver: Driver | None = None, count: int = 1, step: str = "fetch") -> list[Saga]:
        """New sagas of a driver, which has its lease; without one, of a process that has none."""
        sagas = [Saga((i, KIND, ""), step, "") for i in range(1, count + 1)]
        if driver:
            await driver.runner.acquire_slot()
        async with self.database.transaction() as tx:
            await saga.start(tx, sagas, driver.runner.driver if driver else NO_PROCESS)
        return sagas

    async def standing(self, subject_id: int = 1) -> SagaStanding:
        async with self.database.read() as tx:
            row = await tx.fetch_one(
                SagaStanding,
                """
                SELECT step, state, epoch, version, tries, driver, wake_at IS NOT NULL AS wakes
                  FROM sagas WHERE subject_id = $1
                """,
                subject_id,
            )
        assert row
        return row

    async def wakes_in(self, subject_id: int = 1) -> float:
        """In how many seconds any process may continue a saga that waits."""
        async with self.database.read() as tx:
            [seconds] = await tx.fetch_values(
                float, "SELECT extract(epoch FROM wake_at - now())::float8 FROM sagas WHERE subject_id = $1", subject_id
            )
        return seconds

    async def effects(self) -> list[tuple[int, str]]:
        """Subject and step of each, by subject."""
        async with self.database.read() as tx:
            ids = await tx.fetch_values(int, "SELECT subject_id FROM effects ORDER BY subject_id, n")
            steps = await tx.fetch_values(str, "SELECT step FROM effects ORDER BY subject_id, n")
        return list(zip(ids, steps, strict=True))

    async def execute(self, sql: str) -> None:
        async with self.database.transaction() as tx:
            await tx.execute(sql)

    async def take_over(self, limit: int = 10, driver: int = 99) -> list[Saga]:
        """What a sweeper of another process takes over now."""
        async with self.database.read() as tx:
            expired = await saga.expired_drivers(tx, LONG_LEASE_SECONDS)
        async with self.database.transaction() as tx:
            return await saga.take_over(tx, driver, limit, expired)

    async def expire_leases(self) -> None:
        """As if their holders had been silent for long."""
        await self.execute("UPDATE saga_drivers SET leased_until = now() - interval '1 second'")

    async def until_done(self, left: int = 0) -> None:
        """Waits until no more than so many sagas are left: a finished one is deleted."""

        async def are_done() -> bool:
            async with self.database.read() as tx:
                return await tx.fetch_values(int, "SELECT count(*) FROM sagas") == [left]

        await until(are_done)


async def is_seen(waiters: Sized) -> bool:
    """Whether a runner knows that something waits."""
    return len(waiters) > 0


@pytest_asyncio.fixture
async def harness(cluster: Cluster) -> AsyncGenerator[SagaHarness]:
    async with (
        databases.fresh_dsn(cluster, "errands", MIGRATIONS) as dsn,
        databases.opened(dsn, "errands", size=8) as database,
    ):
        made = SagaHarness(dsn, database)
        try:
            yield made
        finally:
            for driver in made.drivers:
                await driver.stop()


def every_effect(count: int) -> list[tuple[int, str]]:
    return [(i, step) for i in range(1, count + 1) for step in ("fetch", "bring")]


class Gate:
    """Where a step stands still until it is opened."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.opened = asyncio.Event()

    async def __call__(self, _step: str, _sagas: Sequence[Saga]) -> None:
        self.reached.set()
        await self.opened.wait()


# ------------------------------------------------------------------------------------------------------------- driving


async def test_steps_run_one_after_the_other_and_a_finished_saga_is_deleted(harness: SagaHarness):
    driver = harness.driver()
    gate = Gate()

    async def stop_at_bring(step: str, sagas: Sequence[Saga]) -> None:
        if step == "bring":
            await gate(step, sagas)

    driver.during = stop_at_bring
    driver.begin()
    [mine] = await harness.started(driver)
    driver.runner.drive([mine])
    await gate.reached.wait()

    now = await harness.standing()
    assert (now.step, now.state, now.epoch, now.version) == ("bring", "f", mine.epoch, 2)
    assert (now.driver, now.wakes) == (driver.runner.driver, False)
    gate.opened.set()
    await harness.until_done()
    assert await harness.effects() == every_effect(1)


async def test_sagas_at_the_same_step_run_as_one_batch(harness: SagaHarness):
    driver = harness.driver(lease_seconds=60)
    sagas = await harness.started(driver, BATCH_SIZE)
    driver.begin()

    driver.runner.drive(sagas)
    await harness.until_done()

    assert driver.batches == [("fetch", BATCH_SIZE), ("bring", BATCH_SIZE)]


async def test_a_process_starts_no_more_than_its_backlog_holds(harness: SagaHarness):
    driver = harness.driver(lease_seconds=60)
    gate = driver.during = Gate()
    driver.begin()
    sagas = await harness.started(driver, BACKLOG_LIMIT)
    driver.runner.drive(sagas)
    await gate.reached.wait()

    waiting = asyncio.ensure_future(driver.runner.acquire_slot())
    await until(lambda: is_seen(driver.runner._wanting))
    assert not waiting.done()
    gate.opened.set()

    await asyncio.wait_for(waiting, IDLE_SECONDS)
    await harness.until_done()


# -------------------------------------------------------------------------------------------------------------- trying


async def test_a_step_that_fails_is_tried_again_until_it_succeeds(harness: SagaHarness):
    driver = harness.driver()
    tries: list[int] = []

    async def fail_thrice(step: str, sagas: Sequence[Saga]) -> None:
        if step == "bring":
            tries.append(sagas[0].tries)
            if len(tries) <= 3:
                raise Unavailable(service="elsewhere")

    driver.during = fail_thrice
    driver.begin()
    driver.runner.drive(await harness.started(driver))
    await harness.until_done()

    assert tries == [0, 1, 2, 3]
    assert driver.count("retried") == 3
    assert await harness.effects() == every_effect(1)


async def test_pauses_double_with_every_try_up_to_a_longest(harness: SagaHarness):
    runner = harness.driver().runner

    for tries in (0, 1, 2, 5, 30, 5_000):
        pause = runner.retry_later(Saga((1, KIND, ""), "fetch", "", tries=tries))

        expected = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** min(tries, 20))
        assert pause.wake_s is not None
        assert 0.5 * expected <= pause.wake_s <= 1.5 * expected
        assert pause.tries == tries + 1


async def test_the_second_try_comes_when_the_first_says_and_later_ones_after_pauses(harness: SagaHarness):
    runner, then = harness.driver().runner, datetime.datetime(2026, 1, 15, tzinfo=datetime.UTC)

    second = runner.retry_later(Saga((1, KIND, ""), "fetch", "", tries=0), then)
    third = runner.retry_later(Saga((1, KIND, ""), "fetch", "", tries=second.tries), then)

    assert (second.wake_at, second.wake_s, second.tries) == (then, None, 1)
    assert (third.wake_at, third.tries) == (None, 2)


async def test_a_failing_saga_does_not_delay_the_others_of_its_batch(harness: SagaHarness):
    driver = harness.driver(lease_seconds=60)

    async def poison(_step: str, sagas: Sequence[Saga]) -> None:
        if any(each.subject_id == 3 for each in sagas):
            raise RuntimeError("this one cannot be done")

    driver.during = poison
    driver.begin()
    driver.runner.drive(await harness.started(driver, 5))
    await harness.until_done(left=1)

    assert await harness.effects() == [effect for effect in every_effect(5) if effect[0] != 3]
    assert (await harness.standing(3)).step == "fetch"


async def test_a_failure_that_cannot_be_saved_is_found_by_its_own_process(harness: SagaHarness):
    driver = harness.driver(lease_seconds=0.3)
    broken = True

    async def fail(_step: str, _sagas: Sequence[Saga]) -> None:
        if broken:
            raise RuntimeError("this cannot be done")

    driver.during = fail
    await harness.execute("ALTER TABLE sagas ADD CONSTRAINT nothing CHECK (tries = 0)")
    driver.begin()
    [mine] = await harness.started(driver)
    driver.runner.drive([mine])

    async def is_taken_over() -> bool:
        return (await harness.standing()).epoch > mine.epoch

    await until(is_taken_over)
    broken = False
    await harness.until_done()
    assert await harness.effects() == every_effect(1)


async def test_a_saga_whose_start_has_an_unknown_outcome_is_found_by_its_own_process(harness: SagaHarness):
    """The answer to the commit was lost: it is there, with this driver, and was never driven."""
    driver = harness.driver(lease_seconds=0.3)
    driver.begin()
    await harness.started(driver)

    await harness.until_done()

    assert driver.count("taken_over") >= 1  # again, where this process stood still for longer than the lease
    assert await harness.effects() == every_effect(1)


# -------------------------------------------------------------------------------------------------------------- leases


async def test_a_lease_is_renewed_while_a_step_takes_long(harness: SagaHarness):
    driver = harness.driver(lease_seconds=4)
    gate = driver.during = Gate()
    driver.begin()
    [mine] = await harness.started(driver)
    driver.runner.drive([mine])
    await gate.reached.wait()
    other = harness.driver("second", 4)
    async with harness.database.read() as tx:
        [began_at] = await tx.fetch_values(datetime.datetime, "SELECT max(renewed_at) FROM saga_drivers")
    other.begin()

    async def has_outlived_two_leases() -> bool:
        """Both processes still renew, and the first lease and another as long would have ended."""
        async with harness.database.read() as tx:
            return await tx.fetch_values(
                int, "SELECT count(*) FROM saga_drivers WHERE renewed_at > $1::timestamptz + interval '8 s'", began_at
            ) == [2]

    await until(has_outlived_two_leases)

    assert (await harness.standing()).epoch == mine.epoch
    gate.opened.set()
    await harness.until_done()
    assert other.count("taken_over") == 0
    assert await harness.effects() == every_effect(1)


async def test_one_lease_covers_all_sagas_of_a_process(harness: SagaHarness):
    driver = harness.driver(lease_seconds=60)
    await harness.started(driver, 40)

    assert await harness.take_over() == []
    async with harness.database.read() as tx:
        assert await tx.fetch_values(int, "SELECT driver FROM saga_drivers") == [driver.runner.driver]


async def test_a_saga_that_waits_for_its_time_is_not_taken_over_before(harness: SagaHarness):
    driver = harness.driver(lease_seconds=60)
    [mine] = await harness.started(driver)
    async with harness.database.transaction() as tx:
        await saga.save(tx, [(mine, Next("patience", "", wake_s=3_600))])
    await harness.expire_leases()

    assert await harness.take_over() == []
    assert (await harness.standing()).driver is None
    assert await harness.wakes_in() > 3_000


async def test_after_a_lease_another_process_takes_over(harness: SagaHarness):
    driver = harness.driver()
    gate = driver.during = Gate()
    driver.begin(sweeping=False)
    driver.runner.drive(await harness.started(driver))
    await gate.reached.wait()
    await driver.stop()

    other = harness.driver("second")
    other.begin()
    await harness.until_done()

    assert other.count("taken_over") == 1
    assert await harness.effects() == every_effect(1)


async def test_a_driver_without_any_lease_is_taken_over(harness: SagaHarness):
    await harness.started()
    other = harness.driver()
    other.begin()

    await harness.until_done()

    assert await harness.effects() == every_effect(1)


async def test_a_lease_from_before_the_clock_was_set_back_does_not_hold(harness: SagaHarness):
    driver = harness.driver(lease_seconds=60)
    await harness.started(driver)
    await harness.execute("UPDATE saga_drivers SET leased_until = now() + interval '1 day'")

    assert len(await harness.take_over()) == 1


async def test_a_parked_saga_is_never_taken_over(harness: SagaHarness):
    driver = harness.driver()
    [mine] = await harness.started(driver)
    async with harness.database.transaction() as tx:
        await saga.save(tx, [(mine, Next("parked", ""))])
    await harness.expire_leases()

    assert await harness.take_over() == []


@pytest.mark.parametrize("due", [True, False])
async def test_two_concurrent_sweeps_take_over_each_saga_once_and_do_not_wait(harness: SagaHarness, due: bool):
    mine = await harness.started(None, 40)
    if due:
        async with harness.database.transaction() as tx:
            await saga.save(tx, [(each, Next("bring", "", wake_s=0)) for each in mine])
    both_have_swept = asyncio.Barrier(2)

    async def sweep(driver: int) -> list[Saga]:
        async with harness.database.read() as tx:
            expired = await saga.expired_drivers(tx, LONG_LEASE_SECONDS)
        async with harness.database.transaction() as tx:
            taken = await saga.take_over(tx, driver, 15, expired)
            await both_have_swept.wait()
            return taken

    async def sweep_twice() -> tuple[list[Saga], list[Saga]]:
        return await asyncio.gather(sweep(1), sweep(2))

    taken = await without_waiting(harness.database._dsn, sweep_twice())

    keys = [each.key for some in taken for each in some]
    assert len(keys) == len(set(keys)) == 30
    epochs = [each.epoch for some in taken for each in some]
    assert len(set(epochs)) == 30


# ------------------------------------------------------------------------------------------------------------- fencing


async def test_a_fenced_driver_changes_nothing_and_is_counted(harness: SagaHarness):
    stale = harness.driver("stale")
    gate = stale.during = Gate()
    stale.begin(sweeping=False)
    stale.runner.drive(await harness.started(stale))
    await gate.reached.wait()
    await harness.expire_leases()
    successor = harness.driver("second")
    successor.begin()
    await harness.until_done()

    gate.opened.set()

    async def is_refused() -> bool:
        return stale.count("fenced") == 1

    await until(is_refused)
    assert stale.batches == [("fetch", 1)]  # and it does not go on
    assert await harness.effects() == every_effect(1)


async def test_a_saga_that_a_process_takes_over_from_itself_is_driven_once(harness: SagaHarness):
    """It lost its lease while it stood in the queue, because the process stood still."""
    driver = harness.driver(lease_seconds=60)
    [mine] = await harness.started(driver)
    driver.runner.drive([mine])
    await harness.expire_leases()
    driver.runner.drive(await harness.take_over(driver=driver.runner.driver))

    driver.begin(sweeping=False)  # a sweep may take it over once more, before the lease is renewed
    await harness.until_done()

    assert driver.batches == [("fetch", 1), ("bring", 1)]
    assert await harness.effects() == every_effect(1)


async def test_of_two_drivers_of_one_saga_only_the_last_saves(harness: SagaHarness):
    [old] = await harness.started()
    async with harness.database.transaction() as tx:
        new = await saga.fence(tx, old.key, 60)
    assert new

    runner = harness.driver().runner
    both = [(old, Next("late", "")), (new, Next("bring", "f"))]
    async with runner.saving(both) as (_, kept):
        assert [each for each, _ in kept] == [new]

    assert ((await harness.standing()).step, old.step, new.step) == ("bring", "fetch", "bring")


async def test_a_request_for_a_saga_fences_its_driver(harness: SagaHarness):
    [mine] = await harness.started()
    async with harness.database.transaction() as tx:
        fenced = await saga.fence(tx, mine.key, 60)
        assert fenced
        kept = await saga.save(tx, [(fenced, Next("elsewhere", ""))])
    assert kept == {(mine.key, fenced.epoch)}

    async with harness.database.transaction() as tx:
        assert await saga.save(tx, [(mine, Next("bring", ""))]) == set()
        assert await saga.save(tx, [(mine, Next("", "", finished=True))]) == set()

    assert ((await harness.standing()).step, (await harness.standing()).epoch) == ("elsewhere", fenced.epoch)


async def test_a_driver_of_another_epoch_is_refused_though_the_version_is_right(harness: SagaHarness):
    [mine] = await harness.started()
    assert await harness.take_over()

    async with harness.database.transaction() as tx:
        assert await saga.save(tx, [(mine, Next("bring", ""))]) == set()
        assert await saga.save(tx, [(mine, Next("", "", finished=True))]) == set()

    assert (await harness.standing()).version == 1


async def test_a_row_that_is_inserted_again_has_a_new_epoch(harness: SagaHarness):
    """Its first driver was fenced, and the row finished and begun anew meanwhile: its save is refused all the same."""
    [mine] = await harness.started()
    [successor] = await harness.take_over()
    async with harness.database.transaction() as tx:
        assert await saga.save(tx, [(successor, Next("", "", finished=True))])
    [again] = await harness.started()

    async with harness.database.transaction() as tx:
        assert await saga.save(tx, [(mine, Next("bring", ""))]) == set()

    assert again.epoch not in (mine.epoch, successor.epoch)
    assert (await harness.standing()).step == "fetch"


@pytest.mark.parametrize("finished", [False, True])
async def test_a_save_whose_commit_has_an_unknown_outcome_is_not_repeated(harness: SagaHarness, finished: bool):
    [mine] = await harness.started()
    outcome = Next("bring", "f", running=not finished, finished=finished)
    async with harness.database.transaction() as tx:
        assert await saga.save(tx, [(mine, outcome)]) == {(mine.key, mine.epoch)}
    # The driver has received no answer, and has not moved on: it saves as before.

    async with harness.database.transaction() as tx:
        assert await saga.save(tx, [(mine, outcome)]) == set()


async def test_sagas_of_a_batch_that_were_not_taken_over_are_saved(harness: SagaHarness):
    sagas = await harness.started(None, 4)
    async with harness.database.transaction() as tx:
        assert await saga.fence(tx, sagas[1].key, 60)

    runner = harness.driver().runner
    outcomes = [(each, Next("bring", "f", finished=each.subject_id == 3)) for each in sagas]
    async with runner.saving(outcomes) as (_, kept):
        assert [each.subject_id for each, _ in kept] == [1, 3, 4]

    assert [each.live for each in sagas] == [False, False, False, False]  # parked, finished, or lost
    assert [each.step for each in sagas] == ["bring", "fetch", "bring", "bring"]
    assert harness.drivers[0].count("fenced") == 1


@pytest.mark.parametrize("mixed", [False, True], ids=["updated", "updated and deleted"])
async def test_batches_that_share_sagas_in_opposite_orders_do_not_deadlock(harness: SagaHarness, mixed: bool):
    for _ in range(5):
        sagas = await harness.started(None, 20)
        saved = await asyncio.gather(save_all(harness, sagas, mixed), save_all(harness, sagas[::-1], mixed))
        assert sorted(saved) == [0, 20]
        await harness.execute("DELETE FROM sagas")


@pytest.mark.parametrize("mixed", [False, True], ids=["updated", "updated and deleted"])
async def test_batches_that_meet_in_the_middle_do_not_wait_for_each_other(harness: SagaHarness, mixed: bool):
    """Another transaction holds the middle one. Locked as they come, each batch would have what the other waits for."""
    sagas = await harness.started(None, 3)
    saving: list[asyncio.Task[int]] = []
    async with harness.database.transaction() as tx:
        await saga.lock(tx, sagas[1].key)
        for some in (sagas, sagas[::-1]):
            saving.append(asyncio.create_task(save_all(harness, some, mixed)))
            await until_blocked(harness.dsn, len(saving), by=saving)

    assert await asyncio.gather(*saving) == [3, 0]


async def save_all(harness: SagaHarness, some: Sequence[Saga], mixed: bool) -> int:
    """How many were saved. `mixed`: every other one of them is finished, and which depends on the order."""
    outcomes = [(each, Next("bring", "", finished=mixed and n % 2 == 0)) for n, each in enumerate(some)]
    async with harness.database.transaction() as tx:
        return len(await saga.save(tx, outcomes))


# -------------------------------------------------------------------------------------------------------------- resting


async def test_a_request_that_waits_for_a_saga_continues_when_it_is_idle(harness: SagaHarness):
    driver = harness.driver(lease_seconds=60)
    gate = driver.during = Gate()
    driver.begin()
    [mine] = await harness.started(driver)
    driver.runner.drive([mine])
    await gate.reached.wait()

    waiting = asyncio.ensure_future(driver.runner.wait_until_idle(mine.key, (), IDLE_SECONDS))
    await until(lambda: is_seen(driver.runner._waiters))
    assert not waiting.done()
    gate.opened.set()
    await waiting

    assert await harness.effects() == every_effect(1)


async def test_a_request_that_waits_for_a_saga_of_another_process_continues_when_it_is_idle(harness: SagaHarness):
    driver, other = harness.driver(lease_seconds=60), harness.driver("second")
    gate = driver.during = Gate()
    driver.begin()
    [mine] = await harness.started(driver)
    driver.runner.drive([mine])
    await gate.reached.wait()

    waiting = asyncio.ensure_future(other.runner.wait_until_idle(mine.key, (), IDLE_SECONDS))
    gate.opened.set()
    await waiting

    assert await harness.effects() == every_effect(1)


async def test_a_request_that_waits_too_long_is_let_go(harness: SagaHarness):
    driver = harness.driver(lease_seconds=60)
    gate = driver.during = Gate()
    driver.begin()
    [mine] = await harness.started(driver)
    driver.runner.drive([mine])
    await gate.reached.wait()

    await driver.runner.wait_until_idle(mine.key, (), 0.05)
    await harness.driver("second").runner.wait_until_idle(mine.key, (), 0.05)

    assert (await harness.standing()).step == "fetch"
    gate.opened.set()


async def test_a_process_that_is_asked_to_stop_sends_long_waits_elsewhere_and_keeps_short_ones(harness: SagaHarness):
    driver = harness.driver(lease_seconds=60)
    gate = driver.during = Gate()
    driver.begin()
    [mine] = await harness.started(driver)
    driver.runner.drive([mine])
    await gate.reached.wait()

    idle = driver.runner.wait_until_idle
    long = asyncio.ensure_future(idle(mine.key, (), 100 * IDLE_SECONDS, until_drained=True))
    short = asyncio.ensure_future(idle(mine.key, (), 100 * IDLE_SECONDS))

    async def both_wait() -> bool:
        return len(driver.runner._waiters.get(mine.key, ())) == 2

    await until(both_wait)
    driver.runner.drain()
    with pytest.raises(Unavailable):
        await long
    with pytest.raises(Unavailable):
        await idle(mine.key, (), 100 * IDLE_SECONDS, until_drained=True)
    assert not short.done()
    gate.opened.set()
    await short

    assert await harness.effects() == every_effect(1)


async def test_requests_that_wait_for_a_saga_are_let_go_when_their_process_ends(harness: SagaHarness):
    driver = harness.driver(lease_seconds=60)
    gate = driver.during = Gate()
    driver.begin()
    [mine, waits] = await harness.started(driver, 2)
    driver.runner.drive([mine])
    await gate.reached.wait()
    async with harness.database.transaction() as tx:
        await saga.save(tx, [(waits, Next("later", "", wake_s=3_600))])

    idle = driver.runner.wait_until_idle
    waiting = asyncio.gather(*(idle(each.key, (), 100 * IDLE_SECONDS) for each in (mine, waits)))
    await until(lambda: is_seen(driver.runner._waiters.get(mine.key, ())))
    await until(lambda: is_seen(driver.runner._waiters.get(waits.key, ())))
    await driver.stop()

    await waiting


@pytest.mark.parametrize("key", [(404, KIND, ""), (1, "of another kind", "")])
async def test_a_saga_that_is_gone_or_waits_for_a_client_is_idle(harness: SagaHarness, key: Key):
    runner = harness.driver().runner
    await runner.wait_until_idle(key, (), IDLE_SECONDS)
    [mine] = await harness.started(None, 1, "awaiting")
    async with harness.database.transaction() as tx:
        await saga.save(tx, [(mine, Next("awaiting", "", wake_s=3_600))])
    await runner.wait_until_idle((1, KIND, ""), ("awaiting",), IDLE_SECONDS)


# -------------------------------------------------------------------------------------------------------------- crashes


async def test_a_saga_that_one_process_leaves_in_the_middle_is_finished_by_another(harness: SagaHarness):
    first = harness.driver(lease_seconds=0.3)
    held = Gate()

    async def stop_at_bring(step: str, sagas: Sequence[Saga]) -> None:
        if step == "bring":
            await held(step, sagas)

    first.during = stop_at_bring
    first.begin()
    first.runner.drive(await harness.started(first, 30))
    await held.reached.wait()
    await first.stop()

    second = harness.driver("second", 0.3)
    second.begin()
    await harness.until_done()

    assert await harness.effects() == every_effect(30)


async def test_two_processes_that_take_each_others_sagas_over_do_each_step_once(harness: SagaHarness):
    """Both fail at random moments, and leases end in the middle of steps."""
    count = 150
    drivers = [harness.driver(name, 0.3) for name in ("first", "second")]
    turns = itertools.count()

    async def is_taken_over(mine: Saga) -> bool:
        await harness.expire_leases()
        async with harness.database.read() as tx:
            found = await saga.find(tx, mine.key)
        return found is None or found.epoch > mine.epoch

    async def fail(_step: str, sagas: Sequence[Saga]) -> None:
        turn = next(turns)
        if turn % 5 == 1:
            raise RuntimeError("failed")
        if turn % 7 == 2:
            await until(functools.partial(is_taken_over, sagas[0]))

    sagas = await harness.started(drivers[0], count)
    for driver in drivers:
        driver.during = fail
        driver.begin()
    for n in range(0, count, 10):
        drivers[0].runner.drive(sagas[n : n + 10])
    await harness.until_done()

    async def is_fenced() -> bool:  # a driver that has lost a saga may not have received the refusal yet
        return sum(driver.count("fenced") for driver in drivers) > 0

    await until(is_fenced)
    assert await harness.effects() == every_effect(count)
    assert sum(driver.count("taken_over") for driver in drivers) > 0


async def test_a_connection_that_breaks_at_a_commit_leaves_each_effect_once(harness: SagaHarness):
    driver = harness.driver(lease_seconds=0.5)
    cuts = itertools.count()

    async def cut(_step: str, _sagas: Sequence[Saga]) -> None:
        if next(cuts) % 3 == 0:
            with contextlib.suppress(Exception):
                await harness.execute(
                    """
                    SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                     WHERE datname = current_database() AND pid <> pg_backend_pid() AND state = 'idle'
                    """
                )

    driver.during = cut
    driver.begin()
    driver.runner.drive(await harness.started(driver, 20))
    await harness.until_done()

    assert await harness.effects() == every_effect(20)
