"""Being asked to stop - Ctrl-C, SIGTERM, a terminal that closes - at any moment in the life of a command.

At first nothing is started, and the process leaves at once (`leave_at_once`). A command that has something to undo is
told instead (`tell`). At its very end, requests change nothing any more (`ignore`): a second Ctrl-C is harmless.

The handlers are Python's own and not those of an event loop, which end with the loop: between that and the end of the
process, a Ctrl-C would print a traceback.
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
    """That of a command which was asked to stop before it had done its work: as shells have it."""
    return 128 + number


def leave_at_once() -> None:
    """For as long as nothing is started that would have to be ended."""
    _handle(_leave)


def tell(listener: Callable[[int], None]) -> None:
    """From now on `listener` hears each request, with the signal's number, in the main thread."""

    def handler(number: int, _frame: FrameType | None) -> None:
        listener(number)

    _handle(handler)


def ignore() -> None:
    """The command is at its end already."""
    _handle(signal.SIG_IGN)


def _handle(handler: Any) -> None:
    for number in REQUESTS:
        # Under nohup, and only there, a closed terminal is no request.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def _leave(number: int, _frame: FrameType | None) -> NoReturn:
    # An exception would come out in the middle of some import, where anybody may catch it.
    with contextlib.suppress(OSError):  # a terminal that is gone
        os.write(2, f"mercato: {SENTENCE}\n".encode())
    os._exit(exit_code(number))
