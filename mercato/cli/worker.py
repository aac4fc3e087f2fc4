"""One worker process of `mercato up --workers N`. See `workers.py`, which starts it.

It imports the services last (`serving.py`): that takes a while, and an owner that dies meanwhile must be noticed.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Callable
from typing import Final, NoReturn

LAST_SECONDS: Final = 4.0
"""An orphan that has not stopped after this is ended, whatever it is doing."""


class OwnerWatch:
    """The pipe from the owner. Its end means that the owner asks to stop, or that it died.

    `metrics` is a folder of the owner, which is removed if the owner has died.
    """

    def __init__(self, owner: int, metrics: str | None = None) -> None:
        self._owner = owner
        self._metrics = metrics
        self._lock = threading.Lock()
        self._listener: Callable[[], None] | None = None

    def follow(self) -> None:
        """Begins to wait for the end. Without a listener there is no work to finish: it ends the process."""
        # In its own thread: the end of the owner must be noticed even if the event loop is busy.
        threading.Thread(target=self._wait, daemon=True).start()

    def on_end(self, listener: Callable[[], None]) -> None:
        """From now on the end calls `listener`, in another thread; after `LAST_SECONDS` the process is ended."""
        with self._lock:
            self._listener = listener

    def _wait(self) -> None:
        while os.read(0, 1):  # not through `sys.stdin`, whose lock the interpreter needs when it ends
            pass
        with self._lock:
            if self._listener is None:
                self._leave()
            self._listener()
        threading.Event().wait(LAST_SECONDS)
        self._leave()

    def clean_up(self) -> None:
        """Removes the folder of metrics if the owner, which otherwise removes it, has died."""
        if self._metrics is not None and os.getppid() != self._owner:
            shutil.rmtree(self._metrics, ignore_errors=True)

    def _leave(self) -> NoReturn:
        self.clean_up()
        os._exit(1)


def main() -> None:
    """Serves until the owner closes the pipe; exits with 1, after a sentence, when it cannot begin."""
    owner_watch = OwnerWatch(owner=int(sys.argv[1]), metrics=sys.argv[2])
    assignment = sys.stdin.buffer.readline()
    owner_watch.follow()
    from mercato.cli import serving

    try:
        code = serving.run(assignment, owner_watch)
    finally:
        owner_watch.clean_up()
    sys.exit(code)


if __name__ == "__main__":
    main()
