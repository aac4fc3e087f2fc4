"""Sagas: every step is finished, its effect is there once, and who has lost a saga changes nothing any more."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final

import pytest
import pytest_asyncio

from mercato.chassis import saga
from mercato.chassis.clock import SystemClock
from mercato.chassis.contract import Unavailable
from mercato.chassis.db import Database, Row
from mercato.chassis.runner import (
    BACKLOG_LIMIT,
    BATCH_SIZE,
    FIRST_PAUSE_SECONDS,
    LONGEST_PAUSE_SECONDS,
    Runner,
)
from mercato.chassis.saga import Key, Next, Saga
from mercato.chassis.telemetry import Telemetry
from mercato.chassis.testing import Cluster

MIGRATIONS: Final = Path(__file__).with_name("migrations_with_sagas")
KIND: Final = "errand"
LEASE_SECONDS: Final = 1.0
UNTIL_SECONDS: Final = 30.0
POLL_SECONDS: Final = 0.01


class SagaStanding(Row):
    step: str
    state: str
    epoch: int
    version: int
    tries: int
    wakes: bool


class Driver:
    """A process that drives sagas of three steps: fetch, bring, done. Each step leaves one effect.

    `during` is what happens to a batch in the middle of a step, before it is saved.
    """

    def __init__(self, world: SagaWorld, name: str, lease_seconds: float = LEASE_SECONDS) -> None:
        self.name = name
        self.telemetry = Telemetry()
        self.runner = Runner(
            world.database,
            clock=SystemClock(),
            telemetry=self.telemetry,
            lease_seconds=lease_seconds,
            sweep_seconds=0.02,
        )
        self.runner.register(KIND, {"fetch": self._fetch, "bring": self._bring})
        self.during: Callable[[str, Sequence[Saga]], Awaitable[None]] | None = None
        self.batches: list[tuple[str, int]] = []
        self.loops: list[asyncio.Task[None]] = []

    def begin(self, *, sweeping: bool = True) -> None:
        sweep, *lanes = self.runner.loops
        self.loops = [asyncio.create_task(loop()) for loop in (lanes if not sweeping else (sweep, *lanes))]

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
        came_to = [(each, Next(following, each.state + step[0], "went well", running=running)) for each in sagas]
        async with self.runner.saving(came_to) as (tx, kept):
            await tx.execute(
                """
                INSERT INTO effects (subject_id, step, driver)
                SELECT unnest($1::bigint[]), $2, $3
                """,
                [each.subject_id for each, _ in kept],
                step,
                self.name,
            )


class SagaWorld:
    """The database of a service with sagas, and its processes."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.drivers: list[Driver] = []

    def driver(self, name: str = "first", lease_seconds: float = LEASE_SECONDS) -> Driver:
        made = Driver(self, name, lease_seconds)
        self.drivers.append(made)
        return made

    async def started(self, count: int = 1, lease_seconds: float = LEASE_SECONDS, step: str = "fetch") -> list[Saga]:
        """New sagas, with a lease of whoever is about to drive them."""
        sagas = [Saga((i, KIND, ""), step, "") for i in range(1, count + 1)]
        async with self.database.transaction() as tx:
            await saga.start(tx, sagas, lease_seconds)
        return sagas

    async def standing(self, subject_id: int = 1) -> SagaStanding:
        async with self.database.read() as tx:
            row = await tx.fetch_one(
                SagaStanding,
                """
                SELECT step, state, epoch, version, tries, wake_at IS NOT NULL AS wakes
                  FROM sagas WHERE subject_id = $1
                """,
                subject_id,
            )
        assert row
        return row

    async def wakes_in(self, subject_id: int = 1) -> float:
        """In how many seconds anybody may take a saga over."""
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

    async def until_waiting(self, count: int) -> None:
        """Waits until so many statements wait for a lock."""

        async def are_waiting() -> bool:
            async with self.database.read() as tx:
                [waiting] = await tx.fetch_values(
                    int,
                    """
                    SELECT count(*) FROM pg_stat_activity
                     WHERE datname = current_database() AND wait_event_type = 'Lock'
                    """,
                )
            return waiting >= count

        await until(are_waiting)

    async def expire_leases(self) -> None:
        """As if their holders had been silent for long."""
        await self.execute("UPDATE sagas SET wake_at = now() - interval '1 second' WHERE wake_at IS NOT NULL")

    async def until_done(self, count: int = 1) -> None:
        async def are_done() -> bool:
            async with self.database.read() as tx:
                return await tx.fetch_values(int, "SELECT count(*) FROM sagas WHERE step = 'done'") == [count]

        await until(are_done)


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    end = asyncio.get_running_loop().time() + UNTIL_SECONDS
    while not await holds():
        assert asyncio.get_running_loop().time() < end, "what the test waits for does not happen"
        await asyncio.sleep(POLL_SECONDS)


@pytest_asyncio.fixture
async def world(cluster: Cluster) -> AsyncGenerator[SagaWorld]:
    dsn = await cluster.fresh_database("errands", MIGRATIONS)
    database = Database(dsn, "errands", Telemetry(), size=8)
    await database.open()
    made = SagaWorld(database)
    try:
        yield made
    finally:
        for driver in made.drivers:
            await driver.stop()
        await database.close()
        await cluster.release_database(dsn)


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


async def test_steps_run_one_after_the_other_and_are_noted(world: SagaWorld):
    driver = world.driver()
    driver.begin()

    driver.runner.drive(await world.started())
    await world.until_done()

    now = await world.standing()
    assert (now.step, now.state, now.epoch, now.version, now.wakes) == ("done", "fb", 1, 3, False)
    async with world.database.read() as tx:
        noted = await saga.steps(tx, 1)
    assert [(row.step, row.outcome, row.tries, row.epoch) for row in noted] == [
        ("fetch", "went well", 1, 1),
        ("bring", "went well", 1, 1),
    ]
    assert all(row.began_at <= row.at for row in noted)
    assert await world.effects() == every_effect(1)


async def test_those_at_the_same_step_go_through_it_as_one_batch(world: SagaWorld):
    driver = world.driver(lease_seconds=60)
    sagas = await world.started(BATCH_SIZE, 60)
    driver.begin()

    driver.runner.drive(sagas)
    await world.until_done(BATCH_SIZE)

    assert driver.batches == [("fetch", BATCH_SIZE), ("bring", BATCH_SIZE)]


async def test_a_process_starts_no_more_than_its_backlog_holds(world: SagaWorld):
    driver = world.driver(lease_seconds=60)
    gate = driver.during = Gate()
    driver.begin()
    sagas = await world.started(BACKLOG_LIMIT, 60)
    await driver.runner.room()
    driver.runner.drive(sagas)
    await gate.reached.wait()

    waiting = asyncio.ensure_future(driver.runner.room())
    await asyncio.sleep(0.05)
    assert not waiting.done()
    gate.opened.set()

    await asyncio.wait_for(waiting, UNTIL_SECONDS)
    await world.until_done(BACKLOG_LIMIT)


# -------------------------------------------------------------------------------------------------------------- trying


async def test_a_step_that_fails_is_tried_again_until_it_is_done(world: SagaWorld):
    driver = world.driver()
    failures = itertools.count()

    async def fail_thrice(step: str, _sagas: Sequence[Saga]) -> None:
        if step == "bring" and next(failures) < 3:
            raise Unavailable(service="elsewhere")

    driver.during = fail_thrice
    driver.begin()
    driver.runner.drive(await world.started())
    await world.until_done()

    async with world.database.read() as tx:
        noted = await saga.steps(tx, 1)
    assert [(row.step, row.tries) for row in noted] == [
        ("fetch", 1),
        ("bring", 1),
        ("bring", 2),
        ("bring", 3),
        ("bring", 4),
    ]
    assert {row.outcome for row in noted[1:4]} == {Unavailable.code}
    assert driver.count("retried") == 3
    assert await world.effects() == every_effect(1)
    assert (await world.standing()).tries == 0


async def test_pauses_double_with_every_try_up_to_a_longest(world: SagaWorld):
    runner = world.driver().runner

    for tries in (0, 1, 2, 5, 30, 5_000):
        pause = runner.again(Saga((1, KIND, ""), "fetch", "", tries=tries), "failed")

        expected = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** min(tries, 20))
        assert pause.wake_s is not None
        assert 0.5 * expected <= pause.wake_s <= 1.5 * expected
        assert pause.tries == tries + 1


async def test_one_that_fails_does_not_hold_up_those_that_share_its_batch(world: SagaWorld):
    driver = world.driver(lease_seconds=60)

    async def poison(_step: str, sagas: Sequence[Saga]) -> None:
        if any(each.subject_id == 3 for each in sagas):
            raise RuntimeError("this one cannot be done")

    driver.during = poison
    driver.begin()
    driver.runner.drive(await world.started(5, 60))
    await world.until_done(4)

    assert await world.effects() == [effect for effect in every_effect(5) if effect[0] != 3]
    left = await world.standing(3)
    assert left.step == "fetch"
    assert left.wakes


async def test_one_whose_failure_cannot_even_be_noted_is_taken_over(world: SagaWorld):
    driver = world.driver(lease_seconds=0.3)
    broken = True

    async def fail(_step: str, _sagas: Sequence[Saga]) -> None:
        if broken:
            raise RuntimeError("this cannot be done")

    driver.during = fail
    await world.execute("ALTER TABLE saga_steps ADD CONSTRAINT nothing CHECK (outcome <> 'failed')")
    driver.begin()
    driver.runner.drive(await world.started(1, 0.3))

    async def is_taken_over() -> bool:
        return (await world.standing()).epoch > 1

    await until(is_taken_over)
    broken = False
    await world.until_done()
    assert await world.effects() == every_effect(1)


# -------------------------------------------------------------------------------------------------------------- leases


async def test_a_lease_is_renewed_while_a_step_takes_long(world: SagaWorld):
    driver = world.driver(lease_seconds=0.6)
    gate = driver.during = Gate()
    driver.begin()
    driver.runner.drive(await world.started(1, 0.6))
    await gate.reached.wait()
    other = world.driver("second", 0.6)
    other.begin()
    await asyncio.sleep(1.5)  # longer than the lease, and nobody comes

    assert (await world.standing()).epoch == 1
    gate.opened.set()
    await world.until_done()
    assert other.count("taken_over") == 0
    assert await world.effects() == every_effect(1)


async def test_what_waits_for_its_time_is_not_renewed_while_the_rest_of_its_batch_goes_on(world: SagaWorld):
    driver = world.driver(lease_seconds=0.3)
    gate = Gate()

    async def wait_with_the_first(step: str, sagas: Sequence[Saga]) -> None:
        if step == "fetch":
            patient = [(each, Next("patience", "", "waits", wake_s=3_600)) for each in sagas if each.subject_id == 1]
            async with driver.runner.saving(patient):
                pass
        else:
            await gate(step, sagas)

    driver.during = wait_with_the_first
    driver.begin()
    driver.runner.drive(await world.started(2, 0.3))
    await gate.reached.wait()
    await asyncio.sleep(0.5)  # leases are renewed meanwhile

    now = await world.standing()
    assert (now.step, now.epoch) == ("patience", 1)
    assert await world.wakes_in() > 3_000
    gate.opened.set()


async def test_a_lease_is_not_renewed_over_what_was_saved_meanwhile(world: SagaWorld):
    [mine] = await world.started(1, 60)
    async with world.database.transaction() as tx:
        await saga.save(tx, [(mine, Next("patience", "", "waits", wake_s=3_600))], 60)
        # The renewal was about to be made when this was saved: it knows nothing of it.
    async with world.database.transaction() as tx:
        await saga.renew(tx, [mine], 60)

    assert await world.wakes_in() > 3_000


async def test_after_a_lease_another_process_takes_over(world: SagaWorld):
    driver = world.driver()
    gate = driver.during = Gate()
    driver.begin(sweeping=False)
    driver.runner.drive(await world.started())
    await gate.reached.wait()
    await driver.stop()

    other = world.driver("second")
    other.begin()
    await world.until_done()

    assert (await world.standing()).epoch == 2
    assert other.count("taken_over") == 1
    assert await world.effects() == every_effect(1)


async def test_before_the_end_of_a_lease_nobody_takes_over(world: SagaWorld):
    await world.started(3, 60)
    async with world.database.transaction() as tx:
        assert await saga.take_over(tx, 10, 60) == []


async def test_what_is_parked_is_never_taken_over(world: SagaWorld):
    driver = world.driver()
    driver.begin()
    driver.runner.drive(await world.started())
    await world.until_done()
    await world.expire_leases()
    async with world.database.transaction() as tx:
        assert await saga.take_over(tx, 10, 60) == []


async def test_two_that_sweep_at_once_take_over_each_saga_once(world: SagaWorld):
    await world.started(40)
    await world.expire_leases()

    async def sweep() -> list[Saga]:
        async with world.database.transaction() as tx:
            taken = await saga.take_over(tx, 15, 60)
            await asyncio.sleep(0.05)  # so that the other one sweeps meanwhile
            return taken

    taken = await asyncio.gather(sweep(), sweep())

    keys = [each.key for some in taken for each in some]
    assert len(keys) == len(set(keys)) == 30
    assert {each.epoch for some in taken for each in some} == {2}


# ------------------------------------------------------------------------------------------------------------- fencing


async def test_a_driver_that_comes_back_from_the_dead_changes_nothing_and_is_counted(world: SagaWorld):
    zombie = world.driver("zombie")
    gate = zombie.during = Gate()
    zombie.begin(sweeping=False)
    zombie.runner.drive(await world.started())
    await gate.reached.wait()
    await world.expire_leases()
    successor = world.driver("second")
    successor.begin()
    await world.until_done()
    before = await world.standing()

    gate.opened.set()

    async def is_refused() -> bool:
        return zombie.count("fenced") == 1

    await until(is_refused)
    assert await world.standing() == before
    assert zombie.batches == [("fetch", 1)]  # and it does not go on
    assert await world.effects() == every_effect(1)


async def test_one_that_a_process_takes_over_from_itself_is_driven_once(world: SagaWorld):
    """It lost its lease while it stood in the queue, because the process stood still."""
    driver = world.driver(lease_seconds=60)
    driver.runner.drive(await world.started())
    await world.expire_leases()
    sweep, *_ = driver.runner.loops
    driver.loops = [asyncio.create_task(sweep())]

    async def is_taken_over() -> bool:
        return (await world.standing()).epoch == 2

    await until(is_taken_over)
    driver.loops += [asyncio.create_task(loop()) for loop in driver.runner.loops[1:]]
    await world.until_done()

    assert driver.batches == [("fetch", 1), ("bring", 1)]
    assert await world.effects() == every_effect(1)


async def test_of_two_that_have_the_same_saga_only_the_last_saves(world: SagaWorld):
    [old] = await world.started()
    async with world.database.transaction() as tx:
        new = await saga.seize(tx, old.key, 60)
    assert new

    runner = world.driver().runner
    both = [(old, Next("late", "", "late")), (new, Next("bring", "f", "went well"))]
    async with runner.saving(both) as (_, kept):
        assert [each for each, _ in kept] == [new]

    assert ((await world.standing()).step, old.step, new.step) == ("bring", "fetch", "bring")


async def test_who_seizes_a_saga_has_it_and_its_driver_has_not(world: SagaWorld):
    [mine] = await world.started()
    async with world.database.transaction() as tx:
        seized = await saga.seize(tx, mine.key, 60)
        assert seized
        kept = await saga.save(tx, [(seized, Next("elsewhere", "", "sent away"))], 60)
    assert kept == {(mine.key, 2)}

    async with world.database.transaction() as tx:
        assert await saga.save(tx, [(mine, Next("bring", "", "late"))], 60) == set()

    assert ((await world.standing()).step, (await world.standing()).epoch) == ("elsewhere", 2)


async def test_a_driver_of_another_epoch_is_refused_though_the_version_is_right(world: SagaWorld):
    [mine] = await world.started()
    await world.expire_leases()
    async with world.database.transaction() as tx:
        await saga.take_over(tx, 10, 60)

    async with world.database.transaction() as tx:
        assert await saga.save(tx, [(mine, Next("bring", "", "late"))], 60) == set()

    assert (await world.standing()).version == 1


async def test_a_save_whose_commit_was_not_heard_of_is_not_made_again(world: SagaWorld):
    [mine] = await world.started()
    came_to = Next("bring", "f", "went well", running=True)
    async with world.database.transaction() as tx:
        assert await saga.save(tx, [(mine, came_to)], 60) == {(mine.key, 1)}
    # The driver has heard of no answer, and has not moved on: it saves as before.

    async with world.database.transaction() as tx:
        assert await saga.save(tx, [(mine, came_to)], 60) == set()

    assert (await world.standing()).version == 2
    async with world.database.read() as tx:
        assert len(await saga.steps(tx, 1)) == 1


async def test_those_of_a_batch_that_were_not_taken_over_are_saved(world: SagaWorld):
    sagas = await world.started(4, 60)
    async with world.database.transaction() as tx:
        assert await saga.seize(tx, sagas[1].key, 60)

    runner = world.driver().runner
    async with runner.saving([(each, Next("bring", "f", "went well")) for each in sagas]) as (_, kept):
        assert [each.subject_id for each, _ in kept] == [1, 3, 4]

    assert [each.live for each in sagas] == [False, False, False, False]  # parked, or lost
    assert [each.step for each in sagas] == ["bring", "fetch", "bring", "bring"]
    assert world.drivers[0].count("fenced") == 1


async def test_batches_that_share_sagas_in_opposite_orders_do_not_deadlock(world: SagaWorld):
    sagas = await world.started(20, 60)

    for _ in range(5):
        saved = await asyncio.gather(save_all(world, sagas), save_all(world, sagas[::-1]))
        assert sorted(saved) == [0, 20]
        for each in sagas:
            each.version += 1


async def test_batches_that_meet_in_the_middle_do_not_wait_for_each_other(world: SagaWorld):
    """Somebody holds the middle one. Locked as they come, each batch would then have what the other waits for."""
    sagas = await world.started(3, 60)
    saving: list[asyncio.Task[int]] = []
    async with world.database.transaction() as tx:
        await saga.lock(tx, sagas[1].key)
        for some in (sagas, sagas[::-1]):
            saving.append(asyncio.create_task(save_all(world, some)))
            await world.until_waiting(len(saving))

    assert await asyncio.gather(*saving) == [3, 0]


async def save_all(world: SagaWorld, some: Sequence[Saga]) -> int:
    """How many were saved."""
    async with world.database.transaction() as tx:
        return len(await saga.save(tx, [(each, Next("bring", "", "went well")) for each in some], 60))


# -------------------------------------------------------------------------------------------------------------- resting


async def test_who_waits_for_a_saga_hears_when_it_is_at_rest(world: SagaWorld):
    driver = world.driver(lease_seconds=60)
    gate = driver.during = Gate()
    driver.begin()
    [mine] = await world.started(1, 60)
    driver.runner.drive([mine])
    await gate.reached.wait()

    waiting = asyncio.ensure_future(driver.runner.at_rest(mine.key, (), UNTIL_SECONDS))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    gate.opened.set()
    await waiting

    assert (await world.standing()).step == "done"


async def test_who_waits_for_what_another_process_drives_hears_it_too(world: SagaWorld):
    driver, other = world.driver(lease_seconds=60), world.driver("second")
    gate = driver.during = Gate()
    driver.begin()
    [mine] = await world.started(1, 60)
    driver.runner.drive([mine])
    await gate.reached.wait()

    waiting = asyncio.ensure_future(other.runner.at_rest(mine.key, (), UNTIL_SECONDS))
    gate.opened.set()
    await waiting

    assert (await world.standing()).step == "done"


async def test_who_waits_too_long_is_let_go(world: SagaWorld):
    driver = world.driver(lease_seconds=60)
    gate = driver.during = Gate()
    driver.begin()
    [mine] = await world.started(1, 60)
    driver.runner.drive([mine])
    await gate.reached.wait()

    await driver.runner.at_rest(mine.key, (), 0.05)
    await world.driver("second").runner.at_rest(mine.key, (), 0.05)

    assert (await world.standing()).step == "fetch"
    gate.opened.set()


@pytest.mark.parametrize("key", [(404, KIND, ""), (1, "of another kind", "")])
async def test_what_is_not_there_or_waits_for_somebody_is_at_rest(world: SagaWorld, key: Key):
    runner = world.driver().runner
    await runner.at_rest(key, (), UNTIL_SECONDS)
    await world.started(1, 60, "awaiting")
    await runner.at_rest((1, KIND, ""), ("awaiting",), UNTIL_SECONDS)


# -------------------------------------------------------------------------------------------------------------- crashes


async def test_what_one_process_leaves_in_the_middle_another_finishes(world: SagaWorld):
    first = world.driver(lease_seconds=0.3)
    held = Gate()

    async def stop_at_bring(step: str, sagas: Sequence[Saga]) -> None:
        if step == "bring":
            await held(step, sagas)

    first.during = stop_at_bring
    first.begin()
    first.runner.drive(await world.started(30, 0.3))
    await held.reached.wait()
    await first.stop()

    second = world.driver("second", 0.3)
    second.begin()
    await world.until_done(30)

    assert await world.effects() == every_effect(30)


async def test_two_processes_that_take_each_others_sagas_over_do_each_step_once(world: SagaWorld):
    """Both stumble at random moments, and leases end in the middle of steps."""
    count = 150
    drivers = [world.driver(name, 0.3) for name in ("first", "second")]
    turns = itertools.count()

    async def is_taken_over(mine: Saga) -> bool:
        await world.expire_leases()
        return (await world.standing(mine.subject_id)).epoch > mine.epoch

    async def stumble(_step: str, sagas: Sequence[Saga]) -> None:
        turn = next(turns)
        if turn % 5 == 1:
            raise RuntimeError("stumbled")
        if turn % 7 == 2:
            await until(functools.partial(is_taken_over, sagas[0]))

    for driver in drivers:
        driver.during = stumble
        driver.begin()
    sagas = await world.started(count, 0.3)
    for n in range(0, count, 10):
        drivers[n // 10 % 2].runner.drive(sagas[n : n + 10])
    await world.until_done(count)

    async def is_fenced() -> bool:  # who has lost a saga may still be on its way to hear so
        return sum(driver.count("fenced") for driver in drivers) > 0

    await until(is_fenced)
    assert await world.effects() == every_effect(count)
    assert sum(driver.count("taken_over") for driver in drivers) > 0


async def test_a_connection_that_breaks_at_a_commit_leaves_each_effect_once(world: SagaWorld):
    driver = world.driver(lease_seconds=0.5)
    cuts = itertools.count()

    async def cut(_step: str, _sagas: Sequence[Saga]) -> None:
        if next(cuts) % 3 == 0:
            with contextlib.suppress(Exception):
                await world.execute(
                    """
                    SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                     WHERE datname = current_database() AND pid <> pg_backend_pid() AND state = 'idle'
                    """
                )

    driver.during = cut
    driver.begin()
    driver.runner.drive(await world.started(20, 0.5))
    await world.until_done(20)

    assert await world.effects() == every_effect(20)
