"""What a long command tells while it works: a line for people, a JSON object a line for programs."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


class Progress:
    """Tells the steps of a command on standard output."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._dims = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        self._started = time.monotonic()

    def step(self, line: str) -> None:
        """Something that may take a moment has begun, or is done."""
        if self._as_json:
            self.event("progress", message=line)
        else:
            seconds = f"{time.monotonic() - self._started:5.1f} s"
            self.say(f"\033[2m{seconds}\033[0m  {line}" if self._dims else f"{seconds}  {line}")

    def event(self, kind: str, **values: Any) -> None:
        """For programs only."""
        if self._as_json:
            _print(json.dumps({"event": kind, **values}))

    def say(self, text: str = "") -> None:
        """For people only."""
        if not self._as_json:
            _print(text)


def fail(message: str) -> None:
    """The one sentence, on one line, with which a command ends that could not do its work."""
    print(f"mercato: {' '.join(message.split())}", file=sys.stderr, flush=True)


def _print(line: str) -> None:
    try:
        print(line, flush=True)
    except OSError:
        # A reader that went away (`mercato up | head -1`), or a log on a full disk, is no reason to end a shop. What is
        # in the buffer would be tried again for ever, the last time at the end of the process, which would then fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
