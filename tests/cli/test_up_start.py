"""The first minutes with `mercato up`: what it says, what it makes, and how its database is kept from others."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest

from mercato import __version__
from mercato.operations.copying import SCRATCH
from mercato.testing.caller import Caller
from mercato.testing.command import ROOT, clean_environment
from mercato.testing.process import Process, data_folder, socket_folder_of
from mercato.testing.waiting import BOUND_SECONDS, wait_until
from mercato.topology import SERVICES

HEAVY = ("alembic", "asyncpg", "pydantic", "sqlalchemy", "starlette", "uvicorn", "uvloop")
AS_ROOT = os.geteuid() == 0


@pytest.fixture(scope="module")
def shop() -> Iterator[Process]:
    """The first start in a new folder, as a person sees it."""
    with data_folder() as folder, Process(folder, as_json=False) as process:
        yield process.ready()
        process.stop()


def test_says_what_a_newcomer_needs_and_ready_last(shop: Process):
    text = "\n".join(shop.lines)

    assert shop.lines[-1] == f"ready {shop.url}"
    assert f"{shop.url}/docs" in text
    assert str(shop.data) in text
    assert "callers without a token act as staff" in text
    assert shop.errors == []


@pytest.mark.skipif(not AS_ROOT, reason="is about what root must do otherwise")
def test_says_where_the_database_is_when_that_is_not_in_the_data_folder(shop: Process):
    cluster = os.path.realpath(shop.data / "postgres")

    assert cluster.startswith("/var/lib/mercato/"), "the folder of this test is below one that is closed to others"
    assert shop.has_line(f"Database       {cluster}, for PostgreSQL's account cannot reach the data folder")


def test_shows_progress_from_nothing_to_a_filled_shop(shop: Process):
    text = "\n".join(shop.lines)

    for words in ("creating a database", "PostgreSQL 18", "migrated the database of orders", "demo data into products"):
        assert words in text


def test_letters_become_files_in_the_data_folder(shop: Process):
    folder = shop.data / "letters"
    assert f"Letters        {folder}, instead of being mailed (MERCATO_USERS_MAIL)" in shop.lines
    with shop.caller() as caller:
        carol = {"email": "carol@example.com", "name": "Carol", "password": "a long enough password"}
        assert caller.post("/register", carol).status == 201
        wait_until(lambda: list(folder.glob("*.eml")))
        [letter] = folder.glob("*.eml")
        found = re.search(rf"{shop.url}/account/email#(\S+)", letter.read_text())
        assert found, letter.read_text()
        assert caller.post("/email/proof", {"token": found[1]}).status == 204


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_printed_curl_lines_work_as_they_are(shop: Process):
    assert run_curl_lines(shop) == ["200", "201"]


@pytest.mark.long
@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_printed_curl_lines_of_an_empty_guarded_shop_work_too():
    with data_folder() as folder, Process(folder, "--no-demo", "--auth", "required", as_json=False) as shop:
        assert run_curl_lines(shop.ready()) == ["200", "201"]
        with shop.caller() as caller:
            assert caller.get("/products").json == []
        shop.stop()


def run_curl_lines(shop: Process) -> list[str]:
    """The status of each answer."""
    commands = re.findall(r"^  (curl (?:.*\\\n)?.*)$", "\n".join(shop.lines), re.MULTILINE)
    full = [f"{command} -s -w ' %{{http_code}}'" for command in commands]
    return [subprocess.check_output(["/bin/sh", "-c", line], text=True).split()[-1] for line in full]


def test_a_second_up_on_the_same_data_names_the_running_one(shop: Process):
    with Process(shop.data, is_second=True) as second:
        sentence = second.refusal()

    assert f"pid {shop.pid} at {shop.url}" in sentence


def test_a_second_up_on_the_same_data_and_port_names_the_running_one(shop: Process):
    with Process(shop.data, port=int(shop.url.rpartition(":")[2]), is_second=True) as second:
        sentence = second.refusal()

    assert f"pid {shop.pid} at {shop.url}" in sentence


async def test_each_service_has_a_database_and_a_plain_role_of_its_own(shop: Process):
    connection = await asyncpg.connect(shop.dsn("users"))
    try:
        roles = await connection.fetch(
            """
            SELECT d.datname, r.rolname, r.rolsuper, r.rolcreatedb, r.rolcreaterole
              FROM pg_database d JOIN pg_roles r ON r.oid = d.datdba
             WHERE d.datname LIKE 'mercato_%' AND d.datname <> $1
             ORDER BY 1
            """,
            SCRATCH,  # made by the first audit of a shop that has been running for a while
        )
    finally:
        await connection.close()

    expected = [(f"mercato_{name}", f"mercato_{name}", False, False, False) for name in sorted(SERVICES)]
    assert [tuple(role) for role in roles] == expected


async def test_a_connection_without_the_right_password_is_refused(shop: Process):
    folder = str(socket_folder_of(shop.data))

    for user in ("mercato", "mercato_orders"):
        with pytest.raises(asyncpg.InvalidPasswordError):
            await asyncpg.connect(user=user, password="guessed", host=folder, database="mercato_orders")


def test_the_socket_is_in_a_private_folder_of_an_unprivileged_user(shop: Process):
    postmaster = shop.tree().postmaster
    assert postmaster is not None
    status = socket_folder_of(shop.data).stat()

    assert stat.S_IMODE(status.st_mode) == 0o700
    assert status.st_uid == Path(f"/proc/{postmaster.pid}").stat().st_uid
    assert status.st_uid != 0


def test_postgres_listens_on_no_port(shop: Process):
    postmaster = shop.tree().postmaster
    assert postmaster is not None
    inodes = {os.readlink(f"/proc/{postmaster.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{postmaster.pid}/fd")}
    listening = [
        line.split()[9]
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        if line.split()[3] == "0A"
    ]

    assert not {f"socket:[{inode}]" for inode in listening} & inodes


def test_a_second_start_migrates_nothing_and_json_is_one_object_a_line(data: Path):
    with Process(data) as first:
        first.ready().stop()
    importtime = (sys.executable, "-X", "importtime", "-m", "mercato.cli")
    with Process(data, command=importtime) as second:
        second.ready()
        events = second.events
        second.signal(signal.SIGTERM)
        assert second.exit_code() == 0
        imported = {line.rpartition("|")[2].strip() for line in second.errors}

    assert events[-1] == {"event": "ready", "url": second.url}
    assert {event["event"] for event in events} == {"progress", "ready"}
    assert not [
        event for event in events if "migrated" in event.get("message", "") or "demo" in event.get("message", "")
    ]
    assert "asyncpg" in imported
    assert not imported & {"alembic", "sqlalchemy"}


def test_a_reader_that_goes_away_does_not_end_the_shop(data: Path):
    port = free_port()
    command = [sys.executable, "-m", "mercato.cli", "up", "--port", str(port), "--data", str(data)]
    shop = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=clean_environment())
    assert shop.stdout is not None
    assert shop.stderr is not None
    try:
        shop.stdout.readline()
        shop.stdout.close()  # mercato up | head -1

        wait_until(lambda: answers(port), 60.0)
        shop.terminate()

        assert shop.wait(BOUND_SECONDS) == 0
        # On a slow machine there are warnings of consumers that wait.
        said = shop.stderr.read()
        assert not re.search(b"Traceback|BrokenPipe|Broken pipe", said), said.decode()
    finally:
        shop.terminate()
        shop.wait(BOUND_SECONDS)
        shop.stderr.close()


def test_an_ipv6_address_gives_a_url_that_works(data: Path):
    if not has_ipv6():
        pytest.skip("no IPv6 on this machine")
    with Process(data, "--host", "::1", "--no-demo") as shop, shop.ready().caller() as caller:
        assert shop.url.startswith("http://[::1]:")
        assert caller.get("/products").status == 200
        shop.stop()


@pytest.mark.parametrize("arguments", [["--help"], ["up", "--help"], ["--version"], []])
def test_help_and_version_import_nothing_heavy(arguments: list[str]):
    code = f"""if True:
        import atexit, sys
        sys.argv = ["mercato", *{arguments!r}]
        atexit.register(lambda: sys.stderr.write(" ".join(sorted(set(sys.modules) & set({HEAVY!r})))))
        from mercato.cli import main
        main()
    """
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=clean_environment()
    )

    assert answer.stderr == ""
    assert (__version__ if "--version" in arguments else "Usage: mercato") in answer.stdout


def test_the_help_of_up_lists_every_option():
    command = [sys.executable, "-m", "mercato.cli", "up", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True, env=clean_environment()).stdout

    for option in ("--host", "--port", "--data", "--no-demo", "--workers", "--auth", "--json"):
        assert option in text


@pytest.mark.long
@pytest.mark.skipif(not AS_ROOT, reason="everything else here is that test then")
def test_an_ordinary_user_runs_all_of_it(tmp_path: Path):
    uid = pwd.getpwnam("nobody").pw_uid
    home = Path("/tmp") / f"mercato-test-home-{os.getpid()}"
    home.mkdir(mode=0o700)
    try:
        os.chown(home, uid, uid)
        command = ordinary_command(uid, tmp_path)
        with Process(home / "data", command=command, environment={"HOME": str(home)}) as shop:
            shop.ready()
            owners = {Path(f"/proc/{process.pid}").stat().st_uid for process in shop.tree().all}
            with shop.caller() as caller:
                assert caller.order().status == 201
            shop.stop()
        assert owners == {uid}
        assert (home / "data" / "postgres" / "PG_VERSION").exists()
    finally:
        shutil.rmtree(home)


def ordinary_command(uid: int, tmp_path: Path) -> list[str]:
    """The command line as that user; where a folder of root's is in the way, with what it needs mounted elsewhere."""
    become = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all"]
    if shutil.which("setpriv") is None or shutil.which("unshare") is None:
        pytest.skip("needs setpriv and unshare")
    library = Path(asyncpg.__file__).parents[1]
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    script = f"""
        set -e
        mount -t tmpfs -o mode=755 none /mnt
        mkdir /mnt/python /mnt/library /mnt/mercato
        mount --bind {sys.base_prefix} /mnt/python
        mount --bind {library} /mnt/library
        mount --bind {ROOT} /mnt/mercato
        export PYTHONPATH=/mnt/mercato:/mnt/library LD_LIBRARY_PATH=/mnt/python/lib
        cd /
        exec {" ".join(become)} /mnt/python/bin/{version} -m mercato.cli "$@"
    """
    trial = subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False)
    if trial.returncode != 0:
        pytest.skip("mounting is not permitted here")
    return ["unshare", "-m", "/bin/sh", "-c", script, "sh"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(port: int) -> bool:
    try:
        with Caller(f"http://127.0.0.1:{port}") as caller:
            return caller.get("/health/ready").status == 200
    except OSError:
        return False


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True
