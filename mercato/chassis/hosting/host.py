"""A `Host` (one a process; tests make their own) hosts services.

It makes the `Env`s, builds the services, opens their databases, runs their periodic tasks and consumers, and closes
everything in the opposite order.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final, Literal, Protocol, TypeVar

from mercato.chassis.contract import Contract
from mercato.chassis.messaging.consumers import READ_SECONDS, Consumer
from mercato.chassis.messaging.outbox import NOTE_EVERY_SECONDS, PURGED_AT_ONCE, OutboxLog, event_log
from mercato.chassis.observability.clock import Clock, Randomness, SystemClock, SystemRandomness
from mercato.chassis.observability.telemetry import Telemetry
from mercato.chassis.postgres.database import Database
from mercato.chassis.rpc.circuit_breaker import Breaker, BreakingTransport, OperationClass, State
from mercato.chassis.rpc.client import Clients, Connector, restricted
from mercato.chassis.rpc.limits import CallLimits
from mercato.chassis.rpc.retrying import RetryingTransport
from mercato.chassis.rpc.server import LocalTransport, Server
from mercato.chassis.rpc.stats import CalleeStats
from mercato.chassis.rpc.transports import Remote, Transport
from mercato.chassis.rpc.transports.local import LocalFirst
from mercato.chassis.rpc.transports.loopback import LoopbackTransport

from .keys import key_deriver
from .options import OptionReader
from .periodic import PeriodicTask
from .service import Build, Env, Service

C = TypeVar("C", bound=Contract)

TransportName = Literal["local", "loopback"]

CallerTransport = Callable[[str], Transport]
"""Gives the transport over which a service, by its name, calls services of other processes."""

GATEWAY: Final = "gateway"
"""The name of the gateway as a caller; it is no service."""


class Hosting(Protocol):
    """The part of a `Host` that callers of its services use."""

    @property
    def clock(self) -> Clock: ...

    @property
    def telemetry(self) -> Telemetry: ...

    def client(self, contract: type[C], caller: str = GATEWAY) -> C: ...

    async def problems(self) -> Mapping[str, str]: ...

    def also_run(self, name: str, task: PeriodicTask) -> None: ...


class Host:
    """The services of one process. `builds`, `dsns` and `secrets` are by service name.

    With a `TransportName`, every service is in this process; with a `CallerTransport`, the services that are not in
    `builds` are in other processes. `may_call` gives the full names of the operations that a service calls; None: all.
    `limits` are those of circuit breakers and retries.
    """

    def __init__(
        self,
        builds: Mapping[str, Build],
        dsns: Mapping[str, str],
        *,
        secrets: Mapping[str, bytes],
        transport: TransportName | CallerTransport = "local",
        clock: Clock | None = None,
        randomness: Randomness | None = None,
        telemetry: Telemetry | None = None,
        pool_size: int = 6,
        options: Mapping[str, str] | None = None,
        may_call: Callable[[str], Collection[str]] | None = None,
        limits: CallLimits | None = None,
    ) -> None:
        self.clock = clock or SystemClock()
        self.telemetry = telemetry or Telemetry()
        self.services: dict[str, Service] = {}
        self._limits = limits or CallLimits()
        self._retrying: list[RetryingTransport] = []
        self._servers: dict[str, Server] = {}
        self._reaches_others = callable(transport)
        self._carrier_of = self._split(transport) if callable(transport) else self._shared_carrier(transport)
        self._connector = Connector(self.clock, self.telemetry)
        self._transports: dict[Transport, Transport] = {}
        self._breakers: dict[tuple[str, OperationClass], Breaker] = {}
        self._clients: dict[tuple[str, Transport], Contract] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._further: list[tuple[str, PeriodicTask]] = []
        self._is_open = False
        for name, build in builds.items():
            database = Database(dsns[name], name, self.telemetry, size=pool_size)
            clients = self.clients(name)
            reader = OptionReader(name, options or {})
            env = Env(
                database=database,
                client=clients if may_call is None else restricted(clients, name, may_call(name)),
                clock=self.clock,
                randomness=randomness or SystemRandomness(),
                telemetry=self.telemetry,
                derive_key=key_deriver(secrets[name]),
                options=reader,
            )
            self.services[name] = build(env)
            reader.require_known()
            self._servers[name] = self.services[name].server
            self._servers[name].report_to(self.telemetry)
        self._logs = {n: OutboxLog(n, s.database) for n, s in self.services.items() if s.has_outbox}
        self._servers |= {event_log(name).service: served.server(self.clock) for name, served in self._logs.items()}
        self.consumers = self._consumers()

    def _shared_carrier(self, transport: TransportName) -> CallerTransport:
        carrier: Transport
        if transport == "local":
            carrier = LocalTransport(self._servers)
        else:
            carrier = LoopbackTransport(self._servers, self.clock)
        return lambda _: carrier

    def _split(self, transport: CallerTransport) -> CallerTransport:
        @functools.cache
        def carrier_of(caller: str) -> Transport:
            share = self._limits.retry_share
            retrying = RetryingTransport(transport(caller), self.clock, self.telemetry, random.random, share=share)
            self._retrying.append(retrying)
            return LocalFirst(self._servers, retrying)

        return carrier_of

    @property
    def servers(self) -> Mapping[str, Server]:
        """What this process serves, by the name of the contract: its services, and the event logs of their outboxes."""
        return self._servers

    def client(self, contract: type[C], caller: str = GATEWAY) -> C:
        """The client of a service; the same object for all callers that share a transport, so that calls coalesce."""
        carrier = self._carrier_of(caller)
        key = (contract.service, carrier)
        if key not in self._clients:
            if carrier not in self._transports:
                self._transports[carrier] = BreakingTransport(
                    carrier, self._breaker, slow_seconds=self._limits.slow_seconds
                )
            self._clients[key] = self._connector.client(contract, self._transports[carrier])
        client = self._clients[key]
        assert isinstance(client, contract)
        return client

    def clients(self, caller: str) -> Clients:
        """`client` for one caller."""

        def client(contract: type[C]) -> C:
            return self.client(contract, caller)

        return client

    def _breaker(self, service: str, operations: OperationClass) -> Breaker:
        """The breaker of a service, shared by all callers in this process: each failure counts for all of them."""
        key = (service, operations)
        if key not in self._breakers:
            self._breakers[key] = self._new_breaker(service, operations)
        return self._breakers[key]

    def open_breakers(self) -> Sequence[str]:
        """The services whose reads or writes are not called at the moment, because they have not answered."""
        return sorted({name for (name, _), breaker in self._breakers.items() if breaker.state is not State.CLOSED})

    def callees(self) -> Sequence[CalleeStats]:
        """The services that this process has called, with the states of their breakers and retry budgets."""
        budgets: dict[str, float] = {}
        for retrying in self._retrying:
            for service, budget in retrying.budgets.items():
                budgets[service] = budgets.get(service, 0.0) + budget.left
        return [
            CalleeStats(service, operations, breaker.state, breaker.in_flight, budgets.get(service))
            for (service, operations), breaker in sorted(self._breakers.items())
        ]

    def _new_breaker(self, service: str, operations: OperationClass) -> Breaker:
        labels = {"service": service, "operations": operations.value}
        about = "1 while calls of the reads, or the writes, of a service are refused because it does not answer."
        is_open = self.telemetry.gauge("mercato_breaker_open", about, list(labels), workers="livemax")
        about = "Requests to the reads, or the writes, of a service that have no answer yet."
        in_flight = self.telemetry.gauge("mercato_calls_in_flight", about, list(labels), workers="livesum")
        about = "How often the breaker of the reads, or the writes, of a service has changed, by its new state."
        changes = self.telemetry.counter("mercato_breaker_changes", about, [*labels, "state"])
        gauge = is_open.labels(**labels)

        def show(state: State) -> None:
            gauge.set(0 if state is State.CLOSED else 1)
            changes.labels(**labels, state=state.value).inc()

        return Breaker(
            service,
            clock=self.clock,
            jitter=random.random,
            limits=self._limits,
            on_change=show,
            on_calls=in_flight.labels(**labels).add,
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
        for name, task in self._further:
            self._start(name, task)
        self._tasks.append(asyncio.create_task(self.telemetry.settle_for_ever(), name="metrics"))
        self._is_open = True

    def also_run(self, name: str, task: PeriodicTask) -> None:
        """Adds a periodic task that only some processes run for a service. It begins when the host is open."""
        if self._is_open:
            self._start(name, task)
        else:
            self._further.append((name, task))

    def _start(self, name: str, *tasks: PeriodicTask) -> None:
        for task in tasks:
            running = task.run(name, self.clock, self.telemetry)
            self._tasks.append(asyncio.create_task(running, name=f"{name}: {task.name}"))

    def _consumers(self) -> list[Consumer]:
        """One for each subscription and source that this process can reach.

        A source of this process wakes its consumers here after each commit with events. The clients have no circuit
        breaker: a consumer pauses by itself, and should soon notice that its source is available again.
        """
        consumers: list[Consumer] = []
        for name, service in self.services.items():
            for wanted in service.subscriptions:
                for source in wanted.sources:
                    if source not in self._logs and not self._reaches_others:
                        continue
                    client = self._connector.client(event_log(source), self._carrier_of(name))
                    consumer = Consumer(wanted, source, service.database, client, self.clock, self.telemetry)
                    consumers.append(consumer)
                    if source in self._logs:
                        self.services[source].database.on_events.append(consumer.wake)
        return consumers

    async def problems(self) -> Mapping[str, str]:
        """For each service, why it cannot work, in a few words; empty if it can."""
        problems = await asyncio.gather(*(service.database.problem() for service in self.services.values()))
        return dict(zip(self.services, problems, strict=True))

    def drain(self) -> None:
        """Called before a process ends that others call: it makes operations that wait answer soon."""
        for service in self.services.values():
            if service.drain:
                service.drain()

    async def close(self) -> None:
        """Ends the periodic tasks, lets batches in flight complete, and closes the services."""
        await _cancel(self._tasks)
        await self._connector.close()
        for service in reversed(self.services.values()):
            with contextlib.ExitStack() as closing:
                if service.close:
                    closing.callback(service.close)
                await service.database.close()


CANCEL_AGAIN_SECONDS: Final = 0.2


async def _cancel(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Cancels tasks until they have ended. One cancellation may get lost in a library that a task waits in."""
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=CANCEL_AGAIN_SECONDS)


def consumer_tasks(consumer: Consumer) -> tuple[PeriodicTask, ...]:
    """The two tasks of a consumer. `follow` has its own pause, which a wake-up ends."""
    task = functools.partial(PeriodicTask, round_seconds=READ_SECONDS, on_failure=consumer.note_failed_round)
    source = consumer.key[1]
    return (
        task(f"follow {source}", consumer.follow, 0.0, limit=0),
        task(f"retry {source}", consumer.retry, consumer.pace.idle_s, limit=1),
    )


async def forward_wake_ups(host: Host, remote: Remote) -> None:
    """Sources wake consumers of their logs in other processes over the transport. Called before the host is opened."""
    for name, service in host.services.items():
        if service.has_outbox:
            service.database.on_events.append(functools.partial(remote.wake_consumers, name))
    for consumer in host.consumers:
        source = consumer.key[1]
        if source not in host.services:
            await remote.listen(consumer.key[0].partition(".")[0], source, consumer.wake)
