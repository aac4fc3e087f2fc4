"""Cancelling, in every phase of a checkout: at rest no money is kept, and nothing is held or sold."""

from __future__ import annotations

import asyncio
from typing import Final

import pytest

from mercato.contracts.order_refusals import OrderCancelled
from mercato.contracts.orders import CancelOrder, CancelReason, MoveOrder, MovePayment, Order, PaidOrder, RefundOrder
from mercato.testing.actors import ALICE, STAFF
from mercato.testing.injection import FailAt, Inject, Pause, fail
from mercato.testing.waiting import until
from services.orders.harness import MUG_MINOR, OrdersHarness, basket

pytestmark = pytest.mark.asyncio(loop_scope="session")


REASON: Final = CancelReason(code="requested", message="changed my mind")
BOTH: Final = ("before", "after")


async def cancel(harness: OrdersHarness, order: Order) -> Order:
    with harness.acting(ALICE):
        return await harness.orders.cancel(CancelOrder(id=order.id, reason=REASON.message))


async def assert_undone(harness: OrdersHarness, order: Order, product_id: int) -> Order:
    """That at rest nothing is left of an order of three pieces, of ten."""
    at_rest = await harness.settled(order.id)
    assert (at_rest.status, at_rest.reason) == ("cancelled", REASON)
    bank = await harness.bank(order.id)
    assert (bank.net_minor, bank.open_charges) == (0, 0)
    assert bank.captures <= 1
    # What was charged and refunded before the order was saved as paid stands in payments alone.
    assert at_rest.refunded_minor == (bank.refunded_minor if at_rest.payment == "refunded" else 0)
    assert {payment.status for payment in await harness.payments(order.id)} <= {
        "failed",
        "voided",
        "refunded",
        "captured",
    }
    assert sum(p.captured_minor - p.refunded_minor for p in await harness.payments(order.id)) == 0
    assert await harness.shelf(product_id) == (10, 0)
    assert await harness.saga(order.id) == []
    return at_rest


# ------------------------------------------------------------------------------------------------------------- at rest


async def test_a_cancelled_order_that_waits_frees_its_stock(shared_harness: OrdersHarness):
    product_id = await shared_harness.new_product(10)
    order = await shared_harness.checked_out(None, (product_id, 3))

    await cancel(shared_harness, order)

    assert (await assert_undone(shared_harness, order, product_id)).payment == "unpaid"
    assert await shared_harness.reservation(order.id) == "released"


async def test_a_cancelled_paid_order_is_refunded_and_its_goods_are_restocked(shared_harness: OrdersHarness):
    product_id = await shared_harness.new_product(10)
    order = await shared_harness.checked_out("sandbox:ok", (product_id, 3))

    await cancel(shared_harness, order)

    at_rest = await assert_undone(shared_harness, order, product_id)
    assert (at_rest.payment, at_rest.refunded_minor) == ("refunded", 3 * MUG_MINOR)
    assert (await shared_harness.history(order.id))[-2:] == [
        ("status", "confirmed", "cancelled"),
        ("payment", "paid", "refunded"),
    ]


async def test_a_cancelled_order_that_was_refunded_in_part_is_refunded_the_rest(shared_harness: OrdersHarness):
    product_id = await shared_harness.new_product(10)
    order = await shared_harness.checked_out("sandbox:ok", (product_id, 3))
    [payment] = await shared_harness.payments(order.id)
    with shared_harness.acting(STAFF):
        await shared_harness.orders.refund(
            RefundOrder(payment_id=payment.id, amount_minor=100, idempotency_key=f"part-{order.id}")
        )

    await cancel(shared_harness, order)

    at_rest = await assert_undone(shared_harness, order, product_id)
    assert (at_rest.payment, at_rest.refunded_minor) == ("refunded", 3 * MUG_MINOR)


@pytest.mark.parametrize("method", [None, "sandbox:ok"])
async def test_a_cancelled_order_with_a_total_of_0_is_refunded_without_the_provider(
    shared_harness: OrdersHarness, method: str | None
):
    product_id = await shared_harness.new_product(10, price_minor=0)
    order = await shared_harness.checked_out(method, (product_id, 3))

    await cancel(shared_harness, order)

    assert (await assert_undone(shared_harness, order, product_id)).payment == "refunded"
    assert await shared_harness.bank_operations(order.id) == []


async def test_an_order_that_is_cancelled_after_a_decline_frees_its_stock(shared_harness: OrdersHarness):
    product_id = await shared_harness.new_product(10)
    order = await shared_harness.checked_out("sandbox:declined", (product_id, 3))

    await cancel(shared_harness, order)

    assert (await assert_undone(shared_harness, order, product_id)).payment == "unpaid"
    assert await shared_harness.reservation(order.id) == "released"


async def test_a_cancelled_order_on_account_is_restocked_without_money(shared_harness: OrdersHarness):
    product_id = await shared_harness.new_product(10)
    order = await shared_harness.checked_out(None, (product_id, 3))
    with shared_harness.acting(STAFF):
        await shared_harness.orders.move(MoveOrder(id=order.id, status="confirmed"))

    await cancel(shared_harness, order)

    assert (await assert_undone(shared_harness, order, product_id)).payment == "unpaid"


async def test_a_cancelled_authorized_order_is_voided(shared_harness: OrdersHarness):
    product_id = await shared_harness.new_product(10)
    order = await shared_harness.checked_out(None, (product_id, 3))
    await shared_harness.pay(order.id, actor=STAFF, capture=False)

    await cancel(shared_harness, order)

    assert (await assert_undone(shared_harness, order, product_id)).payment == "voided"


# ----------------------------------------------------------------------------------------------------------- under way


@pytest.mark.parametrize("after_ms", [0, 150, 450])
async def test_a_cancel_while_a_slow_charge_is_under_way_refunds_what_it_took(
    shared_harness: OrdersHarness, after_ms: int
):
    """Before the bank has answered or after it: about, and whichever it is in the end."""
    product_id = await shared_harness.new_product(10)
    order = await shared_harness.place(basket((product_id, 3), payment_method="sandbox:slow:300"))
    await asyncio.sleep(after_ms / 1_000)

    await cancel(shared_harness, order)

    await assert_undone(shared_harness, order, product_id)


async def test_a_cancel_while_the_bank_processes_a_charge_waits_for_it_and_refunds_it(shared_harness: OrdersHarness):
    product_id = await shared_harness.new_product(10)
    order = await shared_harness.place(basket((product_id, 3), payment_method="sandbox:slow:1000"))

    async def is_processing() -> bool:
        return await shared_harness.bank_operations(order.id) == [("charge", "processing")]

    await until(is_processing)
    await cancel(shared_harness, order)

    await assert_undone(shared_harness, order, product_id)
    assert await shared_harness.bank_operations(order.id) == [("charge", "succeeded"), ("refund", "succeeded")]
    assert [payment.status for payment in await shared_harness.payments(order.id)] == ["refunded"]


async def test_a_cancel_after_a_charge_whose_answer_was_lost_refunds_it(shared_harness: OrdersHarness, inject: Inject):
    product_id = await shared_harness.new_product(10)
    pause = Pause()
    lift = inject("checkout.charge.after_call", pause)
    order = await shared_harness.place(basket((product_id, 3), payment_method="sandbox:lost_answer"))
    await pause.reached.wait()
    lift()
    charged = await shared_harness.bank(order.id)

    await cancel(shared_harness, order)
    await assert_undone(shared_harness, order, product_id)
    pause.resume.set()

    assert (charged.captures, charged.net_minor) == (1, 3 * MUG_MINOR)
    assert await shared_harness.bank_operations(order.id) == [("charge", "succeeded"), ("refund", "succeeded")]
    await assert_undone(shared_harness, order, product_id)


@pytest.mark.parametrize(
    "point", [f"checkout.{call}.{when}_call" for call in ("reserve", "charge", "commit") for when in BOTH]
)
async def test_a_fenced_driver_that_goes_on_after_the_cancel_changes_nothing(
    shared_harness: OrdersHarness, inject: Inject, point: str
):
    """It stands at each point in turn while the order is cancelled and undone; then it goes on."""
    product_id = await shared_harness.new_product(10)
    pause = Pause()
    lift = inject(point, pause)
    order = await shared_harness.place(basket((product_id, 3), payment_method="sandbox:ok"))
    await pause.reached.wait()
    lift()

    await assert_fenced_after_cancel(shared_harness, order, product_id, pause)


@pytest.mark.parametrize(
    "point", [f"checkout.{call}.{when}_call" for call in ("authorize", "capture") for when in BOTH]
)
async def test_a_fenced_driver_of_a_manual_capture_that_goes_on_after_the_cancel_changes_nothing(
    shared_harness: OrdersHarness, inject: Inject, point: str
):
    product_id = await shared_harness.new_product(10)
    order = await shared_harness.checked_out(None, (product_id, 3))
    pause = Pause()
    lift = inject(point, pause)
    capturing = asyncio.ensure_future(capture_by_hand(shared_harness, order))
    await pause.reached.wait()
    lift()

    await assert_fenced_after_cancel(shared_harness, order, product_id, pause)
    await asyncio.gather(capturing, return_exceptions=True)


async def capture_by_hand(harness: OrdersHarness, order: Order) -> None:
    payment = (await harness.pay(order.id, actor=STAFF, capture=False)).payment
    with harness.acting(STAFF):
        await harness.orders.capture(MovePayment(payment_id=payment.id))


async def assert_fenced_after_cancel(harness: OrdersHarness, order: Order, product_id: int, pause: Pause) -> None:
    await cancel(harness, order)
    before = await assert_undone(harness, order, product_id)
    fenced = harness.counted("mercato_saga_fenced")
    pause.resume.set()

    async def is_fenced() -> bool:
        return harness.counted("mercato_saga_fenced") > fenced

    await until(is_fenced)
    assert await assert_undone(harness, order, product_id) == before


async def test_a_cancel_waits_for_a_checkout_that_is_being_saved_and_refunds_it(
    shared_harness: OrdersHarness, inject: Inject
):
    product_id = await shared_harness.new_product(10)
    pause = Pause()
    lift = inject("checkout.reserve.before_commit", pause)
    order = await shared_harness.place(basket((product_id, 3), payment_method="sandbox:ok"))
    await pause.reached.wait()
    lift()

    cancelling = asyncio.ensure_future(cancel(shared_harness, order))
    await shared_harness.until_blocked(by=[cancelling])
    pause.resume.set()
    cancelled = await cancelling

    assert (cancelled.status, cancelled.payment) == ("cancelled", "paid")
    assert (await assert_undone(shared_harness, order, product_id)).payment == "refunded"


async def test_a_cancel_waits_for_a_capture_that_is_being_saved_and_refunds_it(
    shared_harness: OrdersHarness, inject: Inject
):
    product_id = await shared_harness.new_product(10)
    order = await shared_harness.checked_out(None, (product_id, 3))
    payment = (await shared_harness.pay(order.id, actor=STAFF, capture=False)).payment
    await shared_harness.settled(order.id)
    pause = Pause()
    lift = inject("checkout.settle.before_commit", pause)
    with shared_harness.acting(STAFF):
        capturing = asyncio.ensure_future(shared_harness.orders.capture(MovePayment(payment_id=payment.id)))
    await pause.reached.wait()
    lift()

    cancelling = asyncio.ensure_future(cancel(shared_harness, order))
    await shared_harness.until_blocked(by=[cancelling])
    pause.resume.set()
    cancelled = await cancelling

    assert (cancelled.status, cancelled.payment) == ("cancelled", "paid")
    assert (await assert_undone(shared_harness, order, product_id)).payment == "refunded"
    await asyncio.gather(capturing, return_exceptions=True)


# --------------------------------------------------------------------------------------------------------- lock order


@pytest.mark.parametrize("first", ["pay", "cancel"])
async def test_pay_and_cancel_at_once_of_an_order_without_a_saga_leave_one_end(
    shared_harness: OrdersHarness, first: str
):
    """Both find no saga and wait for the order; the second looks again, and finds the saga of the first."""
    product_id = await shared_harness.new_product(10)
    order = await shared_harness.checked_out(None, (product_id, 3))
    with shared_harness.acting(STAFF):
        await shared_harness.orders.move(MoveOrder(id=order.id, status="confirmed"))
    assert await shared_harness.saga(order.id) == []
    asked = {"pay": lambda: shared_harness.pay(order.id), "cancel": lambda: cancel(shared_harness, order)}
    connection = await shared_harness.connection()

    async with connection.transaction():
        await connection.execute("SELECT FROM orders WHERE id = $1 FOR UPDATE", order.id)
        tasks = {first: asyncio.ensure_future(asked.pop(first)())}
        await shared_harness.until_blocked(by=tasks.values())
        [(second, ask)] = asked.items()
        tasks[second] = asyncio.ensure_future(ask())
        await shared_harness.until_blocked(2, by=tasks.values())
    outcomes = dict(zip(tasks, await asyncio.gather(*tasks.values(), return_exceptions=True), strict=True))

    assert isinstance(outcomes["cancel"], Order)
    assert isinstance(outcomes["pay"], PaidOrder | OrderCancelled)
    await assert_undone(shared_harness, order, product_id)


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_crash_around_the_commit_of_a_cancel_leaves_one_end(
    shared_harness: OrdersHarness, inject: Inject, when: str
):
    product_id = await shared_harness.new_product(10)
    order = await shared_harness.checked_out("sandbox:ok", (product_id, 3))

    lift = inject(f"orders.cancel.{when}_commit", fail)
    await asyncio.gather(cancel(shared_harness, order), return_exceptions=True)
    lift()
    if when == "before":
        assert (await shared_harness.settled(order.id)).status == "confirmed"
        await cancel(shared_harness, order)

    await assert_undone(shared_harness, order, product_id)


@pytest.mark.parametrize(
    "point",
    [
        *(f"checkout.{call}.{when}_call" for call in ("refund", "release", "restock") for when in BOTH),
        *(f"checkout.unwind.{when}_commit" for when in BOTH),
    ],
)
async def test_an_unwind_that_fails_at_any_point_is_repeated_and_refunds_once(
    shared_harness: OrdersHarness, inject: Inject, point: str
):
    product_id = await shared_harness.new_product(10)
    order = await shared_harness.checked_out("sandbox:ok", (product_id, 3))
    failing = FailAt(1, 2)
    inject(point, failing)
    await cancel(shared_harness, order)

    assert (await assert_undone(shared_harness, order, product_id)).payment == "refunded"
    assert failing.arrived, "the point is not on this way"
    assert await shared_harness.bank_operations(order.id) == [("charge", "succeeded"), ("refund", "succeeded")]
