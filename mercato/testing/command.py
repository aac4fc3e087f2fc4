"""`mercato` in processes of its own that are forked from one that has imported it.

An interpreter needs half a second of CPU to import what a command uses, and the tests start hundreds of commands. So
the first command of a test run starts a fork server of `multiprocessing`, which imports the package and does nothing
else. Each command is a fork of it, with the arguments, environment, folder, standard streams and session of an
interpreter that a shell starts. What depends on the start of the interpreter itself, such as the encoding of its
streams, is tested with `COMMAND`.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import wait
from pathlib import Path
from typing import IO, Any, Final, Self

from .waiting import BOUND_SECONDS

ROOT: Final = Path(__file__).parents[2]
COMMAND: Final = (sys.executable, "-m", "mercato.cli")
"""The command as a shell starts it."""

_FORKS: Final = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["mercato.testing.preloaded"])


def clean_environment() -> dict[str, str]:
    """The environment of this process without settings of Mercato, with the package and the tests of this checkout."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MERCATO_", "PG"))}
    return {**kept, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))), "PYTHONUNBUFFERED": "1"}


class Command:
    """A run of `mercato` that leads a session of its own. Its names are those of the `Popen` of Python."""

    def __init__(
        self,
        arguments: Sequence[str | os.PathLike[str]],
        *,
        environment: Mapping[str, str],
        has_input: bool = False,
        first: Callable[[], object] | None = None,
    ) -> None:
        """`environment` is all of it, but what an interpreter reads at its start: a test of that needs `COMMAND`.

        Without `has_input` the standard input is empty.

        `first` is what the process does before it is the command. It is sent there: no lambda, no local function.
        """
        ours = clean_environment()
        read = [name for name, value in environment.items() if name.startswith("PYTHON") and ours.get(name) != value]
        assert not read, f"a fork does not read {', '.join(read)}: start an interpreter (COMMAND)"
        (in_end, given), (out, out_end), (err, err_end) = (_FORKS.Pipe(duplex=False) for _ in range(3))
        run = [os.fspath(argument) for argument in arguments], dict(environment), (in_end, out_end, err_end), first
        self._process = _FORKS.Process(target=_run, args=run, daemon=True)
        self._lock = threading.Lock()
        with in_end, out_end, err_end:
            self._process.start()
        assert self._process.pid is not None, "it has started"
        self.pid: int = self._process.pid
        self.stdin, self.stdout, self.stderr = _opened(given, "w"), _opened(out, "r"), _opened(err, "r")
        if not has_input:
            self.stdin.close()

    @property
    def returncode(self) -> int | None:
        """None while it runs; the number of the signal, negative, if a signal has ended it."""
        return self.poll()

    def poll(self) -> int | None:
        with self._lock:  # multiprocessing reads the exit code once, from a pipe
            return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code. Raises `TimeoutExpired`."""
        wait([self._process.sentinel], timeout)
        if (code := self.poll()) is None:
            raise subprocess.TimeoutExpired("mercato", timeout or 0.0)
        return code

    def communicate(self, timeout: float = BOUND_SECONDS) -> tuple[str, str]:
        """Its output and its errors, when it has ended. It is killed after `timeout`: `TimeoutExpired`."""
        with ThreadPoolExecutor(2) as readers:
            output, errors = (readers.submit(stream.read) for stream in (self.stdout, self.stderr))
            try:
                self.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill()
                raise
            both = output.result(timeout), errors.result(timeout)
        self._close_streams()
        return both

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _close_streams(self) -> None:
        for stream in (self.stdin, self.stdout, self.stderr):
            with contextlib.suppress(BrokenPipeError):
                stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Ends it, if it runs."""
        self.kill()
        self.wait()
        self._close_streams()


def run_command(
    *arguments: str | os.PathLike[str],
    environment: Mapping[str, str] | None = None,
    entered: str = "",
    first: Callable[[], object] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end, in a clean environment with what `environment` adds; `entered` is its input."""
    variables = {**clean_environment(), **(environment or {})}
    with Command(arguments, environment=variables, has_input=True, first=first) as command:
        with contextlib.suppress(BrokenPipeError), command.stdin:
            command.stdin.write(entered)
        output, errors = command.communicate()
        return subprocess.CompletedProcess(["mercato", *arguments], command.wait(), output, errors)


def _opened(end: Any, mode: str) -> IO[str]:
    with end:
        return open(os.dup(end.fileno()), mode, encoding="utf-8")


def _run(
    arguments: list[str],
    environment: dict[str, str],
    streams: tuple[Any, Any, Any],
    first: Callable[[], object] | None,
) -> None:
    """Makes a fork the command."""
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream.fileno(), number)
        stream.close()
    os.chdir("/")
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["mercato", *arguments]
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  # for as long as the process lives
    sys.stdout = open(1, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115
    if first is not None:
        first()
    from mercato.cli import main

    main()
