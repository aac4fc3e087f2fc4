"""Authorize, capture, void and refund through the contract, with the bank's own ledger as the witness.

See `test_charge.py` for charge.
"""

from __future__ import annotations

import asyncio

import pytest

from mercato.chassis.contract import InvalidRequest, ServiceError
from mercato.contracts.payments import (
    AnotherOrder,
    AnotherPaymentLive,
    AttemptNotFound,
    AttemptReused,
    OutcomePending,
    Payment,
    Payments,
    PaymentStateConflict,
    RefundReferenceReused,
    RefundTooLarge,
)
from mercato.testing.injection import Inject, Overlap
from mercato.testing.tables import EVENTS
from services.payments.harness import PaymentsHarness, again, capture, key, refund, void

NEIGHBOURS = 6


def statuses(answers: object) -> list[str]:
    assert isinstance(answers, list)
    return [a.status if isinstance(a, Payment) else type(a).__name__ for a in answers]


# -------------------------------------------------------------------------------------------------------- authorize


async def test_an_authorized_payment_holds_the_amount_and_takes_nothing(harness: PaymentsHarness):
    payment = await harness.payments.authorize(harness.authorization(amount=1_250))

    assert (payment.status, payment.code, payment.version) == ("authorized", None, 2)
    assert (payment.amount_minor, payment.authorized_minor, payment.captured_minor) == (1_250, 1_250, 0)
    assert payment.updated_at >= payment.created_at
    assert await harness.rows("SELECT count(*) FROM transfers") == [(0,)]
    assert await harness.bank("SELECT order_id, authorized_minor, state FROM charges") == [
        (payment.order_id, 1_250, "open")
    ]


async def test_an_attempt_is_authorized_once(harness: PaymentsHarness):
    request = harness.authorization()

    first, second = await harness.payments.authorize(request), await harness.payments.authorize(request)

    assert second == first
    assert await harness.bank("SELECT count(*) FROM charges") == [(1,)]
    assert await harness.bank("SELECT key FROM operations") == [(key(first, "authorize"),)]
    assert await harness.rows("SELECT key FROM operations") == [(key(first, "authorize"),)]


async def test_an_attempt_with_another_amount_is_refused_and_the_first_stands(harness: PaymentsHarness):
    request = harness.authorization(amount=700)
    first = await harness.payments.authorize(request)

    with pytest.raises(AttemptReused):
        await harness.payments.authorize(again(request, amount_minor=900, method="sandbox:declined"))

    assert await harness.payments.authorize(request) == first


@pytest.mark.parametrize(
    ("method", "code"),
    [("sandbox:declined", "card_declined"), ("sandbox:insufficient_funds", "insufficient_funds")],
)
async def test_a_declined_card_is_an_answer_and_the_next_attempt_is_open(
    harness: PaymentsHarness, method: str, code: str
):
    request = harness.authorization(method)

    failed = await harness.payments.authorize(request)
    next_one = await harness.payments.authorize(again(request, attempt=2, method="sandbox:ok"))

    assert (failed.status, failed.code) == ("failed", code)
    assert await harness.payments.authorize(request) == failed
    assert (next_one.status, next_one.attempt) == ("authorized", 2)


async def test_an_order_has_one_live_payment(harness: PaymentsHarness):
    request = harness.authorization()
    await harness.payments.authorize(request)

    with pytest.raises(AnotherPaymentLive):
        await harness.payments.authorize(again(request, attempt=2))
    assert await harness.bank("SELECT count(*) FROM charges") == [(1,)]


async def test_two_attempts_at_the_same_moment_leave_one_payment(harness: PaymentsHarness):
    other, request = await harness.another_process(), harness.authorization()

    answers = await asyncio.gather(
        harness.payments.authorize(request),
        other.authorize(again(request, attempt=2)),
        return_exceptions=True,
    )

    assert sorted(type(answer).__name__ for answer in answers) == ["AnotherPaymentLive", "Payment"]
    assert await harness.bank("SELECT count(*) FROM charges") == [(1,)]


async def test_two_attempts_in_one_batch_leave_the_first(harness: PaymentsHarness):
    request = harness.authorization()

    answers = await harness.payments.authorize.many([request, again(request, attempt=2)])

    assert statuses(list(answers)) == ["authorized", "AnotherPaymentLive"]


async def test_one_attempt_from_two_processes_at_once_opens_one_charge(harness: PaymentsHarness):
    other = await harness.another_process()
    requests = [harness.authorization() for _ in range(20)]

    ours, theirs = await asyncio.gather(
        harness.payments.authorize.many(requests), other.authorize.many(list(reversed(requests)))
    )

    assert statuses(list(ours)) == statuses(list(theirs)) == ["authorized"] * 20
    assert await harness.bank("SELECT count(*), count(DISTINCT order_id) FROM charges") == [(20, 20)]
    assert await harness.differences() == set()


async def test_the_index_of_live_payments_is_a_lock_of_its_own(harness: PaymentsHarness):
    payment = await harness.authorized()

    with pytest.raises(Exception, match="payments_one_live_an_order"):
        await harness.rows(
            """
            INSERT INTO payments (order_id, nonce, attempt, user_id, method, currency, amount_minor)
            VALUES ($1, 1, 2, 1, 'sandbox:ok', 'EUR', 1)
            """,
            payment.order_id,
        )


async def test_one_bad_request_does_not_fail_its_neighbours(harness: PaymentsHarness):
    requests = [harness.authorization() for _ in range(NEIGHBOURS)]
    requests[2] = again(requests[2], method="sandbox:declined")
    requests[4] = again(requests[0], attempt=2)

    answers = await harness.payments.authorize.many(requests)

    wanted = ["authorized"] * NEIGHBOURS
    wanted[2], wanted[4] = "failed", "AnotherPaymentLive"
    assert statuses(list(answers)) == wanted


async def test_a_method_without_a_provider_is_refused_and_leaves_nothing(harness: PaymentsHarness):
    with pytest.raises(InvalidRequest):
        await harness.payments.authorize(harness.authorization("paper:ok"))
    assert await harness.rows("SELECT id FROM payments") == []


# ---------------------------------------------------------------------------------------------------------- capture


async def test_captured_money_is_a_transfer(harness: PaymentsHarness):
    payment = await harness.captured(1_250)

    assert (payment.status, payment.captured_minor, payment.version) == ("captured", 1_250, 3)
    assert await harness.rows("SELECT kind, debit, credit, amount_minor, currency FROM transfers") == [
        ("capture", "provider", "sales", 1_250, "EUR")
    ]
    assert await harness.rows("SELECT account, balance_minor FROM accounts ORDER BY account") == [
        ("provider", 1_250),
        ("sales", -1_250),
    ]
    assert await harness.differences() == set()


async def test_a_payment_is_captured_once(harness: PaymentsHarness):
    payment = await harness.authorized()
    other = await harness.another_process()

    answers = await asyncio.gather(*(c.capture(capture(payment)) for c in (harness.payments, other) for _ in range(3)))

    assert {a.captured_minor for a in answers} == {1_000}
    assert await harness.taken() == {"authorize": 1, "capture": 1}


async def test_a_payment_of_nothing_is_captured_without_the_provider(harness: PaymentsHarness):
    payment = await harness.captured(0)

    assert (payment.status, payment.captured_minor) == ("captured", 0)
    assert await harness.rows(f"SELECT type FROM {EVENTS} ORDER BY id") == [
        ("payment.authorized",),
        ("payment.captured",),
    ]
    with pytest.raises(RefundTooLarge):
        await harness.payments.refund(refund(payment, 1))
    await assert_nothing_was_asked(harness)


async def test_a_payment_of_nothing_is_voided_without_the_provider(harness: PaymentsHarness):
    payment = await harness.authorized(amount=0)

    voided = await harness.payments.void(void(payment))

    assert (payment.status, voided.status) == ("authorized", "voided")
    assert await harness.payments.void(void(payment)) == voided
    with pytest.raises(PaymentStateConflict):
        await harness.payments.capture(capture(payment))
    await assert_nothing_was_asked(harness)


async def assert_nothing_was_asked(harness: PaymentsHarness) -> None:
    assert await harness.bank("SELECT key FROM operations") == []
    for table in ("intents", "operations", "transfers", "accounts"):
        assert await harness.rows(f"SELECT count(*) FROM {table}") == [(0,)]


async def test_an_authorization_that_ran_out_is_void(harness: PaymentsHarness):
    payment = await harness.authorized("sandbox:capture_expired")

    voided = await harness.payments.capture(capture(payment))

    assert (voided.status, voided.code, voided.captured_minor) == ("voided", "authorization_expired", 0)
    assert await harness.payments.capture(capture(payment)) == voided
    assert await harness.payments.void(void(payment)) == voided
    assert (await harness.payments.authorize(harness.authorization(order_id=payment.order_id, attempt=2))).attempt == 2


async def test_only_what_is_authorized_is_captured(harness: PaymentsHarness):
    failed = await harness.authorized("sandbox:declined")
    voided = await harness.payments.void(void(await harness.authorized()))

    with pytest.raises(PaymentStateConflict):
        await harness.payments.capture(capture(failed))
    with pytest.raises(PaymentStateConflict):
        await harness.payments.capture(capture(voided))
    with pytest.raises(AttemptNotFound):
        await harness.payments.capture(capture(harness.authorization()))


async def test_balances_hold_more_than_64_bits(harness: PaymentsHarness):
    for _ in range(3):
        await harness.captured(2**62)

    assert await harness.rows("SELECT balance_minor FROM accounts WHERE account = 'provider'") == [(3 * 2**62,)]


# ------------------------------------------------------------------------------------------------------------- void


async def test_a_void_gives_the_authorization_back(harness: PaymentsHarness):
    payment = await harness.authorized()

    voided = await harness.payments.void(void(payment))

    assert (voided.status, voided.code) == ("voided", None)
    assert await harness.payments.void(void(payment)) == voided
    assert await harness.bank("SELECT state FROM charges") == [("voided",)]


async def test_a_tombstone_answers_an_authorize_that_arrives_after_the_void(harness: PaymentsHarness):
    request = harness.authorization()

    tombstone = await harness.payments.void(void(request))
    late = await harness.payments.authorize(request)

    assert (tombstone.status, tombstone.authorized_minor, tombstone.amount_minor) == ("voided", 0, 1_000)
    assert late == tombstone
    assert await harness.bank("SELECT count(*) FROM operations") == [(0,)]
    assert await harness.rows(f"SELECT type, version FROM {EVENTS}") == [("payment.voided", 1)]


async def test_void_and_authorize_at_the_same_moment_leave_nothing_open(harness: PaymentsHarness):
    other = await harness.another_process()
    requests = [harness.authorization() for _ in range(20)]

    await asyncio.gather(
        harness.payments.authorize.many(requests), other.void.many([void(request) for request in reversed(requests)])
    )

    assert await harness.rows("SELECT DISTINCT status FROM payments") == [("voided",)]
    assert await harness.bank("SELECT count(*) FROM charges WHERE state <> 'voided'") == [(0,)]


async def test_captured_money_stays_captured(harness: PaymentsHarness):
    payment = await harness.captured()

    assert await harness.payments.void(void(payment)) == payment
    assert await harness.taken() == {"authorize": 1, "capture": 1}


async def test_of_capture_and_void_at_the_same_moment_one_happens(harness: PaymentsHarness):
    other = await harness.another_process()
    payments = [await harness.authorized() for _ in range(8)]

    captures, voids = await asyncio.gather(
        harness.payments.capture.many([capture(p) for p in payments]), other.void.many([void(p) for p in payments])
    )

    for captured, voided in zip(captures, voids, strict=True):
        assert isinstance(voided, Payment)
        if isinstance(captured, Payment):
            assert captured.status == voided.status == "captured"
        else:
            assert (type(captured), voided.status) == (PaymentStateConflict, "voided")
    assert await harness.differences() == set()


# ----------------------------------------------------------------------------------------------------------- refund


async def test_a_payment_is_refunded_in_parts(harness: PaymentsHarness):
    payment = await harness.captured(1_000)

    part = await harness.payments.refund(refund(payment, 400, "one"))
    rest = await harness.payments.refund(refund(payment, 600, "two"))

    assert (part.status, part.refunded_minor) == ("partially_refunded", 400)
    assert (rest.status, rest.refunded_minor) == ("refunded", 1_000)
    assert await harness.rows("SELECT account, balance_minor FROM accounts ORDER BY account") == [
        ("provider", 0),
        ("refunds", 1_000),
        ("sales", -1_000),
    ]
    assert await harness.bank("SELECT refunded_minor FROM charges") == [(1_000,)]


async def test_a_reference_is_refunded_once(harness: PaymentsHarness):
    payment = await harness.captured()
    request = refund(payment, 400)

    first, second = await harness.payments.refund(request), await harness.payments.refund(request)

    assert first.refunded_minor == second.refunded_minor == 400
    assert await harness.taken() == {"authorize": 1, "capture": 1, "refund": 1}
    with pytest.raises(RefundReferenceReused):
        await harness.payments.refund(refund(payment, 500))


async def test_more_than_was_captured_is_never_refunded(harness: PaymentsHarness):
    payment = await harness.captured(1_000)
    await harness.payments.refund(refund(payment, 700, "one"))

    with pytest.raises(RefundTooLarge) as refused:
        await harness.payments.refund(refund(payment, 301, "two"))
    assert refused.value.left_minor == 300


async def test_refunds_at_the_same_moment_share_what_there_is(harness: PaymentsHarness):
    payment, other = await harness.captured(1_000), await harness.another_process()

    async def give_back(client: Payments, prefix: str) -> list[Payment | ServiceError]:
        return list(await client.refund.many([refund(payment, 300, f"{prefix}-{n}") for n in range(3)]))

    ours, theirs = await asyncio.gather(give_back(harness.payments, "a"), give_back(other, "b"))
    answers = ours + theirs

    assert sorted(type(answer).__name__ for answer in answers) == ["Payment"] * 3 + ["RefundTooLarge"] * 3
    assert await harness.bank("SELECT refunded_minor FROM charges") == [(900,)]
    assert await harness.differences() == set()


async def test_the_second_of_two_refunds_waits_for_what_the_first_has_promised(
    harness: PaymentsHarness, inject: Inject
):
    payment, other = await harness.captured(1_000), await harness.another_process()
    inject("payments.refund.before_intent_commit", Overlap(harness.dsns["payments"]))

    answers = await asyncio.gather(
        harness.payments.refund(refund(payment, 600, "one")),
        other.refund(refund(payment, 600, "two")),
        return_exceptions=True,
    )

    assert sorted(type(answer).__name__ for answer in answers) == ["Payment", "RefundTooLarge"]


async def test_a_refund_whose_outcome_is_not_known_counts(harness: PaymentsHarness):
    payment = await harness.payments.capture(capture(await harness.authorized()))
    await harness.rows("UPDATE payments SET method = 'sandbox:lost_answer'")
    await harness.bank("UPDATE charges SET method = 'sandbox:lost_answer'")
    with pytest.raises(OutcomePending):
        await harness.payments.refund(refund(payment, 600, "one"))

    # Over `loopback` the second call has settled it.
    standing = "succeeded" if harness.repeats else "unknown"
    assert (await harness.steps())[-1] == ("refund", standing)
    with pytest.raises(RefundTooLarge):
        await harness.payments.refund(refund(payment, 500, "two"))
    assert (await harness.payments.refund(refund(payment, 600, "one"))).refunded_minor == 600


async def test_only_captured_money_is_refunded(harness: PaymentsHarness):
    with pytest.raises(PaymentStateConflict):
        await harness.payments.refund(refund(await harness.authorized(), 1))


# ----------------------------------------------------------------------------------------------------------- events


async def test_each_change_is_emitted_once_in_order(harness: PaymentsHarness):
    payment = await harness.captured(1_000)
    await harness.payments.refund.many([refund(payment, 400, "one"), refund(payment, 600, "two")])

    assert await harness.rows(f"SELECT type, version FROM {EVENTS} WHERE subject_id = $1 ORDER BY id", payment.id) == [
        ("payment.authorized", 2),
        ("payment.captured", 3),
        ("payment.refunded", 4),
        ("payment.refunded", 5),
    ]


# ------------------------------------------------------------------------------------------------ ids that come again

OTHER = 7


async def test_a_payment_of_another_order_with_this_id_is_neither_used_nor_changed(harness: PaymentsHarness):
    authorized, captured = await harness.authorized(), await harness.captured()
    other = harness.authorization(order_id=authorized.order_id, nonce=OTHER)

    for ask in (
        harness.payments.authorize(other),
        harness.payments.charge(harness.charge(order_id=authorized.order_id, nonce=OTHER)),
        harness.payments.capture(capture(authorized, OTHER)),
        harness.payments.void(void(authorized, OTHER)),
        harness.payments.refund(refund(captured, 1, nonce=OTHER)),
    ):
        with pytest.raises(AnotherOrder):
            await ask

    assert await harness.rows("SELECT status FROM payments ORDER BY id") == [("authorized",), ("captured",)]
    assert await harness.taken() == {"authorize": 2, "capture": 1}


@pytest.mark.parametrize("attempt", [1, 2])
async def test_another_order_with_this_id_has_no_attempt_and_no_tombstone(harness: PaymentsHarness, attempt: int):
    failed = await harness.authorized("sandbox:declined")
    request = harness.authorization(order_id=failed.order_id, attempt=attempt, nonce=OTHER)

    for ask in (
        harness.payments.authorize(request),
        harness.payments.charge(harness.charge(order_id=failed.order_id, attempt=attempt, nonce=OTHER)),
        harness.payments.void(void(request, OTHER)),
        harness.payments.capture(capture(request, OTHER)),
        harness.payments.refund(again(refund(failed, 1, nonce=OTHER), attempt=attempt)),
    ):
        with pytest.raises(AnotherOrder):
            await ask

    assert await harness.rows("SELECT count(*) FROM payments") == [(1,)]


@pytest.mark.parametrize("nonce", [0, 2**63 - 1])
async def test_the_nonce_is_in_the_key(harness: PaymentsHarness, nonce: int):
    payment = await harness.payments.charge(harness.charge(nonce=nonce))

    assert await harness.bank("SELECT key FROM operations") == [(f"{payment.order_id}-{nonce:016x}-1-charge",)]


async def test_two_orders_with_one_id_in_a_batch_leave_the_first(harness: PaymentsHarness):
    request = harness.authorization()

    answers = await harness.payments.authorize.many([request, again(request, order_nonce=OTHER)])

    assert statuses(list(answers)) == ["authorized", "AnotherOrder"]
