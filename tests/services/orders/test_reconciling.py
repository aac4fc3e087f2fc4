"""Orders that somebody has put to sleep are found, and carried on: once, and by what was done for them already."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

import pytest
import pytest_asyncio

from mercato.chassis.faults import Fault
from mercato.chassis.testing import Rig
from mercato.contracts.orders import CancelOrder
from mercato.services.orders import steps, store
from mercato.services.orders.reconciling import Reconciling
from services.orders.world import MUG, STAFF, Bank, World, opened

Plant = Callable[[str, Fault], Callable[[], None]]


@pytest_asyncio.fixture
async def world(rig: Rig) -> AsyncGenerator[World]:
    """A shop whose own rounds come seldom: the tests look themselves."""
    async with opened(rig, orders_sweep_seconds=0.05) as made:
        yield made


def reconciling(world: World, quiet_seconds: float = 0.0) -> Reconciling:
    return Reconciling(world.database, world.rig.host.telemetry, lease_seconds=5.0, quiet_seconds=quiet_seconds)


async def put_to_sleep(world: World, order_id: int, step: str, kind: str = "checkout") -> None:
    asleep = "UPDATE sagas SET step = $2, wake_at = NULL WHERE subject_id = $1 AND kind = $3"
    await (await world.connection()).execute(asleep, order_id, step, kind)


async def until_step(world: World, order_id: int, step: str) -> None:
    async def is_there() -> bool:
        return await world.saga(order_id) == [step]

    await world.until(is_there)


def resumed(world: World) -> float:
    labels = {"kind": "order_resumed"}
    return world.rig.host.telemetry.registry.get_sample_value("mercato_reconciliation_repaired_total", labels) or 0.0


@pytest.mark.parametrize("step", ["reserve", "awaiting", "done"])
async def test_a_pending_order_that_nobody_carries_on_waits_for_its_payment_again(world: World, step: str):
    order = await world.checked_out(None, (MUG, 1))
    await put_to_sleep(world, order.id, step)

    await reconciling(world).look(None)

    await until_step(world, order.id, "awaiting")
    assert resumed(world) == 1
    assert (await world.pay(order.id)).payment.status == "captured"
    assert await world.bank(order.id) == Bank(1, order.total_minor, 0, 0)


async def test_an_order_that_was_left_before_its_capture_is_captured_once(world: World):
    order = await world.place()
    await world.settled(order.id)
    await world.pay(order.id, actor=STAFF, capture=False)
    # As if it had been left there on its way: capturing at once, and not when staff say so.
    captured = "UPDATE sagas SET step = 'done', state = replace(state, '\"capture\":false', '\"capture\":true')"
    await (await world.connection()).execute(f"{captured} WHERE subject_id = $1", order.id)

    await reconciling(world).look(None)
    await reconciling(world).look(None)

    await until_step(world, order.id, "done")
    assert (await world.settled(order.id)).payment == "paid"
    assert await world.bank(order.id) == Bank(1, order.total_minor, 0, 0)


async def test_an_order_that_was_cancelled_and_left_gives_back_money_and_stock(world: World, plant: Plant):
    order = await world.place()
    await world.settled(order.id)
    await world.pay(order.id, actor=STAFF, capture=False)
    before = await world.shelf()
    stuck = plant("checkout.void.before_call", _hang)
    await cancel(world, order.id)
    await until_step(world, order.id, "unwind")
    await put_to_sleep(world, order.id, "done")
    stuck()

    await reconciling(world).look(None)

    await until_step(world, order.id, "done")
    assert (await world.settled(order.id)).payment == "voided"
    assert (await world.bank(order.id)).open_charges == 0
    assert await world.shelf() == (before[0] + 1, before[1])


async def test_what_rests_rightly_is_left_alone(world: World):
    paid = await world.checked_out("sandbox:ok", (MUG, 1))
    declined = await world.checked_out("sandbox:declined", (MUG, 1))
    by_hand = await world.checked_out(None, (MUG, 1))
    await world.pay(by_hand.id, actor=STAFF, capture=False)
    waiting = await world.checked_out(None, (MUG, 1))
    versions = await world.values("SELECT version FROM sagas ORDER BY subject_id")

    assert await reconciling(world).look(None) is None

    assert await world.values("SELECT version FROM sagas ORDER BY subject_id") == versions
    assert resumed(world) == 0
    assert [order.id for order in (paid, declined, by_hand, waiting)] == await world.values(
        "SELECT subject_id FROM sagas ORDER BY subject_id"
    )


async def test_what_has_just_been_touched_is_not_left_yet(world: World):
    order = await world.checked_out(None, (MUG, 1))
    await put_to_sleep(world, order.id, "done")

    await reconciling(world, quiet_seconds=600.0).look(None)

    assert await world.saga(order.id) == ["done"]
    assert resumed(world) == 0


async def test_of_two_that_find_the_same_order_one_carries_it_on(world: World):
    order = await world.checked_out(None, (MUG, 1))
    await put_to_sleep(world, order.id, "done")
    connection = await world.connection()
    async with connection.transaction():
        await connection.execute("SELECT FROM sagas WHERE subject_id = $1 FOR NO KEY UPDATE", order.id)
        both = asyncio.gather(reconciling(world).look(None), reconciling(world).look(None))
        await world.until_waiting(2)
    await both

    assert resumed(world) == 1
    noted = "SELECT count(*) FROM saga_steps WHERE subject_id = $1 AND outcome = 'resumed'"
    assert await world.values(noted, order.id) == [1]


async def test_every_page_is_looked_at(world: World, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store, "PAGE", 2)
    orders = [await world.checked_out(None, (MUG, 1)) for _ in range(5)]
    await put_to_sleep(world, orders[0].id, "done")

    place, pages = await reconciling(world).look(None), 1
    while place is not None:
        place, pages = await reconciling(world).look(place), pages + 1

    assert pages == 3
    assert resumed(world) == 1


def test_every_place_of_a_saga_is_judged():
    rests = {
        (status, payment, step)
        for status in ("pending", "confirmed", "completed", "cancelled")
        for payment in ("unpaid", "authorized", "paid", "partially_refunded", "refunded", "failed", "voided")
        for step in ("awaiting", "authorized", "done")
        if steps.resumed("checkout", step, status, payment) is None
    }

    assert not {status for status, _, _ in rests} & {"pending"}
    assert {(status, step) for status, payment, step in rests if payment == "authorized"} == {
        ("confirmed", "authorized"),
        ("completed", "authorized"),
    }
    for step in ("reserve", "settle", "unwind"):
        assert steps.resumed("checkout", step, "confirmed", "paid") == step
    assert steps.resumed("refund", "refund", "confirmed", "paid") == "refund"
    assert steps.resumed("refund", "done", "pending", "authorized") is None


async def _hang(_point: str) -> None:
    await asyncio.sleep(3_600)


async def cancel(world: World, order_id: int) -> None:
    with world.acting(STAFF):
        await world.orders.cancel(CancelOrder(id=order_id))
