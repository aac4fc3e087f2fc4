"""Runs one command, and ends it when the process that started this one (the owner) ends in any way.

`python -I -S guard.py UID GID COMMAND...` (`-` `-`: as the current user). A server whose owner dies by SIGKILL would
keep running; this process, between the two, detects that:

    owner ── stdin, stdout ──► guard (own session) ──► command (own process group) ──► its children

- Standard input is a pipe from the owner. Its end means that the owner has died, or asks to stop; in both cases the
  guard sends SIGINT to the command (PostgreSQL: fast shutdown), SIGQUIT after 3 s (immediate), SIGKILL a second later.
  A line on it asks for a patient stop: the 3 s count from the last sign that a checkpoint makes progress, for at
  most half a minute. A shutdown writes a checkpoint; the next start recovers what that did not write.
- Standard output goes to the owner: `pid N` first, and last how the command ended. The command writes both its
  outputs to the standard error of the guard.
- If the guard is killed, the kernel sends SIGQUIT to the command (PR_SET_PDEATHSIG).
- If the command is killed, the guard inherits its children (PR_SET_CHILD_SUBREAPER; PostgreSQL's each have their own
  process group, so no signal to a group reaches them) and ends them before it reports the end.

The last two need Linux; elsewhere the owner cleans up when it detects that the guard or the server has ended. The exit
status is the command's, or 128 + the signal that ended it. Standard library only, one thread, small: it must start at
once, and no bug of the product may break it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

# Seconds after the request to stop, and what is then sent. The owner waits for five in all.
ESCALATION = ((0.0, signal.SIGINT), (3.0, signal.SIGQUIT), (4.0, signal.SIGKILL))
PATIENT_SECONDS = 30.0
PROGRESS_POLL_SECONDS = 0.25
CHECKPOINTER = b"postgres: checkpointer"
ORPHANS_QUIT_SECONDS = 0.3
ORPHANS_KILL_SECONDS = 0.8
OWNER_POLL_SECONDS = 1.0

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
IS_LINUX = sys.platform.startswith("linux")


class Guard:
    """The command, the pipe from the owner, and the progress of stopping."""

    def __init__(self, command: list[str], ids: tuple[int, int] | None) -> None:
        self._owner = os.getppid()
        self._stop_asked_at: float | None = None
        self._patient_until = 0.0
        self._worked_ns = 0
        self._signals_sent = 0
        self._wake = _wake_on_signals(self._ask_stop)
        self._poll = select.poll()
        self._poll.register(0, select.POLLIN)
        self._poll.register(self._wake, select.POLLIN)
        self.pid = _spawn(command, ids)

    def run(self) -> int:
        """Wait until the command has ended, by itself or by the guard; returns its wait status."""
        while (status := self._reap()) is None:
            self._escalate()
            self._wait()
        _end_orphans()
        return status

    def _ask_stop(self) -> None:
        if self._stop_asked_at is None:
            self._stop_asked_at = time.monotonic()

    def _wait(self) -> None:
        for descriptor, _ in self._poll.poll(self._patience_seconds() * 1000):
            if descriptor == self._wake:
                os.read(self._wake, 512)
            elif _read_input():
                self._ask_stop()
                self._patient_until = time.monotonic() + PATIENT_SECONDS
            else:
                self._poll.unregister(0)
                self._end_patience()
        # A process that the owner forked may keep the pipe open after the owner's death; the parent's pid shows it.
        if os.getppid() != self._owner:
            self._end_patience()

    def _end_patience(self) -> None:
        self._ask_stop()
        self._patient_until = 0.0

    def _patience_seconds(self) -> float:
        if self._stop_asked_at is None or self._signals_sent == len(ESCALATION):
            return OWNER_POLL_SECONDS
        due = max(0.0, self._stop_asked_at + ESCALATION[self._signals_sent][0] - time.monotonic())
        return min(due, PROGRESS_POLL_SECONDS) if self._patient_until else due

    def _put_off(self) -> None:
        """Restart the time until SIGQUIT if the command has made progress since the last check."""
        if self._signals_sent == 1 and time.monotonic() < self._patient_until:
            worked_ns, waits_for_disk = _work(self.pid)
            if waits_for_disk or worked_ns != self._worked_ns:
                self._stop_asked_at = time.monotonic()
            self._worked_ns = worked_ns

    def _escalate(self) -> None:
        """Send the signals that are due. The command cannot have been reaped yet, so its pid is not reused."""
        self._put_off()
        while (
            self._stop_asked_at is not None
            and self._signals_sent < len(ESCALATION)
            and time.monotonic() >= self._stop_asked_at + ESCALATION[self._signals_sent][0]
        ):
            number = ESCALATION[self._signals_sent][1]
            self._signals_sent += 1
            # To the group: a postmaster is alone in its group, but initdb has helpers there, for which it would wait.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def _reap(self) -> int | None:
        """The command's wait status, or None while it runs; also reaps other children."""
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid in (0, self.pid):
                return status if pid else None


def _wake_on_signals(ask_stop: Callable[[], None]) -> int:
    """A descriptor that becomes readable on each signal for the guard, so that one poll waits for everything."""

    def ask(_number: int, _frame: object) -> None:
        ask_stop()

    def wake_only(_number: int, _frame: object) -> None:
        """Does nothing: the signal only has to wake the poll."""

    wake, waker = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker)
    signal.signal(signal.SIGCHLD, wake_only)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, ask)
    return wake


def _read_input() -> bytes:
    try:
        return os.read(0, 512)
    except OSError:
        return b""


def _spawn(command: list[str], ids: tuple[int, int] | None) -> int:
    """Start the command as a child; returns its pid. One that cannot run says why and exits with 127."""
    libc = ctypes.CDLL(None) if IS_LINUX else None  # Loaded before the fork: the child should do little.
    if libc is not None:
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    guard = os.getpid()
    pid = os.fork()
    if pid:
        # The child does the same: whichever runs first, the group exists before it gets a signal.
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)
        return pid
    try:
        _become(command, ids, guard, libc)
    except BaseException as error:  # no traceback: the forked child writes one sentence
        os.write(2, f"FATAL:  {command[0]} cannot be run: {error}\n".encode())
    finally:
        os._exit(127)


def _become(command: list[str], ids: tuple[int, int] | None, guard: int, libc: ctypes.CDLL | None) -> None:
    os.setpgid(0, 0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    # Not the owner's pipe: a backend that outlives the guard would keep it open, and hide the guard's end.
    os.dup2(2, 1)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and what is ignored stays so over exec.
    if ids is not None:
        os.setgroups([])
        os.setgid(ids[1])
        os.setuid(ids[0])
    if libc is not None:
        # After the change of user, which clears it. And a guard that died before this line sent nothing: look.
        libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGQUIT), 0, 0, 0)
    if os.getppid() != guard:
        return
    os.execv(command[0], command)  # noqa: S606  # No shell: that is the point of a list.


def _end_orphans() -> None:
    """End the children that the guard inherited from the command: SIGQUIT first, then SIGKILL until none is left."""
    started = time.monotonic()
    sent = None
    while _has_children():
        elapsed = time.monotonic() - started
        if elapsed > ORPHANS_KILL_SECONDS:
            return
        number = signal.SIGQUIT if elapsed < ORPHANS_QUIT_SECONDS else signal.SIGKILL
        if number != sent or number == signal.SIGKILL:
            sent = number
            for pid in _children(os.getpid()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        time.sleep(0.01)


def _work(pid: int) -> tuple[int, bool]:
    """How long the checkpointer of a server has run, in nanoseconds, and whether it waits for a disk at this moment.

    It is the one process of a server that works during a shutdown; others only wake up now and then.
    """
    worked_ns, waits_for_disk = 0, False
    for each in _children(pid):
        with contextlib.suppress(OSError, IndexError, ValueError):
            with open(f"/proc/{each}/cmdline", "rb") as title:
                if not title.read().startswith(CHECKPOINTER):
                    continue
            with open(f"/proc/{each}/schedstat", "rb") as schedstat:
                worked_ns += int(schedstat.read().split()[0])
            with open(f"/proc/{each}/stat", "rb") as stat:
                waits_for_disk |= stat.read().rpartition(b")")[2].split()[0] == b"D"
    return worked_ns, waits_for_disk


def _has_children() -> bool:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def _children(parent: int) -> list[int]:
    """The children of a process, by the parent that each process's stat names (`pid (name) state parent ...`)."""
    found: list[int] = []
    for entry in os.listdir("/proc") if IS_LINUX else []:
        if entry.isdigit():
            with contextlib.suppress(OSError, IndexError), open(f"/proc/{entry}/stat", "rb") as stat:
                if int(stat.read().rpartition(b")")[2].split()[1]) == parent:
                    found.append(int(entry))
    return found


def _say(line: str) -> None:
    """Write a line to the owner, unless it has died."""
    with contextlib.suppress(OSError):
        os.write(1, line.encode() + b"\n")


def main() -> int:
    """Run the command of the arguments under guard; returns the exit status."""
    uid, gid, *command = sys.argv[1:]
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    guard = Guard(command, None if uid == "-" else (int(uid), int(gid)))
    _say(f"pid {guard.pid}")
    code = os.waitstatus_to_exitcode(guard.run())
    if code < 0:
        _say(f"was killed by {signal.Signals(-code).name}")
        return 128 - code
    _say(f"exited with code {code}")
    return code


if __name__ == "__main__":
    sys.exit(main())
