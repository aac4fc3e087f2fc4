"""Installs the pinned requirements of one name, or the checkout itself, with pip; says how far it is.

    python requirements/install.py runtime
    python requirements/install.py .

By itself pip says nothing for a minute, or writes two hundred lines. At a terminal this shows one line that changes;
elsewhere it says what it does, and no more. Errors of pip are shown everywhere. The interpreter that runs it is the one
that it installs for; it needs the standard library alone, for there is nothing else yet.
"""

from __future__ import annotations

import os
import re
import selectors
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

HERE = Path(__file__).parent
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
CHECKOUT = "."
CHECKOUT_ARGUMENTS = ("install", "--no-build-isolation", "--no-deps", "--editable", CHECKOUT)
SHOW_SECONDS = 0.2
CLEAR = "\r\033[K"

COLLECTED = re.compile(r"(?:Collecting|Requirement already satisfied:|Ignoring) ([\w.-]+)(?:\[[\w,-]+\])?(?:==(\S+))?")
LOCAL = re.compile(r"Processing \S*?([\w.]+)-(\d[^-/]*)-[^/]*\.whl")
SIZE = re.compile(r"\s+(?:Downloading|Using cached) \S+ \(([^)]+)\)")
INSTALLING = re.compile(r"Installing collected packages: (.+)")


class Progress:
    """What pip has done so far, from the lines that it writes."""

    def __init__(self, total: int, site_packages: Path) -> None:
        self._total = total
        self._site_packages = site_packages
        self._collected = 0
        self._doing = ""
        self._installing = 0
        self._before = 0

    def read(self, line: str) -> None:
        if found := COLLECTED.match(line) or LOCAL.match(line):
            self._collected += 1
            self._doing = f"{found[1]} {(found[2] or '').rstrip(';')}".rstrip()
        elif found := SIZE.match(line):
            self._doing += f", {found[1]}"
        elif found := INSTALLING.match(line):
            self._installing = found[1].count(",") + 1
            self._before = self._installed()

    def __str__(self) -> str:
        if self._installing:
            # pip says no more until all are installed; each leaves a folder.
            done = min(max(self._installed() - self._before, 0), self._installing)
            return f"installed {done} of {self._installing}"
        if self._collected:
            return f"fetched {min(self._collected, self._total)} of {self._total}: {self._doing}"
        return "preparing"

    def _installed(self) -> int:
        return sum(name.endswith(".dist-info") for name in os.listdir(self._site_packages))


def main(name: str) -> int:
    """pip's exit status."""
    if name == CHECKOUT:
        total, arguments = 1, CHECKOUT_ARGUMENTS
        print("installing Mercato itself ...", flush=True)
    else:
        file = HERE / f"{name}.txt"
        total = sum("==" in line for line in file.read_text().splitlines())
        arguments = ("install", "--require-hashes", "--requirement", str(file))
        print(f"installing {total} packages for {name} (once) ...", flush=True)
    if not sys.stdout.isatty() or os.environ.get("TERM", "dumb") == "dumb":
        return subprocess.call([*PIP, "--quiet", *arguments])
    return show(arguments, Progress(total, Path(sysconfig.get_path("purelib"))))


def show(arguments: tuple[str, ...], progress: Progress) -> int:
    """Runs pip, and shows its progress in the last line of the terminal."""
    began_at = time.monotonic()
    command = [*PIP, "--no-color", *arguments, "--progress-bar", "off"]
    # What goes wrong is shown behind the progress, not in it.
    with tempfile.TemporaryFile() as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors) as pip:
            assert pip.stdout is not None
            for line in lines(pip.stdout):
                if line is not None:
                    progress.read(line)
                text = f"  {progress} ({time.monotonic() - began_at:.0f} s)"
                sys.stdout.write(CLEAR + text[: shutil.get_terminal_size().columns - 1])
                sys.stdout.flush()
        sys.stdout.write(CLEAR)
        sys.stdout.flush()
        errors.seek(0)
        sys.stderr.write(errors.read().decode(errors="replace"))
    return pip.returncode


def lines(pipe: IO[bytes]) -> Iterator[str | None]:
    """The lines of a pipe to its end; None whenever none has come for a while."""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        rest = b""
        while True:
            if not selector.select(SHOW_SECONDS):
                yield None
                continue
            read = os.read(pipe.fileno(), 65_536)
            if not read:
                return
            *whole, rest = (rest + read).split(b"\n")
            for line in whole:
                yield line.decode(errors="replace")


if __name__ == "__main__":
    try:
        raise SystemExit(main(sys.argv[1]))
    except KeyboardInterrupt:  # pip has heard of it too, and has ended
        raise SystemExit(130) from None
