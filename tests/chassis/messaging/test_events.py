"""Emitting events: with the COMMIT of the change, in the order of commits, and what a reader of the log gets."""

# What fails stands inside a transaction, which is a block.
# ruff: noqa: PT012

from __future__ import annotations

import asyncio
import datetime
from collections.abc import AsyncGenerator

import asyncpg
import msgspec
import pytest
import pytest_asyncio

from chassis.messaging.harness import SOURCE, Changed, EventHarness, opened, place
from mercato.chassis.contract import SERVICE_ROLE, Actor, Forbidden, HandlerRun, Message, current, handler_run
from mercato.chassis.messaging import outbox
from mercato.chassis.messaging.events import Event, Outgoing, SourceRow
from mercato.chassis.messaging.outbox import LogPage, LogPurged, LogReplaced, ReadLog
from mercato.chassis.postgres import connections, outbox_row
from mercato.chassis.postgres.connections import OUTBOX_LOCK
from mercato.chassis.postgres.database import RolledBackError, Row, UniqueViolation
from mercato.chassis.rpc.client import acting
from mercato.testing.cluster import Cluster


@pytest_asyncio.fixture
async def harness(cluster: Cluster) -> AsyncGenerator[EventHarness]:
    async with opened(cluster) as made:
        yield made


def changed(subject_id: int, version: int, data: str = "") -> Outgoing:
    return Outgoing("thing.changed", "thing", subject_id, version, Changed(n=version) if not data else Text(text=data))


class Text(Message):
    text: str


async def written(harness: EventHarness) -> list[Event]:
    async with harness.publisher.read() as tx:
        found = await tx.fetch(StampedRow, "SELECT id, at, events FROM outbox ORDER BY id")
    return [
        event for row in found for event in SourceRow(source=SOURCE, id=row.id, at=row.at, events=row.events).unpack()
    ]


class StampedRow(Row):
    id: int
    at: datetime.datetime
    events: str


# ------------------------------------------------------------------------------------------------------------- emit


async def test_the_events_of_a_transaction_are_one_row_in_the_order_given(harness: EventHarness):
    async with harness.publisher.transaction() as tx:
        tx.emit([changed(9, 1)])
        tx.emit([changed(3, 1), changed(9, 2)])
        assert await tx.fetch_values(int, "SELECT id FROM outbox") == []
    assert len(await harness.outbox()) == 1
    first, second, third = await written(harness)
    assert (first.id, first.subject_id, first.version) == (place(1, 1), 9, 1)
    assert (second.id, second.subject_id, third.id, third.version) == (place(1, 2), 3, place(1, 3), 2)
    assert (first.source, first.type, first.subject, first.data) == (SOURCE, "thing.changed", "thing", '{"n":1}')
    assert abs(first.at - datetime.datetime.now(datetime.UTC)) < datetime.timedelta(minutes=5)


async def test_data_of_any_text_is_written_as_it_is(harness: EventHarness):
    text = """it's "quoted" \\ and \\' or $1 {n} %s; COMMIT; -- \0 é \u2028 '"""
    async with harness.publisher.transaction() as tx:
        tx.emit([changed(1, 1, data=text)])
    [event] = await written(harness)
    assert msgspec.json.decode(event.data, type=Text).text == text


@pytest.mark.parametrize(("count", "text", "row_count"), [(2_500, "x", 4), (8, "x" * 60_000, 2), (1, "x" * 400_000, 1)])
async def test_large_transactions_write_several_rows(harness: EventHarness, count: int, text: str, row_count: int):
    async with harness.publisher.transaction() as tx:
        tx.emit([changed(1, n, data=text) for n in range(1, count + 1)])
    found = await harness.outbox()
    assert len(found) == row_count
    assert all(len(outbox_row.unpack(row.events)) <= outbox_row.ROW_EVENTS for row in found)
    assert count == 1 or all(len(row.events) <= outbox_row.ROW_BYTES for row in found)
    assert [event.version for event in await written(harness)] == list(range(1, count + 1))


async def test_a_transaction_without_events_writes_no_row(harness: EventHarness):
    async with harness.publisher.transaction() as tx:
        tx.emit([])
    assert await harness.outbox() == []


async def test_a_transaction_that_rolls_back_writes_no_row(harness: EventHarness):
    with pytest.raises(ZeroDivisionError):
        async with harness.publisher.transaction() as tx:
            tx.emit([changed(1, 1)])
            raise ZeroDivisionError
    assert await harness.outbox() == []


async def test_events_that_cannot_be_encoded_roll_the_change_back(harness: EventHarness):
    with pytest.raises(TypeError):
        async with harness.publisher.transaction() as tx:
            await tx.execute("INSERT INTO outbox_readers (consumer, position) VALUES ('x', 1)")
            tx.emit([Outgoing("thing.changed", "thing", 1, 1, Unencodable(object()))])  # pyright: ignore[reportArgumentType]
    assert await harness.values("SELECT position FROM outbox_readers") == []


class Unencodable(msgspec.Struct):
    n: object


async def test_an_outbox_that_refuses_the_row_rolls_the_change_back_and_it_may_be_run_again(harness: EventHarness):
    await harness.execute("ALTER TABLE outbox ADD CONSTRAINT no_nines CHECK (events NOT LIKE '%\"subject_id\":9%')")
    token = handler_run.set(made := HandlerRun())
    try:
        for _ in range(2):  # the first one prepares the statement, too
            with pytest.raises(asyncpg.CheckViolationError):
                async with harness.publisher.transaction() as tx:
                    await tx.execute("INSERT INTO outbox_readers (consumer, position) VALUES ('x', 1)")
                    tx.emit([changed(9, 1)])
            assert not made.committed
        await harness.emit(1)
        assert made.committed
    finally:
        handler_run.reset(token)
    assert await harness.values("SELECT position FROM outbox_readers") == []
    assert len(await harness.outbox()) == 1


async def test_a_transaction_in_which_a_failure_was_swallowed_writes_no_row_and_says_so(harness: EventHarness):
    token = handler_run.set(made := HandlerRun())
    try:
        with pytest.raises(RolledBackError):
            async with harness.publisher.transaction() as tx:
                tx.emit([changed(1, 1)])
                with pytest.raises(asyncpg.DivisionByZeroError):
                    await tx.execute("SELECT 1 / 0")
        assert not made.committed
    finally:
        handler_run.reset(token)
    assert await harness.outbox() == []


async def test_a_constraint_that_is_checked_at_the_commit_rolls_the_events_back(harness: EventHarness):
    await harness.execute("CREATE TABLE late (n int, UNIQUE (n) DEFERRABLE INITIALLY DEFERRED)")
    token = handler_run.set(made := HandlerRun())
    try:
        with pytest.raises(UniqueViolation):
            async with harness.publisher.transaction() as tx:
                await tx.execute("INSERT INTO late VALUES (1), (1)")
                tx.emit([changed(1, 1)])
        assert not made.committed
    finally:
        handler_run.reset(token)
    assert await harness.outbox() == []


async def test_every_connection_prepares_the_statement_once(harness: EventHarness):
    async def emit_often(subject_id: int) -> None:
        for version in range(1, 11):
            async with harness.publisher.transaction() as tx:
                tx.emit([changed(subject_id, version)])

    await asyncio.gather(*(emit_often(n) for n in range(8)))
    async with harness.publisher.read() as tx:
        assert await tx.fetch_values(str, "SELECT name FROM pg_prepared_statements WHERE from_sql") == [
            "mercato_events_1"
        ]
    assert len(await harness.outbox()) == 80


async def test_a_commit_that_is_cancelled_while_it_waits_for_the_lock_leaves_a_usable_connection(
    harness: EventHarness, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(connections, "OUTBOX_LOCK_SECONDS", 1)
    for _ in range(5):
        async with harness.publisher.transaction() as holder:
            await holder.execute("SELECT pg_advisory_xact_lock($1)", OUTBOX_LOCK)
            emitting = asyncio.create_task(harness.emit(1))
            await waits_for_the_lock(harness, emitting)
            emitting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await emitting
    assert await harness.outbox() == []
    await harness.emit(2)
    assert len(await harness.outbox()) == 1


async def waits_for_the_lock(harness: EventHarness, emitting: asyncio.Task[None], longer_than_ms: int = 0) -> None:
    """Returns when the writer waits, and has waited for so long. Fails when it has ended without waiting."""
    waiting = """
        SELECT a.pid
          FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid
         WHERE NOT l.granted AND l.locktype = 'advisory' AND l.objid = $1::bigint
           AND clock_timestamp() - a.query_start >= $2 * interval '1 ms'
    """
    async with harness.publisher.read() as tx, asyncio.timeout(120):
        while not await tx.fetch_values(int, waiting, OUTBOX_LOCK, longer_than_ms):
            assert not emitting.done(), "it has not waited for the lock"
            await asyncio.sleep(0.01)


async def test_a_lock_timeout_of_the_transaction_is_not_for_the_lock_of_the_outbox(harness: EventHarness):
    async def emit_impatiently() -> None:
        async with harness.publisher.transaction() as tx:
            await tx.execute("SET LOCAL lock_timeout = '10ms'")
            tx.emit([changed(1, 1)])

    async with harness.publisher.transaction() as holder:
        await holder.execute("SELECT pg_advisory_xact_lock($1)", OUTBOX_LOCK)
        emitting = asyncio.create_task(emit_impatiently())
        await waits_for_the_lock(harness, emitting, longer_than_ms=50)
    await emitting
    assert len(await harness.outbox()) == 1


async def test_a_transaction_waits_for_the_commit_of_the_one_that_writes_events(harness: EventHarness):
    """The writer that has the lock has taken its id: a later id is given only after that one is committed."""
    async with harness.publisher.transaction() as holder:
        await holder.execute("SELECT pg_advisory_xact_lock($1)", OUTBOX_LOCK)
        emitting = asyncio.create_task(harness.emit(1))
        await waits_for_the_lock(harness, emitting)
        await holder.execute("INSERT INTO outbox (events) VALUES ('[]')")
    await emitting
    assert [row.events == "[]" for row in await harness.outbox()] == [True, False]


async def test_ids_are_in_the_order_of_commits(harness: EventHarness):
    """A reader that always goes on after the last id it has seen has seen everything in the end."""
    seen: list[int] = []

    async def write(subject_id: int) -> None:
        for version in range(1, 31):
            async with harness.publisher.transaction() as tx:
                tx.emit([changed(subject_id, version)])
                await asyncio.sleep(0.001 * (version % 3))

    async def read(writing: asyncio.Future[list[None]]) -> None:
        is_last = False
        while not is_last:
            is_last = writing.done()
            async with harness.publisher.read() as tx:
                seen.extend(
                    await tx.fetch_values(
                        int, "SELECT id FROM outbox WHERE id > $1 ORDER BY id", seen[-1] if seen else 0
                    )
                )

    writing = asyncio.ensure_future(asyncio.gather(*(write(n) for n in range(3))))
    await read(writing)
    await writing
    assert seen == [row.id for row in await harness.outbox()]
    assert len(seen) == 90


# -------------------------------------------------------------------------------------------------------------- log


async def read(harness: EventHarness, after: int | None = None, *, at_row: int | None = None, **wanted: int) -> LogPage:
    at = None
    if at_row is not None:
        async with harness.publisher.read() as tx:
            [at] = await tx.fetch_values(datetime.datetime, "SELECT at FROM outbox WHERE id = $1", at_row)
    current.set(acting(Actor(SERVICE_ROLE), clock=harness.clock, seconds=30))
    return await harness.client.read(ReadLog(consumer="left", after=after, at=at, **wanted))


def ids_of(page: LogPage) -> list[int]:
    return [row.id for row in page.rows]


async def test_the_log_gives_what_is_behind_a_position(harness: EventHarness):
    await harness.emit_alone(1, 2, 3)
    page = await read(harness)
    assert (ids_of(page), page.start, page.is_full) == ([1, 2, 3], outbox_row.end_of_row(0), False)
    assert ids_of(await read(harness, 0)) == [1, 2, 3]
    assert ids_of(await read(harness, outbox_row.end_of_row(1), at_row=1)) == [2, 3]
    assert ids_of(await read(harness, place(2), at_row=2)) == [2, 3], "events of row 2 may be left"
    assert ids_of(await read(harness, outbox_row.end_of_row(3), at_row=3)) == []
    limited = await read(harness, outbox_row.end_of_row(1), at_row=1, limit=1)
    assert (ids_of(limited), limited.is_full) == ([2], True)


async def test_a_page_is_bounded_in_bytes_and_has_a_row_at_least(harness: EventHarness):
    for n in range(1, 5):
        async with harness.publisher.transaction() as tx:
            tx.emit([changed(1, n, data="x" * (outbox.PAGE_BYTES - 500 if n > 1 else 1_000))])
    page = await read(harness)
    assert (ids_of(page), page.is_full) == ([1, 2], True)
    assert ids_of(await read(harness, outbox_row.end_of_row(2), at_row=2)) == [3, 4]


async def test_the_log_is_for_services(harness: EventHarness):
    current.set(acting(Actor("staff", 1), clock=harness.clock, seconds=30))
    with pytest.raises(Forbidden):
        await harness.client.read(ReadLog(consumer="left"))


async def test_a_position_beyond_the_last_is_refused(harness: EventHarness):
    with pytest.raises(LogReplaced):
        await read(harness, outbox_row.end_of_row(1))
    await harness.emit_alone(1, 2)
    with pytest.raises(LogReplaced):
        await read(harness, outbox_row.end_of_row(3), at_row=2)


async def test_a_log_that_was_restored_behind_a_position_refuses_it(harness: EventHarness):
    await harness.emit_alone(1, 2, 3)
    async with harness.publisher.read() as tx:
        [at] = await tx.fetch_values(datetime.datetime, "SELECT at FROM outbox WHERE id = 3")
    request = ReadLog(consumer="left", after=outbox_row.end_of_row(3), at=at)
    current.set(acting(Actor(SERVICE_ROLE), clock=harness.clock, seconds=30))
    assert ids_of(await harness.client.read(request)) == []
    await harness.execute("DELETE FROM outbox WHERE id > 1")
    with pytest.raises(LogReplaced):
        await harness.client.read(request)
    await harness.execute("ALTER SEQUENCE outbox_id_seq RESTART WITH 2")
    await harness.emit_alone(4, 5, 6)  # the row has another time now
    with pytest.raises(LogReplaced) as refusal:
        await harness.client.read(request)
    assert (refusal.value.source, refusal.value.consumer, refusal.value.after) == (SOURCE, "left", request.after)


# -------------------------------------------------------------------------------------------------------- retention


async def acknowledge(harness: EventHarness, **positions: int) -> None:
    async with harness.publisher.transaction() as tx:
        await outbox.note(tx, positions)


async def purge(harness: EventHarness) -> int:
    async with harness.publisher.transaction() as tx:
        return await outbox.purge(tx)


async def age(harness: EventHarness, days: int, upto: int) -> None:
    await harness.execute(f"UPDATE outbox SET at = at - interval '{days} days' WHERE id <= {upto}")


async def left_of(harness: EventHarness) -> list[int]:
    return [row.id for row in await harness.outbox()]


async def test_old_rows_are_deleted_once_every_consumer_has_acknowledged_them(harness: EventHarness):
    await harness.emit_alone(*range(6))
    await age(harness, 8, upto=4)
    await acknowledge(harness, left=outbox_row.end_of_row(6), right=place(3))
    assert await purge(harness) == 2
    assert await left_of(harness) == [3, 4, 5, 6], "row 3 is read in part"
    await acknowledge(harness, right=outbox_row.end_of_row(6))
    await acknowledge(harness, right=outbox_row.end_of_row(1))  # the highest counts
    assert await purge(harness) == 2
    assert await left_of(harness) == [5, 6]


async def test_rows_wait_where_no_consumer_is_registered(harness: EventHarness):
    await harness.emit_alone(1, 2)
    await age(harness, 29, upto=2)
    assert await purge(harness) == 0
    await age(harness, 2, upto=1)
    assert await purge(harness) == 1


async def test_deleting_leaves_no_gap_where_the_clock_was_set_back(harness: EventHarness):
    await harness.emit_alone(1, 2, 3)
    await harness.execute("UPDATE outbox SET at = at - interval '8 days' WHERE id <> 2")
    await acknowledge(harness, left=outbox_row.end_of_row(3))
    assert await purge(harness) == 1
    assert await left_of(harness) == [2, 3]


async def test_after_thirty_days_unread_rows_are_deleted_and_reading_on_is_refused(harness: EventHarness):
    await harness.emit_alone(1, 2, 3)
    async with harness.publisher.read() as tx:
        first, second = await tx.fetch_values(datetime.datetime, "SELECT at FROM outbox WHERE id < 3 ORDER BY id")
    await acknowledge(harness, left=outbox_row.end_of_row(1))
    await age(harness, 31, upto=2)
    assert await purge(harness) == 2
    current.set(acting(Actor(SERVICE_ROLE), clock=harness.clock, seconds=30))
    with pytest.raises(LogPurged) as refusal:
        await harness.client.read(ReadLog(consumer="left", after=outbox_row.end_of_row(1), at=first))
    assert refusal.value.after == outbox_row.end_of_row(1)
    with pytest.raises(LogPurged):
        await harness.client.read(ReadLog(consumer="left", after=place(2), at=second))
    with pytest.raises(LogPurged):
        await harness.client.read(ReadLog(consumer="left", after=0))


async def test_a_consumer_that_has_read_what_was_deleted_goes_on(harness: EventHarness):
    await harness.emit_alone(1, 2, 3)
    await age(harness, 8, upto=2)
    async with harness.publisher.read() as tx:
        [at] = await tx.fetch_values(datetime.datetime, "SELECT at FROM outbox WHERE id = 2")
    await acknowledge(harness, left=outbox_row.end_of_row(2))
    assert await purge(harness) == 2
    current.set(acting(Actor(SERVICE_ROLE), clock=harness.clock, seconds=30))
    request = ReadLog(consumer="left", after=outbox_row.end_of_row(2), at=at)
    assert ids_of(await harness.client.read(request)) == [3]
    with pytest.raises(LogReplaced):
        await harness.client.read(msgspec.structs.replace(request, at=at + datetime.timedelta(microseconds=1)))
    new = await harness.client.read(ReadLog(consumer="new"))
    assert (ids_of(new), new.start) == ([3], outbox_row.end_of_row(2))
    assert ids_of(await harness.client.read(ReadLog(consumer="new", after=new.start))) == [3]


async def test_a_new_consumer_is_registered_before_it_gets_its_first_page(harness: EventHarness):
    await harness.emit(1)
    await read(harness)
    assert await harness.values("SELECT position FROM outbox_readers WHERE consumer = 'left'") == [
        outbox_row.end_of_row(0)
    ]


async def test_the_log_notes_positions_and_deletes_while_it_runs(harness: EventHarness):
    await harness.emit_alone(1, 2)
    await age(harness, 8, upto=1)
    await read(harness, outbox_row.end_of_row(2), at_row=2)
    async with harness.publisher.transaction() as tx:
        await tx.execute("UPDATE outbox_readers SET position = 0")
        await tx.execute("INSERT INTO outbox_readers VALUES ('former', 0, now() - interval '31 days')")

    assert await harness.log.maintain() == 0  # the position was noted after it had looked for what no consumer needs

    assert await harness.values("SELECT position FROM outbox_readers ORDER BY consumer") == [outbox_row.end_of_row(2)]
    assert await harness.log.maintain() == 1
    assert await left_of(harness) == [2]
