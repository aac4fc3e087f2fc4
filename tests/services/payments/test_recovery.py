"""The power fails, answers are lost, the bank fails: every payment is settled in the end, and nothing is done twice."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import pytest

from mercato.chassis.contract import ServiceError
from mercato.chassis.observability.faults import Fault
from mercato.contracts.payments import OutcomePending, Payment
from mercato.services.payments.charging import KINDS, PLACES
from mercato.testing.harness import Rig
from mercato.testing.outbox import EVENTS
from mercato.testing.waiting import without_waiting
from services.payments.world import World, capture, connected, key, refund, void

Plant = Callable[[str, Fault], Callable[[], None]]

PAYMENTS: Final = 200
REFUNDED: Final = 40
QUIET_SECONDS: Final = 5.0


async def fail(_point: str) -> None:
    raise RuntimeError("the power fails here")


async def prepared(world: World, kind: str) -> Callable[[], Awaitable[Payment]]:
    """What asks for an operation of this kind on a payment that is ready for it."""
    if kind == "authorize":
        request = world.authorization()
        return lambda: world.payments.authorize(request)
    if kind == "charge":
        charge = world.charge()
        return lambda: world.payments.charge(charge)
    if kind == "refund":
        payment = await world.captured()
        return lambda: world.payments.refund(refund(payment, 400))
    payment = await world.authorized()
    if kind == "capture":
        return lambda: world.payments.capture(capture(payment))
    return lambda: world.payments.void(void(payment))


REACHED: Final = {
    "authorize": "authorized",
    "charge": "captured",
    "capture": "captured",
    "void": "voided",
    "refund": "partially_refunded",
}


# ------------------------------------------------------------------------------------------------------------- crash


@pytest.mark.parametrize("kind", KINDS)
async def test_whatever_part_the_power_fails_in_the_next_try_finishes_it(world: World, plant: Plant, kind: str):
    for place in PLACES:
        ask = await prepared(world, kind)
        remove = plant(f"payments.{kind}.{place}", fail)
        with pytest.raises(ServiceError):
            await ask()
        remove()

        assert (await ask()).status == REACHED[kind], place

    assert (await world.taken())[kind] == len(PLACES)
    assert await world.differences() == set()


@pytest.mark.parametrize("kind", KINDS)
async def test_what_nobody_asks_for_again_the_sweeper_finishes(world: World, plant: Plant, kind: str):
    for place in PLACES[1:]:
        ask = await prepared(world, kind)
        remove = plant(f"payments.{kind}.{place}", fail)
        with pytest.raises(ServiceError):
            await ask()
        remove()
    await world.age(hours=1)

    assert await world.charging.sweep(QUIET_SECONDS) == len(PLACES) - 2  # the last one was recorded

    assert (await world.taken())[kind] == len(PLACES) - 1
    assert await world.ours("SELECT key FROM intents") == []
    assert await world.ours("SELECT key FROM operations WHERE status <> 'succeeded'") == []
    assert await world.differences() == set()


@pytest.mark.parametrize("place", PLACES)
async def test_a_sweeper_that_dies_is_taken_over_by_the_next(world: World, plant: Plant, place: str):
    remove = plant("payments.authorize.before_call", fail)
    with pytest.raises(ServiceError):
        await world.authorized()
    remove()
    await world.age(hours=1)
    remove = plant(f"payments.sweep.{place}", fail)
    with contextlib.suppress(RuntimeError):  # of a call or a record: then each is tried alone, and given up
        await world.charging.sweep(QUIET_SECONDS)
    remove()
    await world.age(hours=1)

    await world.charging.sweep(QUIET_SECONDS)

    assert await world.steps() == [("authorize", "succeeded")]
    assert await world.taken() == {"authorize": 1}


async def test_a_process_that_hangs_with_the_answer_in_its_hand_is_passed(world: World, plant: Plant):
    hanging, over = asyncio.Event(), asyncio.Event()

    async def hang(_point: str) -> None:
        hanging.set()
        await over.wait()

    remove = plant("payments.authorize.after_call", hang)
    request = world.authorization()
    stuck = asyncio.ensure_future(world.payments.authorize(request))
    await hanging.wait()
    remove()
    await world.age(hours=1)

    await world.charging.sweep(QUIET_SECONDS)
    assert (await world.payments.authorize(request)).status == "authorized"
    stuck.cancel()
    over.set()

    assert await world.taken() == {"authorize": 1}


async def test_a_charge_that_is_recorded_late_changes_nothing(world: World, plant: Plant):
    """The process has the answer to a charge, is stopped, and goes on after others have recorded and refunded it."""
    reached, wake = asyncio.Event(), asyncio.Event()

    async def sleep(_point: str) -> None:
        if not reached.is_set():
            reached.set()
            await wake.wait()

    plant("payments.charge.after_call", sleep)
    other, request = await world.another_process(), world.charge()
    late = asyncio.ensure_future(world.payments.charge(request))
    await reached.wait()
    refunded = await other.refund(refund(await other.charge(request), 400))
    wake.set()

    assert await late == refunded
    assert await world.ours(f"SELECT type FROM {EVENTS} ORDER BY id") == [("payment.captured",), ("payment.refunded",)]
    assert await world.ours("SELECT kind FROM transfers ORDER BY kind") == [("charge",), ("refund",)]


async def test_a_process_dies_between_two_records_of_one_batch(world: World, plant: Plant):
    """The charges that succeeded are recorded apart from the others: the sweep settles what is left."""
    times = 0

    async def fail_at_the_second(_point: str) -> None:
        nonlocal times
        times += 1
        if times == 2:
            raise RuntimeError("the power fails here")

    remove = plant("payments.charge.before_record_commit", fail_at_the_second)
    if world.rig.transport == "loopback":
        pytest.skip("the second call of each operation settles it")
    answers = await world.payments.charge.many([world.charge(), world.charge("sandbox:declined")])
    remove()
    assert all(isinstance(answer, ServiceError) for answer in answers)
    assert await world.ours("SELECT status FROM payments ORDER BY order_id") == [("captured",), ("pending",)]
    await world.age(hours=1)

    await world.charging.sweep(QUIET_SECONDS)

    assert await world.ours("SELECT status FROM payments ORDER BY order_id") == [("captured",), ("failed",)]


async def test_a_zombie_that_records_late_changes_nothing(world: World, plant: Plant):
    """It has the answer to an authorize, sleeps, and wakes up after others have captured the money."""
    reached, wake = asyncio.Event(), asyncio.Event()

    async def sleep(_point: str) -> None:
        if not reached.is_set():
            reached.set()
            await wake.wait()

    plant("payments.authorize.after_call", sleep)
    other, request = await world.another_process(), world.authorization()
    zombie = asyncio.ensure_future(world.payments.authorize(request))
    await reached.wait()
    await other.authorize(request)
    captured = await other.capture(capture(request))
    wake.set()

    assert await zombie == captured
    assert await world.ours(f"SELECT type FROM {EVENTS} ORDER BY id") == [
        ("payment.authorized",),
        ("payment.captured",),
    ]


async def test_an_answer_that_never_came_does_not_undo_what_others_know(world: World, plant: Plant):
    reached, wake = asyncio.Event(), asyncio.Event()

    async def sleep(_point: str) -> None:
        if not reached.is_set():
            reached.set()
            await wake.wait()

    plant("payments.authorize.after_call", sleep)
    other, request = await world.another_process(), world.authorization("sandbox:lost_answer")
    zombie = asyncio.ensure_future(world.payments.authorize(request))
    await reached.wait()
    await other.authorize(request)
    wake.set()
    await asyncio.gather(zombie, return_exceptions=True)

    assert await world.steps() == [("authorize", "succeeded")]


# ----------------------------------------------------------------------------------------------------- lost answers


async def test_an_answer_that_is_lost_is_asked_for_with_the_same_key(world: World):
    request = world.authorization("sandbox:lost_answer")

    with pytest.raises(OutcomePending) as pending:
        await world.payments.authorize(request)
    # Over `loopback` the second call has settled it.
    is_left = world.rig.transport == "local"
    assert await world.ours("SELECT status, calls FROM intents") == ([("unknown", 1)] if is_left else [])
    assert await world.ours("SELECT status FROM payments") == [("pending" if is_left else "authorized",)]
    payment = await world.payments.authorize(request)

    assert (pending.value.retry_after_s, pending.value.operation) == (1, "authorize")
    assert payment.status == "authorized"
    assert await world.bank("SELECT key FROM operations") == [(key(payment, "authorize"),)]


async def test_money_whose_answer_was_lost_is_taken_once(world: World):
    request = world.authorization("sandbox:lost_answer")
    with pytest.raises(OutcomePending):
        await world.payments.authorize(request)
    await world.payments.authorize(request)

    with pytest.raises(OutcomePending):
        await world.payments.capture(capture(request))
    assert await world.bank("SELECT captured_minor FROM charges") == [(1_000,)]
    captured = await world.payments.capture(capture(request))

    assert captured.captured_minor == 1_000
    assert await world.taken() == {"authorize": 1, "capture": 1}


@pytest.mark.parametrize("method", ["sandbox:lost_answer", "sandbox:error_then_ok"])
async def test_the_sweeper_asks_until_it_knows(world: World, method: str):
    with pytest.raises(OutcomePending):
        await world.authorized(method)
    await world.age(hours=1)
    await world.charging.sweep(QUIET_SECONDS)

    assert await world.steps() == [("authorize", "succeeded")]
    assert await world.differences() == set()


async def test_what_takes_long_is_pending_until_it_is_done(world: World):
    request = world.authorization("sandbox:slow:100")
    with pytest.raises(OutcomePending):
        await world.payments.authorize(request)

    async def authorized() -> bool:
        try:
            return (await world.payments.authorize(request)).status == "authorized"
        except OutcomePending:
            return False

    await world.until(authorized)
    assert await world.differences() == set()


async def test_a_void_first_finds_out_whether_there_is_anything_to_void(world: World):
    request = world.authorization("sandbox:lost_answer")
    with pytest.raises(OutcomePending):
        await world.payments.authorize(request)

    with pytest.raises(OutcomePending):  # of the void, whose first answer is lost as well
        await world.payments.void(void(request))
    voided = await world.payments.void(void(request))

    assert voided.status == "voided"
    assert await world.bank("SELECT state FROM charges") == [("voided",)]
    assert await world.differences() == set()


async def test_a_void_of_an_authorize_that_was_never_sent_leaves_nothing_open(world: World, plant: Plant):
    request = world.authorization()
    remove = plant("payments.authorize.before_call", fail)
    with pytest.raises(ServiceError):
        await world.payments.authorize(request)
    remove()

    assert (await world.payments.void(void(request))).status == "voided"
    assert await world.bank("SELECT state FROM charges") == [("voided",)]


# --------------------------------------------------------------------------------------------------------- the sweeper


async def test_an_operation_that_somebody_is_busy_with_is_left_alone(world: World, plant: Plant):
    remove = plant("payments.authorize.after_call", fail)
    with pytest.raises(ServiceError):
        await world.authorized()
    remove()

    assert await world.charging.sweep(QUIET_SECONDS) == 0
    await world.age(hours=1)
    assert await world.charging.sweep(QUIET_SECONDS) == 1
    assert await world.charging.sweep(QUIET_SECONDS) == 0


async def test_two_sweepers_do_not_ask_for_the_same(world: World, plant: Plant):
    remove = plant("payments.authorize.before_call", fail)
    with pytest.raises(ServiceError):
        await world.authorized()
    remove()
    await world.age(hours=1)
    plant("payments.sweep.before_call", fail)

    assert await world.charging.sweep(QUIET_SECONDS) == 1  # it dies with the lease in its hand
    assert await world.charging.sweep(QUIET_SECONDS) == 0


@pytest.mark.parametrize("locked", ["payments", "intents"])
async def test_a_sweep_leaves_out_what_another_transaction_has_locked(world: World, plant: Plant, locked: str):
    remove = plant("payments.authorize.before_call", fail)
    for _ in range(2):
        with pytest.raises(ServiceError):
            await world.authorized()
    remove()
    await world.age(hours=1)
    column = "id" if locked == "payments" else "payment_id"
    [(first,), _] = await world.ours("SELECT id FROM payments ORDER BY id")

    async with connected(world.rig.dsns["payments"]) as holder, holder.transaction():
        await holder.execute(f"SELECT 1 FROM {locked} WHERE {column} = $1 FOR UPDATE", first)
        sweep = world.charging.sweep(QUIET_SECONDS)
        assert await without_waiting(world.rig.dsns["payments"], sweep) == 1

    assert await world.ours("SELECT status FROM payments ORDER BY id") == [("pending",), ("authorized",)]


async def test_an_operation_that_cannot_be_recorded_does_not_hold_back_the_others(world: World, plant: Plant):
    payments = [await world.authorized() for _ in range(3)]
    remove = plant("payments.capture.before_call", fail)
    with pytest.raises(ServiceError):
        await world.payments.capture(capture(payments[1]))
    await world.payments.capture.many([capture(p) for p in (payments[0], payments[2])])
    remove()
    await world.ours("UPDATE intents SET amount_minor = 2000 WHERE payment_id = $1", payments[1].id)
    await world.age(hours=1)

    await world.charging.sweep(QUIET_SECONDS)

    assert await world.ours("SELECT status FROM payments ORDER BY id") == [
        ("captured",),
        ("authorized",),
        ("captured",),
    ]


async def test_a_key_is_looked_up_when_the_provider_may_have_forgotten_it(world: World, plant: Plant):
    """The bank has done the first and has never heard of the second."""
    for place in ("after_call", "before_call"):
        remove = plant(f"payments.authorize.{place}", fail)
        with pytest.raises(ServiceError):
            await world.authorized()
        remove()
    calls = await world.bank("SELECT key, calls FROM operations")
    await world.age(hours=24)

    assert await world.charging.sweep(QUIET_SECONDS) == 2

    assert await world.steps() == [("authorize", "succeeded")] * 2
    assert [row for row in await world.bank("SELECT key, calls FROM operations") if row in calls] == calls
    assert await world.taken() == {"authorize": 2}


# ------------------------------------------------------------------------------------------------------------- storm


async def test_in_a_storm_every_payment_is_settled_and_every_card_is_charged_once(rig: Rig):
    rig.options["MERCATO_SANDBOX_FAILURE_RATE"] = "0.3"
    world = World(rig)
    await world.open()
    with world.calling():
        requests = [world.authorization() for _ in range(PAYMENTS // 2)]
        await _until_all(world, world.payments.authorize.many, requests)
        payments = await _until_all(world, world.payments.capture.many, [capture(r) for r in requests])
        charges = [world.charge() for _ in range(PAYMENTS // 2)]
        payments += await _until_all(world, world.payments.charge.many, charges)
        await _until_all(world, world.payments.refund.many, [refund(p, 250) for p in payments[:: PAYMENTS // REFUNDED]])

    assert {p.status for p in payments} == {"captured"}
    assert await world.bank(
        """
        SELECT count(*), count(DISTINCT order_id) FROM operations
         WHERE kind IN ('capture', 'charge') AND status = 'succeeded'
        """
    ) == [(PAYMENTS, PAYMENTS)]
    assert await world.bank("SELECT count(*), sum(captured_minor), sum(refunded_minor) FROM charges") == [
        (PAYMENTS, PAYMENTS * 1_000, REFUNDED * 250)
    ]
    assert await world.ours("SELECT balance_minor FROM accounts WHERE account = 'provider'") == [
        (PAYMENTS * 1_000 - REFUNDED * 250,)
    ]
    assert await world.differences() == set()
    assert await world.violations() == {}


async def _until_all(world: World, call: Callable[..., Awaitable[object]], requests: Sequence[object]) -> list[Payment]:
    """Asks again for what is pending, and lets the sweeper do the same."""
    done: dict[int, Payment] = {}
    while left := [n for n in range(len(requests)) if n not in done]:
        answers, _ = await asyncio.gather(call([requests[n] for n in left]), world.charging.sweep(0.0))
        assert isinstance(answers, list)
        for n, answer in zip(left, answers, strict=True):
            if isinstance(answer, Payment):
                done[n] = answer
            else:
                assert isinstance(answer, OutcomePending), answer
    return [done[n] for n in range(len(requests))]


async def test_the_loops_run_by_themselves(rig: Rig):
    rig.options |= {"MERCATO_PAYMENTS_SWEEP_SECONDS": "0.05", "MERCATO_PAYMENTS_RECONCILE_SECONDS": "0.05"}
    world = World(rig)
    await world.open()
    with world.calling(), pytest.raises(OutcomePending):
        await world.authorized("sandbox:error_then_ok")

    async def settled() -> bool:
        return await world.ours("SELECT after > 0 FROM reconciliation") == [(True,)]

    await world.until(settled)
    assert await world.steps() == [("authorize", "succeeded")]
