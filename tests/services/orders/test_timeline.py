"""The timeline of an order: what every part of the shop has done for it, in one list."""

from __future__ import annotations

import pytest

from mercato.contracts.order_history import TimelineEntry
from mercato.contracts.orders import (
    CancelOrder,
    GetTimeline,
    RefundOrder,
)
from mercato.testing.actors import ALICE, STAFF
from mercato.testing.injection import FailAt, Inject
from services.orders.harness import OrdersHarness, basket

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def timeline(harness: OrdersHarness, order_id: int) -> tuple[TimelineEntry, ...]:
    with harness.acting(ALICE):
        return (await harness.orders.timeline(GetTimeline(id=order_id))).entries


def of_part(entries: tuple[TimelineEntry, ...], part: str) -> list[tuple[str, str]]:
    return [(entry.what, entry.outcome) for entry in entries if entry.part == part]


async def test_a_paid_order_shows_its_moves_its_stock_and_its_charge_by_time(shared_harness: OrdersHarness):
    order = await shared_harness.checked_out("sandbox:ok", (await shared_harness.new_product(10), 3))

    entries = await timeline(shared_harness, order.id)

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


async def test_steps_stand_in_the_order_in_which_they_happened(shared_harness: OrdersHarness):
    order = await shared_harness.checked_out("sandbox:ok", (await shared_harness.new_product(10), 1))

    places = {entry.what: n for n, entry in enumerate(await timeline(shared_harness, order.id))}

    way = ["status pending", "held", "charge", "committed", "status confirmed", "payment paid"]
    assert [places[what] for what in way] == sorted(places[what] for what in way)


async def test_a_manual_capture_shows_authorization_and_capture(shared_harness: OrdersHarness):
    order = await shared_harness.checked_out(None, (await shared_harness.new_product(10), 1))
    await shared_harness.pay(order.id, actor=STAFF, capture=False)
    await shared_harness.settled(order.id)

    entries = await timeline(shared_harness, order.id)

    assert of_part(entries, "money") == [("authorize", "succeeded")]
    assert of_part(entries, "order")[1:] == [("status confirmed", "succeeded"), ("payment authorized", "succeeded")]


async def test_a_declined_payment_and_a_cancel_are_shown(shared_harness: OrdersHarness):
    order = await shared_harness.checked_out("sandbox:declined", (await shared_harness.new_product(10), 1))
    declined = await timeline(shared_harness, order.id)
    with shared_harness.acting(ALICE):
        await shared_harness.orders.cancel(CancelOrder(id=order.id, reason="too dear"))
    await shared_harness.settled(order.id)

    entries = await timeline(shared_harness, order.id)

    assert of_part(declined, "stock") == [("held", "succeeded")]
    assert of_part(entries, "money") == [("charge", "declined card_declined")]
    assert of_part(entries, "stock") == [("held", "succeeded"), ("released", "succeeded")]
    [cancelled] = [entry for entry in entries if entry.what == "status cancelled"]
    assert (cancelled.by, cancelled.detail) == ("customer 1", "too dear")


async def test_an_operation_with_a_lost_answer_says_how_often_it_was_called(shared_harness: OrdersHarness):
    order = await shared_harness.checked_out("sandbox:lost_answer", (await shared_harness.new_product(10), 1))

    entries = await timeline(shared_harness, order.id)

    [charge] = [entry for entry in entries if entry.part == "money"]
    assert (charge.what, charge.outcome) == ("charge", "succeeded")
    assert charge.attempts >= 2


async def test_a_step_that_failed_twice_says_that_it_was_tried_three_times(
    shared_harness: OrdersHarness, inject: Inject
):
    failing = FailAt(1, 2)
    inject("checkout.commit.before_call", failing)
    order = await shared_harness.place(basket((await shared_harness.new_product(10), 1), payment_method="sandbox:ok"))
    await shared_harness.settled(order.id)

    tries = {entry.what: entry.attempts for entry in await timeline(shared_harness, order.id) if entry.part == "order"}

    assert tries == {"status pending": 1, "status confirmed": 3, "payment paid": 3}


async def test_a_refund_is_shown_with_its_reason(shared_harness: OrdersHarness):
    order = await shared_harness.checked_out("sandbox:ok", (await shared_harness.new_product(10), 1))
    [payment] = await shared_harness.payments(order.id)
    with shared_harness.acting(STAFF):
        await shared_harness.orders.refund(
            RefundOrder(
                payment_id=payment.id, amount_minor=100, idempotency_key=f"timeline-{order.id}", reason="a scratch"
            )
        )

    entries = await timeline(shared_harness, order.id)

    assert of_part(entries, "money")[-1] == ("refund", "succeeded")
    assert of_part(entries, "order")[-1] == ("payment partially_refunded", "succeeded")
    assert entries[-1].detail == "a scratch"
