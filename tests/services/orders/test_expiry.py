"""Orders that wait for a payment do not wait for ever; a payment that has begun is not overtaken by the clock."""

from __future__ import annotations

import pytest

from mercato.chassis.contract import ServiceError
from mercato.chassis.testing import Rig
from mercato.contracts.orders import CancelReason, OrderCancelled, PaidOrder, PaymentDeclined
from services.orders.world import MUG, Bank, World, opened

NO_MONEY = Bank(captures=0, captured_minor=0, refunded_minor=0, open_charges=0)


async def finished(world: World, order_id: int) -> None:
    async def is_over() -> bool:
        return await world.saga(order_id) == ["done"]

    await world.until(is_over)


async def test_an_order_that_nobody_pays_expires_and_frees_its_stock(rig: Rig):
    async with opened(rig, inventory_hold_seconds=0.5, orders_sweep_seconds=0.05) as world:
        order = await world.checked_out(None, (MUG, 1))
        assert (await world.raw(order.id)).status == "pending"

        await finished(world, order.id)
        expired = await world.settled(order.id)
        assert (expired.status, expired.payment) == ("cancelled", "unpaid")
        assert expired.reason == CancelReason(code="expired")
        assert (await world.shelf())[1] == 0
        with pytest.raises(OrderCancelled) as refused:
            await world.pay(order.id)
        assert refused.value.reason == "expired"


async def test_who_pays_at_the_last_moment_keeps_the_stock(rig: Rig):
    """From when its payment begins, a hold does not expire."""
    async with opened(rig, inventory_hold_seconds=1.0, inventory_expire_every_seconds=0.1) as world:
        order = await world.checked_out(None, (MUG, 1))

        paid = await try_to_pay(world, order.id)

        now = await world.settled(order.id)
        if isinstance(paid, PaidOrder):
            assert (now.status, now.payment) == ("confirmed", "paid")
        else:  # a machine that is busy with other things was not in time
            assert isinstance(paid, OrderCancelled)
        assert (await world.bank(order.id)).captures == (now.payment == "paid")
        assert await world.reservation(order.id) == ("committed" if now.payment == "paid" else "expired")


async def test_after_a_declined_payment_an_order_waits_for_its_window_and_expires(rig: Rig):
    async with opened(rig, orders_payment_seconds=1.0, orders_sweep_seconds=0.05) as world:
        order = await world.checked_out(None, (MUG, 1))
        with pytest.raises(PaymentDeclined):
            await world.pay(order.id, "sandbox:declined")

        await finished(world, order.id)
        assert (await world.settled(order.id)).reason == CancelReason(code="expired")
        assert (await world.shelf())[1] == 0
        assert await world.bank(order.id) == NO_MONEY


async def try_to_pay(world: World, order_id: int) -> PaidOrder | ServiceError:
    try:
        return await world.pay(order_id, "sandbox:slow:1200")
    except ServiceError as error:
        return error
