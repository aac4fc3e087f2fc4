"""One worker process of `mercato up --workers N`. See `workers.py`, which starts it.

It imports the services last (`serving.py`): that takes a while, and an owner that dies meanwhile must be noticed.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NoReturn

if TYPE_CHECKING:
    from asyncio.subprocess import Process

LAST_SECONDS: Final = 4.0
"""An orphan that has not stopped after this is ended, whatever it is doing."""

STOP: Final = b"stop\n"
"""What the owner writes before it closes the pipe to ask a process to stop."""

REMOVALS: Final = 100
"""Tries to remove a folder in which other processes, or threads of this one, may still make files as they begin."""


def ask_to_stop(process: Process) -> None:
    """Asks a process with an `OwnerWatch` to stop; called by its owner. Again, or after its end, it does nothing."""
    assert process.stdin is not None
    if not process.stdin.is_closing():
        process.stdin.write(STOP)
        process.stdin.close()


class OwnerWatch:
    """The pipe from the owner. Its end means that the owner asks to stop, or, without `STOP` before it, has died.

    (The parent of this process does not tell: a process that dies closes its pipes before it stops being the parent.)
    `metrics` is a folder of the owner, which is removed if the owner has died.
    """

    def __init__(self, metrics: str | None = None) -> None:
        self._metrics = metrics
        self._is_asked = False
        self._has_ended = False
        self._lock = threading.Lock()
        self._listener: Callable[[], None] | None = None

    def assignment(self) -> bytes:
        """The first line, for which it waits; empty if the owner has none left to give, or has died."""
        with open(0, "rb", buffering=0, closefd=False) as pipe:  # what follows the line is left in the pipe
            line = pipe.readline()
        if line in (b"", STOP):
            self._is_asked, self._has_ended = bool(line), True
            return b""
        return line

    def follow(self) -> None:
        """Begins to wait for the end. Without a listener there is no work to finish: it ends the process."""
        # In its own thread: the end of the owner must be noticed even if the event loop is busy.
        threading.Thread(target=self._wait, daemon=True).start()

    def on_end(self, listener: Callable[[], None]) -> None:
        """From now on the end calls `listener`, in another thread; after `LAST_SECONDS` the process is ended."""
        with self._lock:
            self._listener = listener

    def _wait(self) -> None:
        read = b""
        while part := os.read(0, len(STOP)):  # not through `sys.stdin`, whose lock the interpreter needs when it ends
            read += part
        self._is_asked, self._has_ended = read == STOP, True
        with self._lock:
            if self._listener is None:
                self._leave()
            self._listener()
        threading.Event().wait(LAST_SECONDS)
        self._leave()

    def clean_up(self) -> None:
        """Removes the folder of metrics if the owner, which otherwise removes it, has died."""
        if self._metrics is None or not self._has_ended or self._is_asked:
            return
        for _ in range(REMOVALS):
            shutil.rmtree(self._metrics, ignore_errors=True)
            if not os.path.exists(self._metrics):
                return

    def _leave(self) -> NoReturn:
        self.clean_up()
        os._exit(1)


def main() -> None:
    """Serves until the owner closes the pipe; exits with 1, after a sentence, when it cannot begin."""
    owner_watch = OwnerWatch(metrics=sys.argv[1])
    assignment = owner_watch.assignment()
    if not assignment:
        owner_watch.clean_up()
        sys.exit(1)
    owner_watch.follow()
    from mercato.cli import serving

    try:
        code = serving.run(assignment, owner_watch)
    finally:
        owner_watch.clean_up()
    sys.exit(code)


if __name__ == "__main__":
    main()
