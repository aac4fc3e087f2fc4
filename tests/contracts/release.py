"""Releases a version: freezes the contracts as they are, and enters the version in `releases.toml`.

    make release VERSION=x.y.z [COMMIT=...]

VERSION is what `mercato.__version__` says. The committed schemas, field numbers, pacts and protos are copied to
`tests/contracts/released/VERSION/`, which never changes again: a test compares its checksum. Refuses a version that was
released before, a changelog without a section for it, and schemas or numbers that are not those of the contracts.
COMMIT is the commit of the version, HEAD if it is not given.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

import mercato
from contracts import update_schemas
from mercato.chassis.contract.compatibility import schemas
from mercato.contracts import field_numbers

ROOT: Final = Path(__file__).parents[2]
VERSION: Final = re.compile(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)")
COMMIT: Final = re.compile(r"[0-9a-f]{40}")
PACTS: Final = ROOT / "tests/pacts/committed"
COMMAND: Final = "make release VERSION=x.y.z"
FIRST_PROTOS: Final = Path(__file__).with_name("first_protos.binpb")
"""An image of buf. No release has been made since the first protos."""
HEADER: Final = """\
# Every version that was released, written by `make release VERSION=x.y.z`. `commit` is the commit of the version: git
# tags are not in every checkout. `contracts` is the checksum of tests/contracts/released/VERSION/.
"""


class CannotRelease(Exception):
    """Why a version is not released, in a sentence."""


class Release(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An entry of `releases.toml`."""

    commit: str
    contracts: str


class Releases:
    """The releases of the repository in `root`."""

    def __init__(self, root: Path = ROOT) -> None:
        self.file = root / "releases.toml"
        self.changelog = root / "CHANGELOG.md"
        self.folder = root / "tests/contracts/released"

    def entries(self) -> dict[str, Release]:
        """By version, the oldest first."""
        if not self.file.exists():
            return {}
        found = msgspec.convert(tomllib.loads(self.file.read_text()), dict[str, Release])
        return dict(sorted(found.items(), key=lambda entry: [int(part) for part in entry[0].split(".")]))

    def schemas(self, version: str) -> dict[str, dict[str, Any]]:
        """The released schemas of a version, by the name of the contract."""
        files = sorted((self.folder / version / "schemas").glob("*.json"))
        return {file.stem: msgspec.json.decode(file.read_bytes()) for file in files}

    def numbers(self, version: str) -> field_numbers.Numbers:
        return field_numbers.read((self.folder / version / update_schemas.FIELD_NUMBERS.name).read_bytes())

    def pacts(self, version: str) -> list[Path]:
        """The released pacts of a version: what its consumers need. 0.2.0 and the versions before it have none."""
        return sorted((self.folder / version / "pacts").glob("*.json"))

    def protos(self) -> Path:
        """The protos of the newest version that has some, else those with which the public gRPC API began."""
        found = [self.folder / version / update_schemas.PROTOS.name for version in self.entries()]
        return next((folder for folder in reversed(found) if folder.exists()), FIRST_PROTOS)

    def checksum(self, version: str) -> str:
        """Of all files of a released version: their names and their bytes."""
        folder, digest = self.folder / version, hashlib.sha256()
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            digest.update(f"{file.relative_to(folder).as_posix()}\0{file.stat().st_size}\0".encode())
            digest.update(file.read_bytes())
        return f"sha256:{digest.hexdigest()}"

    def has_section(self, version: str) -> bool:
        """Whether the changelog has a section for a version: `## 0.1.0`, perhaps with a date, and lines below it."""
        section = re.search(
            rf"^## \[?{re.escape(version)}\]?(?: [^\n]*)?$(.*?)(?=^## |\Z)", self.changelog.read_text(), re.M | re.S
        )
        return section is not None and bool(section[1].strip())

    def release(self, version: str, commit: str) -> None:
        """Freezes the contracts as they are. Raises `CannotRelease`, and then nothing was written."""
        self._check(version, commit)
        folder = self.folder / version
        shutil.copytree(update_schemas.FOLDER, folder / "schemas")
        shutil.copy(update_schemas.FIELD_NUMBERS, folder)
        shutil.copytree(PACTS, folder / "pacts")
        shutil.copytree(update_schemas.PROTOS, folder / update_schemas.PROTOS.name)
        before = self.file.read_text() if self.file.exists() else HEADER
        entry = f'\n["{version}"]\ncommit = "{commit}"\ncontracts = "{self.checksum(version)}"\n'
        self.file.write_text(before + entry)

    def _check(self, version: str, commit: str) -> None:
        if not VERSION.fullmatch(version):
            raise CannotRelease(f"{version!r} is not a version: write it as 0.1.0.")
        if version in self.entries() or (self.folder / version).exists():
            raise CannotRelease(f"{version} was released before: choose the next version.")
        if version != mercato.__version__:
            raise CannotRelease(f"mercato/__init__.py says {mercato.__version__}: write {version} there first.")
        if not COMMIT.fullmatch(commit):
            raise CannotRelease(f"{commit!r} is not a commit: give all 40 digits.")
        if not self.has_section(version):
            raise CannotRelease(f"CHANGELOG.md has no section `## {version}` that says what it holds.")
        if not _is_committed():
            raise CannotRelease(
                f"The schemas, numbers or protos are not those of the contracts: run `{update_schemas.COMMAND}`."
            )


def _is_committed() -> bool:
    contracts = update_schemas.contracts()
    numbers = update_schemas.committed_numbers()
    return (
        numbers == field_numbers.assign(numbers, contracts.values())
        and all(update_schemas.committed(name) == schemas(contract) for name, contract in contracts.items())
        and update_schemas.protos(numbers) == update_schemas.committed_protos()
    )


def _head() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CannotRelease(f"git does not say which commit this is ({done.stderr.strip()}): give it with --commit.")
    return done.stdout.strip()


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status: 1, and nothing written, where the version is refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version", help="such as 0.2.0")
    parser.add_argument("--commit", help="the commit of the version, 40 digits; HEAD if it is not given")
    given = parser.parse_args(arguments)
    try:
        Releases().release(given.version, given.commit or _head())
    except CannotRelease as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(f"Released {given.version}: commit tests/contracts/released/{given.version} and releases.toml.\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
