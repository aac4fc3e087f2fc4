"""What the bank does with a charge, once for each key."""

from __future__ import annotations

import asyncio

import pytest

from mercato.chassis.contract import Actor, Forbidden, ServiceError
from mercato.simulators.bank.contract import (
    ChargeUnknown,
    ListOperations,
    LookUpOperation,
    OperationUnknown,
    SandboxKeyReused,
)
from mercato.testing.injection import Inject, Overlap, fail
from simulators.bank.harness import BankHarness, result


async def test_an_authorization_opens_one_charge_for_its_key(bank: BankHarness):
    request = bank.authorization(amount=1_250)

    first, again = await bank.sandbox.authorize(request), await bank.sandbox.authorize(request)

    assert result(first) == ("succeeded", None)
    assert again == first
    assert await bank.rows("SELECT id, order_id, authorized_minor, currency, state FROM charges") == [
        (first.charge_id, 7, 1_250, "EUR", "open")
    ]


@pytest.mark.parametrize("method", ["declined", "insufficient_funds"])
async def test_a_card_that_is_declined_opens_no_charge(bank: BankHarness, method: str):
    answers = [
        await bank.sandbox.authorize(bank.authorization(f"sandbox:{method}")),
        await bank.sandbox.charge(bank.card_charge(f"sandbox:{method}")),
    ]

    code = "card_declined" if method == "declined" else method
    assert [(result(declined), declined.charge_id) for declined in answers] == [(("declined", code), None)] * 2
    assert await bank.rows("SELECT id FROM charges") == []


async def test_a_charge_whose_authorization_runs_out_is_declined_and_reserves_nothing(bank: BankHarness):
    declined = await bank.sandbox.charge(bank.card_charge("sandbox:capture_expired"))

    assert (result(declined), declined.charge_id) == (("declined", "authorization_expired"), None)
    assert await bank.rows("SELECT id FROM charges") == []


async def test_a_card_is_charged_once_for_a_key_and_the_charge_is_captured(bank: BankHarness):
    request = bank.card_charge(amount=1_250)

    first, again = await bank.sandbox.charge(request), await bank.sandbox.charge(request)

    assert (result(first), first.kind, first.amount_minor) == (("succeeded", None), "charge", 1_250)
    assert again == first
    assert await bank.rows("SELECT id, order_id, authorized_minor, captured_minor, state FROM charges") == [
        (first.charge_id, 7, 1_250, 1_250, "captured")
    ]


async def test_a_second_charge_of_one_order_with_another_key_takes_the_money_again(bank: BankHarness):
    answers = await bank.sandbox.charge.many([bank.card_charge(), bank.card_charge()])

    assert [result(a) for a in answers if not isinstance(a, ServiceError)] == [("succeeded", None)] * 2
    assert await bank.rows("SELECT order_id, sum(captured_minor) FROM charges GROUP BY 1") == [(7, 2_000)]


async def test_what_was_charged_is_refunded_and_never_captured_or_voided(bank: BankHarness):
    charge_id = (await bank.sandbox.charge(bank.card_charge())).charge_id
    assert charge_id

    assert result(await bank.sandbox.capture(bank.capture(charge_id))) == ("declined", "already_captured")
    assert result(await bank.sandbox.void(bank.void(charge_id))) == ("declined", "already_captured")
    assert result(await bank.sandbox.refund(bank.refund(charge_id, 1_000))) == ("succeeded", None)


async def test_a_charge_is_captured_once_whatever_the_key(bank: BankHarness):
    charge_id = await bank.charge(amount=990)
    request = bank.capture(charge_id)

    first, again = await bank.sandbox.capture(request), await bank.sandbox.capture(request)
    other = await bank.sandbox.capture(bank.capture(charge_id))

    assert (result(first), first.amount_minor) == (("succeeded", None), 990)
    assert again == first
    assert result(other) == ("declined", "already_captured")
    assert await bank.rows("SELECT captured_minor, state FROM charges") == [(990, "captured")]


async def test_a_part_of_an_authorization_is_captured_and_the_rest_is_not_held(bank: BankHarness):
    charge_id = await bank.charge(amount=990)

    too_much = await bank.sandbox.capture(bank.capture(charge_id, amount=991))
    part = await bank.sandbox.capture(bank.capture(charge_id, "part", 600))
    again = await bank.sandbox.capture(bank.capture(charge_id, "part", 600))
    with pytest.raises(SandboxKeyReused):
        await bank.sandbox.capture(bank.capture(charge_id, "part", 601))
    rest = await bank.sandbox.capture(bank.capture(charge_id, amount=390))

    assert result(too_much) == ("declined", "amount_too_large")
    assert (result(part), part.amount_minor) == (("succeeded", None), 600)
    assert again == part
    assert result(rest) == ("declined", "already_captured")
    assert result(await bank.sandbox.refund(bank.refund(charge_id, 601))) == ("declined", "amount_too_large")
    assert await bank.rows("SELECT captured_minor, state FROM charges") == [(600, "captured")]


async def test_void_gives_an_authorization_back_and_nothing_else(bank: BankHarness):
    open_, captured = await bank.charge(), await bank.captured()

    voided = await bank.sandbox.void(bank.void(open_))

    assert result(voided) == ("succeeded", None)
    assert result(await bank.sandbox.void(bank.void(open_))) == ("declined", "already_voided")
    assert result(await bank.sandbox.capture(bank.capture(open_))) == ("declined", "charge_voided")
    assert result(await bank.sandbox.void(bank.void(captured))) == ("declined", "already_captured")


async def test_refunds_never_exceed_what_was_captured(bank: BankHarness):
    charge_id = await bank.captured(1_000)

    answers = await bank.sandbox.refund.many([bank.refund(charge_id, amount) for amount in (600, 500, 400, 1)])

    assert [result(a) for a in answers if not isinstance(a, ServiceError)] == [
        ("succeeded", None),
        ("declined", "amount_too_large"),
        ("succeeded", None),
        ("declined", "amount_too_large"),
    ]
    assert await bank.rows("SELECT refunded_minor FROM charges") == [(1_000,)]


async def test_only_captured_money_is_refunded(bank: BankHarness):
    refused = await bank.sandbox.refund(bank.refund(await bank.charge(), 1))

    assert result(refused) == ("declined", "not_captured")


async def test_an_authorization_that_ran_out_gives_no_money(bank: BankHarness):
    charge_id = await bank.charge("sandbox:capture_expired")

    assert result(await bank.sandbox.capture(bank.capture(charge_id))) == ("declined", "authorization_expired")
    assert result(await bank.sandbox.void(bank.void(charge_id))) == ("declined", "authorization_expired")
    assert result(await bank.sandbox.refund(bank.refund(charge_id, 1))) == ("declined", "not_captured")


async def test_an_unknown_charge_is_refused_and_nothing_is_kept(bank: BankHarness):
    with pytest.raises(ChargeUnknown):
        await bank.sandbox.capture(bank.capture(404))
    assert await bank.rows("SELECT key FROM operations") == []


# ------------------------------------------------------------------------------------------------------------- keys


async def test_a_key_stands_for_one_operation(bank: BankHarness):
    request = bank.authorization(amount=5)
    charge_id = (await bank.sandbox.authorize(request)).charge_id
    assert charge_id
    other = await bank.captured()
    refund = bank.refund(other, 3)
    await bank.sandbox.refund(refund)

    with pytest.raises(SandboxKeyReused):
        await bank.sandbox.authorize(bank.authorization(amount=6, key=request.idempotency_key))
    with pytest.raises(SandboxKeyReused):
        await bank.sandbox.authorize(bank.authorization("sandbox:lost_answer", 5, key=request.idempotency_key))
    with pytest.raises(SandboxKeyReused):
        await bank.sandbox.charge(bank.card_charge(amount=5, key=request.idempotency_key))
    with pytest.raises(SandboxKeyReused):
        await bank.sandbox.capture(bank.capture(charge_id, key=request.idempotency_key))
    with pytest.raises(SandboxKeyReused):
        await bank.sandbox.refund(bank.refund(other, 4, key=refund.idempotency_key))
    with pytest.raises(SandboxKeyReused):
        await bank.sandbox.refund(bank.refund(charge_id, 3, key=refund.idempotency_key))
    assert await bank.rows("SELECT refunded_minor, state FROM charges ORDER BY id") == [(0, "open"), (3, "captured")]


async def test_the_same_key_twice_in_a_batch_is_one_operation(bank: BankHarness):
    request = bank.authorization(key="duplicate")
    requests = [request, bank.authorization(key="alone"), request, bank.authorization(amount=2, key="duplicate")]

    first, _, again, other = await bank.sandbox.authorize.many(requests)

    assert again == first
    assert isinstance(other, SandboxKeyReused)
    assert await bank.rows("SELECT count(*) FROM charges") == [(2,)]


async def test_two_processes_that_charge_with_the_same_keys_charge_each_card_once(bank: BankHarness):
    other = await bank.another_process()
    requests = [bank.card_charge() for _ in range(40)]

    ours, theirs = await asyncio.gather(bank.sandbox.charge.many(requests), other.charge.many(list(reversed(requests))))

    assert list(ours) == list(reversed(theirs))
    assert await bank.rows("SELECT count(*), sum(captured_minor) FROM charges") == [(40, 40_000)]


async def test_two_processes_with_the_same_keys_do_each_operation_once(bank: BankHarness):
    other = await bank.another_process()
    requests = [bank.authorization() for _ in range(40)]

    ours, theirs = await asyncio.gather(
        bank.sandbox.authorize.many(requests), other.authorize.many(list(reversed(requests)))
    )
    charges = [o.charge_id for o in ours if not isinstance(o, ServiceError) and o.charge_id]
    captures = [bank.capture(charge_id) for charge_id in charges]
    done, as_well = await asyncio.gather(
        bank.sandbox.capture.many(captures), other.capture.many(list(reversed(captures)))
    )

    assert list(ours) == list(reversed(theirs))
    assert list(done) == list(reversed(as_well))
    assert await bank.rows("SELECT count(*), sum(captured_minor) FROM charges") == [(40, 40_000)]


async def test_one_key_for_two_charges_at_the_same_moment_is_one_operation(bank: BankHarness):
    """The charges are locked one by one, so that only the key itself can tell."""
    other, one, two = await bank.another_process(), await bank.charge(), await bank.charge()

    answers = await asyncio.gather(
        bank.sandbox.capture(bank.capture(one, key="same")),
        other.capture(bank.capture(two, key="same")),
        return_exceptions=True,
    )

    assert sorted(isinstance(answer, SandboxKeyReused) for answer in answers) == [False, True]
    assert await bank.rows("SELECT sum(captured_minor) FROM charges") == [(1_000,)]


async def test_refunds_at_the_same_moment_see_each_other(bank: BankHarness, inject: Inject):
    other, charge_id = await bank.another_process(), await bank.captured(1_000)
    inject("sandbox.refund.before_commit", Overlap(bank.dsns["sandbox"]))

    answers = await asyncio.gather(
        bank.sandbox.refund(bank.refund(charge_id, 600)), other.refund(bank.refund(charge_id, 600))
    )

    assert sorted(answer.status for answer in answers) == ["declined", "succeeded"]
    assert await bank.rows("SELECT refunded_minor FROM charges") == [(600,)]


@pytest.mark.parametrize("opened_by", ["charge", "capture"])
async def test_the_index_of_captures_is_a_lock_of_its_own(bank: BankHarness, opened_by: str):
    charge_id = await bank.captured()
    if opened_by == "charge":
        charge_id = (await bank.sandbox.charge(bank.card_charge())).charge_id

    with pytest.raises(Exception, match="operations_one_capture_a_charge"):
        await bank.rows(
            """
            INSERT INTO operations (key, kind, charge_id, order_id, amount_minor, currency, method, status)
            VALUES ('again', 'capture', $1, 7, 1000, 'EUR', 'sandbox:ok', 'succeeded')
            """,
            charge_id,
        )


async def test_power_that_fails_before_the_commit_leaves_nothing(bank: BankHarness, inject: Inject):
    inject("sandbox.authorize.before_commit", fail)
    with pytest.raises(ServiceError):
        await bank.sandbox.authorize(bank.authorization())

    assert await bank.rows("SELECT key FROM operations UNION ALL SELECT id::text FROM charges") == []


# ---------------------------------------------------------------------------------------------------------- reading


async def test_an_operation_is_looked_up_by_its_key(bank: BankHarness):
    done = await bank.sandbox.authorize(bank.authorization(key="known"))

    assert await bank.sandbox.look_up(LookUpOperation(key="known")) == done
    with pytest.raises(OperationUnknown):
        await bank.sandbox.look_up(LookUpOperation(key="unknown"))


async def test_the_statement_is_read_page_by_page(bank: BankHarness):
    done = await bank.sandbox.authorize.many([bank.authorization() for _ in range(5)])
    read, after = [], 0
    while (page := await bank.sandbox.statement(ListOperations(after=after, limit=2))).operations:
        read += page.operations
        after = page.next_after

    assert {o.key: o for o in read} == {o.key: o for o in done if not isinstance(o, ServiceError)}
    assert [o.id for o in read] == sorted(o.id for o in read)
    assert (await bank.sandbox.statement(ListOperations(after=after))).next_after == after


async def test_the_statement_ends_before_what_is_not_settled(bank: BankHarness):
    first = await bank.sandbox.authorize(bank.authorization())
    await bank.sandbox.authorize(bank.authorization("sandbox:slow:60000"))
    await bank.sandbox.authorize(bank.authorization())

    page = await bank.sandbox.statement(ListOperations())

    assert page.operations == (first,)
    assert page.next_after == first.id


@pytest.mark.options(sandbox_statement_delay_seconds=60)
async def test_an_operation_that_is_too_young_is_not_on_the_statement(bank: BankHarness):
    old, _ = [await bank.sandbox.authorize(bank.authorization()) for _ in range(2)]
    await bank.rows("UPDATE operations SET created_at = created_at - interval '2 minutes' WHERE id = $1", old.id)
    page = await bank.sandbox.statement(ListOperations())

    assert [o.id for o in page.operations] == [old.id]


@pytest.mark.parametrize("actor", [Actor("staff", 1), Actor("customer", 1), Actor("anonymous")])
async def test_only_services_may_call_the_bank(bank: BankHarness, actor: Actor):
    with bank.acting(actor), pytest.raises(Forbidden):
        await bank.sandbox.statement(ListOperations())
