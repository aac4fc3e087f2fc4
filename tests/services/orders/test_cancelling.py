"""Cancelling, in every phase of a checkout: at rest no money is kept, and nothing is held or sold."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import pytest

from mercato.chassis.faults import Fault
from mercato.contracts.orders import CancelOrder, CancelReason, MoveOrder, Order, Payment, RefundOrder
from services.orders.world import ALICE, MUG_MINOR, STAFF, World, basket

pytestmark = pytest.mark.asyncio(loop_scope="session")

Plant = Callable[[str, Fault], Callable[[], None]]

REASON: Final = CancelReason(code="requested", message="changed my mind")
CALLS: Final = ("reserve", "authorize", "commit", "capture")


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
    assert at_rest.refunded_minor == bank.refunded_minor
    assert await world.shelf(product_id) == (10, 0)
    assert await world.saga(order.id) == ["done"]
    return at_rest


# ------------------------------------------------------------------------------------------------------------- at rest


async def test_an_order_that_waits_is_cancelled(busy_world: World):
    product_id = await busy_world.new_product(10)
    order = await busy_world.checked_out(None, (product_id, 3))

    await cancel(busy_world, order)

    assert (await assert_undone(busy_world, order, product_id)).payment == "unpaid"
    assert await busy_world.reservation(order.id) == "released"


async def test_a_paid_order_is_refunded_and_its_goods_are_back_on_the_shelf(busy_world: World):
    product_id = await busy_world.new_product(10)
    order = await busy_world.checked_out("sandbox:ok", (product_id, 3))

    await cancel(busy_world, order)

    at_rest = await assert_undone(busy_world, order, product_id)
    assert (at_rest.payment, at_rest.refunded_minor) == ("refunded", 3 * MUG_MINOR)
    assert (await busy_world.history(order.id))[-2:] == [
        ("status", "confirmed", "cancelled"),
        ("payment", "paid", "refunded"),
    ]


async def test_what_was_refunded_in_part_is_refunded_to_the_rest(busy_world: World):
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


async def test_an_order_that_cost_nothing_is_refunded_with_nothing(busy_world: World):
    product_id = await busy_world.new_product(10, price_minor=0)
    order = await busy_world.checked_out("sandbox:ok", (product_id, 3))

    await cancel(busy_world, order)

    assert (await assert_undone(busy_world, order, product_id)).payment == "refunded"


async def test_an_order_on_account_is_cancelled(busy_world: World):
    product_id = await busy_world.new_product(10)
    order = await busy_world.checked_out(None, (product_id, 3))
    with busy_world.acting(STAFF):
        await busy_world.orders.move(MoveOrder(id=order.id, status="confirmed"))

    await cancel(busy_world, order)

    assert (await assert_undone(busy_world, order, product_id)).payment == "unpaid"


async def test_an_order_whose_amount_is_only_reserved_is_cancelled(busy_world: World):
    product_id = await busy_world.new_product(10)
    order = await busy_world.checked_out(None, (product_id, 3))
    await busy_world.pay(order.id, actor=STAFF, capture=False)

    await cancel(busy_world, order)

    assert (await assert_undone(busy_world, order, product_id)).payment == "voided"


# ----------------------------------------------------------------------------------------------------------- under way


@pytest.mark.parametrize("after_ms", [0, 150, 450])
async def test_an_order_is_cancelled_while_a_slow_payment_is_under_way(busy_world: World, after_ms: int):
    """Before the bank has answered, while it authorizes, while it captures: about, and whichever it is in the end."""
    product_id = await busy_world.new_product(10)
    order = await busy_world.place(basket((product_id, 3), payment_method="sandbox:slow:300"))
    await asyncio.sleep(after_ms / 1_000)

    await cancel(busy_world, order)

    await assert_undone(busy_world, order, product_id)


@pytest.mark.parametrize("point", [f"checkout.{call}.{when}_call" for call in CALLS for when in ("before", "after")])
async def test_a_driver_that_comes_back_after_the_cancel_changes_nothing_any_more(
    busy_world: World, plant: Plant, point: str
):
    """It stands at each point in turn while the order is cancelled and undone; then it goes on, as if it were late."""
    product_id = await busy_world.new_product(10)
    late = Late()
    lift = plant(point, late)
    order = await busy_world.place(basket((product_id, 3), payment_method="sandbox:ok"))
    await late.stands.wait()
    lift()

    await cancel(busy_world, order)
    before = await assert_undone(busy_world, order, product_id)
    refused = busy_world.counted("mercato_saga_fenced")
    late.go_on.set()

    async def is_refused() -> bool:
        return busy_world.counted("mercato_saga_fenced") > refused

    await busy_world.until(is_refused)
    assert await assert_undone(busy_world, order, product_id) == before


@pytest.mark.parametrize("step", ["reserve", "settle"])
async def test_a_cancel_waits_for_a_step_that_is_just_being_saved(busy_world: World, plant: Plant, step: str):
    product_id = await busy_world.new_product(10)
    late = Late()
    lift = plant(f"checkout.{step}.before_commit", late)
    order = await busy_world.place(basket((product_id, 3), payment_method="sandbox:ok"))
    await late.stands.wait()
    lift()

    cancelling = asyncio.ensure_future(cancel(busy_world, order))
    await busy_world.until_waiting()
    late.go_on.set()
    cancelled = await cancelling

    after: Payment = "authorized" if step == "reserve" else "paid"
    assert (cancelled.status, cancelled.payment) == ("cancelled", after)
    await assert_undone(busy_world, order, product_id)


class Late:
    """A driver that stands still at a point, and goes on when it is told to."""

    def __init__(self) -> None:
        self.stands = asyncio.Event()
        self.go_on = asyncio.Event()

    async def __call__(self, _point: str) -> None:
        self.stands.set()
        await self.go_on.wait()


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_crash_around_the_commit_of_a_cancel_leaves_one_end(busy_world: World, plant: Plant, when: str):
    product_id = await busy_world.new_product(10)
    order = await busy_world.checked_out("sandbox:ok", (product_id, 3))

    async def fail(_point: str) -> None:
        raise RuntimeError("the power fails here")

    lift = plant(f"orders.cancel.{when}_commit", fail)
    await asyncio.gather(cancel(busy_world, order), return_exceptions=True)
    lift()
    if when == "before":
        assert (await busy_world.settled(order.id)).status == "confirmed"
        await cancel(busy_world, order)

    await assert_undone(busy_world, order, product_id)
