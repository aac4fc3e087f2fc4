"""`python -m mercato.embedded_postgres --remove DATA`: delete the database of a data folder, wherever it lives."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mercato.embedded_postgres import SupervisorError, remove_cluster


def main() -> int:
    """Returns the exit status: 1, with a sentence, when the database cannot be removed."""
    parser = argparse.ArgumentParser(prog="python -m mercato.embedded_postgres", description=__doc__)
    parser.add_argument("--remove", metavar="DATA", type=Path, required=True, help="the data folder")
    data: Path = parser.parse_args().remove
    try:
        removed = remove_cluster(data)
    except SupervisorError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(f"removed the database of {data}\n" if removed else f"{data} has no database\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
