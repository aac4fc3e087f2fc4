"""Prepares standard streams that are closed, cannot encode a character, or break while the command runs."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Final

UNWRITABLE: Final = (errno.EPIPE, errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EBADF)
"""The errors of a stream that cannot be written to: its reader or terminal is gone, or its disk is full."""


def prepare() -> None:
    """Opens closed streams on /dev/null, and lets the others write any text. The first step of a command.

    Otherwise the first file that is opened, such as the lock of a data folder or a socket, would get the descriptor of
    a closed stream, and messages would be written there. A character that a stream cannot encode is written as an
    escape.
    """
    for number, flags in enumerate((os.O_RDONLY, os.O_WRONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, flags)  # gets the lowest free number, which is this one
            os.set_inheritable(opened, True)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  # for as long as the process lives
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def discard_output() -> None:
    """Drops the buffer: Python would try to write it again, also at the end of the process, which would then fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
