"""The rules of payments: a machine that crashes, repeats and reorders at every step, and the tables themselves."""

from __future__ import annotations

from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mercato.contracts.payments import OperationKind, OperationStatus, Status
from mercato.services.payments import rules, store
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

AMOUNT = 100
TARGETS = st.sampled_from([Target("authorize"), Target("charge"), Target("capture"), Target("void")]) | st.builds(
    Target, st.just("refund"), st.sampled_from(["a", "b", "c"]), st.sampled_from([40, 60, 100])
)
WAYS = [None, (), (Target("authorize"),), (Target("authorize"), Target("capture")), (Target("charge"),)]
FATES = st.sampled_from(["done", "the answer is lost", "the call is late", "the answer is late", "the power fails"])


class Payment(msgspec.Struct, frozen=True):
    id: int = 1
    currency: str = "EUR"
    amount_minor: int = AMOUNT
    authorized_minor: int = 0
    captured_minor: int = 0
    refunded_minor: int = 0
    status: Status = "pending"
    code: str | None = None
    charge_id: int | None = None
    version: int = 1


class Operation(msgspec.Struct, frozen=True):
    kind: OperationKind
    reference: str
    amount_minor: int
    status: OperationStatus = "intent"
    code: str | None = None

    @property
    def key(self) -> str:
        return rules.key_of(1, 7, 1, self.kind, self.reference)


class Bank:
    """A provider that does each key once. It is written apart from ours, on purpose."""

    def __init__(self, *, declines: bool, expires: bool) -> None:
        self.declines, self.expires = declines, expires
        self.done: dict[str, ProviderResult] = {}
        self.state = "none"
        self.captured = self.refunded = self.captures = self.opened = 0

    def hear(self, operation: Operation) -> ProviderResult:
        if operation.key not in self.done:
            code = getattr(self, operation.kind)(operation.amount_minor)
            self.done[operation.key] = Declined(code) if code else Succeeded(len(self.done) + 1, 1)
        return self.done[operation.key]

    def authorize(self, _amount: int) -> str | None:
        if self.declines:
            return "card_declined"
        self.state, self.opened = "open", self.opened + 1
        return None

    def charge(self, amount: int) -> str | None:
        if self.declines or self.expires:
            return "card_declined" if self.declines else "authorization_expired"
        self.state, self.captured = "captured", self.captured + amount
        self.opened, self.captures = self.opened + 1, self.captures + 1
        return None

    def capture(self, amount: int) -> str | None:
        if self.state != "open":
            return f"already_{self.state}"
        if self.expires:
            self.state = "expired"
            return "authorization_expired"
        self.state, self.captured, self.captures = "captured", amount, self.captures + 1
        return None

    def void(self, _amount: int) -> str | None:
        if self.state != "open":
            return "authorization_expired" if self.state == "expired" else f"already_{self.state}"
        self.state = "voided"
        return None

    def refund(self, amount: int) -> str | None:
        if amount > self.captured - self.refunded:
            return "amount_too_large"
        self.refunded += amount
        return None


class Machine(RuleBasedStateMachine):
    """One payment. `calls` are on their way to the bank, `answers` on their way back: lost, repeated, late."""

    def __init__(self) -> None:
        super().__init__()
        self.payment = Payment()
        self.operations: dict[str, Operation] = {}
        self.calls: list[str] = []
        self.answers: list[tuple[str, ProviderResult]] = []
        self.bank = Bank(declines=False, expires=False)

    @initialize(card=st.sampled_from(["good", "good", "declined", "expiring"]), way=st.sampled_from(WAYS))
    def begin(self, card: str, way: tuple[Target, ...] | None) -> None:
        """With one card or another; some way into its life, or void before it is begun."""
        self.bank = Bank(declines=card == "declined", expires=card == "expiring")
        if way is None:
            self.payment = Payment(status="voided")
        for target in way or ():
            self.want(target, "done")

    @rule(wanted=TARGETS, fate=FATES)
    def want(self, wanted: Target, fate: str) -> None:
        """A request arrives. It ends in one of the ways in which its three parts can end."""
        following = rules.next_operation(wanted, self.payment, self.operations.values())
        if not isinstance(following, NextOperation):
            assert following or wanted.kind != "void" or self.payment.status not in ("pending", "authorized")
            assert following or wanted.kind != "charge" or self.payment.status not in ("pending", "authorized")
            return
        operation = Operation(following.kind, following.reference, following.amount_minor)
        operation = self.operations.setdefault(operation.key, operation)
        assert operation.status in rules.OPEN, "the provider is not called again with what is settled"
        match fate:
            case "done":
                self.record(operation.key, self.bank.hear(operation))
            case "the answer is lost":
                self.bank.hear(operation)
                self.record(operation.key, Unknown())
            case "the call is late":
                self.calls.append(operation.key)
            case "the answer is late":
                self.answers.append((operation.key, self.bank.hear(operation)))
            case _:
                """The power fails: the intent is there, and nobody remembers it."""

    @precondition(lambda self: self.calls or self.answers)
    @rule(data=st.data(), twice=st.booleans())
    def what_was_late_arrives(self, data: st.DataObject, twice: bool) -> None:
        """In any order, and perhaps not for the last time."""
        late = data.draw(st.sampled_from([*self.calls, *self.answers]))
        if isinstance(late, str):
            self.answers.append((late, self.bank.hear(self.operations[late])))
            if not twice:
                self.calls.remove(late)
            return
        self.record(*late)
        if not twice:
            self.answers.remove(late)

    @rule()
    def all_processes_die(self) -> None:
        """What was in memory is gone; what is on its way to the bank still arrives. The sweep calls again."""
        self.answers.clear()
        self.calls += [key for key, operation in self.operations.items() if operation.status in rules.OPEN]

    def record(self, key: str, outcome: ProviderResult) -> None:
        """Part 3: a transaction, guarded by what the operation is."""
        operation = self.operations[key]
        if operation.status not in rules.OPEN:
            return
        code = outcome.code if isinstance(outcome, Declined) else None
        self.operations[key] = msgspec.structs.replace(operation, status=store.status_of(outcome), code=code)
        if not isinstance(outcome, Unknown):
            self.payment = rules.settle(self.payment, operation, outcome)

    @invariant()
    def nothing_is_done_twice(self) -> None:
        assert self.bank.opened <= 1
        assert self.bank.captures <= 1
        assert self.bank.refunded <= self.bank.captured <= AMOUNT
        assert not {"authorize", "charge"} <= {o.kind for o in self.operations.values()}

    @invariant()
    def we_never_say_more_than_the_bank_has_done(self) -> None:
        assert self.payment.captured_minor <= self.bank.captured
        assert self.payment.refunded_minor <= self.bank.refunded
        assert self.payment.status != "voided" or self.bank.state in ("none", "voided", "expired")

    @invariant()
    def no_more_is_promised_than_was_taken(self) -> None:
        promised = [o.amount_minor for o in self.operations.values() if o.kind == "refund" and o.status != "declined"]
        assert sum(promised) <= self.payment.captured_minor

    @invariant()
    def one_operation_that_is_not_a_refund_is_open(self) -> None:
        open_ = [o.kind for o in self.operations.values() if o.status in rules.OPEN and o.kind != "refund"]
        assert len(open_) <= 1

    def teardown(self) -> None:
        """Once faults stop, calls with the same keys bring both sides together."""
        for key, operation in list(self.operations.items()):
            self.record(key, self.bank.hear(operation))
        assert all(o.status not in rules.OPEN for o in self.operations.values())
        assert (self.payment.captured_minor, self.payment.refunded_minor) == (self.bank.captured, self.bank.refunded)
        expected = {"open": "authorized", "voided": "voided", "expired": "voided"}
        if self.bank.state in expected:
            assert self.payment.status == expected[self.bank.state]


TestPayments = Machine.TestCase
TestPayments.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


# ------------------------------------------------------------------------------------------------------------- tables


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
    after = rules.settle(Payment(amount_minor=0), NextOperation(kind, "", 0), rules.NOT_ASKED)

    assert (after.status, after.charge_id) == ({"authorize": "authorized", "charge": "captured"}[kind], None)


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

    after = rules.settle(payment, operation, outcome)

    if after is payment:
        return
    assert after.status in rules.MOVES[status]
    assert after.version == payment.version + 1
    assert not isinstance(outcome, Unknown)


def test_a_charge_of_a_payment_that_is_closed_is_remembered():
    payment = Payment(status="voided", version=4)

    after = rules.settle(payment, Operation("authorize", "", AMOUNT), Succeeded(1, 7))

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
