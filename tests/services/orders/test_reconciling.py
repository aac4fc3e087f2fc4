"""Parked sagas whose order is not at rest are found and resumed: once, and by what was done for them already."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

import pytest
import pytest_asyncio

from mercato.chassis.observability.faults import Fault
from mercato.contracts.orders import CancelOrder, RefundOrder
from mercato.services.orders import reconciliation_store, steps
from mercato.services.orders.reconciling import Reconciling
from mercato.testing.harness import Rig
from services.orders.world import MUG, STAFF, Bank, Late, World, basket, opened

Plant = Callable[[str, Fault], Callable[[], None]]


@pytest_asyncio.fixture
async def world(rig: Rig) -> AsyncGenerator[World]:
    """A shop whose own rounds come seldom: the tests look themselves."""
    async with opened(rig, orders_sweep_seconds=0.05) as made:
        yield made


def reconciling(world: World, quiet_seconds: float = 0.0) -> Reconciling:
    return Reconciling(world.database, world.rig.host.telemetry, quiet_seconds=quiet_seconds)


async def park(world: World, order_id: int, step: str, kind: str = "checkout") -> None:
    parked = "UPDATE sagas SET step = $2, wake_at = NULL, driver = NULL WHERE subject_id = $1 AND kind = $3"
    assert await (await world.connection()).execute(parked, order_id, step, kind) == "UPDATE 1"


async def until_step(world: World, order_id: int, *steps: str, kind: str = "checkout") -> None:
    """Waits until the saga of an order is at a step; without one, until it is finished."""

    async def is_there() -> bool:
        return await world.saga(order_id, kind) == list(steps)

    await world.until(is_there)


def resumed(world: World) -> float:
    labels = {"kind": "order_resumed"}
    return world.rig.host.telemetry.registry.get_sample_value("mercato_reconciliation_repaired_total", labels) or 0.0


@pytest.mark.parametrize("step", ["reserve", "awaiting"])
async def test_a_parked_pending_order_waits_for_its_payment_again(world: World, step: str):
    order = await world.checked_out(None, (MUG, 1))
    await park(world, order.id, step)

    await reconciling(world).look(None)

    await until_waiting_with_a_time(world, order.id)
    assert resumed(world) == 1
    assert (await world.pay(order.id)).payment.status == "captured"
    assert await world.bank(order.id) == Bank(1, order.total_minor, 0, 0)


async def until_waiting_with_a_time(world: World, order_id: int) -> None:
    async def is_waiting() -> bool:
        sql = "SELECT step FROM sagas WHERE subject_id = $1 AND wake_at > now() + interval '1 minute'"
        return await world.values(sql, order_id) == ["awaiting"]

    await world.until(is_waiting)


async def test_an_order_parked_before_its_capture_is_captured_once(world: World):
    order = await world.checked_out(None, (MUG, 1))
    await world.pay(order.id, actor=STAFF, capture=False)
    await until_step(world, order.id, "authorized")
    # As if it had been left there on its way: capturing at once, and not when staff say so.
    captured = "UPDATE sagas SET state = replace(state, '\"capture\":false', '\"capture\":true')"
    await (await world.connection()).execute(f"{captured} WHERE subject_id = $1", order.id)
    await park(world, order.id, "settle")

    await reconciling(world).look(None)
    await reconciling(world).look(None)

    await until_step(world, order.id)
    assert (await world.settled(order.id)).payment == "paid"
    assert await world.bank(order.id) == Bank(1, order.total_minor, 0, 0)


async def test_an_order_parked_before_its_charge_is_charged_once(world: World, plant: Plant):
    late = Late()
    lift = plant("checkout.charge.after_call", late)
    order = await world.place(basket((MUG, 1), payment_method="sandbox:ok"))
    await late.stands.wait()
    lift()
    await park(world, order.id, "reserve")

    await reconciling(world).look(None)

    await until_step(world, order.id)
    late.go_on.set()
    assert (await world.settled(order.id)).payment == "paid"
    assert await world.bank_operations(order.id) == [("charge", "succeeded")]


@pytest.mark.parametrize("step", ["unwind", "authorized"])
async def test_a_cancelled_order_that_was_parked_gives_back_money_and_stock(world: World, plant: Plant, step: str):
    order = await world.checked_out(None, (MUG, 1))
    await world.pay(order.id, actor=STAFF, capture=False)
    await until_step(world, order.id, "authorized")
    before = await world.shelf()
    stuck = plant("checkout.void.before_call", _hang)
    await cancel(world, order.id)
    await until_step(world, order.id, "unwind")
    await park(world, order.id, step)
    stuck()

    await reconciling(world).look(None)

    await until_step(world, order.id)
    assert (await world.settled(order.id)).payment == "voided"
    assert (await world.bank(order.id)).open_charges == 0
    assert await world.shelf() == (before[0] + 1, before[1])


async def test_a_parked_refund_is_refunded_once(world: World, plant: Plant):
    order = await world.checked_out("sandbox:ok", (MUG, 1))
    [payment] = await world.payments(order.id)
    late = Late()
    lift = plant("refund.refund.before_call", late)
    with world.acting(STAFF):
        refunding = asyncio.ensure_future(
            world.orders.refund(RefundOrder(payment_id=payment.id, idempotency_key="key"))
        )
    await late.stands.wait()
    lift()
    await park(world, order.id, "refund", "refund")

    await reconciling(world).look(None)

    await until_step(world, order.id, kind="refund")
    late.go_on.set()
    assert (await refunding).status == "succeeded"
    assert (await world.settled(order.id)).payment == "refunded"
    assert await world.bank_operations(order.id) == [("charge", "succeeded"), ("refund", "succeeded")]


async def test_sagas_that_rest_rightly_are_left_alone(world: World):
    paid = await world.checked_out("sandbox:ok", (MUG, 1))
    declined = await world.checked_out("sandbox:declined", (MUG, 1))
    by_hand = await world.checked_out(None, (MUG, 1))
    await world.pay(by_hand.id, actor=STAFF, capture=False)
    await until_step(world, by_hand.id, "authorized")
    waiting = await world.checked_out(None, (MUG, 1))
    versions = await world.values("SELECT version FROM sagas ORDER BY subject_id")

    assert await reconciling(world).look(None) is None

    assert await world.values("SELECT version FROM sagas ORDER BY subject_id") == versions
    assert resumed(world) == 0
    assert await world.saga(paid.id) == []
    assert [order.id for order in (declined, by_hand, waiting)] == await world.values(
        "SELECT subject_id FROM sagas ORDER BY subject_id"
    )


async def test_a_saga_that_was_saved_a_moment_ago_is_not_resumed_yet(world: World):
    order = await world.checked_out(None, (MUG, 1))
    await park(world, order.id, "awaiting")

    await reconciling(world, quiet_seconds=600.0).look(None)

    assert await world.values("SELECT wake_at FROM sagas WHERE subject_id = $1", order.id) == [None]
    assert resumed(world) == 0


async def test_two_processes_that_find_one_parked_saga_resume_it_once(world: World):
    order = await world.checked_out(None, (MUG, 1))
    await park(world, order.id, "awaiting")
    connection = await world.connection()
    async with connection.transaction():
        await connection.execute("SELECT FROM sagas WHERE subject_id = $1 FOR NO KEY UPDATE", order.id)
        both = asyncio.gather(reconciling(world).look(None), reconciling(world).look(None))
        await world.until_waiting(2)
    await both

    assert resumed(world) == 1


async def test_every_page_of_sagas_is_read(world: World, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reconciliation_store, "PAGE", 2)
    orders = [await world.checked_out(None, (MUG, 1)) for _ in range(5)]
    await park(world, orders[0].id, "awaiting")

    place, pages = await reconciling(world).look(None), 1
    while place is not None:
        place, pages = await reconciling(world).look(place), pages + 1

    assert pages == 3
    assert resumed(world) == 1


def test_a_parked_checkout_rests_rightly_only_where_staff_have_to_capture():
    rests = {
        (status, payment, step)
        for status in ("pending", "confirmed", "completed", "cancelled")
        for payment in ("unpaid", "authorized", "paid", "partially_refunded", "refunded", "failed", "voided")
        for step in ("reserve", "awaiting", "settle", "authorized", "unwind")
        if steps.resumed(step, status, payment) is None
    }

    assert rests == {(status, "authorized", "authorized") for status in ("pending", "confirmed", "completed")}
    for step in ("reserve", "settle", "unwind"):
        assert steps.resumed(step, "confirmed", "paid") == step
    assert steps.resumed("awaiting", "pending", "unpaid") == "reserve"
    assert steps.resumed("awaiting", "cancelled", "unpaid") == "unwind"
    assert steps.resumed("authorized", "cancelled", "authorized") == "unwind"


async def _hang(_point: str) -> None:
    await asyncio.sleep(3_600)


async def cancel(world: World, order_id: int) -> None:
    with world.acting(STAFF):
        await world.orders.cancel(CancelOrder(id=order_id))
