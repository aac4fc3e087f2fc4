"""The timeline of an order: what every part of the shop has done for it, in one list."""

from __future__ import annotations

import pytest

from mercato.contracts.orders import GetTimeline, RefundOrder, TimelineEntry
from services.orders.world import ALICE, STAFF, World

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def timeline(world: World, order_id: int) -> tuple[TimelineEntry, ...]:
    with world.acting(ALICE):
        return (await world.orders.timeline(GetTimeline(id=order_id))).entries


def told(entries: tuple[TimelineEntry, ...], part: str) -> list[tuple[str, str]]:
    return [(entry.what, entry.outcome) for entry in entries if entry.part == part]


async def test_every_part_tells_what_it_has_done_by_time(busy_world: World):
    order = await busy_world.checked_out("sandbox:ok", (await busy_world.new_product(10), 3))

    entries = await timeline(busy_world, order.id)

    assert [entry.at for entry in entries] == sorted(entry.at for entry in entries)
    assert told(entries, "order")[0] == ("status pending", "succeeded")
    assert sorted(told(entries, "order")[1:3]) == [
        ("payment authorized", "succeeded"),
        ("status confirmed", "succeeded"),
    ]
    assert told(entries, "order")[3:] == [("payment paid", "succeeded")]
    assert told(entries, "stock") == [("held", "succeeded"), ("committed", "succeeded")]
    assert told(entries, "money") == [("authorize", "succeeded"), ("capture", "succeeded")]
    assert told(entries, "saga") == [("checkout reserve", "authorized"), ("checkout settle", "captured")]
    assert {entry.part: entry.by for entry in entries if entry.part != "order"} == {
        "stock": "service",
        "money": "service",
        "saga": "service",
    }
    assert entries[0].by == "customer 1"


async def test_what_comes_first_stands_first(busy_world: World):
    order = await busy_world.checked_out("sandbox:ok", (await busy_world.new_product(10), 1))

    places = {entry.what: n for n, entry in enumerate(await timeline(busy_world, order.id))}

    way = ["status pending", "held", "authorize", "status confirmed", "committed", "capture", "payment paid"]
    assert [places[what] for what in way] == sorted(places[what] for what in way)


async def test_a_declined_payment_and_its_undoing_are_told(busy_world: World):
    order = await busy_world.checked_out("sandbox:declined", (await busy_world.new_product(10), 1))

    entries = await timeline(busy_world, order.id)

    assert told(entries, "money") == [("authorize", "declined card_declined")]
    assert told(entries, "stock") == [("held", "succeeded"), ("released", "succeeded")]
    assert told(entries, "saga")[-1] == ("checkout unwind", "undone")


async def test_a_step_that_took_several_tries_says_how_many(busy_world: World):
    order = await busy_world.checked_out("sandbox:lost_answer", (await busy_world.new_product(10), 1))

    entries = await timeline(busy_world, order.id)

    calls = {entry.what: entry.attempts for entry in entries if entry.part == "money"}
    assert calls["authorize"] >= 2
    assert calls["capture"] >= 2


async def test_a_refund_is_a_saga_of_its_own(busy_world: World):
    order = await busy_world.checked_out("sandbox:ok", (await busy_world.new_product(10), 1))
    [payment] = await busy_world.payments(order.id)
    with busy_world.acting(STAFF):
        await busy_world.orders.refund(
            RefundOrder(payment_id=payment.id, amount_minor=100, idempotency_key=f"timeline-{order.id}")
        )

    entries = await timeline(busy_world, order.id)

    assert told(entries, "saga")[-1] == ("refund refund", "given back")
    assert told(entries, "money")[-1] == ("refund", "succeeded")
    assert told(entries, "order")[-1] == ("payment partially_refunded", "succeeded")
