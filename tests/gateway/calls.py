"""Calls of the public gRPC API, by the name of an operation: `await calls.call("orders.place", PlaceOrder...)`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import grpc
import grpc.aio
from google.protobuf.message import Message as ProtoMessage
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RequestInfo, RetryInfo
from google.rpc.status_pb2 import Status

from contracts import update_schemas
from mercato import topology
from mercato.contracts.protos import ProtoMethod, full_method
from mercato.gateway.grpc.codecs import Codecs
from mercato.gateway.grpc.descriptors import class_of
from mercato.gateway.public import proto_files
from mercato.testing.shop import Shop

FILES = proto_files(topology.SERVICES, update_schemas.committed_numbers())
CODECS = Codecs(FILES)
METHODS: Mapping[str, ProtoMethod] = {
    method.public.operation.full_name: method for file in FILES if file.service for method in file.service.methods
}
DETAILS = (BadRequest, ErrorInfo, RequestInfo, RetryInfo)
NO_FIELDS: Mapping[str, Any] = {}


class Refused(Exception):
    """A status that is not OK, with its details by the names of their messages."""

    def __init__(self, error: grpc.aio.AioRpcError) -> None:
        super().__init__(f"{error.code().name}: {error.details()}")
        self.code = error.code()
        self.sentence = error.details() or ""
        self.details: dict[str, Any] = {}
        self.trailer: dict[str, Any] = dict(error.trailing_metadata())
        for packed in Status.FromString(self.trailer.get("grpc-status-details-bin", b"")).details:
            name = packed.TypeName()
            made = class_of(name)()
            packed.Unpack(made)
            self.details[name.rpartition(".")[2]] = made

    @property
    def reason(self) -> str:
        return self.details["ErrorInfo"].reason

    @property
    def fields(self) -> dict[str, str]:
        return {wrong.field: wrong.description for wrong in self.details["BadRequest"].field_violations}


class Calls:
    """A channel to a shop."""

    def __init__(self, address: str, options: Sequence[tuple[str, Any]] = ()) -> None:
        self.channel = grpc.aio.insecure_channel(address, options=[("grpc.enable_retries", 0), *options])

    @classmethod
    def of(cls, shop: Shop) -> Self:
        return cls(shop.grpc_address)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()

    def begin(
        self,
        operation: str,
        fields: Mapping[str, Any] | ProtoMessage | bytes = NO_FIELDS,
        *,
        token: str | None = None,
        timeout: float | None = 30.0,
        metadata: Sequence[tuple[str, str]] = (),
    ) -> Any:
        method = METHODS[operation]
        request = fields if isinstance(fields, (bytes, ProtoMessage)) else class_of(method.request)(**fields)
        raw = request if isinstance(request, bytes) else request.SerializeToString()
        path = f"/{full_method(method.public.operation, topology.SERVICES[method.public.operation.service])}"
        call = self.channel.unary_unary(path, None, class_of(method.answer).FromString)
        sent = [*metadata, *([("authorization", f"Bearer {token}")] if token else [])]
        return call(raw, metadata=sent, timeout=timeout)

    async def call(self, operation: str, fields: Any = NO_FIELDS, **options: Any) -> Any:
        """The answer. Raises `Refused`."""
        try:
            return await self.begin(operation, fields, **options)
        except grpc.aio.AioRpcError as error:
            raise Refused(error) from None

    async def refusal(self, operation: str, fields: Any = NO_FIELDS, **options: Any) -> Refused:
        """The status that refuses a call."""
        try:
            answer = await self.call(operation, fields, **options)
        except Refused as refused:
            return refused
        raise AssertionError(f"{operation} was answered with {answer}")
