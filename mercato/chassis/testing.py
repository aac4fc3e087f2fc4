"""What tests of services stand on: a real PostgreSQL, fresh databases, and a host without HTTP.

A `Cluster` is one embedded PostgreSQL for a whole run of tests. It migrates a template of each service's database
once; a fresh database is a copy of it (tens of milliseconds). A `Rig` is one process worth of services on such
databases, over one of the transports.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, Final, Self, TypeVar, cast

import asyncpg  # pyright: ignore[reportMissingTypeStubs]  # see db.py

from .contract import Actor, Contract, current
from .migrations import migrate
from .provision import provision, service_dsn
from .rpc import acting
from .service import Build, Host, TransportName
from .supervisor import EmbeddedPostgres, remove_cluster

C = TypeVar("C", bound=Contract)

TEST_SECRET: Final = b"a secret that everybody may know"
TEST_CALL_SECONDS: Final = 30.0


class Cluster:
    """One PostgreSQL for many tests."""

    def __init__(self, folder: Path, server: EmbeddedPostgres) -> None:
        self.folder = folder
        self.server = server
        self._templates: dict[str, str] = {}
        self._numbers = itertools.count(1)

    @classmethod
    async def start(cls) -> Self:
        folder = Path(tempfile.mkdtemp(prefix="mercato-test-"))
        # The unprivileged user that PostgreSQL runs as under root must be able to pass through.
        folder.chmod(0o755)  # noqa: ASYNC240  # nothing else runs yet
        (folder / "data").mkdir(mode=0o755)
        password = "test-password"  # noqa: S105  # of a server that nobody but this run can reach
        server = await EmbeddedPostgres.start(folder / "data", password=password, progress=_silent)
        return cls(folder, server)

    async def stop(self) -> None:
        await self.server.stop()
        remove_cluster(self.folder / "data")
        shutil.rmtree(self.folder)

    async def fresh_database(self, service: str, migrations: Path) -> str:
        """The DSN of a migrated, empty database of a service, as the service's own role sees it."""
        template = await self._template(service, migrations)
        copy = f"{template}_{os.getpid()}_{next(self._numbers)}"
        await self._admin(f'CREATE DATABASE "{copy}" TEMPLATE "{template}" OWNER "{template}"')
        await self._admin(f'REVOKE ALL ON DATABASE "{copy}" FROM PUBLIC')
        user_and_password = service_dsn(self.server.admin_dsn, template, _password(template))
        return user_and_password.replace(f"/{template}?", f"/{copy}?")

    async def drop_database(self, dsn: str) -> None:
        name = dsn.partition("?")[0].rpartition("/")[2]
        await self._admin(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')

    async def execute(self, statement: str) -> None:
        """Runs a statement as the administrator, for tests that take something away."""
        await self._admin(statement)

    async def _template(self, service: str, migrations: Path) -> str:
        if service not in self._templates:
            dsns = await provision(self.server.admin_dsn, [service], _password, prefix="test_")
            await migrate(dsns[service], migrations)
            self._templates[service] = f"test_{service}"
        return self._templates[service]

    async def _admin(self, statement: str) -> None:
        connection = await cast(Any, asyncpg).connect(self.server.admin_dsn)
        try:
            await connection.execute(statement)
        finally:
            await connection.close()


class Rig:
    """The services that a test opens, over one transport. `open` once, `close` at the end."""

    def __init__(self, cluster: Cluster, transport: TransportName) -> None:
        self.cluster = cluster
        self.transport: TransportName = transport
        self.dsns: dict[str, str] = {}
        self.host: Host

    async def open(self, **builds: Build) -> Self:
        """Hosts the services, each on a fresh database. The keyword is the service's name."""
        for name, build in builds.items():
            if name not in self.dsns:
                self.dsns[name] = await self.cluster.fresh_database(name, migrations_folder(build))
        self.host = Host(builds, self.dsns, secret=TEST_SECRET, transport=self.transport)
        await self.host.open()
        return self

    def client(self, contract: type[C]) -> C:
        return self.host.client(contract)

    @contextlib.contextmanager
    def acting(self, actor: Actor, seconds: float = TEST_CALL_SECONDS) -> Generator[None]:
        """Calls in this block come from `actor` and have so many seconds."""
        token = current.set(acting(actor, clock=self.host.clock, seconds=seconds, trace_id="0" * 32, request_id="test"))
        try:
            yield
        finally:
            current.reset(token)

    async def close(self) -> None:
        if hasattr(self, "host"):
            await self.host.close()
        for dsn in self.dsns.values():
            await self.cluster.drop_database(dsn)


def migrations_folder(build: Callable[..., Any]) -> Path:
    """The `migrations/` beside the `app.py` that a `build` comes from."""
    module = importlib.import_module(build.__module__)
    assert module.__file__
    return Path(module.__file__).with_name("migrations")


def _password(role: str) -> str:
    return f"password of {role}"


def _silent(_line: str) -> None:
    pass
