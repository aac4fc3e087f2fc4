"""Money at the edge: decimal strings out, decimals in, and nothing lost in between."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given, strategies as st

from mercato.contracts.money import EXPONENTS, MAX_MINOR
from mercato.gateway.money import decimal_string, money, to_minor

currencies = st.sampled_from(sorted(EXPONENTS))


@given(st.integers(0, MAX_MINOR), currencies)
def test_what_goes_out_comes_back_in(minor: int, currency: str) -> None:
    assert to_minor(Decimal(money(minor, currency).amount), currency) == minor


@pytest.mark.parametrize(
    ("minor", "currency", "shown"),
    [
        (9999, "USD", "99.99"),
        (5, "USD", "0.05"),
        (0, "USD", "0.00"),
        (1000, "JPY", "1000"),
        (1, "KWD", "0.001"),
        (-250, "EUR", "-2.50"),
        (-5, "EUR", "-0.05"),
    ],
)
def test_an_amount_has_the_digits_of_its_currency(minor: int, currency: str, shown: str) -> None:
    assert decimal_string(minor, EXPONENTS[currency]) == shown


@pytest.mark.parametrize(
    ("amount", "currency", "minor"),
    [
        ("99.99", "USD", 9999),
        ("1E+2", "USD", 10_000),
        ("5", "JPY", 5),
        ("5.000", "JPY", 5),
        ("1.5000", "USD", 150),
        ("-0", "USD", 0),
    ],
)
def test_an_amount_may_be_written_in_more_than_one_way(amount: str, currency: str, minor: int) -> None:
    assert to_minor(Decimal(amount), currency) == minor


@pytest.mark.parametrize(
    ("amount", "currency", "wrong"),
    [
        ("99.999", "USD", "more than 2 digits"),
        ("0.5", "JPY", "more than 0 digits"),
        ("0." + "0" * 80 + "1", "USD", "more than 2 digits"),
        ("1." + "0" * 80, "USD", "more than 2 digits"),
        ("-0.01", "USD", "is negative"),
        ("NaN", "USD", "is not a number"),
        ("sNaN", "USD", "is not a number"),
        ("-Infinity", "USD", "is not a number"),
        ("1E+999", "USD", "is larger than 10000000000.00"),
        ("1E+999999999999999999", "USD", "is larger than"),
        ("1E-999999999999999999", "USD", "more than 2 digits"),
        ("10000000000.01", "USD", "is larger than"),
        ("1", "XXX", "is not a currency"),
    ],
)
def test_what_is_no_amount_is_answered_with_a_reason(amount: str, currency: str, wrong: str) -> None:
    refused = to_minor(Decimal(amount), currency)
    assert isinstance(refused, str)
    assert wrong in refused


@given(st.decimals(allow_nan=True, allow_infinity=True), currencies)
def test_an_accepted_amount_is_exact_and_within_its_bounds(amount: Decimal, currency: str) -> None:
    minor = to_minor(amount, currency)
    if isinstance(minor, int):
        assert Decimal(minor).scaleb(-EXPONENTS[currency]) == amount
        assert 0 <= minor <= MAX_MINOR
