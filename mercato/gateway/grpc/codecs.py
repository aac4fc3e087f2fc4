"""Between the messages of the contracts and those of protobuf.

A request is read into builtins (`read`), which the gateway completes, and then checked as the contract says (`typed`):
all wrong fields are named at once. An answer is written from its message (`encode`).

What protobuf cannot say is decided here, and nowhere else:

    an enumeration's 0    in requests the field was not given
    an unknown number     in requests no value: it is refused, with the values that there are
    an unknown value      in answers, of a newer service: 0, "unspecified". It never fails
    None                  the field is not set
"""

from __future__ import annotations

import datetime
import operator
from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec
from google.protobuf import json_format
from google.protobuf.message import DecodeError
from google.protobuf.struct_pb2 import Value
from msgspec import NODEFAULT

from mercato.chassis.contract import FieldError, InvalidRequest, ServiceError
from mercato.contracts.order_refusals import OutOfStock
from mercato.contracts.orders import CancelReason
from mercato.contracts.protos import TIMESTAMP, VALUE, ProtoField, ProtoFile, ProtoMessage
from mercato.gateway.grpc import descriptors
from mercato.gateway.routes.orders import reason_shown, refusal_shown
from mercato.gateway.validation import invalid, wrong_fields

Values = dict[str, Any]
Convert = Callable[[Any], Any]

SHOWN: Final[Mapping[type, Convert]] = {CancelReason: reason_shown, OutOfStock: refusal_shown}
"""What clients get of messages and errors that say more than clients may know."""
ZEROES: Final[Mapping[str, Any]] = {"int64": 0, "bool": False, "string": "", "bytes": b"", "double": 0.0}


class Codec:
    """Of one message. `read` and `write` are for messages within others."""

    def __init__(self, message: ProtoMessage, codecs: Codecs) -> None:
        self.type: Any = message.owner
        self.fields = frozenset(field.name for field in message.fields)
        self._class: Any = descriptors.class_of(message.full_name)
        self._shown = SHOWN.get(message.owner)
        required = [field for field in message.fields if field.default is NODEFAULT]
        self._missing = {field.name: value for field in required for value in _values_if_missing(field)}
        """The values of required fields that are not set; the others have their default then."""
        self._readers = {field.name: _reader(field, codecs) for field in message.fields}
        self._writers = [(f.name, operator.attrgetter(f.name), _writer(f, codecs)) for f in message.fields]

    def parse(self, raw: bytes) -> Any:
        """The message of protobuf. Raises `InvalidRequest`."""
        try:
            return self._class.FromString(raw)
        except DecodeError:
            raise invalid(("message", f"is not a {self._class.DESCRIPTOR.full_name}")) from None

    def read(self, message: Any) -> Values:
        values = {**self._missing}
        for field, value in message.ListFields():
            read = self._readers[field.name](value)
            if read is not None:
                values[field.name] = read
        return values

    def typed(self, values: Values) -> Any:
        """The message of the contract. Raises `InvalidRequest` with all wrong fields."""
        try:
            return msgspec.convert(values, self.type)
        except msgspec.ValidationError as error:
            errors = wrong_fields(self.type, values, "") or [FieldError(field="message", message=str(error))]
            raise InvalidRequest(errors=tuple(errors)) from None

    def write(self, message: Any) -> Values:
        shown = message if self._shown is None else self._shown(message)
        values: Values = {}
        for name, value_of, write in self._writers:
            value = value_of(shown)
            if value is not None:
                values[name] = value if write is None else write(value)
        return values

    def built(self, message: Any) -> Any:
        """The message of protobuf for one of the contract, or for an error."""
        return self._class(**self.write(message))

    def encode(self, message: Any) -> bytes:
        return self.built(message).SerializeToString()


class Codecs:
    """The codecs of all messages of the files, by the full name of the message and by the type of the contract."""

    def __init__(self, files: tuple[ProtoFile, ...]) -> None:
        descriptors.add(files)
        self._messages = {message.full_name: message for file in files for message in file.messages}
        self._made: dict[str, Codec] = {}
        self._names = {message.owner: message.full_name for message in self._messages.values()}

    def named(self, full_name: str) -> Codec:
        if full_name not in self._made:
            self._made[full_name] = Codec(self._messages[full_name], self)
        return self._made[full_name]

    def of_error(self, error: ServiceError) -> Codec | None:
        """None for an error without details, or without a message for them."""
        name = self._names.get(type(error))
        return None if name is None else self.named(name)


def _values_if_missing(field: ProtoField) -> tuple[Any, ...]:
    """The value of a required field that is not set; none where it has to be given."""
    if field.takes_none:
        return (None,)
    if field.is_repeated:
        return ((),)
    return (ZEROES[field.type],) if field.shape == "scalar" and not field.is_optional else ()


def _reader(field: ProtoField, codecs: Codecs) -> Convert:
    one = _one_reader(field, codecs)
    return (lambda values: tuple(map(one, values))) if field.is_repeated else one


def _one_reader(field: ProtoField, codecs: Codecs) -> Convert:
    if field.shape == "enum":
        texts = dict(field.numbers)
        return lambda number: texts.get(number, str(number)) if number else None
    if field.type == TIMESTAMP:
        return _time
    if field.type == VALUE:
        return json_format.MessageToDict
    if field.shape == "message":
        return codecs.named(field.type).read
    return _same


def _same(value: Any) -> Any:
    return value


def _time(stamp: Any) -> Any:
    try:
        return stamp.ToDatetime(tzinfo=datetime.UTC)
    except (ValueError, OverflowError):  # the check of the contract refuses what is no time
        return str(stamp.seconds)


def _writer(field: ProtoField, codecs: Codecs) -> Convert | None:
    """None for values that protobuf takes as they are; times are among these."""
    one = _one_writer(field, codecs)
    return (lambda values: [one(value) for value in values]) if field.is_repeated and one else one


def _one_writer(field: ProtoField, codecs: Codecs) -> Convert | None:
    if field.shape == "enum":
        numbers = {text: number for number, text in field.numbers}
        return lambda text: numbers.get(text, 0)
    if field.type == VALUE:
        return lambda value: json_format.ParseDict(msgspec.to_builtins(value), Value())
    if field.shape == "message" and field.type != TIMESTAMP:
        return codecs.named(field.type).write
    return None
