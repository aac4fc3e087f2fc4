"""What a gRPC server serves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import grpc


class Handlers:
    """Collects handlers: it stands for the server in generated functions such as `add_HealthServicer_to_server`."""

    def __init__(self) -> None:
        self.all: list[grpc.GenericRpcHandler] = []

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        self.all.extend(generic_rpc_handlers)

    def add_registered_method_handlers(
        self, service_name: str, method_handlers: Mapping[str, grpc.RpcMethodHandler[Any, Any]]
    ) -> None:
        """Does nothing: generated code registers the same handlers as generic ones, before."""
