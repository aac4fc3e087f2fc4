"""`Events.follow`: the next entries, or a wait for them; by type, and by subject in bounded pages."""

from __future__ import annotations

import asyncio

import pytest

from mercato.chassis.contract import Actor, Forbidden
from mercato.contracts.events import CursorAhead, CursorTooOld, EventPage, Events, FollowEvents
from mercato.contracts.roles import CUSTOMER
from mercato.services.events import store
from mercato.testing.actors import STAFF
from services.events.harness import FeedHarness, event, name, row

WAIT_MS = 60_000


async def follow(feed: FeedHarness, request: FollowEvents) -> EventPage:
    with feed.acting(STAFF, seconds=70.0):
        return await feed.client(Events).follow(request)


def ids(page: EventPage) -> list[str]:
    return [entry.id for entry in page.entries]


async def test_without_a_position_the_answer_is_the_end_of_the_feed(feed: FeedHarness):
    empty = await follow(feed, FollowEvents(wait_ms=WAIT_MS))
    await feed.write(event(1))
    end = await follow(feed, FollowEvents(wait_ms=WAIT_MS))

    assert (empty.entries, empty.next_after) == ((), 0)
    assert (end.entries, end.is_full) == ((), False)
    [entry] = await feed.entries()
    assert end.next_after >= entry.position
    assert (await feed.page(after=end.next_after)).entries == ()


async def test_a_waiting_call_gets_what_is_appended(feed: FeedHarness):
    end = (await follow(feed, FollowEvents())).next_after
    waiting = asyncio.create_task(follow(feed, FollowEvents(after=end, wait_ms=WAIT_MS)))
    await feed.write(event(1), event(2))
    page = await waiting

    assert ids(page) == [name(1), name(2)]
    assert (await follow(feed, FollowEvents(after=page.next_after))).entries == ()


async def test_a_wait_ends_without_an_entry_when_its_time_is_over_or_the_process_drains(feed: FeedHarness):
    assert (await follow(feed, FollowEvents(after=0, wait_ms=1))).entries == ()
    waiting = asyncio.create_task(follow(feed, FollowEvents(after=0, wait_ms=WAIT_MS)))
    await asyncio.sleep(0)
    feed.host.drain()
    assert (await waiting).entries == ()


async def test_the_position_moves_behind_entries_of_other_types(feed: FeedHarness):
    await feed.write_rows(row(1, "a.b", "a.c"), row(2, "a.b"))
    page = await follow(feed, FollowEvents(after=0, types=("a.c",)))
    everything = await feed.entries()

    assert ids(page) == [name(1, 2)]
    assert page.next_after >= everything[-1].position
    assert not page.is_full
    limited = await follow(feed, FollowEvents(after=0, limit=2))
    assert (ids(limited), limited.is_full) == ([name(1, 1), name(1, 2)], True)
    rest = await follow(feed, FollowEvents(after=limited.next_after))
    assert ids(rest) == [name(2)]


async def test_the_entries_of_a_subject_are_found_over_many_bounded_pages(
    feed: FeedHarness, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(store, "SCANNED_ROWS", 3)
    await feed.write(*(event(n, subject_id=7 if n % 5 == 0 else 70 + n) for n in range(1, 21)))
    found: list[str] = []
    after, pages = 0, 0
    while True:
        page = await follow(feed, FollowEvents(after=after, subject="order 7", limit=2))
        found += ids(page)
        assert page.next_after > after or not page.is_full
        after, pages = page.next_after, pages + 1
        if not page.is_full:
            break

    assert found == [name(n) for n in (5, 10, 15, 20)]
    assert pages >= 20 / 3
    assert (await follow(feed, FollowEvents(after=0, subject="payment 7"))).entries == ()


async def test_a_position_that_the_feed_does_not_keep_or_never_had_is_refused(feed: FeedHarness):
    await feed.write(event(1))
    with pytest.raises(CursorAhead):
        await follow(feed, FollowEvents(after=1 << 40, wait_ms=WAIT_MS))
    async with feed.database.transaction() as tx:
        await tx.execute("INSERT INTO feed_purged VALUES ('order.placed', 9)")
    with pytest.raises(CursorTooOld):
        await follow(feed, FollowEvents(after=5, subject="order 1"))


async def test_the_feed_is_followed_by_staff_alone(feed: FeedHarness):
    with feed.acting(Actor(CUSTOMER, 1)), pytest.raises(Forbidden):
        await feed.client(Events).follow(FollowEvents())
