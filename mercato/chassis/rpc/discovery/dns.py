"""DNS as a registry: a name for each service, with an address for each instance, like a headless service of
Kubernetes: `orders=orders.shop.svc.cluster.local:9083; users=users.shop.svc.cluster.local:9081`.

The resolver of the system looks the names up every second. An answer replaces the addresses known before; without an
answer these stay in use, because a failure of the resolver says nothing about the instances.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final

import structlog

from . import Instance

LOOK_UP_SECONDS: Final = 1.0
ANSWER_SECONDS: Final = 2.0
"""With the time between look-ups, an instance that was removed from DNS is out of the list within three seconds."""

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""The addresses (`host:port`) of a name and a port. Raises `OSError` without an answer."""

log = structlog.stdlib.get_logger("mercato.discovery")


async def resolve(host: str, port: int) -> Sequence[str]:
    """By the resolver of the system; addresses of both families."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = {address[0] for *_, address in found if isinstance(address[0], str)}
    return sorted(f"[{address}]:{port}" if ":" in address else f"{address}:{port}" for address in addresses)


class DnsRegistry:
    """`names` (`host:port`) are by service. It belongs to one event loop."""

    def __init__(
        self, names: Mapping[str, str], *, resolve: Resolve = resolve, seconds: float = LOOK_UP_SECONDS
    ) -> None:
        self._names = {service: _split(name) for service, name in names.items()}
        self._resolve = resolve
        self._seconds = seconds
        self._instances: dict[str, tuple[Instance, ...]] = {}
        self._listeners: list[Callable[[str], None]] = []
        self._failing: set[str] = set()
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Returns when every name has been looked up once, with or without an answer."""
        await self._look_up_all()
        self._task = asyncio.create_task(self._follow(), name="look up services")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    def instances(self, service: str) -> Sequence[Instance]:
        return self._instances.get(service, ())

    def watch(self, changed: Callable[[str], None]) -> Callable[[], None]:
        self._listeners.append(changed)

        def end() -> None:
            with contextlib.suppress(ValueError):
                self._listeners.remove(changed)

        return end

    def problem(self) -> str:
        if not self._failing:
            return ""
        names = ", ".join(sorted(self._failing))
        return f"DNS gives no answer for {names}; the addresses that were known last stay in use."

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self._seconds)
            await self._look_up_all()

    async def _look_up_all(self) -> None:
        await asyncio.gather(*(self._look_up(service) for service in self._names))

    async def _look_up(self, service: str) -> None:
        host, port = self._names[service]
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                addresses = await self._resolve(host, port)
        except (OSError, TimeoutError) as error:
            if service not in self._failing:
                log.warning("service_not_resolved", service=service, name=host, reason=type(error).__name__)
            self._failing.add(service)
            return
        self._failing.discard(service)
        found = tuple(Instance(service, address, id=address, name=host) for address in addresses)
        if found != self._instances.get(service, ()):
            self._instances[service] = found
            log.info("instances_changed", service=service, addresses=[instance.address for instance in found])
            for listener in tuple(self._listeners):
                listener(service)


def _split(name: str) -> tuple[str, int]:
    host, _, port = name.rpartition(":")
    return host.strip("[]"), int(port)
