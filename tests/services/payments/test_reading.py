"""Who sees which payments, and what was asked of the provider for them."""

from __future__ import annotations

import pytest

from mercato.chassis.contract import Forbidden
from mercato.contracts.payments import GetPayment, ListPayments, OutcomePending, PaymentNotFound, TracePayments
from mercato.testing.harness import Rig
from services.payments.world import ALICE, BOB, STAFF, World, again, capture


async def test_another_s_payment_answers_like_one_that_does_not_exist(world: World, rig: Rig):
    payment = await world.authorized()

    with rig.acting(ALICE):
        assert await world.payments.get(GetPayment(id=payment.id)) == payment
    with rig.acting(BOB):
        for payment_id in (payment.id, 404):
            with pytest.raises(PaymentNotFound) as unknown:
                await world.payments.get(GetPayment(id=payment_id))
            assert unknown.value.payment_id == payment_id
    with rig.acting(STAFF):
        assert await world.payments.get(GetPayment(id=payment.id)) == payment


async def test_customers_list_their_own(world: World, rig: Rig):
    mine = await world.payments.authorize(world.authorization(user_id=ALICE.id))
    theirs = await world.payments.authorize(world.authorization(user_id=BOB.id))

    async def listed(**filters: int) -> list[int]:
        return [p.id for p in (await world.payments.list(ListPayments(**filters))).payments]

    with rig.acting(ALICE):
        assert await listed() == [mine.id]
        assert await listed(user_id=BOB.id) == []
        assert await listed(order_id=theirs.order_id) == []
    with rig.acting(STAFF):
        assert await listed() == [theirs.id, mine.id]
        assert await listed(user_id=ALICE.id) == [mine.id]
        assert await listed(order_id=theirs.order_id) == [theirs.id]


async def test_pages_go_on_where_the_last_one_ended(world: World, rig: Rig):
    made = [(await world.authorized()).id for _ in range(3)]

    with rig.acting(STAFF):
        first = await world.payments.list(ListPayments(limit=2))
        rest = await world.payments.list(ListPayments(limit=2, before=first.next_before))

    assert [p.id for p in (*first.payments, *rest.payments)] == made[::-1]
    assert rest.next_before is None


async def test_the_trace_tells_every_operation_in_order(world: World, rig: Rig):
    request = world.authorization("sandbox:declined")
    await world.payments.authorize(request)
    payment = await world.payments.authorize(again(request, attempt=2, method="sandbox:ok"))
    await world.payments.capture(capture(payment))

    with rig.acting(STAFF):
        steps = (await world.payments.trace(TracePayments(order_id=payment.order_id))).steps

    assert [(s.kind, s.status, s.code) for s in steps] == [
        ("authorize", "declined", "card_declined"),
        ("authorize", "succeeded", None),
        ("capture", "succeeded", None),
    ]
    assert all(s.settled_at and s.settled_at >= s.began_at and s.calls == 1 for s in steps)


async def test_the_trace_shows_an_intent_until_its_result_is_known(world: World, rig: Rig):
    request = world.charge("sandbox:slow:60000")
    with pytest.raises(OutcomePending):
        await world.payments.charge(request)

    with rig.acting(STAFF):
        [step] = (await world.payments.trace(TracePayments(order_id=request.order_id))).steps

    assert (step.kind, step.status, step.settled_at, step.amount_minor) == ("charge", "unknown", None, 1_000)


async def test_only_staff_and_services_trace_and_only_services_charge(world: World, rig: Rig):
    with rig.acting(ALICE), pytest.raises(Forbidden):
        await world.payments.trace(TracePayments(order_id=1))
    for actor in (ALICE, STAFF):
        with rig.acting(actor), pytest.raises(Forbidden):
            await world.payments.authorize(world.authorization())
        with rig.acting(actor), pytest.raises(Forbidden):
            await world.payments.charge(world.charge())
