"""Services without HTTP, for their tests: on fresh databases, over one of the transports.

The tests of a service have a subclass in the `harness.py` of their folder. It opens the services, and adds the requests
and readers that only these tests need.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncGenerator, Collection, Generator, Mapping
from typing import Any, ClassVar, Final, NamedTuple, Self, TypeVar

from mercato import topology
from mercato.chassis.contract import Actor, Contract, current
from mercato.chassis.hosting.host import Host
from mercato.chassis.hosting.keys import service_secrets
from mercato.chassis.hosting.service import Build
from mercato.chassis.messaging.events import declared_only
from mercato.chassis.postgres.database import Database
from mercato.chassis.rpc.batching import BatchedCall
from mercato.chassis.rpc.client import acting

from .cluster import Cluster
from .split_hosts import TEST, SplitHosts
from .tables import EVENTS, TableReader, connect
from .transports import AnyTransport
from .waiting import until_blocked

C = TypeVar("C", bound=Contract)

TEST_SECRET: Final = b"a secret that may be public"
TEST_CALL_SECONDS: Final = 120.0
NO_BUILDS: Final[Mapping[str, Build]] = {}


def patient(call: BatchedCall) -> None:
    call._deadline_s = math.inf  # pyright: ignore[reportPrivateUsage]


class EmittedEvent(NamedTuple):
    type: str
    subject: str
    subject_id: int
    version: int


class ServiceHarness:
    """Services on one host. `open` once and `close` at the end, or `running` for both."""

    service: ClassVar[str] = ""
    """The service under test. `rows`, `values` and the like read its database, unless they name another."""

    defaults: ClassVar[Mapping[str, object]] = {}
    """Options as `configure` takes them, for tests that set no others."""
    rules: ClassVar[Mapping[str, str]] = {}
    """Invariants by name: queries that find the rows which violate them. See `rules.py`."""
    actor: ClassVar[Actor | None] = None
    """The actor of calls while it is `running`, unless a test is `acting` as another."""

    def __init__(self, cluster: Cluster, transport: AnyTransport, options: Mapping[str, str] | None = None) -> None:
        self.cluster = cluster
        self.transport: AnyTransport = transport
        self.options: dict[str, str] = {}
        """By the names of their environment variables: `MERCATO_INVENTORY_HOLD_SECONDS`. Read by `open`."""
        self.configure(**self.defaults)
        self.options.update(options or {})
        self.dsns: dict[str, str] = {}
        self.host: Host | SplitHosts
        self._builds: dict[str, Build] = {}
        self.closing = contextlib.AsyncExitStack()
        """Closes what a test opens besides."""
        self._readers: dict[str, TableReader] = {}

    # ----------------------------------------------------------------------------------------------- opening, closing

    def configure(self, **options: object) -> None:
        """Sets options before `open`: `inventory_hold_seconds=1` is `MERCATO_INVENTORY_HOLD_SECONDS`."""
        self.options.update({f"MERCATO_{name.upper()}": str(value) for name, value in options.items()})

    async def open(self, builds: Mapping[str, Build], stubs: Mapping[str, Build] = NO_BUILDS) -> Self:
        """Hosts services by their names, each on a fresh database unless `dsns` has one.

        `stubs` are hosted too. They have no tables, and share a database of the others.
        """
        for name in builds:
            if name not in self.dsns:
                self.dsns[name] = await self.cluster.fresh_database(name, topology.migrations(name))
        self._builds = {**stubs, **builds}
        self.host = self._host(self._builds, self.dsns)
        await self.host.open()
        return self

    async def close(self) -> None:
        await self.close_others()
        if hasattr(self, "host"):
            await self.host.close()
        for dsn in self.dsns.values():
            await self.cluster.release_database(dsn)

    async def close_others(self) -> None:
        """Closes the hosts and connections that the test has opened besides."""
        self._readers.clear()
        await self.closing.aclose()

    @contextlib.asynccontextmanager
    async def running(self, **options: object) -> AsyncGenerator[Self]:
        """Started for the time of a block, with options as `configure` takes them. Asserts `rules` at its end."""
        self.configure(**options)
        try:
            await self.start()
            with self.acting(self.actor) if self.actor else contextlib.nullcontext():
                yield self
            await self.close_others()
            assert await self.violations() == {}
        finally:
            await self.close()

    async def start(self) -> None:
        """Opens what the tests of a service need. Here nothing: each test opens its own services."""

    async def violations(self) -> dict[str, int]:
        """How many rows violate each of `rules`; only the violated ones."""
        found = {name: len(await self.rows(sql)) for name, sql in self.rules.items()}
        return {name: count for name, count in found.items() if count}

    async def another_host(
        self, builds: Mapping[str, Build] = NO_BUILDS, *, dsns: Mapping[str, str] | None = None
    ) -> Host | SplitHosts:
        """The same services on the same databases, as another process hosts them; it is closed with this harness.

        `builds` and `dsns` replace those of `open`, or add to them.
        """
        host = self._host({**self._builds, **builds}, {**self.dsns, **(dsns or {})})
        await host.open()
        self.closing.push_async_callback(host.close)
        return host

    def _host(self, builds: Mapping[str, Build], dsns: Mapping[str, str]) -> Host | SplitHosts:
        shared = next(iter(dsns.values()))
        dsns = {name: dsns.get(name, shared) for name in builds}
        secrets = service_secrets(TEST_SECRET, {*builds, *topology.CALLERS, TEST})
        host: Host | SplitHosts
        if self.transport in ("http", "nats", "grpc"):
            host = SplitHosts(builds, dsns, secrets=secrets, options=self.options, transport=self.transport)
        else:
            host = Host(
                builds,
                dsns,
                secrets=secrets,
                transport="loopback" if self.transport == "loopback" else "local",
                options=self.options,
                may_call=topology.may_call,
            )
        for service in host.services.values():
            service.database.pack = declared_only(service.server.contract)
        return host

    # ---------------------------------------------------------------------------------------------------------- calls

    def client(self, contract: type[C]) -> C:
        """Its calls have as long as `acting` says, whatever the contract does: on a busy machine all takes longer.

        In one process, services that call this one have the same client, and as long.
        """
        made = self.host.client(contract)
        for operation in contract.operations.values():
            patient(getattr(made, operation.name))
        return made

    @contextlib.contextmanager
    def acting(self, actor: Actor, seconds: float = TEST_CALL_SECONDS) -> Generator[None]:
        """Calls in this block come from `actor` and have so many seconds."""
        token = current.set(acting(actor, clock=self.host.clock, seconds=seconds, trace_id="0" * 32, request_id="test"))
        try:
            yield
        finally:
            current.reset(token)

    @property
    def repeats(self) -> bool:
        """Whether everything repeatable is delivered twice."""
        return self.transport == "loopback"

    def deliveries(self, calls: int = 1) -> int:
        """How often so many calls of a repeatable operation arrive: `loopback` delivers each twice."""
        return calls * (2 if self.repeats else 1)

    # --------------------------------------------------------------------------------------------------------- tables

    @property
    def dsn(self) -> str:
        """The DSN of the database of the service under test."""
        return self.dsns[self.service]

    @property
    def database(self) -> Database:
        """The `Database` of the service under test."""
        return self.host.services[self.service].database

    async def connection(self, of: str | None = None) -> Any:
        """A connection of the driver to a service's database, for tests that hold locks; closed with this harness."""
        connection = await connect(self.dsns[of or self.service])
        self.closing.push_async_callback(connection.close)
        return connection

    async def rows(self, sql: str, *values: object, of: str | None = None) -> list[tuple[Any, ...]]:
        """The rows of one statement in a service's database, which commits by itself."""
        name = of or self.service
        if name not in self._readers:
            self._readers[name] = TableReader(self.dsns[name])
            self.closing.push_async_callback(self._readers[name].close)
        return await self._readers[name].rows(sql, *values)

    async def values(self, sql: str, *values: object, of: str | None = None) -> list[Any]:
        """The first column of these rows."""
        return [row[0] for row in await self.rows(sql, *values, of=of)]

    async def count(self, table: str, of: str | None = None) -> int:
        return (await self.values(f"SELECT count(*) FROM {table}", of=of))[0]

    async def events(self, of: str | None = None) -> list[EmittedEvent]:
        """The events in a service's outbox, in order."""
        found = await self.rows(f"SELECT type, subject, subject_id, version FROM {EVENTS} ORDER BY id", of=of)
        return [EmittedEvent(*row) for row in found]

    async def until_blocked(
        self, statements: int = 1, of: str | None = None, by: Collection[asyncio.Future[Any]] = ()
    ) -> None:
        """As `waiting.until_blocked`, in the database of a service."""
        await until_blocked(self.dsns[of or self.service], statements, by)
