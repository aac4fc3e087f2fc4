"""Our operations against the bank's statement: every injected difference is found; what is safe is repaired."""

from __future__ import annotations

import pytest

from mercato.chassis.contract import ServiceError
from mercato.chassis.observability import faults
from mercato.services.payments import rules
from mercato.services.payments.provider import SandboxProvider
from mercato.services.payments.reconciling import Reconciling
from mercato.simulators.bank.contract import AuthorizeCharge, ChargeCard
from mercato.testing.injection import Inject, fail
from services.payments.harness import PaymentsHarness, capture, key, void

RECONCILE_POINTS = sorted(
    point for point in faults.POINTS if point.startswith(("payments.reconcile.", "payments.void_authorization."))
)


def metric(harness: PaymentsHarness, name: str, kind: str) -> float:
    return harness.telemetry.registry.get_sample_value(f"mercato_reconciliation_{name}", {"kind": kind}) or 0.0


async def mismatches(harness: PaymentsHarness) -> list[tuple[str, str]]:
    """Those that are open, as the table and the metric have them: they must agree."""
    found = await harness.rows("SELECT kind, key FROM mismatches WHERE resolved_at IS NULL ORDER BY kind, key")
    for kind in rules.MISMATCHES:
        assert metric(harness, "mismatches", kind) == sum(row[0] == kind for row in found)
    return [(kind, key) for kind, key in found]


async def left_unknown(harness: PaymentsHarness, inject: Inject) -> None:
    """Authorized at the bank; the process that had the answer has died."""
    remove = inject("payments.authorize.after_call", fail)
    with pytest.raises(ServiceError):
        await harness.authorized()
    remove()


async def test_operations_that_agree_with_the_statement_have_no_mismatch(harness: PaymentsHarness):
    await harness.captured()
    await harness.payments.void(void(await harness.authorized()))
    await harness.authorized("sandbox:declined")
    await harness.payments.capture(capture(await harness.authorized("sandbox:capture_expired")))

    assert await harness.reconciling.round()

    assert await mismatches(harness) == []
    assert all(metric(harness, "repaired_total", kind) == 0 for kind in rules.REPAIRS)
    assert await harness.rows("SELECT after FROM reconciliation") == await harness.bank(
        "SELECT max(id) FROM operations"
    )


# ------------------------------------------------------------------------------------------------------------ repairs


async def test_what_the_bank_has_done_is_recorded(harness: PaymentsHarness, inject: Inject):
    await left_unknown(harness, inject)

    await harness.reconciling.round()

    assert await harness.steps() == [("authorize", "succeeded")]
    assert await harness.rows("SELECT status FROM payments") == [("authorized",)]
    assert metric(harness, "repaired_total", "outcome_recorded") == 1
    assert await mismatches(harness) == []


@pytest.mark.parametrize(("method", "status"), [("sandbox:ok", "captured"), ("sandbox:declined", "failed")])
async def test_an_open_charge_is_settled_from_the_statement(
    harness: PaymentsHarness, inject: Inject, method: str, status: str
):
    remove = inject("payments.charge.after_call", fail)
    with pytest.raises(ServiceError):
        await harness.charged(method)
    remove()

    await harness.reconciling.round()

    assert await harness.rows("SELECT status FROM payments") == [(status,)]
    assert await harness.rows("SELECT key FROM intents") == []
    assert metric(harness, "repaired_total", "outcome_recorded") == 1
    assert await mismatches(harness) == []


@pytest.mark.parametrize("hours", [0, 1])
async def test_an_intent_that_the_bank_does_not_know_is_no_mismatch(
    harness: PaymentsHarness, inject: Inject, hours: int
):
    remove = inject("payments.charge.before_call", fail)
    with pytest.raises(ServiceError):
        await harness.charged()
    remove()
    await harness.age(hours=hours)

    await harness.reconciling.round()

    assert await mismatches(harness) == []
    assert await harness.steps() == [("charge", "intent")]


async def test_what_the_bank_has_declined_is_recorded(harness: PaymentsHarness, inject: Inject):
    remove = inject("payments.authorize.after_call", fail)
    with pytest.raises(ServiceError):
        await harness.authorized("sandbox:declined")
    remove()

    await harness.reconciling.round()

    assert await harness.rows("SELECT status, code FROM payments") == [("failed", "card_declined")]
    assert metric(harness, "repaired_total", "outcome_recorded") == 1


@pytest.mark.parametrize("status", ["voided", "failed"])
async def test_an_authorization_of_a_failed_or_voided_payment_is_voided(harness: PaymentsHarness, status: str):
    payment = await harness.authorized()
    await harness.rows("UPDATE payments SET status = $1, charge_id = NULL", status)

    await harness.reconciling.round()
    await harness.reconciling.round()

    assert await harness.bank("SELECT key, status FROM operations ORDER BY id") == [
        (key(payment, "authorize"), "succeeded"),
        (key(payment, "void"), "succeeded"),
    ]
    assert await harness.bank("SELECT state FROM charges") == [("voided",)]
    assert await harness.rows("SELECT status FROM payments") == [(status,)]
    assert metric(harness, "repaired_total", "authorization_voided") == 1
    assert await harness.differences() == set()


# ---------------------------------------------------------------------------------------------------------- mismatches


async def test_an_unknown_operation_of_the_bank_is_reported(harness: PaymentsHarness):
    await harness.sandbox.authorize(
        AuthorizeCharge(idempotency_key="stray", order_id=7, amount_minor=5, currency="EUR", method="sandbox:ok")
    )

    await harness.reconciling.round()

    assert await mismatches(harness) == [("not_in_our_books", "stray")]
    detail = await harness.rows("SELECT detail FROM mismatches")
    assert detail == [("the provider has authorize 5 EUR succeeded, we have nothing",)]


@pytest.mark.parametrize("nonce", [7, 0x0123456789ABCDEF])
async def test_a_charge_without_a_payment_is_reported(harness: PaymentsHarness, nonce: int):
    """Of an order that has no payment, or of one that had the id of an order before a backup was restored."""
    payment = await harness.charged()
    order_id = payment.order_id if nonce == 7 else 999
    stray = f"{order_id}-{nonce:016x}-1-charge"
    await harness.sandbox.charge(
        ChargeCard(idempotency_key=stray, order_id=order_id, amount_minor=5, currency="EUR", method="sandbox:ok")
    )

    await harness.reconciling.round()

    assert await mismatches(harness) == [("not_in_our_books", stray)]


async def test_another_amount_is_reported_and_resolved_when_it_is_right(harness: PaymentsHarness):
    payment = await harness.captured()
    await harness.bank("UPDATE operations SET amount_minor = 999 WHERE kind = 'capture'")

    await harness.reconciling.round()
    assert await mismatches(harness) == [("other_amount", key(payment, "capture"))]

    await harness.bank("UPDATE operations SET amount_minor = 1000 WHERE kind = 'capture'")
    await harness.reconciling.round()
    assert await mismatches(harness) == []
    assert await harness.rows("SELECT resolved_at IS NOT NULL FROM mismatches") == [(True,)]


async def test_an_unknown_outcome_with_another_amount_is_not_recorded(harness: PaymentsHarness, inject: Inject):
    await left_unknown(harness, inject)
    await harness.bank("UPDATE operations SET amount_minor = 999")

    await harness.reconciling.round()

    assert [kind for kind, _ in await mismatches(harness)] == ["other_amount"]
    assert await harness.steps() == [("authorize", "intent")]


async def test_another_outcome_is_reported(harness: PaymentsHarness):
    payment = await harness.captured()
    await harness.bank("UPDATE operations SET status = 'declined', code = 'changed_its_mind' WHERE kind = 'capture'")

    await harness.reconciling.round()

    assert await mismatches(harness) == [("other_outcome", key(payment, "capture"))]


async def test_a_mismatch_that_becomes_another_is_reported_as_that(harness: PaymentsHarness):
    payment = await harness.captured()
    await harness.bank("UPDATE operations SET amount_minor = 999 WHERE kind = 'capture'")
    await harness.reconciling.round()
    await harness.bank("UPDATE operations SET status = 'declined', code = 'gone' WHERE kind = 'capture'")

    await harness.reconciling.round()

    assert await mismatches(harness) == [("other_outcome", key(payment, "capture"))]


async def test_what_the_bank_s_statement_skips_is_reported(harness: PaymentsHarness):
    payment = await harness.captured()
    await harness.authorized()
    await harness.bank("DELETE FROM operations WHERE kind = 'capture'")

    await harness.reconciling.round()

    assert await mismatches(harness) == [("not_at_the_provider", key(payment, "capture"))]


async def test_what_never_gets_on_the_statement_is_reported(harness: PaymentsHarness):
    payment = await harness.captured()
    await harness.bank("DELETE FROM operations WHERE kind = 'capture'")

    await harness.reconciling.round()

    assert await mismatches(harness) == [("not_at_the_provider", key(payment, "capture"))]


# -------------------------------------------------------------------------------------------------------------- rounds


@pytest.mark.parametrize("point", RECONCILE_POINTS)
async def test_a_reconciliation_that_crashes_anywhere_is_repeated(harness: PaymentsHarness, inject: Inject, point: str):
    await left_unknown(harness, inject)
    given_back = await harness.authorized()
    await harness.rows("UPDATE payments SET status = 'voided' WHERE id = $1", given_back.id)
    remove = inject(point, fail)
    with pytest.raises(RuntimeError):
        await harness.reconciling.round()
    remove()

    await harness.reconciling.round()
    await harness.age(hours=1)
    await harness.finishing.sweep(0.0)  # a void that was begun and not finished

    assert sorted(await harness.rows("SELECT kind, status FROM operations")) == [
        ("authorize", "succeeded"),
        ("authorize", "succeeded"),
        ("void", "succeeded"),
    ]
    assert await harness.taken() == {"authorize": 2, "void": 1}
    assert await harness.differences() == set()


def test_every_point_of_the_reconciliation_is_among_those():
    assert len(RECONCILE_POINTS) == 12


async def test_one_process_compares_at_a_time(harness: PaymentsHarness):
    database = harness.host.services["payments"].database
    provider = {"sandbox": SandboxProvider(harness.sandbox)}
    one, other = (
        Reconciling(database, provider, harness.finishing, harness.telemetry, period_seconds=3_600, lag_seconds=0)
        for _ in range(2)
    )

    assert [await one.round(), await other.round(), await one.round()] == [True, False, False]


async def test_a_statement_of_many_pages_is_read_to_its_end(harness: PaymentsHarness):
    await harness.bank(
        """
        INSERT INTO operations (key, kind, order_id, amount_minor, currency, method, status, code)
        SELECT 'declined-' || n, 'authorize', n, 1, 'EUR', 'sandbox:declined', 'declined', 'card_declined'
          FROM generate_series(1, 1010) n
        """
    )

    await harness.reconciling.round()

    assert await harness.rows("SELECT after FROM reconciliation") == await harness.bank(
        "SELECT max(id) FROM operations"
    )
    assert await mismatches(harness) == []
