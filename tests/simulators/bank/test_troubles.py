"""Methods that go wrong on purpose, and the bank that fails by chance."""

from __future__ import annotations

import datetime
from collections import Counter

import pytest

from mercato.chassis.contract import ServiceError
from mercato.simulators.bank.contract import AnswerLost, BankFailed, LookUpOperation, OperationUnknown
from mercato.testing.waiting import until
from simulators.bank.harness import BankHarness, result

CALLS = 300


async def test_a_lost_answer_is_lost_once_and_the_money_moves_once(bank: BankHarness):
    request = bank.authorization("sandbox:lost_answer")

    with pytest.raises(AnswerLost):
        await bank.sandbox.authorize(request)
    again = await bank.sandbox.authorize(request)

    assert again.charge_id is not None
    with pytest.raises(AnswerLost):
        await bank.sandbox.capture(bank.capture(again.charge_id, key="capture"))
    assert await bank.rows("SELECT captured_minor FROM charges") == [(1_000,)]
    assert result(await bank.sandbox.capture(bank.capture(again.charge_id, key="capture"))) == ("succeeded", None)
    assert await bank.rows("SELECT captured_minor FROM charges") == [(1_000,)]


async def test_two_calls_in_one_batch_lose_one_answer(bank: BankHarness):
    request = bank.authorization("sandbox:lost_answer")

    answers = await bank.sandbox.authorize.many([request, request])

    assert [type(answer).__name__ for answer in answers] == ["AnswerLost", "SandboxOperation"]


async def test_a_first_call_that_fails_has_done_nothing(bank: BankHarness):
    request = bank.authorization("sandbox:error_then_ok", key="failing")

    with pytest.raises(BankFailed):
        await bank.sandbox.authorize(request)
    if not bank.repeats:
        with pytest.raises(OperationUnknown):
            await bank.sandbox.look_up(LookUpOperation(key="failing"))
    else:  # the second call is there already
        assert result(await bank.sandbox.look_up(LookUpOperation(key="failing"))) == ("succeeded", None)
    assert result(await bank.sandbox.authorize(request)) == ("succeeded", None)
    assert await bank.rows("SELECT count(*) FROM charges") == [(1,)]


async def test_a_slow_operation_is_processing_and_its_neighbours_are_not(bank: BankHarness):
    slow, quick = await bank.sandbox.authorize.many(
        [bank.authorization("sandbox:slow:150", key="slow"), bank.authorization()]
    )

    assert not isinstance(slow, ServiceError)
    assert not isinstance(quick, ServiceError)
    assert (result(slow), slow.charge_id) == (("processing", None), None)
    assert slow.settles_at is not None
    assert slow.settles_at - slow.created_at >= datetime.timedelta(milliseconds=150)
    assert quick.settles_at is None
    assert result(quick) == ("succeeded", None)

    async def done() -> bool:
        return (await bank.sandbox.look_up(LookUpOperation(key="slow"))).status == "succeeded"

    await until(done)
    assert await bank.rows("SELECT count(*) FROM charges WHERE state = 'open'") == [(2,)]


async def test_a_slow_charge_takes_the_money_when_it_is_done(bank: BankHarness):
    slow = await bank.sandbox.charge(bank.card_charge("sandbox:slow:50", key="slow"))

    assert (result(slow), slow.charge_id) == (("processing", None), None)

    async def done() -> bool:
        return (await bank.sandbox.look_up(LookUpOperation(key="slow"))).status == "succeeded"

    await until(done)
    assert await bank.rows("SELECT captured_minor, state FROM charges") == [(1_000, "captured")]


@pytest.mark.parametrize("method", ["lost_answer", "error_then_ok"])
async def test_a_charge_whose_first_call_goes_wrong_takes_the_money_once(bank: BankHarness, method: str):
    request = bank.card_charge(f"sandbox:{method}")

    with pytest.raises(ServiceError):
        await bank.sandbox.charge(request)
    assert result(await bank.sandbox.charge(request)) == ("succeeded", None)
    assert await bank.rows("SELECT count(*), sum(captured_minor) FROM charges") == [(1, 1_000)]


async def test_of_two_slow_captures_of_a_charge_one_succeeds(bank: BankHarness):
    await bank.sandbox.authorize(bank.authorization("sandbox:slow:0", key="open"))

    async def opened() -> bool:
        return (await bank.sandbox.look_up(LookUpOperation(key="open"))).charge_id is not None

    await until(opened)
    charge_id = (await bank.sandbox.look_up(LookUpOperation(key="open"))).charge_id
    assert charge_id
    await bank.sandbox.capture.many([bank.capture(charge_id), bank.capture(charge_id)])

    async def settled() -> bool:
        return await bank.rows("SELECT count(*) FROM operations WHERE status = 'processing'") == [(0,)]

    await until(settled)
    assert await bank.rows("SELECT status, code FROM operations WHERE kind = 'capture' ORDER BY id") == [
        ("succeeded", None),
        ("declined", "already_captured"),
    ]
    assert await bank.rows("SELECT captured_minor FROM charges") == [(1_000,)]


@pytest.mark.options(sandbox_failure_rate=0.5)
async def test_a_bank_that_fails_by_chance_fails_in_every_way_and_still_knows_its_keys(bank: BankHarness):
    requests = [bank.authorization() for _ in range(CALLS)]
    first = await bank.sandbox.authorize.many(requests)
    written = {row[0] for row in await bank.rows("SELECT key FROM operations")}
    left = requests
    while left:
        answers = await bank.sandbox.authorize.many(left)
        left = [r for r, answer in zip(left, answers, strict=True) if isinstance(answer, ServiceError)]

    seen = Counter(
        (type(answer).__name__, request.idempotency_key in written)
        for request, answer in zip(requests, first, strict=True)
    )
    assert seen["SandboxOperation", True] > 0
    assert seen["AnswerLost", True] > 0
    assert seen["BankFailed", True] > 0  # after everything
    if not bank.repeats:
        assert seen["BankFailed", False] > 0  # before anything
    assert await bank.rows("SELECT count(*) FROM charges") == [(CALLS,)]
