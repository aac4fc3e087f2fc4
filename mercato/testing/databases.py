"""A `Database` as services have it, without a service around it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from pathlib import Path

from mercato.chassis.observability.telemetry import Telemetry
from mercato.chassis.postgres.database import Database

from .cluster import Cluster


@contextlib.asynccontextmanager
async def opened(dsn: str, name: str = "tests", size: int = 4) -> AsyncGenerator[Database]:
    """Open for the time of a block. `size` is the largest number of its connections."""
    made = Database(dsn, name, Telemetry(), size=size)
    await made.open()
    try:
        yield made
    finally:
        await made.close()


@contextlib.asynccontextmanager
async def fresh_dsn(cluster: Cluster, name: str, migrations: Path) -> AsyncGenerator[str]:
    """A migrated, empty database for the time of a block."""
    dsn = await cluster.fresh_database(name, migrations)
    try:
        yield dsn
    finally:
        await cluster.release_database(dsn)
