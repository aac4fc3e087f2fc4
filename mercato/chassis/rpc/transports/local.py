"""Services of this process first: a batch for them is a method call, and messages are passed as objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mercato.chassis.contract import Context, Operation
from mercato.chassis.rpc.batching import Outcome
from mercato.chassis.rpc.server import LocalTransport, Server
from mercato.chassis.rpc.transports import Transport


class LocalFirst:
    """Sends to the servers of this process, and by `remote` to services that it does not serve."""

    def __init__(self, servers: Mapping[str, Server], remote: Transport) -> None:
        self._servers = servers
        self._local = LocalTransport(servers)
        self._remote = remote

    async def send(
        self, operation: Operation[Any, Any], requests: Sequence[Any], contexts: Sequence[Context]
    ) -> Sequence[Outcome]:
        carrier = self._local if operation.service in self._servers else self._remote
        return await carrier.send(operation, requests, contexts)
