"""The real command in a process of its own, as users run it, and all its child processes.

A `Process` is one run of `mercato up`. It knows all processes that the run has started (`tree`), and at the end of its
`with` block none of them is running, whatever the test did.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self

import msgspec

from mercato.chassis.hosting.keys import key_deriver
from mercato.embedded_postgres import processes

from .caller import Caller
from .command import Command, clean_environment
from .waiting import BOUND_SECONDS, POLL_SECONDS, wait_until

GONE_SECONDS: Final = 60.0
"""A bound for a busy machine. On an idle one all processes end within five seconds of a stop or a `kill -9`."""

RUN_FOLDER: Final = "MERCATO_TEST_FOLDER"
"""The variable with the folder that the processes of a test run share. `tests/conftest.py` makes and removes it."""

Identity = processes.ServerProcess


class Tree(msgspec.Struct, frozen=True):
    """The processes of one `mercato up` at one moment."""

    owner: Identity
    guard: Identity | None
    postmaster: Identity | None
    backends: tuple[Identity, ...]
    workers: tuple[Identity, ...]
    instances: Mapping[str, Identity]
    """The instances of a split shop, by their names."""
    others: tuple[Identity, ...]

    @property
    def all(self) -> tuple[Identity, ...]:
        named = (self.owner, self.guard, self.postmaster)
        return (*(p for p in named if p), *self.backends, *self.workers, *self.instances.values(), *self.others)


class Process:
    """A run of `mercato up --data DATA --port 0`. Use it as a context manager."""

    def __init__(
        self,
        data: Path,
        *options: str,
        as_json: bool = True,
        environment: Mapping[str, str] | None = None,
        command: Sequence[str] | None = None,
        port: int = 0,
        is_second: bool = False,
        has_input: bool = False,
        first: Callable[[], object] | None = None,
    ) -> None:
        """`command`: what starts `mercato`; by default it is forked, and `first` is called there (`command.py`).

        `is_second`: another run serves this data, so the processes of its database do not count for this run.

        `has_input`: the command reads what `write_line` writes; otherwise its standard input is empty.
        """
        assert command is None or first is None, "only a fork calls `first`"
        self.data = data
        self._is_second = is_second
        self.url = ""
        self.lines: list[str] = []
        self.errors: list[str] = []
        self._seen: set[Identity] = set()
        self._callers: list[Caller] = []
        self._progress = threading.Condition()
        arguments = ["up", "--port", str(port), "--data", str(data), *(["--json"] if as_json else []), *options]
        variables = {**clean_environment(), **(environment or {})}
        self._popen = (
            Command(arguments, environment=variables, has_input=has_input, first=first)
            if command is None
            else subprocess.Popen(
                [*command, *arguments],
                stdin=subprocess.PIPE if has_input else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd="/",
                env=variables,
                start_new_session=True,
            )
        )
        self.pid = self._popen.pid
        self._readers = [
            threading.Thread(target=self._read, args=(self._popen.stdout, self.lines), daemon=True),
            threading.Thread(target=self._read, args=(self._popen.stderr, self.errors), daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, stream: Any, into: list[str]) -> None:
        for line in stream:
            with self._progress:
                into.append(line.rstrip("\n"))
                self._progress.notify_all()

    # ------------------------------------------------------------------------------------------------------ its start

    def ready(self) -> Self:
        """Waits until the command says that it is ready."""
        self.wait_for(lambda: self._find_url() is not None, "ready")
        self.url = self._find_url() or ""
        self.tree()
        return self

    def wait_for_line(self, words: str) -> None:
        """Waits for a line of standard output with these words."""
        self.wait_for(lambda: self.has_line(words), words)

    def write_line(self, line: str) -> None:
        """Writes a line to its standard input; does nothing after the process has ended."""
        assert self._popen.stdin is not None, "it was started without an input"
        with contextlib.suppress(BrokenPipeError):
            self._popen.stdin.write(line + "\n")
            self._popen.stdin.flush()

    def has_line(self, words: str) -> bool:
        return any(words in line for line in self.lines)

    def count_lines(self, words: str) -> int:
        return sum(words in line for line in self.lines)

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + BOUND_SECONDS
        while not condition():
            # Checked before the condition: the last lines may be read after the end.
            ended = not self.is_running and not any(reader.is_alive() for reader in self._readers)
            assert condition() or (not ended and time.monotonic() < end), f"{what!r} did not come: {self.output}"
            with self._progress:
                self._progress.wait(POLL_SECONDS)

    def _find_url(self) -> str | None:
        for line in reversed(self.lines):
            if line.startswith("ready "):
                return line.removeprefix("ready ")
            if line.startswith("{") and (event := json.loads(line))["event"] == "ready":
                return event["url"]
        return None

    @property
    def events(self) -> list[dict[str, Any]]:
        """The events that `--json` has printed; fails for a line that is not an object."""
        return [dict(json.loads(line)) for line in self.lines]

    @property
    def output(self) -> str:
        return "\n".join([*self.lines, *self.errors])

    @property
    def complaints(self) -> list[str]:
        """The lines for users on standard error: all but the logs."""
        return [line for line in self.errors if not line.startswith("{")]

    def caller(self, token: str | None = None) -> Caller:
        """A client of this shop with a connection of its own, which is closed at the end of this run at the latest."""
        self._callers.append(Caller(self.url, token))
        return self._callers[-1]

    # ---------------------------------------------------------------------------------------------- its processes

    def tree(self) -> Tree:
        """All processes of this run at this moment."""
        table = process_table()
        below = list(_descendants(self.pid, table))
        serving = [process.pid for process in processes.serving(cluster_of(self.data))]
        guards = [pid for pid in below if "guard.py" in command_line(pid) and table.get(pid) == self.pid]
        of_nats = {table.get(pid) for pid in below if "nats-server" in command_line(pid)}
        guard = next((pid for pid in guards if pid not in of_nats), None)
        postmaster = next((pid for pid in serving if guard is not None and table.get(pid) == guard), None)
        workers = [pid for pid in below if "mercato.cli.worker" in command_line(pid)]
        instances = {command_line(pid).split()[-1]: pid for pid in below if "mercato.cli.instance" in command_line(pid)}
        backends = [pid for pid in serving if pid != postmaster]
        named = {self.pid, guard, postmaster, *workers, *instances.values(), *backends}
        tree = Tree(
            owner=_identity(self.pid),
            guard=_identity(guard) if guard is not None else None,
            postmaster=_identity(postmaster) if postmaster is not None else None,
            backends=_alive(backends),
            workers=_alive(workers),
            instances={name: found for name, pid in instances.items() for found in _alive([pid])},
            others=_alive(pid for pid in below if pid not in named),
        )
        self._seen.update(tree.all)
        return tree

    @property
    def is_running(self) -> bool:
        return self._popen.poll() is None

    @property
    def left(self) -> list[Identity]:
        """The running processes among all that `tree` has seen of this run, and those that serve its database."""
        alive = [p for p in self._seen if p.pid != self.pid and processes.process_at(p.pid) == p]
        if self._popen.poll() is None:
            alive.append(_identity(self.pid))
        return list({*alive, *([] if self._is_second else processes.serving(cluster_of(self.data)))})

    def assert_gone(self) -> None:
        """Waits until no process is left."""
        wait_until(lambda: not self.left, GONE_SECONDS, lambda: f"left: {[describe(p) for p in self.left]}")

    # -------------------------------------------------------------------------------------------------------- its end

    def signal(self, number: signal.Signals) -> None:
        self._popen.send_signal(number)

    def interrupt(self) -> None:
        """Ctrl-C."""
        self.signal(signal.SIGINT)

    def kill(self, process: Identity | None = None) -> None:
        """`kill -9` of a process, by default of the owner."""
        self.tree()
        processes.send(process or _identity(self.pid), signal.SIGKILL)

    def exit_code(self, seconds: float = GONE_SECONDS) -> int:
        """Waits for the end; all its output is in `lines` and `errors` then."""
        try:
            code = self._popen.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s: {self.output}") from None
        for reader in self._readers:
            reader.join(GONE_SECONDS)
        return code

    def refusal(self) -> str:
        """Waits for a refused start: exit code 1, one sentence, no traceback, no process left. Gives the sentence."""
        assert self.exit_code(BOUND_SECONDS) == 1, self.output
        assert len(self.complaints) == 1, self.output
        assert self.complaints[0].startswith("mercato: "), self.output
        assert not self.left
        return self.complaints[0].removeprefix("mercato: ")

    def stop(self) -> None:
        """Stops it: SIGTERM, exit code 0, no complaint, no process left."""
        self.signal(signal.SIGTERM)
        code = self.exit_code()
        assert code == 0, self.output
        assert self.complaints == [], self.output
        self.assert_gone()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._popen.poll() is None:
            self.tree()
            self._popen.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(2 * GONE_SECONDS)
        for process in self.left:  # only after a failure of the product
            processes.send(process, signal.SIGKILL)
        self._popen.wait()
        for caller in self._callers:
            caller.connection.close()
        for reader in self._readers:
            reader.join(GONE_SECONDS)
        for stream in (self._popen.stdin, self._popen.stdout, self._popen.stderr):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()

    # ---------------------------------------------------------------------------------------------------- its database

    def dsn(self, service: str) -> str:
        """The DSN of the database of a service, for the administrator."""
        return self._dsn(f"mercato_{service}")

    @property
    def admin_dsn(self) -> str:
        """The DSN of the server."""
        return self._dsn("postgres")

    def _dsn(self, database: str) -> str:
        password = key_deriver((self.data / "secret").read_bytes())("postgres/superuser").hex()
        where = urllib.parse.urlencode({"host": str(socket_folder_of(self.data)), "port": 5432})
        return f"postgresql://mercato:{password}@/{database}?{where}"


class SharedProcess:
    """Runs one shop for many tests: the start after the crash of one test serves the next test."""

    def __init__(self, data: Path) -> None:
        self._data = data
        self._wanted: tuple[tuple[str, ...], Mapping[str, str]] = ((), {})
        self._shop: Process | None = None

    def shop(self, *options: str, **environment: str) -> Process:
        """A shop with these options: the running one where it has them, else a new one."""
        wanted = (options, environment)
        if self._shop is None or self._wanted != wanted or not self._shop.is_running:
            self.end()
            self._shop, self._wanted = Process(self._data, *options, environment=environment), wanted
            self._shop.ready()
        return self._shop

    def stop(self) -> None:
        """Stops it, and asserts how it ends."""
        if self._shop is not None and self._shop.is_running:
            self._shop.stop()

    def end(self) -> None:
        """Ends it in any case; it may have ended already."""
        if self._shop is not None:
            with self._shop:
                self._shop = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


# ------------------------------------------------------------------------------------------------------------- folders


@contextlib.contextmanager
def data_folder(parent: Path | None = None) -> Generator[Path]:
    """A path for the data of a shop, which does not exist yet. At the end the product's tool removes its database."""
    folder = Path(tempfile.mkdtemp(prefix="mercato-test-", dir=parent))
    try:
        yield folder / "data"
    finally:
        remove(folder / "data")
        shutil.rmtree(folder)


@contextlib.contextmanager
def used_folder() -> Generator[Path]:
    """As `data_folder`, with the data of a shop that was started once, with the demo data, and stopped.

    All of a test run copy the one that the first of them makes (`RUN_FOLDER`): a first start makes a database and
    migrates seven, and a second one takes a third of its CPU.
    """
    with folder_of_run("shop") as made:
        if not made.exists():
            with Process(made.with_name("making")) as shop:
                shop.ready()
                shop.stop()
            shop.data.rename(made)
    with data_folder() as data:
        if not (made / "postgres").is_symlink():  # else the database is elsewhere, and of that folder alone
            data.parent.chmod(0o755)  # for the account that PostgreSQL runs as where tests are root's
            copy_folder(made, data)
        yield data


@contextlib.contextmanager
def folder_of_run(name: str) -> Generator[Path]:
    """A folder that all tests of a run copy: the first of them makes it in the block, and others wait."""
    made = Path(os.environ[RUN_FOLDER]) / name
    with made.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield made


def copy_folder(folder: Path, to: Path) -> None:
    """Copies it with its accounts, modes and times."""
    subprocess.run(["cp", "-a", str(folder), str(to)], check=True, capture_output=True)


def remove(data: Path) -> None:
    """Removes the database of a shop, as the documentation says."""
    subprocess.run(
        [sys.executable, "-m", "mercato.embedded_postgres", "--remove", str(data)],
        check=True,
        capture_output=True,
        env=clean_environment(),
    )


def cluster_of(data: Path) -> Path:
    """The folder of the database, behind its link."""
    return Path(os.path.realpath(data / "postgres"))


def socket_folder_of(data: Path) -> Path:
    record = json.loads((data / "postgres.json").read_bytes())
    return Path(record.get("socket_folder") or cluster_of(data).parent / "socket")


# ----------------------------------------------------------------------------------------------------------- processes


def process_table() -> dict[int, int]:
    """The parent of each process."""
    table: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                stat = Path(f"/proc/{entry}/stat").read_text()
                table[int(entry)] = int(stat.rpartition(")")[2].split()[1])
    return table


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def describe(process: Identity) -> str:
    return f"{process.pid} {command_line(process.pid)}"


def _descendants(pid: int, table: Mapping[int, int]) -> Iterator[int]:
    for child, parent in table.items():
        if parent == pid:
            yield child
            yield from _descendants(child, table)


def _identity(pid: int) -> Identity:
    return processes.process_at(pid) or Identity(pid, "gone")


def _alive(pids: Iterator[int] | Sequence[int]) -> tuple[Identity, ...]:
    return tuple(process for pid in pids if (process := processes.process_at(pid)) is not None)
