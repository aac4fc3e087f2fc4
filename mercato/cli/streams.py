"""Standard streams as a command may find them: closed, without a letter for a name, or gone while it runs."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Final

UNWRITABLE: Final = (errno.EPIPE, errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EBADF)
"""What a stream says that cannot be written to: its reader or terminal is gone, or its disk is full."""


def prepare() -> None:
    """Opens those that are closed on nothing, and lets the others write any text. The first thing that a command does.

    A closed one would be given to the first file that is opened, the lock of a data folder or a socket, and what is
    said to people would be written there. A letter that the encoding of a stream lacks is written as an escape.
    """
    for number, flags in enumerate((os.O_RDONLY, os.O_WRONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, flags)  # the lowest number that is free, which is this one
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
    """What is in the buffer would be tried again for ever, and at the end of the process, which would then fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
