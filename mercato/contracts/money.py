"""Money inside the shop: integer minor units and an ISO 4217 currency. Decimal strings exist only at the edge."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

EXPONENTS: Final[Mapping[str, int]] = {
    "AUD": 2,
    "BHD": 3,
    "BRL": 2,
    "CAD": 2,
    "CHF": 2,
    "CNY": 2,
    "CZK": 2,
    "DKK": 2,
    "EUR": 2,
    "GBP": 2,
    "HKD": 2,
    "HUF": 2,
    "IDR": 2,
    "ILS": 2,
    "INR": 2,
    "ISK": 0,
    "JOD": 3,
    "JPY": 0,
    "KRW": 0,
    "KWD": 3,
    "MXN": 2,
    "MYR": 2,
    "NOK": 2,
    "NZD": 2,
    "OMR": 3,
    "PHP": 2,
    "PLN": 2,
    "RON": 2,
    "SEK": 2,
    "SGD": 2,
    "THB": 2,
    "TND": 3,
    "TRY": 2,
    "TWD": 2,
    "UAH": 2,
    "USD": 2,
    "VND": 0,
    "ZAR": 2,
}
"""Digits after the decimal point of the currencies that a shop may sell in (ISO 4217, list one)."""

DEFAULT_CURRENCY: Final = "USD"

MAX_MINOR: Final = 10**12
"""The largest price of a product, in minor units: with 100 lines of 10 000 pieces a total stays below 2^63."""
