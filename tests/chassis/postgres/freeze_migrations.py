"""Commits to the revisions of all services: writes their checksums beside them, for a test and the start to compare.

    python tests/chassis/postgres/freeze_migrations.py

Adds the checksum of a new revision, and refuses a change of one that has a checksum already. With `--reset` it writes
all of them anew: only until the first release, for databases that exist are refused from then on.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from mercato import topology
from mercato.chassis.postgres.migrations import CHECKSUMS, computed_checksum, frozen_checksums, revisions

COMMAND = "make freeze"
FOLDERS = [topology.migrations(service) for service in topology.SERVICES]
"""With the migrations of each service."""


def changed(folder: Path) -> Iterator[str]:
    """A sentence about each frozen revision of a folder that is not what it was."""
    known = revisions(folder)
    for revision, digest in frozen_checksums(folder).items():
        if revision not in known:
            yield f"revision {revision} in {folder} is frozen, and its file is gone: restore it"
        elif computed_checksum(folder, revision) != digest:
            yield f"revision {revision} in {folder} is frozen, and was changed: make the change in a new revision"


def freeze(folder: Path) -> None:
    """Writes the checksum of every revision in a folder."""
    lines = [f"{revision} {computed_checksum(folder, revision)}\n" for revision in revisions(folder)]
    (folder / CHECKSUMS).write_text("".join(lines))


def main(arguments: Sequence[str], folders: Sequence[Path] = tuple(FOLDERS)) -> int:
    """Returns the exit status: 1, and nothing written, where a frozen revision was changed."""
    sentences = [] if "--reset" in arguments else [sentence for folder in folders for sentence in changed(folder)]
    for sentence in sentences:
        sys.stderr.write(f"{sentence}\n")
    if sentences:
        return 1
    for folder in folders:
        freeze(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
