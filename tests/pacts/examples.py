"""Examples as Pact expectations: every value of an example is compared by its type, or, where it says so, exactly.

    {"state": exactly("held"), "lines": [{"product_id": 100}], "expires_in_s": 900.0}

An empty object is any object. A list is any list with at least one element like its only one; an empty list, `None` and
what is in `exactly` are compared as they are. A text in the form of a time is any time.
"""

from __future__ import annotations

import re
from typing import Any, Final, cast

import msgspec
from pact import match as matchers

TIME: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")


class Exactly(msgspec.Struct, frozen=True):
    """A value on which the reader depends."""

    value: Any


def exactly(value: Any) -> Any:
    return Exactly(value)


def expectation(example: Any) -> Any:
    """The example with Pact's matchers."""
    match example:
        case Exactly(value):
            return value
        case dict() as fields if not fields:
            return matchers.type({})
        case dict() as fields:
            return {name: expectation(value) for name, value in cast(dict[str, Any], fields).items()}
        case [] | None:
            return example
        case [only]:
            return matchers.each_like(expectation(only), min=1)
        case list():
            raise AssertionError("a list of an example has one element, which stands for all")
        case bool() as value:
            return matchers.bool(value)
        case int() as value:
            return matchers.int(value)
        case float() as value:
            return matchers.number(value)
        case str() as value if TIME.fullmatch(value):
            return matchers.regex(value, regex=f"^{TIME.pattern}$")
        case str() as value:
            return matchers.str(value)
        case value:
            raise AssertionError(f"{value!r} is no JSON")


def values_of(example: Any) -> Any:
    """The example as plain JSON values."""
    match example:
        case Exactly(value):
            return value
        case dict() as fields:
            return {name: values_of(value) for name, value in cast(dict[str, Any], fields).items()}
        case list() as elements:
            return [values_of(each) for each in cast(list[Any], elements)]
        case value:
            return value
