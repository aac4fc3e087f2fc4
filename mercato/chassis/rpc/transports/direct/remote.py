"""A process whose services call those of other processes by their addresses. See the top of this package."""

from __future__ import annotations

import abc
import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final, Protocol

from mercato.chassis.rpc.discovery import Instance, Registrar, Registry
from mercato.chassis.rpc.server import Server
from mercato.chassis.rpc.stats import Inspected, Stats

from .client import DirectTransport

LEAVE_SECONDS: Final = 2.0
"""A process that drains refuses batches for so long before it closes its connections. By then each caller has received
a refusal, and uses other instances, or has closed an unused connection."""
DRAIN_SECONDS: Final = 3.0
"""How long running batches may take after that."""


class Inspector(Protocol):
    """Asks instances for their stats."""

    async def inspect(self, service: str) -> Sequence[Inspected]:
        """All instances of a service, in the order of the registry. Takes a second at most."""
        ...

    async def close(self) -> None: ...


class DirectRemote(abc.ABC):
    """See `Remote`. `registrar` is the registry where an instance registers itself, with the address of `_listen`."""

    def __init__(
        self,
        registry: Registry,
        registrar: Registrar | None,
        transports: Mapping[str, DirectTransport],
        inspector: Inspector,
        stats: Stats,
    ) -> None:
        self._registry = registry
        self._registrar = registrar
        self._registered: Sequence[Instance] = ()
        self._transports = transports
        self._inspector = inspector
        self._stats = stats

    @abc.abstractmethod
    async def _listen(self, servers: Mapping[str, Server]) -> str:
        """Accepts batches for `servers` from now on; gives the address, empty for a process that serves none."""

    @abc.abstractmethod
    def _leave(self, seconds: float) -> bool:
        """Refuses batches from now on; False for a process that serves none. It has ended after so many seconds."""

    @abc.abstractmethod
    async def _finish(self) -> None:
        """Stops to listen, when running batches are answered, within `DRAIN_SECONDS`."""

    @abc.abstractmethod
    async def _abort(self) -> None:
        """Stops to listen at once, if `_finish` has not been called."""

    def transport(self, caller: str) -> DirectTransport:
        return self._transports[caller]

    async def open(self) -> None:
        """Connects to the registry alone: the first calls open connections."""
        await self._registry.open()

    async def serve(self, servers: Mapping[str, Server]) -> None:
        address = await self._listen(servers)
        if address and self._registrar is not None:
            self._registered = [Instance(name, address, self._stats.instance, self._stats.version) for name in servers]
            await asyncio.gather(*map(self._registrar.register, self._registered))

    async def drain(self) -> None:
        if self._registrar is not None:
            await asyncio.gather(*map(self._registrar.deregister, self._registered))
        if self._leave(LEAVE_SECONDS + DRAIN_SECONDS):
            await asyncio.sleep(LEAVE_SECONDS)
            await self._finish()

    async def close(self) -> None:
        await self._abort()
        await self._registry.close()
        await self._inspector.close()
        for transport in self._transports.values():
            await transport.close()

    def wake_consumers(self, source: str) -> None:  # noqa: B027
        """Does nothing: consumers poll."""

    async def listen(self, consumer: str, source: str, wake: Callable[[], None]) -> None:  # noqa: B027
        """Never calls `wake`: consumers poll."""

    async def inspect(self, services: Collection[str]) -> Mapping[str, Sequence[Inspected]]:
        found = await asyncio.gather(*(self._inspector.inspect(service) for service in services))
        return dict(zip(services, found, strict=True))

    async def unreachable(self, services: Collection[str]) -> Mapping[str, str]:
        reasons = {name: _reason(found) for name, found in (await self.inspect(services)).items()}
        return {service: reason for service, reason in reasons.items() if reason}

    def registry_problem(self) -> str:
        return self._registry.problem()


def _reason(instances: Sequence[Inspected]) -> str:
    """Why no instance accepts calls; empty if one does."""
    if any(found.stats for found in instances):
        return ""
    return next((found.problem for found in instances), "no instance is known")
