"""Paying what was ordered without a payment: once, whatever comes twice, at once or too pause."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from mercato.chassis.contract import Forbidden, IdempotencyKeyReused, InvalidRequest, RequestInProgress, ServiceError
from mercato.contracts.order_refusals import (
    AmountNotDue,
    IllegalMove,
    NothingToRefund,
    NotPayable,
    OrderCancelled,
    OrderNotFound,
    PaymentDeclined,
    PaymentInProgress,
)
from mercato.contracts.orders import (
    AwaitOrder,
    CancelOrder,
    CancelReason,
    CapturePart,
    GetTimeline,
    MoveOrder,
    MovePayment,
    Order,
    PaidOrder,
    PayOrder,
    Refund,
    RefundOrder,
    ReturnLine,
    ReturnOrder,
)
from mercato.contracts.payments import CaptureAmountChanged, CaptureTooLarge, Payment
from mercato.services.orders import rules, steps
from mercato.testing.actors import ALICE, BOB, STAFF
from mercato.testing.builders import MUG
from mercato.testing.injection import FailAt, Inject, fail
from mercato.testing.waiting import until
from services.orders.harness import MUG_MINOR, Bank, OrdersHarness

pytestmark = pytest.mark.asyncio(loop_scope="session")


ONE_CAPTURE = Bank(captures=1, captured_minor=MUG_MINOR, refunded_minor=0, open_charges=0)
NO_MONEY = Bank(captures=0, captured_minor=0, refunded_minor=0, open_charges=0)


async def awaiting(harness: OrdersHarness) -> tuple[Order, int]:
    """An order that waits for its payment, and its product, of which there are ten."""
    product_id = await harness.new_product(10)
    return await harness.checked_out(None, (product_id, 1)), product_id


async def outcome_of(paying: Any) -> PaidOrder | ServiceError:
    try:
        return await paying
    except ServiceError as error:
        return error


async def move(harness: OrdersHarness, order_id: int, **fields: Any) -> Order:
    with harness.acting(STAFF):
        return await harness.orders.move(MoveOrder(id=order_id, **fields))


async def capture(harness: OrdersHarness, payment: Payment) -> Payment:
    with harness.acting(STAFF):
        return (await harness.orders.capture(MovePayment(payment_id=payment.id))).payment


async def void(harness: OrdersHarness, payment: Payment) -> Payment:
    with harness.acting(STAFF):
        return (await harness.orders.void(MovePayment(payment_id=payment.id))).payment


# -------------------------------------------------------------------------------------------------------------- paying


@pytest.mark.parametrize("actor", [ALICE, STAFF])
async def test_an_order_that_waits_is_paid_and_the_answer_is_the_payment(shared_harness: OrdersHarness, actor: Any):
    order, product_id = await awaiting(shared_harness)

    paid = await shared_harness.pay(order.id, actor=actor, expected_total_minor=MUG_MINOR, expected_currency="USD")

    payment = paid.payment
    assert (payment.order_id, payment.attempt, payment.status) == (order.id, 1, "captured")
    assert (payment.captured_minor, payment.user_id) == (MUG_MINOR, ALICE.id)
    now = await shared_harness.settled(order.id)
    assert (now.status, now.payment) == ("confirmed", "paid")
    assert await shared_harness.bank(order.id) == ONE_CAPTURE
    assert await shared_harness.shelf(product_id) == (9, 0)


@pytest.mark.parametrize(
    "shown", [{"expected_total_minor": MUG_MINOR - 1}, {"expected_total_minor": 0}, {"expected_currency": "EUR"}]
)
async def test_another_amount_than_is_due_is_refused_and_nothing_is_charged(
    shared_harness: OrdersHarness, shown: dict[str, Any]
):
    order, _ = await awaiting(shared_harness)

    with pytest.raises(AmountNotDue) as refused:
        await shared_harness.pay(order.id, **shown)

    assert (refused.value.due_minor, refused.value.due_currency) == (MUG_MINOR, "USD")
    assert await shared_harness.saga(order.id) == ["awaiting"]
    assert await shared_harness.payments(order.id) == ()


async def test_six_concurrent_payments_charge_once(shared_harness: OrdersHarness):
    order, _ = await awaiting(shared_harness)
    elsewhere = await shared_harness.another_process()

    with shared_harness.acting(ALICE):
        outcomes = await asyncio.gather(
            *(outcome_of((shared_harness.orders, elsewhere)[n % 2].pay(PayOrder(id=order.id))) for n in range(6))
        )

    assert [type(o) for o in outcomes].count(PaidOrder) == 1
    assert {type(o) for o in outcomes} <= {PaidOrder, PaymentInProgress, IllegalMove}
    assert len(await shared_harness.payments(order.id)) == 1
    assert await shared_harness.bank(order.id) == ONE_CAPTURE


async def test_a_paid_order_is_not_paid_again(shared_harness: OrdersHarness):
    order, _ = await awaiting(shared_harness)
    await shared_harness.pay(order.id)

    with pytest.raises(IllegalMove) as refused:
        await shared_harness.pay(order.id)

    assert (refused.value.axis, refused.value.current) == ("payment", "paid")
    assert await shared_harness.bank(order.id) == ONE_CAPTURE


async def test_two_payments_at_once_of_an_order_on_account_charge_once(shared_harness: OrdersHarness):
    """Both find no saga and wait for the order; the second looks again, and finds the saga of the first."""
    order, _ = await awaiting(shared_harness)
    await move(shared_harness, order.id, status="confirmed")
    assert await shared_harness.saga(order.id) == []
    elsewhere = await shared_harness.another_process()
    connection = await shared_harness.connection()

    async with connection.transaction():
        await connection.execute("SELECT FROM orders WHERE id = $1 FOR UPDATE", order.id)
        with shared_harness.acting(ALICE):
            asked = [
                asyncio.ensure_future(outcome_of(client.pay(PayOrder(id=order.id))))
                for client in (shared_harness.orders, elsewhere)
            ]
        await shared_harness.until_blocked(2, by=asked)
    outcomes = await asyncio.gather(*asked)

    assert [type(o) for o in outcomes].count(PaidOrder) == 1
    assert {type(o) for o in outcomes} <= {PaidOrder, PaymentInProgress, IllegalMove}
    assert len(await shared_harness.payments(order.id)) == 1
    assert await shared_harness.bank(order.id) == ONE_CAPTURE


async def test_a_payment_while_another_is_under_way_is_refused(shared_harness: OrdersHarness):
    order, _ = await awaiting(shared_harness)
    with shared_harness.acting(ALICE):
        slow = asyncio.ensure_future(shared_harness.orders.pay(PayOrder(id=order.id, method="sandbox:slow:1000")))

    async def is_paying() -> bool:
        return await shared_harness.saga(order.id) == ["reserve"]

    await until(is_paying)
    with pytest.raises(PaymentInProgress):
        await shared_harness.pay(order.id)

    assert (await slow).payment.status == "captured"
    assert await shared_harness.bank(order.id) == ONE_CAPTURE


@pytest.mark.parametrize("move", [{"status": "completed"}, {"fulfilment": "returned"}])
async def test_an_order_is_neither_completed_nor_returned_while_its_payment_is_under_way(
    shared_harness: OrdersHarness, move: dict[str, str]
):
    """Its money would be taken after the goods had come back, or the step that takes it would start from elsewhere."""
    order = await shared_harness.delivered(None, (MUG, 1))
    with shared_harness.acting(ALICE):
        slow = asyncio.ensure_future(shared_harness.orders.pay(PayOrder(id=order.id, method="sandbox:slow:1000")))

    async def is_paying() -> bool:
        return await shared_harness.saga(order.id) == ["reserve"]

    await until(is_paying)
    with shared_harness.acting(STAFF), pytest.raises(PaymentInProgress):
        await shared_harness.orders.move(cast(Any, MoveOrder)(id=order.id, **move))

    assert (await slow).payment.status == "captured"
    with shared_harness.acting(STAFF):
        await shared_harness.orders.move(cast(Any, MoveOrder)(id=order.id, **move))


# ---------------------------------------------------------------------------------------------------------------- keys


async def test_a_repeated_key_answers_with_the_same_payment(shared_harness: OrdersHarness):
    order, _ = await awaiting(shared_harness)

    first = await shared_harness.pay(order.id, idempotency_key=f"pay-{order.id}", fingerprint=b"one")
    again = await shared_harness.pay(order.id, idempotency_key=f"pay-{order.id}", fingerprint=b"one")

    assert again.replayed
    assert again.payment == first.payment
    assert await shared_harness.bank(order.id) == ONE_CAPTURE


async def test_the_same_key_with_another_request_is_refused(shared_harness: OrdersHarness):
    order, _ = await awaiting(shared_harness)
    await shared_harness.pay(order.id, idempotency_key=f"pay-{order.id}", fingerprint=b"one")

    with pytest.raises(IdempotencyKeyReused):
        await shared_harness.pay(order.id, idempotency_key=f"pay-{order.id}", fingerprint=b"other")


async def test_a_repeated_key_of_a_declined_payment_answers_with_the_decline(shared_harness: OrdersHarness):
    order, _ = await awaiting(shared_harness)
    key: dict[str, Any] = {"idempotency_key": f"pay-{order.id}", "fingerprint": b"one"}
    refused = [await outcome_of(shared_harness.pay(order.id, "sandbox:declined", **key)) for _ in range(2)]

    assert [type(error) for error in refused] == [PaymentDeclined, PaymentDeclined]
    assert len(await shared_harness.payments(order.id)) == 1


async def a_month_passes(harness: OrdersHarness) -> None:
    """Sets all orders and keys of payments 30 days back."""
    connection = await harness.connection()
    past = "created_at = created_at - interval '30 days', updated_at = updated_at - interval '30 days'"
    await connection.execute(f"UPDATE orders SET {past}")
    await connection.execute("UPDATE payment_keys SET at = at - interval '30 days'")


async def test_a_key_finds_its_payment_after_30_days(shared_harness: OrdersHarness):
    order, product_id = await awaiting(shared_harness)
    key: dict[str, Any] = {"idempotency_key": f"pay-{order.id}", "fingerprint": b"one"}
    first = await shared_harness.pay(order.id, **key)
    await a_month_passes(shared_harness)

    again = await shared_harness.pay(order.id, **key)
    with pytest.raises(IdempotencyKeyReused):
        await shared_harness.pay(order.id, idempotency_key=f"pay-{order.id}", fingerprint=b"other")

    assert (again.replayed, again.payment) == (True, first.payment)
    assert len(await shared_harness.payments(order.id)) == 1
    assert await shared_harness.bank_operations(order.id) == [("charge", "succeeded")]
    assert await shared_harness.shelf(product_id) == (9, 0)


async def test_a_key_finds_its_refunded_payment_after_30_days(shared_harness: OrdersHarness):
    order, _ = await awaiting(shared_harness)
    key: dict[str, Any] = {"idempotency_key": f"pay-{order.id}", "fingerprint": b"one"}
    first = await shared_harness.pay(order.id, **key)
    with shared_harness.acting(STAFF):
        await shared_harness.orders.cancel(CancelOrder(id=order.id))
    await shared_harness.settled(order.id)
    await a_month_passes(shared_harness)

    again = await shared_harness.pay(order.id, **key)

    assert (again.replayed, again.payment.id, again.payment.status) == (True, first.payment.id, "refunded")
    assert (await shared_harness.bank(order.id)).captures == 1


async def test_the_same_key_for_another_order_is_refused(shared_harness: OrdersHarness):
    """The fingerprint is that of the whole request, the order in its path included."""
    first, _ = await awaiting(shared_harness)
    second, _ = await awaiting(shared_harness)
    await shared_harness.pay(first.id, idempotency_key=f"pay-{first.id}", fingerprint=b"first")

    with pytest.raises(IdempotencyKeyReused):
        await shared_harness.pay(second.id, idempotency_key=f"pay-{first.id}", fingerprint=b"second")

    assert await shared_harness.payments(second.id) == ()
    assert await shared_harness.saga(second.id) == ["awaiting"]


async def test_one_key_for_two_orders_at_once_pays_one_of_them(shared_harness: OrdersHarness):
    orders = [(await awaiting(shared_harness))[0] for _ in range(2)]
    elsewhere = await shared_harness.another_process()

    with shared_harness.acting(ALICE):
        outcomes = await asyncio.gather(
            *(
                outcome_of(
                    client.pay(
                        PayOrder(id=order.id, idempotency_key=f"both-{orders[0].id}", fingerprint=b"%d" % order.id)
                    )
                )
                for client, order in zip((shared_harness.orders, elsewhere), orders, strict=True)
            )
        )

    assert [type(o) for o in outcomes].count(PaidOrder) == 1
    assert {type(o) for o in outcomes} <= {PaidOrder, IdempotencyKeyReused, RequestInProgress}
    assert sum([(await shared_harness.bank(order.id)).captures for order in orders]) == 1


async def test_ten_duplicates_in_two_processes_are_one_payment(shared_harness: OrdersHarness):
    order, _ = await awaiting(shared_harness)
    elsewhere = await shared_harness.another_process()
    request = PayOrder(id=order.id, idempotency_key=f"pay-{order.id}", fingerprint=b"one")

    with shared_harness.acting(ALICE):
        outcomes = await asyncio.gather(
            *(outcome_of((shared_harness.orders, elsewhere)[n % 2].pay(request)) for n in range(10))
        )

    ids = {outcome.payment.id for outcome in outcomes if isinstance(outcome, PaidOrder)}
    assert len(ids) == 1
    assert {type(outcome) for outcome in outcomes} <= {PaidOrder, RequestInProgress}
    assert await shared_harness.bank(order.id) == ONE_CAPTURE


async def test_a_refused_payment_leaves_its_key_free(shared_harness: OrdersHarness):
    order, _ = await awaiting(shared_harness)
    key: dict[str, Any] = {"idempotency_key": f"pay-{order.id}", "fingerprint": b"one"}
    with pytest.raises(AmountNotDue):
        await shared_harness.pay(order.id, expected_total_minor=1, **key)

    assert (await shared_harness.pay(order.id, expected_total_minor=MUG_MINOR, **key)).payment.status == "captured"


# ------------------------------------------------------------------------------------------------------------ declined


async def test_a_declined_order_is_paid_in_another_way(shared_harness: OrdersHarness):
    order, product_id = await awaiting(shared_harness)

    with pytest.raises(PaymentDeclined) as declined:
        await shared_harness.pay(order.id, "sandbox:insufficient_funds")
    waiting = await shared_harness.settled(order.id)
    held = await shared_harness.shelf(product_id)
    paid = await shared_harness.pay(order.id)

    assert declined.value.provider_code == "insufficient_funds"
    assert (waiting.status, waiting.payment) == ("pending", "unpaid")
    assert held == (10, 1)
    assert (paid.payment.attempt, paid.payment.status) == (2, "captured")
    payments = await shared_harness.payments(order.id)
    assert [(p.attempt, p.status) for p in payments] == [(2, "captured"), (1, "failed")]
    assert payments[1].id == declined.value.payment_id
    assert await shared_harness.bank(order.id) == ONE_CAPTURE
    assert (await shared_harness.raw(order.id)).payment_attempt == 2


async def test_a_cancelled_order_cannot_be_paid(shared_harness: OrdersHarness):
    order, _ = await awaiting(shared_harness)
    await move(shared_harness, order.id, status="cancelled")

    with pytest.raises(OrderCancelled) as refused:
        await shared_harness.pay(order.id)

    assert refused.value.reason == "requested"
    assert await shared_harness.payments(order.id) == ()


# ---------------------------------------------------------------------------------------------------- capture and void


async def test_an_authorized_order_is_captured_by_staff(shared_harness: OrdersHarness):
    order, product_id = await awaiting(shared_harness)
    reserved = (await shared_harness.pay(order.id, actor=STAFF, capture=False)).payment
    waiting = await shared_harness.settled(order.id)
    with pytest.raises(IllegalMove):
        await move(shared_harness, order.id, fulfilment="shipped")

    captured = await capture(shared_harness, reserved)
    again = await capture(shared_harness, reserved)

    assert (reserved.status, waiting.status, waiting.payment) == ("authorized", "confirmed", "authorized")
    assert (captured.status, captured.captured_minor) == ("captured", MUG_MINOR)
    assert again == captured
    assert (await shared_harness.settled(order.id)).payment == "paid"
    assert await shared_harness.bank(order.id) == ONE_CAPTURE
    assert await shared_harness.shelf(product_id) == (9, 0)
    assert (await move(shared_harness, order.id, fulfilment="shipped")).fulfilment == "shipped"


async def capture_part(harness: OrdersHarness, payment: Payment, amount_minor: int | None, **fields: Any) -> Payment:
    with harness.acting(STAFF):
        asked = CapturePart(payment_id=payment.id, amount_minor=amount_minor, **fields)
        return (await harness.orders.capture_part(asked)).payment


async def test_of_what_was_captured_in_part_no_more_is_refunded(shared_harness: OrdersHarness):
    product_id = await shared_harness.new_product(10)
    order = await shared_harness.checked_out(None, (product_id, 3))
    reserved = (await shared_harness.pay(order.id, actor=STAFF, capture=False)).payment
    with pytest.raises(CaptureTooLarge):
        await capture_part(shared_harness, reserved, 3 * MUG_MINOR + 1)

    taken = await capture_part(shared_harness, reserved, 2_000)
    with pytest.raises(NothingToRefund) as refused:
        await refund(shared_harness, taken, 2_001)
    await move(shared_harness, order.id, fulfilment="shipped")
    await move(shared_harness, order.id, fulfilment="delivered")
    first = await take_back(shared_harness, order, 1, "first")
    rest = await take_back(shared_harness, order, 2, "rest")

    assert (taken.status, taken.captured_minor) == ("captured", 2_000)
    assert refused.value.left_minor == 2_000
    assert (first.amount_minor, rest.amount_minor) == (MUG_MINOR, 2_000 - MUG_MINOR)
    now = await shared_harness.settled(order.id)
    assert (now.payment, rules.paid_minor(now), now.refunded_minor) == ("refunded", 2_000, 2_000)
    assert await shared_harness.bank(order.id) == Bank(1, 2_000, 2_000, 0)
    assert (await shared_harness.emitted(order.id))[-2:] == [
        ("order.refunded", order.id),
        ("refund.succeeded", order.id),
    ]


async def test_of_two_captures_with_other_amounts_at_once_one_is_refused(shared_harness: OrdersHarness):
    order, _ = await awaiting(shared_harness)
    reserved = (await shared_harness.pay(order.id, actor=STAFF, capture=False)).payment
    await shared_harness.settled(order.id)

    outcomes = await asyncio.gather(
        *(capture_part(shared_harness, reserved, amount) for amount in (500, 600)), return_exceptions=True
    )

    [taken] = [outcome for outcome in outcomes if isinstance(outcome, Payment)]
    [refused] = [outcome for outcome in outcomes if isinstance(outcome, CaptureAmountChanged)]
    assert refused.captured_minor == taken.captured_minor
    assert rules.paid_minor(await shared_harness.settled(order.id)) == taken.captured_minor
    assert await shared_harness.bank(order.id) == Bank(1, taken.captured_minor, 0, 0)


async def test_a_cancel_after_a_part_was_captured_gives_that_part_back(shared_harness: OrdersHarness):
    order, product_id = await awaiting(shared_harness)
    reserved = (await shared_harness.pay(order.id, actor=STAFF, capture=False)).payment
    await capture_part(shared_harness, reserved, 500)

    with shared_harness.acting(STAFF):
        await shared_harness.orders.cancel(CancelOrder(id=order.id))

    now = await shared_harness.settled(order.id)
    assert (now.status, now.payment, rules.paid_minor(now), now.refunded_minor) == ("cancelled", "refunded", 500, 500)
    assert await shared_harness.bank(order.id) == Bank(1, 500, 500, 0)
    assert await shared_harness.shelf(product_id) == (10, 0)


@pytest.mark.parametrize(
    ("fields", "field"),
    [({"currency": "EUR"}, "currency"), ({"amount": "1.001"}, "amount"), ({"amount": "0"}, "amount")],
)
async def test_a_part_is_an_amount_in_the_currency_of_the_order(
    shared_harness: OrdersHarness, fields: dict[str, str], field: str
):
    order, _ = await awaiting(shared_harness)
    reserved = (await shared_harness.pay(order.id, actor=STAFF, capture=False)).payment

    with pytest.raises(InvalidRequest) as refused:
        await capture_part(shared_harness, reserved, None, **fields)

    assert [error.field for error in refused.value.errors] == [field]
    assert (await shared_harness.settled(order.id)).payment == "authorized"


async def test_concurrent_captures_in_two_processes_are_one(shared_harness: OrdersHarness):
    order, _ = await awaiting(shared_harness)
    reserved = (await shared_harness.pay(order.id, actor=STAFF, capture=False)).payment
    elsewhere = await shared_harness.another_process()

    with shared_harness.acting(STAFF):
        taken = await asyncio.gather(
            *((shared_harness.orders, elsewhere)[n % 2].capture(MovePayment(payment_id=reserved.id)) for n in range(6))
        )

    assert {paid.payment.status for paid in taken} == {"captured"}
    assert await shared_harness.bank(order.id) == ONE_CAPTURE


async def test_a_voided_payment_cancels_its_order(shared_harness: OrdersHarness):
    order, product_id = await awaiting(shared_harness)
    reserved = (await shared_harness.pay(order.id, actor=STAFF, capture=False)).payment

    voided = await void(shared_harness, reserved)
    again = await void(shared_harness, reserved)

    assert voided.status == "voided"
    assert again == voided
    now = await shared_harness.settled(order.id)
    assert (now.status, now.payment) == ("cancelled", "voided")
    assert await shared_harness.bank(order.id) == NO_MONEY
    assert await shared_harness.shelf(product_id) == (10, 0)
    with pytest.raises(IllegalMove):
        await capture(shared_harness, reserved)


async def test_an_expired_authorization_cancels_its_order(shared_harness: OrdersHarness):
    order, product_id = await awaiting(shared_harness)
    reserved = (await shared_harness.pay(order.id, "sandbox:capture_expired", STAFF, capture=False)).payment

    with pytest.raises(PaymentDeclined) as declined:
        await capture(shared_harness, reserved)

    now = await shared_harness.settled(order.id)
    assert declined.value.provider_code == "authorization_expired"
    assert (now.status, now.payment) == ("cancelled", "voided")
    assert now.reason == CancelReason(code="payment_lost", provider_code="authorization_expired")
    assert await shared_harness.bank(order.id) == NO_MONEY
    assert await shared_harness.shelf(product_id) == (10, 0)


async def test_a_captured_payment_cannot_be_voided(shared_harness: OrdersHarness):
    order, _ = await awaiting(shared_harness)
    paid = (await shared_harness.pay(order.id)).payment

    with pytest.raises(IllegalMove):
        await void(shared_harness, paid)

    assert await shared_harness.bank(order.id) == ONE_CAPTURE


async def test_only_staff_capture_and_void(shared_harness: OrdersHarness):
    order, _ = await awaiting(shared_harness)
    reserved = (await shared_harness.pay(order.id, actor=STAFF, capture=False)).payment

    with shared_harness.acting(ALICE):
        for operation in (shared_harness.orders.capture, shared_harness.orders.void):
            with pytest.raises(Forbidden):
                await operation(MovePayment(payment_id=reserved.id))


# ---------------------------------------------------------------------------------------------------------- on account


async def test_an_order_on_account_is_sold_and_paid_later(shared_harness: OrdersHarness):
    order, product_id = await awaiting(shared_harness)

    confirmed = await move(shared_harness, order.id, status="confirmed")
    sold = await shared_harness.shelf(product_id)
    await move(shared_harness, order.id, fulfilment="shipped")
    with pytest.raises(PaymentDeclined):
        await shared_harness.pay(order.id, "sandbox:declined")
    still = await shared_harness.settled(order.id)
    await shared_harness.pay(order.id)

    assert (confirmed.status, confirmed.payment) == ("confirmed", "unpaid")
    assert (await shared_harness.raw(order.id)).on_account
    assert sold == (9, 0)
    assert (still.status, still.payment, still.fulfilment) == ("confirmed", "unpaid", "shipped")
    now = await shared_harness.settled(order.id)
    assert (now.status, now.payment, now.fulfilment) == ("confirmed", "paid", "shipped")
    assert await shared_harness.bank(order.id) == ONE_CAPTURE
    assert await shared_harness.shelf(product_id) == (9, 0)


async def test_an_order_without_stock_is_not_confirmed_by_hand(shared_harness: OrdersHarness):
    product_id = await shared_harness.new_product(0)
    order = await shared_harness.checked_out(None, (product_id, 1))

    with pytest.raises(IllegalMove):
        await move(shared_harness, order.id, status="confirmed")


async def test_the_history_says_who_confirmed_it(shared_harness: OrdersHarness):
    order, _ = await awaiting(shared_harness)
    await move(shared_harness, order.id, status="confirmed")

    rows = await shared_harness.values(
        "SELECT actor_role || ' ' || actor_id FROM history WHERE order_id = $1 ORDER BY version", order.id
    )
    assert rows == ["customer 1", "staff 9"]


# ---------------------------------------------------------------------------------------------------- other customers


async def test_an_order_of_another_customer_is_refused_like_an_unknown_one(shared_harness: OrdersHarness):
    order, _ = await awaiting(shared_harness)

    for order_id in (order.id, 404):
        with shared_harness.acting(BOB):
            for asked in (
                shared_harness.orders.pay(PayOrder(id=order_id)),
                shared_harness.orders.settled(AwaitOrder(id=order_id, wait_ms=1)),
                shared_harness.orders.timeline(GetTimeline(id=order_id)),
            ):
                with pytest.raises(OrderNotFound) as unknown:
                    await asked
                assert unknown.value.details == {"order_id": order_id}
    assert await shared_harness.payments(order.id) == ()


# -------------------------------------------------------------------------------------------------------------- crashes


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_crash_around_the_commit_of_a_payment_is_one_payment_when_it_comes_again(
    shared_harness: OrdersHarness, inject: Inject, when: str
):
    order, _ = await awaiting(shared_harness)

    lift = inject(f"orders.pay.{when}_commit", fail)
    key: dict[str, Any] = {"idempotency_key": f"pay-{order.id}", "fingerprint": b"one"}
    assert isinstance(await outcome_of(shared_harness.pay(order.id, **key)), ServiceError)
    lift()

    paid = await shared_harness.pay(order.id, **key)

    assert paid.replayed == (when == "after")
    assert paid.payment.status == "captured"
    assert await shared_harness.bank(order.id) == ONE_CAPTURE


@pytest.mark.parametrize("how_far", [{}, {"fulfilment": "shipped"}, {"status": "completed"}])
async def test_an_order_on_account_stays_sold_when_its_payment_is_declined(
    shared_harness: OrdersHarness, how_far: dict[str, str]
):
    order, product_id = await awaiting(shared_harness)
    await move(shared_harness, order.id, status="confirmed")
    if how_far:
        await move(shared_harness, order.id, **how_far)

    with pytest.raises(PaymentDeclined) as declined:
        await shared_harness.pay(order.id, "sandbox:capture_expired")

    now = await shared_harness.settled(order.id)
    assert declined.value.provider_code == "authorization_expired"
    assert (now.status, now.payment) == (how_far.get("status", "confirmed"), "unpaid")
    assert await shared_harness.shelf(product_id) == (9, 0)
    await shared_harness.pay(order.id)
    assert (await shared_harness.settled(order.id)).payment == "paid"


async def test_an_order_on_account_stays_sold_and_payable_after_ten_declined_payments(shared_harness: OrdersHarness):
    order, product_id = await awaiting(shared_harness)
    await move(shared_harness, order.id, status="confirmed")

    for _ in range(steps.ATTEMPTS_LIMIT):
        with pytest.raises(PaymentDeclined):
            await shared_harness.pay(order.id, "sandbox:declined")

    now = await shared_harness.settled(order.id)
    assert (now.status, now.payment, now.reason) == ("confirmed", "unpaid", None)
    assert await shared_harness.shelf(product_id) == (9, 0)
    await shared_harness.pay(order.id)
    assert (await shared_harness.settled(order.id)).payment == "paid"
    assert await shared_harness.bank(order.id) == ONE_CAPTURE


async def test_an_order_on_account_stays_sold_when_its_authorization_expires(shared_harness: OrdersHarness):
    order, product_id = await awaiting(shared_harness)
    await move(shared_harness, order.id, status="confirmed")
    reserved = (await shared_harness.pay(order.id, "sandbox:capture_expired", STAFF, capture=False)).payment
    authorized = await shared_harness.settled(order.id)

    with pytest.raises(PaymentDeclined) as declined:
        await capture(shared_harness, reserved)

    assert declined.value.provider_code == "authorization_expired"
    assert (authorized.status, authorized.payment) == ("confirmed", "authorized")
    now = await shared_harness.settled(order.id)
    assert (now.status, now.payment) == ("confirmed", "unpaid")
    assert await shared_harness.saga(order.id) == []
    assert await shared_harness.shelf(product_id) == (9, 0)
    await shared_harness.pay(order.id)
    assert (await shared_harness.settled(order.id)).payment == "paid"


async def take_back(harness: OrdersHarness, order: Order, quantity: int, key: str) -> Refund:
    with harness.acting(STAFF):
        lines = (ReturnLine(line_id=1, quantity=quantity),)
        return await harness.orders.take_back(
            ReturnOrder(id=order.id, idempotency_key=f"{key}-{order.id}", lines=lines)
        )


async def refund(harness: OrdersHarness, payment: Payment, amount_minor: int | None = None) -> Refund:
    with harness.acting(STAFF):
        key = f"refund-{payment.id}-{amount_minor}"
        return await harness.orders.refund(
            RefundOrder(payment_id=payment.id, idempotency_key=key, amount_minor=amount_minor)
        )


async def test_what_came_back_from_an_order_on_account_is_not_due(shared_harness: OrdersHarness):
    product_id = await shared_harness.new_product(10)
    order = await shared_harness.delivered(None, (product_id, 3))
    await take_back(shared_harness, order, 1, "unpaid")
    before = await shared_harness.settled(order.id)

    with pytest.raises(AmountNotDue) as shown:
        await shared_harness.pay(order.id, expected_total_minor=3 * MUG_MINOR)
    payment = (await shared_harness.pay(order.id, expected_total_minor=2 * MUG_MINOR)).payment

    assert (before.total_minor, rules.due_minor(before), rules.paid_minor(before)) == (3 * MUG_MINOR, 2 * MUG_MINOR, 0)
    assert shown.value.due_minor == 2 * MUG_MINOR
    assert (payment.amount_minor, payment.captured_minor) == (2 * MUG_MINOR, 2 * MUG_MINOR)
    paid = await shared_harness.settled(order.id)
    assert (paid.payment, rules.due_minor(paid), rules.paid_minor(paid)) == ("paid", 0, 2 * MUG_MINOR)
    assert (await shared_harness.bank(order.id)).net_minor == 2 * MUG_MINOR
    assert await shared_harness.shelf(product_id) == (8, 0)


async def test_of_what_was_paid_after_a_return_no_more_is_refunded_than_was_paid(shared_harness: OrdersHarness):
    order = await shared_harness.delivered(None, (await shared_harness.new_product(10), 3))
    await take_back(shared_harness, order, 1, "unpaid")
    payment = (await shared_harness.pay(order.id)).payment

    with pytest.raises(NothingToRefund) as refused:
        await refund(shared_harness, payment, 2 * MUG_MINOR + 1)
    back = await take_back(shared_harness, order, 1, "paid")
    rest = await refund(shared_harness, payment)

    assert refused.value.left_minor == 2 * MUG_MINOR
    assert (back.amount_minor, rest.amount_minor) == (MUG_MINOR, MUG_MINOR)
    now = await shared_harness.settled(order.id)
    assert (now.payment, now.refunded_minor, rules.paid_minor(now)) == ("refunded", 2 * MUG_MINOR, 2 * MUG_MINOR)
    assert (await shared_harness.bank(order.id)).net_minor == 0


async def test_nothing_is_due_when_everything_came_back(shared_harness: OrdersHarness):
    order = await shared_harness.delivered(None, (await shared_harness.new_product(10), 2))
    await take_back(shared_harness, order, 2, "all")

    with pytest.raises(NotPayable, match="nothing is due"):
        await shared_harness.pay(order.id)

    now = await shared_harness.settled(order.id)
    assert (now.payment, now.fulfilment, rules.due_minor(now)) == ("unpaid", "returned", 0)
    assert await shared_harness.bank(order.id) == NO_MONEY


async def test_after_a_decline_what_comes_back_lowers_what_is_due_again(shared_harness: OrdersHarness):
    order = await shared_harness.delivered(None, (await shared_harness.new_product(10), 3))
    await take_back(shared_harness, order, 1, "first")
    with pytest.raises(PaymentDeclined):
        await shared_harness.pay(order.id, "sandbox:declined")
    await shared_harness.settled(order.id)
    await take_back(shared_harness, order, 1, "second")

    payment = (await shared_harness.pay(order.id)).payment

    assert payment.captured_minor == MUG_MINOR
    assert (await shared_harness.bank(order.id)).net_minor == MUG_MINOR


@pytest.mark.parametrize(
    "point",
    [
        "orders.pay.before_commit",
        "orders.pay.after_commit",
        "checkout.charge.before_call",
        "checkout.charge.after_call",
        "checkout.reserve.before_commit",
    ],
)
async def test_a_crash_while_less_than_the_total_is_paid_changes_nothing_of_it(
    shared_harness: OrdersHarness, inject: Inject, point: str
):
    order = await shared_harness.delivered(None, (await shared_harness.new_product(10), 3))
    await take_back(shared_harness, order, 1, "unpaid")
    failing = FailAt(1)
    inject(point, failing)
    key: dict[str, Any] = {"idempotency_key": f"pay-{order.id}", "fingerprint": b"one"}

    await outcome_of(shared_harness.pay(order.id, **key))
    again = (await shared_harness.pay(order.id, **key)).payment

    assert failing.arrived, "the point is not on this way"
    assert again.captured_minor == 2 * MUG_MINOR
    paid = await shared_harness.settled(order.id)
    assert (paid.payment, rules.paid_minor(paid)) == ("paid", 2 * MUG_MINOR)
    assert await shared_harness.bank(order.id) == Bank(1, 2 * MUG_MINOR, 0, 0)


async def test_a_customer_may_not_pay_without_capture(shared_harness: OrdersHarness):
    order, product_id = await awaiting(shared_harness)

    with pytest.raises(Forbidden):
        await shared_harness.pay(order.id, actor=ALICE, capture=False)

    assert await shared_harness.shelf(product_id) == (10, 1)
    assert await shared_harness.bank(order.id) == NO_MONEY


async def test_a_payment_after_the_end_of_the_hold_is_refused_with_the_cancellation(shared_harness: OrdersHarness):
    order, _ = await awaiting(shared_harness)
    stock = await shared_harness.connection("inventory")
    await stock.execute("UPDATE reservations SET expires_at = now() - interval '1 s' WHERE order_id = $1", order.id)

    with pytest.raises(OrderCancelled) as cancelled:
        await shared_harness.pay(order.id)

    assert cancelled.value.reason == "expired"
    assert await shared_harness.bank(order.id) == NO_MONEY


@pytest.mark.parametrize("method", [None, "sandbox:declined"])
async def test_the_tenth_declined_payment_cancels_the_order(shared_harness: OrdersHarness, method: str | None):
    product_id = await shared_harness.new_product(10)
    order = await shared_harness.checked_out(method, (product_id, 1))
    before = len(await shared_harness.payments(order.id))

    for _ in range(steps.ATTEMPTS_LIMIT - 1 - before):
        with pytest.raises(PaymentDeclined):
            await shared_harness.pay(order.id, "sandbox:declined")
    still = await shared_harness.settled(order.id)
    held = await shared_harness.shelf(product_id)
    with pytest.raises(PaymentDeclined):
        await shared_harness.pay(order.id, "sandbox:insufficient_funds")

    assert (still.status, still.payment, held) == ("pending", "unpaid", (10, 1))
    now = await shared_harness.settled(order.id)
    assert (now.status, now.payment) == ("cancelled", "failed")
    assert now.reason == CancelReason(code="payment_declined", provider_code="insufficient_funds")
    assert await shared_harness.shelf(product_id) == (10, 0)
    assert [p.status for p in await shared_harness.payments(order.id)] == ["failed"] * 10
    assert await shared_harness.bank(order.id) == NO_MONEY
    with pytest.raises(OrderCancelled):
        await shared_harness.pay(order.id)
