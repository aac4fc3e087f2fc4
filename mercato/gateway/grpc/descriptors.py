"""The protobuf files as descriptors, from which protobuf makes the classes of messages.

They are in the default pool of the process, where those of Google's messages are, so that reflection has all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
)
from google.protobuf.struct_pb2 import Value
from google.protobuf.timestamp_pb2 import Timestamp

from mercato.contracts.protos import TIMESTAMP, VALUE, ProtoEnum, ProtoField, ProtoFile, ProtoMessage

SCALARS: Final[Mapping[str, FieldDescriptorProto.Type.ValueType]] = {
    "bool": FieldDescriptorProto.TYPE_BOOL,
    "bytes": FieldDescriptorProto.TYPE_BYTES,
    "double": FieldDescriptorProto.TYPE_DOUBLE,
    "int64": FieldDescriptorProto.TYPE_INT64,
    "string": FieldDescriptorProto.TYPE_STRING,
}
SHAPES: Final[Mapping[str, FieldDescriptorProto.Type.ValueType]] = {
    "enum": FieldDescriptorProto.TYPE_ENUM,
    "message": FieldDescriptorProto.TYPE_MESSAGE,
}
ADDED_FIRST: Final = {TIMESTAMP: Timestamp, VALUE: Value}
"""Their modules have added them to the pool: the files import those."""


def add(files: Sequence[ProtoFile]) -> None:
    """Adds the files to the default pool; files that it has already must be the same."""
    waiting = {file.path: file for file in files}
    while waiting:
        ready = [file for file in waiting.values() if not waiting.keys() & set(file.imports)]
        assert ready, f"these files import each other: {sorted(waiting)}"
        for file in ready:
            descriptor_pool.Default().AddSerializedFile(_file(waiting.pop(file.path)).SerializeToString())


def class_of(full_name: str) -> type[Any]:
    """The class of a message that was added."""
    return message_factory.GetMessageClass(descriptor_pool.Default().FindMessageTypeByName(full_name))


def _file(file: ProtoFile) -> FileDescriptorProto:
    made = FileDescriptorProto(name=file.path, package=file.package, syntax="proto3", dependency=file.imports)
    made.message_type.extend(_message(message) for message in file.messages)
    made.enum_type.extend(_enum(enum) for enum in file.enums)
    if file.service is not None:
        service = made.service.add(name=file.service.name)
        for method in file.service.methods:
            service.method.add(name=method.name, input_type=f".{method.request}", output_type=f".{method.answer}")
    return made


def _message(message: ProtoMessage) -> DescriptorProto:
    made = DescriptorProto(name=message.name, reserved_name=message.reserved.values())
    for number in message.reserved:
        made.reserved_range.add(start=number, end=number + 1)
    for field in message.fields:
        made.field.append(_field(field))
        if field.is_optional:  # protobuf's own form of presence: each such field in a group of its own
            made.field[-1].oneof_index = len(made.oneof_decl)
            made.oneof_decl.add(name=f"_{field.name}")
    return made


def _field(field: ProtoField) -> FieldDescriptorProto:
    label = FieldDescriptorProto.LABEL_REPEATED if field.is_repeated else FieldDescriptorProto.LABEL_OPTIONAL
    made = FieldDescriptorProto(name=field.name, number=field.number, label=label)
    made.type = SCALARS[field.type] if field.shape == "scalar" else SHAPES[field.shape]
    if field.shape != "scalar":
        made.type_name = f".{field.type}"
    if field.is_optional:
        made.proto3_optional = True
    return made


def _enum(enum: ProtoEnum) -> EnumDescriptorProto:
    made = EnumDescriptorProto(name=enum.name, reserved_name=enum.reserved.values())
    for number in enum.reserved:
        made.reserved_range.add(start=number, end=number)
    for name, number in enum.values:
        made.value.add(name=name, number=number)
    return made
