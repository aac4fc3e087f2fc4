"""A `Host` (one a process; tests make their own) hosts services.

It makes the `Env`s, builds the services, opens their databases, runs their periodic tasks and consumers, and closes
everything in the opposite order.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import hmac
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final, Literal, TypeVar

from mercato.chassis.contract import Contract
from mercato.chassis.messaging.consumers import READ_SECONDS, Consumer
from mercato.chassis.messaging.outbox import NOTE_EVERY_SECONDS, PURGED_AT_ONCE, OutboxLog, event_log
from mercato.chassis.observability.clock import Clock, Randomness, SystemClock, SystemRandomness
from mercato.chassis.observability.telemetry import Telemetry
from mercato.chassis.postgres.database import Database
from mercato.chassis.rpc.circuit_breaker import Breaker, BreakingTransport, State
from mercato.chassis.rpc.client import Connector, restricted
from mercato.chassis.rpc.server import Server
from mercato.chassis.rpc.transports import Transport
from mercato.chassis.rpc.transports.local import LocalTransport
from mercato.chassis.rpc.transports.loopback import LoopbackTransport

from .options import option_reader
from .periodic import FIRST_RETRY_SECONDS, PeriodicTask
from .service import Build, Env, Service

C = TypeVar("C", bound=Contract)

TransportName = Literal["local", "loopback"]


BREAKER_OPEN_SECONDS: Final = 1.0
"""A database that restarts is back within a second or so; a shop should not refuse orders for longer than it must."""


BREAKER_LONGEST_OPEN_SECONDS: Final = 30.0


def key_deriver(secret: bytes) -> Callable[[str], bytes]:
    """Keys for many purposes out of one secret (HMAC-SHA256 of the purpose; RFC 5869 calls this step expand)."""
    return lambda purpose: hmac.digest(secret, f"mercato/{purpose}".encode(), hashlib.sha256)


class Host:
    """The services of one process. `builds` and `dsns` are by service name.

    `may_call` gives the full names of the operations that a service calls; None: all.
    """

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
        may_call: Callable[[str], Collection[str]] | None = None,
    ) -> None:
        self.clock = clock or SystemClock()
        self.telemetry = telemetry or Telemetry()
        self.services: dict[str, Service] = {}
        self._servers: dict[str, Server] = {}
        self._reaches_others = not isinstance(transport, str)
        self._carrier: Transport = self._carrier_of(transport) if isinstance(transport, str) else transport
        self._transport = BreakingTransport(self._carrier, self._breaker)
        self._connector = Connector(self.clock, self.telemetry)
        self._clients: dict[str, Contract] = {}
        self._tasks: list[asyncio.Task[None]] = []
        for name, build in builds.items():
            database = Database(dsns[name], name, self.telemetry, size=pool_size)
            env = Env(
                database=database,
                client=self.client if may_call is None else restricted(self.client, name, may_call(name)),
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
        """The breaker in front of a service: all callers in this process learn from each other's failures."""
        about = "1 while calls to a service are refused because it does not answer."
        gauge = self.telemetry.gauge("mercato_breaker_open", about, ["service"], workers="livemax").labels(service)

        def show(state: State) -> None:
            gauge.set(0 if state is State.CLOSED else 1)

        return Breaker(
            service,
            clock=self.clock,
            jitter=random.random,
            open_seconds=BREAKER_OPEN_SECONDS,
            longest_open_seconds=BREAKER_LONGEST_OPEN_SECONDS,
            on_change=show,
        )

    async def open(self) -> None:
        """Opens all databases, then starts the periodic tasks. Raises `Unavailable`, and leaves nothing open."""
        try:
            for service in self.services.values():
                await service.database.open()
        except BaseException:
            await self.close()
            raise
        for name, service in self.services.items():
            self._start(name, *service.tasks)
        for name, served in self._logs.items():
            self._start(name, PeriodicTask("outbox", served.maintain, NOTE_EVERY_SECONDS, limit=PURGED_AT_ONCE))
        for consumer in self.consumers:
            self._start(consumer.key[0], *consumer_tasks(consumer))

    def _start(self, name: str, *tasks: PeriodicTask) -> None:
        for task in tasks:
            running = task.run(name, self.clock, self.telemetry)
            self._tasks.append(asyncio.create_task(running, name=f"{name}: {task.name}"))

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
        """Ends the periodic tasks, lets batches land, closes what the services hold."""
        await _cancel(self._tasks)
        await self._connector.close()
        for service in reversed(self.services.values()):
            with contextlib.ExitStack() as held:
                if service.close:
                    held.callback(service.close)
                await service.database.close()


CANCEL_AGAIN_SECONDS: Final = 0.2


async def _cancel(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Cancels tasks until they have ended. One cancellation may get lost in a library that a task waits in."""
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=CANCEL_AGAIN_SECONDS)


def consumer_tasks(consumer: Consumer, first_retry_seconds: float = FIRST_RETRY_SECONDS) -> tuple[PeriodicTask, ...]:
    """The two tasks of a consumer. `follow` pauses by itself, for a wake-up ends its pause."""
    task = functools.partial(
        PeriodicTask,
        round_seconds=READ_SECONDS,
        first_retry_seconds=first_retry_seconds,
        on_failure=consumer.note_failed_round,
    )
    source = consumer.key[1]
    return (
        task(f"follow {source}", consumer.follow, 0.0, limit=0),
        task(f"retry {source}", consumer.retry, consumer.pace.idle_s, limit=1),
    )
