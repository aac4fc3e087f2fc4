"""What tests of services stand on: a real PostgreSQL, fresh databases, and a host without HTTP.

A `Cluster` is one embedded PostgreSQL for a whole run of tests. It migrates a template of each service's database
once; a fresh database is a copy of it, or one that an earlier test has used and that was emptied. A `Rig` is one
process worth of services on such databases, over one of the transports.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import shutil
import tempfile
from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from pathlib import Path
from typing import Any, Final, Self, TypeVar, cast

import asyncpg  # pyright: ignore[reportMissingTypeStubs]  # it has no types

from mercato.chassis.contract import Actor, Contract, current
from mercato.chassis.hosting.host import Host, TransportName
from mercato.chassis.hosting.service import Build
from mercato.chassis.messaging.events import declared_only
from mercato.chassis.postgres.migrations import migrate
from mercato.chassis.postgres.provisioning import provision, service_dsn
from mercato.chassis.rpc.client import acting
from mercato.embedded_postgres import EmbeddedPostgres, remove_cluster

C = TypeVar("C", bound=Contract)

TEST_SECRET: Final = b"a secret that everybody may know"
TEST_CALL_SECONDS: Final = 30.0


class Cluster:
    """One PostgreSQL for many tests."""

    def __init__(self, folder: Path, server: EmbeddedPostgres) -> None:
        self.folder = folder
        self.server = server
        self._templates: dict[str, str] = {}
        self._shapes: dict[str, str] = {}
        self._free: dict[str, list[str]] = {}
        self._lent: dict[str, str] = {}
        self._numbers = itertools.count(1)

    @classmethod
    async def start(cls) -> Self:
        folder = Path(tempfile.mkdtemp(prefix="mercato-test-"))
        # The unprivileged user that PostgreSQL runs as under root must be able to pass through.
        folder.chmod(0o755)  # noqa: ASYNC240  # nothing else runs yet
        (folder / "data").mkdir(mode=0o755)
        password = "test-password"  # of a server that only this run can reach
        server = await EmbeddedPostgres.start(folder / "data", password=password, progress=_silent, max_connections=400)
        return cls(folder, server)

    async def stop(self) -> None:
        await self.server.stop()
        remove_cluster(self.folder / "data")
        shutil.rmtree(self.folder)

    async def fresh_database(self, service: str, migrations: Path) -> str:
        """The DSN of a migrated, empty database of a service, as the service's own role sees it."""
        template = await self._template(service, migrations)
        if self._free[template]:
            name = self._free[template].pop()
        else:
            name = f"{template}_{os.getpid()}_{next(self._numbers)}"
            await self._admin(f'CREATE DATABASE "{name}" TEMPLATE "{template}" OWNER "{template}"')
            await self._admin(f'REVOKE ALL ON DATABASE "{name}" FROM PUBLIC')
        self._lent[name] = template
        user_and_password = service_dsn(self.server.admin_dsn, template, _password(template))
        return user_and_password.replace(f"/{template}?", f"/{name}?")

    async def release_database(self, dsn: str) -> None:
        """Takes a database back. It is emptied for the next test; one whose schema was changed is dropped."""
        name = dsn.partition("?")[0].rpartition("/")[2]
        template = self._lent.pop(name, None)
        if template is None:
            return  # two rigs had it, and the other has brought it back
        try:
            if await self._emptied(name) == self._shapes[template]:
                self._free[template].append(name)
                return
        except (asyncpg.PostgresError, OSError):
            pass  # a test has locked it, or made it unreachable
        await self._admin(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')

    async def execute(self, statement: str) -> None:
        """Runs a statement as the administrator, for tests that take something away."""
        await self._admin(statement)

    async def _template(self, service: str, migrations: Path) -> str:
        if service not in self._templates:
            dsns = await provision(self.server.admin_dsn, [service], _password, prefix="test_")
            await migrate(dsns[service], migrations)
            template = self._templates[service] = f"test_{service}"
            self._free[template] = []
            self._shapes[template] = await self._emptied(template)
        return self._templates[service]

    async def _emptied(self, database: str) -> str:
        """Empties all tables of a database, sets its statistics to 0, and gives a digest of its schema."""
        async with self._connected(database) as connection:
            await connection.execute(_EMPTY)
            await connection.execute("SELECT pg_stat_reset()")
            return await connection.fetchval(_SHAPE)

    async def _admin(self, statement: str) -> None:
        async with self._connected("postgres") as connection:
            await connection.execute(statement)

    @contextlib.asynccontextmanager
    async def _connected(self, database: str) -> AsyncGenerator[Any]:
        dsn = self.server.admin_dsn.replace("/postgres?", f"/{database}?")
        connection = await cast(Any, asyncpg).connect(dsn)
        try:
            yield connection
        finally:
            await connection.close()


_EMPTY: Final = """
    SET lock_timeout = '2s';
    DO $$
    DECLARE names text;
    BEGIN
        SELECT string_agg(format('%I', tablename), ', ') INTO names
          FROM pg_tables
         WHERE schemaname = 'public' AND tablename NOT IN ('alembic_version', 'revision_checksums');
        IF names IS NOT NULL THEN
            EXECUTE 'TRUNCATE ' || names || ' RESTART IDENTITY CASCADE';
        END IF;
    END $$
"""

_SHAPE: Final = """
    SELECT md5(coalesce(string_agg(part, ',' ORDER BY part), ''))
      FROM (
        SELECT format('column %s %s %s %s', attrelid::regclass, attname, atttypid, attnotnull)
          FROM pg_attribute JOIN pg_class c ON c.oid = attrelid
         WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'S') AND attnum > 0
        UNION ALL
        SELECT format('constraint %s %s', conname, pg_get_constraintdef(oid))
          FROM pg_constraint WHERE connamespace = 'public'::regnamespace
        UNION ALL
        SELECT indexdef FROM pg_indexes WHERE schemaname = 'public'
        UNION ALL
        SELECT format('trigger %s', tgname) FROM pg_trigger WHERE NOT tgisinternal
        UNION ALL
        SELECT format('setting %s', setconfig) FROM pg_db_role_setting
         WHERE setdatabase = (SELECT oid FROM pg_database WHERE datname = current_database())
      ) AS schema (part)
"""


class Rig:
    """The services that a test opens, over one transport. `open` once, `close` at the end."""

    def __init__(self, cluster: Cluster, transport: TransportName, options: Mapping[str, str] | None = None) -> None:
        self.cluster = cluster
        self.transport: TransportName = transport
        self.options = dict(options or {})
        """As the operator would set them: `MERCATO_INVENTORY_HOLD_SECONDS`. Read when the rig is opened."""
        self.dsns: dict[str, str] = {}
        self.host: Host

    async def open(self, **builds: Build) -> Self:
        """Hosts the services, each on a fresh database. The keyword is the service's name."""
        for name, build in builds.items():
            if name not in self.dsns:
                self.dsns[name] = await self.cluster.fresh_database(name, migrations_folder(build))
        self.host = Host(builds, self.dsns, secret=TEST_SECRET, transport=self.transport, options=self.options)
        for service in self.host.services.values():
            service.database.pack = declared_only(service.server.contract)
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
            await self.cluster.release_database(dsn)


def migrations_folder(build: Callable[..., Any]) -> Path:
    """The `migrations/` beside the `app.py` that a `build` comes from."""
    module = importlib.import_module(build.__module__)
    assert module.__file__
    return Path(module.__file__).with_name("migrations")


def _password(role: str) -> str:
    return f"password of {role}"


def _silent(_line: str) -> None:
    pass
