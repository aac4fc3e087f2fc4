"""Examples of messages that are made of their types: every field has a value, and a list has one element."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final, cast

import msgspec
from msgspec import inspect

AT: Final = "2026-11-30T12:00:00Z"
KNOWN: Final[Mapping[str, Any]] = {"currency": "USD"}
"""Fields of whose values the reader knows only some."""


def sample(message: type[Any]) -> dict[str, Any]:
    """All of a message, as JSON."""
    return _value(inspect.type_info(message), "")


def pruned(example: Mapping[str, Any], message: type[Any], read: Collection[str], path: str = "") -> dict[str, Any]:
    """What its decoder requires of an example, and what is `read` of it, by paths."""
    found = dict[str, Any]()
    for field in msgspec.structs.fields(message):
        where = f"{path}.{field.name}" if path else field.name
        if field.required or where in read:
            found[field.name] = _pruned(example[field.name], field.type, read, where)
    return found


def _pruned(value: Any, type_: Any, read: Collection[str], where: str) -> Any:
    kind = _inner(inspect.type_info(type_))
    if isinstance(kind, inspect.VarTupleType) and value:
        item = _inner(kind.item_type)
        return [pruned(value[0], item.cls, read, where)] if isinstance(item, inspect.StructType) else value
    return pruned(value, kind.cls, read, where) if isinstance(kind, inspect.StructType) and value else value


def _inner(kind: inspect.Type) -> inspect.Type:
    """Without annotations, and without the None of what may be missing."""
    if isinstance(kind, inspect.Metadata):
        return _inner(kind.type)
    if isinstance(kind, inspect.UnionType):
        return _inner(next(each for each in kind.types if not isinstance(each, inspect.NoneType)))
    return kind


def _value(kind: inspect.Type, name: str) -> Any:
    match _inner(kind):
        case inspect.StructType(fields=fields):
            return {field.name: KNOWN.get(field.name, _value(field.type, field.name)) for field in fields}
        case inspect.VarTupleType(item_type=item) | inspect.ListType(item_type=item):
            return [_value(item, name)]
        case inspect.LiteralType(values=values):
            return next(iter(values))
        case inspect.EnumType(cls=cls):
            return next(iter(cast(Any, cls))).value
        case inspect.BoolType():
            return True
        case inspect.IntType(ge=least):
            return max(1, least or 0)
        case inspect.FloatType():
            return 1.5
        case inspect.StrType():
            return "text"
        case inspect.DateTimeType():
            return AT
        case inspect.DictType() | inspect.AnyType():
            return {}
        case other:
            raise AssertionError(f"{name}: no example of {other}")
