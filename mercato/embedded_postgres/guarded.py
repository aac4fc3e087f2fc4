"""The owner's end of `guard.py`: starts a command under guard, asks it to stop, and reports how it ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from asyncio.subprocess import PIPE
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mercato.embedded_postgres.folder import SupervisorError

if TYPE_CHECKING:
    from asyncio.subprocess import Process as Subprocess

    from mercato.embedded_postgres.place import Account

GUARD = Path(__file__).with_name("guard.py")
STOP_SECONDS = 4.9  # The guard's own schedule ends before: 3 s + 1 s + 0.8 s.
PATIENT_STOP_SECONDS = 35.0  # And that of a stop which may take its time: 30 s before the same.
NO_VARIABLES: Final[Mapping[str, str]] = {}


class Guarded:
    """A command that runs under guard; `pid` is the command's own."""

    def __init__(self, guard: Subprocess, pid: int) -> None:
        self.pid = pid
        self.guard_pid = guard.pid
        self._guard = guard

    @classmethod
    async def start(
        cls, command: list[str], account: Account | None, *, errors: int, variables: Mapping[str, str] = NO_VARIABLES
    ) -> Guarded:
        """Run `command` as `account` (None: the current one); its output goes to the descriptor `errors`, or to PIPE.

        `variables` are added to its environment.

        The guard detects the end of this process by the pipe of its standard input: no other process may inherit our
        end, and none does, because Python's descriptors are closed on exec.
        """
        ids = ("-", "-") if account is None else (str(account.uid), str(account.gid))
        environment = {**_environment(), **variables}
        guard = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-S", str(GUARD), *ids, *command,
            stdin=PIPE, stdout=PIPE, stderr=errors, cwd="/", env=environment, start_new_session=True,
        )  # fmt: skip
        assert guard.stdout is not None
        try:
            line = await guard.stdout.readline()
        except asyncio.CancelledError:
            await _end(guard)
            raise
        if not line.startswith(b"pid "):
            raise SupervisorError(f"{GUARD} does not run with {sys.executable}: reinstall Mercato there.")
        return cls(guard, int(line.split()[1]))

    async def ended(self) -> str:
        """Wait until the guard has ended, and the command unless the guard was killed; gives a phrase about it."""
        assert self._guard.stdout is not None
        said = (await self._guard.stdout.read()).decode().strip()
        code = await self._guard.wait()
        if said:
            return f"it {said}"
        return f"its guard was killed by {signal.Signals(-code).name}" if code < 0 else f"its guard failed with {code}"

    async def finished(self) -> tuple[bool, str]:
        """Wait for a command started with `errors=PIPE`; gives whether it succeeded, and its output.

        A cancellation ends the command first.
        """
        assert self._guard.stderr is not None
        try:
            _, output = await asyncio.gather(self.ended(), self._guard.stderr.read())
        except asyncio.CancelledError:
            await _end(self._guard)
            raise
        return self._guard.returncode == 0, output.decode(errors="replace")

    def ask_to_stop(self) -> None:
        """Let the guard stop the command, by closing its pipe, which the death of this process would also close."""
        _close(self._guard)

    def ask_to_finish(self) -> None:
        """Let the guard stop the command, which may take as long as it works, for at most `PATIENT_STOP_SECONDS`."""
        assert self._guard.stdin is not None
        # The pipe is closed if the guard has ended, for instance after its server died: there is nothing to stop.
        with contextlib.suppress(OSError, RuntimeError):
            self._guard.stdin.write(b"stop\n")

    def kill(self) -> None:
        """End the guard at once; the kernel then signals the command."""
        with contextlib.suppress(ProcessLookupError):
            self._guard.kill()


def _close(guard: Subprocess) -> None:
    assert guard.stdin is not None
    guard.stdin.close()


async def _end(guard: Subprocess) -> None:
    """Lets the guard stop the command, and waits until both have ended."""
    _close(guard)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(STOP_SECONDS):
            await guard.wait()


def _environment() -> dict[str, str]:
    """The environment without variables that PostgreSQL reads (PGPORT, PGDATA, LC_ALL, TZ, ...)."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    return {**kept, "LC_ALL": "C", "TZ": "UTC"}
