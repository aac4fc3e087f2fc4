"""The log of the server: the progress of its recovery, and why it failed.

The file is private and bounded: one larger than `BYTES_MAX` is moved to `postgres.log.1`, which it replaces.
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
"""How often the size of the log is checked."""
PRIVATE_MODE: Final = 0o600
SETTINGS: Final = {
    "log_destination": "stderr",
    "logging_collector": "off",
    "log_timezone": "UTC",
    # Errors without values: no keys of rows (DETAIL), no statements, which may contain values, no parameters.
    "log_error_verbosity": "terse",
    "log_min_error_statement": "panic",
    "log_parameter_max_length": "0",
    "log_parameter_max_length_on_error": "0",
    "log_statement": "none",
    "log_min_duration_statement": "-1",
    "log_min_duration_sample": "-1",
    "log_transaction_sample_rate": "0",
}
"""Settings of the server's log."""
TAIL_BYTES: Final = 64 * 1024
PROGRESS_SECONDS: Final = 5
"""How often the server logs the progress of its recovery (`log_startup_progress_interval`)."""
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
"""Its answers to connections before it is ready: no reason for a failure."""
DISK_FULL_BYTES: Final = 4 * 1024 * 1024


def opened(log: Path) -> BinaryIO:
    """Opens the log of a server, to append. Only its owner may read it, even if an earlier version made it."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, PRIVATE_MODE)
    os.fchmod(descriptor, PRIVATE_MODE)
    return os.fdopen(descriptor, "ab")


def rotate(log: Path) -> bool:
    """Move the content to `postgres.log.1` if it is too long; gives whether it was.

    The server keeps its descriptor: output between the two steps is lost.
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
    """The content of the log from `start` on; only its end, if it is long."""
    try:
        with log.open("rb") as stream:
            end = stream.seek(0, os.SEEK_END)
            stream.seek(max(start, end - TAIL_BYTES))
            return stream.read().decode(errors="replace")
    except OSError:
        return ""


def recovery(output: str) -> str:
    """The progress of a recovery, in the server's words: "redo in progress, elapsed time: 10.00 s, ..."; or empty."""
    found = PROGRESS.findall(output)
    return found[-1].strip() if found else ""


def reason(output: str, home: Path) -> str:
    """Why PostgreSQL failed: a full disk, or the last of the most severe messages in the output.

    The disk is checked first: errors that follow from it are more severe, and a log on a full disk may lack its end.
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
