"""Checks that a contract changes additively: compares its JSON schemas (`schemas(...)`) with the committed ones.

Services are deployed one by one, so that for a while old callers call new services, and new callers old ones.
A change is additive if both work: a new operation or event, a new field with a default, a larger batch, a further
role, a new value of an enumeration.

A new value of an open enumeration (`Open[...]`, in answers, errors and events) is read by old processes as it is. A new
value of a closed one (in requests) is refused by old services by its name.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from typing import Any, Final, cast, get_args

import msgspec

from .errors import RemoteError, ServiceError, errors_by_code, field_types
from .messages import OPEN_VALUES, published_pattern
from .operations import Contract

REPEATABLE: Final = {"never": 0, "keyed": 1, "safe": 2}
"""An operation may promise more than before, and never less: old callers rely on the old promise."""

CLOSED_VALUES: Final = "enum"
VALUES: Final = (OPEN_VALUES, CLOSED_VALUES)
PROSE: Final = frozenset({"title", "description", "examples"})
COMPONENT: Final = "#/components/{name}"

Schema = dict[str, Any]


class Chassis(Contract, name="chassis"):
    """The errors of the chassis, with which every operation may be answered besides its own."""


def errors_of(contract: type[Contract]) -> dict[str, type[ServiceError]]:
    """The errors of a service by code: those whose code begins with its name, and for `Chassis` those without one."""
    if contract is Chassis:
        mine = {c: e for c, e in errors_by_code.items() if "." not in c and e.__module__ == ServiceError.__module__}
        del mine[RemoteError.code]  # it stands for the errors of newer services
    else:
        mine = {c: e for c, e in errors_by_code.items() if c.startswith(f"{contract.service}.")}
    return dict(sorted(mine.items()))


def _details_of(error: type[ServiceError]) -> type[msgspec.Struct]:
    """The details of an error; one with a default may be missing, where an older version sends it."""
    fields = field_types(error).items()
    return msgspec.defstruct(
        error.__name__, [(n, t, getattr(error, n)) if hasattr(error, n) else (n, t) for n, t in fields], kw_only=True
    )


def schemas(contract: type[Contract]) -> dict[str, Any]:
    """The JSON schemas of a contract.

    Per operation its request and answer, its errors by code, the messages of its events by type, and the components
    that they share.
    """
    errors = errors_of(contract)
    messages = [t for o in contract.operations.values() for t in (o.request, o.answer)]
    details = [_details_of(e) for e in errors.values()]
    models = (*messages, *details, *contract.events.values())
    references, components = msgspec.json.schema_components(models, ref_template=COMPONENT)
    for struct in {struct: None for model in models for struct in _structs(model)}:
        for field in msgspec.structs.fields(struct):
            _mark_times(field.type, components[struct.__name__]["properties"][field.encode_name])
    parts = iter(references)
    operations = {
        name: {
            "request": next(parts),
            "answer": next(parts),
            "batch": operation.size,
            "deadline_ms": operation.deadline_ms,
            "retry": operation.retry.value,
            "allow": sorted(operation.allow),
        }
        for name, operation in contract.operations.items()
    }
    described = {
        "service": contract.service,
        "operations": operations,
        "errors": {code: {"kind": error.kind.value, "details": next(parts)} for code, error in errors.items()},
        "events": {type_: next(parts) for type_ in contract.events},
        "components": components,
    }
    # Through JSON, for there a default that is a tuple is a list.
    return _published(msgspec.json.decode(msgspec.json.encode(described)))


def _published(part: Any) -> Any:
    """A part of a schema, its patterns in the syntax of JSON schemas."""
    if isinstance(part, list):
        return [_published(item) for item in cast(list[Any], part)]
    if not isinstance(part, dict):
        return part
    schema = {name: _published(value) for name, value in cast(dict[str, Any], part).items()}
    if isinstance(pattern := schema.get("pattern"), str):
        schema["pattern"] = published_pattern(pattern)
    return schema


def _structs(hint: Any) -> Iterator[type[msgspec.Struct]]:
    """Every struct that a type contains."""
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        yield hint
        for field in msgspec.structs.fields(hint):
            yield from _structs(field.type)
    for part in get_args(hint):
        yield from _structs(part)


def _mark_times(hint: Any, schema: Schema) -> None:
    """Marks every time as one; msgspec marks only times that must have a time zone."""
    if hint is datetime.datetime:
        schema["format"] = "date-time"
    elif datetime.datetime in get_args(hint):
        for option in (*schema.get("anyOf", ()), *([schema["items"]] if "items" in schema else ())):
            if option.get("type") == "string":
                option["format"] = "date-time"


def breaks(old: Schema, new: Schema) -> list[str]:
    """What would fail between a process with the contract `old` and one with `new`; empty if the change is additive."""
    return [*_operations(old, new), *_errors(old, new), *_events(old, new), *_components(old, new)]


def misplaced(schema: Schema) -> list[str]:
    """Enumerations that are closed in an answer or event, or open in a request; empty if all are right.

    A message that is both a part of a request and of an answer has no enumeration.
    """
    asked = [operation["request"] for operation in schema["operations"].values()]
    answered = [operation["answer"] for operation in schema["operations"].values()]
    answered += [error["details"] for error in schema["errors"].values()]
    answered += schema["events"].values()
    closed = {place for name in _reached(schema, answered) for place in _places(schema, name, CLOSED_VALUES)}
    open_ = {place for name in _reached(schema, asked) for place in _places(schema, name, OPEN_VALUES)}
    return [
        *(f"{place} is read by callers or consumers: declare it Open[...]" for place in sorted(closed)),
        *(f"{place} is a part of a request: declare it without Open" for place in sorted(open_)),
    ]


# ------------------------------------------------------------------------------------------------------- differences


def _operations(old: Schema, new: Schema) -> Iterator[str]:
    for name, before in old["operations"].items():
        after = new["operations"].get(name)
        if after is None:
            yield f"operation {name} is gone"
            continue
        for part in ("request", "answer"):
            if before[part] != after[part]:
                yield f"operation {name}: another {part}"
        if after["batch"] < before["batch"]:
            yield f"operation {name}: takes {after['batch']} at once, not {before['batch']} as its callers believe"
        if REPEATABLE[after["retry"]] < REPEATABLE[before["retry"]]:
            yield f"operation {name}: was {before['retry']} to repeat, is {after['retry']} now"
        if gone := sorted(set(before["allow"]) - set(after["allow"])):
            yield f"operation {name}: no longer for {', '.join(gone)}"


def _errors(old: Schema, new: Schema) -> Iterator[str]:
    for code, before in old["errors"].items():
        after = new["errors"].get(code)
        if after is None:
            yield f"error {code} is gone"
        elif after != before:
            yield f"error {code}: was {before['kind']}, is {after['kind']} now, or has other details"


def _events(old: Schema, new: Schema) -> Iterator[str]:
    for type_, before in old["events"].items():
        after = new["events"].get(type_)
        if after is None:
            yield f"event {type_} is gone"
        elif after != before:
            yield f"event {type_} has another message"


def _components(old: Schema, new: Schema) -> Iterator[str]:
    for name, before in old["components"].items():
        after = new["components"].get(name)
        if after is None:
            yield f"{name} is gone"
        elif "properties" not in before or "properties" not in after:
            if before != after:
                yield f"{name} is something else"
        else:
            yield from _fields(name, before, after)


def _fields(name: str, before: Schema, after: Schema) -> Iterator[str]:
    for field, was in before["properties"].items():
        now = after["properties"].get(field)
        if now is None:
            yield f"{name}.{field} is gone"
        elif gone := _removed(was, now):
            yield f"{name}.{field} no longer has {', '.join(gone)}"
        elif _compared(was) != _compared(without_added_values(was, now)):
            yield f"{name}.{field} has another type, range or default"
    for field in sorted(set(after.get("required", ())) - set(before.get("required", ()))):
        yield f"{name}.{field} has no default: old callers do not send it"


# -------------------------------------------------------------------------------------------------- parts of schemas


def without_added_values(old: Any, new: Any) -> Any:
    """`new` without the values of enumerations that `old` does not have at the same place."""
    if isinstance(old, dict) and isinstance(new, dict):
        was, now = cast(Schema, old), cast(Schema, new)
        return {
            key: [value for value in part if value in was[key]]
            if key in VALUES and key in was
            else without_added_values(was.get(key), part)
            for key, part in now.items()
        }
    if isinstance(old, list) and isinstance(new, list):
        pairs = zip(cast(list[Any], old), cast(list[Any], new), strict=False)
        return [*(without_added_values(a, b) for a, b in pairs), *cast(list[Any], new)[len(cast(list[Any], old)) :]]
    return new


def _removed(old: Any, new: Any) -> list[str]:
    """The values of enumerations that `new` no longer has."""
    if isinstance(old, dict) and isinstance(new, dict):
        was, now = cast(Schema, old), cast(Schema, new)
        return [
            value
            for key in was.keys() & now.keys()
            for value in ([v for v in was[key] if v not in now[key]] if key in VALUES else _removed(was[key], now[key]))
        ]
    if isinstance(old, list) and isinstance(new, list):
        pairs = zip(cast(list[Any], old), cast(list[Any], new), strict=False)
        return [value for pair in pairs for value in _removed(*pair)]
    return []


def _compared(schema: Any) -> Any:
    """The parts of a field's schema that are compared: no prose, and the values of enumerations sorted."""
    if isinstance(schema, dict):
        return {
            key: sorted(part) if key in VALUES else _compared(part)
            for key, part in cast(Schema, schema).items()
            if key not in PROSE
        }
    return [_compared(part) for part in cast(list[Any], schema)] if isinstance(schema, list) else schema


def _reached(schema: Schema, references: list[Schema]) -> list[str]:
    """The names of the components that these references lead to, also indirectly."""
    found: dict[str, None] = {}
    waiting = [name for reference in references for name in _named(reference)]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found[name] = None
            waiting += _named(schema["components"][name])
    return list(found)


def _named(part: Any) -> list[str]:
    if isinstance(part, dict):
        schema = cast(Schema, part)
        own = [str(schema["$ref"]).rpartition("/")[2]] if "$ref" in schema else []
        return own + [name for value in schema.values() for name in _named(value)]
    return [name for value in cast(list[Any], part) for name in _named(value)] if isinstance(part, list) else []


def _places(schema: Schema, name: str, key: str) -> list[str]:
    """The fields of a component whose schema has this key."""
    properties = cast(Schema, schema["components"][name].get("properties", {}))
    return [f"{name}.{field}" for field, part in properties.items() if _has(part, key)]


def _has(part: Any, key: str) -> bool:
    if isinstance(part, dict):
        schema = cast(Schema, part)
        return key in schema or any(_has(value, key) for value in schema.values())
    return any(_has(value, key) for value in cast(list[Any], part)) if isinstance(part, list) else False
