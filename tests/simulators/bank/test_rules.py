"""The rules of the bank, for all sequences of operations on a charge."""

from __future__ import annotations

from typing import get_args

import msgspec
import pytest
from hypothesis import given, strategies as st

from mercato.simulators.bank import rules
from mercato.simulators.bank.contract import OperationKind
from mercato.simulators.bank.rules import State

OPERATIONS = st.lists(st.tuples(st.sampled_from(["capture", "void", "refund"]), st.integers(0, 120)), max_size=12)


class Charge(msgspec.Struct, frozen=True):
    id: int = 1
    order_id: int = 1
    method: str = "sandbox:ok"
    currency: str = "EUR"
    authorized_minor: int = 100
    captured_minor: int = 0
    refunded_minor: int = 0
    state: State = "open"


@given(OPERATIONS, st.sampled_from(["sandbox:ok", rules.CAPTURE_EXPIRED]))
def test_money_is_taken_once_and_never_given_back_twice(operations: list[tuple[OperationKind, int]], method: str):
    charge, captures, captured, refunded = Charge(method=method), 0, 0, 0
    for kind, amount in operations:
        before = charge
        charge, code = rules.carry_out(before, kind, amount)
        captures += kind == "capture" and code is None
        captured += amount if kind == "capture" and code is None else 0
        refunded += amount if kind == "refund" and code is None else 0
        assert code is None or charge is before or charge.state == "expired"

    assert captures <= 1
    assert charge.captured_minor == captured <= charge.authorized_minor
    assert refunded == charge.refunded_minor <= charge.captured_minor


def test_every_refusal_is_of_a_state_that_there_is():
    assert all(set(refusals) < set(get_args(State)) for refusals in rules.REFUSALS.values())


@pytest.mark.parametrize(
    ("method", "expected"), [("sandbox:ok", None), ("sandbox:slow:250", 250), ("sandbox:slow:99999", 60_000)]
)
def test_how_long_a_method_takes(method: str, expected: int | None):
    assert rules.delay_ms(method) == expected
