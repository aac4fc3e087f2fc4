"""A split shop within one process: a host for each service, and real sockets between them.

For the tests that run over every transport. `process.py` has real processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from mercato import __version__, topology
from mercato.chassis.contract import Contract, Operation
from mercato.chassis.hosting.host import GATEWAY, Host, forward_wake_ups
from mercato.chassis.hosting.keys import nats_password, signing_seed
from mercato.chassis.hosting.periodic import PeriodicTask
from mercato.chassis.hosting.service import Build, Service
from mercato.chassis.http import bind
from mercato.chassis.messaging.consumers import Consumer
from mercato.chassis.observability.clock import Clock, SystemClock
from mercato.chassis.observability.telemetry import Telemetry
from mercato.chassis.rpc.discovery import Instance
from mercato.chassis.rpc.discovery.static import StaticRegistry
from mercato.chassis.rpc.server import Server
from mercato.chassis.rpc.signatures import public_key
from mercato.chassis.rpc.stats import Stats
from mercato.chassis.rpc.transports import Remote
from mercato.chassis.rpc.transports.http.remote import HttpRemote
from mercato.chassis.rpc.transports.nats import NatsConnection, NatsRemote, permissions
from mercato.chassis.rpc.trust import Grant, TokenSigner, Trust
from mercato.embedded_nats import EmbeddedNats, NatsUser

C = TypeVar("C", bound=Contract)

HOST: Final = "127.0.0.1"
TEST: Final = "test"
"""The caller of tests: it may call every operation, for any actor."""


class SplitHosts:
    """The interface of a `Host` that tests need, over a host for each service. `secrets` are those of all callers."""

    def __init__(
        self,
        builds: Mapping[str, Build],
        dsns: Mapping[str, str],
        *,
        secrets: Mapping[str, bytes],
        options: Mapping[str, str],
        transport: Literal["http", "nats", "grpc"],
    ) -> None:
        self.clock: Clock = SystemClock()
        self.telemetry = Telemetry()
        self._secrets = secrets
        self._listeners: dict[str, socket.socket] = {}
        self._transport = transport
        self._nats_port = 0
        self._closing = contextlib.AsyncExitStack()
        if transport == "nats":
            self._nats_port = free_port()
        elif transport == "http":
            self._listeners = {name: bind(HOST, 0) for name in builds}
        self._registered = RegisteredInstances()
        self._registry = StaticRegistry(
            {
                contract: [Instance(contract, f"{HOST}:{listener.getsockname()[1]}", name)]
                for name, listener in self._listeners.items()
                for contract in (name, f"{name}.log")
            }
        )
        self._remotes = {name: self._remote(name) for name in (*builds, GATEWAY, TEST)}
        self._hosts = {
            name: Host(
                {name: builds[name]} if name in builds else {},
                {name: dsns[name]} if name in builds else {},
                secrets=secrets,
                transport=remote.transport,
                clock=self.clock,
                telemetry=self.telemetry,
                options=options,
                may_call=topology.may_call,
            )
            for name, remote in self._remotes.items()
        }

    def _remote(self, name: str) -> Remote:
        callers = (*topology.CALLERS, TEST)
        grants = {**topology.grants(), TEST: Grant(frozenset(o.full_name for o in every_operation()), None)}
        keys = {caller: public_key(signing_seed(self._secrets[caller])) for caller in callers}

        def trust_of(services: Collection[str]) -> Trust:
            return Trust(list(services), keys, grants, self.clock, self.telemetry)

        signers = {name: TokenSigner(name, signing_seed(self._secrets[name]), self.clock)}
        stats = Stats(name, __version__)
        if self._transport == "grpc":
            return self._over_grpc(name, signers, trust_of, stats)
        if self._transport == "http":
            listener = self._listeners.get(name)
            return HttpRemote(self._registry, signers, trust_of, self.clock, stats, listener=listener)
        password = nats_password(self._secrets[name])
        connection = NatsConnection(f"nats://{HOST}:{self._nats_port}", name, password, name)
        return NatsRemote({name: connection}, signers, trust_of, self.clock, stats, metadata={})

    def _over_grpc(
        self, name: str, signers: Mapping[str, TokenSigner], trust_of: Callable[[Collection[str]], Trust], stats: Stats
    ) -> Remote:
        """gRPC binds its own sockets: an instance has an address when it serves, and registers itself then."""
        from mercato.chassis.rpc.transports.grpc.remote import GrpcRemote

        known, serves = self._registered, name in topology.SERVICES
        return GrpcRemote(
            known, signers, trust_of, self.clock, stats, registrar=known, listen_at=(HOST, 0) if serves else None
        )

    async def _start_nats(self) -> None:
        folder = Path(self._closing.enter_context(tempfile.TemporaryDirectory(prefix="mercato-test-")))
        allowed = {caller: topology.nats_permissions(caller) for caller in topology.CALLERS}
        allowed[TEST] = permissions(TEST, calls=every_operation())
        users = [NatsUser(n, nats_password(self._secrets[n]), a.publish, a.subscribe) for n, a in allowed.items()]
        server = await EmbeddedNats.start(folder, users=users, port=self._nats_port)
        self._closing.push_async_callback(server.stop)

    @property
    def services(self) -> Mapping[str, Service]:
        return {name: service for host in self._hosts.values() for name, service in host.services.items()}

    @property
    def servers(self) -> Mapping[str, Server]:
        return {name: server for host in self._hosts.values() for name, server in host.servers.items()}

    @property
    def consumers(self) -> Sequence[Consumer]:
        return [consumer for host in self._hosts.values() for consumer in host.consumers]

    def client(self, contract: type[C], caller: str = TEST) -> C:
        return self._hosts[caller].client(contract, caller)

    def also_run(self, name: str, task: PeriodicTask) -> None:
        self._hosts[name].also_run(name, task)

    async def problems(self) -> Mapping[str, str]:
        found = await asyncio.gather(*(host.problems() for host in self._hosts.values()))
        return {name: problem for problems in found for name, problem in problems.items()}

    async def open(self) -> None:
        if self._nats_port:
            await self._start_nats()
        for name, host in self._hosts.items():
            await self._remotes[name].open()
            await forward_wake_ups(host, self._remotes[name])
            await host.open()
            await self._remotes[name].serve(host.servers)

    def drain(self) -> None:
        """As before processes end."""
        for host in self._hosts.values():
            host.drain()

    async def close(self) -> None:
        """Closes as a process ends: each host completes its batches before its connections close."""
        await asyncio.gather(*(host.close() for host in self._hosts.values()))
        await asyncio.gather(*(remote.close() for remote in self._remotes.values()))
        await self._closing.aclose()
        for listener in self._listeners.values():
            listener.close()


class RegisteredInstances:
    """A registry within the process: see `Registry` and `Registrar`."""

    def __init__(self) -> None:
        self._instances: list[Instance] = []
        self._watching: list[Callable[[str], None]] = []

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    def instances(self, service: str) -> Sequence[Instance]:
        return [instance for instance in self._instances if instance.service == service]

    def watch(self, changed: Callable[[str], None]) -> Callable[[], None]:
        self._watching.append(changed)
        return lambda: self._watching.remove(changed)

    def problem(self) -> str:
        return ""

    async def register(self, instance: Instance) -> None:
        self._instances.append(instance)
        self._notify(instance)

    async def deregister(self, instance: Instance) -> None:
        if instance in self._instances:
            self._instances.remove(instance)
            self._notify(instance)

    def _notify(self, instance: Instance) -> None:
        for changed in tuple(self._watching):
            changed(instance.service)


def every_operation() -> Sequence[Operation[Any, Any]]:
    return [operation for contract in topology.SERVICES.values() for operation in contract.operations.values()]


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]
