"""The command line. It imports nothing slow before it knows the command."""

from __future__ import annotations

import sys

from mercato.cli import stopping, streams


def main() -> None:
    """The entry point of `mercato`."""
    streams.prepare()
    stopping.leave_at_once()
    from mercato.chassis.hosting import variables
    from mercato.cli.commands import app
    from mercato.cli.progress import OutputFailed, fail

    variables.forget_empty()
    variables.forget_postgres()
    try:
        app()
        sys.stdout.flush()
    except OutputFailed as error:
        if not error.is_closed:
            fail(str(error))
        sys.exit(1)
    except OSError as error:
        if error.filename is not None or error.errno not in streams.UNWRITABLE:
            raise
        # The reader of the output has left. Python would try to write the rest once more when it ends.
        streams.discard_output()
        if not isinstance(error, BrokenPipeError):
            fail(str(OutputFailed(error)))
        sys.exit(1)
