"""Our books against the bank's statement: a planted case of every difference is found; what is safe is repaired."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mercato.chassis.contract import ServiceError
from mercato.chassis.observability import faults
from mercato.chassis.observability.faults import Fault
from mercato.services.payments import rules
from mercato.services.payments.provider import SandboxProvider
from mercato.services.payments.reconciling import Reconciling
from mercato.simulators.bank.contract import AuthorizeCharge, ChargeCard
from services.payments.world import World, capture, key, void

Plant = Callable[[str, Fault], Callable[[], None]]

RECONCILE_POINTS = sorted(
    point for point in faults.POINTS if point.startswith(("payments.reconcile.", "payments.give_back."))
)


async def fail(_point: str) -> None:
    raise RuntimeError("the power fails here")


def metric(world: World, name: str, kind: str) -> float:
    return world.telemetry.registry.get_sample_value(f"mercato_reconciliation_{name}", {"kind": kind}) or 0.0


async def mismatches(world: World) -> list[tuple[str, str]]:
    """Those that are open, as the table and the metric have them: they must agree."""
    found = await world.ours("SELECT kind, key FROM mismatches WHERE resolved_at IS NULL ORDER BY kind, key")
    for kind in rules.MISMATCHES:
        assert metric(world, "mismatches", kind) == sum(row[0] == kind for row in found)
    return [(kind, key) for kind, key in found]


async def left_unknown(world: World, plant: Plant) -> None:
    """Authorized at the bank; whoever had the answer has died."""
    remove = plant("payments.authorize.after_call", fail)
    with pytest.raises(ServiceError):
        await world.authorized()
    remove()


async def test_books_that_agree_have_no_mismatch(world: World):
    await world.captured()
    await world.payments.void(void(await world.authorized()))
    await world.authorized("sandbox:declined")
    await world.payments.capture(capture(await world.authorized("sandbox:capture_expired")))

    assert await world.reconciling.round()

    assert await mismatches(world) == []
    assert all(metric(world, "repaired_total", kind) == 0 for kind in rules.REPAIRS)
    assert await world.ours("SELECT after FROM reconciliation") == await world.bank("SELECT max(id) FROM operations")


# ------------------------------------------------------------------------------------------------------------ repairs


async def test_what_the_bank_has_done_is_recorded(world: World, plant: Plant):
    await left_unknown(world, plant)

    await world.reconciling.round()

    assert await world.steps() == [("authorize", "succeeded")]
    assert await world.ours("SELECT status FROM payments") == [("authorized",)]
    assert metric(world, "repaired_total", "outcome_recorded") == 1
    assert await mismatches(world) == []


@pytest.mark.parametrize(("method", "status"), [("sandbox:ok", "captured"), ("sandbox:declined", "failed")])
async def test_an_open_charge_is_settled_from_the_statement(world: World, plant: Plant, method: str, status: str):
    remove = plant("payments.charge.after_call", fail)
    with pytest.raises(ServiceError):
        await world.charged(method)
    remove()

    await world.reconciling.round()

    assert await world.ours("SELECT status FROM payments") == [(status,)]
    assert await world.ours("SELECT key FROM intents") == []
    assert metric(world, "repaired_total", "outcome_recorded") == 1
    assert await mismatches(world) == []


@pytest.mark.parametrize("hours", [0, 1])
async def test_an_intent_that_the_bank_does_not_know_is_no_mismatch(world: World, plant: Plant, hours: int):
    remove = plant("payments.charge.before_call", fail)
    with pytest.raises(ServiceError):
        await world.charged()
    remove()
    await world.age(hours=hours)

    await world.reconciling.round()

    assert await mismatches(world) == []
    assert await world.steps() == [("charge", "intent")]


async def test_what_the_bank_has_declined_is_recorded(world: World, plant: Plant):
    remove = plant("payments.authorize.after_call", fail)
    with pytest.raises(ServiceError):
        await world.authorized("sandbox:declined")
    remove()

    await world.reconciling.round()

    assert await world.ours("SELECT status, code FROM payments") == [("failed", "card_declined")]
    assert metric(world, "repaired_total", "outcome_recorded") == 1


@pytest.mark.parametrize("status", ["voided", "failed"])
async def test_an_authorization_that_nobody_wants_is_given_back(world: World, status: str):
    payment = await world.authorized()
    await world.ours("UPDATE payments SET status = $1, charge_id = NULL", status)

    await world.reconciling.round()
    await world.reconciling.round()

    assert await world.bank("SELECT key, status FROM operations ORDER BY id") == [
        (key(payment, "authorize"), "succeeded"),
        (key(payment, "void"), "succeeded"),
    ]
    assert await world.bank("SELECT state FROM charges") == [("voided",)]
    assert await world.ours("SELECT status FROM payments") == [(status,)]
    assert metric(world, "repaired_total", "authorization_voided") == 1
    assert await world.differences() == set()


# ---------------------------------------------------------------------------------------------------------- mismatches


async def test_money_that_we_know_nothing_of_is_reported(world: World):
    await world.sandbox.authorize(
        AuthorizeCharge(idempotency_key="stray", order_id=7, amount_minor=5, currency="EUR", method="sandbox:ok")
    )

    await world.reconciling.round()

    assert await mismatches(world) == [("not_in_our_books", "stray")]
    detail = await world.ours("SELECT detail FROM mismatches")
    assert detail == [("the provider has authorize 5 EUR succeeded, we have nothing",)]


@pytest.mark.parametrize("nonce", [7, 0x0123456789ABCDEF])
async def test_a_charge_without_a_payment_is_reported(world: World, nonce: int):
    """Of an order that has no payment, or of one that had the id of an order before a backup was restored."""
    payment = await world.charged()
    order_id = payment.order_id if nonce == 7 else 999
    stray = f"{order_id}-{nonce:016x}-1-charge"
    await world.sandbox.charge(
        ChargeCard(idempotency_key=stray, order_id=order_id, amount_minor=5, currency="EUR", method="sandbox:ok")
    )

    await world.reconciling.round()

    assert await mismatches(world) == [("not_in_our_books", stray)]


async def test_another_amount_is_reported_and_resolved_when_it_is_right(world: World):
    payment = await world.captured()
    await world.bank("UPDATE operations SET amount_minor = 999 WHERE kind = 'capture'")

    await world.reconciling.round()
    assert await mismatches(world) == [("other_amount", key(payment, "capture"))]

    await world.bank("UPDATE operations SET amount_minor = 1000 WHERE kind = 'capture'")
    await world.reconciling.round()
    assert await mismatches(world) == []
    assert await world.ours("SELECT resolved_at IS NOT NULL FROM mismatches") == [(True,)]


async def test_an_unknown_outcome_with_another_amount_is_not_recorded(world: World, plant: Plant):
    await left_unknown(world, plant)
    await world.bank("UPDATE operations SET amount_minor = 999")

    await world.reconciling.round()

    assert [kind for kind, _ in await mismatches(world)] == ["other_amount"]
    assert await world.steps() == [("authorize", "intent")]


async def test_another_outcome_is_reported(world: World):
    payment = await world.captured()
    await world.bank("UPDATE operations SET status = 'declined', code = 'changed_its_mind' WHERE kind = 'capture'")

    await world.reconciling.round()

    assert await mismatches(world) == [("other_outcome", key(payment, "capture"))]


async def test_a_mismatch_that_becomes_another_is_reported_as_that(world: World):
    payment = await world.captured()
    await world.bank("UPDATE operations SET amount_minor = 999 WHERE kind = 'capture'")
    await world.reconciling.round()
    await world.bank("UPDATE operations SET status = 'declined', code = 'gone' WHERE kind = 'capture'")

    await world.reconciling.round()

    assert await mismatches(world) == [("other_outcome", key(payment, "capture"))]


async def test_what_the_bank_s_statement_skips_is_reported(world: World):
    payment = await world.captured()
    await world.authorized()
    await world.bank("DELETE FROM operations WHERE kind = 'capture'")

    await world.reconciling.round()

    assert await mismatches(world) == [("not_at_the_provider", key(payment, "capture"))]


async def test_what_never_gets_on_the_statement_is_reported(world: World):
    payment = await world.captured()
    await world.bank("DELETE FROM operations WHERE kind = 'capture'")

    await world.reconciling.round()

    assert await mismatches(world) == [("not_at_the_provider", key(payment, "capture"))]


# -------------------------------------------------------------------------------------------------------------- rounds


@pytest.mark.parametrize("point", RECONCILE_POINTS)
async def test_a_round_that_dies_anywhere_is_done_again(world: World, plant: Plant, point: str):
    await left_unknown(world, plant)
    given_back = await world.authorized()
    await world.ours("UPDATE payments SET status = 'voided' WHERE id = $1", given_back.id)
    remove = plant(point, fail)
    with pytest.raises(RuntimeError):
        await world.reconciling.round()
    remove()

    await world.reconciling.round()
    await world.age(hours=1)
    await world.charging.sweep(0.0)  # a void that was begun and not finished

    assert sorted(await world.ours("SELECT kind, status FROM operations")) == [
        ("authorize", "succeeded"),
        ("authorize", "succeeded"),
        ("void", "succeeded"),
    ]
    assert await world.taken() == {"authorize": 2, "void": 1}
    assert await world.differences() == set()


def test_every_point_of_the_reconciliation_is_among_those():
    assert len(RECONCILE_POINTS) == 12


async def test_one_process_compares_at_a_time(world: World):
    database = world.rig.host.services["payments"].database
    provider = {"sandbox": SandboxProvider(world.sandbox)}
    one, other = (
        Reconciling(database, provider, world.charging, world.telemetry, period_seconds=3_600, lag_seconds=0)
        for _ in range(2)
    )

    assert [await one.round(), await other.round(), await one.round()] == [True, False, False]


async def test_a_statement_of_many_pages_is_read_to_its_end(world: World):
    await world.bank(
        """
        INSERT INTO operations (key, kind, order_id, amount_minor, currency, method, status, code)
        SELECT 'declined-' || n, 'authorize', n, 1, 'EUR', 'sandbox:declined', 'declined', 'card_declined'
          FROM generate_series(1, 1010) n
        """
    )

    await world.reconciling.round()

    assert await world.ours("SELECT after FROM reconciliation") == await world.bank("SELECT max(id) FROM operations")
    assert await mismatches(world) == []
