"""Which mutants there are, and a choice of them by a seed: the same seed gives the same ones of the same tree."""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from system.mutation.copies import Inconclusive
from system.mutation.mutants.change import Change
from system.mutation.mutants.python_changes import python_changes
from system.mutation.mutants.sql_changes import sql_changes

PRODUCT: Final = (
    "mercato/chassis/**",
    "mercato/services/**",
    "mercato/simulators/**",
    "mercato/gateway/**",
    "mercato/operations/**",
)
LEFT_OUT: Final = (
    "*/migrations/*",  # Frozen, and compared with their checksums.
    "*/alembic_environment/*",
    "mercato/chassis/observability/faults.py",  # What tests use.
    "mercato/gateway/docs.py",  # What describes the gateway to people.
    "mercato/gateway/diagram.py",
    "mercato/gateway/examples.py",
    "mercato/gateway/explained.py",
    "mercato/gateway/fields.py",
    "mercato/gateway/openapi.py",
    "mercato/gateway/pages.py",
    "mercato/gateway/refusals.py",
    "mercato/gateway/schemas.py",
)
CONTEXT_LINES: Final = 1


class Place(msgspec.Struct, frozen=True):
    """Where a change can be made: the `n`th of its file."""

    file: str
    n: int
    kind: str
    line: int
    statement: tuple[int, int]
    function: str


class Mutant(msgspec.Struct, frozen=True):
    """`mutated`: the changed lines as they are with the change, without indentation."""

    file: str
    function: str
    kind: str
    line: int
    statement: tuple[int, int]
    mutated: str
    diff: str
    text: str
    """Of the whole file."""


def product_files(root: Path, only: Sequence[str] = ()) -> list[str]:
    """The files that are mutated, by their paths below `root`. `only`: those with one of these in their path."""
    files = sorted({path.relative_to(root).as_posix() for pattern in PRODUCT for path in root.glob(f"{pattern}/*.py")})
    kept = [file for file in files if not any(fnmatch.fnmatch(file, pattern) for pattern in LEFT_OUT)]
    return [file for file in kept if not only or any(pattern in file for pattern in only)]


def places(root: Path, files: Sequence[str], cache: Path) -> list[Place]:
    """All places where a change can be made. Those of a file that is as it was are read from `cache`."""
    found: list[Place] = []
    for file in files:
        source = (root / file).read_text()
        entry = cache / "places" / f"{_digest(source)}.json"
        if not entry.exists():
            of_file = [Place("", n, c.kind, c.line, c.statement, c.function) for n, c in enumerate(changes(source))]
            write(entry, msgspec.json.encode(of_file))
        cached = msgspec.json.decode(entry.read_bytes(), type=list[Place])
        found += [msgspec.structs.replace(place, file=file) for place in cached]
    return found


def changes(source: str) -> list[Change]:
    return [*python_changes(source), *sql_changes(source)]


def choose(all_places: Sequence[Place], count: int, seed: int) -> list[Place]:
    """Raises `Inconclusive` where there is none."""
    if not all_places:
        raise Inconclusive("There is nothing to mutate in these files.")
    return random.Random(seed).sample(all_places, min(count, len(all_places)))


def make(root: Path, chosen: Sequence[Place]) -> list[Mutant]:
    """In the order given."""
    by_file: dict[str, list[Change]] = {}
    mutants: list[Mutant] = []
    for place in chosen:
        source = (root / place.file).read_text()
        if place.file not in by_file:
            by_file[place.file] = changes(source)
        mutants.append(mutant(place.file, source, by_file[place.file][place.n]))
    return mutants


def mutant(file: str, source: str, change: Change) -> Mutant:
    text = change.apply()
    before, after = source.splitlines(), text.splitlines()
    lines = list(difflib.unified_diff(before, after, file, file, lineterm="", n=CONTEXT_LINES))
    added = [line[1:].strip() for line in lines[2:] if line.startswith("+")]
    removed = [line[1:].strip() for line in lines[2:] if line.startswith("-")]
    return Mutant(
        file=file,
        function=change.function,
        kind=change.kind,
        line=change.line,
        statement=change.statement,
        mutated=" ".join(added) if added else f"without: {' '.join(removed)}",
        diff="\n".join(lines[2:]),
        text=text,
    )


def _digest(source: str) -> str:
    digest = hashlib.sha256(source.encode())
    for tool in sorted(Path(__file__).parent.glob("*_changes.py")):
        digest.update(tool.read_bytes())
    return digest.hexdigest()[:32]


def write(path: Path, content: bytes) -> None:
    """As a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_bytes(content)
    partial.replace(path)
