"""Reads the stats of each instance of a service over gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

import grpc
import grpc.aio
import msgspec
from google.protobuf.message import DecodeError

from mercato.chassis.rpc.discovery import Instance, Registry
from mercato.chassis.rpc.stats import Inspected, InstanceStats
from mercato.chassis.rpc.transports.direct.client import ClientLimits, NotConnected
from mercato.chassis.rpc.transports.direct.wire import AUTHORIZATION, BEARER, NOT_STARTED
from mercato.chassis.rpc.transports.server_names import ServerName, by_registry
from mercato.chassis.rpc.trust import TokenSigner

from .channels import Channels
from .wire import DESCRIBE, PREFIX, read_answers

ANSWER_SECONDS: Final = 1.0


class GrpcInspector:
    """Asks all instances in `registry`, as the caller whose tokens `signer` signs."""

    def __init__(
        self,
        registry: Registry,
        signer: TokenSigner,
        *,
        ca: bytes | None = None,
        server_name: ServerName = by_registry,
    ) -> None:
        self._registry = registry
        self._signer = signer
        self._is_encrypted = ca is not None
        self._channels = Channels(ClientLimits(), server_name, ca)

    async def inspect(self, service: str) -> Sequence[Inspected]:
        """All instances of a service, in the order of the registry. Takes a second at most."""
        instances = self._registry.instances(service)
        return await asyncio.gather(*(self._ask(instance) for instance in instances))

    async def close(self) -> None:
        await self._channels.close()

    async def _ask(self, instance: Instance) -> Inspected:
        path = f"{PREFIX}{instance.service}/{DESCRIBE}"
        metadata = ((AUTHORIZATION, BEARER + self._signer.token(instance.service)),)
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                message = await self._channels.call(instance, path, b"", ANSWER_SECONDS, metadata)
            [stats] = read_answers(message)
            return Inspected(instance.address, msgspec.json.decode(stats.outcomes, type=InstanceStats))
        except NotConnected:
            both = "no connection: is it encrypted by a certificate that this process verifies?"
            return Inspected(instance.address, problem=both if self._is_encrypted else "no connection")
        except TimeoutError:
            return Inspected(instance.address, problem="no answer within a second")
        except grpc.aio.AioRpcError as error:
            return Inspected(instance.address, problem=_problem(error))
        except (DecodeError, ValueError, msgspec.MsgspecError):
            return Inspected(instance.address, problem="an answer that is none of ours")


def _problem(error: grpc.aio.AioRpcError) -> str:
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return "no answer within a second"
    return str(dict(error.trailing_metadata() or ()).get(NOT_STARTED, f"status {error.code().name}"))
