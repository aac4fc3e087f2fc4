"""What a migration makes of the sessions that there are."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path

from mercato import topology
from mercato.chassis.postgres.migrations import migrate, statements
from mercato.testing.cluster import Cluster
from mercato.testing.tables import connected

FOLDER = topology.migrations("users")


async def test_sessions_get_random_ids_and_the_revision_may_be_run_again(cluster: Cluster, tmp_path: Path) -> None:
    """What it does outside a transaction stays where a later statement fails."""
    before = tmp_path / "migrations"
    shutil.copytree(FOLDER, before, ignore=shutil.ignore_patterns("000[2-9]_*", "checksums.txt", "__pycache__"))
    dsn = await cluster.fresh_database("users_before", before)
    try:
        async with connected(dsn) as connection:
            await connection.execute("INSERT INTO users (id, email, name) VALUES (1, 'alice@example.com', 'Alice')")
            for _ in range(2):
                await connection.execute("INSERT INTO sessions (user_id, expires_at) VALUES (1, now())")
            for statement in statements(FOLDER, "0001", "0002"):
                if "alembic_version" not in statement:
                    await connection.execute(statement)
            seen: list[uuid.UUID] = [row[0] for row in await connection.fetch("SELECT sid FROM sessions ORDER BY id")]
            assert None not in seen
            assert len(set(seen)) == 2

            assert (await migrate(dsn, FOLDER))[0] == "0002"
            assert [row[0] for row in await connection.fetch("SELECT sid FROM sessions ORDER BY id")] == seen
    finally:
        await cluster.release_database(dsn)
