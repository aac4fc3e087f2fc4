"""Who sees which payments, and what was asked of the provider for them."""

from __future__ import annotations

from typing import Any

import pytest

from mercato.chassis.contract import Forbidden
from mercato.contracts.payments import GetPayment, ListPayments, OutcomePending, PaymentNotFound, TracePayments
from mercato.testing.actors import ALICE, BOB, STAFF
from services.payments.harness import PaymentsHarness, again, capture


async def test_another_s_payment_answers_like_one_that_does_not_exist(harness: PaymentsHarness):
    payment = await harness.authorized()

    with harness.acting(ALICE):
        assert await harness.payments.get(GetPayment(id=payment.id)) == payment
    with harness.acting(BOB):
        for payment_id in (payment.id, 404):
            with pytest.raises(PaymentNotFound) as unknown:
                await harness.payments.get(GetPayment(id=payment_id))
            assert unknown.value.payment_id == payment_id
    with harness.acting(STAFF):
        assert await harness.payments.get(GetPayment(id=payment.id)) == payment


async def test_customers_list_their_own(harness: PaymentsHarness):
    mine = await harness.payments.authorize(harness.authorization(user_id=ALICE.id))
    theirs = await harness.payments.authorize(harness.authorization(user_id=BOB.id))

    async def listed(**filters: Any) -> list[int]:
        return [p.id for p in (await harness.payments.list(ListPayments(**filters))).payments]

    with harness.acting(ALICE):
        assert await listed() == [mine.id]
        assert await listed(user_id=BOB.id) == []
        assert await listed(order_id=theirs.order_id) == []
    with harness.acting(STAFF):
        assert await listed() == [theirs.id, mine.id]
        assert await listed(user_id=ALICE.id) == [mine.id]
        assert await listed(order_id=theirs.order_id) == [theirs.id]


async def test_pages_go_on_where_the_last_one_ended(harness: PaymentsHarness):
    made = [(await harness.authorized()).id for _ in range(3)]

    with harness.acting(STAFF):
        first = await harness.payments.list(ListPayments(limit=2))
        rest = await harness.payments.list(ListPayments(limit=2, before=first.next_before))

    assert [p.id for p in (*first.payments, *rest.payments)] == made[::-1]
    assert rest.next_before is None


async def test_the_trace_tells_every_operation_in_order(harness: PaymentsHarness):
    request = harness.authorization("sandbox:declined")
    await harness.payments.authorize(request)
    payment = await harness.payments.authorize(again(request, attempt=2, method="sandbox:ok"))
    await harness.payments.capture(capture(payment))

    with harness.acting(STAFF):
        steps = (await harness.payments.trace(TracePayments(order_id=payment.order_id))).steps

    assert [(s.kind, s.status, s.code) for s in steps] == [
        ("authorize", "declined", "card_declined"),
        ("authorize", "succeeded", None),
        ("capture", "succeeded", None),
    ]
    assert all(s.settled_at and s.settled_at >= s.began_at and s.calls == 1 for s in steps)


async def test_the_trace_shows_an_intent_until_its_result_is_known(harness: PaymentsHarness):
    request = harness.charge("sandbox:slow:60000")
    with pytest.raises(OutcomePending):
        await harness.payments.charge(request)

    with harness.acting(STAFF):
        [step] = (await harness.payments.trace(TracePayments(order_id=request.order_id))).steps

    assert (step.kind, step.status, step.settled_at, step.amount_minor) == ("charge", "unknown", None, 1_000)


async def test_only_staff_and_services_trace_and_only_services_charge(harness: PaymentsHarness):
    with harness.acting(ALICE), pytest.raises(Forbidden):
        await harness.payments.trace(TracePayments(order_id=1))
    for actor in (ALICE, STAFF):
        with harness.acting(actor), pytest.raises(Forbidden):
            await harness.payments.authorize(harness.authorization())
        with harness.acting(actor), pytest.raises(Forbidden):
            await harness.payments.charge(harness.charge())
