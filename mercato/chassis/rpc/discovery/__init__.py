"""Service discovery: the port for registries, and a file for each adapter.

A call never waits for a registry: `instances` answers from memory. The adapter of a registry outside of the process
(mDNS, DNS, etcd, Consul) keeps that memory current in a task, and notifies its listeners.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec


class Instance(msgspec.Struct, frozen=True):
    """One process that serves one contract.

    `service` is the name of the contract. `address` is `host:port`, with an IPv6 host in brackets. `id` is new at each
    start of a process, if the registry has it: another id at the same address is another process. `version` is
    its release; empty if the registry does not have it. `name` is the one whose address this is, in DNS; empty where
    the registry has the address itself.
    """

    service: str
    address: str
    id: str
    version: str = ""
    name: str = ""


class Registry(Protocol):
    """Lists the instances of a service. It does not check that they answer.

    `open` before use, and `close` at the end.
    """

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    def instances(self, service: str) -> Sequence[Instance]:
        """The instances known now, in no particular order; empty for a service without any. Does not wait."""
        ...

    def watch(self, changed: Callable[[str], None]) -> Callable[[], None]:
        """Calls `changed` with the name of a service after each change of its instances, in the event loop.

        Returns a function that ends it.
        """
        ...

    def problem(self) -> str:
        """Why the known instances may be out of date, as a sentence; empty if they are not known to be."""
        ...


class Registrar(Protocol):
    """A registry in which an instance registers itself; not a static list or DNS."""

    async def register(self, instance: Instance) -> None:
        """From now on other processes find it. Registering the same instance again changes nothing."""
        ...

    async def deregister(self, instance: Instance) -> None:
        """From now on other processes do not find it. Does nothing if it is not registered."""
        ...
