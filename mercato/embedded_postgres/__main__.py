"""`python -m mercato.embedded_postgres --remove DATA`: delete the database of a data folder, wherever it lives."""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

from mercato.embedded_postgres import SupervisorError, remove_cluster


def main() -> int:
    """Returns the exit status: 1, with a sentence, when the database cannot be removed."""
    parser = argparse.ArgumentParser(prog="python -m mercato.embedded_postgres", description=__doc__)
    parser.add_argument("--remove", metavar="DATA", type=Path, required=True, help="the data folder")
    data: Path = parser.parse_args().remove
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not one that is closed
            stream.reconfigure(errors="backslashreplace")
    try:
        removed = remove_cluster(data)
    except SupervisorError as error:
        print(error, file=sys.stderr)  # noqa: T201  # a command; nothing where the stream is closed
        return 1
    print(f"removed the database of {data}" if removed else f"{data} has no database")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
