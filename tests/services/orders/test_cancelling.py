"""Cancelling, in every phase of a checkout: at rest no money is kept, and nothing is held or sold."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import pytest

from mercato.chassis.observability.faults import Fault
from mercato.contracts.orders import (
    CancelOrder,
    CancelReason,
    MoveOrder,
    MovePayment,
    Order,
    OrderCancelled,
    PaidOrder,
    RefundOrder,
)
from services.orders.world import ALICE, MUG_MINOR, STAFF, Late, World, basket

pytestmark = pytest.mark.asyncio(loop_scope="session")

Plant = Callable[[str, Fault], Callable[[], None]]

REASON: Final = CancelReason(code="requested", message="changed my mind")
BOTH: Final = ("before", "after")


async def cancel(world: World, order: Order) -> Order:
    with world.acting(ALICE):
        return await world.orders.cancel(CancelOrder(id=order.id, reason=REASON.message))


async def assert_undone(world: World, order: Order, product_id: int) -> Order:
    """That at rest nothing is left of an order of three pieces, of ten."""
    at_rest = await world.settled(order.id)
    assert (at_rest.status, at_rest.reason) == ("cancelled", REASON)
    bank = await world.bank(order.id)
    assert (bank.net_minor, bank.open_charges) == (0, 0)
    assert bank.captures <= 1
    # What was charged and refunded before the order was saved as paid stands in payments alone.
    assert at_rest.refunded_minor == (bank.refunded_minor if at_rest.payment == "refunded" else 0)
    assert {payment.status for payment in await world.payments(order.id)} <= {
        "failed",
        "voided",
        "refunded",
        "captured",
    }
    assert sum(p.captured_minor - p.refunded_minor for p in await world.payments(order.id)) == 0
    assert await world.shelf(product_id) == (10, 0)
    assert await world.saga(order.id) == []
    return at_rest


# ------------------------------------------------------------------------------------------------------------- at rest


async def test_a_cancelled_order_that_waits_frees_its_stock(busy_world: World):
    product_id = await busy_world.new_product(10)
    order = await busy_world.checked_out(None, (product_id, 3))

    await cancel(busy_world, order)

    assert (await assert_undone(busy_world, order, product_id)).payment == "unpaid"
    assert await busy_world.reservation(order.id) == "released"


async def test_a_cancelled_paid_order_is_refunded_and_its_goods_are_restocked(busy_world: World):
    product_id = await busy_world.new_product(10)
    order = await busy_world.checked_out("sandbox:ok", (product_id, 3))

    await cancel(busy_world, order)

    at_rest = await assert_undone(busy_world, order, product_id)
    assert (at_rest.payment, at_rest.refunded_minor) == ("refunded", 3 * MUG_MINOR)
    assert (await busy_world.history(order.id))[-2:] == [
        ("status", "confirmed", "cancelled"),
        ("payment", "paid", "refunded"),
    ]


async def test_a_cancelled_order_that_was_refunded_in_part_is_refunded_the_rest(busy_world: World):
    product_id = await busy_world.new_product(10)
    order = await busy_world.checked_out("sandbox:ok", (product_id, 3))
    [payment] = await busy_world.payments(order.id)
    with busy_world.acting(STAFF):
        await busy_world.orders.refund(
            RefundOrder(payment_id=payment.id, amount_minor=100, idempotency_key=f"part-{order.id}")
        )

    await cancel(busy_world, order)

    at_rest = await assert_undone(busy_world, order, product_id)
    assert (at_rest.payment, at_rest.refunded_minor) == ("refunded", 3 * MUG_MINOR)


@pytest.mark.parametrize("method", [None, "sandbox:ok"])
async def test_a_cancelled_order_with_a_total_of_0_is_refunded_without_the_provider(
    busy_world: World, method: str | None
):
    product_id = await busy_world.new_product(10, price_minor=0)
    order = await busy_world.checked_out(method, (product_id, 3))

    await cancel(busy_world, order)

    assert (await assert_undone(busy_world, order, product_id)).payment == "refunded"
    assert await busy_world.bank_operations(order.id) == []


async def test_an_order_that_is_cancelled_after_a_decline_frees_its_stock(busy_world: World):
    product_id = await busy_world.new_product(10)
    order = await busy_world.checked_out("sandbox:declined", (product_id, 3))

    await cancel(busy_world, order)

    assert (await assert_undone(busy_world, order, product_id)).payment == "unpaid"
    assert await busy_world.reservation(order.id) == "released"


async def test_a_cancelled_order_on_account_is_restocked_without_money(busy_world: World):
    product_id = await busy_world.new_product(10)
    order = await busy_world.checked_out(None, (product_id, 3))
    with busy_world.acting(STAFF):
        await busy_world.orders.move(MoveOrder(id=order.id, status="confirmed"))

    await cancel(busy_world, order)

    assert (await assert_undone(busy_world, order, product_id)).payment == "unpaid"


async def test_a_cancelled_authorized_order_is_voided(busy_world: World):
    product_id = await busy_world.new_product(10)
    order = await busy_world.checked_out(None, (product_id, 3))
    await busy_world.pay(order.id, actor=STAFF, capture=False)

    await cancel(busy_world, order)

    assert (await assert_undone(busy_world, order, product_id)).payment == "voided"


# ----------------------------------------------------------------------------------------------------------- under way


@pytest.mark.parametrize("after_ms", [0, 150, 450])
async def test_a_cancel_while_a_slow_charge_is_under_way_refunds_what_it_took(busy_world: World, after_ms: int):
    """Before the bank has answered or after it: about, and whichever it is in the end."""
    product_id = await busy_world.new_product(10)
    order = await busy_world.place(basket((product_id, 3), payment_method="sandbox:slow:300"))
    await asyncio.sleep(after_ms / 1_000)

    await cancel(busy_world, order)

    await assert_undone(busy_world, order, product_id)


async def test_a_cancel_while_the_bank_processes_a_charge_waits_for_it_and_refunds_it(busy_world: World):
    product_id = await busy_world.new_product(10)
    order = await busy_world.place(basket((product_id, 3), payment_method="sandbox:slow:1000"))

    async def is_processing() -> bool:
        return await busy_world.bank_operations(order.id) == [("charge", "processing")]

    await busy_world.until(is_processing)
    await cancel(busy_world, order)

    await assert_undone(busy_world, order, product_id)
    assert await busy_world.bank_operations(order.id) == [("charge", "succeeded"), ("refund", "succeeded")]
    assert [payment.status for payment in await busy_world.payments(order.id)] == ["refunded"]


async def test_a_cancel_after_a_charge_whose_answer_was_lost_refunds_it(busy_world: World, plant: Plant):
    product_id = await busy_world.new_product(10)
    late = Late()
    lift = plant("checkout.charge.after_call", late)
    order = await busy_world.place(basket((product_id, 3), payment_method="sandbox:lost_answer"))
    await late.stands.wait()
    lift()
    charged = await busy_world.bank(order.id)

    await cancel(busy_world, order)
    await assert_undone(busy_world, order, product_id)
    late.go_on.set()

    assert (charged.captures, charged.net_minor) == (1, 3 * MUG_MINOR)
    assert await busy_world.bank_operations(order.id) == [("charge", "succeeded"), ("refund", "succeeded")]
    await assert_undone(busy_world, order, product_id)


@pytest.mark.parametrize(
    "point", [f"checkout.{call}.{when}_call" for call in ("reserve", "charge", "commit") for when in BOTH]
)
async def test_a_fenced_driver_that_goes_on_after_the_cancel_changes_nothing(
    busy_world: World, plant: Plant, point: str
):
    """It stands at each point in turn while the order is cancelled and undone; then it goes on."""
    product_id = await busy_world.new_product(10)
    late = Late()
    lift = plant(point, late)
    order = await busy_world.place(basket((product_id, 3), payment_method="sandbox:ok"))
    await late.stands.wait()
    lift()

    await assert_fenced_after_cancel(busy_world, order, product_id, late)


@pytest.mark.parametrize(
    "point", [f"checkout.{call}.{when}_call" for call in ("authorize", "capture") for when in BOTH]
)
async def test_a_fenced_driver_of_a_manual_capture_that_goes_on_after_the_cancel_changes_nothing(
    busy_world: World, plant: Plant, point: str
):
    product_id = await busy_world.new_product(10)
    order = await busy_world.checked_out(None, (product_id, 3))
    late = Late()
    lift = plant(point, late)
    capturing = asyncio.ensure_future(capture_by_hand(busy_world, order))
    await late.stands.wait()
    lift()

    await assert_fenced_after_cancel(busy_world, order, product_id, late)
    await asyncio.gather(capturing, return_exceptions=True)


async def capture_by_hand(world: World, order: Order) -> None:
    payment = (await world.pay(order.id, actor=STAFF, capture=False)).payment
    with world.acting(STAFF):
        await world.orders.capture(MovePayment(payment_id=payment.id))


async def assert_fenced_after_cancel(world: World, order: Order, product_id: int, late: Late) -> None:
    await cancel(world, order)
    before = await assert_undone(world, order, product_id)
    fenced = world.counted("mercato_saga_fenced")
    late.go_on.set()

    async def is_fenced() -> bool:
        return world.counted("mercato_saga_fenced") > fenced

    await world.until(is_fenced)
    assert await assert_undone(world, order, product_id) == before


async def test_a_cancel_waits_for_a_checkout_that_is_being_saved_and_refunds_it(busy_world: World, plant: Plant):
    product_id = await busy_world.new_product(10)
    late = Late()
    lift = plant("checkout.reserve.before_commit", late)
    order = await busy_world.place(basket((product_id, 3), payment_method="sandbox:ok"))
    await late.stands.wait()
    lift()

    cancelling = asyncio.ensure_future(cancel(busy_world, order))
    await busy_world.until_waiting()
    late.go_on.set()
    cancelled = await cancelling

    assert (cancelled.status, cancelled.payment) == ("cancelled", "paid")
    assert (await assert_undone(busy_world, order, product_id)).payment == "refunded"


async def test_a_cancel_waits_for_a_capture_that_is_being_saved_and_refunds_it(busy_world: World, plant: Plant):
    product_id = await busy_world.new_product(10)
    order = await busy_world.checked_out(None, (product_id, 3))
    payment = (await busy_world.pay(order.id, actor=STAFF, capture=False)).payment
    await busy_world.settled(order.id)
    late = Late()
    lift = plant("checkout.settle.before_commit", late)
    with busy_world.acting(STAFF):
        capturing = asyncio.ensure_future(busy_world.orders.capture(MovePayment(payment_id=payment.id)))
    await late.stands.wait()
    lift()

    cancelling = asyncio.ensure_future(cancel(busy_world, order))
    await busy_world.until_waiting()
    late.go_on.set()
    cancelled = await cancelling

    assert (cancelled.status, cancelled.payment) == ("cancelled", "paid")
    assert (await assert_undone(busy_world, order, product_id)).payment == "refunded"
    await asyncio.gather(capturing, return_exceptions=True)


# --------------------------------------------------------------------------------------------------------- lock order


@pytest.mark.parametrize("first", ["pay", "cancel"])
async def test_pay_and_cancel_at_once_of_an_order_without_a_saga_leave_one_end(busy_world: World, first: str):
    """Both find no saga and wait for the order; the second looks again, and finds the saga of the first."""
    product_id = await busy_world.new_product(10)
    order = await busy_world.checked_out(None, (product_id, 3))
    with busy_world.acting(STAFF):
        await busy_world.orders.move(MoveOrder(id=order.id, status="confirmed"))
    assert await busy_world.saga(order.id) == []
    asked = {"pay": lambda: busy_world.pay(order.id), "cancel": lambda: cancel(busy_world, order)}
    connection = await busy_world.connection()

    async with connection.transaction():
        await connection.execute("SELECT FROM orders WHERE id = $1 FOR UPDATE", order.id)
        tasks = {first: asyncio.ensure_future(asked.pop(first)())}
        await busy_world.until_waiting()
        [(second, ask)] = asked.items()
        tasks[second] = asyncio.ensure_future(ask())
        await busy_world.until_waiting(2)
    outcomes = dict(zip(tasks, await asyncio.gather(*tasks.values(), return_exceptions=True), strict=True))

    assert isinstance(outcomes["cancel"], Order)
    assert isinstance(outcomes["pay"], PaidOrder | OrderCancelled)
    await assert_undone(busy_world, order, product_id)


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_crash_around_the_commit_of_a_cancel_leaves_one_end(busy_world: World, plant: Plant, when: str):
    product_id = await busy_world.new_product(10)
    order = await busy_world.checked_out("sandbox:ok", (product_id, 3))

    async def fail(_point: str) -> None:
        raise RuntimeError("a planted failure")

    lift = plant(f"orders.cancel.{when}_commit", fail)
    await asyncio.gather(cancel(busy_world, order), return_exceptions=True)
    lift()
    if when == "before":
        assert (await busy_world.settled(order.id)).status == "confirmed"
        await cancel(busy_world, order)

    await assert_undone(busy_world, order, product_id)


@pytest.mark.parametrize(
    "point",
    [
        *(f"checkout.{call}.{when}_call" for call in ("refund", "release", "restock") for when in BOTH),
        *(f"checkout.unwind.{when}_commit" for when in BOTH),
    ],
)
async def test_an_unwind_that_fails_at_any_point_is_repeated_and_refunds_once(
    busy_world: World, plant: Plant, point: str
):
    product_id = await busy_world.new_product(10)
    order = await busy_world.checked_out("sandbox:ok", (product_id, 3))
    failures = 0

    async def fail_twice(_point: str) -> None:
        nonlocal failures
        failures += 1
        if failures <= 2:
            raise RuntimeError("a planted failure")

    plant(point, fail_twice)
    await cancel(busy_world, order)

    assert (await assert_undone(busy_world, order, product_id)).payment == "refunded"
    assert failures, "the point is not on this way"
    assert await busy_world.bank_operations(order.id) == [("charge", "succeeded"), ("refund", "succeeded")]
