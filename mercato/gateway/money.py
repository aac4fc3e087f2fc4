"""Money at the edge: a decimal string and a currency, never a float. Inside: minor units (`contracts/money.py`)."""

from __future__ import annotations

import functools
from decimal import Decimal
from typing import Annotated, Final

import msgspec

from mercato.contracts.money import EXPONENTS, MAX_MINOR

FRACTION_LIMIT: Final = 64
"""Digits after the point that are looked at; further zeros say nothing, and nobody means them."""

REMEMBERED_AMOUNTS: Final = 4_096


class Money(msgspec.Struct, frozen=True):
    """An amount in major units as a decimal string, with as many digits after the point as the currency has."""

    amount: Annotated[str, msgspec.Meta(examples=["99.99"])]
    currency: Annotated[str, msgspec.Meta(examples=["USD"])]


@functools.lru_cache(REMEMBERED_AMOUNTS)
def money(minor: int, currency: str) -> Money:
    """Remembered: prices are few, and an order shows the same amount in several places."""
    return Money(decimal_string(minor, EXPONENTS[currency]), currency)


def decimal_string(minor: int, exponent: int) -> str:
    if exponent == 0:
        return str(minor)
    sign = "-" if minor < 0 else ""
    whole, part = divmod(abs(minor), 10**exponent)
    return f"{sign}{whole}.{part:0{exponent}d}"


def to_minor(amount: Decimal, currency: str, limit_minor: int = MAX_MINOR) -> int | str:
    """The amount in minor units, or a sentence that says what is wrong with it."""
    exponent = EXPONENTS.get(currency)
    if exponent is None:
        return unknown_currency(currency)
    if not amount.is_finite():
        return "is not a number"
    if amount < 0:
        return "is negative"
    # Compared by magnitude first: 1E+999999999 must not be written out as an integer.
    if amount.adjusted() > 18 or amount > Decimal(limit_minor).scaleb(-exponent):
        return f"is larger than {decimal_string(limit_minor, exponent)}"
    # Length first: a body has room for a million digits after the point, and looking at each of them takes a while.
    if int(amount.as_tuple().exponent) < -FRACTION_LIMIT or _fraction_digits(amount) > exponent:
        return f"has more than {exponent} digits after the decimal point, which {currency} does not have"
    return int(amount.scaleb(exponent))


def _fraction_digits(amount: Decimal) -> int:
    """How many digits after the point say something. Counted by hand: arithmetic would round, or underflow to zero."""
    _, digits, exponent = amount.as_tuple()
    text = "".join(map(str, digits)).rstrip("0")
    return -int(exponent) - (len(digits) - len(text)) if text else 0


def unknown_currency(currency: str) -> str:
    return f"is not a currency that this shop knows ({', '.join(EXPONENTS)})"
