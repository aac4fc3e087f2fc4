"""The power fails, answers are lost, the bank fails: every payment is settled in the end, and nothing is done twice."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import pytest

from mercato.chassis.contract import ServiceError
from mercato.contracts.payments import OutcomePending, Payment
from mercato.services.payments.charging import KINDS, PLACES
from mercato.testing.injection import FailAt, Inject, Pause, fail
from mercato.testing.tables import EVENTS, connected
from mercato.testing.waiting import until, without_waiting
from services.payments.harness import PaymentsHarness, capture, key, refund, void

PAYMENTS: Final = 200
REFUNDED: Final = 40
QUIET_SECONDS: Final = 5.0


async def prepared(harness: PaymentsHarness, kind: str) -> Callable[[], Awaitable[Payment]]:
    """What asks for an operation of this kind on a payment that is ready for it."""
    if kind == "authorize":
        request = harness.authorization()
        return lambda: harness.payments.authorize(request)
    if kind == "charge":
        charge = harness.charge()
        return lambda: harness.payments.charge(charge)
    if kind == "refund":
        payment = await harness.captured()
        return lambda: harness.payments.refund(refund(payment, 400))
    payment = await harness.authorized()
    if kind == "capture":
        return lambda: harness.payments.capture(capture(payment))
    return lambda: harness.payments.void(void(payment))


REACHED: Final = {
    "authorize": "authorized",
    "charge": "captured",
    "capture": "captured",
    "void": "voided",
    "refund": "partially_refunded",
}


# ------------------------------------------------------------------------------------------------------------- crash


@pytest.mark.parametrize("kind", KINDS)
async def test_after_a_crash_in_any_part_the_next_try_finishes_the_payment(
    harness: PaymentsHarness, inject: Inject, kind: str
):
    for place in PLACES:
        ask = await prepared(harness, kind)
        remove = inject(f"payments.{kind}.{place}", fail)
        with pytest.raises(ServiceError):
            await ask()
        remove()

        assert (await ask()).status == REACHED[kind], place

    assert (await harness.taken())[kind] == len(PLACES)
    assert await harness.differences() == set()


@pytest.mark.parametrize("kind", KINDS)
async def test_an_operation_that_is_not_requested_again_is_finished_by_the_sweeper(
    harness: PaymentsHarness, inject: Inject, kind: str
):
    for place in PLACES[1:]:
        ask = await prepared(harness, kind)
        remove = inject(f"payments.{kind}.{place}", fail)
        with pytest.raises(ServiceError):
            await ask()
        remove()
    await harness.age(hours=1)

    assert await harness.finishing.sweep(QUIET_SECONDS) == len(PLACES) - 2  # the last one was recorded

    assert (await harness.taken())[kind] == len(PLACES) - 1
    assert await harness.rows("SELECT key FROM intents") == []
    assert await harness.rows("SELECT key FROM operations WHERE status <> 'succeeded'") == []
    assert await harness.differences() == set()


@pytest.mark.parametrize("place", PLACES)
async def test_a_sweeper_that_dies_is_taken_over_by_the_next(harness: PaymentsHarness, inject: Inject, place: str):
    remove = inject("payments.authorize.before_call", fail)
    with pytest.raises(ServiceError):
        await harness.authorized()
    remove()
    await harness.age(hours=1)
    remove = inject(f"payments.sweep.{place}", fail)
    with contextlib.suppress(RuntimeError):  # of a call or a record: then each is tried alone, and given up
        await harness.finishing.sweep(QUIET_SECONDS)
    remove()
    await harness.age(hours=1)

    await harness.finishing.sweep(QUIET_SECONDS)

    assert await harness.steps() == [("authorize", "succeeded")]
    assert await harness.taken() == {"authorize": 1}


async def test_a_process_that_hangs_before_it_records_an_answer_is_passed(harness: PaymentsHarness, inject: Inject):
    pause = Pause()
    remove = inject("payments.authorize.after_call", pause)
    request = harness.authorization()
    stuck = asyncio.ensure_future(harness.payments.authorize(request))
    await pause.reached.wait()
    remove()
    await harness.age(hours=1)

    await harness.finishing.sweep(QUIET_SECONDS)
    assert (await harness.payments.authorize(request)).status == "authorized"
    stuck.cancel()
    pause.resume.set()

    assert await harness.taken() == {"authorize": 1}


async def test_a_charge_that_is_recorded_late_changes_nothing(harness: PaymentsHarness, inject: Inject):
    """The process has the answer to a charge, is stopped, and goes on after others have recorded and refunded it."""
    pause = Pause(first_only=True)
    inject("payments.charge.after_call", pause)
    other, request = await harness.another_process(), harness.charge()
    late = asyncio.ensure_future(harness.payments.charge(request))
    await pause.reached.wait()
    refunded = await other.refund(refund(await other.charge(request), 400))
    pause.resume.set()

    assert await late == refunded
    assert await harness.rows(f"SELECT type FROM {EVENTS} ORDER BY id") == [
        ("payment.captured",),
        ("payment.refunded",),
    ]
    assert await harness.rows("SELECT kind FROM transfers ORDER BY kind") == [("charge",), ("refund",)]


async def test_a_process_dies_between_two_records_of_one_batch(harness: PaymentsHarness, inject: Inject):
    """The charges that succeeded are recorded apart from the others: the sweep settles what is left."""
    remove = inject("payments.charge.before_record_commit", FailAt(2))
    if harness.repeats:
        pytest.skip("the second call of each operation settles it")
    answers = await harness.payments.charge.many([harness.charge(), harness.charge("sandbox:declined")])
    remove()
    assert all(isinstance(answer, ServiceError) for answer in answers)
    assert await harness.rows("SELECT status FROM payments ORDER BY order_id") == [("captured",), ("pending",)]
    await harness.age(hours=1)

    await harness.finishing.sweep(QUIET_SECONDS)

    assert await harness.rows("SELECT status FROM payments ORDER BY order_id") == [("captured",), ("failed",)]


async def test_a_process_that_records_after_others_have_moved_on_changes_nothing(
    harness: PaymentsHarness, inject: Inject
):
    """It has the answer to an authorize, sleeps, and wakes up after others have captured the money."""
    pause = Pause(first_only=True)
    inject("payments.authorize.after_call", pause)
    other, request = await harness.another_process(), harness.authorization()
    late = asyncio.ensure_future(harness.payments.authorize(request))
    await pause.reached.wait()
    await other.authorize(request)
    captured = await other.capture(capture(request))
    pause.resume.set()

    assert await late == captured
    assert await harness.rows(f"SELECT type FROM {EVENTS} ORDER BY id") == [
        ("payment.authorized",),
        ("payment.captured",),
    ]


async def test_an_answer_that_never_came_does_not_undo_what_others_know(harness: PaymentsHarness, inject: Inject):
    pause = Pause(first_only=True)
    inject("payments.authorize.after_call", pause)
    other, request = await harness.another_process(), harness.authorization("sandbox:lost_answer")
    late = asyncio.ensure_future(harness.payments.authorize(request))
    await pause.reached.wait()
    await other.authorize(request)
    pause.resume.set()
    await asyncio.gather(late, return_exceptions=True)

    assert await harness.steps() == [("authorize", "succeeded")]


# ----------------------------------------------------------------------------------------------------- lost answers


async def test_an_answer_that_is_lost_is_asked_for_with_the_same_key(harness: PaymentsHarness):
    request = harness.authorization("sandbox:lost_answer")

    with pytest.raises(OutcomePending) as pending:
        await harness.payments.authorize(request)
    # Over `loopback` the second call has settled it.
    is_left = not harness.repeats
    assert await harness.rows("SELECT status, calls FROM intents") == ([("unknown", 1)] if is_left else [])
    assert await harness.rows("SELECT status FROM payments") == [("pending" if is_left else "authorized",)]
    payment = await harness.payments.authorize(request)

    assert (pending.value.retry_after_s, pending.value.operation) == (1, "authorize")
    assert payment.status == "authorized"
    assert await harness.bank("SELECT key FROM operations") == [(key(payment, "authorize"),)]


async def test_money_whose_answer_was_lost_is_taken_once(harness: PaymentsHarness):
    request = harness.authorization("sandbox:lost_answer")
    with pytest.raises(OutcomePending):
        await harness.payments.authorize(request)
    await harness.payments.authorize(request)

    with pytest.raises(OutcomePending):
        await harness.payments.capture(capture(request))
    assert await harness.bank("SELECT captured_minor FROM charges") == [(1_000,)]
    captured = await harness.payments.capture(capture(request))

    assert captured.captured_minor == 1_000
    assert await harness.taken() == {"authorize": 1, "capture": 1}


@pytest.mark.parametrize("method", ["sandbox:lost_answer", "sandbox:error_then_ok"])
async def test_the_sweeper_repeats_until_the_outcome_is_known(harness: PaymentsHarness, method: str):
    with pytest.raises(OutcomePending):
        await harness.authorized(method)
    await harness.age(hours=1)
    await harness.finishing.sweep(QUIET_SECONDS)

    assert await harness.steps() == [("authorize", "succeeded")]
    assert await harness.differences() == set()


async def test_what_takes_long_is_pending_until_it_is_done(harness: PaymentsHarness):
    request = harness.authorization("sandbox:slow:100")
    with pytest.raises(OutcomePending):
        await harness.payments.authorize(request)

    async def authorized() -> bool:
        try:
            return (await harness.payments.authorize(request)).status == "authorized"
        except OutcomePending:
            return False

    await until(authorized)
    assert await harness.differences() == set()


async def test_a_void_first_finds_out_whether_there_is_anything_to_void(harness: PaymentsHarness):
    request = harness.authorization("sandbox:lost_answer")
    with pytest.raises(OutcomePending):
        await harness.payments.authorize(request)

    with pytest.raises(OutcomePending):  # of the void, whose first answer is lost as well
        await harness.payments.void(void(request))
    voided = await harness.payments.void(void(request))

    assert voided.status == "voided"
    assert await harness.bank("SELECT state FROM charges") == [("voided",)]
    assert await harness.differences() == set()


async def test_a_void_of_an_authorize_that_was_never_sent_leaves_nothing_open(harness: PaymentsHarness, inject: Inject):
    request = harness.authorization()
    remove = inject("payments.authorize.before_call", fail)
    with pytest.raises(ServiceError):
        await harness.payments.authorize(request)
    remove()

    assert (await harness.payments.void(void(request))).status == "voided"
    assert await harness.bank("SELECT state FROM charges") == [("voided",)]


# --------------------------------------------------------------------------------------------------------- the sweeper


async def test_an_operation_in_progress_in_another_process_is_left_alone(harness: PaymentsHarness, inject: Inject):
    remove = inject("payments.authorize.after_call", fail)
    with pytest.raises(ServiceError):
        await harness.authorized()
    remove()

    assert await harness.finishing.sweep(QUIET_SECONDS) == 0
    await harness.age(hours=1)
    assert await harness.finishing.sweep(QUIET_SECONDS) == 1
    assert await harness.finishing.sweep(QUIET_SECONDS) == 0


async def test_two_sweepers_do_not_take_the_same_operation(harness: PaymentsHarness, inject: Inject):
    remove = inject("payments.authorize.before_call", fail)
    with pytest.raises(ServiceError):
        await harness.authorized()
    remove()
    await harness.age(hours=1)
    inject("payments.sweep.before_call", fail)

    assert await harness.finishing.sweep(QUIET_SECONDS) == 1  # it dies with the lease in its hand
    assert await harness.finishing.sweep(QUIET_SECONDS) == 0


@pytest.mark.parametrize("locked", ["payments", "intents"])
async def test_a_sweep_leaves_out_what_another_transaction_has_locked(
    harness: PaymentsHarness, inject: Inject, locked: str
):
    remove = inject("payments.authorize.before_call", fail)
    for _ in range(2):
        with pytest.raises(ServiceError):
            await harness.authorized()
    remove()
    await harness.age(hours=1)
    column = "id" if locked == "payments" else "payment_id"
    [(first,), _] = await harness.rows("SELECT id FROM payments ORDER BY id")

    async with connected(harness.dsns["payments"]) as holder, holder.transaction():
        await holder.execute(f"SELECT 1 FROM {locked} WHERE {column} = $1 FOR UPDATE", first)
        sweep = harness.finishing.sweep(QUIET_SECONDS)
        assert await without_waiting(harness.dsns["payments"], sweep) == 1

    assert await harness.rows("SELECT status FROM payments ORDER BY id") == [("pending",), ("authorized",)]


async def test_an_operation_that_cannot_be_recorded_does_not_hold_back_the_others(
    harness: PaymentsHarness, inject: Inject
):
    payments = [await harness.authorized() for _ in range(3)]
    remove = inject("payments.capture.before_call", fail)
    with pytest.raises(ServiceError):
        await harness.payments.capture(capture(payments[1]))
    await harness.payments.capture.many([capture(p) for p in (payments[0], payments[2])])
    remove()
    await harness.rows("UPDATE payments SET amount_minor = 500, authorized_minor = 500 WHERE id = $1", payments[1].id)
    await harness.age(hours=1)

    await harness.finishing.sweep(QUIET_SECONDS)

    assert await harness.rows("SELECT status FROM payments ORDER BY id") == [
        ("captured",),
        ("authorized",),
        ("captured",),
    ]


async def test_a_key_is_looked_up_when_the_provider_may_have_forgotten_it(harness: PaymentsHarness, inject: Inject):
    """The bank has done the first and has not received the second."""
    for place in ("after_call", "before_call"):
        remove = inject(f"payments.authorize.{place}", fail)
        with pytest.raises(ServiceError):
            await harness.authorized()
        remove()
    calls = await harness.bank("SELECT key, calls FROM operations")
    await harness.age(hours=24)

    assert await harness.finishing.sweep(QUIET_SECONDS) == 2

    assert await harness.steps() == [("authorize", "succeeded")] * 2
    assert [row for row in await harness.bank("SELECT key, calls FROM operations") if row in calls] == calls
    assert await harness.taken() == {"authorize": 2}


# ------------------------------------------------------------------------------------------------------------- storm


@pytest.mark.options(sandbox_failure_rate=0.3)
async def test_with_frequent_failures_every_payment_is_settled_and_every_card_is_charged_once(harness: PaymentsHarness):
    requests = [harness.authorization() for _ in range(PAYMENTS // 2)]
    await _until_all(harness, harness.payments.authorize.many, requests)
    payments = await _until_all(harness, harness.payments.capture.many, [capture(r) for r in requests])
    charges = [harness.charge() for _ in range(PAYMENTS // 2)]
    payments += await _until_all(harness, harness.payments.charge.many, charges)
    await _until_all(harness, harness.payments.refund.many, [refund(p, 250) for p in payments[:: PAYMENTS // REFUNDED]])

    assert {p.status for p in payments} == {"captured"}
    assert await harness.bank(
        """
        SELECT count(*), count(DISTINCT order_id) FROM operations
         WHERE kind IN ('capture', 'charge') AND status = 'succeeded'
        """
    ) == [(PAYMENTS, PAYMENTS)]
    assert await harness.bank("SELECT count(*), sum(captured_minor), sum(refunded_minor) FROM charges") == [
        (PAYMENTS, PAYMENTS * 1_000, REFUNDED * 250)
    ]
    assert await harness.rows("SELECT balance_minor FROM accounts WHERE account = 'provider'") == [
        (PAYMENTS * 1_000 - REFUNDED * 250,)
    ]
    assert await harness.differences() == set()
    assert await harness.violations() == {}


async def _until_all(
    harness: PaymentsHarness, call: Callable[..., Awaitable[object]], requests: Sequence[object]
) -> list[Payment]:
    """Asks again for what is pending, and lets the sweeper do the same."""
    done: dict[int, Payment] = {}
    while left := [n for n in range(len(requests)) if n not in done]:
        answers, _ = await asyncio.gather(call([requests[n] for n in left]), harness.finishing.sweep(0.0))
        assert isinstance(answers, list)
        for n, answer in zip(left, answers, strict=True):
            if isinstance(answer, Payment):
                done[n] = answer
            else:
                assert isinstance(answer, OutcomePending), answer
    return [done[n] for n in range(len(requests))]


@pytest.mark.options(payments_sweep_seconds=0.05, payments_reconcile_seconds=0.05)
async def test_the_loops_run_by_themselves(harness: PaymentsHarness):
    with contextlib.suppress(OutcomePending):  # on a slow machine the sweep has the result before the request answers
        await harness.authorized("sandbox:error_then_ok")

    async def settled() -> bool:
        return await harness.rows("SELECT after > 0 FROM reconciliation") == [(True,)]

    await until(settled)
    assert await harness.steps() == [("authorize", "succeeded")]
