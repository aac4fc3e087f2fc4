"""The events of money that was given back: how much, of which order, and who asked for it."""

from __future__ import annotations

import itertools
import json
from typing import Any, Final

import pytest

from mercato.chassis.contract import Actor
from mercato.contracts.orders import CancelOrder, Order, RefundOrder, ReturnOrder
from mercato.contracts.payments import Payment
from mercato.testing.actors import ALICE, STAFF
from mercato.testing.injection import FailAt, Inject
from mercato.testing.tables import EVENTS
from services.orders.harness import MUG_MINOR, OrdersHarness

pytestmark = pytest.mark.asyncio(loop_scope="session")

TOTAL: Final = 3 * MUG_MINOR

_keys = itertools.count(1)


async def emitted(harness: OrdersHarness, order_id: int) -> list[dict[str, Any]]:
    """The events of the refunds of an order, in order."""
    sql = f"SELECT data::text FROM {EVENTS} WHERE type = 'refund.succeeded' AND subject_id = $1 ORDER BY id"
    return [json.loads(data) for data in await harness.values(sql, order_id)]


async def paid(harness: OrdersHarness) -> tuple[Order, Payment]:
    """A paid order of three pieces, and its payment."""
    order = await harness.checked_out("sandbox:ok", (await harness.new_product(10), 3))
    return order, (await harness.payments(order.id))[0]


async def refund(harness: OrdersHarness, payment: Payment, amount_minor: int, key: str = "") -> str:
    """Gives the id of the refund."""
    asked = RefundOrder(payment_id=payment.id, amount_minor=amount_minor, idempotency_key=key or f"e{next(_keys)}")
    with harness.acting(STAFF):
        return (await harness.orders.refund(asked)).id


async def cancel(harness: OrdersHarness, order: Order, actor: Actor) -> Order:
    with harness.acting(actor):
        await harness.orders.cancel(CancelOrder(id=order.id))
    return await harness.settled(order.id)


async def test_each_refund_is_emitted_once_with_who_asked_for_it(shared_harness: OrdersHarness):
    order, payment = await paid(shared_harness)
    first = await refund(shared_harness, payment, 1_000, "once")
    assert await refund(shared_harness, payment, 1_000, "once") == first
    second = await refund(shared_harness, payment, 500)

    version = (await shared_harness.settled(order.id)).version
    about = {"order_id": order.id, "user_id": ALICE.id, "currency": "USD", "actor_role": "staff", "actor_id": STAFF.id}
    assert await emitted(shared_harness, order.id) == [
        {**about, "refund_id": first, "amount_minor": 1_000, "refunded_minor": 1_000, "version": version - 1},
        {**about, "refund_id": second, "amount_minor": 500, "refunded_minor": 1_500, "version": version},
    ]


async def test_a_return_is_emitted_as_the_refund_that_it_makes(shared_harness: OrdersHarness):
    order = await shared_harness.delivered("sandbox:ok", (await shared_harness.new_product(10), 3))
    with shared_harness.acting(STAFF):
        back = await shared_harness.orders.take_back(ReturnOrder(id=order.id, idempotency_key=f"e{next(_keys)}"))

    [event] = await emitted(shared_harness, order.id)
    assert (event["refund_id"], event["amount_minor"], event["actor_id"]) == (back.id, TOTAL, STAFF.id)


@pytest.mark.parametrize("actor", [ALICE, STAFF], ids=["customer", "staff"])
async def test_a_refund_by_a_cancellation_is_emitted_with_who_cancelled(shared_harness: OrdersHarness, actor: Actor):
    order, payment = await paid(shared_harness)
    await refund(shared_harness, payment, 1_000)

    now = await cancel(shared_harness, order, actor)

    assert now.payment == "refunded"
    [_, event] = await emitted(shared_harness, order.id)
    assert (event["refund_id"], event["amount_minor"], event["refunded_minor"]) == ("cancel", TOTAL - 1_000, TOTAL)
    assert (event["actor_role"], event["actor_id"], event["version"]) == (actor.role, actor.id, now.version)


async def test_an_order_that_was_not_paid_is_cancelled_without_a_refund(shared_harness: OrdersHarness):
    order = await shared_harness.checked_out(None, (await shared_harness.new_product(10), 3))
    await cancel(shared_harness, order, ALICE)
    assert await emitted(shared_harness, order.id) == []


@pytest.mark.parametrize("point", ["refund.save.before_commit", "refund.save.after_commit"])
async def test_a_refund_that_is_saved_again_after_a_crash_is_emitted_once(
    shared_harness: OrdersHarness, inject: Inject, point: str
):
    order, payment = await paid(shared_harness)
    crash = FailAt(1)
    inject(point, crash)

    await refund(shared_harness, payment, 1_000)

    assert (await shared_harness.settled(order.id)).refunded_minor == 1_000
    assert crash.arrived >= 1
    assert [event["amount_minor"] for event in await emitted(shared_harness, order.id)] == [1_000]
