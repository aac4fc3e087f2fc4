"""Messages about refused values, in the terms of the API: `must be at least 1`, `must be one of red, green`.

msgspec checks the values; its messages name Python types and regular expressions. This module alone translates them.
The text for a pattern stands beside it, in the `Meta` of the type:

    Sku = Annotated[str, Meta(pattern=r"^[A-Z]+\\Z", extra=worded("must be capital letters"))]
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, Literal, Union, cast, get_args, get_origin

import msgspec

WORDS: Final = "words"
CHECK: Final = "check"

Check = Callable[[Any], str | None]
"""What is wrong with a value that fits its type, as the end of a sentence about its field; None where nothing is."""

KINDS: Final[Mapping[str, str]] = {
    "array": "a list",
    "bool": "true or false",
    "bytes": "bytes in base64",
    "datetime": "a time such as 2026-01-15T09:30:00Z",
    "float": "a number",
    "int": "a whole number",
    "null": "null",
    "object": "an object",
    "str": "a text",
    "ExactFloat": "a number",
}
"""The types of JSON values: msgspec's name, and the words of a sentence."""

GOT: Final[Mapping[str, str]] = {**KINDS, "float": "a number with a fraction", "ExactFloat": "a number with a fraction"}
PIECES: Final[Mapping[str, str]] = {"array": "item", "object": "member", "bytes": "byte", "str": "character"}
BOUNDS: Final[Mapping[str, str]] = {
    ">=": "at least",
    "<=": "at most",
    ">": "more than",
    "<": "less than",
}


def worded(words: str) -> dict[str, Any]:
    """The `extra` of a `Meta` with a pattern: what it requires, as the end of a sentence about the field."""
    return {WORDS: words}


def checked(check: Check) -> dict[str, Any]:
    """The `extra` of a `Meta` with a further check. It only explains; the code that relies on it checks again."""
    return {CHECK: check}


def explained(text: str, kind: Any = None) -> str:
    """A message of msgspec in the terms of the API. `kind`: the type that the value does not fit, if known."""
    for pattern, words in _SENTENCES:
        if found := pattern.match(text):
            return words(found, kind)
    text = text.replace("`", "")
    return text[:1].lower() + text[1:]


def checks(kind: Any) -> Iterator[Check]:
    """The checks of a type besides those of msgspec."""
    for meta in metas(kind):
        if meta.extra and CHECK in meta.extra:
            yield cast(Check, meta.extra[CHECK])


def metas(kind: Any) -> Iterator[msgspec.Meta]:
    """Every `Meta` of a type, and of the options of a union."""
    for option in _options(kind):
        yield from (meta for meta in getattr(option, "__metadata__", ()) if isinstance(meta, msgspec.Meta))


def _options(kind: Any) -> Iterator[Any]:
    yield kind
    if hasattr(kind, "__metadata__"):
        yield from _options(kind.__origin__)
    elif get_origin(kind) in (Union, types.UnionType):
        for option in get_args(kind):
            yield from _options(option)


# ------------------------------------------------------------------------------------------------------------ sentences

Sentence = Callable[[re.Match[str], Any], str]


def _other_kind(found: re.Match[str], _kind: Any) -> str:
    wanted = [KINDS.get(name, name) for name in found[1].split(" | ") if name != "null"] or ["null"]
    got = GOT.get(found[2], found[2])
    needed = " or ".join(dict.fromkeys(wanted))
    return f"must be {needed}" if got in wanted else f"must be {needed}, not {got}"


def _length(found: re.Match[str], _kind: Any) -> str:
    piece, bound, count = PIECES.get(found[1], "piece"), found[2], int(found[3])
    if (bound, count) == (">=", 1):
        return "must not be empty"
    return f"must have {BOUNDS[bound]} {count} {piece}{'' if count == 1 else 's'}"


def _range(found: re.Match[str], _kind: Any) -> str:
    return f"must be {BOUNDS[found[1]]} {found[2]}"


def _pattern(found: re.Match[str], kind: Any) -> str:
    for meta in metas(kind):
        if meta.pattern is not None and meta.extra and WORDS in meta.extra:
            return cast(str, meta.extra[WORDS])
    return "does not have the form that this takes"


def _enumeration(found: re.Match[str], kind: Any) -> str:
    values = [value for option in _options(kind) if get_origin(option) is Literal for value in get_args(option)]
    return (
        f"must be one of {', '.join(map(str, values))}" if values else f"is {found[1][:100]}, which this does not take"
    )


def _always(words: str) -> Sentence:
    return lambda _found, _kind: words


_TABLE: Final[tuple[tuple[str, Sentence], ...]] = (
    (r"Expected `([^`]*)`, got `([^`]*)`\Z", _other_kind),
    (r"Expected `(\w+)` of length (>=|<=) (\d+)\Z", _length),
    (r"Expected `\w+` (>=|<=|>|<) (-?[0-9.e+]+)\Z", _range),
    (r"Expected `\w+` that's a multiple of (.+)\Z", lambda found, _: f"must be a multiple of {found[1]}"),
    (r"Expected `str` matching regex .*\Z", _pattern),
    (r"Invalid enum value (.*)\Z", _enumeration),
    (r"Object missing required field `([^`]*)`\Z", lambda found, _: f"must have the field {found[1]}"),
    (r"Object contains unknown field `([^`]*)`\Z", lambda found, _: f"has no field {found[1]}"),
    (r"Invalid RFC3339 encoded datetime\Z", _always(f"must be {KINDS['datetime']}")),
    (r"Invalid base64 encoded string\Z", _always(f"must be {KINDS['bytes']}")),
    (r"(Integer|Number) (value )?out of range\Z", _always("is a number out of range")),
)
_SENTENCES: Final = tuple((re.compile(pattern, re.DOTALL), words) for pattern, words in _TABLE)
