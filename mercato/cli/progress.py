"""The output of a long command: lines for people, or one JSON object a line for programs."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from mercato.cli import streams


class Progress:
    """Prints the steps of a command on standard output."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._dims = is_coloured()
        self._started = time.monotonic()

    def step(self, line: str) -> None:
        """Prints that a step has begun, or is done."""
        if self._as_json:
            self.event("progress", message=line)
        else:
            seconds = f"{time.monotonic() - self._started:5.1f} s"
            self.say(f"\033[2m{seconds}\033[0m  {line}" if self._dims else f"{seconds}  {line}")

    def event(self, kind: str, **values: Any) -> None:
        """For programs only."""
        if self._as_json:
            say(json.dumps({"event": kind, **values}))

    def say(self, text: str = "") -> None:
        """For people only."""
        if not self._as_json:
            say(text)


class OutputFailed(Exception):
    """The result of a command cannot be written. `is_closed`: its reader has left, as in `... | head -1`."""

    def __init__(self, cause: OSError) -> None:
        self.is_closed = isinstance(cause, BrokenPipeError)
        super().__init__(f"standard output cannot be written: {cause.strerror}")


def is_coloured() -> bool:
    """Whether the result of a command may have colours: it is shown at a terminal, and NO_COLOR is not set."""
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


def show(line: str) -> None:
    """Prints a line of the result of a command. Raises `OutputFailed`, which ends the command."""
    try:
        print(line, flush=True)
    except OSError as error:
        streams.discard_output()
        raise OutputFailed(error) from error


def table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The lines of a table, whose first row is its heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def note(line: str) -> None:
    """Prints a line for people on standard error, besides the result of a command."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def fail(message: str) -> None:
    """Prints the one sentence, on one line, with which a command that has failed ends."""
    note(f"mercato: {' '.join(message.split())}")


def say(line: str) -> None:
    """Prints a line about the work of a command, which continues even if the line cannot be written."""
    try:
        print(line, flush=True)
    except OSError:
        # A reader that has left (`mercato up | head -1`), or a log on a full disk, must not end a shop.
        streams.discard_output()
