"""The PostgreSQL of a run of tests.

A `Cluster` is one embedded PostgreSQL. It migrates a template of each service's database once; a fresh database is a
copy of the template, or an emptied database of an earlier test.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from pathlib import Path
from typing import Final, Self

import asyncpg  # pyright: ignore[reportMissingTypeStubs]  # it has no types

from mercato.chassis.postgres.migrations import migrate
from mercato.chassis.postgres.provisioning import provision, service_dsn
from mercato.embedded_postgres import EmbeddedPostgres, remove_cluster

from .tables import connected


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
        # Under root, PostgreSQL runs as an unprivileged user, which needs to enter this folder.
        folder.chmod(0o755)  # noqa: ASYNC240  # no other task runs yet
        (folder / "data").mkdir(mode=0o755)
        password = "test-password"  # of a server that only this run can reach
        server = await EmbeddedPostgres.start(folder / "data", password=password, progress=_silent, max_connections=400)
        cluster = cls(folder, server)
        # Tests connect some ten thousand times, and each connection hashes the password so often.
        await cluster._admin("ALTER SYSTEM SET scram_iterations = 1")
        # No test cuts the power: what a server has written before it is killed is with the kernel.
        await cluster._admin("ALTER SYSTEM SET fsync = off")
        await cluster._admin("SELECT pg_reload_conf()")
        return cluster

    async def stop(self) -> None:
        await self.server.stop()
        remove_cluster(self.folder / "data")
        shutil.rmtree(self.folder)

    async def fresh_database(self, service: str, migrations: Path) -> str:
        """The DSN of a migrated, empty database of a service, for the service's own role."""
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
        """Empties a database for the next test. A database whose schema was changed is dropped."""
        name = database_name(dsn)
        template = self._lent.pop(name)
        try:
            if await self._emptied(name) == self._shapes[template]:
                self._free[template].append(name)
                return
        except (asyncpg.PostgresError, OSError):
            pass  # a test has locked it, or made it unreachable
        await self._admin(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')

    async def execute(self, statement: str) -> None:
        """Runs a statement as the administrator, for tests that revoke or drop something."""
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
        async with connected(self._dsn(database)) as connection:
            await connection.execute(_EMPTY)
            await connection.execute("SELECT pg_stat_reset()")
            return await connection.fetchval(_SHAPE)

    async def _admin(self, statement: str) -> None:
        async with connected(self.server.admin_dsn) as connection:
            await connection.execute(statement)

    def _dsn(self, database: str) -> str:
        return self.server.admin_dsn.replace("/postgres?", f"/{database}?")


_EMPTY: Final = """
    SET lock_timeout = '2s';
    DO $$
    DECLARE names text;
    BEGIN
        SELECT string_agg(oid::regclass::text, ', ') INTO names
          FROM pg_class
         WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'
           AND relname NOT IN ('alembic_version', 'revision_checksums') AND pg_relation_size(oid) > 0;
        IF names IS NOT NULL THEN
            EXECUTE 'TRUNCATE ' || names || ' CASCADE';
        END IF;
        PERFORM setval(seqrelid, seqstart, false)
           FROM pg_sequence
           JOIN pg_depend ON classid = 'pg_class'::regclass AND objid = seqrelid AND deptype IN ('a', 'i')
          WHERE pg_sequence_last_value(seqrelid) IS NOT NULL;
    END $$
"""
"""TRUNCATE creates new files for a table and its indexes, so unused tables, which have no page, are left out."""

_SHAPE: Final = """
    SELECT md5(string_agg(part, ',' ORDER BY part))
      FROM (
        SELECT format('column %s %s %s', attrelid, attnum, a.xmin)
          FROM pg_attribute a JOIN pg_class c ON c.oid = attrelid
         WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'S') AND attnum > 0
        UNION ALL
        SELECT format('constraint %s %s', oid, xmin) FROM pg_constraint WHERE connamespace = 'public'::regnamespace
        UNION ALL
        SELECT format('index %s %s', indexrelid, i.xmin)
          FROM pg_index i JOIN pg_class c ON c.oid = indrelid WHERE c.relnamespace = 'public'::regnamespace
        UNION ALL
        SELECT format('trigger %s %s', oid, xmin) FROM pg_trigger WHERE NOT tgisinternal
        UNION ALL
        SELECT format('setting %s', setconfig) FROM pg_db_role_setting
         WHERE setdatabase = (SELECT oid FROM pg_database WHERE datname = current_database())
      ) AS schema (part)
"""
"""`xmin` is the transaction that wrote a row of a catalogue. A copy of a database has those of its template."""


def database_name(dsn: str) -> str:
    """The name of the database in a DSN."""
    return dsn.partition("?")[0].rpartition("/")[2]


def _password(role: str) -> str:
    return f"password of {role}"


def _silent(_line: str) -> None:
    pass
