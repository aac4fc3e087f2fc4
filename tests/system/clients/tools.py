"""Tools that read the API's description: installed once into a cache of this machine, at pinned versions."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).parent
ROOT: Final = HERE.parents[2]
PINS: Final = ROOT / "requirements" / "clients.txt"
PACKAGES: Final = ("openapi-typescript@7.13.0", "typescript@5.9.3")
EVENT_PACKAGES: Final = ("@asyncapi/parser@3.6.6",)
INSTALL_SECONDS: Final = 240.0
MISSING: Final = (
    "the TypeScript client was not made: Node and npm are missing; install them: apt-get install nodejs npm"
)


def is_node_missing() -> bool:
    return shutil.which("node") is None or shutil.which("npm") is None


def python_tools() -> Path:
    """The folder with the commands in Python. Raises `CalledProcessError` where they cannot be had."""
    return _cached("clients-py", PINS.read_text(), _install_python) / "bin"


def node_tools() -> Path:
    """The folder with the commands in Node. Raises `CalledProcessError` where they cannot be had."""
    return _cached("clients-js", " ".join(PACKAGES), _install_node) / "node_modules" / ".bin"


def event_tools() -> Path:
    """The folder with the packages that read AsyncAPI. Raises `CalledProcessError` where they cannot be had."""
    return _cached("events-js", " ".join(EVENT_PACKAGES), lambda into: _install(into, EVENT_PACKAGES)) / "node_modules"


def _install_python(folder: Path) -> None:
    python = folder / "bin" / "python"
    _run([sys.executable, "-m", "uv", "venv", "--quiet", "--relocatable", "--python", sys.executable, str(folder)])
    _run([sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", str(python), "--require-hashes",
          "--requirement", str(PINS)])  # fmt: skip


def _install_node(folder: Path) -> None:
    _install(folder, PACKAGES)


def _install(folder: Path, packages: Sequence[str]) -> None:
    folder.mkdir()
    _run(["npm", "install", "--prefix", str(folder), "--no-package-lock", "--no-audit", "--no-fund", "--silent",
          "--ignore-scripts", *packages])  # fmt: skip


def _cached(name: str, pins: str, install: Callable[[Path], None]) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mercato-tests"
    folder = cache / f"{name}-{hashlib.sha256(pins.encode()).hexdigest()[:12]}"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        making = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=cache))
        try:
            install(making / "made")
            if not folder.exists():
                (making / "made").rename(folder)
        finally:
            shutil.rmtree(making, ignore_errors=True)
    return folder


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, timeout=INSTALL_SECONDS, capture_output=True)
