"""Orders that are not paid in time are cancelled; a decline does not prolong their time, a payment under way does."""

from __future__ import annotations

from typing import Final

import pytest

from mercato.chassis.contract import ServiceError
from mercato.contracts.order_refusals import OrderCancelled, PaymentDeclined
from mercato.contracts.orders import CancelReason, Order, PaidOrder
from mercato.testing.builders import MUG
from mercato.testing.injection import Inject, Pause
from mercato.testing.waiting import until
from services.orders.harness import Bank, OrdersHarness, basket

NO_MONEY: Final = Bank(captures=0, captured_minor=0, refunded_minor=0, open_charges=0)
WINDOW_SECONDS: Final = 1.0


async def finished(harness: OrdersHarness, order_id: int) -> Order:
    """The order, once its checkout has ended."""

    async def is_over() -> bool:
        return await harness.saga(order_id) == []

    await until(is_over)
    return await harness.settled(order_id)


async def try_to_pay(harness: OrdersHarness, order_id: int, method: str) -> PaidOrder | ServiceError:
    try:
        return await harness.pay(order_id, method)
    except ServiceError as error:
        return error


async def end_of_hold(harness: OrdersHarness, order_id: int) -> float:
    """How many seconds after its placing the checkout of an order wakes up."""
    sql = """
        SELECT extract(epoch FROM s.wake_at - o.created_at)::float8
          FROM sagas s JOIN orders o ON o.id = s.subject_id
         WHERE o.id = $1
    """
    return (await harness.values(sql, order_id))[0]


async def window_is_over(harness: OrdersHarness, order_id: int) -> bool:
    sql = "SELECT created_at + make_interval(secs => $2) < now() FROM orders WHERE id = $1"
    return (await harness.values(sql, order_id, WINDOW_SECONDS))[0]


# -------------------------------------------------------------------------------------------------- without a payment


@pytest.mark.options(inventory_hold_seconds=0.5, orders_sweep_seconds=0.05)
async def test_an_order_that_is_not_paid_expires_and_frees_its_stock(harness: OrdersHarness):
    order = await harness.place(basket((MUG, 1)))

    expired = await finished(harness, order.id)

    assert (expired.status, expired.payment) == ("cancelled", "unpaid")
    assert expired.reason == CancelReason(code="expired")
    assert (await harness.shelf())[1] == 0
    with pytest.raises(OrderCancelled) as refused:
        await harness.pay(order.id)
    assert refused.value.reason == "expired"


@pytest.mark.options(inventory_hold_seconds=1.0, inventory_expire_every_seconds=0.1)
async def test_a_payment_that_begins_before_the_end_of_the_hold_keeps_the_stock(harness: OrdersHarness):
    """From when its payment begins, a hold does not expire."""
    order = await harness.checked_out(None, (MUG, 1))

    paid = await try_to_pay(harness, order.id, "sandbox:slow:1200")

    now = await harness.settled(order.id)
    if isinstance(paid, PaidOrder):
        assert (now.status, now.payment) == ("confirmed", "paid")
    else:  # a machine that is busy with other things was not in time
        assert isinstance(paid, OrderCancelled)
    assert (await harness.bank(order.id)).captures == (now.payment == "paid")
    assert await harness.reservation(order.id) in (("committed",) if now.payment == "paid" else ("expired", "released"))


# ---------------------------------------------------------------------------------------------------------- declined


@pytest.mark.parametrize("method", [None, "sandbox:declined"])
@pytest.mark.options(orders_payment_seconds=600)
async def test_declines_do_not_prolong_the_hold(harness: OrdersHarness, method: str | None):
    order = await harness.checked_out(method, (MUG, 1))
    for _ in range(2):
        with pytest.raises(PaymentDeclined):
            await harness.pay(order.id, "sandbox:insufficient_funds")
        await harness.settled(order.id)

        assert await end_of_hold(harness, order.id) == 600
    assert (await harness.shelf())[1] == 1


@pytest.mark.parametrize("is_placed_with_method", [True, False])
@pytest.mark.options(orders_payment_seconds=WINDOW_SECONDS, orders_sweep_seconds=0.05)
async def test_a_declined_order_expires_at_the_end_of_its_hold(harness: OrdersHarness, is_placed_with_method: bool):
    order = await harness.place(basket((MUG, 1), payment_method="sandbox:declined" if is_placed_with_method else None))
    if not is_placed_with_method:
        outcome = await try_to_pay(harness, order.id, "sandbox:declined")
        assert isinstance(outcome, PaymentDeclined | OrderCancelled)

    expired = await finished(harness, order.id)

    assert await window_is_over(harness, order.id)
    assert (expired.status, expired.payment, expired.reason) == (
        "cancelled",
        "unpaid",
        CancelReason(code="expired"),
    )
    assert (await harness.shelf())[1] == 0
    assert await harness.bank(order.id) == NO_MONEY


@pytest.mark.parametrize("method", ["sandbox:ok", "sandbox:declined"])
@pytest.mark.options(orders_payment_seconds=WINDOW_SECONDS, orders_sweep_seconds=0.05)
async def test_a_payment_under_way_at_the_end_of_the_hold_finishes_before_the_hold_ends(
    harness: OrdersHarness, inject: Inject, method: str
):
    pause = Pause()
    lift = inject("checkout.charge.after_call", pause)
    order = await harness.place(basket((MUG, 1), payment_method=method))
    await pause.reached.wait()
    lift()

    async def is_over() -> bool:
        return await window_is_over(harness, order.id)

    await until(is_over)
    under_way = (await harness.raw(order.id)).order
    reservation = await harness.reservation(order.id)
    pause.resume.set()
    ended = await finished(harness, order.id)

    assert (under_way.status, reservation) == ("pending", "held")
    if method == "sandbox:ok":
        assert (ended.status, ended.payment) == ("confirmed", "paid")
        assert await harness.reservation(order.id) == "committed"
    else:
        assert (ended.status, ended.payment) == ("cancelled", "unpaid")
        assert ended.reason == CancelReason(code="expired")
        assert await harness.reservation(order.id) == "released"
    assert (await harness.shelf())[1] == 0
