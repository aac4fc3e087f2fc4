"""A process whose services call those of other processes over NATS."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final

import msgspec
import structlog
from nats.aio.msg import Msg

from mercato.chassis.observability.clock import Clock
from mercato.chassis.rpc.server import Server
from mercato.chassis.rpc.stats import CalleeStats, Inspected, InstanceStats, OperationStats, Stats
from mercato.chassis.rpc.trust import TokenSigner, Trust

from .client import NatsTransport
from .connection import NatsConnection, NotConnected
from .instances import FoundInstance, instances
from .server import NatsServer
from .wire import MICRO, micro_name, wake_subject

ANSWER_SECONDS: Final = 1.0
WAKE_PAUSE_SECONDS: Final = 0.1
"""Commits within this time cause one wake-up. A consumer gathers events for longer than that (`Pace.gather_s`)."""

log = structlog.stdlib.get_logger("mercato.rpc.nats")


class NatsRemote:
    """See `Remote`. Each caller of this process has its own user of NATS, and so its own connection.

    `connections` and `signers` are by the name of the caller; `trust_of` makes the `Trust` of the services served.
    A service, its event log included, is served on its own connection. `metadata` is shown with the instances.
    """

    def __init__(
        self,
        connections: Mapping[str, NatsConnection],
        signers: Mapping[str, TokenSigner],
        trust_of: Callable[[Collection[str]], Trust],
        clock: Clock,
        stats: Stats,
        *,
        metadata: Mapping[str, str],
    ) -> None:
        self._connections = connections
        self._trust_of = trust_of
        self._clock = clock
        self._stats = stats
        self._metadata = metadata
        self._transports = {
            caller: NatsTransport(connection, signers[caller], clock, version=stats.version)
            for caller, connection in connections.items()
        }
        self._servers: list[NatsServer] = []
        self._wake_ups: dict[str, asyncio.Event] = {}
        self._waking: list[asyncio.Task[None]] = []

    def transport(self, caller: str) -> NatsTransport:
        return self._transports[caller]

    def connection(self, caller: str) -> NatsConnection:
        """The connection of one caller of this process, for messages that are no calls."""
        return self._connections[caller]

    async def open(self) -> None:
        await asyncio.gather(*(connection.open() for connection in self._connections.values()))
        for transport in self._transports.values():
            await transport.open()

    async def serve(self, servers: Mapping[str, Server]) -> None:
        trust = self._trust_of(servers.keys())
        for caller, connection in self._connections.items():
            own = {name: server for name, server in servers.items() if name.partition(".")[0] == caller}
            if own:
                server = NatsServer(
                    connection,
                    own,
                    trust,
                    self._clock,
                    version=self._stats.version,
                    name=self._stats.instance,
                    metadata=self._metadata,
                    stats=self._stats,
                )
                await server.open()
                self._servers.append(server)

    async def drain(self) -> None:
        await asyncio.gather(*(server.close() for server in self._servers))

    async def close(self) -> None:
        for task in self._waking:
            task.cancel()
        if self._waking:
            await asyncio.wait(self._waking)
        await asyncio.gather(*(connection.close() for connection in self._connections.values()))

    async def inspect(self, services: Collection[str]) -> Mapping[str, Sequence[Inspected]]:
        found = await instances(next(iter(self._connections.values())))
        by_service: dict[str, list[Inspected]] = {service: [] for service in services}
        for instance in found:
            service = instance.metadata.get("service", "")
            if service in by_service:
                by_service[service].append(Inspected(instance.id, _stats_of(service, instance)))
        return by_service

    async def unreachable(self, services: Collection[str]) -> Mapping[str, str]:
        connection = next(iter(self._connections.values()))
        reasons = await asyncio.gather(*(_reason(connection, service) for service in services))
        return {service: reason for service, reason in zip(services, reasons, strict=True) if reason}

    def registry_problem(self) -> str:
        """Empty: if the NATS server does not answer, calls fail as well."""
        return ""

    # ------------------------------------------------------------------------------------------------ event logs

    def wake_consumers(self, source: str) -> None:
        if source not in self._wake_ups:
            self._wake_ups[source] = asyncio.Event()
            self._waking.append(
                asyncio.create_task(self._wake_consumers(source), name=f"wake_consumers events of {source}")
            )
        self._wake_ups[source].set()

    async def _wake_consumers(self, source: str) -> None:
        event, connection = self._wake_ups[source], self._connections[source]
        while True:
            await event.wait()
            event.clear()
            try:
                await connection.publish(wake_subject(source), b"")
            except NotConnected:
                continue  # consumers also poll
            await asyncio.sleep(WAKE_PAUSE_SECONDS)

    async def listen(self, consumer: str, source: str, wake: Callable[[], None]) -> None:
        async def woken(_: Msg) -> None:
            wake()

        await self._connections[consumer].subscribe(wake_subject(source), woken)


def _stats_of(service: str, found: FoundInstance) -> InstanceStats:
    operations = {
        endpoint.name: OperationStats(
            batches=endpoint.num_requests,
            errors=endpoint.num_errors or 0,
            requests=int(endpoint.data.get("requests", 0)),
            seconds=endpoint.num_requests * (endpoint.average_processing_time_s or 0.0),
            p99_ms=float(endpoint.data.get("p99_ms", 0.0)),
        )
        for endpoint in found.endpoints
        if endpoint.num_requests
    }
    now = datetime.datetime.now(datetime.UTC)
    breakers = {name for endpoint in found.endpoints for name in endpoint.data.get("open_breakers", ())}
    callees = [said for endpoint in found.endpoints for said in endpoint.data.get("callees", ())]
    pid = found.metadata.get("pid", "")
    return InstanceStats(
        service=service,
        id=found.id,
        version=found.version,
        pid=int(pid) if pid.isdigit() else 0,
        up_seconds=(now - found.started).total_seconds() if found.started else 0.0,
        open_breakers=tuple(sorted(breakers)),
        operations=operations,
        callees=tuple(msgspec.convert(said, CalleeStats) for said in callees),
    )


async def _reason(connection: NatsConnection, service: str) -> str:
    """Why no instance of a service accepts calls; empty if one answers."""
    answered = asyncio.Event()

    async def note(message: Msg) -> None:
        if message.data:  # empty: NATS reports that there are no responders
            answered.set()

    try:
        inbox = await connection.subscribe_inbox(note)
        try:
            await connection.publish(f"{MICRO}.PING.{micro_name(service)}", b"", reply=f"{inbox.subject}.ping")
            async with asyncio.timeout(ANSWER_SECONDS):
                await answered.wait()
        finally:
            await connection.unsubscribe(inbox)
    except NotConnected:
        return f"there is no connection to NATS at {connection.address}"
    except TimeoutError:
        return "no instance answers within a second"
    return ""
