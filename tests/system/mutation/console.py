"""What a command prints while it runs, and how it is stopped."""

from __future__ import annotations

import asyncio
import shutil
import signal
import sys
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def interruptible(work: Coroutine[Any, Any, T]) -> T:
    """SIGTERM ends it as Ctrl-C does: with nothing left behind."""
    task = asyncio.ensure_future(work)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await task


class Console:
    """A line for what is done; below it, on a terminal, what goes on. With `as_json` the result alone is printed."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.draws = sys.stderr.isatty()
        self.going: dict[int, str] = {}
        """What goes on, by number."""

    def draw(self) -> None:
        self.now("  ".join(self.going.values()))

    def now(self, text: str) -> None:
        """Draws what goes on, over what went on before."""
        if self.draws:
            width = shutil.get_terminal_size().columns
            print(f"\r\033[K{text[: width - 1]}", end="", file=sys.stderr, flush=True)

    def line(self, text: str) -> None:
        self.now("")
        if not self.as_json:
            print(text, flush=True)
