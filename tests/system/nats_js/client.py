"""The official JavaScript client of NATS: installed once into a cache of this machine, and run by Node."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Self

from mercato.testing.command import clean_environment
from mercato.testing.waiting import BOUND_SECONDS

HERE: Final = Path(__file__).parent
PACKAGES: Final = (
    "@nats-io/transport-node@3.4.0",
    "@nats-io/services@3.0.0-25",
    "@nats-io/jetstream@3.4.0",
    "@msgpack/msgpack@3.1.3",
    "pg@8.23.1",
)
INSTALL_SECONDS: Final = 240.0
MISSING: Final = "the JavaScript client was not run: Node and npm are missing; install them: apt-get install nodejs npm"


def is_missing() -> bool:
    return shutil.which("node") is None or shutil.which("npm") is None


def installed() -> Path:
    """The folder with the packages at these versions. Raises `CalledProcessError` where npm cannot get them."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mercato-tests"
    folder = cache / f"nats-js-{hashlib.sha256(' '.join(PACKAGES).encode()).hexdigest()[:12]}"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        making = Path(tempfile.mkdtemp(prefix="nats-js-", dir=cache))
        try:
            subprocess.run(
                ["npm", "install", "--prefix", str(making), "--no-package-lock", "--no-audit", "--no-fund", "--silent",
                 "--ignore-scripts", *PACKAGES],
                check=True, timeout=INSTALL_SECONDS, capture_output=True, cwd=making,
            )  # fmt: skip
            if not folder.exists():
                making.rename(folder)
        finally:
            shutil.rmtree(making, ignore_errors=True)
    return folder / "node_modules"


class Script:
    """A run of one of the scripts here, which gets `given` on its standard input. Use it as a context manager."""

    def __init__(self, name: str, packages: Path, given: Mapping[str, Any]) -> None:
        self._process = subprocess.Popen(
            ["node", str(HERE / name)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**clean_environment(), "NODE_PATH": str(packages)},
        )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(given))
        self._process.stdin.close()
        self._process.stdin = None

    def result(self) -> str:
        """Waits for its end, which must be a good one; what it wrote."""
        output, errors = self._process.communicate(timeout=BOUND_SECONDS)
        assert self._process.returncode == 0, errors
        return output

    def ask_to_stop(self) -> None:
        """SIGTERM."""
        self._process.terminate()

    def kill(self) -> None:
        """`kill -9`."""
        self._process.kill()
        self._process.communicate()

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_running:
            self._process.kill()
        self._process.communicate()
