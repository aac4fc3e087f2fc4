"""Streams of events: what a client gets, when it ends, and what one client cannot do to others."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack

import pytest
import pytest_asyncio

from mercato.chassis.http import HttpLimits
from mercato.gateway.streams.limits import StreamLimits
from mercato.testing.cluster import Cluster
from mercato.testing.event_stream import EventStream, Message, event_stream
from mercato.testing.responses import assert_problem
from mercato.testing.shop import Shop
from mercato.testing.shop_data import PASSWORD, new_order, new_person, settled_order, staff_token, token_of

pytestmark = pytest.mark.asyncio(loop_scope="session")

POLLS = 3_000
POLL_SECONDS = 0.02


def about(order_id: int, name: str = "") -> Callable[[Message], bool]:
    """Whether a message is an event about an order, of a type."""
    return lambda m: m.data is not None and m.data.get("subject") == f"order {order_id}" and name in ("", m.event)


def types_of(stream: EventStream) -> list[str]:
    return [message.event for message in stream.seen]


async def eventually(is_so: Callable[[], bool]) -> None:
    for _ in range(POLLS):
        if is_so():
            return
        await asyncio.sleep(POLL_SECONDS)
    pytest.fail("it has not become so")


async def metric(shop: Shop, sample: str) -> float:
    text = (await shop.get("/metrics", token=await staff_token(shop))).text
    return float(next((line.rpartition(" ")[2] for line in text.splitlines() if line.startswith(sample)), "0"))


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def small_shop(cluster: Cluster) -> AsyncGenerator[Shop]:
    """A shop with small bounds, whose streams beat every second."""
    limits = StreamLimits(streams=4, of_one=3, buffer_bytes=16_384, heartbeat_seconds=1.0, recent_entries=20)
    shop = await Shop.start(cluster, is_open=False, streams=limits, limits=HttpLimits(stalled_seconds=3600))
    yield shop
    await shop.close()


async def cancelled(shop: Shop, order_id: int) -> None:
    reply = await shop.post(f"/orders/{order_id}/cancel", {"reason": "test"}, token=await staff_token(shop))
    assert reply.status == 200, reply.body


# --------------------------------------------------------------------------------------------------------- the feed


async def test_a_stream_of_the_feed_begins_at_its_end_and_has_what_happens_then(open_shop: Shop):
    person = await new_person(open_shop)
    before = await new_order(open_shop, person.id)
    async with event_stream(open_shop.url, f"/events?after=0&subject=order%20{before}") as old:
        await old.until(about(before))  # it is in the feed
    async with event_stream(open_shop.url, "/events") as stream:
        first = await stream.next()
        assert first is not None
        assert first.id is not None
        assert 1_000 <= (first.retry_ms or 0) <= 3_000
        order_id = await new_order(open_shop, person.id)
        found = await stream.until(about(order_id))
        [entry] = [
            entry
            for entry in (await open_shop.get(f"/events?after={first.id}&limit=500")).json
            if entry["position"] == found.id
        ]

        assert (found.event, found.data) == ("order.placed", entry)
        assert stream.head.status == 200
        assert stream.head.headers["content-type"] == "text/event-stream"
        assert stream.head.headers["cache-control"] == "no-store"
        assert not any(about(before)(message) for message in stream.seen)
        positions = [message.id or 0 for message in stream.seen]
        assert positions == sorted(set(positions))


async def test_a_stream_has_only_the_types_and_the_subject_that_are_asked_for(open_shop: Shop):
    person = await new_person(open_shop)
    async with AsyncExitStack() as stack:
        end = await stack.enter_async_context(event_stream(open_shop.url, "/events"))
        await end.next()
        placed = await stack.enter_async_context(event_stream(open_shop.url, "/events?types=order.placed"))
        await placed.next()
        first, second = await new_order(open_shop, person.id), await new_order(open_shop, person.id)
        await settled_order(open_shop, second)  # an order that is cancelled before its stock is held releases none
        query = f"/events?after={end.position}&subject=reservation%20{second}"
        held = await stack.enter_async_context(event_stream(open_shop.url, query))
        await cancelled(open_shop, second)

        await placed.until(about(second))
        assert set(types_of(placed)) == {"order.placed"}
        assert any(about(first)(message) for message in placed.seen)
        await held.event("stock.released")
        assert {message.data["subject"] for message in held.seen} == {f"reservation {second}"}
        assert types_of(held) == ["stock.held", "stock.released"]


async def test_a_reader_that_comes_back_anywhere_has_each_event_once(open_shop: Shop):
    """Its connection breaks after each few events, while others are added."""
    person = await new_person(open_shop)
    async with event_stream(open_shop.url, "/events") as whole:
        await whole.next()
        position, seen = whole.position, list[int]()
        orders = asyncio.gather(*(new_order(open_shop, person.id) for _ in range(12)))
        last = None
        for count in (1, 2, 3, 5, 8, 13, 100):
            async with event_stream(open_shop.url, "/events", after=position) as part:
                while len(part.seen) < count and last not in seen:
                    if orders.done() and last is None:
                        await cancelled(open_shop, orders.result()[-1])
                        last = (await whole.until(about(orders.result()[-1], "order.cancelled"))).id
                    await part.next()
                    seen += [message.id or 0 for message in part.seen if message.id not in seen]
                position = part.position
                part.cut()
        await orders

        assert last in seen, "the last part has read to the cancellation"
        expected = [message.id for message in whole.seen]
        assert seen[: seen.index(last) + 1] == expected


async def test_a_browser_goes_on_after_its_last_event_and_not_at_the_position_in_its_address(open_shop: Shop):
    """It repeats its address, with the position at which it began."""
    order_id = await new_order(open_shop, (await new_person(open_shop)).id)
    path = f"/events?after=0&subject=order%20{order_id}"
    async with event_stream(open_shop.url, path) as first:
        placed = await first.until(about(order_id, "order.placed"))
    await cancelled(open_shop, order_id)
    async with event_stream(open_shop.url, path, after=placed.id) as again:
        await again.until(about(order_id, "order.cancelled"))

    assert "order.placed" not in types_of(again)


async def test_a_stream_that_has_lasted_long_ends_so_that_its_client_comes_back(open_shop: Shop):
    async with event_stream(open_shop.url, "/events") as stream:
        await stream.next()
        streams = open_shop.app.streams
        assert streams is not None
        for opened in streams.open:
            opened.look(math.inf, heartbeat_seconds=1.0)
        await stream.to_the_end()

    assert not stream.is_cut


async def test_a_position_that_the_feed_does_not_keep_or_never_had_is_gone(open_shop: Shop):
    database = open_shop.harness.host.services["events"].database
    async with database.transaction() as tx:
        await tx.execute("INSERT INTO feed_purged VALUES ('stock.exhausted', 7)")
    try:
        path = "/events?types=stock.exhausted"
        async with event_stream(open_shop.url, path, after=6) as old:
            assert_problem(old.head, 410, "events.cursor_too_old")
            assert old.head.json["details"] == {"after": 6, "oldest": 7}
        async with event_stream(open_shop.url, path, after=7) as kept:
            assert kept.head.status == 200
    finally:
        async with database.transaction() as tx:
            await tx.execute("DELETE FROM feed_purged WHERE type = 'stock.exhausted'")
    async with event_stream(open_shop.url, "/events", after=9_007_199_254_740_991) as ahead:
        assert_problem(ahead.head, 410, "events.cursor_ahead")


@pytest.mark.parametrize("given", ["x", "-1", "1.5", "9007199254740992", "1" * 17])
async def test_a_last_event_id_that_is_no_position_is_refused(open_shop: Shop, given: str):
    async with event_stream(open_shop.url, "/events", headers={"Last-Event-ID": given}) as stream:
        assert_problem(stream.head, 400, "invalid_request")
        assert stream.head.wrong_fields == {"header Last-Event-ID"}


@pytest.mark.parametrize(
    ("query", "field"), [("limit=5", "?limit"), ("subject=order", "?subject"), ("types=order.payed", "?types")]
)
async def test_a_query_that_no_stream_takes_is_refused(open_shop: Shop, query: str, field: str):
    async with event_stream(open_shop.url, f"/events?{query}") as stream:
        assert_problem(stream.head, 400, "invalid_request")
        assert stream.head.wrong_fields == {field}


@pytest.mark.parametrize(
    ("accept", "is_stream"),
    [
        ("text/event-stream", True),
        ("text/event-stream, application/json;q=0.5", True),
        ("text/html, text/event-stream", True),
        ("application/json, text/event-stream;q=0.9", False),
        ("text/event-stream;q=0", False),
        ("*/*", False),
        ("text/*", False),
    ],
)
async def test_the_feed_is_a_stream_for_those_who_name_it(open_shop: Shop, accept: str, is_stream: bool):
    reply = await open_shop.get("/events?after=0", headers={"Accept": accept})
    assert reply.headers["content-type"] == ("text/event-stream" if is_stream else "application/json")


async def test_a_page_takes_no_filter_by_subject(open_shop: Shop):
    reply = await open_shop.get("/events?subject=order%201")
    assert_problem(reply, 400, "invalid_request")
    assert "text/event-stream" in reply.json["errors"][0]["message"]


# ------------------------------------------------------------------------------------------------------- one order


async def test_the_stream_of_an_order_begins_with_the_order_and_has_its_events_alone(guarded_shop: Shop):
    person = await new_person(guarded_shop)
    order_id, other = await new_order(guarded_shop, person.id), await new_order(guarded_shop, person.id)
    await settled_order(guarded_shop, order_id)
    shown = await guarded_shop.get(f"/orders/{order_id}", token=person.token)
    async with event_stream(guarded_shop.url, f"/orders/{order_id}/events", token=person.token) as stream:
        first = await stream.event("order")
        await cancelled(guarded_shop, other)
        await cancelled(guarded_shop, order_id)
        last = await stream.event("order.cancelled")

    assert first.data == shown.json
    assert {message.data["subject"] for message in stream.seen[1:]} == {f"order {order_id}"}
    assert last.data["version"] > first.data["version"]
    assert last.data["data"]["reason"]["message"] == "test"
    async with event_stream(guarded_shop.url, f"/orders/{order_id}/events?after=0", token=person.token) as again:
        await again.event("order.cancelled")
        assert types_of(again)[0] == "order.placed"


async def test_a_customer_is_not_shown_which_staff_have_acted(guarded_shop: Shop):
    person, staff = await new_person(guarded_shop), await staff_token(guarded_shop)
    payment = await guarded_shop.post(
        "/orders",
        {"user_id": person.id, "product_id": 100, "payment_method": "sandbox:ok"},
        token=person.token,
        headers={"Prefer": "wait=30"},
    )
    order_id = payment.json["id"]
    await cancelled(guarded_shop, order_id)
    path = f"/orders/{order_id}/events?after=0&types=refund.succeeded"
    async with (
        event_stream(guarded_shop.url, path, token=person.token) as own,
        event_stream(guarded_shop.url, path, token=staff) as of_staff,
    ):
        for_customer, for_staff = await own.event("refund.succeeded"), await of_staff.event("refund.succeeded")

    assert for_staff.data["data"]["actor_id"] > 0
    assert for_customer.data["data"] == {**for_staff.data["data"], "actor_id": 0}


async def test_only_those_who_may_see_an_order_may_follow_it(guarded_shop: Shop):
    person, other = await new_person(guarded_shop), await new_person(guarded_shop)
    order_id = await new_order(guarded_shop, person.id)
    path = f"/orders/{order_id}/events"
    for token, status, code in ((None, 401, "sign_in_first"), (other.token, 404, "orders.not_found")):
        async with event_stream(guarded_shop.url, path, token=token) as refused:
            assert_problem(refused.head, status, code)
    async with event_stream(guarded_shop.url, "/orders/999999/events", token=person.token) as unknown:
        assert_problem(unknown.head, 404, "orders.not_found")
    for token, code in ((None, "sign_in_first"), (person.token, "forbidden")):
        async with event_stream(guarded_shop.url, "/events", token=token) as refused:
            assert refused.head.code == code


async def test_a_guest_follows_an_order_by_its_access_token_until_it_is_claimed(guarded_shop: Shop):
    placed = await guarded_shop.post("/orders", {"product_id": 100})
    order_id, access = placed.json["id"], placed.json["access_token"]
    path = f"/orders/{order_id}/events"
    async with event_stream(guarded_shop.url, f"{path}?access_token=wrong") as refused:
        assert_problem(refused.head, 404, "orders.not_found")
    async with event_stream(guarded_shop.url, f"{path}?access_token={access}&after=0") as stream:
        await stream.event("order.placed")
        claimant = await new_person(guarded_shop)
        proof = {"token": await token_of(guarded_shop, "proof", claimant.id)}
        assert (await guarded_shop.post("/email/proof", proof)).status == 204
        reply = await guarded_shop.post(f"{path[:-7]}/claim", {"access_token": access}, token=claimant.token)
        assert reply.status == 200, reply.body
        await stream.to_the_end()

    assert not stream.is_cut
    assert "order.claimed" not in types_of(stream)
    async with event_stream(guarded_shop.url, f"{path}?access_token={access}", after=stream.position) as refused:
        assert_problem(refused.head, 404, "orders.not_found")


@pytest.mark.parametrize(("accept", "status"), [("application/json", 406), ("*/*", 200), ("text/*;q=0.1", 200)])
async def test_the_stream_of_an_order_needs_a_client_that_accepts_it(open_shop: Shop, accept: str, status: int):
    person = await new_person(open_shop)
    reply = await open_shop.get(f"/orders/{await new_order(open_shop, person.id)}/events", headers={"Accept": accept})
    assert reply.status == status
    if status == 406:
        assert_problem(reply, 406, "not_acceptable")


async def test_head_answers_without_a_stream(small_shop: Shop):
    staff = await staff_token(small_shop)
    for _ in range(5):  # more than a client may have
        async with event_stream(small_shop.url, "/events", method="HEAD", token=staff) as stream:
            assert stream.head.status == 200
            assert stream.head.headers["content-type"] == "text/event-stream"
            assert "content-length" not in stream.head.headers


# ----------------------------------------------------------------------------------------------------------- the end


async def test_a_stream_ends_with_the_session_of_its_token(guarded_shop: Shop):
    person = await new_person(guarded_shop)
    order_id = await new_order(guarded_shop, person.id)
    async with event_stream(guarded_shop.url, f"/orders/{order_id}/events", token=person.token) as stream:
        await stream.event("order")
        body = {"current_password": PASSWORD, "new_password": "another long password"}
        reply = await guarded_shop.post("/users/me/password", body, token=person.token)
        assert reply.status == 204, reply.body
        await stream.to_the_end()

    assert not stream.is_cut
    path = f"/orders/{order_id}/events"
    async with event_stream(guarded_shop.url, path, token=person.token, after=stream.position) as again:
        assert_problem(again.head, 401, "unauthenticated")


async def test_streams_end_cleanly_and_at_once_when_the_shop_stops(cluster: Cluster):
    shop = await Shop.start(cluster)
    async with AsyncExitStack() as stack:
        streams = [await stack.enter_async_context(event_stream(shop.url, "/events")) for _ in range(3)]
        for stream in streams:
            await stream.next()
        closing = asyncio.create_task(shop.close())
        for stream in streams:
            await stream.to_the_end()
        await closing

    assert [stream.is_cut for stream in streams] == [False] * 3


# ------------------------------------------------------------------------------------------------------------ bounds


async def test_a_heartbeat_has_the_position_behind_what_the_filters_exclude(small_shop: Shop):
    person, staff = await new_person(small_shop), await staff_token(small_shop)
    async with event_stream(small_shop.url, "/events?types=stock.exhausted", token=staff) as stream:
        first = await stream.next()
        assert first is not None
        order_id = await new_order(small_shop, person.id)
        async with event_stream(small_shop.url, f"/orders/{order_id}/events?after=0", token=staff) as own:
            placed = await own.event("order.placed")
        beat = await stream.until(lambda message: (message.id or 0) >= (placed.id or 0))

    assert (beat.data, beat.comment) == (None, "heartbeat")


async def test_more_streams_than_a_client_or_the_process_may_have_are_refused(small_shop: Shop):
    person, staff = await new_person(small_shop), await staff_token(small_shop)
    order_id = await new_order(small_shop, person.id)
    own = f"/orders/{order_id}/events"
    async with AsyncExitStack() as stack:
        for _ in range(3):
            stream = await stack.enter_async_context(event_stream(small_shop.url, "/events", token=staff))
            assert stream.head.status == 200
        async with event_stream(small_shop.url, "/events", token=staff) as refused:
            assert_problem(refused.head, 429, "too_many_streams")
            assert refused.head.headers["retry-after"] == "5"
        await stack.enter_async_context(event_stream(small_shop.url, own, token=person.token))
        async with event_stream(small_shop.url, own, token=person.token) as refused:
            assert_problem(refused.head, 503, "streams_full")
        assert await metric(small_shop, 'mercato_streams_open{kind="feed"}') == 3
        assert await metric(small_shop, 'mercato_streams_open{kind="order"}') == 1
        assert small_shop.load.in_work == 0, "an open stream is no request in work"
    for _ in range(POLLS):
        async with event_stream(small_shop.url, own, token=person.token) as stream:
            if stream.head.status == 200:
                return
        await asyncio.sleep(POLL_SECONDS)
    pytest.fail("the places were not freed")


@pytest.mark.long
async def test_a_client_that_does_not_read_delays_no_other_and_misses_nothing(small_shop: Shop):
    """What waits for it exceeds its buffer: it reads the rest from the feed by its position."""
    person, staff = await new_person(small_shop), await staff_token(small_shop)
    slow_stream = event_stream(small_shop.url, "/events", token=staff, receive_bytes=4_096)
    async with slow_stream as slow, event_stream(small_shop.url, "/events", token=staff) as quick:
        await slow.next()
        await quick.next()
        order_id = 0
        for _ in range(POLLS):
            order_id = (await asyncio.gather(*(new_order(small_shop, person.id) for _ in range(8))))[-1]
            await quick.until(about(order_id))
            streams = small_shop.app.streams
            assert streams is not None
            if any(opened.stream.fell_behind for opened in streams.open):
                break
        await cancelled(small_shop, order_id)
        last = await quick.until(about(order_id, "order.cancelled"))
        await slow.until(lambda message: message.id == last.id)

        expected = [m.id for m in quick.seen]
        assert [m.id for m in slow.seen if m.id in set(expected)] == expected
        positions = [m.id or 0 for m in slow.seen]
        assert positions == sorted(set(positions))


async def test_a_client_that_takes_nothing_for_too_long_is_closed(cluster: Cluster):
    shop = await Shop.start(cluster, limits=HttpLimits(stalled_seconds=0.5))
    try:
        person = await new_person(shop)
        async with event_stream(shop.url, "/events", receive_bytes=4_096) as stalled:
            await stalled.next()
            streams = shop.app.streams
            assert streams is not None
            for _ in range(POLLS):
                await asyncio.gather(*(new_order(shop, person.id) for _ in range(8)))
                if not streams.open:
                    break
        assert await metric(shop, 'mercato_http_requests_refused_total{code="stream_stalled"}') == 1
    finally:
        await shop.close()
