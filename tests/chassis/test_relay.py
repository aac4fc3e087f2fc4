"""From the outbox to the effect: everything, once, in order, whoever fails, is down or dies."""

# What fails stands inside a transaction, which is a block.
# ruff: noqa: PT012

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence

import msgspec
import pytest
import pytest_asyncio
from structlog.testing import capture_logs

from chassis.event_world import (
    NO_RETRIES,
    QUICK,
    SOURCE,
    EventWorld,
    Taker,
    ended,
    opened,
    until,
)
from mercato.chassis import faults, inbox, outbox, relay
from mercato.chassis.contract import Unavailable
from mercato.chassis.events import TRIES, Event, Subscription, emit
from mercato.chassis.faults import Fault
from mercato.chassis.inbox import LocalBus, ReplayFailed, dead_letters, replay
from mercato.chassis.relay import Delivery, Outcome, Recipient, Relay
from mercato.chassis.testing import Cluster


@pytest_asyncio.fixture
async def world(cluster: Cluster) -> AsyncGenerator[EventWorld]:
    async with opened(cluster) as made:
        yield made


@pytest.fixture
def plant() -> Iterator[Callable[[str, Fault], Callable[[], None]]]:
    removals: list[Callable[[], None]] = []

    def plant(point: str, fault: Fault) -> Callable[[], None]:
        removals.append(faults.plant(point, fault))
        return removals[-1]

    yield plant
    for remove in removals:
        remove()


async def drained(world: EventWorld) -> None:
    await until(world.is_drained, "everything is published")


async def events_of(world: EventWorld) -> list[Event]:
    async with world.publisher.read() as tx:
        return await outbox.fresh(tx, SOURCE)


async def dead_ids(taker: Taker) -> list[int]:
    async with taker.database.read() as tx:
        return [letter.event_id for letter in await dead_letters(tx, taker.name)]


async def in_order(taker: Taker) -> None:
    """Every subject's versions rise by one from 1: nothing is missing, doubled or out of order."""
    rows = sorted(enumerate(await taker.effects()), key=lambda pair: (pair[1].subject_id, pair[0]))
    for subject_id, group in itertools.groupby(rows, key=lambda pair: pair[1].subject_id):
        versions = [row.version for _, row in group]
        assert versions == list(range(1, len(versions) + 1)), (taker.name, subject_id, versions)


# -------------------------------------------------------------------------------------------------------- the way


async def test_every_consumer_gets_what_it_wants_in_order(world: EventWorld):
    await world.emit(1, 2, 1)
    await world.emit(2, type="thing.seen")
    await world.emit(1)
    async with world.relaying():
        await drained(world)
    assert await world.left.ids() == [1, 2, 3, 4, 5]
    assert await world.right.ids() == [1, 2, 3, 5]


async def test_what_was_rolled_back_is_never_told(world: EventWorld):
    with pytest.raises(ZeroDivisionError):
        async with world.publisher.transaction() as tx:
            await emit(tx, [world.outgoing(1)])
            raise ZeroDivisionError
    await world.emit(2)
    async with world.relaying():
        await drained(world)
    assert [row.subject_id for row in await world.left.effects()] == [2]


async def test_a_lower_id_that_commits_later_is_delivered(world: EventWorld):
    async with world.relaying():
        async with world.publisher.transaction() as tx:
            await emit(tx, [world.outgoing(1)])  # has the id 1, and is seen by nobody yet
            await world.emit(2)
            await until(world.is_drained, "the later id is published")
            assert await world.left.ids() == [2]
        await drained(world)
    assert await world.left.ids() == [2, 1]


async def test_more_events_than_a_batch_come_in_order(world: EventWorld):
    for _ in range(3):
        await world.emit(*[1, 2, 3] * (outbox.BATCH // 6))
    async with world.relaying():
        await drained(world)
    assert await world.left.ids() == sorted(await world.left.ids())
    await in_order(world.right)


async def test_a_relay_begins_with_a_lease_and_gives_it_back(world: EventWorld):
    await world.emit(1)
    async with world.relaying():
        await drained(world)
        assert await world.values("SELECT count(*) FROM relays") == [1]
    assert await world.values("SELECT count(*) FROM relays") == [0]


# ------------------------------------------------------------------------------------------------------ once only


async def test_an_event_that_is_delivered_twice_has_one_effect(world: EventWorld):
    await world.emit(1, 2)
    deliveries = [Delivery(event) for event in await events_of(world)]
    assert await world.bus.deliver("left", deliveries) == [Outcome("taken")] * 2
    assert await world.bus.deliver("left", deliveries) == [Outcome("taken")] * 2
    assert await world.left.ids() == [1, 2]


async def test_of_a_batch_only_what_is_new_reaches_the_handler(world: EventWorld):
    await world.emit(1, 2, 3)
    events = await events_of(world)
    await world.bus.deliver("left", [Delivery(events[1])])
    await world.bus.deliver("left", [Delivery(event) for event in events])
    assert world.left.handled == [[2], [1, 3]]


async def test_two_deliveries_at_the_same_moment_have_one_effect(world: EventWorld):
    await world.emit(*range(20))
    deliveries = [Delivery(event) for event in await events_of(world)]
    await asyncio.gather(*(world.bus.deliver("left", deliveries) for _ in range(4)))
    assert await world.left.ids() == list(range(1, 21))


async def test_taken_is_said_after_the_commit(world: EventWorld, plant: Callable[[str, Fault], Callable[[], None]]):
    await world.emit(1)

    async def lose_the_connection(_: str) -> None:
        raise Unavailable(service="left")

    remove = plant(inbox.BEFORE_COMMIT, lose_the_connection)
    [outcome] = await world.bus.deliver("left", [Delivery(event) for event in await events_of(world)])
    assert outcome.kind == "down"
    assert await world.left.ids() == []
    remove()
    async with world.relaying():
        await drained(world)
    assert await world.left.ids() == [1]


async def test_a_commit_whose_answer_was_lost_has_one_effect(
    world: EventWorld, plant: Callable[[str, Fault], Callable[[], None]]
):
    await world.emit(1)
    failures = iter([True, True, True])

    async def lose_the_answer(_: str) -> None:
        if next(failures, False):
            raise Unavailable(service="left")

    plant(inbox.AFTER_COMMIT, lose_the_answer)
    async with world.relaying():
        await drained(world)
    assert await world.left.ids() == [1]
    assert await world.right.ids() == [1]


# ---------------------------------------------------------------------------------------------------------- poison


async def test_a_poison_event_is_dead_after_its_tries_and_holds_back_its_subject_alone(world: EventWorld):
    world.left.poison = {2}
    await world.emit(1, 2, 3, 2, 1, 2)
    async with world.relaying():
        await drained(world)
    assert await dead_ids(world.left) == [2]
    alone = [batch for batch in world.left.handled if batch == [2]]
    assert len(alone) == TRIES
    effects = [(row.subject_id, row.version) for row in await world.left.effects()]
    assert effects == [(1, 1), (3, 1), (1, 2), (2, 2), (2, 3)]
    assert await world.right.ids() == [1, 2, 3, 4, 5, 6]
    async with world.left.database.read() as tx:
        [letter] = await dead_letters(tx, "left")
    assert (letter.tries, letter.error, letter.type) == (TRIES, "Cannot: event 2 is poison", "thing.changed")


async def test_while_an_event_waits_for_its_retry_everything_else_goes_on(world: EventWorld):
    world.left.poison = {1}
    await world.emit(1, 1, 2)
    async with world.relaying(world.relay(retry_seconds=NO_RETRIES)):
        await until(lambda: has(world.left, 1), "the other subject is taken")
        await world.emit(1, 2)
        await until(lambda: has(world.left, 2), "the other subject is taken again")
        await until(lambda: has(world.right, 5), "the other consumer has all")
        await until(lambda: remain(world, [1, 2, 4]), "all but the waiting subject is published")
    assert [row.subject_id for row in await world.left.effects()] == [2, 2]
    assert await world.values("SELECT event_id FROM outbox_retries ORDER BY event_id") == [1, 2, 4]


async def remain(world: EventWorld, ids: list[int]) -> bool:
    return await world.unpublished() == ids


async def test_an_event_that_was_held_back_behind_one_that_is_taken_meanwhile_gets_its_turn(
    world: EventWorld, plant: Callable[[str, Fault], Callable[[], None]]
):
    """The offering loop has seen that an earlier event waits; before it writes the later one down, that is taken."""
    world.left.poison = {1}
    await world.emit(1)
    async with world.relaying(world.relay(retry_seconds=NO_RETRIES)):
        await until(lambda: owes(world, 1), "the first is owed")
        world.left.poison = set()
        reached, go_on, sleepers = asyncio.Event(), asyncio.Event(), iter([True])

        async def sleep_once(_: str) -> None:
            if next(sleepers, False):
                reached.set()
                await go_on.wait()

        plant(relay.BEFORE_DELIVER, sleep_once)
        await world.emit(1)
        await asyncio.wait_for(reached.wait(), 30)
        async with world.publisher.transaction() as tx:
            await tx.execute("UPDATE outbox_retries SET retry_at = now()")
        await until(lambda: owes(world, 0), "the first is taken")
        go_on.set()
        await drained(world)
    assert await world.left.ids() == [1, 2]


async def has(taker: Taker, count: int) -> bool:
    return len(await taker.ids()) == count


async def test_a_subject_with_thousands_of_events_that_wait_starves_nobody(world: EventWorld):
    world.left.poison = {1}
    for _ in range(6):
        await world.emit(*[1] * 500)
    await world.emit(2)
    async with world.relaying(world.relay(retry_seconds=NO_RETRIES)):
        await until(lambda: has(world.left, 1), "the other subject is taken")
        await until(lambda: has(world.right, 3_001), "the other consumer has all")
        world.left.poison = set()
        async with world.publisher.transaction() as tx:
            await tx.execute("UPDATE outbox_retries SET retry_at = now() WHERE event_id = 1")
        await drained(world)
    await in_order(world.left)
    assert len(await world.left.ids()) == 3_001
    assert await world.values("SELECT count(*) FROM outbox_retries") == [0]


async def test_many_poison_subjects_die_and_nothing_else(world: EventWorld):
    world.left.poison = set(range(1, 11))
    await world.emit(*range(1, 21))
    async with world.relaying():
        await drained(world)
    assert await dead_ids(world.left) == list(range(1, 11))
    assert await world.left.ids() == list(range(11, 21))


async def test_an_event_that_is_taken_at_a_later_try_is_not_dead(world: EventWorld):
    world.left.poison = {1}
    await world.emit(1, 1)
    async with world.relaying():
        await until(lambda: tried(world.left, 3), "it was tried three times")
        world.left.poison = set()
        await drained(world)
    assert await world.left.ids() == [1, 2]
    assert await dead_ids(world.left) == []


async def tried(taker: Taker, times: int) -> bool:
    return len(taker.handled) >= times


async def test_a_reason_that_postgresql_cannot_store_does_not_keep_an_event_alive(world: EventWorld):
    async def refuse(*_: object) -> None:
        raise ValueError("\0 \ud800 " + "x" * 5_000)

    bus = LocalBus([(Subscription("left", refuse), world.left.database)], world.telemetry)
    await world.emit(1)
    [event] = await events_of(world)
    assert await bus.deliver("left", [Delivery(event, TRIES - 1)]) == [Outcome("dead")]
    assert await dead_ids(world.left) == [1]


async def test_what_was_taken_meanwhile_is_not_dead(world: EventWorld):
    await world.emit(1)
    [event] = await events_of(world)
    answers = iter([True])

    async def taken_by_another(tx: object, events: object) -> None:
        if next(answers, False):
            # The failing transaction still has the inbox row: the other one can only come after it.
            raise ZeroDivisionError

    bus = LocalBus([(Subscription("left", taken_by_another), world.left.database)], world.telemetry)
    await bus.deliver("left", [Delivery(event, 1)])
    await world.bus.deliver("left", [Delivery(event)])
    answers = iter([True])
    assert await bus.deliver("left", [Delivery(event, TRIES - 1)]) == [Outcome("taken")]
    assert await dead_ids(world.left) == []


# ------------------------------------------------------------------------------------------------------------ down


async def test_a_consumer_that_is_down_loses_nothing_and_keeps_nobody_waiting(world: EventWorld):
    await world.left.database.close()
    await world.emit(1, 2, 1)
    async with world.relaying():
        await until(lambda: has(world.right, 3), "the other consumer has all")
        for _ in range(3):
            await world.emit(1, 2)
        await until(lambda: has(world.right, 9), "the other consumer has all again")
        assert await world.values("SELECT max(tries) FROM outbox_retries") == [0]
        await world.left.database.open()
        await drained(world)
    await in_order(world.left)
    assert sorted(await world.left.ids()) == list(range(1, 10))
    assert await dead_ids(world.left) == []


class BusyBus:
    """A bus of one consumer that is down, and that counts how often it is asked."""

    def __init__(self) -> None:
        self.recipients = [Recipient("far")]
        self.asked = 0

    async def deliver(self, consumer: str, deliveries: Sequence[Delivery]) -> Sequence[Outcome]:
        self.asked += 1
        return [Outcome("down", "it does not answer") for _ in deliveries]


async def test_a_consumer_that_is_down_is_not_asked_again_for_every_new_event(world: EventWorld):
    """To ask one that does not answer takes seconds, and the others would wait as long."""
    bus = BusyBus()
    slow = msgspec.structs.replace(QUICK, failed_s=3_600.0)
    async with world.relaying(Relay(SOURCE, world.publisher, bus, world.telemetry, pace=slow)):
        for n in range(1, 6):
            await world.emit(n)
            await until(lambda count=n: owes(world, count), "it is owed")
    assert bus.asked <= 2  # once with a new event, once by who collects


async def test_the_publishers_database_may_go_and_come_back(world: EventWorld):
    async with world.relaying():
        await world.publisher.close()
        await asyncio.sleep(0.1)
        await world.publisher.open()
        await world.emit(1)
        await drained(world)
    assert await world.left.ids() == [1]


async def test_a_round_that_fails_for_no_known_reason_is_repeated(
    world: EventWorld, plant: Callable[[str, Fault], Callable[[], None]]
):
    failures = iter([True, True])

    async def fail(_: str) -> None:
        if next(failures, False):
            raise ZeroDivisionError

    plant(relay.BEFORE_MARK_COMMIT, fail)
    await world.emit(1)
    async with world.relaying():
        await drained(world)
    assert await world.left.ids() == [1]


# ----------------------------------------------------------------------------------------------------------- death

POINTS = (
    relay.BEFORE_DELIVER,
    relay.AFTER_DELIVER,
    relay.BEFORE_MARK_COMMIT,
    relay.AFTER_MARK_COMMIT,
    inbox.BEFORE_COMMIT,
    inbox.AFTER_COMMIT,
)


@pytest.mark.parametrize("has_failed_before", [False, True], ids=["fresh", "owed"])
@pytest.mark.parametrize("point", POINTS)
async def test_a_relay_that_dies_at_any_point_leaves_all_to_the_next(
    world: EventWorld, plant: Callable[[str, Fault], Callable[[], None]], point: str, has_failed_before: bool
):
    if has_failed_before:
        world.left.poison = {1}
        await world.emit(1, 1)
        async with world.relaying(world.relay(retry_seconds=NO_RETRIES)):
            await until(lambda: has(world.right, 2), "the other consumer has them")
            await until(lambda: owes(world, 2), "the debts are written")
        world.left.poison = set()
        async with world.publisher.transaction() as tx:
            await tx.execute("UPDATE outbox_retries SET retry_at = now() WHERE event_id = 1")
    else:
        await world.emit(1, 1)
    reached = asyncio.Event()

    async def hang(_: str) -> None:
        reached.set()
        await asyncio.sleep(3_600)

    remove = plant(point, hang)
    task = asyncio.create_task(world.relay().run())
    await asyncio.wait_for(reached.wait(), 30)
    await ended(task)  # and nothing is released: as if it had been killed
    remove()
    await world.expire_lease()
    async with world.relaying():
        await drained(world)
    assert await world.left.ids() == [1, 2]
    assert await world.right.ids() == [1, 2]
    assert await world.values("SELECT count(*) FROM outbox_retries") == [0]


async def owes(world: EventWorld, count: int) -> bool:
    return await world.values("SELECT count(*) FROM outbox_retries") == [count]


@pytest.mark.parametrize("point", [inbox.DEAD_BEFORE_COMMIT, inbox.DEAD_AFTER_COMMIT])
async def test_a_death_at_the_dead_letter_leaves_one_dead_letter(
    world: EventWorld, plant: Callable[[str, Fault], Callable[[], None]], point: str
):
    world.left.poison = {1}
    await world.emit(1, 1)
    reached = asyncio.Event()

    async def hang(_: str) -> None:
        reached.set()
        await asyncio.sleep(3_600)

    remove = plant(point, hang)
    task = asyncio.create_task(world.relay().run())
    await asyncio.wait_for(reached.wait(), 30)
    await ended(task)
    remove()
    await world.expire_lease()
    async with world.relaying():
        await drained(world)
    assert await dead_ids(world.left) == [1]
    assert await world.left.ids() == [2]


# ------------------------------------------------------------------------------------------------------ two relays


async def test_two_relays_at_once_have_each_effect_once_and_in_order(world: EventWorld, cluster: Cluster):
    async def publish() -> None:
        for n in range(40):
            await world.emit(1, 2, n)

    async def shake() -> None:
        """Takes the lease away again and again, so that both relay, and neither knows when it stopped leading."""
        for _ in range(30):
            await asyncio.sleep(0.02)
            await world.expire_lease()

    async with world.relaying(), world.relaying():
        await asyncio.gather(publish(), shake())
        await drained(world)
    for taker in (world.left, world.right):
        await in_order(taker)
        assert sorted(await taker.ids()) == list(range(1, 121))


async def test_one_of_two_relays_leads_and_the_other_takes_over(world: EventWorld):
    first, second = world.relay(), world.relay()
    task = asyncio.create_task(first.run())
    await until(lambda: leads(world), "the first leads")
    async with world.relaying(second):
        holders = await holders_of(world)
        await world.emit(1)
        await drained(world)
        assert await holders_of(world) == holders
        await ended(task)
        await world.expire_lease()
        await world.emit(1)
        await drained(world)
        assert await holders_of(world) != holders
    await in_order(world.left)


async def leads(world: EventWorld) -> bool:
    return bool(await holders_of(world))


async def holders_of(world: EventWorld) -> list[str]:
    async with world.publisher.read() as tx:
        return await tx.fetch_values(str, "SELECT holder FROM relays")


async def test_a_lease_from_before_the_clock_was_set_back_holds_up_nobody(world: EventWorld):
    await world.emit(1)
    async with world.publisher.transaction() as tx:
        await tx.execute("INSERT INTO relays VALUES ('outbox', 'another', clock_timestamp() + interval '1 day')")
    async with world.relaying():
        await drained(world)
    assert await world.left.ids() == [1]


async def test_who_has_lost_the_lease_unknowingly_marks_nothing(
    world: EventWorld, plant: Callable[[str, Fault], Callable[[], None]]
):
    """It fails an event, sleeps, and wakes up when another relay has had it taken: its debt must not be written."""
    world.left.poison = {1}
    await world.emit(1)
    reached, go_on, sleepers = asyncio.Event(), asyncio.Event(), iter([True])

    async def sleep_once(_: str) -> None:
        if next(sleepers, False):
            reached.set()
            await go_on.wait()

    plant(relay.AFTER_DELIVER, sleep_once)
    async with world.relaying():
        await asyncio.wait_for(reached.wait(), 30)
        world.left.poison = set()
        async with world.publisher.transaction() as tx:
            await tx.execute(
                "UPDATE relays SET holder = 'another', leased_until = clock_timestamp() + interval '9 seconds'"
            )
        go_on.set()
        await asyncio.sleep(0.2)
        assert await world.values("SELECT count(*) FROM outbox_retries") == [0]
        assert await world.unpublished() == [1]
        await world.expire_lease()
        await drained(world)
    assert await world.left.ids() == [1]


# ---------------------------------------------------------------------------------------------------------- replay


async def killed(world: EventWorld) -> None:
    """Event 1 is a dead letter of the left, event 2 of the same subject was taken after it."""
    world.left.poison = {1}
    await world.emit(1, 1)
    async with world.relaying():
        await drained(world)
    assert await dead_ids(world.left) == [1]


async def test_a_dead_letter_is_replayed_once_its_cause_is_mended(world: EventWorld):
    await killed(world)
    world.left.poison = set()
    assert await replay(world.left.database, world.left.subscription, SOURCE, 1)
    assert await world.left.ids() == [2, 1]
    assert await dead_ids(world.left) == []
    assert not await replay(world.left.database, world.left.subscription, SOURCE, 1)
    assert await world.left.ids() == [2, 1]


async def test_a_replay_that_fails_again_leaves_the_dead_letter(world: EventWorld):
    await killed(world)
    with pytest.raises(ReplayFailed, match="event 1 is poison"):
        await replay(world.left.database, world.left.subscription, SOURCE, 1)
    assert await dead_ids(world.left) == [1]
    assert await world.left.ids() == [2]


async def test_two_who_replay_at_once_have_one_effect(world: EventWorld):
    await killed(world)
    world.left.poison = set()
    done = await asyncio.gather(*(replay(world.left.database, world.left.subscription, SOURCE, 1) for _ in range(3)))
    assert sorted(done) == [False, False, True]
    assert await world.left.ids() == [2, 1]


async def test_a_replayed_letter_is_kept_as_long_as_the_inbox_keeps_its_rows(world: EventWorld):
    await killed(world)
    world.left.poison = set()
    assert await replay(world.left.database, world.left.subscription, SOURCE, 1)
    async with world.left.database.transaction() as tx:
        assert await inbox.reap_replayed(tx, "left") == 0
        await tx.execute("UPDATE dead_letters SET replayed_at = now() - interval '13 days'")
        assert await inbox.reap_replayed(tx, "left") == 0
        await tx.execute("UPDATE dead_letters SET replayed_at = now() - interval '15 days'")
        assert await inbox.reap_replayed(tx, "right") == 0
        assert await inbox.reap_replayed(tx, "left") == 1


async def test_a_letter_that_nobody_replayed_is_kept_for_ever(world: EventWorld):
    await killed(world)
    async with world.left.database.transaction() as tx:
        await tx.execute("UPDATE dead_letters SET at = now() - interval '1 year'")
        assert await inbox.reap_replayed(tx, "left") == 0


@pytest.mark.parametrize("point", [inbox.REPLAY_BEFORE_COMMIT, inbox.REPLAY_AFTER_COMMIT])
async def test_a_replay_that_dies_can_be_repeated(
    world: EventWorld, plant: Callable[[str, Fault], Callable[[], None]], point: str
):
    await killed(world)
    world.left.poison = set()
    reached = asyncio.Event()

    async def hang(_: str) -> None:
        reached.set()
        await asyncio.sleep(3_600)

    remove = plant(point, hang)

    async def run() -> None:
        await replay(world.left.database, world.left.subscription, SOURCE, 1)

    task = asyncio.create_task(run())
    await asyncio.wait_for(reached.wait(), 30)
    await ended(task)
    remove()
    await replay(world.left.database, world.left.subscription, SOURCE, 1)
    assert await world.left.ids() == [2, 1]
    assert await dead_ids(world.left) == []


# -------------------------------------------------------------------------------------------- retention and metrics


async def test_what_was_published_long_ago_is_deleted_and_nothing_else(world: EventWorld):
    await world.emit(*range(10))
    async with world.publisher.transaction() as tx:
        await tx.execute("UPDATE outbox SET published_at = now() - interval '8 days' WHERE id IN (1, 2, 4)")
        await tx.execute("UPDATE outbox SET published_at = now() WHERE id = 5")
        assert await outbox.reap(tx) == 3
    assert await world.values("SELECT id FROM outbox ORDER BY id") == [3, *range(5, 11)]


async def test_one_old_event_that_nobody_can_publish_does_not_slow_the_deleting_down(world: EventWorld):
    world.left.poison = {1}
    seldom = msgspec.structs.replace(QUICK, reap_s=3_600.0)
    for _ in range(5):
        await world.emit(*[1] * 500)
    async with world.publisher.transaction() as tx:
        await tx.execute("UPDATE outbox SET published_at = now() - interval '8 days' WHERE id > 1")
    async with world.relaying(world.relay(pace=seldom, retry_seconds=NO_RETRIES)):
        await until(lambda: is_left(world, [1]), "all but the first is deleted")


async def is_left(world: EventWorld, ids: list[int]) -> bool:
    return await world.values("SELECT id FROM outbox ORDER BY id") == ids


async def test_what_is_owed_to_a_consumer_that_nobody_has_any_more_is_struck_out(
    world: EventWorld,
):
    world.left.poison = {2}
    await world.emit(1, 2, 3)
    for _ in range(3):
        await world.emit(*[4] * 500)
    async with world.publisher.transaction() as tx:
        await tx.execute("UPDATE outbox SET owed = true WHERE id <> 3")
        await tx.execute("UPDATE outbox SET at = now() - interval '8 days' WHERE id <> 5")
        await tx.execute(
            """
            INSERT INTO outbox_retries
            SELECT id, 'former', subject, subject_id, 2, now() - interval '1 hour', 'gone' FROM outbox WHERE id <> 3
            """
        )
        await tx.execute("INSERT INTO outbox_retries VALUES (2, 'left', 'thing', 2, 0, now(), 'it was down')")
    with capture_logs() as logs:
        async with world.relaying(world.relay(retry_seconds=NO_RETRIES)):
            await until(lambda: remain(world, [2, 5]), "what is owed to nobody else is published")
    assert await world.values("SELECT count(*) FROM outbox_retries WHERE consumer = 'left'") == [1]
    # A version of the shop that has that consumer may come to lead next.
    assert await world.values("SELECT event_id FROM outbox_retries WHERE consumer <> 'left'") == [5]
    [warning] = [entry for entry in logs if entry["event"] == "consumer_is_gone"]
    assert (warning["consumer"], warning["debts"]) == ("former", 1_501)


async def test_inbox_rows_are_kept_for_twice_as_long(world: EventWorld):
    await world.emit(*range(6))
    events = await events_of(world)
    await world.bus.deliver("left", [Delivery(event) for event in events])
    async with world.left.database.transaction() as tx:
        await inbox.enter(tx, "left", [Event("elsewhere", 1, "x.y", "x", 1, 1, "{}", events[0].at)])
        await inbox.enter(tx, "other", [Event("elsewhere", 1, "x.y", "x", 1, 1, "{}", events[0].at)])
        await tx.execute("UPDATE inbox SET at = now() - interval '13 days' WHERE event_id = 6")
        await tx.execute("UPDATE inbox SET at = now() - interval '15 days' WHERE event_id < 3")
        assert await inbox.reap(tx, "left") == 3
        left = await tx.fetch_values(int, "SELECT event_id FROM inbox WHERE consumer = 'left' ORDER BY event_id")
        assert left == [3, 4, 5, 6]


async def test_metrics_tell_how_far_behind_and_what_became_of_events(world: EventWorld):
    world.left.poison = {1}
    await world.emit(1, 2, 2)
    async with world.publisher.transaction() as tx:
        await tx.execute("UPDATE outbox SET at = at - interval '1 hour' WHERE id = 1")

    def value(name: str, **labels: str) -> float:
        return world.telemetry.registry.get_sample_value(name, labels) or 0.0

    async def shows(count: int) -> bool:
        return value("mercato_outbox_lag_events", service=SOURCE) == count

    async with world.relaying(world.relay(retry_seconds=NO_RETRIES)):
        await until(lambda: shows(1), "one event is behind")
        assert 3_600 <= value("mercato_outbox_lag_seconds", service=SOURCE) < 7_200
        async with world.publisher.transaction() as tx:
            await tx.execute("UPDATE outbox_retries SET retry_at = now(), tries = 4")
        await until(lambda: shows(0), "nothing is behind")
        assert value("mercato_outbox_lag_seconds", service=SOURCE) == 0
    assert value("mercato_events_retried_total", consumer="left") == 1
    assert value("mercato_events_dead_total", consumer="left") == 1
    assert value("mercato_events_delivered_total", consumer="left") == 2
    assert value("mercato_events_delivered_total", consumer="right") == 3
