"""The rules of payments, one at a time; all together: `tests/models/test_payments.py`."""

from __future__ import annotations

from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given, strategies as st

from mercato.contracts.payments import (
    CaptureAmountChanged,
    CaptureTooLarge,
    OperationKind,
    OperationStatus,
    RefundDeclined,
    Status,
)
from mercato.services.payments import rules
from mercato.services.payments.rules import (
    Declined,
    KeyParts,
    NextOperation,
    ProviderResult,
    StatementLine,
    Succeeded,
    Target,
    Unknown,
)
from services.payments.values import AMOUNT, Operation, Payment


def test_each_state_of_the_contract_has_its_moves():
    assert set(rules.MOVES) == set(get_args(Status))
    assert set(rules.EVENTS) == set(get_args(Status)) - {"pending"}


@given(
    st.integers(1, 2**53 - 1),
    st.integers(0, 2**63 - 1),
    st.integers(1, 10_000),
    st.sampled_from(get_args(OperationKind)),
    st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=60),
)
def test_a_key_says_what_it_was_made_of(order_id: int, nonce: int, attempt: int, kind: OperationKind, reference: str):
    reference = reference if kind == "refund" else ""
    key = rules.key_of(order_id, nonce, attempt, kind, reference)

    assert rules.parts_of(key) == KeyParts(order_id, nonce, attempt, kind, reference)
    assert len(key) <= 128


@pytest.mark.parametrize("key", ["", "stray", "1:charge", "1-0-1-charge", "1-000000000000000f-1-charge\n"])
def test_a_key_that_is_not_ours_has_no_parts(key: str):
    assert rules.parts_of(key) is None


@pytest.mark.parametrize("kind", ["authorize", "charge"])
def test_a_payment_continues_with_the_operation_that_it_began_with(kind: OperationKind):
    begun = [Operation(kind, "", AMOUNT)]

    for target in (Target("authorize"), Target("charge"), Target("void")):
        assert rules.next_operation(target, Payment(), begun) == NextOperation(kind, "", AMOUNT)


@pytest.mark.parametrize("kind", ["authorize", "charge"])
def test_a_payment_of_nothing_moves_without_a_charge(kind: OperationKind):
    after = rules.after_result(Payment(amount_minor=0), NextOperation(kind, "", 0), rules.NOT_ASKED)

    assert (after.status, after.charge_id) == ({"authorize": "authorized", "charge": "captured"}[kind], None)


@pytest.mark.parametrize(("code", "reason"), [("insufficient_funds", "insufficient_funds"), (None, "")])
def test_a_declined_refund_is_refused_again_with_its_code(code: str | None, reason: str):
    payment = Payment(status="captured", captured_minor=AMOUNT)
    declined = Operation("refund", "a", 40, "declined", code)

    refused = rules.next_operation(Target("refund", "a", 40), payment, [declined])

    assert isinstance(refused, RefundDeclined)
    assert (refused.payment_id, refused.reason) == (payment.id, reason)


AUTHORIZED_PAYMENT = Payment(status="authorized", authorized_minor=AMOUNT, charge_id=7)


@pytest.mark.parametrize(("asked", "taken"), [(0, AMOUNT), (AMOUNT, AMOUNT), (40, 40)])
def test_a_capture_takes_a_part_or_all(asked: int, taken: int):
    following = rules.next_operation(Target("capture", amount_minor=asked), AUTHORIZED_PAYMENT, [])

    assert following == NextOperation("capture", "", taken)


def test_no_more_is_captured_than_was_authorized():
    refused = rules.next_operation(Target("capture", amount_minor=AMOUNT + 1), AUTHORIZED_PAYMENT, [])

    assert isinstance(refused, CaptureTooLarge)
    assert (refused.wanted_minor, refused.authorized_minor) == (AMOUNT + 1, AMOUNT)


@pytest.mark.parametrize("asked", [0, 40])
def test_a_capture_that_was_begun_goes_on_with_its_amount(asked: int):
    begun = [Operation("capture", "", 40, "unknown")]

    for target in (Target("capture", amount_minor=asked), Target("void")):
        assert rules.next_operation(target, AUTHORIZED_PAYMENT, begun) == NextOperation("capture", "", 40)


@pytest.mark.parametrize("status", ["authorized", "captured", "partially_refunded", "refunded"])
def test_a_payment_is_not_captured_again_with_another_amount(status: Status):
    payment = msgspec.structs.replace(
        AUTHORIZED_PAYMENT, status=status, captured_minor=0 if status == "authorized" else 40
    )
    begun = [Operation("capture", "", 40, "intent" if status == "authorized" else "succeeded")]

    refused = rules.next_operation(Target("capture", amount_minor=41), payment, begun)

    assert isinstance(refused, CaptureAmountChanged)
    assert (refused.wanted_minor, refused.captured_minor) == (41, 40)


OPERATIONS = st.builds(Operation, st.sampled_from(get_args(OperationKind)), st.just(""), st.integers(1, AMOUNT))
OUTCOMES = st.sampled_from([Succeeded(1, 7), Declined("card_declined"), Declined("authorization_expired"), Unknown()])


@given(st.sampled_from(get_args(Status)), OPERATIONS, OUTCOMES)
def test_an_outcome_moves_along_the_table_or_not_at_all(status: Status, operation: Operation, outcome: ProviderResult):
    taken = AMOUNT if status in rules.CAPTURED else 0
    payment = Payment(status=status, captured_minor=taken, authorized_minor=AMOUNT, charge_id=7, version=3)
    if status == "refunded":
        payment = msgspec.structs.replace(payment, refunded_minor=AMOUNT)
        if operation.kind == "refund":
            return  # the bank gives nothing back that is not there

    after = rules.after_result(payment, operation, outcome)

    if after is payment:
        return
    assert after.status in rules.MOVES[status]
    assert after.version == payment.version + 1
    assert not isinstance(outcome, Unknown)


def test_a_charge_of_a_payment_that_is_closed_is_remembered():
    payment = Payment(status="voided", version=4)

    after = rules.after_result(payment, Operation("authorize", "", AMOUNT), Succeeded(1, 7))

    assert (after.status, after.version, after.charge_id) == ("voided", 4, 7)


def test_what_moves_money_is_a_transfer_between_two_accounts():
    assert set(rules.TRANSFERS) == {"charge", "capture", "refund"}
    assert all(debit != credit for debit, credit in rules.TRANSFERS.values())


class Ours(msgspec.Struct, frozen=True):
    kind: OperationKind = "capture"
    amount_minor: int = AMOUNT
    currency: str = "EUR"
    status: OperationStatus = "succeeded"
    payment_status: Status = "captured"
    payment_code: str | None = None
    has_void: bool = False


def line(**changes: Any) -> StatementLine:
    same = StatementLine(
        provider_id=1, key="1:capture", kind="capture", charge_id=7, amount_minor=AMOUNT, currency="EUR", code=None
    )
    return msgspec.structs.replace(same, **changes)


AUTHORIZED = Ours(kind="authorize", payment_status="voided")


@pytest.mark.parametrize(
    ("theirs", "ours", "expected"),
    [
        (line(), Ours(), None),
        (None, Ours(status="intent"), None),
        (None, Ours(status="declined"), None),
        (None, Ours(), "not_at_the_provider"),
        (line(), None, "not_in_our_books"),
        (line(code="declined"), None, None),
        (line(), Ours(status="unknown"), "outcome_recorded"),
        (line(code="declined"), Ours(status="intent"), "outcome_recorded"),
        (line(amount_minor=1), Ours(), "other_amount"),
        (line(amount_minor=1), Ours(status="intent"), "other_amount"),
        (line(currency="USD"), Ours(), "other_amount"),
        (line(kind="refund"), Ours(), "other_amount"),
        (line(), Ours(status="declined"), "other_outcome"),
        (line(code="declined"), Ours(), "other_outcome"),
        (line(code="declined"), Ours(status="declined"), None),
        (line(kind="charge"), Ours(kind="charge"), None),
        (line(kind="charge"), Ours(kind="charge", status="intent"), "outcome_recorded"),
        (line(kind="charge"), Ours(kind="charge", status="declined", payment_status="failed"), "other_outcome"),
        (line(kind="authorize"), AUTHORIZED, "authorization_voided"),
        (line(kind="authorize"), msgspec.structs.replace(AUTHORIZED, has_void=True), None),
        (line(kind="authorize"), msgspec.structs.replace(AUTHORIZED, payment_status="captured"), None),
        (line(kind="authorize"), msgspec.structs.replace(AUTHORIZED, payment_code="authorization_expired"), None),
    ],
)
def test_what_a_line_of_the_statement_says(theirs: StatementLine | None, ours: Ours | None, expected: str | None):
    assert rules.compare(theirs, ours) == expected
