"""The feed: complete for a reader that continues from the last position, each event once, in order."""

from __future__ import annotations

import asyncio
import random
from typing import TypeVar

import pytest

from mercato.chassis.contract import Actor, Forbidden
from mercato.chassis.postgres import outbox_row
from mercato.chassis.postgres.database import Row, Tx, UniqueViolation
from mercato.contracts.events import CursorAhead, CursorTooOld, Events, ListEvents
from mercato.services.events import store
from mercato.services.events.service import BEFORE_COMMIT, EventsService
from mercato.testing.injection import Inject
from services.events.harness import AT, FeedHarness, event, name, row

R = TypeVar("R", bound=Row)


async def test_an_empty_feed_gives_the_cursor_back(feed: FeedHarness):
    page = await feed.page(after=0)
    assert (page.entries, page.next_after, page.is_full) == ((), 0, False)


async def test_a_position_that_the_feed_has_never_reached_is_refused(feed: FeedHarness):
    """The reader has read another feed, or one that was restored: what comes next would not be what follows."""
    with pytest.raises(CursorAhead):
        await feed.page(after=outbox_row.position(1, 0))
    await feed.write(event(1))
    [entry] = await feed.entries()
    assert (await feed.page(after=entry.position)).entries == ()
    for types in ([], ["order.paid"]):
        with pytest.raises(CursorAhead) as refusal:
            await feed.page(after=outbox_row.position(2, 0), types=types)
        assert (await feed.page(after=refusal.value.last, types=types)).entries == ()


async def test_an_entry_tells_everything_about_its_event(feed: FeedHarness):
    await feed.write(event(17, subject_id=1001, data='{"order_id":1001,"items":[{"quantity":2}]}'))
    [entry] = await feed.entries()
    assert entry.position >= 1
    assert (entry.id, entry.type, entry.subject) == (name(17), "order.placed", "order 1001")
    assert (entry.version, entry.at) == (17, AT)
    assert entry.data == {"order_id": 1001, "items": [{"quantity": 2}]}


async def test_pages_follow_each_other_without_gap_or_repetition(feed: FeedHarness):
    await feed.write(*(event(n) for n in range(1, 8)))
    first = await feed.page(limit=3)
    assert [entry.id for entry in first.entries] == [name(1), name(2), name(3)]
    assert first.is_full
    last = await feed.page(after=first.next_after, limit=5)
    assert [entry.id for entry in last.entries] == [name(4), name(5), name(6), name(7)]
    assert not last.is_full
    assert last.next_after == last.entries[-1].position


async def test_rows_are_read_event_by_event_from_any_position(feed: FeedHarness):
    assert await feed.write_rows(row(1, "a.b", "a.c", "a.b"), row(2, "a.c"), row(3, *["a.b"] * 5)) == 9
    await feed.write(event(4, type="a.c"))
    everything = [*(name(1, n) for n in (1, 2, 3)), name(2), *(name(3, n) for n in range(1, 6)), name(4)]
    for limit in (1, 2, 3, 4, 100):
        assert await feed.ids(limit=limit) == everything
        assert await feed.ids(limit=limit, types=["a.c"]) == [name(1, 2), name(2), name(4)]
        assert await feed.ids(limit=limit, types=["a.b", "a.c"]) == everything
    positions = [entry.position for entry in await feed.entries()]
    assert positions == sorted(set(positions))


async def test_the_last_events_begin_where_the_count_says(feed: FeedHarness):
    await feed.write_rows(row(1, "a.b", "a.c", "a.b"), row(2, "a.c"), row(3, *["a.b"] * 5))
    service = EventsService(feed.database)
    for count in (1, 3, 5, 6, 8, 9, 50):
        page = await feed.page(after=await service.before_last(count))
        assert len(page.entries) == min(count, 9)
        of_type = await feed.page(after=await service.before_last(count, ["a.b"]), types=["a.b"])
        assert len(of_type.entries) == min(count, 7)


async def test_a_row_that_comes_again_is_refused(feed: FeedHarness):
    await feed.write_rows(row(1, "a.b"), row(1, "a.b", source="payments"))
    with pytest.raises(UniqueViolation):
        await feed.write_rows(row(2, "a.b"), row(1, "a.b"))
    assert await feed.ids() == [name(1), name(1, source="payments")]


async def test_types_choose_and_keep_the_order(feed: FeedHarness):
    types = ["order.placed", "order.paid", "payment.captured", "order.placed", "order.cancelled", "order.paid"]
    await feed.write(*(event(n, type=each) for n, each in enumerate(types, 1)))
    assert await feed.ids(types=["order.paid"]) == [name(2), name(6)]
    wanted = ["order.paid", "order.placed", "order.paid"]
    assert await feed.ids(types=wanted) == [name(1), name(2), name(4), name(6)]
    assert await feed.ids(types=wanted, limit=1) == [name(1), name(2), name(4), name(6)]
    assert await feed.ids(types=["unknown.type"]) == []


async def test_the_feed_is_for_staff(feed: FeedHarness):
    with feed.acting(Actor("customer", 1)), pytest.raises(Forbidden):
        await feed.client(Events).list(ListEvents())


@pytest.mark.parametrize("seed", range(3))
async def test_a_reader_never_misses_what_concurrent_writers_commit(feed: FeedHarness, inject: Inject, seed: int):
    """Writers hold their commits back for different times, so that positions would become visible out of order."""
    chance = random.Random(seed)

    async def hesitate(_: str) -> None:
        await asyncio.sleep(chance.choice([0, 0, 0.002, 0.01]))

    inject(BEFORE_COMMIT, hesitate)

    async def write(source: str) -> None:
        for n in range(1, 31, 3):
            await feed.write(*(event(each, source=source) for each in range(n, n + 3)))

    async def read(writing: asyncio.Future[list[None]]) -> list[str]:
        seen: list[str] = []
        after = 0
        while True:
            is_last = writing.done()
            page = await feed.page(after=after, limit=7)
            seen += [entry.id for entry in page.entries]
            after = page.next_after
            if is_last and not page.entries:
                return seen

    sources = ("orders", "payments", "inventory")
    writing = asyncio.ensure_future(asyncio.gather(*(write(source) for source in sources)))
    seen = await read(writing)
    await writing
    for source in sources:
        assert [each for each in seen if each.startswith(source)] == [name(n, source=source) for n in range(1, 31)]
    assert len(seen) == 90


async def test_old_entries_are_deleted_and_new_ones_stay(feed: FeedHarness):
    await feed.write(*(event(n) for n in range(1, 6)))
    async with feed.database.transaction() as tx:
        await tx.execute("UPDATE feed SET received_at = now() - interval '8 days' WHERE outbox_id <= 3")
        assert await store.purge(tx) == 3
    assert await feed.ids() == [name(4), name(5)]


async def purge_first(feed: FeedHarness, count: int) -> None:
    """Deletes the first entries, which have become old."""
    async with feed.database.transaction() as tx:
        await tx.execute(
            """
            UPDATE feed SET received_at = now() - interval '8 days'
             WHERE position IN (SELECT position FROM feed ORDER BY position LIMIT $1)
            """,
            count,
        )
        assert await store.purge(tx) == count


async def test_a_reader_whose_next_entries_were_deleted_is_refused(feed: FeedHarness):
    await feed.write(*(event(n) for n in range(1, 7)))
    positions = [entry.position for entry in await feed.entries()]
    await purge_first(feed, 2)
    await purge_first(feed, 1)

    with pytest.raises(CursorTooOld) as refusal:
        await feed.page(after=positions[1])
    assert (refusal.value.after, refusal.value.oldest) == (positions[1], positions[2])
    rest = await feed.page(after=refusal.value.oldest)
    assert [entry.position for entry in rest.entries] == positions[3:]
    assert (await feed.page(after=0)).entries == rest.entries


async def test_a_reader_of_a_rare_type_has_missed_nothing_where_others_were_deleted(feed: FeedHarness):
    """Its cursor is that of the last entry that it was shown, however long ago that is."""
    await feed.write(event(1, type="order.paid"), *(event(n) for n in range(2, 6)), event(6, type="order.paid"))
    first, *_, last = [entry.position for entry in await feed.entries()]
    await purge_first(feed, 4)

    page = await feed.page(after=first, types=["order.paid"])
    assert [entry.position for entry in page.entries] == [last]
    with pytest.raises(CursorTooOld):
        await feed.page(after=first, types=["order.paid", "order.placed"])


class Recorded(Tx):
    """Runs statements, and keeps what it ran."""

    def __init__(self, tx: Tx) -> None:
        self._tx = tx
        self.ran: list[tuple[str, tuple[object, ...]]] = []

    async def fetch(self, row: type[R], sql: str, *values: object) -> list[R]:
        self.ran.append((sql, values))
        return await self._tx.fetch(row, sql, *values)


class PlanRow(Row):
    line: str


async def test_a_rare_type_is_found_without_reading_the_feed(feed: FeedHarness):
    await feed.write(*(event(n, type="order.paid" if n == 400 else "order.placed") for n in range(1, 401)))
    async with feed.database.transaction() as tx:
        await tx.execute("ANALYZE feed, feed_types")  # of two types, each seems to be frequent
        recorded = Recorded(tx)
        assert len(await store.page_of_types(recorded, 0, 100, ["order.paid"])) == 1
        [(sql, values)] = recorded.ran
        plan = await tx.fetch(PlanRow, f"EXPLAIN (ANALYZE, TIMING OFF, COSTS OFF) {sql}", *values)
    text = "\n".join(row.line for row in plan)
    assert "feed_types_pkey" in text
    assert "Rows Removed by Filter" not in text


async def test_of_a_deleted_row_only_the_last_event_of_a_type_is_missed_by_its_reader(feed: FeedHarness):
    await feed.write_rows(row(1, "a.b", "a.c", "a.b"), row(2, "a.b", "a.c"))
    first, second, third, *_ = [entry.position for entry in await feed.entries()]
    await purge_first(feed, 1)
    assert len((await feed.page(after=second, types=["a.c"])).entries) == 1
    with pytest.raises(CursorTooOld):
        await feed.page(after=second, types=["a.b"])
    with pytest.raises(CursorTooOld):
        await feed.page(after=first, types=["a.c"])
    assert len((await feed.page(after=third)).entries) == 2
