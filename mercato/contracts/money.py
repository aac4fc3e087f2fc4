"""Money inside the shop: integer minor units and an ISO 4217 currency; and decimal amounts of clients.

A price has the currency of its product, a payment or refund that of its order. An amount that a client sends without a
currency is passed on as text, and the service that knows the currency converts it to minor units.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final

from msgspec import Meta

from mercato.chassis.contract import ServiceError, worded

_BY_DIGITS: Final = {
    0: "BIF CLP DJF GNF ISK JPY KMF KRW PYG RWF UGX UYI VND VUV XAF XOF XPF",
    2: (
        "AED AFN ALL AMD AOA ARS AUD AWG AZN BAM BBD BDT BMD BND BOB BOV BRL BSD BTN BWP BYN BZD CAD CDF CHE CHF CHW "
        "CNY COP COU CRC CUP CVE CZK DKK DOP DZD EGP ERN ETB EUR FJD FKP GBP GEL GHS GIP GMD GTQ GYD HKD HNL HTG HUF "
        "IDR ILS INR IRR JMD KES KGS KHR KPW KYD KZT LAK LBP LKR LRD LSL MAD MDL MGA MKD MMK MNT MOP MRU MUR MVR MWK "
        "MXN MXV MYR MZN NAD NGN NIO NOK NPR NZD PAB PEN PGK PHP PKR PLN QAR RON RSD RUB SAR SBD SCR SDG SEK SGD SHP "
        "SLE SOS SRD SSP STN SVC SYP SZL THB TJS TMT TOP TRY TTD TWD TZS UAH USD USN UYU UZS VED VES WST XAD XCD XCG "
        "YER ZAR ZMW ZWG"
    ),
    3: "BHD IQD JOD KWD LYD OMR TND",
    4: "CLF UYW",
}
"""ISO 4217, list one, without metals, test codes, and funds codes that have no digits."""

EXPONENTS: Final[Mapping[str, int]] = dict(
    sorted((currency, digits) for digits, currencies in _BY_DIGITS.items() for currency in currencies.split())
)
"""All currencies, with their digits after the decimal point."""

DEFAULT_CURRENCY: Final = "USD"
"""The currency of a shop without a setting."""

MAX_MINOR: Final = 10**12
"""The largest price of a product, in minor units: with 100 lines of 10 000 pieces a total stays below 2^63."""

AMOUNT_PATTERN: Final = r"^[0-9]+(\.[0-9]+)?\Z"
"""The grammar of amounts: digits, with or without a point and more digits."""
AMOUNT_LENGTH: Final = 100
AmountText = Annotated[
    str,
    Meta(
        pattern=AMOUNT_PATTERN,
        extra=worded("must be digits, with or without a point and more digits, such as 99.99"),
        max_length=AMOUNT_LENGTH,
        examples=["99.99"],
    ),
]
"""An amount in major units, unchanged from the client."""


def to_minor(amount: str, currency: str, limit_minor: int = MAX_MINOR) -> int | str:
    """An `AmountText` in minor units, or a sentence that says what is wrong with it."""
    digits = EXPONENTS.get(currency)
    if digits is None:
        return unknown_currency(currency)
    whole, _, fraction = amount.partition(".")
    if fraction[digits:].strip("0"):
        if digits == 0:
            return f"has digits after the decimal point, which {currency} does not have"
        return f"has more than {digits} digits after the decimal point, which {currency} does not have"
    minor = int(whole + fraction[:digits].ljust(digits, "0"))
    return minor if minor <= limit_minor else f"is larger than {decimal_string(limit_minor, digits)}"


def decimal_string(minor: int, digits: int) -> str:
    if digits == 0:
        return str(minor)
    sign = "-" if minor < 0 else ""
    whole, part = divmod(abs(minor), 10**digits)
    return f"{sign}{whole}.{part:0{digits}d}"


def written(minor: int, currency: str) -> str:
    """For people: `12.50 EUR`, `1200 JPY`."""
    return f"{decimal_string(minor, EXPONENTS.get(currency, 2))} {currency}"


def unknown_currency(currency: str) -> str:
    return f"{currency} is no currency of ISO 4217"


class MoneyError(ServiceError, is_base=True):
    """An error whose sentence has amounts. The currency of a field `left_minor` is the field `left_currency`, or else
    `currency`."""

    def sentence_values(self) -> dict[str, Any]:
        fields = super().sentence_values()
        for name in fields:
            kind = name.removesuffix("_minor")
            currency = fields.get(f"{kind}_currency", fields.get("currency"))
            if kind != name and currency is not None:
                fields[name] = written(getattr(self, name), currency)
        return fields
