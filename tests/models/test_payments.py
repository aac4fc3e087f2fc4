"""The rules of payments: a machine that crashes, repeats and reorders at every step, and the bank beside it."""

from __future__ import annotations

import msgspec
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mercato.services.payments import rules
from mercato.services.payments.rules import (
    Declined,
    NextOperation,
    ProviderResult,
    Succeeded,
    Target,
    Unknown,
)
from services.payments.values import AMOUNT, Operation, Payment

TARGETS = st.sampled_from(
    [Target("authorize"), Target("charge"), Target("capture"), Target("capture", amount_minor=30), Target("void")]
) | st.builds(Target, st.just("refund"), st.sampled_from(["a", "b", "c"]), st.sampled_from([40, 60, 100]))
WAYS = [None, (), (Target("authorize"),), (Target("authorize"), Target("capture")), (Target("charge"),)]
FATES = st.sampled_from(["done", "the answer is lost", "the call is late", "the answer is late", "the power fails"])


class Bank:
    """A provider that does each key once. It is written apart from ours, on purpose."""

    def __init__(self, *, declines: bool, expires: bool) -> None:
        self.declines, self.expires = declines, expires
        self.done: dict[str, ProviderResult] = {}
        self.state = "none"
        self.captured = self.refunded = self.captures = self.opened = 0

    def execute(self, operation: Operation) -> ProviderResult:
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
                self.record(operation.key, self.bank.execute(operation))
            case "the answer is lost":
                self.bank.execute(operation)
                self.record(operation.key, Unknown())
            case "the call is late":
                self.calls.append(operation.key)
            case "the answer is late":
                self.answers.append((operation.key, self.bank.execute(operation)))
            case _:
                """The power fails: the intent is there, and no process remembers it."""

    @precondition(lambda self: self.calls or self.answers)
    @rule(data=st.data(), twice=st.booleans())
    def what_was_late_arrives(self, data: st.DataObject, twice: bool) -> None:
        """In any order, and perhaps not for the last time."""
        late = data.draw(st.sampled_from([*self.calls, *self.answers]))
        if isinstance(late, str):
            self.answers.append((late, self.bank.execute(self.operations[late])))
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
        self.operations[key] = msgspec.structs.replace(operation, status=rules.status_of(outcome), code=code)
        if not isinstance(outcome, Unknown):
            self.payment = rules.after_result(self.payment, operation, outcome)

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
            self.record(key, self.bank.execute(operation))
        assert all(o.status not in rules.OPEN for o in self.operations.values())
        assert (self.payment.captured_minor, self.payment.refunded_minor) == (self.bank.captured, self.bank.refunded)
        expected = {"open": "authorized", "voided": "voided", "expired": "voided"}
        if self.bank.state in expected:
            assert self.payment.status == expected[self.bank.state]


TestPayments = Machine.TestCase
TestPayments.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
