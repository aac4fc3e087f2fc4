"""Charge: authorize and capture in one operation, with the bank's own ledger as the witness."""

from __future__ import annotations

import asyncio

import pytest

from mercato.chassis.contract import DeadlineExceeded, InvalidRequest, ServiceError
from mercato.contracts.payments import (
    AnotherPaymentLive,
    AttemptReused,
    ChargePayment,
    OutcomePending,
    Payment,
    PaymentStateConflict,
)
from mercato.testing.actors import SERVICE
from mercato.testing.injection import Inject, Pause, fail
from mercato.testing.tables import EVENTS
from mercato.testing.waiting import until_true
from services.payments.harness import PaymentsHarness, again, capture, key, refund, settled, void

NEIGHBOURS = 8
MANY = 20
WAITS_SECONDS = 2.0


def statuses(answers: object) -> list[str]:
    assert isinstance(answers, (list, tuple))
    return [a.status if isinstance(a, Payment) else type(a).__name__ for a in answers]


async def begun(
    harness: PaymentsHarness, inject: Inject, place: str = "after_call", method: str = "sandbox:ok"
) -> ChargePayment:
    """The request of a payment whose charge is an intent; the process died before or after the bank took the money."""
    request = harness.charge(method)
    remove = inject(f"payments.charge.{place}", fail)
    with pytest.raises(ServiceError):
        await harness.payments.charge(request)
    remove()
    return request


# ------------------------------------------------------------------------------------------------------------ one card


async def test_a_charged_payment_is_captured_by_one_operation(harness: PaymentsHarness):
    payment = await harness.payments.charge(harness.charge(amount=1_250))

    assert (payment.status, payment.code, payment.version) == ("captured", None, 2)
    assert (payment.authorized_minor, payment.captured_minor, payment.refunded_minor) == (1_250, 1_250, 0)
    assert payment.updated_at >= payment.created_at
    assert await harness.rows("SELECT kind, key, amount_minor, currency, status, calls FROM operations") == [
        ("charge", key(payment, "charge"), 1_250, "EUR", "succeeded", 1)
    ]
    assert await harness.rows("SELECT count(*) FROM intents") == [(0,)]
    assert await harness.rows("SELECT kind, debit, credit, amount_minor, currency FROM transfers") == [
        ("charge", "provider", "sales", 1_250, "EUR")
    ]
    assert await harness.rows("SELECT account, balance_minor FROM accounts ORDER BY account") == [
        ("provider", 1_250),
        ("sales", -1_250),
    ]
    assert await harness.rows(f"SELECT type, version FROM {EVENTS}") == [("payment.captured", 2)]
    assert await harness.bank("SELECT order_id, captured_minor, state FROM charges") == [
        (payment.order_id, 1_250, "captured")
    ]
    assert await harness.differences() == set()


async def test_a_repeated_charge_answers_with_the_payment_as_it_is(harness: PaymentsHarness):
    request = harness.charge()

    first = await harness.payments.charge(request)
    other = await harness.payments.charge(request)

    assert other == first
    with pytest.raises(AttemptReused):
        await harness.payments.charge(again(request, amount_minor=900, method="sandbox:declined"))
    refunded = await harness.payments.refund(refund(first, 400))
    assert await harness.payments.charge(request) == refunded
    assert await harness.taken() == {"charge": 1, "refund": 1}


@pytest.mark.parametrize(
    ("method", "code"),
    [
        ("sandbox:declined", "card_declined"),
        ("sandbox:insufficient_funds", "insufficient_funds"),
        ("sandbox:capture_expired", "authorization_expired"),
    ],
)
async def test_a_declined_card_is_an_answer_and_the_next_attempt_is_open(
    harness: PaymentsHarness, method: str, code: str
):
    request = harness.charge(method)

    failed = await harness.payments.charge(request)
    next_one = await harness.payments.charge(again(request, attempt=2, method="sandbox:ok"))

    assert (failed.status, failed.code, failed.captured_minor) == ("failed", code, 0)
    assert await harness.payments.charge(request) == failed
    assert (next_one.status, next_one.attempt) == ("captured", 2)
    assert await harness.rows("SELECT status, code, provider_id IS NULL FROM operations ORDER BY began_at") == [
        ("declined", code, True),
        ("succeeded", None, False),
    ]


async def test_a_charge_of_nothing_is_captured_without_the_provider(harness: PaymentsHarness):
    payment = await harness.charged(amount=0)

    assert (payment.status, payment.captured_minor) == ("captured", 0)
    assert await harness.rows(f"SELECT type FROM {EVENTS}") == [("payment.captured",)]
    assert await harness.bank("SELECT key FROM operations") == []
    for table in ("intents", "operations", "transfers", "accounts"):
        assert await harness.rows(f"SELECT count(*) FROM {table}") == [(0,)]


async def test_charged_money_is_refunded(harness: PaymentsHarness):
    payment = await harness.charged(amount=1_000)

    part = await harness.payments.refund(refund(payment, 400, "one"))
    rest = await harness.payments.refund(refund(payment, 600, "two"))

    assert (part.status, rest.status) == ("partially_refunded", "refunded")
    assert await harness.rows("SELECT account, balance_minor FROM accounts ORDER BY account") == [
        ("provider", 0),
        ("refunds", 1_000),
        ("sales", -1_000),
    ]
    assert await harness.differences() == set()


async def test_an_order_has_one_live_payment(harness: PaymentsHarness):
    request = harness.charge()
    await harness.payments.charge(request)

    with pytest.raises(AnotherPaymentLive):
        await harness.payments.charge(again(request, attempt=2))
    assert await harness.bank("SELECT count(*) FROM charges") == [(1,)]


async def test_a_method_without_a_provider_is_refused_and_leaves_nothing(harness: PaymentsHarness):
    good, bad = await harness.payments.charge.many([harness.charge(), harness.charge("paper:ok")])

    assert isinstance(good, Payment)
    assert isinstance(bad, InvalidRequest)
    assert await harness.rows("SELECT id FROM payments") == [(good.id,)]


# ---------------------------------------------------------------------------------------------------- a batch of them


async def test_every_request_of_a_batch_gets_its_own_answer(harness: PaymentsHarness):
    charged, begun_with_authorize = await harness.charged(), await harness.authorized()
    requests = [harness.charge(amount=100 + n) for n in range(NEIGHBOURS)]
    requests[1] = harness.charge("sandbox:declined")
    requests[2] = harness.charge(amount=0)
    requests[3] = requests[0]
    requests[4] = again(requests[5], attempt=2)
    requests[6] = harness.charge("sandbox:lost_answer")
    requests.append(harness.charge(order_id=charged.order_id))
    requests.append(harness.charge(order_id=begun_with_authorize.order_id))
    requests.append(harness.charge(order_id=charged.order_id, nonce=7))

    answers = await harness.payments.charge.many(requests)

    assert statuses(answers) == [
        *("captured", "failed", "captured", "captured", "AnotherPaymentLive", "captured", "OutcomePending", "captured"),
        *("captured", "captured", "AnotherOrder"),
    ]
    assert answers[0] == answers[3]
    assert await harness.bank("SELECT order_id, count(*) FROM charges GROUP BY 1 HAVING count(*) > 1") == []


async def test_balances_of_a_batch_are_summed_by_currency(harness: PaymentsHarness):
    requests = [again(harness.charge(amount=100 + n), currency=("EUR", "USD")[n % 2]) for n in range(4)]

    await harness.payments.charge.many(requests)

    assert await harness.rows("SELECT account, currency, balance_minor FROM accounts ORDER BY 1, 2") == [
        ("provider", "EUR", 202),
        ("provider", "USD", 204),
        ("sales", "EUR", -202),
        ("sales", "USD", -204),
    ]


# ------------------------------------------------------------------------------------------------------- at one moment


async def test_one_attempt_from_two_processes_at_once_is_charged_once(harness: PaymentsHarness):
    other = await harness.another_process()
    requests = [harness.charge() for _ in range(MANY)]

    ours, theirs = await asyncio.gather(
        harness.payments.charge.many(requests), other.charge.many(list(reversed(requests)))
    )

    assert statuses(ours) == statuses(theirs) == ["captured"] * MANY
    assert list(ours) == list(reversed(theirs))
    assert await harness.bank("SELECT count(*), count(DISTINCT order_id) FROM charges") == [(MANY, MANY)]
    assert await harness.differences() == set()


async def test_two_attempts_at_the_same_moment_leave_one_payment(harness: PaymentsHarness):
    other, request = await harness.another_process(), harness.charge()

    answers = await asyncio.gather(
        harness.payments.charge(request), other.charge(again(request, attempt=2)), return_exceptions=True
    )

    assert sorted(type(answer).__name__ for answer in answers) == ["AnotherPaymentLive", "Payment"]
    assert await harness.bank("SELECT count(*) FROM charges") == [(1,)]


async def test_of_charge_and_void_at_the_same_moment_both_answers_agree(harness: PaymentsHarness):
    other = await harness.another_process()
    requests = [harness.charge() for _ in range(MANY)]

    charges, voids = await asyncio.gather(
        harness.payments.charge.many(requests), other.void.many([void(request) for request in reversed(requests)])
    )

    assert set(statuses(charges)) <= {"captured", "voided"}
    assert statuses(charges) == statuses(voids)[::-1]
    captured = statuses(charges).count("captured")
    assert await harness.bank("SELECT count(*) FROM charges WHERE state = 'captured'") == [(captured,)]
    assert await harness.differences() == set()


async def test_a_result_that_two_processes_have_is_recorded_once(harness: PaymentsHarness, inject: Inject):
    """Both have called the bank with the same key, and record at the same moment: in opposite orders of payments."""
    requests = [harness.charge() for _ in range(MANY)]
    other = await harness.another_process()
    arrived = asyncio.Event()
    waiting = 0

    async def meet(_point: str) -> None:
        nonlocal waiting
        waiting += 1
        if waiting >= 2:
            arrived.set()
        await arrived.wait()

    remove = inject("payments.charge.after_call", meet)
    ours, theirs = await asyncio.gather(
        harness.payments.charge.many(requests), other.charge.many(list(reversed(requests)))
    )
    remove()

    assert statuses(ours) == statuses(theirs) == ["captured"] * MANY
    assert await harness.rows("SELECT count(*), sum(amount_minor)::bigint FROM transfers") == [(MANY, MANY * 1_000)]
    assert await harness.rows("SELECT balance_minor FROM accounts WHERE account = 'provider'") == [(MANY * 1_000,)]
    assert await harness.rows(f"SELECT count(*) FROM {EVENTS}") == [(MANY,)]


# ------------------------------------------------------------------------------------------------------------- void


async def test_a_tombstone_answers_a_charge_that_arrives_after_the_void(harness: PaymentsHarness):
    request = harness.charge()

    tombstone = await harness.payments.void(void(request))

    assert await harness.payments.charge(request) == tombstone
    assert (tombstone.status, tombstone.captured_minor) == ("voided", 0)
    assert await harness.bank("SELECT count(*) FROM operations") == [(0,)]


@pytest.mark.parametrize("place", ["before_call", "after_call"])
async def test_a_void_settles_an_open_charge_by_its_key_and_what_was_taken_stays(
    harness: PaymentsHarness, inject: Inject, place: str
):
    payment = await begun(harness, inject, place)

    captured = await harness.payments.void(void(payment))

    assert captured.status == "captured"
    assert await harness.bank("SELECT key, status FROM operations") == [(key(payment, "charge"), "succeeded")]
    assert await harness.steps() == [("charge", "succeeded")]


async def test_a_void_of_an_open_charge_that_is_declined_leaves_a_failed_payment(
    harness: PaymentsHarness, inject: Inject
):
    payment = await begun(harness, inject, method="sandbox:declined")

    assert (await harness.payments.void(void(payment))).status == "failed"
    assert await harness.bank("SELECT count(*) FROM charges") == [(0,)]


async def test_a_void_of_a_charge_whose_result_is_not_known_is_pending(harness: PaymentsHarness, inject: Inject):
    payment = await begun(harness, inject, method="sandbox:slow:60000")

    with pytest.raises(OutcomePending):
        await harness.payments.void(void(payment))
    assert await harness.steps() == [("charge", "unknown")]


# ------------------------------------------------------------------------------------------- authorize and charge


async def test_a_payment_that_was_authorized_is_captured_by_a_charge(harness: PaymentsHarness):
    payment = await harness.authorized()

    charged = await harness.payments.charge(harness.charge(order_id=payment.order_id))

    assert (charged.status, charged.id) == ("captured", payment.id)
    assert await harness.taken() == {"authorize": 1, "capture": 1}


async def test_a_charge_settles_an_open_authorize_first(harness: PaymentsHarness, inject: Inject):
    request = harness.authorization()
    remove = inject("payments.authorize.after_call", fail)
    with pytest.raises(ServiceError):
        await harness.payments.authorize(request)
    remove()

    charged = await harness.payments.charge(harness.charge(order_id=request.order_id))

    assert charged.status == "captured"
    assert await harness.taken() == {"authorize": 1, "capture": 1}


async def test_an_authorize_of_an_open_charge_settles_the_charge(harness: PaymentsHarness, inject: Inject):
    payment = await begun(harness, inject)

    answer = await harness.payments.authorize(harness.authorization(order_id=payment.order_id))

    assert answer.status == "captured"
    assert await harness.payments.capture(capture(payment)) == answer
    assert await harness.taken() == {"charge": 1}


async def test_a_voided_payment_is_not_charged(harness: PaymentsHarness):
    voided = await harness.payments.void(void(await harness.authorized()))

    assert await harness.payments.charge(harness.charge(order_id=voided.order_id)) == voided
    with pytest.raises(PaymentStateConflict):
        await harness.payments.refund(refund(voided, 1))


async def test_a_process_that_dies_before_its_intent_is_committed_has_not_called_the_provider(
    harness: PaymentsHarness, inject: Inject
):
    payment = await begun(harness, inject, "before_intent_commit")

    assert (await harness.payments.void(void(payment))).status == "voided"
    assert await harness.bank("SELECT key FROM operations") == []


# ------------------------------------------------------------------------------------------------------ much later


async def test_a_charge_that_is_repeated_after_30_days_answers_the_same_and_moves_no_money(harness: PaymentsHarness):
    request = harness.charge()
    first = await harness.payments.charge(request)
    given_back = await harness.payments.refund(refund(first, 400))
    await harness.age_everything(days=30)

    charged = await harness.payments.charge(request)
    refunded = await harness.payments.refund(refund(first, 400))

    assert charged == refunded
    assert (charged.captured_minor, charged.refunded_minor) == (given_back.captured_minor, given_back.refunded_minor)
    assert await harness.taken() == {"charge": 1, "refund": 1}
    assert await harness.rows("SELECT count(*) FROM transfers") == [(2,)]


@pytest.mark.parametrize("hours", [22, 24])
async def test_the_key_of_an_open_charge_is_looked_up_once_the_provider_may_have_forgotten_it(
    harness: PaymentsHarness, inject: Inject, hours: int
):
    payment = await begun(harness, inject)
    calls = await harness.bank("SELECT calls FROM operations")
    await harness.age(hours=hours)

    assert (await harness.payments.charge(harness.charge(order_id=payment.order_id))).status == "captured"

    is_called = (await harness.bank("SELECT calls FROM operations")) != calls
    assert is_called == (hours < 23)
    assert await harness.taken() == {"charge": 1}


async def test_a_charge_whose_caller_timed_out_is_made_once(harness: PaymentsHarness, inject: Inject):
    """The bank has taken the money when the caller stops waiting; with its key the charge gets its result."""
    pause = Pause()
    remove = inject("payments.charge.after_call", pause)
    request = harness.charge()
    with harness.acting(SERVICE, seconds=WAITS_SECONDS):
        first = asyncio.ensure_future(harness.payments.charge(request))
    await until_true(lambda: pause.reached.is_set() or first.done())
    assert pause.reached.is_set(), "it had begun when its caller stopped waiting"
    with pytest.raises(DeadlineExceeded):
        await first
    assert await harness.taken() == {"charge": 1}
    remove()
    pause.resume.set()

    (payment,) = await settled(harness.payments.charge.many, [request])

    assert payment.status == "captured"
    assert await harness.taken() == {"charge": 1}
    assert await harness.differences() == set()
