"""A `Database` without a service."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from pathlib import Path

from mercato.chassis.observability.telemetry import Telemetry
from mercato.chassis.postgres.database import Database

from .cluster import Cluster


@contextlib.asynccontextmanager
async def opened(dsn: str, name: str = "tests", size: int = 4) -> AsyncGenerator[Database]:
    """A database that is open for the time of a block. `size` is the largest number of its connections."""
    database = Database(dsn, name, Telemetry(), size=size)
    await database.open()
    try:
        yield database
    finally:
        await database.close()


@contextlib.asynccontextmanager
async def fresh_dsn(cluster: Cluster, name: str, migrations: Path) -> AsyncGenerator[str]:
    """A migrated, empty database for the time of a block."""
    dsn = await cluster.fresh_database(name, migrations)
    try:
        yield dsn
    finally:
        await cluster.release_database(dsn)
