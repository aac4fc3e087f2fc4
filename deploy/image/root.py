"""Makes the file system that all images of services begin with: an interpreter, what it needs, and the packages.

    /opt/mercato/bin/python deploy/image/root.py /image /migrating

Packages that only `mercato migrate` needs are put into the second folder, under the same paths.

It runs in the build, in the virtual environment that has the packages. It copies the interpreter with its standard
library, the shared libraries that these and the packages are linked to (`ldd`), without their symbols for debuggers
(`strip`), the certificates, and the account that processes run as. There is no shell, and no installer. The Debian
packages of which files were copied are listed in `/var/lib/dpkg/status.d`, where scanners of images look for them.
"""

from __future__ import annotations

import compileall
import contextlib
import importlib.metadata
import os
import re
import shutil
import ssl
import stat
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from py_compile import PycInvalidationMode
from typing import Final

HERE: Final = Path(__file__).parent
ACCOUNT: Final = 10001
"""The user and the group of every process; no account of a host has this number."""
FOLDER: Final = Path("/opt/mercato")
ENTRY: Final = f"#!{FOLDER}/bin/python\nimport sys\n\nfrom mercato.cli import main\n\nsys.exit(main())\n"
ONLY_MIGRATING: Final = ("alembic", "mako", "markupsafe", "sqlalchemy")
"""Distributions that a process that serves never imports (`tests/deploy/image_content.py`)."""
UNUSED: Final = (
    "ensurepip", "idlelib", "lib2to3", "pydoc_data", "test", "tkinter", "turtledemo", "site-packages", "dist-packages",
    "config-*", "_sysconfigdata_d_*", "__pycache__", "_tkinter*.so", "_test*.so", "_xxtest*.so", "xx*.so", "*.a",
    "sitecustomize.py",
)  # fmt: skip
"""Of the standard library: what is for the tests of Python, for windows, and for installing."""
NEEDED: Final = re.compile(r"=> (/\S+)|^\s*(/\S+) \(", re.MULTILINE)
"""A line of `ldd`: a library and where it is, or the loader."""


def main() -> None:
    root, migrating = map(Path, sys.argv[1:])
    _make_folders(root)
    _copy_packages(root)
    _copy_interpreter(root)
    binaries = [path for path in root.rglob("*") if path.suffix == ".so" or ".so." in path.name]
    _run("strip", "--strip-unneeded", *map(str, binaries)).check_returncode()
    _copy_libraries(root, [Path(sys.executable).resolve(), *binaries])
    _copy_certificates(root)
    _write_accounts(root)
    for folder in (root / f"opt/mercato/lib/python{_version()}", _inside(root, sysconfig.get_path("stdlib"))):
        compileall.compile_dir(
            folder, stripdir=str(root), prependdir="/", quiet=1, invalidation_mode=PycInvalidationMode.UNCHECKED_HASH
        )
    _list_debian_packages(root)
    for name in ONLY_MIGRATING:
        _move_distribution(name, root, migrating)


def _run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["/usr/bin/env", program, *arguments], capture_output=True, text=True, check=False)


def _version() -> str:
    return sysconfig.get_python_version()


def _inside(root: Path, path: str | Path) -> Path:
    return root / Path(path).relative_to("/")


def _make_folders(root: Path) -> None:
    """The folders of a Linux system; where Debian has links into `/usr`, the image has them too."""
    for name in ("dev", "etc", "proc", "run", "sys", "usr/bin", "usr/lib", "var/lib/dpkg/status.d"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for name in ("bin", "lib", "lib64"):
        link = Path("/", name)
        if link.is_symlink():
            (root / name).symlink_to(link.readlink())
            (root / link.readlink()).mkdir(parents=True, exist_ok=True)
    (root / "tmp").mkdir()
    (root / "tmp").chmod(stat.S_IRWXU | stat.S_IRWXG | stat.S_IRWXO | stat.S_ISVTX)


def _copy_packages(root: Path) -> None:
    """The virtual environment, and the command that is the entry point. The package itself is added by each image."""
    to = _inside(root, FOLDER)
    shutil.copytree(
        FOLDER, to, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.pyx", "*.c", "*.pxd", "*.pyi")
    )
    shutil.rmtree(to / "include")
    for script in (to / "bin").iterdir():
        if not script.name.startswith("python"):
            script.unlink()
    (to / "bin/mercato").write_text(ENTRY)
    (to / "bin/mercato").chmod(0o755)
    (to / "app").mkdir()
    (to / f"lib/python{_version()}/site-packages/app.pth").write_text(f"{FOLDER}/app\n")
    shutil.copy(HERE / "health.py", to)


def _copy_interpreter(root: Path) -> None:
    """The interpreter and its standard library, at the same places as here."""
    python = Path(sys.executable)
    while python.is_symlink():
        python = python.parent / python.readlink()
        if python.is_relative_to(FOLDER):
            continue  # copied with the virtual environment
        to = _inside(root, python)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(python, to, follow_symlinks=False)
    library = sysconfig.get_path("stdlib")
    shutil.copytree(library, _inside(root, library), symlinks=True, ignore=shutil.ignore_patterns(*UNUSED))


def _move_distribution(name: str, root: Path, to: Path) -> None:
    """Moves the installed files of a distribution, with what was compiled of them."""
    for file in importlib.metadata.distribution(name).files or ():
        path = Path(str(file.locate())).resolve()
        compiled = (path.parent / "__pycache__").relative_to("/")
        for found in (_inside(root, path), *(root / compiled).glob(f"{path.stem}.*.pyc")):
            if found.exists():
                target = to / found.relative_to(root)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(found, target)
    for folder, _, _ in os.walk(_inside(root, FOLDER / "lib"), topdown=False):
        with contextlib.suppress(OSError):  # it is not empty
            Path(folder).rmdir()


def _copy_libraries(root: Path, binaries: Iterable[Path]) -> None:
    """The shared libraries of `binaries`, under the names by which they are looked for."""
    for library in sorted({library for binary in binaries for library in _libraries(binary)}):
        if not library.is_relative_to(root) and not library.is_relative_to(FOLDER):
            place = _inside(root, library.parent.resolve() / library.name)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(library, place)
    with contextlib.suppress(FileNotFoundError):
        shutil.copy("/etc/ld.so.cache", root / "etc")


def _libraries(binary: Path) -> Iterator[Path]:
    done = _run("ldd", str(binary))  # fails for one that is linked to none
    if "not found" in done.stdout:
        sys.exit(f"root: {binary} needs a library that is not here:\n{done.stdout}")
    for found, loader in NEEDED.findall(done.stdout):
        yield Path(found or loader)


def _copy_certificates(root: Path) -> None:
    """The certificates of public authorities, where OpenSSL looks for them."""
    bundle = Path("/etc/ssl/certs/ca-certificates.crt")
    for path in (bundle, Path("/etc/os-release"), Path("/etc/nsswitch.conf")):
        if path.exists():
            _inside(root, path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, _inside(root, path))
    looked_for = _inside(root, ssl.get_default_verify_paths().openssl_cafile)
    looked_for.parent.mkdir(parents=True, exist_ok=True)
    looked_for.symlink_to(bundle)


def _write_accounts(root: Path) -> None:
    (root / "etc/passwd").write_text(
        f"root:x:0:0:root:/:/nonexistent\nmercato:x:{ACCOUNT}:{ACCOUNT}:mercato:/:/nonexistent\n"
    )
    (root / "etc/group").write_text(f"root:x:0:\nmercato:x:{ACCOUNT}:\n")


def _list_debian_packages(root: Path) -> None:
    """Copies the entries of the packages that own a copied file, and their licences."""
    owners = {owner for path in root.rglob("*") if path.is_file() for owner in _owners(path, root)}
    for name in sorted(owners):
        entry = _run("dpkg-query", "--status", name)
        entry.check_returncode()
        (root / "var/lib/dpkg/status.d" / name.partition(":")[0]).write_text(entry.stdout)
        licence = Path("/usr/share/doc", name.partition(":")[0], "copyright")
        if licence.exists():
            _inside(root, licence).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(licence, _inside(root, licence))


_OWNED: dict[str, list[str]] = {}


def _owners(path: Path, root: Path) -> list[str]:
    """The Debian packages that brought the file which was copied to `path`."""
    if not _OWNED:
        for listing in Path("/var/lib/dpkg/info").glob("*.list"):
            for line in listing.read_text().splitlines():
                _OWNED.setdefault(line, []).append(listing.name.removesuffix(".list"))
    original = "/" + os.fspath(path.relative_to(root))
    names = (original, original.removeprefix("/usr"))  # packages name files of /lib without /usr
    return next((_OWNED[name] for name in names if name in _OWNED), [])


if __name__ == "__main__":
    main()
