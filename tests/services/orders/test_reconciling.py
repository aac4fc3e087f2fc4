"""Parked sagas whose order is not at rest are found and resumed: once, and by what was done for them already."""

from __future__ import annotations

import asyncio

import pytest

from mercato.contracts.orders import CancelOrder, RefundOrder
from mercato.services.orders import reconciliation_store, steps
from mercato.services.orders.reconciling import Reconciling
from mercato.testing.actors import STAFF
from mercato.testing.builders import MUG
from mercato.testing.injection import Inject, Pause
from mercato.testing.waiting import until
from services.orders.harness import Bank, OrdersHarness, basket

pytestmark = pytest.mark.options(orders_sweep_seconds=0.05)
"""The reconciliation of the service itself runs seldom: the tests run it themselves."""


def reconciling(harness: OrdersHarness, quiet_seconds: float = 0.0) -> Reconciling:
    return Reconciling(harness.database, harness.host.telemetry, quiet_seconds=quiet_seconds)


async def park(harness: OrdersHarness, order_id: int, step: str, kind: str = "checkout") -> None:
    parked = "UPDATE sagas SET step = $2, wake_at = NULL, driver = NULL WHERE subject_id = $1 AND kind = $3"
    assert await (await harness.connection()).execute(parked, order_id, step, kind) == "UPDATE 1"


async def until_step(harness: OrdersHarness, order_id: int, *steps: str, kind: str = "checkout") -> None:
    """Waits until the saga of an order is at a step; without one, until it is finished."""

    async def is_there() -> bool:
        return await harness.saga(order_id, kind) == list(steps)

    await until(is_there)


def resumed(harness: OrdersHarness) -> float:
    labels = {"kind": "order_resumed"}
    return harness.host.telemetry.registry.get_sample_value("mercato_reconciliation_repaired_total", labels) or 0.0


@pytest.mark.parametrize("step", ["reserve", "awaiting"])
async def test_a_parked_pending_order_waits_for_its_payment_again(harness: OrdersHarness, step: str):
    order = await harness.checked_out(None, (MUG, 1))
    await park(harness, order.id, step)

    await reconciling(harness).resume_page(None)

    await until_waiting_with_a_time(harness, order.id)
    assert resumed(harness) == 1
    assert (await harness.pay(order.id)).payment.status == "captured"
    assert await harness.bank(order.id) == Bank(1, order.total_minor, 0, 0)


async def until_waiting_with_a_time(harness: OrdersHarness, order_id: int) -> None:
    async def is_waiting() -> bool:
        sql = "SELECT step FROM sagas WHERE subject_id = $1 AND wake_at > now() + interval '1 minute'"
        return await harness.values(sql, order_id) == ["awaiting"]

    await until(is_waiting)


async def test_an_order_parked_before_its_capture_is_captured_once(harness: OrdersHarness):
    order = await harness.checked_out(None, (MUG, 1))
    await harness.pay(order.id, actor=STAFF, capture=False)
    await until_step(harness, order.id, "authorized")
    # As if it had been left there on its way: capturing at once, and not when staff say so.
    captured = "UPDATE sagas SET state = replace(state, '\"capture\":false', '\"capture\":true')"
    await (await harness.connection()).execute(f"{captured} WHERE subject_id = $1", order.id)
    await park(harness, order.id, "settle")

    await reconciling(harness).resume_page(None)
    await reconciling(harness).resume_page(None)

    await until_step(harness, order.id)
    assert (await harness.settled(order.id)).payment == "paid"
    assert await harness.bank(order.id) == Bank(1, order.total_minor, 0, 0)


async def test_an_order_parked_before_its_charge_is_charged_once(harness: OrdersHarness, inject: Inject):
    pause = Pause()
    lift = inject("checkout.charge.after_call", pause)
    order = await harness.place(basket((MUG, 1), payment_method="sandbox:ok"))
    await pause.reached.wait()
    lift()
    await park(harness, order.id, "reserve")

    await reconciling(harness).resume_page(None)

    await until_step(harness, order.id)
    pause.resume.set()
    assert (await harness.settled(order.id)).payment == "paid"
    assert await harness.bank_operations(order.id) == [("charge", "succeeded")]


@pytest.mark.parametrize("step", ["unwind", "authorized"])
async def test_a_cancelled_order_that_was_parked_gives_back_money_and_stock(
    harness: OrdersHarness, inject: Inject, step: str
):
    order = await harness.checked_out(None, (MUG, 1))
    await harness.pay(order.id, actor=STAFF, capture=False)
    await until_step(harness, order.id, "authorized")
    before = await harness.shelf()
    stuck = inject("checkout.void.before_call", _hang)
    await cancel(harness, order.id)
    await until_step(harness, order.id, "unwind")
    await park(harness, order.id, step)
    stuck()

    await reconciling(harness).resume_page(None)

    await until_step(harness, order.id)
    assert (await harness.settled(order.id)).payment == "voided"
    assert (await harness.bank(order.id)).open_charges == 0
    assert await harness.shelf() == (before[0] + 1, before[1])


async def test_a_parked_refund_is_refunded_once(harness: OrdersHarness, inject: Inject):
    order = await harness.checked_out("sandbox:ok", (MUG, 1))
    [payment] = await harness.payments(order.id)
    pause = Pause()
    lift = inject("refund.refund.before_call", pause)
    with harness.acting(STAFF):
        refunding = asyncio.ensure_future(
            harness.orders.refund(RefundOrder(payment_id=payment.id, idempotency_key="key"))
        )
    await pause.reached.wait()
    lift()
    await park(harness, order.id, "refund", "refund")

    await reconciling(harness).resume_page(None)

    await until_step(harness, order.id, kind="refund")
    pause.resume.set()
    assert (await refunding).status == "succeeded"
    assert (await harness.settled(order.id)).payment == "refunded"
    assert await harness.bank_operations(order.id) == [("charge", "succeeded"), ("refund", "succeeded")]


async def test_sagas_that_are_parked_for_a_reason_are_not_resumed(harness: OrdersHarness):
    paid = await harness.checked_out("sandbox:ok", (MUG, 1))
    declined = await harness.checked_out("sandbox:declined", (MUG, 1))
    by_hand = await harness.checked_out(None, (MUG, 1))
    await harness.pay(by_hand.id, actor=STAFF, capture=False)
    await until_step(harness, by_hand.id, "authorized")
    waiting = await harness.checked_out(None, (MUG, 1))
    versions = await harness.values("SELECT version FROM sagas ORDER BY subject_id")

    assert await reconciling(harness).resume_page(None) is None

    assert await harness.values("SELECT version FROM sagas ORDER BY subject_id") == versions
    assert resumed(harness) == 0
    assert await harness.saga(paid.id) == []
    assert [order.id for order in (declined, by_hand, waiting)] == await harness.values(
        "SELECT subject_id FROM sagas ORDER BY subject_id"
    )


async def test_a_saga_that_was_saved_a_moment_ago_is_not_resumed_yet(harness: OrdersHarness):
    order = await harness.checked_out(None, (MUG, 1))
    await park(harness, order.id, "awaiting")

    await reconciling(harness, quiet_seconds=600.0).resume_page(None)

    assert await harness.values("SELECT wake_at FROM sagas WHERE subject_id = $1", order.id) == [None]
    assert resumed(harness) == 0


async def test_two_processes_that_find_one_parked_saga_resume_it_once(harness: OrdersHarness):
    order = await harness.checked_out(None, (MUG, 1))
    await park(harness, order.id, "awaiting")
    connection = await harness.connection()
    async with connection.transaction():
        await connection.execute("SELECT FROM sagas WHERE subject_id = $1 FOR NO KEY UPDATE", order.id)
        both = [asyncio.ensure_future(reconciling(harness).resume_page(None)) for _ in range(2)]
        await harness.until_blocked(2, by=both)
    await asyncio.gather(*both)

    assert resumed(harness) == 1


async def test_every_page_of_sagas_is_read(harness: OrdersHarness, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reconciliation_store, "PAGE", 2)
    orders = [await harness.checked_out(None, (MUG, 1)) for _ in range(5)]
    await park(harness, orders[0].id, "awaiting")

    place, pages = await reconciling(harness).resume_page(None), 1
    while place is not None:
        place, pages = await reconciling(harness).resume_page(place), pages + 1

    assert pages == 3
    assert resumed(harness) == 1


def test_a_parked_checkout_is_not_resumed_only_where_staff_have_to_capture():
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


async def cancel(harness: OrdersHarness, order_id: int) -> None:
    with harness.acting(STAFF):
        await harness.orders.cancel(CancelOrder(id=order_id))
