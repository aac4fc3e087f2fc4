"""Money at the edge: decimal strings out, amounts as people write them in, and nothing lost in between."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import msgspec
import pytest
from hypothesis import given, strategies as st

from mercato.chassis.contract import InvalidRequest
from mercato.contracts.money import AMOUNT_LENGTH, EXPONENTS, MAX_MINOR, decimal_string, to_minor, written
from mercato.contracts.order_refusals import AmountNotDue, NothingToRefund
from mercato.gateway.money import Amount, AmountIn, body_currency_errors, currency_of, money
from mercato.gateway.route import Input
from mercato.gateway.validation import decode_body, decode_query, decoder

currencies = st.sampled_from(sorted(EXPONENTS))


@given(st.integers(0, MAX_MINOR), currencies)
def test_what_goes_out_comes_back_in(minor: int, currency: str) -> None:
    assert to_minor(money(minor, currency).amount, currency) == minor


def test_every_currency_of_the_list_is_there_with_its_digits() -> None:
    """ISO 4217, list one: those that have digits."""
    assert len(EXPONENTS) == 165
    by_digits = {digits: [c for c, found in EXPONENTS.items() if found == digits] for digits in (0, 3, 4)}
    assert {digits: " ".join(found) for digits, found in by_digits.items()} == {
        0: "BIF CLP DJF GNF ISK JPY KMF KRW PYG RWF UGX UYI VND VUV XAF XOF XPF",
        3: "BHD IQD JOD KWD LYD OMR TND",
        4: "CLF UYW",
    }


@pytest.mark.parametrize(
    ("minor", "currency", "shown"),
    [
        (9999, "USD", "99.99"),
        (5, "USD", "0.05"),
        (0, "USD", "0.00"),
        (1000, "JPY", "1000"),
        (1, "KWD", "0.001"),
        (1, "CLF", "0.0001"),
        (-250, "EUR", "-2.50"),
        (-5, "EUR", "-0.05"),
    ],
)
def test_an_amount_has_the_digits_of_its_currency(minor: int, currency: str, shown: str) -> None:
    assert decimal_string(minor, EXPONENTS[currency]) == shown
    assert written(minor, currency) == f"{shown} {currency}"


@pytest.mark.parametrize(
    ("amount", "currency", "minor"),
    [("99.99", "USD", 9999), ("007", "USD", 700), ("5", "JPY", 5), ("5.000", "JPY", 5), ("1.5000", "USD", 150)],
)
def test_further_zeros_say_nothing(amount: str, currency: str, minor: int) -> None:
    assert to_minor(amount, currency) == minor


@pytest.mark.parametrize(
    ("amount", "currency", "wrong"),
    [
        ("99.999", "USD", "more than 2 digits"),
        ("0.5", "JPY", "has digits after the decimal point, which JPY does not have"),
        ("0." + "0" * 80 + "1", "USD", "more than 2 digits"),
        ("9" * AMOUNT_LENGTH, "USD", "is larger than 10000000000.00"),
        ("10000000000.01", "USD", "is larger than"),
        ("1", "XXX", "XXX is no currency of ISO 4217"),
    ],
)
def test_what_is_no_amount_of_a_currency_is_answered_with_a_reason(amount: str, currency: str, wrong: str) -> None:
    refused = to_minor(amount, currency)
    assert isinstance(refused, str)
    assert wrong in refused


@given(st.from_regex(r"[0-9]{1,15}(\.[0-9]{1,8})?", fullmatch=True, alphabet=st.characters(codec="ascii")), currencies)
def test_an_accepted_amount_is_exact_and_within_its_bounds(amount: str, currency: str) -> None:
    minor = to_minor(amount, currency)
    if isinstance(minor, int):
        assert Decimal(minor).scaleb(-EXPONENTS[currency]) == Decimal(amount)
        assert 0 <= minor <= MAX_MINOR


# ------------------------------------------------------------------------------------------------------------- grammar


class Body(Input):
    amount: Amount | None = None
    count: int = 0


def read(amount: str) -> Any:
    """What a body has whose `amount` is this piece of JSON."""
    return decode_body(decoder(Body), b'{"amount": %b}' % amount.encode()).amount


@pytest.mark.parametrize("amount", ["0", "12", "12.50", "0.001", "99.990", "123456789012345678901234567890.5"])
def test_digits_with_or_without_a_point_are_an_amount(amount: str) -> None:
    """As a string and as a number, as it is written: no float in between."""
    assert read(f'"{amount}"') == read(amount) == amount
    assert decode_query(Body, f"amount={amount}".encode()).amount == amount


WRONG = [
    "1e2", "1E2", "1.5e1", "1_000", "+12", "-1", "-0", ".5", "12.", "1.2.3", "1,50", " 1", "1 ", "1\\n", "",
    "0x1", "NaN", "Infinity", "\u0661\u0662", "\uff11", "1" * (AMOUNT_LENGTH + 1),
]  # fmt: skip


@pytest.mark.parametrize("amount", WRONG)
def test_no_other_text_is_an_amount(amount: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        read(f'"{amount}"')
    [error] = refused.value.errors
    assert (error.field, "amount:" in error.message or "characters" in error.message) == ("amount", True)


@pytest.mark.parametrize("amount", ["1e2", "1E2", "1.5e1", "-1", "-0.0", "1e-2", "true", "[1]", "{}"])
def test_no_other_piece_of_json_is_an_amount(amount: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        read(amount)
    assert [error.field for error in refused.value.errors] == ["amount"]


@pytest.mark.parametrize("amount", ["1e2", "%2B12", "-0", ".5", "1_000", "null", "%D9%A1"])
def test_the_grammar_holds_for_query_parameters(amount: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        decode_query(Body, f"amount={amount}".encode())
    assert [error.field for error in refused.value.errors] == ["?amount"]


def test_a_wrong_field_does_not_make_a_small_amount_wrong() -> None:
    with pytest.raises(InvalidRequest) as refused:
        decode_body(decoder(Body), b'{"amount": 0.00001, "count": 1.5}')
    assert [(e.field, e.message) for e in refused.value.errors] == [
        ("count", "must be a whole number, not a number with a fraction")
    ]


# ------------------------------------------------------------------------------------------------- the shape of answers


class Asked(Input):
    amount: AmountIn | None = None
    currency: str | None = None


def asked(body: Any) -> Asked:
    return decode_body(decoder(Asked), msgspec.json.encode(body))


def currency_and_errors(body: Any) -> tuple[str | None, list[str]]:
    read = asked(body)
    errors = body_currency_errors(read.amount, read.currency)
    return currency_of(read.amount, read.currency), [error.field for error in errors]


@given(st.integers(0, MAX_MINOR), currencies)
def test_an_amount_can_be_sent_back_as_it_was_read(minor: int, currency: str) -> None:
    shown = money(minor, currency)
    read = asked({"amount": shown})
    assert read.amount == shown.amount
    assert currency_and_errors({"amount": shown}) == (currency, [])


@pytest.mark.parametrize("amount", ["12.50", 12.5, 12])
def test_an_amount_is_the_same_bare_and_in_an_object(amount: Any) -> None:
    bare, inside = asked({"amount": amount}), asked({"amount": {"amount": amount}})
    assert bare.amount == inside.amount == Amount(amount)
    assert currency_and_errors({"amount": amount}) == currency_and_errors({"amount": {"amount": amount}}) == (None, [])


@pytest.mark.parametrize(
    ("body", "currency", "wrong"),
    [
        ({"amount": "1", "currency": "EUR"}, "EUR", []),
        ({"amount": {"amount": "1"}, "currency": "EUR"}, "EUR", []),
        ({"amount": {"amount": "1", "currency": "EUR"}}, "EUR", []),
        ({"amount": {"amount": "1", "currency": "EUR"}, "currency": None}, "EUR", []),
        ({"amount": {"amount": "1", "currency": "EUR"}, "currency": "EUR"}, "EUR", []),
        ({"amount": {"amount": "1", "currency": "EUR"}, "currency": "USD"}, "EUR", ["amount.currency"]),
        ({"amount": {"amount": "1", "currency": "XXX"}}, "XXX", ["amount.currency"]),
        ({"amount": "1", "currency": "XXX"}, "XXX", ["currency"]),
        ({"currency": "EUR"}, "EUR", []),
        ({}, None, []),
    ],
)
def test_a_body_has_one_currency(body: Any, currency: str | None, wrong: list[str]) -> None:
    assert currency_and_errors(body) == (currency, wrong)


def test_two_currencies_are_refused_with_both() -> None:
    errors = body_currency_errors(AmountIn("1", "EUR"), "USD")
    assert [e.message for e in errors] == ["is EUR, and currency is USD; give one of the two, or the same in both"]


@pytest.mark.parametrize("amount", ["1e2", "-1", "true", "[1]", '"12."'])
def test_the_grammar_holds_in_an_object(amount: str) -> None:
    for piece, field in ((amount, "amount"), (f'{{"amount": {amount}}}', "amount.amount")):
        with pytest.raises(InvalidRequest) as refused:
            decode_body(decoder(Asked), b'{"amount": %b}' % piece.encode())
        assert [error.field for error in refused.value.errors] == [field]


# -------------------------------------------------------------------------------------------------------------- errors


def test_sentences_have_amounts_as_people_write_them() -> None:
    """Each with its own currency, or else that of the error; the details keep minor units."""
    left = NothingToRefund(order_id=7, wanted_minor=2000, left_minor=1500, currency="JPY")
    due = AmountNotDue(order_id=7, expected_minor=100, expected_currency="EUR", due_minor=1, due_currency="KWD")
    assert str(left) == "Order 7 has 1500 JPY left to refund, not 2000 JPY."
    assert str(due) == "For order 7, 0.001 KWD is due, not 1.00 EUR."
    assert msgspec.to_builtins(left.details)["left_minor"] == 1500
