"""The public gRPC API as protobuf files: a model of them, made from contracts and their committed numbers.

A module of contracts is a package, `mercato.orders.v1`, in one file. It has the messages and enumerations of the public
operations and of their errors, and no others. `proto_text.py` writes the files; the gateway makes descriptors of them.

    X | None                        optional
    a default other than "", 0...   optional: left out, it is the default
    tuple[X, ...]                   repeated
    Literal[...], Open[...]         an enumeration; 0 is "not given", and in answers a value that is not here yet
    datetime                        google.protobuf.Timestamp
    Any                             google.protobuf.Value
    int                             int64, also for amounts in minor units

Fields that the gateway fills (`filled`) are reserved: their numbers and names are not used. Pure.
"""

from __future__ import annotations

import datetime
import inspect
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Final, Literal, Union, cast, get_args, get_origin

import msgspec
from msgspec import NODEFAULT

from mercato.chassis.contract import GIVEN, Contract, Message, Operation, ServiceError
from mercato.chassis.contract.constraints import metas
from mercato.chassis.contract.errors import field_types
from mercato.chassis.contract.messages import FILLING, Filling

from .field_numbers import ENUMS, MESSAGES, Numbering, Numbers, enum_name, hints_of, module_name, open_values

VERSION: Final = "v1"
ROOT: Final = "mercato"
TIMESTAMP: Final = "google.protobuf.Timestamp"
VALUE: Final = "google.protobuf.Value"
IMPORTS: Final = {TIMESTAMP: "google/protobuf/timestamp.proto", VALUE: "google/protobuf/struct.proto"}
SCALARS: Final[Mapping[Any, str]] = {int: "int64", bool: "bool", str: "string", bytes: "bytes", float: "double"}
ZEROES: Final = (0, "", b"", False, ())
"""Defaults that a field without presence has in protobuf as well."""

Shape = Literal["scalar", "enum", "message"]


class PublicOperation(msgspec.Struct, frozen=True):
    """An operation that clients may call. `answer`: the message that they get, and `comment` what it does."""

    operation: Operation[Any, Any]
    answer: type[Message]
    comment: str
    errors: tuple[type[ServiceError], ...] = ()


class ProtoField(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    number: int
    shape: Shape
    type: str
    """`int64`, or the full name of an enumeration or message."""
    is_repeated: bool = False
    is_optional: bool = False
    takes_none: bool = False
    """Whether the field of the contract may be None."""
    numbers: tuple[tuple[int, str], ...] = ()
    """Of an enumeration: the numbers of its values in the contract."""
    default: Any = None
    """That of the contract; `NODEFAULT` for a field that is required there."""
    message: type[msgspec.Struct] | None = None


class ProtoMessage(msgspec.Struct, frozen=True):
    """`owner`: the message or error of the contract."""

    name: str
    full_name: str
    fields: tuple[ProtoField, ...]
    reserved: Mapping[int, str]
    owner: type


class ProtoEnum(msgspec.Struct, frozen=True):
    """`values`: names and numbers, the unspecified one first. `owner`: a message that has it."""

    name: str
    values: tuple[tuple[str, int], ...]
    reserved: Mapping[int, str]
    owner: type


class ProtoMethod(msgspec.Struct, frozen=True):
    name: str
    request: str
    answer: str
    public: PublicOperation


class ProtoService(msgspec.Struct, frozen=True):
    name: str
    methods: tuple[ProtoMethod, ...]
    owner: type[Contract]


class ProtoFile(msgspec.Struct, frozen=True):
    """`imports`: the paths of other files."""

    package: str
    path: str
    imports: tuple[str, ...]
    messages: tuple[ProtoMessage, ...]
    enums: tuple[ProtoEnum, ...]
    service: ProtoService | None


def package_of(module: str) -> str:
    return f"{ROOT}.{module}.{VERSION}"


def path_of(package: str) -> str:
    """`mercato/orders/v1/orders.proto`."""
    return f"{package.replace('.', '/')}/{package.split('.')[1]}.proto"


def service_name(contract: type[Contract]) -> str:
    return f"{contract.service.title()}Service"


def method_name(operation: Operation[Any, Any]) -> str:
    """`take_back` is `TakeBack`."""
    return "".join(part.title() for part in operation.name.split("_"))


def full_method(operation: Operation[Any, Any], contract: type[Contract]) -> str:
    """`mercato.orders.v1.OrdersService/TakeBack`."""
    return f"{package_of(operation.service)}.{service_name(contract)}/{method_name(operation)}"


def value_name(enum: str, value: str) -> str:
    """`STATUS_PENDING` of `Status` and `pending`; `SORT_NAME_DESCENDING` of `-name`."""
    prefix = "".join(f"_{c}" if c.isupper() and i else c for i, c in enumerate(enum)).upper()
    descending = "_DESCENDING" if value.startswith("-") else ""
    return f"{prefix}_{value.removeprefix('-').upper()}{descending}"


def filling(hint: Any) -> Filling | None:
    """What the gateway fills a field of this type with; None for a field that only clients fill."""
    found = (meta.extra.get(FILLING) for meta in metas(hint) if meta.extra)
    return next((cast(Filling, by) for by in found if by), None)


def files(
    contracts: Mapping[str, type[Contract]],
    operations: Iterable[PublicOperation],
    numbers: Numbers,
    errors: Iterable[type[ServiceError]] = (),
) -> tuple[ProtoFile, ...]:
    """The files of public operations, by path. `errors`: those with which every operation may be answered."""
    made = _Files(contracts, numbers)
    for error in errors:
        made.add(error, field_types(error))
    for public in sorted(operations, key=lambda public: public.operation.full_name):
        made.add_operation(public)
    return made.all()


class _Module:
    """The messages, enumerations and methods of a package, by name."""

    def __init__(self) -> None:
        self.messages: dict[str, ProtoMessage] = {}
        self.enums: dict[str, ProtoEnum] = {}
        self.methods: list[ProtoMethod] = []


class _Files:
    def __init__(self, contracts: Mapping[str, type[Contract]], numbers: Numbers) -> None:
        self._contracts = contracts
        self._services = {contract.__module__: contract.service for contract in contracts.values()}
        self._numbers = numbers
        self._modules: dict[str, _Module] = {}
        self._names: dict[type, str] = {}

    def all(self) -> tuple[ProtoFile, ...]:
        return tuple(self._file(name, module) for name, module in sorted(self._modules.items()))

    def add_operation(self, public: PublicOperation) -> None:
        operation = public.operation
        request, answer = self._struct(operation.request), self._struct(public.answer)
        for error in public.errors:
            if error.fields:
                self.add(error, field_types(error))
        method = ProtoMethod(method_name(operation), request, answer, public)
        self._module(operation.service).methods.append(method)

    def add(self, owner: type, hints: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> str:
        """Adds a message, and everything that it leads to; gives its full name."""
        if owner in self._names:
            return self._names[owner]
        module = module_name(owner, self._services)
        full_name = self._names[owner] = f"{package_of(module)}.{owner.__name__}"
        numbering = self._numbers[module][MESSAGES].get(owner.__name__)
        assert numbering is not None, f"{full_name} has no numbers: run `make schemas`"
        hidden = {name for name, hint in hints.items() if (by := filling(hint)) is not None and by not in GIVEN}
        fields = [
            self._field(owner, name, hint, numbering.numbers[name], (defaults or {}).get(name, NODEFAULT))
            for name, hint in hints.items()
            if name not in hidden
        ]
        reserved = {**numbering.reserved, **{numbering.numbers[name]: name for name in hidden}}
        self._module(module).messages[owner.__name__] = ProtoMessage(
            owner.__name__,
            full_name,
            tuple(sorted(fields, key=lambda field: field.number)),
            dict(sorted(reserved.items())),
            owner,
        )
        return full_name

    def _struct(self, struct: type[msgspec.Struct]) -> str:
        defaults = {field.name: field.default for field in msgspec.structs.fields(struct)}
        return self.add(struct, hints_of(struct), defaults)

    def _field(self, owner: type, name: str, hint: Any, number: int, default: Any) -> ProtoField:
        by, bare, is_none = filling(hint), *_without_none(hint)
        item = _item_of(bare)
        is_repeated = item is not None
        assert not (is_repeated and is_none), f"{owner.__name__}.{name}: a list in protobuf is never missing"
        shape, type_, numbers, message = self._type(owner, item if is_repeated else bare)
        has_presence = by is not None or is_none or (default is not NODEFAULT and default not in ZEROES)
        is_optional = has_presence and not is_repeated and shape != "message"
        return ProtoField(
            name=name,
            number=number,
            shape=shape,
            type=type_,
            is_repeated=is_repeated,
            is_optional=is_optional,
            takes_none=is_none,
            numbers=numbers,
            default=default,
            message=message,
        )

    def _type(
        self, owner: type, hint: Any
    ) -> tuple[Shape, str, tuple[tuple[int, str], ...], type[msgspec.Struct] | None]:
        if values := tuple(get_args(_bare(hint)) if get_origin(_bare(hint)) is Literal else open_values(hint)):
            return "enum", *self._enum(values, owner), None
        kind = _bare(hint)
        if inspect.isclass(kind) and issubclass(kind, msgspec.Struct):
            return "message", self._struct(kind), (), kind
        if kind is datetime.datetime:
            return "message", TIMESTAMP, (), None
        if kind is Any:
            return "message", VALUE, (), None
        assert kind in SCALARS, f"{owner.__name__}: no type of protobuf is known for {hint}"
        return "scalar", SCALARS[kind], (), None

    def _enum(self, values: Sequence[str], owner: type) -> tuple[str, tuple[tuple[int, str], ...]]:
        """The full name of an enumeration, and the numbers of its values."""
        module, name = module_name(owner, self._services), enum_name(values, owner)
        numbering = self._numbers[module][ENUMS].get(name, Numbering())
        named = sorted((numbering.numbers[value], value) for value in values)
        unspecified = (value_name(name, "unspecified"), 0)
        reserved = {number: value_name(name, value) for number, value in numbering.reserved.items()}
        self._module(module).enums[name] = ProtoEnum(
            name, (unspecified, *((value_name(name, value), number) for number, value in named)), reserved, owner
        )
        return f"{package_of(module)}.{name}", tuple(named)

    def _module(self, name: str) -> _Module:
        return self._modules.setdefault(name, _Module())

    def _file(self, name: str, module: _Module) -> ProtoFile:
        package = package_of(name)
        used = {field.type for message in module.messages.values() for field in message.fields if "." in field.type}
        used |= {type_ for method in module.methods for type_ in (method.request, method.answer)}
        imports = {IMPORTS.get(type_) or path_of(type_.rpartition(".")[0]) for type_ in used}
        service = None
        if module.methods:
            contract = self._contracts[name]
            service = ProtoService(service_name(contract), tuple(module.methods), contract)
        return ProtoFile(
            package,
            path_of(package),
            tuple(sorted(imports - {path_of(package)})),
            tuple(message for _, message in sorted(module.messages.items())),
            tuple(enum for _, enum in sorted(module.enums.items())),
            service,
        )


def _without_none(hint: Any) -> tuple[Any, bool]:
    """`X` and True for `X | None`, also where that is annotated."""
    if get_origin(hint) is Annotated and not open_values(hint):
        inner, is_none = _without_none(get_args(hint)[0])
        return inner if is_none else hint, is_none
    if get_origin(hint) in (Union, types.UnionType):
        options = [option for option in get_args(hint) if option is not type(None)]
        assert len(options) == 1, f"protobuf has no type for {hint}"
        return options[0], True
    return hint, False


def _bare(hint: Any) -> Any:
    while get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    return hint


def _item_of(hint: Any) -> Any:
    """`X` for `tuple[X, ...]`, also where that is annotated; None for other types."""
    kind = _bare(hint)
    return get_args(kind)[0] if get_origin(kind) is tuple else None
