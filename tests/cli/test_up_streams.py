"""Standard streams that are closed, lack a letter, or go away: the shop runs all the same, or says why it does not."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import threading
from collections.abc import Generator
from pathlib import Path

import pytest

from mercato.embedded_postgres import DataFolder, DataFolderBusy, processes
from mercato.testing.caller import Caller
from mercato.testing.command import ROOT, clean_environment
from mercato.testing.process import Process, cluster_of, data_folder
from mercato.testing.waiting import BOUND_SECONDS, POLL_SECONDS, wait_until

COMMAND = (sys.executable, "-m", "mercato.cli")


def with_streams(redirections: str) -> tuple[str, ...]:
    """The command behind a shell that redirects its streams."""
    return ("/bin/sh", "-c", f'exec "$0" "$@" {redirections}', *COMMAND)


def url_of(data: Path) -> str:
    """Where the shop of this folder is, by what it has written into its lock."""
    found: list[str] = []

    def answers() -> bool:
        with contextlib.suppress(OSError, ValueError):
            found[:] = [json.loads((data / "lock").read_bytes())["url"]]
            if found[0].startswith("http"):
                with Caller(found[0]) as caller:
                    return caller.get("/health/ready").status == 200
        return False

    wait_until(answers, BOUND_SECONDS)
    return found[0]


@pytest.mark.parametrize(
    "closed", [*(pytest.param(one, marks=pytest.mark.long) for one in (">&-", "2>&-", "<&-")), "<&- >&- 2>&-"]
)
def test_a_shop_with_closed_streams_runs_and_stops(data: Path, closed: str):
    with Process(data, command=with_streams(closed)) as shop:
        url = url_of(data)
        with Caller(url) as caller:
            assert caller.order().status == 201
        assert json.loads((data / "lock").read_bytes())["url"] == url, "it holds what belongs there alone"
        shop.tree()
        shop.signal(signal.SIGTERM)
        assert shop.exit_code() == 0, shop.output
        assert shop.complaints == []
        shop.assert_gone()


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_refusal_with_closed_streams_has_its_exit_code(tmp_path: Path, closed: str):
    refused = subprocess.run(
        [*with_streams(closed), "up", "--data", str(tmp_path / "no" / "such"), "--port", "0"],
        cwd=ROOT, capture_output=True, text=True, env=clean_environment(), check=False,
    )  # fmt: skip

    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr
    assert refused.stderr.count("\n") == (0 if "2" in closed else 1)


@pytest.mark.parametrize("streams", ["", ">&-", "2>&-"])
def test_removing_a_database_with_closed_streams_or_few_letters_works(tmp_path: Path, streams: str):
    program = ("/bin/sh", "-c", f'exec "$0" "$@" {streams}', sys.executable, "-m", "mercato.embedded_postgres")
    ended = subprocess.run(
        [*program, "--remove", str(tmp_path / "größe")], cwd=ROOT, capture_output=True, text=True,
        env={**clean_environment(), "PYTHONIOENCODING": "ascii"}, check=False,
    )  # fmt: skip

    assert (ended.returncode, ended.stderr) == (0, "")
    assert ("gr\\xf6\\xdfe has no database" in ended.stdout) == (streams != ">&-")


@pytest.mark.parametrize("command", [["--help"], ["openapi"], ["up", "--data", "/no/such/folder", "--port", "0"]])
def test_output_that_cannot_be_written_is_one_sentence(command: list[str]):
    with open("/dev/full", "wb") as full:
        ended = subprocess.run(
            [*COMMAND, *command], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True,
            env=clean_environment(), check=False,
        )  # fmt: skip

    assert ended.returncode == 1
    assert ended.stderr.startswith("mercato: ")
    assert ended.stderr.count("\n") == 1, ended.stderr


@pytest.mark.long
def test_a_stream_without_the_letters_of_a_name_shows_escapes():
    with data_folder() as folder:
        data = folder.with_name("größe")
        environment = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
        try:
            shop = Process(data, as_json=False, environment=environment, command=COMMAND)
            with shop, shop.ready().caller() as caller:
                assert shop.has_line("gr\\xf6\\xdfe"), shop.output
                body = {"name": "Zoë", "email": "zoe@example.com", "password": "a long enough password"}
                assert caller.post("/register", body).status == 201
                listed = subprocess.run(
                    [*COMMAND, "users", "list", "--data", str(data)], cwd=ROOT, capture_output=True, text=True,
                    env={**clean_environment(), **environment}, check=False,
                )  # fmt: skip
                assert listed.returncode == 0, listed.stderr
                assert "Zo\\xeb" in listed.stdout
                shop.stop()
        finally:
            if data.exists():
                data.rename(folder)


def test_a_path_that_is_no_text_is_refused_with_a_sentence():
    with data_folder() as folder:
        data = Path(os.fsdecode(os.fsencode(folder.parent) + b"/caf\xe9"))
        with Process(data) as shop:
            assert "caf\\xe9 is not text in the encoding utf-8 of this system: rename" in shop.refusal()
        assert not data.exists()


@contextlib.contextmanager
def on_a_terminal(data: Path, *command: str) -> Generator[tuple[subprocess.Popen[bytes], Window]]:
    """A command that leads the session of a terminal, and the other end of that."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*command, "up", "--data", str(data), "--port", "0"], cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs,
        env={**clean_environment(), "MERCATO_LOG_LEVEL": "debug"},
        start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(theirs)
    window = Window(ours)
    try:
        yield process, window
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(BOUND_SECONDS)
        window.close()


class Window:
    """The other end of a terminal, which shows what is written to it until it is closed."""

    def __init__(self, terminal: int) -> None:
        self._terminal = terminal
        self._is_closed = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        # Never in a read that blocks, which would keep the terminal open.
        while not self._is_closed.is_set():
            if select.select([self._terminal], [], [], POLL_SECONDS)[0]:
                with contextlib.suppress(OSError):
                    os.read(self._terminal, 4096)
        os.close(self._terminal)

    def close(self) -> None:
        """What the window of a terminal does when it is closed. May be called again."""
        self._is_closed.set()
        self._reader.join(BOUND_SECONDS)


def is_free(data: Path) -> bool:
    """Whether nothing of a shop is left on this folder."""
    with contextlib.suppress(DataFolderBusy):
        DataFolder.open(data, "(a test)").close()
        return not processes.serving(cluster_of(data))
    return False


def test_a_terminal_that_goes_away_stops_the_shop(data: Path, tmp_path: Path):
    code = tmp_path / "code"
    # A shell gets the signal when its terminal is closed, and hands it on to what it runs.
    script = f'trap "kill -HUP \\$!" HUP; "$0" "$@" & wait $!; wait $!; echo $? > {code}'
    leader = ("/bin/sh", "-c", script, *COMMAND)
    with on_a_terminal(data, *leader) as (process, window):
        url_of(data)
        window.close()

        process.wait(BOUND_SECONDS)
        wait_until(lambda: is_free(data), BOUND_SECONDS)
    assert code.read_text() == "0\n"


def test_a_shop_that_outlives_its_terminal_goes_on(data: Path):
    """Under nohup, as it is then: everything that it would say fails."""
    outlives = ("/bin/sh", "-c", 'trap "" HUP; exec "$0" "$@"', *COMMAND)
    with on_a_terminal(data, *outlives) as (process, window):
        url = url_of(data)
        window.close()
        with Caller(url) as caller:
            for _ in range(20):
                assert caller.order().status == 201
                assert caller.get("/no/such/page").status == 404
        process.terminate()
        assert process.wait(BOUND_SECONDS) == 0
        wait_until(lambda: is_free(data), BOUND_SECONDS)
