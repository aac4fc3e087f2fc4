"""The public gRPC server of a process: the methods, health (grpc.health.v1) and reflection.

stop ──► not serving ──► waits end ──► takes no more calls ──► running calls are answered ──► closes
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import grpc
import grpc.aio
from grpc_health.v1 import health as _health, health_pb2, health_pb2_grpc as _health_grpc
from grpc_reflection.v1alpha import reflection as _reflection, reflection_pb2_grpc as _reflection_grpc

from mercato.chassis.contract import Contract
from mercato.chassis.grpc import GrpcLimits, GrpcServer, GrpcTls, Handlers
from mercato.chassis.observability.telemetry import Telemetry
from mercato.contracts import field_numbers
from mercato.gateway.app import Gateway
from mercato.gateway.grpc.edge import Edge
from mercato.gateway.grpc.methods import Method

if TYPE_CHECKING:
    CallContext = grpc.aio.ServicerContext[Any, Any]

# They have no types.
health: Any = _health
health_grpc: Any = _health_grpc
reflection: Any = _reflection
reflection_grpc: Any = _reflection_grpc
unary: Any = grpc.unary_unary_rpc_method_handler

_NUMBERS: Final = Path(field_numbers.__file__).with_suffix(".json")


class _Methods(grpc.GenericRpcHandler):
    """Gives the handler of a method by its path: bytes are read and written by the edge."""

    def __init__(self, edge: Edge) -> None:
        self._handlers = {path: _handler(edge, method) for path, method in edge.methods.items()}

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        return self._handlers.get(handler_call_details.method)


def _handler(edge: Edge, method: Method) -> Any:
    async def call(raw: bytes, context: CallContext) -> bytes:
        return await edge.call(method, raw, context)

    return unary(call)


@contextlib.asynccontextmanager
async def serving(
    gateway: Gateway,
    host: str,
    port: int,
    *,
    contracts: Mapping[str, type[Contract]],
    services: Collection[str],
    telemetry: Telemetry,
    tls: GrpcTls | None = None,
    reuse_port: bool = False,
    limits: GrpcLimits | None = None,
) -> AsyncGenerator[str]:
    """Serves the public operations of `services`, with the policy of `gateway`; gives the address.

    `contracts`: those of all services, by name. Raises `CannotListen`, or `ValueError` for a certificate that is none.
    """
    numbers = field_numbers.read(_NUMBERS.read_bytes())
    edge = Edge(gateway, contracts, services, numbers, telemetry)
    healthy = health.aio.HealthServicer()
    for name in ("", *edge.services):
        await healthy.set(name, health_pb2.HealthCheckResponse.SERVING)
    handlers = Handlers()
    health_grpc.add_HealthServicer_to_server(healthy, handlers)
    names = [*edge.services, health.SERVICE_NAME, reflection.SERVICE_NAME]
    reflection_grpc.add_ServerReflectionServicer_to_server(reflection.aio.ReflectionServicer(names), handlers)
    server = GrpcServer(host, port, limits=limits or GrpcLimits(), tls=tls, reuse_port=reuse_port)
    await server.start([_Methods(edge), *handlers.all])
    try:
        yield server.address
    finally:
        await healthy.enter_graceful_shutdown()
        edge.stop_waiting()
        await server.stop()
