"""What a long command tells while it works: a line for people, a JSON object a line for programs."""

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
            say(json.dumps({"event": kind, **values}))

    def say(self, text: str = "") -> None:
        """For people only."""
        if not self._as_json:
            say(text)


class OutputFailed(Exception):
    """What a command was asked for cannot be written any more. `is_closed`: nobody reads it, as behind `head -1`."""

    def __init__(self, cause: OSError) -> None:
        self.is_closed = isinstance(cause, BrokenPipeError)
        super().__init__(f"standard output cannot be written: {cause.strerror}")


def show(line: str) -> None:
    """A line of what a command was asked for. Raises `OutputFailed`: without a reader there is nothing left to do."""
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
    """A line for people on standard error, beside what a command was asked for."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def fail(message: str) -> None:
    """The one sentence, on one line, with which a command ends that could not do its work."""
    note(f"mercato: {' '.join(message.split())}")


def say(line: str) -> None:
    """A line about what is done, which is done all the same where nobody can read it."""
    try:
        print(line, flush=True)
    except OSError:
        # A reader that went away (`mercato up | head -1`), or a log on a full disk, is no reason to end a shop.
        streams.discard_output()
