"""The protocol of the gRPC transport: names, limits, and the envelope."""

from __future__ import annotations

import math
from typing import Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from mercato.chassis.grpc import GrpcLimits
from mercato.chassis.rpc.transports.direct.wire import LARGEST_ANSWER_BYTES, LARGEST_BATCH_BYTES

PREFIX: Final = "/mercato.rpc.v1."
"""Before the name of a service; its operations are the methods: `/mercato.rpc.v1.orders/place`."""
DESCRIBE: Final = "Describe"
"""The method that gives the stats of an instance. No operation has such a name: they are in lower case."""

ENVELOPE_BYTES: Final = 1_024
"""A message is larger than what it carries by less than this."""
MOST_CALLS: Final = 4_096

RPC_LIMITS: Final = GrpcLimits(
    message_bytes=LARGEST_BATCH_BYTES + ENVELOPE_BYTES,
    answer_bytes=LARGEST_ANSWER_BYTES + ENVELOPE_BYTES,
    # Callers are the shop's own processes, each with one connection, and bound their calls by themselves.
    calls=MOST_CALLS,
    streams=MOST_CALLS,
    # Longer than a client keeps an unused connection, so that the server never closes one that a call is sent on.
    idle_seconds=120.0,
    age_seconds=math.inf,
    ping_seconds=10.0,
    ping_answer_seconds=5.0,
)
"""The bounds of a `GrpcServer` that serves `RpcHandlers`."""


def _message(name: str, field: str) -> Any:
    """The class of a message with one field of bytes, as `proto/mercato/rpc/v1/batch.proto` has it."""
    file = descriptor_pb2.FileDescriptorProto(name=f"mercato/rpc/v1/{field}", package="mercato.rpc.v1", syntax="proto3")
    kind = descriptor_pb2.FieldDescriptorProto
    file.message_type.add(name=name).field.add(
        name=field, number=1, type=kind.TYPE_BYTES, label=kind.LABEL_OPTIONAL, json_name=field
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)  # pyright: ignore[reportUnknownMemberType]
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"mercato.rpc.v1.{name}"))


_Batch: Final = _message("Batch", "requests")
_Outcomes: Final = _message("Outcomes", "outcomes")


def batch(requests: bytes) -> bytes:
    return _Batch(requests=requests).SerializeToString()


def requests_of(message: bytes) -> bytes:
    """Raises `google.protobuf.message.DecodeError`."""
    return _Batch.FromString(message).requests


def outcomes(encoded: bytes) -> bytes:
    return _Outcomes(outcomes=encoded).SerializeToString()


def outcomes_in(message: bytes) -> bytes:
    """Raises `google.protobuf.message.DecodeError`."""
    return _Outcomes.FromString(message).outcomes
