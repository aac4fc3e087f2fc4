"""Money in the API: a decimal string and a currency, never a float. Services use minor units (`contracts/money.py`)."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Annotated, Any, Final, Self, cast

import msgspec

from mercato.chassis.contract import FieldError, checked, worded
from mercato.contracts.money import AMOUNT_LENGTH, AMOUNT_PATTERN, EXPONENTS, decimal_string, to_minor, unknown_currency
from mercato.gateway.route import Input

CURRENCY_PATTERN: Final = r"^[A-Z]{3}\Z"
Currency = Annotated[
    str,
    msgspec.Meta(
        pattern=CURRENCY_PATTERN,
        examples=["USD"],
        extra={
            **worded("must be three capital letters, such as USD"),
            **checked(lambda currency: None if currency in EXPONENTS else unknown_currency(currency)),
        },
    ),
]

REMEMBERED_AMOUNTS: Final = 4_096

_matches: Final = re.compile(AMOUNT_PATTERN).match


class Money(msgspec.Struct, frozen=True):
    """An amount in major units as a decimal string, with as many digits after the point as the currency has."""

    amount: Annotated[str, msgspec.Meta(examples=["99.99"])]
    currency: Annotated[str, msgspec.Meta(examples=["USD"])]


@functools.lru_cache(REMEMBERED_AMOUNTS)
def money(minor: int, currency: str) -> Money:
    """Cached: an order shows the same amount in several places, and there are few prices."""
    return Money(decimal_string(minor, EXPONENTS[currency]), currency)


class Amount(str):
    """The text of an amount in a request: a JSON string or number, unchanged.

    Digits, with or without a point and more digits (`AMOUNT_PATTERN`): no sign, exponent, blank or separator.
    """

    __slots__ = ()


class MoneyIn(Input):
    """An amount and its currency, in the form that answers have: a client can send back what it has read."""

    amount: Annotated[
        Amount, msgspec.Meta(description="In major units, as a JSON string or number.", examples=["99.99"])
    ]
    currency: Annotated[
        Currency | None, msgspec.Meta(description="Without it, that of the order or product, or else of the shop.")
    ] = None


class AmountIn(Amount):
    """An amount in a body: bare, or with its currency in one object, a `MoneyIn`."""

    __slots__ = ("currency",)
    currency: str | None
    """The currency in the object; None where it has none, or the amount is bare."""

    def __new__(cls, amount: str, currency: str | None = None) -> Self:
        made = super().__new__(cls, amount)
        made.currency = currency
        return made


class ExactFloat(float):
    """A JSON number with a point or an exponent, and how it was written."""

    written: str


def exact_float(written: str) -> ExactFloat:
    number = ExactFloat(written)
    number.written = written
    return number


def decode_amount(kind: type[Any], value: Any) -> Any:
    """The hook that msgspec calls for fields of the types `Amount` and `AmountIn`. Raises ValueError."""
    if kind is not AmountIn:
        assert kind is Amount, f"{kind} is not decoded here"
        return Amount(_checked(value))
    if not isinstance(value, Mapping):
        return AmountIn(_checked(value))
    try:
        given = msgspec.convert(cast(Mapping[str, Any], value), MoneyIn, dec_hook=decode_amount)
    except msgspec.ValidationError as error:  # `validation.wrong_fields` names the fields of the object
        raise ValueError(f"is not an object of amount and currency: {error}") from None
    return AmountIn(given.amount, given.currency)


def _checked(value: Any) -> str:
    if isinstance(value, ExactFloat):
        value = value.written
    elif isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise ValueError("is neither a string nor a number")
    if len(value) > AMOUNT_LENGTH:
        raise ValueError(f"has more than {AMOUNT_LENGTH} characters")
    if not _matches(value):
        raise ValueError("is not an amount: digits, with or without a point and more digits, such as 99.99")
    return value


def text_of(amount: Amount | None) -> str | None:
    """The amount as text, for the service that knows its currency."""
    return None if amount is None else str(amount)


def currency_of(amount: AmountIn | None, beside: str | None) -> str | None:
    """The currency that a body gives: in its field `amount`, or beside it in `currency`."""
    return beside if amount is None or amount.currency is None else amount.currency


def body_currency_errors(amount: AmountIn | None, beside: str | None) -> list[FieldError]:
    """What is wrong with the currencies of a body: one of them is unknown, or the two differ."""
    inside = None if amount is None else amount.currency
    errors = [*currency_errors("amount.currency", inside), *currency_errors("currency", beside)]
    if inside is not None and beside is not None and inside != beside:
        message = f"is {inside}, and currency is {beside}; give one of the two, or the same in both"
        errors.append(FieldError(field="amount.currency", message=message))
    return errors


def currency_errors(field: str, currency: str | None) -> list[FieldError]:
    if currency is None or currency in EXPONENTS:
        return []
    return [FieldError(field=field, message=unknown_currency(currency))]


def minor_of(amount: str | None, currency: str | None) -> int | None:
    """The amount in minor units; None without one. `amount_errors` must have found nothing."""
    minor = None if amount is None or currency is None else to_minor(amount, currency)
    assert not isinstance(minor, str), minor
    return minor


def amount_errors(field: str, amount: str | None, currency: str | None) -> list[FieldError]:
    """What is wrong with an amount of a known currency, such as too many digits after the point."""
    minor = None if amount is None or currency is None else to_minor(amount, currency)
    return [FieldError(field=field, message=minor)] if isinstance(minor, str) else []
