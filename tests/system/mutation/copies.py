"""Copies of the working tree, and runs of tests in them.

A snapshot is one copy, taken first: whatever is written in the tree meanwhile does not disturb what runs. A run imports
the package of its own copy, and says which one that was: an editable install lies behind it on the path, and would
quietly test the original. Whatever a run writes is in the folder of its copy, which goes with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from mercato.embedded_postgres.processes import serving
from system.mutation.recording import RecordedRun

COPIED: Final = (
    "mercato",
    "tests",
    "bench",
    "docs",
    "deploy",
    "requirements",
    "pyproject.toml",
    "Makefile",
    "README.md",
    "CONTRIBUTING.md",
)
STOP_SECONDS: Final = 15.0
POLL_SECONDS: Final = 0.05
OUTPUT_SHOWN: Final = 500

PASSED: Final = 0
FAILED: Final = 1
"""Exit codes of pytest: all tests ran, and some failed. Any other says that not all of them ran."""


class Inconclusive(Exception):
    """Why nothing can be said, in a sentence."""


class Run(msgspec.Struct, frozen=True):
    """A run of pytest that has ended. `exit_code` is None where it did not end in time, and was ended."""

    exit_code: int | None
    recorded: RecordedRun
    output: str
    seconds: float

    @property
    def last(self) -> str:
        """The end of its output, in one line."""
        return " / ".join(line for line in self.output.splitlines() if line.strip())[-OUTPUT_SHOWN:]


def take_snapshot(root: Path, folder: Path) -> Path:
    """A copy of everything that tests need of a working tree."""
    # PostgreSQL does not run as root, and the user that it runs as must be able to pass through.
    folder.chmod(0o755)
    snapshot = folder / "snapshot"
    snapshot.mkdir()
    for name in COPIED:
        if (root / name).is_dir():
            shutil.copytree(root / name, snapshot / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        elif (root / name).is_file():
            shutil.copy2(root / name, snapshot / name)
    return snapshot


async def run_pytest(copy: Path, arguments: Sequence[str], seconds_max: float) -> Run:
    """Runs tests in a copy, with its package, and with a folder for temporary files beside it."""
    temporary, recording = copy.parent / f"{copy.name}-tmp", copy.parent / f"{copy.name}.json"
    shutil.rmtree(temporary, ignore_errors=True)
    recording.unlink(missing_ok=True)
    temporary.mkdir(mode=0o755)
    began_at = time.monotonic()
    output = temporary / "output.txt"
    with output.open("wb") as out:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            *("-p", "pytest_asyncio.plugin", "-p", "pytest_timeout"),
            *("-p", "system.mutation.recording", "--recording", str(recording), *arguments),
            cwd=copy,
            env=_environment(copy, temporary),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            # Ctrl-C in a terminal reaches us alone: we end the runs ourselves, and wait for their ends.
            start_new_session=True,
        )
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds_max):
                    await process.wait()
            exit_code = process.returncode
        finally:
            await _end(process, temporary)
    seen = msgspec.json.decode(recording.read_bytes(), type=RecordedRun) if recording.exists() else RecordedRun("", {})
    return Run(exit_code, seen, output.read_text(errors="replace"), time.monotonic() - began_at)


def is_of_copy(run: Run, copy: Path) -> bool:
    """Whether a run tested the package of its copy."""
    return Path(run.recorded.package).resolve().is_relative_to(copy.resolve())


def _environment(copy: Path, temporary: Path) -> dict[str, str]:
    """That of this process, without settings of Mercato, of PostgreSQL, or of a pytest that we may run in."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MERCATO_", "PG", "PYTEST_"))}
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join((str(copy), str(copy / "tests"))),
        "TMPDIR": str(temporary),
        # All plugins that are installed would cost each run a second, and it needs two of them.
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }


async def _end(process: asyncio.subprocess.Process, temporary: Path) -> None:
    """Ends a run and waits until nothing of it is left.

    pytest stops its database by itself when it is asked to. If it has to be killed, the guard of the database ends it a
    little later, and until then it lives in a folder that is about to be removed.
    """
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT)
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await process.wait()
        except TimeoutError:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    end = time.monotonic() + STOP_SECONDS
    while _is_served(temporary):
        if time.monotonic() > end:
            return
        await asyncio.sleep(POLL_SECONDS)


def _is_served(temporary: Path) -> bool:
    """Whether a database that a run has made there is still running."""
    return any(serving(cluster) for cluster in temporary.glob("mercato-test-*/data/postgres"))
