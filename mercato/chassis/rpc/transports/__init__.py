"""How a batch reaches a service, and how a process is connected with other processes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

from mercato.chassis.contract import Context, Operation
from mercato.chassis.rpc.batching import Outcome
from mercato.chassis.rpc.server import Server
from mercato.chassis.rpc.stats import Inspected


class Transport(Protocol):
    """Sends a batch to a service.

    `send` takes the requests of one operation and their contexts, and gives as many outcomes, in the same order. It
    raises `ServiceError` if the batch as a whole did not reach a service: then no request was started, or it is unknown
    whether one was.
    """

    async def send(
        self, operation: Operation[Any, Any], requests: Sequence[Any], contexts: Sequence[Context]
    ) -> Sequence[Outcome]: ...


class Remote(Protocol):
    """The connection of a process with other processes: it calls their services, and they call those of this process.

    `open` before the first call, `serve` once the services are open, `drain` before they close, `close` at the end.
    """

    def transport(self, caller: str) -> Transport:
        """The transport of one caller, a service of this process or the gateway; the same at each call."""
        ...

    async def open(self) -> None:
        """Raises `Unavailable` if the message broker or registry between the processes does not answer."""
        ...

    async def serve(self, servers: Mapping[str, Server]) -> None:
        """From now on other processes reach `servers`, by the name of their contract."""
        ...

    async def drain(self) -> None:
        """Accepts no more batches; returns within a few seconds, when all accepted ones are answered."""
        ...

    async def close(self) -> None: ...

    def wake_consumers(self, source: str) -> None:
        """Wakes consumers of a service's event log in other processes. A wake-up may get lost: consumers also poll."""
        ...

    async def listen(self, consumer: str, source: str, wake: Callable[[], None]) -> None:
        """Calls `wake` for each wake-up from `source` that arrives for a consumer of the service `consumer`."""
        ...

    async def inspect(self, services: Collection[str]) -> Mapping[str, Sequence[Inspected]]:
        """All known instances of each of `services`, with their stats, within two seconds.

        Only the operator may do this for all services.
        """
        ...

    async def unreachable(self, services: Collection[str]) -> Mapping[str, str]:
        """Those of `services` of which no instance answers within a second, and why, in a few words."""
        ...

    def registry_problem(self) -> str:
        """Why the known instances may be out of date, as a sentence; empty if they are not known to be."""
        ...
