"""How a batch reaches a service, and how a process is connected with those that serve the others."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

from mercato.chassis.contract import Context, Operation
from mercato.chassis.rpc.batching import Outcome
from mercato.chassis.rpc.server import Server
from mercato.chassis.rpc.stats import Inspected


class Transport(Protocol):
    """How a batch reaches a service.

    `send` takes the requests of one operation and their contexts, and answers with as many outcomes, in the same
    order. It raises `ServiceError` when the batch as a whole did not reach a service: then no request was started, or
    it is not known whether it was.
    """

    async def send(
        self, operation: Operation[Any, Any], requests: Sequence[Any], contexts: Sequence[Context]
    ) -> Sequence[Outcome]: ...


class Remote(Protocol):
    """The connection of a process with other processes: it calls their services, and they call its own.

    `open` before the first call, `serve` once the services are open, `drain` before they close, `close` at the end.
    """

    def transport(self, caller: str) -> Transport:
        """On which a service of this process, or the gateway, calls those of others. Always the same for one caller."""
        ...

    async def open(self) -> None:
        """Raises `Unavailable` where what the processes meet at is not there."""
        ...

    async def serve(self, servers: Mapping[str, Server]) -> None:
        """From now on other processes reach `servers`, by the name of their contract."""
        ...

    async def drain(self) -> None:
        """Takes no more batches, and has answered those that it took when it returns: within a few seconds."""
        ...

    async def close(self) -> None: ...

    def announce(self, source: str) -> None:
        """Tells consumers elsewhere that the event log of a service has something new. It may get lost: they poll."""
        ...

    async def listen(self, consumer: str, source: str, wake: Callable[[], None]) -> None:
        """Calls `wake` when `source` has something new for a consumer of the service `consumer`, if that is heard."""
        ...

    async def inspect(self, services: Collection[str]) -> Mapping[str, Sequence[Inspected]]:
        """All instances of each of `services` that are known, and what they say, within two seconds.

        Only the operator may ask this of all services.
        """
        ...

    async def unreachable(self, services: Collection[str]) -> Mapping[str, str]:
        """Those of `services` of which no instance answers within a second, and why, in a few words."""
        ...

    def registry_problem(self) -> str:
        """Why the instances known now may not be those that there are, as a sentence; empty where nothing says so."""
        ...
