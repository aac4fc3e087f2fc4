"""A `Host` (one a process; tests make their own) hosts services.

It makes the `Env`s, builds the services, opens their databases, runs their loops, and closes everything in the
opposite order.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final, Literal, TypeVar

import structlog

from mercato.chassis.contract import Contract
from mercato.chassis.messaging.consumers import INFRASTRUCTURE, Consumer
from mercato.chassis.messaging.outbox import OutboxLog, event_log
from mercato.chassis.observability.clock import Clock, Randomness, SystemClock, SystemRandomness
from mercato.chassis.observability.telemetry import Telemetry
from mercato.chassis.postgres.database import Database
from mercato.chassis.rpc.circuit_breaker import Breaker, BreakingTransport, State
from mercato.chassis.rpc.client import Connector
from mercato.chassis.rpc.server import Server
from mercato.chassis.rpc.transports import Transport
from mercato.chassis.rpc.transports.local import LocalTransport
from mercato.chassis.rpc.transports.loopback import LoopbackTransport

from .options import option_reader
from .service import Build, Env, Service

C = TypeVar("C", bound=Contract)

TransportName = Literal["local", "loopback"]


log = structlog.stdlib.get_logger("mercato.service")


BREAKER_OPEN_SECONDS: Final = 1.0
"""A database that restarts is back within a second or so; a shop should not refuse orders for longer than it must."""


BREAKER_LONGEST_OPEN_SECONDS: Final = 30.0


def key_deriver(secret: bytes) -> Callable[[str], bytes]:
    """Keys for many purposes out of one secret (HMAC-SHA256 of the purpose; RFC 5869 calls this step expand)."""
    return lambda purpose: hmac.digest(secret, f"mercato/{purpose}".encode(), hashlib.sha256)


class Host:
    """The services of one process. `builds` and `dsns` are by service name."""

    def __init__(
        self,
        builds: Mapping[str, Build],
        dsns: Mapping[str, str],
        *,
        secret: bytes,
        transport: TransportName | Transport = "local",
        clock: Clock | None = None,
        randomness: Randomness | None = None,
        telemetry: Telemetry | None = None,
        pool_size: int = 6,
        options: Mapping[str, str] | None = None,
    ) -> None:
        self.clock = clock or SystemClock()
        self.telemetry = telemetry or Telemetry()
        self.services: dict[str, Service] = {}
        self._servers: dict[str, Server] = {}
        self._breakers: dict[str, Breaker] = {}
        self._reaches_others = not isinstance(transport, str)
        self._carrier: Transport = self._carrier_of(transport) if isinstance(transport, str) else transport
        self._transport = BreakingTransport(self._carrier, self._breaker)
        self._connector = Connector(self.clock, self.telemetry)
        self._clients: dict[str, Contract] = {}
        self._loops: list[asyncio.Task[None]] = []
        for name, build in builds.items():
            database = Database(dsns[name], name, self.telemetry, size=pool_size)
            env = Env(
                database=database,
                client=self.client,
                clock=self.clock,
                randomness=randomness or SystemRandomness(),
                telemetry=self.telemetry,
                derive_key=key_deriver(secret),
                options=option_reader(name, options or {}),
            )
            self.services[name] = build(env)
            self._servers[name] = self.services[name].server
        self._logs = {n: OutboxLog(n, s.database) for n, s in self.services.items() if s.has_outbox}
        self._servers |= {event_log(name).service: served.server(self.clock) for name, served in self._logs.items()}
        self.consumers = self._consumers()

    def _carrier_of(self, transport: TransportName) -> Transport:
        if transport == "local":
            return LocalTransport(self._servers)
        return LoopbackTransport(self._servers, self.clock)

    @property
    def servers(self) -> Mapping[str, Server]:
        """What this process serves, by the name of the contract: its services, and the event logs of their outboxes."""
        return self._servers

    def client(self, contract: type[C]) -> C:
        """The client of a service; the same object for everybody in this process, so that all their calls coalesce."""
        if contract.service not in self._clients:
            self._clients[contract.service] = self._connector.client(contract, self._transport)
        client = self._clients[contract.service]
        assert isinstance(client, contract)
        return client

    def _breaker(self, service: str) -> Breaker:
        """The breaker in front of a service: everybody in this process learns from everybody's failures."""
        breaker = self._breakers.get(service)
        if breaker is None:
            gauge = self.telemetry.breaker_open.labels(service)

            def show(state: State) -> None:
                gauge.set(0 if state is State.CLOSED else 1)

            breaker = self._breakers[service] = Breaker(
                service,
                clock=self.clock,
                jitter=random.random,
                open_seconds=BREAKER_OPEN_SECONDS,
                longest_open_seconds=BREAKER_LONGEST_OPEN_SECONDS,
                on_change=show,
            )
        return breaker

    async def open(self) -> None:
        """Opens all databases, then starts the loops and consumers. Raises `Unavailable`, and leaves nothing open."""
        try:
            for service in self.services.values():
                await service.database.open()
        except BaseException:
            await self.close()
            raise
        for name, service in self.services.items():
            self._loops += [asyncio.create_task(_forever(name, loop)) for loop in service.loops]
        for name, served in self._logs.items():
            self._loops.append(asyncio.create_task(_forever(name, served.run)))
        self._loops += [asyncio.create_task(consumer.run()) for consumer in self.consumers]

    def _consumers(self) -> list[Consumer]:
        """One for each subscription and source that this process can reach.

        A source of this process wakes its consumers here after each commit with events. The clients have no circuit
        breaker: a consumer pauses by itself, and should notice soon that its source is back.
        """
        consumers: list[Consumer] = []
        for service in self.services.values():
            for wanted in service.subscriptions:
                for source in wanted.sources:
                    if source not in self._logs and not self._reaches_others:
                        continue
                    client = self._connector.client(event_log(source), self._carrier)
                    consumer = Consumer(wanted, source, service.database, client, self.clock, self.telemetry)
                    consumers.append(consumer)
                    if source in self._logs:
                        self.services[source].database.on_events.append(consumer.wake)
        return consumers

    async def ready(self) -> Mapping[str, bool]:
        """For each service, whether its database answers."""
        answers = await asyncio.gather(*(service.database.answers() for service in self.services.values()))
        return dict(zip(self.services, answers, strict=True))

    async def close(self) -> None:
        """Ends the loops, lets batches land, closes what the services hold."""
        await _cancel(self._loops)
        await self._connector.close()
        for service in reversed(self.services.values()):
            with contextlib.ExitStack() as held:
                if service.close:
                    held.callback(service.close)
                await service.database.close()


LOOP_PAUSE_SECONDS: Final = 1.0
CANCEL_AGAIN_SECONDS: Final = 0.2


async def _cancel(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Cancels tasks until they have ended. One cancellation may get lost in a library that a task waits in."""
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=CANCEL_AGAIN_SECONDS)


async def _forever(name: str, loop: Callable[[], Awaitable[None]]) -> None:
    """Runs a loop of a service; one that fails is logged and starts again after a pause."""
    while True:
        try:
            await loop()
        except INFRASTRUCTURE as error:  # the database, or who was asked, is away: no trace tells more than that
            log.warning("loop_waits", service=name, reason=str(error) or type(error).__name__)
        except Exception:  # an edge: a background loop must not end because one round failed
            log.exception("loop_failed", service=name)
        await asyncio.sleep(LOOP_PAUSE_SECONDS)
