"""Where the instances of a service are: the port for registries, and a file for each adapter.

A registry is asked on the way of every new list of instances and never on the way of a call: `instances` answers from
memory. An adapter whose registry is elsewhere (NATS, mDNS, DNS, etcd, Consul) keeps that memory current by a task of
its own, and notifies its listeners.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec


class Instance(msgspec.Struct, frozen=True):
    """One process that serves one contract.

    `service` is the name of the contract. `address` is `host:port`, with an IPv6 host in brackets. `id` is new at each
    start of a process, where the registry knows it: another id at the same address is another process. `version` is
    the release that it runs; empty where the registry does not say.
    """

    service: str
    address: str
    id: str
    version: str = ""


class Registry(Protocol):
    """Says which instances of a service there are. Whether they answer is for its reader to find out.

    `open` before use, and `close` at the end.
    """

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    def instances(self, service: str) -> Sequence[Instance]:
        """Those known now, in no particular order; empty for a service without any. Waits for nothing."""
        ...

    def watch(self, changed: Callable[[str], None]) -> Callable[[], None]:
        """Calls `changed` with the name of a service after each change of its instances, in the event loop.

        Returns a function that ends it.
        """
        ...

    def problem(self) -> str:
        """Why the instances known now may not be those that there are, as a sentence; empty where nothing says so."""
        ...


class Registrar(Protocol):
    """A registry in which an instance registers itself. A static list and DNS are none."""

    async def register(self, instance: Instance) -> None:
        """From now on others find it. Registering the same instance again changes nothing."""
        ...

    async def deregister(self, instance: Instance) -> None:
        """From now on others do not find it any more. Nothing happens where it is not registered."""
        ...
