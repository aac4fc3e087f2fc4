"""Whether a contract has changed additively: compares the JSON schemas of then (`schemas(...)`, committed) and now.

Services are deployed one by one, so that for a while old callers talk to new services, and new callers to old ones.
What works in both directions is additive: a new operation, a new field with a default, a larger batch, one role more.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import msgspec

from .errors import errors_by_code, field_types
from .operations import Contract

REPEATABLE: Final = {"never": 0, "keyed": 1, "safe": 2}
"""An operation may promise more than before, and never less: old callers hold it to its word."""

Schema = dict[str, Any]


def schemas(contract: type[Contract]) -> dict[str, Any]:
    """The JSON schemas of a contract: per operation its request and answer, its errors by code, the shared components.

    The errors of a service are those whose code begins with its name.
    """
    errors = {c: e for c, e in sorted(errors_by_code.items()) if c.startswith(f"{contract.service}.")}
    messages = [t for o in contract.operations.values() for t in (o.request, o.answer)]
    details = [msgspec.defstruct(e.__name__, list(field_types(e).items())) for e in errors.values()]
    references, components = msgspec.json.schema_components((*messages, *details), ref_template="#/components/{name}")
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
        "components": components,
    }
    return msgspec.json.decode(msgspec.json.encode(described))  # a default that is a tuple is a list in JSON


def breaks(old: Schema, new: Schema) -> list[str]:
    """What would fail between a process with the contract `old` and one with `new`; empty where it is additive."""
    return [*_operations(old, new), *_errors(old, new), *_components(old, new)]


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
        elif _without_prose(now) != _without_prose(was):
            yield f"{name}.{field} has another type, range or default"
    for field in sorted(set(after.get("required", ())) - set(before.get("required", ()))):
        yield f"{name}.{field} has no default: who does not know it does not send it"


def _without_prose(schema: Schema) -> Schema:
    return {key: value for key, value in schema.items() if key not in {"title", "description", "examples"}}
