"""Migrations: each once, whole or not at all, however many processes start at the same moment."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import pytest_asyncio

from mercato.chassis import migrations
from mercato.chassis.migrations import MigrationError, migrate, revisions, statements
from mercato.chassis.provision import provision
from mercato.chassis.testing import Cluster

ROOT = Path(__file__).parents[2]

MIGRATE = """
import asyncio, sys
from pathlib import Path
from mercato.chassis.migrations import migrate
print(*asyncio.run(migrate(sys.argv[1], Path(sys.argv[2]))))
"""

REVISION = '''"""Written by a test."""

from alembic import op

revision = "{number}"
down_revision = {before}


def upgrade() -> None:
{body}
'''


def write(folder: Path, number: int, *bodies: str) -> None:
    before = f'"{number - 1:04}"' if number > 1 else None
    body = "\n".join(f"    {line}" for line in bodies)
    (folder / f"{number:04}_step.py").write_text(REVISION.format(number=f"{number:04}", before=before, body=body))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "100% migrations"  # a percent sign would be interpolated by the configuration
    made.mkdir()
    write(made, 1, 'op.execute("CREATE TABLE one (a int)")', """op.execute("INSERT INTO one VALUES (1)")""")
    write(made, 2, 'op.execute("CREATE TABLE two (a int)")')
    return made


@pytest_asyncio.fixture
async def dsn(cluster: Cluster) -> AsyncGenerator[str]:
    dsns = await provision(cluster.server.admin_dsn, ["migrating"], lambda role: "p", prefix="empty_")
    yield dsns["migrating"]
    await cluster.execute("DROP DATABASE empty_migrating WITH (FORCE)")


async def ask(dsn: str, query: str) -> Any:
    connection = await asyncpg.connect(dsn)
    try:
        return await connection.fetchval(query)
    finally:
        await connection.close()


async def tables(dsn: str) -> str:
    return await ask(dsn, "SELECT coalesce(string_agg(relname, ' ' ORDER BY relname), '') FROM pg_stat_user_tables")


async def test_what_is_missing_runs_in_order_and_once(dsn: str, folder: Path):
    assert revisions(folder) == ["0001", "0002"]
    assert await migrate(dsn, folder) == ["0001", "0002"]
    assert await migrate(dsn, folder) == []
    write(folder, 3, """op.execute("INSERT INTO one VALUES (3)")""")
    assert await migrate(dsn, folder) == ["0003"]
    assert await ask(dsn, "SELECT array_agg(a ORDER BY a) FROM one") == [1, 3]


async def test_alembic_is_not_imported_where_nothing_is_missing(dsn: str, folder: Path):
    await migrate(dsn, folder)
    code = MIGRATE + "\nassert not [m for m in sys.modules if m.startswith(('alembic', 'sqlalchemy'))]"
    assert await run_process(code, dsn, folder) == ""


async def test_processes_that_start_together_migrate_once(dsn: str, folder: Path):
    said = await asyncio.gather(*(run_process(MIGRATE, dsn, folder) for _ in range(3)))
    assert sorted(said) == ["", "", "0001 0002"]
    assert await ask(dsn, "SELECT count(*) FROM one") == 1


async def run_process(code: str, dsn: str, folder: Path) -> str:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, dsn, str(folder), cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    assert process.returncode == 0
    return output.decode().strip()


async def test_a_revision_that_fails_leaves_nothing_and_says_why(dsn: str, folder: Path):
    write(folder, 3, 'op.execute("CREATE TABLE three (a int)")', 'op.execute("CREATE TABLE one (a int)")')
    with pytest.raises(asyncpg.DuplicateTableError, match="one"):
        await migrate(dsn, folder)
    assert await tables(dsn) == "alembic_version one two"
    write(folder, 3, 'op.execute("CREATE TABLE three (a int)")')
    assert await migrate(dsn, folder) == ["0003"]  # neither the lock nor half a revision is in its way


async def test_a_newer_database_is_refused(dsn: str, folder: Path):
    await migrate(dsn, folder)
    (folder / "0002_step.py").unlink()
    with pytest.raises(MigrationError, match=r"0002.*newer"):
        await migrate(dsn, folder)


async def test_a_lock_that_is_held_for_ever_is_given_up(dsn: str, folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(migrations, "LOCK_SECONDS", 0.0)
    holder = await asyncpg.connect(dsn)
    await holder.execute("SELECT pg_advisory_lock($1)", migrations.LOCK_KEY)
    with pytest.raises(MigrationError, match="another process"):
        await migrate(dsn, folder)
    await holder.close()


async def test_a_revision_does_not_wait_for_a_busy_table_for_ever(
    dsn: str, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(migrations, "TABLE_LOCK_TIMEOUT", "10ms")
    await migrate(dsn, folder)
    write(folder, 3, 'op.execute("ALTER TABLE one ADD COLUMN b int")')
    busy = await asyncpg.connect(dsn)
    async with busy.transaction():
        await busy.execute("SELECT * FROM one")
        with pytest.raises(asyncpg.LockNotAvailableError):
            await migrate(dsn, folder)
    await busy.close()
    assert await migrate(dsn, folder) == ["0003"]


async def test_an_index_can_be_built_while_the_shop_runs(dsn: str, folder: Path):
    write(
        folder, 3,
        "with op.get_context().autocommit_block():",
        '    op.execute("CREATE INDEX CONCURRENTLY one_a_idx ON one (a)")',
        """op.execute("INSERT INTO one VALUES (3)")""",
    )  # fmt: skip
    assert await migrate(dsn, folder) == ["0001", "0002", "0003"]
    assert await ask(dsn, "SELECT indisvalid FROM pg_index WHERE indexrelid = 'one_a_idx'::regclass")


async def test_statements_arrive_as_they_were_written(dsn: str, folder: Path):
    write(folder, 3, "op.execute('''CREATE TABLE said AS SELECT '100% ; ' AS a;\n\nSELECT 2''')")
    await migrate(dsn, folder)
    assert await ask(dsn, "SELECT a FROM said") == "100% ; "


def test_a_revision_is_framed_by_begin_and_commit(folder: Path):
    made: Sequence[str] = statements(folder, "0001", "0002")
    assert (made[0], made[-1]) == ("BEGIN;", "COMMIT;")
    assert sum("alembic_version" in statement for statement in made) == 1


async def test_a_folder_without_migrations_is_a_mistake(dsn: str, tmp_path: Path):
    with pytest.raises(AssertionError, match="no migrations"):
        await migrate(dsn, tmp_path)
