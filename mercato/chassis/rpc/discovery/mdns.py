"""Multicast DNS as a registry: processes on one network find each other without a list (extra `mdns`).

Each instance announces a DNS-SD service of the type `_mercato._tcp.local.`, with the name of its contract, its id and
its release. An instance that ends sends a goodbye, and is out of the list at once. One that crashes does not, and its
records would stay valid for minutes: so every known address is connected to once a second, and is left out while it
accepts no connection.

Several shops may be on one network: each announces its own name, and ignores records of others. That is no protection:
calls are authenticated with tokens, as on every transport.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, cast

import structlog

from . import Instance

if TYPE_CHECKING:
    from zeroconf import ServiceStateChange, Zeroconf
    from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

TYPE: Final = "_mercato._tcp.local."
FIRST_SECONDS: Final = 2.0
"""`open` waits for so long, and returns with the instances that have answered; later answers are changes.

A question that another process has asked within the last second is not asked again (RFC 6762, section 7.3), and its
answer may have come before this process listened; the next question follows after a second.
"""
ANSWER_MS: Final = 3_000
CHECK_SECONDS: Final = 1.0
CONNECT_SECONDS: Final = 1.0
"""With the time between checks, an instance that has crashed is out of the list within three seconds."""

log = structlog.stdlib.get_logger("mercato.discovery")


class MdnsRegistry:
    """A `Registry` and a `Registrar` of the shop of this name. It belongs to one event loop.

    `interfaces` are addresses of this machine, in whose networks other instances are found; empty: all.
    """

    def __init__(
        self,
        shop: str,
        interfaces: Sequence[str] = (),
        *,
        check_seconds: float = CHECK_SECONDS,
        first_seconds: float = FIRST_SECONDS,
    ) -> None:
        self._shop = shop
        self._interfaces = list(interfaces)
        self._check_seconds = check_seconds
        self._first_seconds = first_seconds
        self._announced: dict[str, Instance] = {}
        """The known instances, by the name of the record."""
        self._dead: set[str] = set()
        """Addresses that accept no connections now."""
        self._own: dict[Instance, AsyncServiceInfo] = {}
        self._listeners: list[Callable[[str], None]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._zeroconf: AsyncZeroconf | None = None
        self._browser: AsyncServiceBrowser | None = None

    async def open(self) -> None:
        """Returns after `first_seconds`, with the instances that have answered by then."""
        from zeroconf import DNSQuestionType, InterfaceChoice
        from zeroconf.asyncio import AsyncServiceBrowser, AsyncZeroconf

        # All questions ask for multicast answers: the processes of a machine share one port, and a unicast answer,
        # which the library asks for first, reaches only one of them.
        self._zeroconf = AsyncZeroconf(interfaces=self._interfaces or InterfaceChoice.All)
        self._browser = AsyncServiceBrowser(
            self._zeroconf.zeroconf, TYPE, handlers=[self._on_change], question_type=DNSQuestionType.QM
        )
        self._start(self._check())
        await asyncio.sleep(self._first_seconds)

    async def close(self) -> None:
        """Deregisters what is still registered."""
        if self._zeroconf is None or self._browser is None:
            return
        for task in self._tasks:
            task.cancel()
        for instance in list(self._own):
            await self.deregister(instance)
        await self._browser.async_cancel()
        await self._zeroconf.async_close()

    def instances(self, service: str) -> Sequence[Instance]:
        return [
            instance
            for instance in self._announced.values()
            if instance.service == service and instance.address not in self._dead
        ]

    def watch(self, changed: Callable[[str], None]) -> Callable[[], None]:
        self._listeners.append(changed)

        def end() -> None:
            with contextlib.suppress(ValueError):
                self._listeners.remove(changed)

        return end

    def problem(self) -> str:
        return ""

    async def register(self, instance: Instance) -> None:
        from zeroconf.asyncio import AsyncServiceInfo

        assert self._zeroconf is not None, "it is not open"
        if instance in self._own:
            return
        host, _, port = instance.address.rpartition(":")
        host = host.strip("[]")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        said = {"shop": self._shop, "service": instance.service, "id": instance.id, "version": instance.version}
        info = AsyncServiceInfo(
            TYPE,
            f"{instance.service.replace('.', '-')}-{instance.id}.{TYPE}",
            addresses=[socket.inet_pton(family, host)],
            port=int(port),
            properties=said,
            server=f"mercato-{instance.id}.local.",
        )
        self._own[instance] = info
        # The id is random: the name needs no probe for a conflict.
        zeroconf = cast(Any, self._zeroconf)  # the types of its results are not known
        await (await zeroconf.async_register_service(info, cooperating_responders=True))

    async def deregister(self, instance: Instance) -> None:
        info = self._own.pop(instance, None)
        if info is not None and self._zeroconf is not None:
            await (await cast(Any, self._zeroconf).async_unregister_service(info))

    # -------------------------------------------------------------------------------------------------- all processes

    def _on_change(self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        from zeroconf import ServiceStateChange as Change

        if state_change is Change.Removed:
            gone = self._announced.pop(name, None)
            if gone is not None:
                self._changed(gone.service)
        else:
            self._start(self._ask(zeroconf, service_type, name))

    async def _ask(self, zeroconf: Zeroconf, service_type: str, name: str) -> None:
        from zeroconf import DNSQuestionType
        from zeroconf.asyncio import AsyncServiceInfo

        info = AsyncServiceInfo(service_type, name)
        if not await info.async_request(zeroconf, ANSWER_MS, DNSQuestionType.QM):
            log.warning("service_not_resolved", name=name, reason="no answer")
            return
        if info.decoded_properties.get("shop") != self._shop:
            return
        found = _instance(info)
        if found is None:
            log.warning("service_not_resolved", name=name, reason="malformed")
        elif self._announced.get(name) != found:
            self._announced[name] = found
            self._changed(found.service)

    async def _check(self) -> None:
        while True:
            await asyncio.sleep(self._check_seconds)
            known = {instance.address for instance in self._announced.values()}
            accepts = await asyncio.gather(*(_accepts(address) for address in known))
            dead = {address for address, does in zip(known, accepts, strict=True) if not does}
            moved, self._dead = dead ^ self._dead, dead
            for service in {i.service for i in self._announced.values() if i.address in moved}:
                self._changed(service)

    def _changed(self, service: str) -> None:
        addresses = [instance.address for instance in self.instances(service)]
        log.info("instances_changed", service=service, addresses=addresses)
        for listener in tuple(self._listeners):
            listener(service)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _instance(info: AsyncServiceInfo) -> Instance | None:
    """The instance in a record; None if it is not one of ours."""
    said: Mapping[str, str | None] = info.decoded_properties
    addresses = info.parsed_addresses()
    service, id_ = said.get("service"), said.get("id")
    if not service or not id_ or not addresses or not info.port:
        return None
    host = f"[{addresses[0]}]" if ":" in addresses[0] else addresses[0]
    return Instance(service, f"{host}:{info.port}", id_, said.get("version") or "")


async def _accepts(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True
