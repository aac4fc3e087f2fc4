"""What a long command tells while it works: a line for people, a JSON object a line for programs."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from rich.console import Console


class Progress:
    """Tells the steps of a command on standard output."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._started = time.monotonic()

    def step(self, line: str) -> None:
        """Something that may take a moment has begun, or is done."""
        if self._as_json:
            self.event("progress", message=line)
        else:
            seconds = time.monotonic() - self._started
            self._console.print(f"[dim]{seconds:5.1f} s[/dim]  {_escaped(line)}")

    def event(self, kind: str, **values: Any) -> None:
        """For programs only."""
        if self._as_json:
            print(json.dumps({"event": kind, **values}), flush=True)

    def say(self, text: str = "") -> None:
        """For people only."""
        if not self._as_json:
            self._console.print(_escaped(text))


def fail(message: str) -> None:
    """The one sentence with which a command ends that could not do its work."""
    print(f"mercato: {message}", file=sys.stderr, flush=True)


def _escaped(text: str) -> str:
    return text.replace("[", "\\[")
