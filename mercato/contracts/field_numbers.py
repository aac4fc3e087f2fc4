"""Field numbers: a number for each field of a message and each value of an enumeration, for encodings such as protobuf.

They are committed (`field_numbers.json`) and kept for ever. A new field gets the next number that its message has never
used. The number of a removed field stays reserved under its old name, because old messages still contain it. In an
enumeration 0 means "unspecified" (protobuf's rule for proto3), so values begin with 1.

    {"orders": {"messages": {"Order": {"numbers": {"id": 1, "user_id": 2}, "reserved": {"3": "colour"}}},
                "enums": {"Status": {"numbers": {"pending": 1}, "reserved": {}}}}}

Names are those of the module that defines a message: `orders` for what `mercato/contracts/orders.py` defines, `chassis`
for what the chassis does. An enumeration has the name of its alias, `Status = Literal[...]`, in the module of the
message that has it. Pure.
"""

from __future__ import annotations

import enum
import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Final, Literal, cast, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from mercato.chassis.contract import Contract, ErrorMessage, ServiceError
from mercato.chassis.contract.compatibility import errors_of
from mercato.chassis.contract.errors import field_types
from mercato.chassis.contract.messages import OPEN_VALUES

CHASSIS: Final = "chassis"
MESSAGES: Final = "messages"
ENUMS: Final = "enums"
PARTS: Final = {"order_refusals": "orders"}
"""Modules that were split from another one: their names and numbers stay in that one."""
LAST_NUMBER: Final = 18_999
"""Protobuf reserves 19 000 to 19 999, and no message here needs so many."""

Names = dict[str, dict[str, dict[str, Sequence[str]]]]
"""By module, `messages` or `enums`, and name: the fields of a message or the values of an enumeration, as declared."""


class Numbering(msgspec.Struct, frozen=True):
    """The numbers of a message or enumeration. `reserved`: the names of removed fields or values, by number."""

    numbers: dict[str, int] = {}
    reserved: dict[int, str] = {}

    def extended(self, names: Sequence[str]) -> Numbering:
        """A copy with a number for each of `names`, and the numbers of all other names reserved."""
        numbers = {name: number for name, number in self.numbers.items() if name in names}
        reserved = self.reserved | {number: name for name, number in self.numbers.items() if name not in names}
        last = max([*self.numbers.values(), *self.reserved], default=0)
        for name in names:
            if name not in numbers:
                last += 1
                numbers[name] = last
        assert last <= LAST_NUMBER, "a message has had too many fields"
        by_number = dict(sorted(numbers.items(), key=lambda item: item[1]))
        return Numbering(by_number, dict(sorted(reserved.items())))


Numbers = dict[str, dict[str, dict[str, Numbering]]]
"""By module, `messages` or `enums`, and name."""


def read(committed: bytes) -> Numbers:
    """The content of the committed file. Raises `msgspec.MsgspecError` where it is not one."""
    return msgspec.json.decode(committed, type=Numbers)


def written(numbers: Numbers) -> bytes:
    """The content of the file that `read` reads."""
    return msgspec.json.format(msgspec.json.encode(numbers), indent=1) + b"\n"


def assign(committed: Numbers, contracts: Iterable[type[Contract]]) -> Numbers:
    """The committed numbers, extended by new names of the contracts. No number changes, and none is used twice."""
    names = declared(contracts)
    return {
        module: {
            kind: {
                name: committed.get(module, {}).get(kind, {}).get(name, Numbering()).extended(known.get(name, ()))
                for name in sorted({*known, *committed.get(module, {}).get(kind, {})})
            }
            for kind in (MESSAGES, ENUMS)
            for known in (names.get(module, {}).get(kind, {}),)
        }
        for module in sorted({*names, *committed})
    }


def changes(old: Numbers, new: Numbers) -> list[str]:
    """Sentences about numbers of `old` that changed, are missing, or have another name in `new`."""
    return [sentence for module in old for kind in old[module] for sentence in _changes(old, new, module, kind)]


def _changes(old: Numbers, new: Numbers, module: str, kind: str) -> Iterator[str]:
    for name, before in old[module][kind].items():
        after = new.get(module, {}).get(kind, {}).get(name, Numbering())
        kept = {**after.reserved, **{number: field for field, number in after.numbers.items()}}
        numbered = {**before.reserved, **{number: field for field, number in before.numbers.items()}}
        for number, field in numbered.items():
            if kept.get(number) != field:
                yield f"{module}.{name}: {number} was {field}, and is {kept.get(number, 'nothing')} now"
            elif number in before.reserved and number not in after.reserved:
                yield f"{module}.{name}: {number} was reserved, and is used again"


# ------------------------------------------------------------------------------------------------------ declared names


def declared(contracts: Iterable[type[Contract]]) -> Names:
    """Every message within contracts (requests, answers, details of errors, events), and every enumeration."""
    contracts = tuple(contracts)
    collected = _Collected({contract.__module__: contract.service for contract in contracts})
    collected.add_hint(ErrorMessage, ErrorMessage)
    for contract in contracts:
        for operation in contract.operations.values():
            collected.add_hint(operation.request, operation.request)
            collected.add_hint(operation.answer, operation.answer)
        for error in errors_of(contract).values():
            collected.add(error, field_types(error))
        for message in (*contract.events.values(), *contract.views):
            collected.add_hint(message, message)
    return collected.names


class _Collected:
    """Collects names. `services`: the services by the modules that define their contracts."""

    def __init__(self, services: Mapping[str, str]) -> None:
        self.names: Names = {}
        self._services = services
        self._added: set[type] = set()

    def add(self, owner: type[msgspec.Struct] | type[ServiceError], hints: Mapping[str, Any]) -> None:
        """Adds a message with its fields."""
        if owner in self._added:
            return
        self._added.add(owner)
        self._module(owner)[MESSAGES][owner.__name__] = tuple(hints)
        for hint in hints.values():
            self.add_hint(hint, owner)

    def add_hint(self, hint: Any, owner: type) -> None:
        """Adds the messages and enumerations within the type of a field of `owner`."""
        if inspect.isclass(hint) and issubclass(hint, msgspec.Struct):
            self.add(hint, hints_of(hint))
        elif inspect.isclass(hint) and issubclass(hint, enum.Enum):
            self._module(hint)[ENUMS][hint.__name__] = tuple(str(member.value) for member in hint)
        elif get_origin(hint) is Literal:
            self._add_enum(get_args(hint), owner)
        elif values := open_values(hint):
            self._add_enum(values, owner)
        else:
            for part in get_args(hint):
                self.add_hint(part, owner)

    def _add_enum(self, values: Sequence[str], owner: type) -> None:
        self._module(owner)[ENUMS][enum_name(values, owner)] = tuple(values)

    def _module(self, owner: type) -> dict[str, dict[str, Sequence[str]]]:
        return self.names.setdefault(module_name(owner, self._services), {MESSAGES: {}, ENUMS: {}})


def enum_name(values: Sequence[str], owner: type) -> str:
    """The name of an enumeration that a field of `owner` has: its alias in the module of `owner`."""
    aliases = {
        name
        for name, value in vars(sys.modules[owner.__module__]).items()
        if get_origin(value) is Literal and set(get_args(value)) == set(values)
    }
    assert len(aliases) == 1, (
        f"{owner.__name__}: give the enumeration of {', '.join(values)} one name in {owner.__module__}, such as "
        f"`Status = Literal[...]`; it has {sorted(aliases) or 'none'}"
    )
    return aliases.pop()


def module_name(owner: type, services: Mapping[str, str]) -> str:
    """The module under which a message is numbered. `services`: the services by the modules of their contracts."""
    module = owner.__module__
    name = CHASSIS if module.startswith("mercato.chassis.") else services.get(module)
    name = name or module.rpartition(".")[2]
    return PARTS.get(name, name)


def hints_of(struct: type[msgspec.Struct]) -> dict[str, Any]:
    """The types of the fields of a message, in their order."""
    hints = get_type_hints(struct, include_extras=True)
    return {field.name: hints[field.name] for field in msgspec.structs.fields(struct)}


def open_values(hint: Any) -> Sequence[str]:
    """The known values of `Open[...]`; none for another type."""
    if get_origin(hint) is not Annotated:
        return ()
    schemas = [m.extra_json_schema or {} for m in get_args(hint)[1:] if isinstance(m, Meta)]
    return cast(Sequence[str], next((s[OPEN_VALUES] for s in schemas if OPEN_VALUES in s), ()))
