"""The protocol of the gRPC transport: names, limits, and messages."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from mercato.chassis.grpc import GrpcLimits
from mercato.chassis.rpc.transports.direct.wire import LARGEST_ANSWER_BYTES, LARGEST_BATCH_BYTES

PACKAGE: Final = "mercato.rpc.v1"
PREFIX: Final = f"/{PACKAGE}."
"""Before the name of a service."""
EXCHANGE: Final = "Exchange"
"""The method whose stream carries batches and outcomes."""
DESCRIBE: Final = "Describe"
"""The method that gives the stats of an instance."""

ACCEPTED: Final = "mercato-accepted"
"""In the initial metadata of a stream that the instance takes batches on. A refusal has initial metadata too."""

ENVELOPE_BYTES: Final = 4_096
"""A message is larger than the requests or outcomes in it by less than this; a token has less than 1 000 bytes."""
LARGE_BYTES: Final = 65_536
"""A message carries more than one batch, or the answer to more than one, only up to about this size. It saves the cost
of messages, which hardly grows until then, and no batch waits until a large one is received."""
MOST_BATCHES: Final = 4_096
"""Of one stream, running at a time. Callers are the shop's own processes, and bound their calls far below it."""
MOST_STREAMS: Final = 4_096

RPC_LIMITS: Final = GrpcLimits(
    message_bytes=LARGEST_BATCH_BYTES + ENVELOPE_BYTES,
    answer_bytes=LARGEST_ANSWER_BYTES + ENVELOPE_BYTES,
    calls=MOST_STREAMS,
    streams=MOST_STREAMS,
    # Longer than a client keeps an unused connection, so that the server never closes one that a call is sent on.
    idle_seconds=120.0,
    age_seconds=math.inf,
    ping_seconds=10.0,
    ping_answer_seconds=5.0,
)
"""The bounds of a `GrpcServer` that serves `RpcHandlers`."""


class Batch(Protocol):
    """See `proto/mercato/rpc/v1/batch.proto`."""

    requests: bytes
    id: int
    operation: str
    remaining_ms: float
    authorization: str
    traceparent: str


class Outcomes(Protocol):
    """See `proto/mercato/rpc/v1/batch.proto`."""

    outcomes: bytes
    id: int
    not_started: str
    another_may_start_it: bool
    draining_seconds: float
    is_too_large: bool


_KIND: Final = descriptor_pb2.FieldDescriptorProto
_FIELDS: Final[Mapping[str, Sequence[tuple[str, Any]]]] = {
    "Batches": [("batches", "Batch")],
    "Answers": [("answers", "Outcomes")],
    "Batch": [
        ("requests", _KIND.TYPE_BYTES),
        ("id", _KIND.TYPE_UINT64),
        ("operation", _KIND.TYPE_STRING),
        ("remaining_ms", _KIND.TYPE_DOUBLE),
        ("authorization", _KIND.TYPE_STRING),
        ("traceparent", _KIND.TYPE_STRING),
    ],
    "Outcomes": [
        ("outcomes", _KIND.TYPE_BYTES),
        ("id", _KIND.TYPE_UINT64),
        ("not_started", _KIND.TYPE_STRING),
        ("another_may_start_it", _KIND.TYPE_BOOL),
        ("draining_seconds", _KIND.TYPE_DOUBLE),
        ("is_too_large", _KIND.TYPE_BOOL),
    ],
}
"""The messages as the .proto file has them, which a test compares: fields are numbered from 1, and a field with the
name of a message is a list of them."""


def _classes() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(name="batch.proto", package=PACKAGE, syntax="proto3")
    for name, fields in _FIELDS.items():
        message = file.message_type.add(name=name)
        for number, (field, kind) in enumerate(fields, 1):
            added = message.field.add(name=field, number=number)
            if isinstance(kind, str):
                added.type, added.label, added.type_name = (
                    _KIND.TYPE_MESSAGE,
                    _KIND.LABEL_REPEATED,
                    f".{PACKAGE}.{kind}",
                )
            else:
                added.type, added.label = kind, _KIND.LABEL_OPTIONAL
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)  # pyright: ignore[reportUnknownMemberType]
    kinds = {name: pool.FindMessageTypeByName(f"{PACKAGE}.{name}") for name in _FIELDS}
    return {name: message_factory.GetMessageClass(kind) for name, kind in kinds.items()}


_CLASSES: Final = _classes()

new_batch: Final[Callable[..., Batch]] = _CLASSES["Batch"]
new_outcomes: Final[Callable[..., Outcomes]] = _CLASSES["Outcomes"]


def batches(some: Sequence[Batch]) -> bytes:
    return _CLASSES["Batches"](batches=some).SerializeToString()


def read_batches(message: bytes) -> Sequence[Batch]:
    """Raises `google.protobuf.message.DecodeError`."""
    return _CLASSES["Batches"].FromString(message).batches


def answers(some: Sequence[Outcomes]) -> bytes:
    return _CLASSES["Answers"](answers=some).SerializeToString()


def read_answers(message: bytes) -> Sequence[Outcomes]:
    """Raises `google.protobuf.message.DecodeError`."""
    return _CLASSES["Answers"].FromString(message).answers
