"""Migrations: each once, whole or not at all, however many processes start together; and frozen once landed."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import pytest_asyncio

from chassis.postgres import freeze_migrations
from chassis.postgres.freeze_migrations import COMMAND, FOLDERS, freeze
from mercato.chassis.postgres import migrations
from mercato.chassis.postgres.migrations import (
    MigrationError,
    computed_checksum,
    frozen_checksums,
    migrate,
    missing_revisions,
    revisions,
    statements,
)
from mercato.chassis.postgres.provisioning import provision, service_dsn
from mercato.testing.cluster import Cluster

ROOT = Path(__file__).parents[3]

MIGRATE = """
import asyncio, sys
from pathlib import Path
from mercato.chassis.postgres.migrations import migrate
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


async def run(dsn: str, statement: str) -> None:
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


async def tables(dsn: str) -> str:
    return await ask(dsn, "SELECT coalesce(string_agg(relname, ' ' ORDER BY relname), '') FROM pg_stat_user_tables")


async def test_missing_revisions_run_in_order_and_once(dsn: str, folder: Path):
    assert revisions(folder) == ["0001", "0002"]
    assert await migrate(dsn, folder) == ["0001", "0002"]
    assert await migrate(dsn, folder) == []
    write(folder, 3, """op.execute("INSERT INTO one VALUES (3)")""")
    assert await migrate(dsn, folder) == ["0003"]
    assert await ask(dsn, "SELECT array_agg(a ORDER BY a) FROM one") == [1, 3]


async def test_alembic_is_not_imported_where_nothing_is_missing(dsn: str, folder: Path):
    freeze(folder)
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
    assert await tables(dsn) == "alembic_version one revision_checksums two"
    write(folder, 3, 'op.execute("CREATE TABLE three (a int)")')
    assert await migrate(dsn, folder) == ["0003"]  # neither the lock nor half a revision is in its way


async def test_the_version_before_goes_on_with_a_database_of_the_next(dsn: str, folder: Path):
    """A process of it that dies during an upgrade is started again."""
    await migrate(dsn, folder)
    (folder / "0002_step.py").unlink()

    assert await missing_revisions(dsn, folder) == []
    assert await migrate(dsn, folder) == []
    assert await tables(dsn) == "alembic_version one revision_checksums two"


REMOVE = (
    "from mercato.chassis.postgres.migrations import needs",
    """for statement in (*needs("0002"), "DROP TABLE one"):""",
    "    op.execute(statement)",
)


async def test_a_version_that_uses_what_was_removed_is_refused(dsn: str, folder: Path):
    write(folder, 3, *REMOVE)
    write(folder, 4, 'op.execute("CREATE TABLE four (a int)")')
    assert await migrate(dsn, folder) == ["0001", "0002", "0003", "0004"]

    for number in (4, 3):
        (folder / f"{number:04}_step.py").unlink()
        assert await missing_revisions(dsn, folder) == []
    (folder / "0002_step.py").unlink()
    with pytest.raises(MigrationError, match=r"at revision 0004 of a newer version .* one that knows revision 0002$"):
        await missing_revisions(dsn, folder)


async def test_what_is_removed_later_counts(dsn: str, folder: Path):
    write(folder, 3, *REMOVE)
    write(folder, 4, REMOVE[0], REMOVE[1].replace("0002", "0003").replace("one", "two"), REMOVE[2])
    await migrate(dsn, folder)
    (folder / "0004_step.py").unlink()
    assert await missing_revisions(dsn, folder) == []

    (folder / "0003_step.py").unlink()
    with pytest.raises(MigrationError, match=r"one that knows revision 0003$"):
        await migrate(dsn, folder)


async def test_a_database_with_other_revisions_between_is_refused(dsn: str, folder: Path):
    write(folder, 3, 'op.execute("CREATE TABLE three (a int)")')
    await migrate(dsn, folder)
    await ask(dsn, "UPDATE revision_checksums SET revision = '0002b' WHERE revision = '0002' RETURNING 1")

    with pytest.raises(MigrationError, match=r"at revision 0002b of a newer version"):
        await missing_revisions(dsn, folder)


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


# -------------------------------------------------------------------------------------------------- frozen revisions


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.parent.name)
def test_the_revisions_of_a_service_are_what_they_were_when_they_were_frozen(folder: Path):
    now = {revision: computed_checksum(folder, revision) for revision in revisions(folder)}
    assert now == frozen_checksums(folder), f"a new revision: `{COMMAND}`; a change of an old one: take it back"


async def test_a_revision_and_its_checksum_are_recorded_in_one_transaction(dsn: str, folder: Path):
    write(folder, 3, 'op.execute("CREATE TABLE three (a int)")', 'op.execute("CREATE TABLE one (a int)")')
    with pytest.raises(asyncpg.DuplicateTableError):
        await migrate(dsn, folder)
    recorded = await ask(dsn, "SELECT json_object_agg(revision, checksum)::text FROM revision_checksums")
    assert json.loads(recorded) == {number: computed_checksum(folder, number) for number in ("0001", "0002")}


async def test_a_database_of_another_text_of_a_revision_is_refused_and_left_as_it_is(dsn: str, folder: Path):
    await migrate(dsn, folder)
    before = await dump(dsn)
    write(folder, 2, 'op.execute("CREATE TABLE two (a int, b int)")')
    write(folder, 3, 'op.execute("CREATE TABLE three (a int)")')

    for attempt in (migrate, missing_revisions):
        with pytest.raises(MigrationError, match="0002 of the database empty_migrating was run with statements"):
            await attempt(dsn, folder)
    assert await dump(dsn) == before


async def test_a_database_from_before_the_checksums_is_refused_and_left_as_it_is(dsn: str, folder: Path):
    """What the commits before left: the table of Alembic, at some revision, and nothing about its text."""
    for number, before in (("0001", None), ("0002", "0001")):
        for statement in statements(folder, before, number):
            await run(dsn, statement)
    left = await dump(dsn)

    for attempt in (migrate, missing_revisions):
        with pytest.raises(MigrationError, match=r"empty_migrating was made by a commit .*--data"):
            await attempt(dsn, folder)
    assert await dump(dsn) == left


async def test_a_database_that_another_process_makes_meanwhile_is_not_taken_for_an_old_one(dsn: str, folder: Path):
    class Beside:
        """A connection beside which the database is migrated right after the records were not there."""

        async def fetch(self, query: str) -> Any:
            try:
                return await connection.fetch(query)
            except asyncpg.UndefinedTableError:
                await migrate(dsn, folder)
                raise

        async def fetchrow(self, query: str) -> Any:
            return await connection.fetchrow(query)

    connection = await asyncpg.connect(dsn)
    try:
        assert set(await migrations._recorded(Beside(), dsn)) == {"0001", "0002"}
    finally:
        await connection.close()


@pytest.mark.long
async def test_two_tables_of_one_transaction_are_there_together(dsn: str):
    """One connection makes and drops both tables, others ask for both: `to_regclass` was wrong once in 5 400 times."""

    async def churn(connection: Any) -> None:
        while True:
            await connection.execute(
                "BEGIN; CREATE TABLE alembic_version (); CREATE TABLE revision_checksums (); COMMIT;"
                "BEGIN; DROP TABLE alembic_version, revision_checksums; COMMIT"
            )

    async def asked(connection: Any) -> set[tuple[bool, bool]]:
        return {tuple(await connection.fetchrow(migrations._STATE)) for _ in range(10_000)}

    opened = [await asyncpg.connect(dsn) for _ in range(5)]
    churning = asyncio.create_task(churn(opened[0]))
    try:
        for seen in await asyncio.gather(*map(asked, opened[1:])):
            assert seen == {(True, True), (False, False)}
    finally:
        churning.cancel()
        await asyncio.gather(churning, return_exceptions=True)
        await asyncio.gather(*(connection.close() for connection in opened))


async def dump(dsn: str) -> str:
    """Every row of every table, with its transaction: what is written anew differs too."""
    names = (await tables(dsn)).split()
    rows = [f"SELECT '{name}' || xmin::text || t::text AS row FROM {name} t" for name in names]
    return await ask(dsn, f"SELECT string_agg(row, chr(10) ORDER BY row) FROM ({' UNION ALL '.join(rows)}) AS rows")


async def test_missing_revisions_can_be_listed_without_changing_anything(dsn: str, folder: Path):
    assert await missing_revisions(dsn, folder) == ["0001", "0002"]
    assert await tables(dsn) == ""
    await migrate(dsn, folder)
    assert await missing_revisions(dsn, folder) == []
    write(folder, 3, 'op.execute("CREATE TABLE three (a int)")')
    assert await missing_revisions(dsn, folder) == ["0003"]


async def test_a_database_that_a_role_may_not_read_has_no_list_of_missing_revisions(
    dsn: str, folder: Path, cluster: Cluster
):
    await migrate(dsn, folder)
    await provision(cluster.server.admin_dsn, ["foreign"], lambda role: "p", prefix="empty_")
    try:
        role = service_dsn(dsn, "empty_foreign", "p")
        other = role.replace("/empty_foreign?", "/empty_migrating?")
        assert await missing_revisions(other, folder) is None
        await cluster.execute('GRANT CONNECT ON DATABASE "empty_migrating" TO "empty_foreign"')
        assert await missing_revisions(other, folder) is None
    finally:
        await cluster.execute("DROP DATABASE empty_foreign WITH (FORCE)")


async def test_a_frozen_revision_that_was_changed_does_not_run(dsn: str, folder: Path):
    freeze(folder)
    write(folder, 2, 'op.execute("CREATE TABLE two (a int, b int)")')
    with pytest.raises(MigrationError, match=r"0002 .* was changed after it was frozen"):
        await migrate(dsn, folder)
    assert await tables(dsn) == ""


async def test_comments_and_docstrings_of_a_frozen_revision_may_change(dsn: str, folder: Path):
    freeze(folder)
    await migrate(dsn, folder)
    write(folder, 2, "# Said better.", 'op.execute("CREATE TABLE two (a int)")')
    assert await migrate(dsn, folder) == []


def test_freezing_adds_what_is_new_and_refuses_what_has_changed(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert freeze_migrations.main([], [folder]) == 0
    write(folder, 3, 'op.execute("CREATE TABLE three (a int)")')
    assert freeze_migrations.main([], [folder]) == 0
    frozen = frozen_checksums(folder)
    assert list(frozen) == ["0001", "0002", "0003"]

    write(folder, 2, 'op.execute("CREATE TABLE two (a int, b int)")')
    assert freeze_migrations.main([], [folder]) == 1
    assert "0002" in capsys.readouterr().err
    assert frozen_checksums(folder) == frozen

    assert freeze_migrations.main(["--reset"], [folder]) == 0
    assert frozen_checksums(folder)["0002"] != frozen["0002"]


def test_a_frozen_revision_may_not_be_removed(folder: Path, capsys: pytest.CaptureFixture[str]):
    freeze(folder)
    (folder / "0002_step.py").unlink()
    assert freeze_migrations.main([], [folder]) == 1
    assert "its file is gone" in capsys.readouterr().err
