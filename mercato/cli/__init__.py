"""The command line. Imports nothing heavy before it knows what is wanted."""

from __future__ import annotations

import os
import sys

from mercato.cli import stopping


def main() -> None:
    """What `mercato` runs."""
    stopping.leave_at_once()
    from mercato.cli.commands import app

    try:
        app()
        sys.stdout.flush()
    except BrokenPipeError:
        # Who read our output has seen enough. Python would try to write the rest once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
