"""The timeline of an order: what every part of the shop has done for it, in one list."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mercato.chassis.observability.faults import Fault
from mercato.contracts.orders import CancelOrder, GetTimeline, RefundOrder, TimelineEntry
from services.orders.world import ALICE, STAFF, World, basket

pytestmark = pytest.mark.asyncio(loop_scope="session")

Plant = Callable[[str, Fault], Callable[[], None]]


async def timeline(world: World, order_id: int) -> tuple[TimelineEntry, ...]:
    with world.acting(ALICE):
        return (await world.orders.timeline(GetTimeline(id=order_id))).entries


def of_part(entries: tuple[TimelineEntry, ...], part: str) -> list[tuple[str, str]]:
    return [(entry.what, entry.outcome) for entry in entries if entry.part == part]


async def test_a_paid_order_shows_its_moves_its_stock_and_its_charge_by_time(busy_world: World):
    order = await busy_world.checked_out("sandbox:ok", (await busy_world.new_product(10), 3))

    entries = await timeline(busy_world, order.id)

    assert [entry.at for entry in entries] == sorted(entry.at for entry in entries)
    assert of_part(entries, "order") == [
        ("status pending", "succeeded"),
        ("status confirmed", "succeeded"),
        ("payment paid", "succeeded"),
    ]
    assert of_part(entries, "stock") == [("held", "succeeded"), ("committed", "succeeded")]
    assert of_part(entries, "money") == [("charge", "succeeded")]
    assert {entry.part for entry in entries} == {"order", "stock", "money"}
    assert [entry.by for entry in entries if entry.part == "order"] == ["customer 1", "service", "service"]
    assert {entry.by for entry in entries if entry.part != "order"} == {"service"}
    assert {entry.attempts for entry in entries} == {1}


async def test_steps_stand_in_the_order_in_which_they_happened(busy_world: World):
    order = await busy_world.checked_out("sandbox:ok", (await busy_world.new_product(10), 1))

    places = {entry.what: n for n, entry in enumerate(await timeline(busy_world, order.id))}

    way = ["status pending", "held", "charge", "committed", "status confirmed", "payment paid"]
    assert [places[what] for what in way] == sorted(places[what] for what in way)


async def test_a_manual_capture_shows_authorization_and_capture(busy_world: World):
    order = await busy_world.checked_out(None, (await busy_world.new_product(10), 1))
    await busy_world.pay(order.id, actor=STAFF, capture=False)
    await busy_world.settled(order.id)

    entries = await timeline(busy_world, order.id)

    assert of_part(entries, "money") == [("authorize", "succeeded")]
    assert of_part(entries, "order")[1:] == [("status confirmed", "succeeded"), ("payment authorized", "succeeded")]


async def test_a_declined_payment_and_a_cancel_are_shown(busy_world: World):
    order = await busy_world.checked_out("sandbox:declined", (await busy_world.new_product(10), 1))
    declined = await timeline(busy_world, order.id)
    with busy_world.acting(ALICE):
        await busy_world.orders.cancel(CancelOrder(id=order.id, reason="too dear"))
    await busy_world.settled(order.id)

    entries = await timeline(busy_world, order.id)

    assert of_part(declined, "stock") == [("held", "succeeded")]
    assert of_part(entries, "money") == [("charge", "declined card_declined")]
    assert of_part(entries, "stock") == [("held", "succeeded"), ("released", "succeeded")]
    [cancelled] = [entry for entry in entries if entry.what == "status cancelled"]
    assert (cancelled.by, cancelled.detail) == ("customer 1", "too dear")


async def test_an_operation_with_a_lost_answer_says_how_often_it_was_called(busy_world: World):
    order = await busy_world.checked_out("sandbox:lost_answer", (await busy_world.new_product(10), 1))

    entries = await timeline(busy_world, order.id)

    [charge] = [entry for entry in entries if entry.part == "money"]
    assert (charge.what, charge.outcome) == ("charge", "succeeded")
    assert charge.attempts >= 2


async def test_a_step_that_failed_twice_says_that_it_was_tried_three_times(busy_world: World, plant: Plant):
    failures = 0

    async def fail_twice(_point: str) -> None:
        nonlocal failures
        failures += 1
        if failures <= 2:
            raise RuntimeError("a planted failure")

    plant("checkout.commit.before_call", fail_twice)
    order = await busy_world.place(basket((await busy_world.new_product(10), 1), payment_method="sandbox:ok"))
    await busy_world.settled(order.id)

    tries = {entry.what: entry.attempts for entry in await timeline(busy_world, order.id) if entry.part == "order"}

    assert tries == {"status pending": 1, "status confirmed": 3, "payment paid": 3}


async def test_a_refund_is_shown_with_its_reason(busy_world: World):
    order = await busy_world.checked_out("sandbox:ok", (await busy_world.new_product(10), 1))
    [payment] = await busy_world.payments(order.id)
    with busy_world.acting(STAFF):
        await busy_world.orders.refund(
            RefundOrder(
                payment_id=payment.id, amount_minor=100, idempotency_key=f"timeline-{order.id}", reason="a scratch"
            )
        )

    entries = await timeline(busy_world, order.id)

    assert of_part(entries, "money")[-1] == ("refund", "succeeded")
    assert of_part(entries, "order")[-1] == ("payment partially_refunded", "succeeded")
    assert entries[-1].detail == "a scratch"
