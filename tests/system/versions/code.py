"""The code of a version, cut for each process as for its image: of the last release, or of a changed copy of this one.

The last release is taken from git by the commit that `releases.toml` names. It runs with the interpreter and the
packages of this checkout.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Final

import msgspec

import mercato
from contracts.release import Release, Releases
from mercato import topology
from mercato.chassis.hosting.host import GATEWAY
from mercato.testing.command import COMMAND, ROOT, clean_environment, run_command

PARTS: Final = ("mercato", "deploy/image")
"""What of a commit an image is cut from."""
SERVING: Final = (*topology.SERVICES, GATEWAY)
"""A release is installed in this order: callee first."""
MIGRATE: Final = "migrate"
TRANSPORTS: Final = ("nats", "http", "grpc")
"""How processes call each other."""
REFUSE_WHAT_THEY_DO_NOT_KNOW: Final = frozenset({"0.1.0", "0.2.0"})
"""Releases that start on no database with an unknown migration. Later ones do, unless it has `needs`."""
CUT: Final = """
import sys
from pathlib import Path

commit, to, *names = sys.argv[1:]
sys.path[:0] = [commit, f"{commit}/deploy/image"]
import cut

for name in names:
    cut.cut(name, Path(to) / name)
"""
"""The program of a commit that cuts its images, for all of them at once."""


def last_release() -> tuple[str, Release]:
    """The version before this checkout: N-1."""
    return list(Releases().entries().items())[-1]


def why_not() -> str:
    """Why the last release cannot be run here, with the command that changes it; empty where it can."""
    version, release = last_release()
    try:
        found = _has(f"{release.commit}^{{commit}}")
    except FileNotFoundError:
        return f"{version} was not run beside this checkout: there is no git: apt-get install git"
    if found:
        return ""
    return f"{version} was not run beside this checkout, which lacks its commit {release.commit}: git fetch --unshallow"


def transports_of(commit: str) -> tuple[str, ...]:
    """The transports that the code of a commit has, by their folders."""
    return tuple(name for name in TRANSPORTS if _has(f"{commit}:mercato/chassis/rpc/transports/{name}"))


def _has(name: str) -> bool:
    """Whether git has what is named so. Raises `FileNotFoundError` where there is no git."""
    return subprocess.run(["git", "cat-file", "-e", name], cwd=ROOT, capture_output=True, check=False).returncode == 0


class Code(msgspec.Struct, frozen=True):
    """A version. `folder` has a folder for each image; None: the package of this checkout."""

    name: str
    version: str
    """As its processes report it."""
    folder: Path | None = None

    def package(self, image: str) -> Path | None:
        """The folder from which a process imports `mercato`, where it is not that of this checkout."""
        return None if self.folder is None else self.folder / image

    def run(self, *arguments: str, environment: dict[str, str]) -> str:
        """Runs a command of the image `migrate` to its end, which must be a success; gives what it prints."""
        package = self.package(MIGRATE)
        if package is None:
            done = run_command(*arguments, environment=environment)
        else:
            variables = {**clean_environment(), **environment, "PYTHONPATH": str(package)}
            done = subprocess.run(
                [*COMMAND, *arguments], cwd=package, env=variables, capture_output=True, text=True, check=False
            )
        assert done.returncode == 0, f"{self.name}: {arguments}: {done.stdout}{done.stderr}"
        return done.stdout

    def migrations(self, service: str) -> dict[str, str]:
        """The migrations of a service, by their names."""
        folder = topology.migrations(service)
        if (package := self.package(MIGRATE)) is not None:
            folder = package / folder.relative_to(ROOT)
        return {file.stem: file.read_text() for file in folder.glob("[0-9]*.py")}


THIS: Final = Code("this checkout", mercato.__version__)


def release_in(folder: Path) -> Code:
    """Takes the last release from git, and cuts what each of its images has."""
    version, release = last_release()
    command = ["git", "archive", release.commit, *PARTS]
    archive = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as packed:
        packed.extractall(folder / "commit", filter="data")
    return _cut(folder, Code(version, version, folder / "images"), *SERVING, MIGRATE)


def changed_in(folder: Path, file: str, old: str, new: str, image: str) -> Code:
    """This checkout for one image, with another text in a file of it."""
    for part in PARTS:
        shutil.copytree(ROOT / part, folder / "commit" / part, ignore=shutil.ignore_patterns("__pycache__"))
    changed = folder / "commit" / file
    text = changed.read_text()
    assert text.count(old) == 1, f"{file} has {old!r} {text.count(old)} times"
    changed.write_text(text.replace(old, new))
    return _cut(folder, Code("a changed copy", mercato.__version__, folder / "images"), image)


def _cut(folder: Path, code: Code, *images: str) -> Code:
    command = [sys.executable, "-P", "-c", CUT, str(folder / "commit"), str(code.folder), *images]
    subprocess.run(command, cwd=folder, env=clean_environment() | {"PYTHONPATH": ""}, check=True)
    return code


def refused_by(before: Code, service: str) -> str:
    """Why a process of `before` cannot be started again with the database of this checkout, as its operators know it.

    Empty where it can.
    """
    known = before.migrations(service)
    newer = {name: text for name, text in THIS.migrations(service).items() if name not in known}
    if newer and before.version in REFUSE_WHAT_THEY_DO_NOT_KNOW:
        return f"{before.version} starts on no database with a migration that it does not know: {', '.join(newer)}"
    needing = [name for name, text in newer.items() if "needs(" in text]
    return f"{before.version} is refused by {', '.join(needing)}" if needing else ""
