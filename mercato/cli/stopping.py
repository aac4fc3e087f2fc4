"""Requests to stop (Ctrl-C, SIGTERM, a terminal that closes) at any moment of a command.

Before a command has started anything, the process ends at once (`leave_at_once`). A command that has something to undo
gets a notification instead (`notify`). At its very end it ignores requests (`ignore`): a second Ctrl-C is harmless.

The handlers are Python's own and not those of an event loop, which end with the loop: a Ctrl-C between that and the end
of the process would print a traceback.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any, Final, NoReturn

REQUESTS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SENTENCE: Final = "stopped before it was ready"


def exit_code(number: int) -> int:
    """The exit code of a command that a signal stopped before it had done its work, by the convention of shells."""
    return 128 + number


def leave_at_once() -> None:
    """From now on a request ends the process at once: the command has started nothing that it would have to stop."""
    _handle(_leave)


def notify(listener: Callable[[int], None]) -> None:
    """From now on `listener` is called for each request, with the signal's number, in the main thread."""

    def handler(number: int, _frame: FrameType | None) -> None:
        listener(number)

    _handle(handler)


def ignore() -> None:
    """From now on requests are ignored: the command is already ending."""
    _handle(signal.SIG_IGN)


def _handle(handler: Any) -> None:
    for number in REQUESTS:
        # Under nohup, a closed terminal is no request.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def _leave(number: int, _frame: FrameType | None) -> NoReturn:
    # An exception would be raised in the middle of an import, where any code may catch it.
    with contextlib.suppress(OSError):  # a terminal that is gone
        os.write(2, f"mercato: {SENTENCE}\n".encode())
    os._exit(exit_code(number))
