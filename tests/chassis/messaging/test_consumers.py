"""From the outbox to the effect: everything, once, in order, whichever process fails, is down or dies."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import pytest_asyncio
from structlog.testing import capture_logs

from chassis.messaging.harness import (
    NO_RETRIES,
    SOURCE,
    EventHarness,
    RecordingHandler,
    ended,
    opened,
    place,
    run,
    running,
)
from mercato.chassis.contract import SERVICE_ROLE, Actor, Context, Unavailable, current
from mercato.chassis.contract.context import CONSUMER, KEPT, Place, Span
from mercato.chassis.hosting.host import consumer_tasks
from mercato.chassis.messaging import parking
from mercato.chassis.messaging.consumers import Consumer, Pace, ReplayFailed, replay
from mercato.chassis.messaging.events import TRIES, Subscription
from mercato.chassis.messaging.outbox import PAGE_ROWS
from mercato.chassis.messaging.parking import Cursor, CursorMovedError
from mercato.chassis.observability import faults
from mercato.chassis.observability.faults import Fault
from mercato.chassis.observability.tracing import Tracing
from mercato.chassis.postgres import outbox_row
from mercato.testing.cluster import Cluster
from mercato.testing.injection import Inject
from mercato.testing.waiting import BOUND_SECONDS, until

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


@pytest_asyncio.fixture
async def harness(cluster: Cluster) -> AsyncGenerator[EventHarness]:
    async with opened(cluster) as made:
        yield made


@pytest.fixture
def inject() -> Iterator[Inject]:
    removals: list[Callable[[], None]] = []

    def inject(point: str, fault: Fault) -> Callable[[], None]:
        removals.append(faults.inject(point, fault))
        return removals[-1]

    yield inject
    for remove in removals:
        remove()


async def in_order(handler: RecordingHandler) -> None:
    """Every subject's versions rise by one from 1: nothing is missing, doubled or out of order."""
    effects = sorted(enumerate(await handler.effects()), key=lambda pair: (pair[1].subject_id, pair[0]))
    for subject_id, group in itertools.groupby(effects, key=lambda pair: pair[1].subject_id):
        versions = [row.version for _, row in group]
        assert versions == list(range(1, len(versions) + 1)), (handler.name, subject_id, versions)


async def has(handler: RecordingHandler, count: int) -> bool:
    return len(await handler.ids()) == count


async def is_parked(handler: RecordingHandler, positions: list[int]) -> bool:
    return await handler.parked() == positions


async def position_of(handler: RecordingHandler) -> list[int]:
    return await handler.values("SELECT position FROM cursors")


# -------------------------------------------------------------------------------------------------------- the way


async def test_every_consumer_gets_what_it_wants_in_order(harness: EventHarness):
    await harness.emit(1, 2, 1)
    await harness.emit(2, type="thing.seen")
    await harness.emit(1)
    async with harness.consuming():
        await harness.drained()
    assert await harness.left.ids() == [place(1, 1), place(1, 2), place(1, 3), place(3)]
    assert await harness.right.ids() == [place(1, 1), place(1, 2), place(1, 3), place(2), place(3)]


async def test_more_rows_than_a_page_come_in_order(harness: EventHarness):
    for _ in range(2 * PAGE_ROWS + 3):
        await harness.emit(1, 2, 3)
    async with harness.consuming():
        await harness.drained()
    for handler in (harness.left, harness.right):
        assert await handler.ids() == sorted(await handler.ids())
        await in_order(handler)
        assert len(handler.handled) == 3


async def test_a_wake_up_ends_the_pause(harness: EventHarness):
    slow = Pace(gather_s=0.0, poll_s=3_600.0, idle_s=3_600.0)
    async with running(harness.consumer(harness.left, pace=slow)) as consumer:
        await until(lambda: has_cursor(harness.left), "it has begun")
        harness.publisher.on_events.append(consumer.wake)
        for count in range(1, 4):
            await harness.emit(1)
            await until(lambda count=count: has(harness.left, count), "it is processed")


async def test_a_cancellation_at_the_moment_of_a_wake_up_is_not_lost(harness: EventHarness):
    consumer = harness.consumer(harness.left, pace=Pace(gather_s=0.0, poll_s=3_600.0, idle_s=3_600.0))
    follow, _ = consumer_tasks(consumer)
    task = asyncio.create_task(follow.run("left", harness.clock, harness.telemetry))
    await until(lambda: has_cursor(harness.left), "it has begun")
    await until(lambda: waits_for_a_wake_up(consumer), "it is idle")

    consumer.wake()
    task.cancel()

    _, left = await asyncio.wait({task}, timeout=BOUND_SECONDS)
    assert left == set()


async def waits_for_a_wake_up(consumer: Consumer) -> bool:
    return bool(consumer._woken._waiters)


async def has_cursor(handler: RecordingHandler) -> bool:
    return bool(await position_of(handler))


async def test_polling_finds_events_without_a_wake_up(harness: EventHarness):
    async with harness.consuming(harness.left):
        await until(lambda: has_cursor(harness.left), "it has begun")
        await harness.emit(1)
        await until(lambda: has(harness.left, 1), "it is processed")


# ------------------------------------------------------------------------------------------------------ once only


async def test_two_processes_have_each_effect_once_and_in_order(harness: EventHarness):
    async def publish() -> None:
        for n in range(60):
            await harness.emit(1, 2, n)
            await asyncio.sleep(0.001)

    async with harness.consuming(), harness.consuming(), harness.consuming():
        await publish()
        await harness.drained()
    for handler in (harness.left, harness.right):
        await in_order(handler)
        assert len(await handler.ids()) == 180


async def test_a_cursor_that_another_process_has_moved_is_not_moved_again(harness: EventHarness):
    await harness.emit(1, 2)
    async with harness.consuming(harness.left):
        await harness.drained(harness.left)
    async with harness.left.database.transaction() as tx:
        with pytest.raises(CursorMovedError):
            await parking.move_cursor(tx, ("left", SOURCE), Cursor(0, None), Cursor(outbox_row.end_of_row(1), None))


async def test_the_slower_of_two_processes_has_no_failed_span(harness: EventHarness):
    await harness.emit(1)
    async with harness.consuming(harness.left):
        await harness.drained(harness.left)
    tracing = Tracing()
    tracing.start(0.0)
    page = Span("left from source", "left", CONSUMER, tracing, [Place(TRACE, KEPT, 0)])
    actor = Actor(SERVICE_ROLE)
    call = current.set(Context(actor, harness.clock.monotonic() + BOUND_SECONDS, TRACE, "", page))
    try:
        with pytest.raises(CursorMovedError), page:
            async with harness.left.database.transaction() as tx:
                await parking.move_cursor(tx, ("left", SOURCE), Cursor(0, None), Cursor(outbox_row.end_of_row(1), None))
    finally:
        current.reset(call)
    spans = tracing.recent.trace(TRACE)
    assert [(span.name, span.failure) for span in spans] == [("left transaction", ""), ("left from source", "")]


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_commit_whose_outcome_is_not_known_has_one_effect(harness: EventHarness, inject: Inject, when: str):
    await harness.emit(1)
    failures = iter([True, True, True])

    async def lose_the_connection(_: str) -> None:
        if next(failures, False):
            raise Unavailable(service="left")

    inject(f"consumer.batch.{when}_commit", lose_the_connection)
    async with harness.consuming():
        await harness.drained()
    assert await harness.left.ids() == [place(1)]
    assert await harness.right.ids() == [place(1)]
    assert await harness.left.values("SELECT count(*) FROM parked") == [0]


# ---------------------------------------------------------------------------------------------------------- poison


async def test_a_poison_event_is_dead_after_its_tries_and_holds_back_its_subject_alone(harness: EventHarness):
    harness.left.poison = {place(1, 2)}
    await harness.emit(1, 2, 3, 2, 1, 2)
    async with harness.consuming():
        await harness.drained()
    assert await harness.left.dead() == [place(1, 2)]
    assert len([batch for batch in harness.left.handled if batch == [place(1, 2)]]) == TRIES
    effects = [(row.subject_id, row.version) for row in await harness.left.effects()]
    assert effects == [(1, 1), (3, 1), (1, 2), (2, 2), (2, 3)]
    assert await harness.right.ids() == [place(1, n) for n in range(1, 7)]
    async with harness.left.database.read() as tx:
        [letter] = await parking.dead_letters(tx, "left")
    assert (letter.tries, letter.error) == (TRIES, f"Cannot: event {place(1, 2)} is poison")
    assert (letter.event_id, letter.type, letter.subject_id) == (place(1, 2), "thing.changed", 2)


async def test_a_consumer_of_rows_has_the_same_guarantees(harness: EventHarness):
    harness.right.poison = {place(1, 2)}
    await harness.emit(1, 2, 3, 2)
    async with harness.consuming(harness.right):
        await harness.drained(harness.right)
    assert await harness.right.dead() == [place(1, 2)]
    assert await harness.right.ids() == [place(1, 1), place(1, 3), place(1, 4)]


async def test_while_an_event_waits_for_its_retry_everything_else_goes_on(harness: EventHarness):
    harness.left.poison = {place(1)}
    await harness.emit_alone(1, 1, 2)
    async with harness.consuming(retry_seconds=NO_RETRIES):
        await until(lambda: has(harness.left, 1), "the other subject is processed")
        await harness.emit_alone(1, 2)
        await until(lambda: has(harness.left, 2), "the other subject is processed again")
        await until(lambda: has(harness.right, 5), "the other consumer has all")
    assert [row.subject_id for row in await harness.left.effects()] == [2, 2]
    assert await harness.left.parked() == [place(1), place(2), place(4)]
    assert await harness.left.values("SELECT tries FROM parked ORDER BY position") == [1, 0, 0]


async def test_a_subject_with_many_parked_events_delays_no_other(harness: EventHarness):
    harness.left.poison = {place(1)}
    await harness.emit(1)
    async with harness.consuming(retry_seconds=NO_RETRIES):
        await until(lambda: is_parked(harness.left, [place(1)]), "the first is parked")
        for _ in range(3):
            await harness.emit(*[1] * 200)
        await harness.emit(2)
        await until(lambda: has(harness.left, 1), "the other subject is processed")
        await until(lambda: has(harness.right, 602), "the other consumer has all")
        harness.left.poison = set()
        await harness.left.execute("UPDATE parked SET retry_at = now() WHERE retry_at < 'infinity'")
        await harness.drained()
    await in_order(harness.left)
    assert len(await harness.left.ids()) == 602


async def test_many_poison_subjects_die_and_nothing_else(harness: EventHarness):
    harness.left.poison = {place(1, n) for n in range(1, 6)}
    await harness.emit(*range(1, 11))
    async with harness.consuming():
        await harness.drained()
    assert await harness.left.dead() == [place(1, n) for n in range(1, 6)]
    assert await harness.left.ids() == [place(1, n) for n in range(6, 11)]


async def test_an_event_that_is_processed_at_a_later_try_is_not_dead(harness: EventHarness):
    harness.left.poison = {place(1, 1)}
    await harness.emit(1, 1)

    async def tried_twice() -> bool:
        return harness.left.handled.count([place(1, 1)]) >= 2

    async with harness.consuming(harness.left):
        await until(tried_twice, "it was tried again")
        harness.left.poison = set()
        await harness.drained(harness.left)
    assert await harness.left.ids() == [place(1, 1), place(1, 2)]
    assert await harness.left.dead() == []


async def test_a_second_poison_event_behind_the_first_is_tried_alone(harness: EventHarness):
    harness.left.poison = {place(1, 1), place(1, 3)}
    await harness.emit(1, 1, 1, 1)
    async with harness.consuming(harness.left):
        await harness.drained(harness.left)
    assert await harness.left.dead() == [place(1, 1), place(1, 3)]
    assert await harness.left.ids() == [place(1, 2), place(1, 4)]


async def test_a_reason_that_postgresql_cannot_store_does_not_keep_an_event_from_becoming_dead(harness: EventHarness):
    async def refuse(*_: object) -> None:
        raise ValueError("\0 \ud800 " + "x" * 5_000)

    refusing = RecordingHandler("left", harness.left.database)
    refusing.subscription = Subscription("left", (SOURCE,), refuse)
    await harness.emit(1)
    async with harness.consuming(refusing):
        await until(lambda: is_dead(refusing, [place(1)]), "it is dead")


async def is_dead(handler: RecordingHandler, positions: list[int]) -> bool:
    return await handler.dead() == positions


async def test_an_event_is_not_parked_behind_one_that_a_retry_has_just_removed(harness: EventHarness, inject: Inject):
    """The batch has found the earlier event parked; before it commits the later one, a retry removes the earlier."""
    harness.left.poison = {place(1)}
    await harness.emit(1)
    async with harness.consuming(harness.left, retry_seconds=NO_RETRIES):
        await until(lambda: is_parked(harness.left, [place(1)]), "the first is parked")
    harness.left.poison = set()
    has_parked, retry_ends, go_on = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def pause(_: str) -> None:
        has_parked.set()
        await go_on.wait()

    async def note_retry(_: str) -> None:
        retry_ends.set()

    inject("consumer.batch.before_commit", pause)
    inject("consumer.retry.before_commit", note_retry)
    await harness.emit(1)

    async def is_at_rest() -> bool:
        """Nothing is parked, or nothing of it will ever be tried again."""
        due = await harness.left.values("SELECT position FROM parked WHERE retry_at < 'infinity'")
        return await harness.is_drained(harness.left) or (bool(await harness.left.parked()) and not due)

    async def retry_ends_or_waits_for_the_batch() -> bool:
        waiting = "SELECT pid FROM pg_locks WHERE NOT granted AND locktype = 'transactionid'"
        has_ended = retry_ends.is_set() and not await harness.left.parked()
        return has_ended or bool(await harness.left.values(waiting))

    async with harness.consuming(harness.left, retry_seconds=NO_RETRIES):
        await asyncio.wait_for(has_parked.wait(), 120)
        await harness.left.execute("UPDATE parked SET retry_at = now()")
        await until(retry_ends_or_waits_for_the_batch, "the retry has come to the batch")
        go_on.set()
        await until(is_at_rest, "the later event is processed, or waits for ever")
        assert await harness.left.parked() == []
    await in_order(harness.left)
    assert await harness.left.ids() == [place(1), place(2)]


async def test_a_row_of_many_events_that_is_processed_one_by_one_repeats_nothing_after_a_crash(
    harness: EventHarness, inject: Inject
):
    harness.left.poison = {place(1, 7)}
    await harness.emit(*range(1, 301))
    reached, count = asyncio.Event(), itertools.count(1)

    async def die_at_the_150th(_: str) -> None:
        if next(count) == 150:
            reached.set()
            await asyncio.sleep(3_600)

    remove = inject("consumer.batch.after_commit", die_at_the_150th)
    consumer = harness.consumer(harness.left, retry_seconds=NO_RETRIES)
    task = asyncio.create_task(run(consumer))
    await asyncio.wait_for(reached.wait(), 60)
    await ended(task)  # as if it had been killed: nothing is noted after that point
    remove()
    assert 0 < len(await harness.left.ids()) < 300
    assert place(1, 1) < (await position_of(harness.left))[0] < place(1, 300)
    harness.left.poison = set()
    await harness.left.execute("UPDATE parked SET retry_at = now()")
    async with harness.consuming(harness.left):
        await harness.drained(harness.left)
    assert sorted(await harness.left.ids()) == [place(1, n) for n in range(1, 301)]


# ------------------------------------------------------------------------------------------------------------ down


async def test_a_consumer_that_is_down_loses_nothing_and_costs_no_try(harness: EventHarness):
    await harness.left.database.close()
    await harness.emit_alone(1, 2, 1)
    async with harness.consuming():
        await until(lambda: has(harness.right, 3), "the other consumer has all")
        await harness.emit_alone(1, 2)
        await until(lambda: has(harness.right, 5), "the other consumer has all again")
        await harness.left.database.open()
        await harness.drained()
    await in_order(harness.left)
    assert len(await harness.left.ids()) == 5
    assert await harness.left.values("SELECT count(*) FROM parked") == [0]


async def test_a_database_that_goes_away_during_a_retry_costs_no_try(harness: EventHarness, inject: Inject):
    harness.left.poison = {place(1)}
    await harness.emit(1)
    async with harness.consuming(harness.left, retry_seconds=NO_RETRIES):
        await until(lambda: is_parked(harness.left, [place(1)]), "it is parked")
        harness.left.poison = set()
        failures, failed = iter([True] * 2 * TRIES), asyncio.Event()

        async def lose_the_connection(_: str) -> None:
            if next(failures, False):
                raise Unavailable(service="left")
            failed.set()

        inject("consumer.retry.before_commit", lose_the_connection)
        await harness.left.execute("UPDATE parked SET retry_at = now()")
        await harness.drained(harness.left)
        assert failed.is_set()
    assert await harness.left.ids() == [place(1)]


async def has_logged(logs: Sequence[Mapping[str, Any]], event: str) -> bool:
    return any(entry["event"] == event for entry in logs)


async def test_a_consumer_reads_on_after_an_outage_of_the_publishers_database(harness: EventHarness):
    async with harness.consuming():
        with capture_logs() as logs:
            await harness.publisher.close()
            await until(lambda: has_logged(logs, "consumer_waits"), "a consumer has missed it")
        await harness.publisher.open()
        await harness.emit(1)
        await harness.drained()
    assert await harness.left.ids() == [place(1)]


# ------------------------------------------------------------------------------------------------- refused by the log


def refusals(harness: EventHarness, handler: RecordingHandler) -> float | None:
    labels = {"consumer": handler.name, "source": SOURCE}
    return harness.telemetry.registry.get_sample_value("mercato_events_refused", labels)


async def test_a_source_that_was_restored_behind_the_cursor_is_reported_and_nothing_is_skipped(harness: EventHarness):
    await harness.emit_alone(1, 2, 3)
    async with harness.consuming(harness.left):
        await harness.drained(harness.left)
    await harness.execute("DELETE FROM outbox WHERE id > 1")
    await harness.execute("ALTER SEQUENCE outbox_id_seq RESTART WITH 2")
    await harness.emit_alone(4, 5, 6, 7)  # among them others with the ids 2 and 3
    before = await harness.left.ids(), await position_of(harness.left)

    async def is_refused_or_goes_on() -> bool:
        return refusals(harness, harness.left) == 1 or await position_of(harness.left) != before[1]

    with capture_logs() as logs:
        async with harness.consuming(harness.left):
            await until(is_refused_or_goes_on, "it is reported")
            refused_again = harness.telemetry.gauge("mercato_events_refused", "", workers="livemax")
            refused_again.labels(harness.left.name, SOURCE).set(0)
            await until(is_refused_or_goes_on, "the next round is refused, too")
    assert (await harness.left.ids(), await position_of(harness.left)) == before
    [entry] = [entry for entry in logs if entry["event"] == "log_refuses_consumer"]
    assert entry["log_level"] == "error"
    assert "restored" in entry["reason"]


async def test_a_consumer_that_was_away_too_long_is_reported_and_stays_where_it_is(harness: EventHarness):
    await harness.emit(1)
    async with harness.consuming(harness.left):
        await harness.drained(harness.left)
    await harness.emit_alone(2, 3)
    await harness.execute("INSERT INTO outbox_purged (id, at) SELECT id, at FROM outbox WHERE id = 2")
    await harness.execute("DELETE FROM outbox WHERE id < 3")

    async def is_refused() -> bool:
        return refusals(harness, harness.left) == 1

    with capture_logs() as logs:
        async with harness.consuming(harness.left):
            await until(is_refused, "it is reported")
    assert await position_of(harness.left) == [outbox_row.end_of_row(1)]
    assert any("not read" in entry.get("reason", "") for entry in logs)
    await harness.left.execute("DELETE FROM cursors")  # as an operator lets it begin anew
    async with harness.consuming(harness.left):
        await harness.drained(harness.left)
    assert await harness.left.ids() == [place(1), place(3)]


# ----------------------------------------------------------------------------------------------------------- death


async def dies_at(harness: EventHarness, inject: Inject, point: str, work: Callable[[], Awaitable[None]]) -> None:
    """Runs until the point is reached, and ends there as if it had been killed."""
    reached = asyncio.Event()

    async def hang(_: str) -> None:
        reached.set()
        await asyncio.sleep(3_600)

    remove = inject(point, hang)

    async def run() -> None:
        await work()

    task = asyncio.create_task(run())
    await asyncio.wait_for(reached.wait(), 120)
    await ended(task)
    remove()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("what", ["batch", "park", "retry", "dead"])
async def test_after_a_crash_at_any_point_the_next_process_completes_the_work(
    harness: EventHarness, inject: Inject, what: str, when: str
):
    if what != "batch":
        harness.left.poison = {place(1)}
    await harness.emit_alone(1, 1)
    if what == "retry":
        async with harness.consuming(harness.left, retry_seconds=NO_RETRIES):
            await until(lambda: is_parked(harness.left, [place(1), place(2)]), "they are parked")
        harness.left.poison = set()
        await harness.left.execute("UPDATE parked SET retry_at = now() WHERE tries = 1")
    await dies_at(harness, inject, f"consumer.{what}.{when}_commit", lambda: run(harness.consumer(harness.left)))
    if what == "park":
        harness.left.poison = set()
    async with harness.consuming(harness.left):
        await harness.drained(harness.left)
    assert await harness.left.dead() == ([place(1)] if what == "dead" else [])
    assert await harness.left.ids() == ([place(2)] if what == "dead" else [place(1), place(2)])


# ---------------------------------------------------------------------------------------------------------- replay


async def killed(harness: EventHarness) -> None:
    """The first event is dead at the left; the second, of the same subject, was processed after it."""
    harness.left.poison = {place(1)}
    await harness.emit_alone(1, 1)
    async with harness.consuming(harness.left):
        await harness.drained(harness.left)
    assert await harness.left.dead() == [place(1)]


def replay_first(harness: EventHarness) -> Awaitable[bool]:
    return replay(harness.left.database, harness.left.subscription, SOURCE, place(1))


async def test_a_dead_event_is_replayed_once_its_cause_is_mended(harness: EventHarness):
    await killed(harness)
    harness.left.poison = set()
    assert await replay_first(harness)
    assert await harness.left.ids() == [place(2), place(1)]
    assert await harness.left.dead() == []
    assert not await replay_first(harness)
    assert await harness.left.ids() == [place(2), place(1)]


async def test_a_replay_that_fails_again_leaves_the_event_dead(harness: EventHarness):
    await killed(harness)
    with pytest.raises(ReplayFailed, match="is poison"):
        await replay_first(harness)
    assert await harness.left.dead() == [place(1)]
    assert await harness.left.ids() == [place(2)]


async def test_concurrent_replays_have_one_effect(harness: EventHarness):
    await killed(harness)
    harness.left.poison = set()
    assert sorted(await asyncio.gather(*(replay_first(harness) for _ in range(3)))) == [False, False, True]
    assert await harness.left.ids() == [place(2), place(1)]


async def test_a_replayed_event_is_kept_for_the_audit_and_deleted_by_a_later_replay(harness: EventHarness):
    await killed(harness)
    harness.left.poison = set()
    assert await replay_first(harness)
    for days, kept in ((13, [place(1)]), (15, [])):
        await harness.left.execute(f"UPDATE parked SET replayed_at = now() - interval '{days} days'")
        assert not await replay_first(harness)
        assert await harness.left.values("SELECT position FROM parked") == kept


async def test_a_dead_event_that_is_not_replayed_is_kept_for_ever(harness: EventHarness):
    await killed(harness)
    await harness.left.execute("UPDATE parked SET dead_at = now() - interval '1 year', at = now() - interval '1 year'")
    assert not await replay(harness.left.database, harness.left.subscription, SOURCE, place(9))
    assert await harness.left.dead() == [place(1)]


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_replay_that_dies_can_be_repeated(harness: EventHarness, inject: Inject, when: str):
    await killed(harness)
    harness.left.poison = set()

    async def work() -> None:
        await replay_first(harness)

    await dies_at(harness, inject, f"consumer.replay.{when}_commit", work)
    await replay_first(harness)
    assert await harness.left.ids() == [place(2), place(1)]
    assert await harness.left.dead() == []


# --------------------------------------------------------------------------------------------------------- metrics


async def test_metrics_show_the_outcomes_of_events_and_the_lag_of_a_consumer(harness: EventHarness):
    harness.left.poison = {place(1, 1)}
    await harness.emit(1, 2, 2)
    await harness.execute("UPDATE outbox SET at = at - interval '1 hour'")

    def value(name: str, **labels: str) -> float:
        return harness.telemetry.registry.get_sample_value(name, labels) or 0.0

    async def lags() -> bool:
        # What it counts after its commit is lost where it is stopped in between.
        has_counted = value("mercato_events_delivered_total", consumer="right") == 3
        return has_counted and 3_600 <= value("mercato_events_lag_seconds", consumer="right", source=SOURCE) < 7_200

    async def lags_no_more() -> bool:
        return value("mercato_events_lag_seconds", consumer="right", source=SOURCE) == 0

    def counts() -> dict[str, float]:
        return {
            "retried": value("mercato_events_retried_total", consumer="left"),
            "dead": value("mercato_events_dead_total", consumer="left"),
            "delivered, left": value("mercato_events_delivered_total", consumer="left"),
            "delivered, right": value("mercato_events_delivered_total", consumer="right"),
        }

    async def all_is_counted() -> bool:
        return counts() == expected

    expected = {"retried": TRIES - 1, "dead": 1, "delivered, left": 2, "delivered, right": 3}
    slow = Pace(gather_s=3_600.0, poll_s=0.01, idle_s=0.02)
    async with running(harness.consumer(harness.right, pace=slow)):
        await until(lags, "it shows how far behind it is")
    async with harness.consuming():
        await harness.drained()
        await until(lags_no_more, "it is behind no more")
        # Each is counted after the commit that `drained` has seen.
        with contextlib.suppress(AssertionError):
            await until(all_is_counted)
    assert counts() == expected
    assert counts() == expected
