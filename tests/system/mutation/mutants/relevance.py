"""Which tests run a line: recorded with coverage.py, a test file at a time, and kept while nothing that it ran changes.

The tests of a mutant, nearest first
    nearest   those of the file of the same name, and of its folder those that are recorded already
    own       those of the folder that mirrors its folder
    wider     those of the layers above, which reach it through a contract or the gateway
    whole     a few files that start real processes, whose lines are not recorded: for a statement that no other runs
Each set is recorded when the first mutant asks for it.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from system.mutation.copies import FAILED, PASSED, Inconclusive, is_of_copy, run_pytest
from system.mutation.mutants.choosing import Mutant, write
from system.mutation.mutants.plugin import Lines, Recorded

RECORD_SECONDS: Final = 900.0
FILTER: Final = "not long"
WHOLE: Final = (
    "tests/cli/test_up_server.py",
    "tests/cli/test_audit.py",
    "tests/cli/test_events.py",
    "tests/system/journeys/test_journey.py",
)
WIDER: Final = {
    "mercato/chassis/contract": ("tests/chassis/rpc", "tests/gateway"),
    "mercato/chassis/observability": ("tests/chassis/rpc", "tests/chassis/messaging"),
    "mercato/chassis/http": ("tests/gateway",),
    "mercato/chassis/rpc": ("tests/models/test_circuit_breaker.py", "tests/chassis", "tests/services/inventory"),
    "mercato/chassis": ("tests/chassis", "tests/services/events", "tests/services/inventory"),
    "mercato/services/events": ("tests/gateway/test_events.py", "tests/operations"),
    "mercato/services/inventory": ("tests/models", "tests/gateway", "tests/reference", "tests/operations"),
    "mercato/services/orders": ("tests/models", "tests/gateway", "tests/reference", "tests/operations"),
    "mercato/services/payments": ("tests/models", "tests/gateway", "tests/reference", "tests/operations"),
    "mercato/services": ("tests/gateway", "tests/reference", "tests/operations"),
    "mercato/simulators": ("tests/services/payments", "tests/operations"),
    "mercato/gateway": ("tests/reference",),
}
"""By the beginning of a path, the longest first."""


class Record(msgspec.Struct, frozen=True):
    """What the tests of a file ran. `needed`: the files that must be as they were, with digests of their content."""

    needed: dict[str, str]
    seconds: dict[str, float]
    lines: Lines
    failed: tuple[str, ...]
    """Tests that fail as it is: they can say nothing about a mutant."""


class Test(msgspec.Struct, frozen=True):
    name: str
    seconds: float


class Relevance:
    """`snapshot`: the tree that is recorded. `turn` bounds how many runs there are at once."""

    def __init__(self, snapshot: Path, cache: Path, turn: asyncio.Semaphore) -> None:
        self._snapshot = snapshot
        self._cache = cache
        self._turn = turn
        self._records: dict[str, asyncio.Task[Record]] = {}
        self._made = 0
        self.failed: set[str] = set()

    async def close(self) -> None:
        """Ends the runs that nothing waits for any more."""
        for task in self._records.values():
            task.cancel()
        await asyncio.gather(*self._records.values(), return_exceptions=True)

    async def nearest(self, mutant: Mutant) -> list[Test]:
        """Of `own`, those of files that are recorded, and of the file that is named as the mutant's: most end here."""
        own = own_files(self._snapshot, mutant.file)
        return await self._covering(mutant, [file for n, file in enumerate(own) if n == 0 or self._is_recorded(file)])

    async def own(self, mutant: Mutant) -> list[Test]:
        return await self._covering(mutant, own_files(self._snapshot, mutant.file))

    async def wider(self, mutant: Mutant) -> list[Test]:
        """Without those of `own`."""
        own = own_files(self._snapshot, mutant.file)
        return await self._covering(mutant, [f for f in wider_files(self._snapshot, mutant.file) if f not in own])

    def _is_recorded(self, file: str) -> bool:
        if (task := self._records.get(file)) is not None:
            return task.done()
        return self._read(file) is not None

    async def _covering(self, mutant: Mutant, files: Sequence[str]) -> list[Test]:
        records = await asyncio.gather(*(self._record(file) for file in files))
        by_file = [covering(record, mutant) for record in records]
        if not any(by_file):
            # It may have run where the module was imported, before any test: then what is made there is used by these.
            by_file = [touching(record, mutant) for record in records]
        return [test for tests in sorted(filter(None, by_file), key=_seconds) for test in tests]

    async def _record(self, file: str) -> Record:
        if file not in self._records:
            self._records[file] = asyncio.create_task(self._read_or_make(file))
        return await asyncio.shield(self._records[file])

    async def _read_or_make(self, file: str) -> Record:
        if (known := self._read(file)) is not None:
            return known
        async with self._turn:
            record = await self._make(file)
        if not record.failed:
            write(self._entry(file), msgspec.json.encode(record))
        self.failed |= set(record.failed)
        return record

    def _read(self, file: str) -> Record | None:
        """The record that is kept of a test file; None where there is none, or what it ran has changed."""
        if not self._entry(file).exists():
            return None
        record = msgspec.json.decode(self._entry(file).read_bytes(), type=Record)
        return record if self._digests(record.needed) == record.needed else None

    def _entry(self, file: str) -> Path:
        return self._cache / "lines" / f"{file.replace('/', '.')}.json"

    async def _make(self, file: str) -> Record:
        # A folder of its own for what it writes; the tree is only read.
        self._made += 1
        folder = self._snapshot.parent / f"r{self._made}"
        folder.mkdir(mode=0o755)
        (folder / "tree").symlink_to(self._snapshot)
        out = folder / "lines.json"
        plugin = ("-p", "system.mutation.mutants.plugin", "--record", str(out))
        run = await run_pytest(folder / "tree", (*plugin, "-m", FILTER, file), RECORD_SECONDS)
        if run.exit_code not in (PASSED, FAILED) and run.recorded.tests:
            raise Inconclusive(f"With the tree as it is, the tests of {file} do not end: {run.last}")
        if run.recorded.tests and not is_of_copy(run, folder / "tree"):
            raise Inconclusive(f"The tests ran with {run.recorded.package}, and not with the copy in {folder}.")
        recorded = msgspec.json.decode(out.read_bytes(), type=Recorded) if out.exists() else Recorded({}, ())
        lines, tests = recorded.lines, run.recorded.tests
        return Record(
            needed=self._digests([file, *recorded.support, *(name for of_test in lines.values() for name in of_test)]),
            seconds={name: seen.seconds for name, seen in tests.items() if seen.failed_in == "none"},
            lines={name: lines.get(name, {}) for name, seen in tests.items() if seen.failed_in == "none"},
            failed=tuple(name for name, seen in tests.items() if seen.failed_in not in ("none", "skipped")),
        )

    def _digests(self, files: Iterable[str]) -> dict[str, str]:
        return {file: _digest(self._snapshot / file) for file in sorted(set(files))}


def covering(record: Record, mutant: Mutant) -> list[Test]:
    """The tests of a file that run the statement of a mutant, in their order."""
    first, last = mutant.statement
    by_test = ((name, lines.get(mutant.file, ())) for name, lines in record.lines.items())
    return [Test(name, record.seconds[name]) for name, lines in by_test if any(first <= line <= last for line in lines)]


def touching(record: Record, mutant: Mutant) -> list[Test]:
    """The tests of a file that run anything of the mutated file, in their order."""
    return [Test(name, record.seconds[name]) for name, lines in record.lines.items() if mutant.file in lines]


def own_files(root: Path, file: str) -> list[str]:
    """The test files of the folder that mirrors the folder of a file, or of the nearest one above it."""
    folder = Path("tests").joinpath(*Path(file).parts[1:-1])
    while not (files := test_files(root, folder.as_posix())):
        folder = folder.parent
    named = Path(file).stem
    return sorted(files, key=lambda path: named not in Path(path).stem)


def wider_files(root: Path, file: str) -> list[str]:
    prefix = max((prefix for prefix in WIDER if file.startswith(f"{prefix}/")), key=len, default=None)
    return [path for folder in WIDER.get(prefix or "", ()) for path in test_files(root, folder)]


def test_files(root: Path, folder: str) -> list[str]:
    if (root / folder).is_file():
        return [folder]
    return sorted(path.relative_to(root).as_posix() for path in (root / folder).rglob("test_*.py"))


def _seconds(tests: Sequence[Test]) -> float:
    return sum(test.seconds for test in tests)


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes() if file.is_file() else b"").hexdigest()[:32]
