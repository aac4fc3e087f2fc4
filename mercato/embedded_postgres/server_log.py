"""What the server has written: how far its recovery is, and why it failed.

The file is private and bounded: what is longer than `BYTES_MAX` is moved to `postgres.log.1`, which is replaced.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from typing import TYPE_CHECKING, BinaryIO, Final

if TYPE_CHECKING:
    from pathlib import Path

BYTES_MAX: Final = 10 * 1024 * 1024
LOOK_SECONDS: Final = 10.0
"""How often it is looked at whether the log is too long."""
PRIVATE_MODE: Final = 0o600
SETTINGS: Final = {
    "log_destination": "stderr",
    "logging_collector": "off",
    "log_timezone": "UTC",
    # What failed, without values: no keys of rows (DETAIL), no statements, of which some hold values, no parameters.
    "log_error_verbosity": "terse",
    "log_min_error_statement": "panic",
    "log_parameter_max_length": "0",
    "log_parameter_max_length_on_error": "0",
    "log_statement": "none",
    "log_min_duration_statement": "-1",
    "log_min_duration_sample": "-1",
    "log_transaction_sample_rate": "0",
}
"""Of the server, about what it writes."""
TAIL_BYTES: Final = 64 * 1024
PROGRESS_SECONDS: Final = 5
"""How often the server writes how far its recovery is (`log_startup_progress_interval`)."""
PROGRESS: Final = re.compile(r"LOG:\s+(.+, elapsed time: .+)")
REASON_LINES_MAX: Final = 3
REFUSALS: Final = frozenset(
    {
        "the database system is starting up",
        "the database system is in recovery mode",
        "the database system is not yet accepting connections",
        "the database system is shutting down",
    }
)
"""What it answers while we ask whether it is ready: no reason for a failure."""
DISK_FULL_BYTES: Final = 4 * 1024 * 1024


def opened(log: Path) -> BinaryIO:
    """The log for a server to write to, at its end. Only its owner may read it, also one of an earlier version."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, PRIVATE_MODE)
    os.fchmod(descriptor, PRIVATE_MODE)
    return os.fdopen(descriptor, "ab")


def rotate(log: Path) -> bool:
    """Move what is written to `postgres.log.1` if it is too long; whether it was.

    The server keeps its descriptor: what it writes between the two steps is lost.
    """
    if log.stat().st_size <= BYTES_MAX:
        return False
    former = log.with_name(log.name + ".1")
    former.unlink(missing_ok=True)
    with contextlib.suppress(OSError), log.open("rb") as stream, opened(former) as kept:  # a full disk gets its space
        stream.seek(-BYTES_MAX, os.SEEK_END)
        shutil.copyfileobj(stream, kept)
    os.truncate(log, 0)
    return True


def tail(log: Path, start: int) -> str:
    """What was written to the log from `start` on, the last part of it when that is much."""
    try:
        with log.open("rb") as stream:
            end = stream.seek(0, os.SEEK_END)
            stream.seek(max(start, end - TAIL_BYTES))
            return stream.read().decode(errors="replace")
    except OSError:
        return ""


def recovery(output: str) -> str:
    """How far a recovery is, in the server's words: "redo in progress, elapsed time: 10.00 s, ..."; or nothing."""
    found = PROGRESS.findall(output)
    return found[-1].strip() if found else ""


def reason(output: str, home: Path) -> str:
    """Why PostgreSQL failed: the disk, or its own words, of which the last of the gravest kind say most.

    A full disk is looked for first: the errors that follow from it are graver, and a log on it may lack its end.
    """
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if any(os.strerror(errno.ENOSPC) in line for line in lines) or _is_disk_full(home):
        return f"the disk that holds {home} is full, free some space"
    for kind in ("PANIC:", "FATAL:", "ERROR:", "error:"):
        for line in reversed(lines):
            _, found, words = line.partition(kind)
            if found and words.strip() not in REFUSALS:
                return words.strip().rstrip(".")
    return " ".join(lines[-REASON_LINES_MAX:]).rstrip(".") or "it gave no reason"


def _is_disk_full(home: Path) -> bool:
    try:
        return shutil.disk_usage(home).free < DISK_FULL_BYTES
    except OSError:
        return False
