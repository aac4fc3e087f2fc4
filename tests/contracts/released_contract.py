"""A contract of an earlier version, built from its released JSON schemas: its readers, and messages as it sends them.

The readers are msgspec structs that ignore unknown fields, as the messages of the package do. Types, ranges, defaults
and enumerations are those of the schemas.
"""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal, Optional, Union, cast

import msgspec
from hypothesis import strategies as st
from msgspec import Meta

from mercato.chassis.contract import Actor, Context, Operation, Retry
from mercato.chassis.contract.compatibility import CLOSED_VALUES, Schema
from mercato.chassis.contract.messages import OPEN_VALUES

JSON_KINDS: Final = {"integer": int, "number": float, "boolean": bool, "null": type(None)}
RANGES: Final = {
    "minimum": "ge",
    "maximum": "le",
    "exclusiveMinimum": "gt",
    "exclusiveMaximum": "lt",
    "minLength": "min_length",
    "maxLength": "max_length",
    "minItems": "min_length",
    "maxItems": "max_length",
    "pattern": "pattern",
}
KNOWN_KEYS: Final = {
    *RANGES, "type", "$ref", "anyOf", "items", "default", "title", "description", "examples", "properties", "required",
    "additionalProperties", "format", "contentEncoding", CLOSED_VALUES, OPEN_VALUES,
}  # fmt: skip
"""A schema with another key is refused: it would be read less exactly than it says."""
INTEGERS: Final = (-(2**53), 2**53)
NEWER: Final = "newer_than_you"
"""A value that no open enumeration lists."""
CONTEXT: Final = Context(Actor("service"), math.inf, "trace", "request")


class ReleasedContract:
    """The messages of one service as a version had them. `schema` is a file of `schemas/` or `released/VERSION/`."""

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self._structs: dict[str, type[msgspec.Struct]] = {}

    def operation(self, name: str) -> Operation[Any, Any]:
        """The operation with this version's request and answer, for the codec."""
        described = self.schema["operations"][name]
        request, answer = self.type_of(described["request"]), self.type_of(described["answer"])
        return Operation(request, answer, described["batch"], 1, described["deadline_ms"], Retry.NEVER, frozenset())

    def type_of(self, schema: Schema) -> Any:
        """The type that takes what the schema describes."""
        assert schema.keys() <= KNOWN_KEYS, f"what is {sorted(schema.keys() - KNOWN_KEYS)}?"
        if "$ref" in schema:
            return self._struct(_name(schema))
        if "anyOf" in schema:
            return Union[tuple(self.type_of(option) for option in schema["anyOf"])]  # noqa: UP007  # made at run time
        if CLOSED_VALUES in schema:
            return Literal[tuple(schema[CLOSED_VALUES])]
        ranges = {RANGES[key]: value for key, value in schema.items() if key in RANGES}
        kind = self._kind_of(schema)
        return Annotated[kind, Meta(**ranges)] if ranges else kind

    def _kind_of(self, schema: Schema) -> Any:
        match schema.get("type"):
            case None:
                return Any
            case "string":
                if schema.get("format") == "date-time":
                    return datetime.datetime
                return bytes if schema.get("contentEncoding") == "base64" else str
            case "array":
                return tuple[self.type_of(schema["items"]), ...]
            case "object":
                return dict[str, self.type_of(schema.get("additionalProperties", {}))]
            case kind:
                return JSON_KINDS[kind]

    def _struct(self, name: str) -> type[msgspec.Struct]:
        if name not in self._structs:
            component = self.schema["components"][name]
            assert component.keys() <= KNOWN_KEYS
            fields = [self._field(field, part, component) for field, part in component["properties"].items()]
            self._structs[name] = msgspec.defstruct(name, fields, frozen=True, kw_only=True)
        return self._structs[name]

    def _field(self, name: str, part: Schema, component: Schema) -> Any:
        kind = self.type_of(part)
        if name in component.get("required", ()):
            return name, kind
        default = msgspec.convert(part.get("default"), Optional[kind])  # noqa: UP045  # made at run time
        return name, kind, default

    # ----------------------------------------------------------------------------------------------------- messages

    def messages(self, schema: Schema, enums: str = "known") -> st.SearchStrategy[Any]:
        """Values that fit the schema, as plain objects. `enums`: `unknown` for values that open ones do not list."""
        if "$ref" in schema:
            return st.deferred(lambda: self._objects(self.schema["components"][_name(schema)], enums))
        if "anyOf" in schema:
            return st.one_of([self.messages(option, enums) for option in schema["anyOf"]])
        if CLOSED_VALUES in schema:
            return st.sampled_from(schema[CLOSED_VALUES])
        if OPEN_VALUES in schema:
            return st.just(NEWER) if enums == "unknown" else st.sampled_from(schema[OPEN_VALUES])
        match schema.get("type"):
            case None:
                return st.dictionaries(st.text(max_size=3), st.integers(*INTEGERS), max_size=2)
            case "string":
                return _strings(schema)
            case "integer":
                return st.integers(schema.get("minimum", INTEGERS[0]), schema.get("maximum", INTEGERS[1]))
            case "number":
                return st.floats(schema.get("minimum"), schema.get("maximum"), allow_nan=False, allow_infinity=False)
            case "boolean":
                return st.booleans()
            case "null":
                return st.none()
            case "array":
                least = schema.get("minItems", 0)
                most = min(least + 2, schema.get("maxItems", least + 2))
                return st.lists(self.messages(schema["items"], enums), min_size=least, max_size=most)
            case "object":
                values = self.messages(schema.get("additionalProperties", {}), enums)
                return st.dictionaries(st.text(max_size=3), values, max_size=2)
            case kind:
                raise AssertionError(f"no values of {kind}")

    def _objects(self, component: Schema, enums: str) -> st.SearchStrategy[Any]:
        # Senders of all versions write every field, also one that has its default.
        return st.fixed_dictionaries({f: self.messages(part, enums) for f, part in component["properties"].items()})


def _name(reference: Schema) -> str:
    return cast(str, reference["$ref"]).rpartition("/")[2]


def _strings(schema: Schema) -> st.SearchStrategy[Any]:
    if schema.get("format") == "date-time":
        return st.datetimes(timezones=st.just(datetime.UTC))
    least, most = schema.get("minLength", 0), schema.get("maxLength")
    if schema.get("contentEncoding") == "base64":
        return st.binary(max_size=8)
    if "pattern" in schema:
        # In a schema `$` is the end alone; in Python it also stands before a newline at the end.
        fits = st.from_regex(re.sub(r"\$\Z", r"\\Z", schema["pattern"]))
        return fits.filter(lambda text: least <= len(text) and (most is None or len(text) <= most))
    return st.text(min_size=least, max_size=least + 8 if most is None else min(most, least + 8))


def plain(message: Any) -> Any:
    """A message as JSON has it, to compare what two versions have read."""
    return msgspec.json.decode(msgspec.json.encode(message))


def shared(sent: Any, read: Any) -> Any:
    """What was sent, without the fields that the reader does not know, and with what the reader adds by default."""
    if isinstance(sent, dict) and isinstance(read, dict):
        return {field: shared(sent[field], read[field]) if field in sent else read[field] for field in read}
    if isinstance(sent, list) and isinstance(read, list) and len(sent) == len(read):
        return [shared(a, b) for a, b in zip(cast(Sequence[Any], sent), cast(Sequence[Any], read), strict=True)]
    return sent
