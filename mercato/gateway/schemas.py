"""JSON schemas (Draft 2020-12) of the API's messages: those of msgspec, made exact and readable.

msgspec describes how it encodes; a client needs to know what it may send and what it gets. So amounts are strings or
numbers, times have their format, enumerations keep the order in which they are declared (the order of the states of an
order), and every field of an answer is required.
"""

from __future__ import annotations

import datetime
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Final, Literal, cast, get_args, get_origin

import msgspec

from mercato.chassis.contract import published_pattern
from mercato.contracts.money import AMOUNT_LENGTH, AMOUNT_PATTERN, EXPONENTS
from mercato.gateway.fields import RULES, STRICTER
from mercato.gateway.money import CURRENCY_PATTERN, Amount, AmountIn, MoneyIn
from mercato.gateway.route import Input, Output

Schema = dict[str, Any]

REFERENCE: Final = "#/components/schemas/{name}"

CURRENCY: Final = "CurrencyCode"
"""The component of the currencies that a request may name."""


def components(models: Sequence[Any], queries: Collection[Any] = ()) -> tuple[tuple[Schema, ...], dict[str, Schema]]:
    """The schema of each model, in order, and what they refer to, by name. Those of `queries` keep their defaults."""
    structs = {struct: None for model in models for struct in _structs(model)}
    # msgspec does not look for structs in custom types.
    referred = [MoneyIn] if MoneyIn in structs else []
    references, raw = msgspec.json.schema_components([*models, *referred], schema_hook=_amount, ref_template=REFERENCE)
    named = {name: _plain(schema) for name, schema in raw.items()}
    for struct in structs:
        schema = named[struct.__name__]
        _refine(struct, schema)
        if struct not in queries:
            _say_defaults(struct, schema)
        # The key is the name already.
        schema.pop("title", None)
    named[CURRENCY] = {"description": "ISO 4217.", "type": "string", "enum": list(EXPONENTS)}
    return tuple(_plain(reference) for reference in references[: len(models)]), named


def _amount(kind: type[Any]) -> Schema:
    if kind is AmountIn:
        return {"anyOf": [_amount(Amount), {"$ref": REFERENCE.format(name=MoneyIn.__name__)}]}
    assert kind is Amount, f"{kind} has no schema"
    # `pattern` applies only to strings and `minimum` only to numbers.
    return {"type": ["string", "number"], "pattern": AMOUNT_PATTERN, "maxLength": AMOUNT_LENGTH, "minimum": 0}


def plain(kind: Any) -> Schema:
    """The schema of a type that is no model, in its simplest form."""
    return _plain(msgspec.json.schema(kind))


def without_null(schema: Schema) -> Schema:
    """The schema for a query parameter: it cannot be null, only missing."""
    options = schema.get("anyOf")
    if isinstance(options, list):
        left = [option for option in cast(list[Schema], options) if option != {"type": "null"}]
        rest = {key: value for key, value in schema.items() if key != "anyOf"}
        return {**left[0], **rest} if len(left) == 1 else {**rest, "anyOf": left}
    kinds = schema.get("type")
    if not isinstance(kinds, list) or "null" not in kinds:
        return schema
    left = [kind for kind in cast(list[str], kinds) if kind != "null"]
    shown = {**schema, "type": left[0] if len(left) == 1 else left}
    if "enum" in shown:
        shown["enum"] = [value for value in shown["enum"] if value is not None]
    return shown


def as_text(schema: Schema) -> Schema:
    """The schema for a query parameter: an amount in it is a string."""
    if schema.get("type") != ["string", "number"]:
        return schema
    return {key: part for key, part in schema.items() if key != "minimum"} | {"type": "string"}


# -------------------------------------------------------------------------------------------------- from the schema


def _plain(value: Any) -> Any:
    """A schema, or a part of one, in its simplest equivalent form."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in cast(Sequence[Any], value)]
    if not isinstance(value, dict):
        return value
    schema = {name: _plain(part) for name, part in cast(Schema, value).items()}
    pattern = schema.get("pattern")
    if STRICTER in schema:
        schema["pattern"] = schema.pop(STRICTER)
    if isinstance(schema.get("pattern"), str):
        schema["pattern"] = published_pattern(schema["pattern"])
    if pattern == CURRENCY_PATTERN:
        words = {"description": schema["description"]} if "description" in schema else {}
        return {**words, "$ref": REFERENCE.format(name=CURRENCY)}
    if schema.get("type") == "object" and "properties" not in schema:
        schema.setdefault("additionalProperties", True)
    if isinstance(schema.get("enum"), list) and all(isinstance(value, str) for value in schema["enum"]):
        schema.setdefault("type", "string")
    if schema.get("required") == []:
        del schema["required"]
    return _nullable(schema)


def _nullable(schema: Schema) -> Schema:
    """`{"type": [X, "null"]}` for an X or null, where X is not a reference. Drops a default of null."""
    if "default" in schema and schema["default"] is None:
        del schema["default"]
    options = schema.get("anyOf")
    if not isinstance(options, list) or len(cast(list[Any], options)) != 2 or {"type": "null"} not in options:
        return schema
    option = next(cast(Schema, o) for o in cast(list[Any], options) if o != {"type": "null"})
    rest = {name: part for name, part in schema.items() if name != "anyOf"}
    if isinstance(inner := option.get("anyOf"), list):
        return {**option, **rest, "anyOf": [*cast(list[Any], inner), {"type": "null"}]}
    if "type" not in option:
        return schema
    kinds = cast(list[str], option["type"] if isinstance(option["type"], list) else [option["type"]])
    merged: Schema = {**option, **rest, "type": [*kinds, "null"]}
    if "enum" in merged:
        merged["enum"] = [*merged["enum"], None]
    return merged


# --------------------------------------------------------------------------------------------------- from the types


def _structs(model: Any) -> Iterator[type[msgspec.Struct]]:
    """Every struct within a type."""
    if model is AmountIn:
        model = MoneyIn
    if isinstance(model, type) and issubclass(model, msgspec.Struct):
        yield model
        for field in msgspec.structs.fields(model):
            yield from _structs(field.type)
    for part in get_args(model):
        yield from _structs(part)


def _refine(struct: type[msgspec.Struct], schema: Schema) -> None:
    """Adds what msgspec's schema omits about the types."""
    fields = msgspec.structs.fields(struct)
    for field in fields:
        shown = schema["properties"][field.encode_name]
        if datetime.datetime in (field.type, *get_args(field.type)):
            shown |= {"format": "date-time"}
        if declared := _literals(field.type):
            shown["enum"] = [*declared, *([None] if None in shown["enum"] else [])]
    schema |= RULES.get(struct.__name__, {})
    if issubclass(struct, Output):
        schema["required"] = [field.encode_name for field in fields]


def _say_defaults(struct: type[msgspec.Struct], schema: Schema) -> None:
    """Moves defaults to descriptions. Generators of clients take `default` for a value that is always present."""
    for shown in schema["properties"].values():
        default = shown.pop("default", "")
        if issubclass(struct, Input) and default != "":
            words = f"Without it: `{msgspec.json.encode(default).decode()}`."
            shown["description"] = f"{shown['description']} {words}" if "description" in shown else words


def _literals(kind: Any) -> tuple[Any, ...]:
    """The values of `Literal[...]`, also inside of `... | None` and `Annotated`, as declared. Empty: no literal."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    if get_origin(kind) in (list, tuple, dict):
        return ()
    return next((found for part in get_args(kind) if (found := _literals(part))), ())
