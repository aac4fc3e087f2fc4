"""The places below /var/lib/mercato: what the server's account cannot reach elsewhere (`place.py`), under root alone.

    /var/lib/mercato/<id>/    the place: root's, 0755; holds owner, and postgres/ (0700), binaries/ as needed
    /var/lib/mercato/lock     locked while a place is made, or judged and given up for removal
    <data>/postgres.owner     the same file as <place>/owner (a hard link)

A place whose data folder was deleted is removed at root's next start. That deletes a database, so a missing path is not
proof enough (the folder may have been moved, or its disk is not mounted), but the hard link is: it follows the folder
through renames, and its count falls to one only when the file in the folder has been removed. On different file systems
no hard link is possible; such a place is only reported to the operator, never removed automatically.

Several processes do this at once, and each may be killed at any point. A place is made as `<id>.new`, and gets its name
when its owner is in it; one to remove becomes `<id>.removed` first. What a killed process leaves under these names is
removed at root's next start, so that no place is left without an owner.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from mercato.embedded_postgres.folder import SupervisorError, explained, remove, sync_folder
from mercato.embedded_postgres.processes import serving
from mercato.embedded_postgres.record import PLACE_NAME, REMOVE_COMMAND, read_record

if TYPE_CHECKING:
    from collections.abc import Collection, Generator

PLACES = Path("/var/lib/mercato")
LOCK = "lock"
LOCK_SECONDS = 60.0
"""A bound: the lock is held for milliseconds."""
LOCK_POLL_SECONDS = 0.01
NEW = ".new"
REMOVED = ".removed"


class PlaceOwner(msgspec.Struct, frozen=True):
    """`<place>/owner`: the data folder that the place belongs to, and whether that holds a hard link to this file."""

    data: str
    linked: bool


def claim(place: Path, data: Path) -> None:
    """Make the place of this data folder, unless it exists."""
    with _locked():
        if place.exists():
            _reclaim(place, data)
            return
        new = place.with_name(place.name + NEW)
        remove(new)
        _make_passable(new)
        _give_owner(new, data)
        new.rename(place)
        sync_folder(PLACES)


def _reclaim(place: Path, data: Path) -> None:
    """Check that an existing place is this data folder's, and write down where that is now."""
    if not belongs(place, data):
        owner = _read_owner(place)
        raise SupervisorError(
            f"{data} is a copy of {owner and owner.data}, whose database is in {place} and was not copied with it: use "
            f"that folder, or run `{REMOVE_COMMAND} {data}` to give this one a database of its own."
        )
    if _read_owner(place) != PlaceOwner(str(data), linked=True) or not _is_marked(place, data):
        _give_owner(place, data)


def belongs(place: Path, data: Path) -> bool:
    """Whether the place is this data folder's: by the link, by the path, or because the named folder was moved."""
    owner = _read_owner(place)
    return owner is None or owner.data == str(data) or _is_marked(place, data) or not Path(owner.data).exists()


def _give_owner(place: Path, data: Path) -> None:
    mark = data / "postgres.owner"
    _write_owner(place, PlaceOwner(str(data), linked=False))
    mark.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # On another file system there is no link, and no proof of a deletion.
        mark.hardlink_to(place / "owner")
        _write_owner(place, PlaceOwner(str(data), linked=True))


def _is_marked(place: Path, data: Path) -> bool:
    try:
        return (data / "postgres.owner").samefile(place / "owner")
    except FileNotFoundError:
        return False


def _read_owner(place: Path) -> PlaceOwner | None:
    try:
        return msgspec.json.decode((place / "owner").read_bytes(), type=PlaceOwner)
    except (OSError, msgspec.DecodeError):
        return None


def _write_owner(place: Path, owner: PlaceOwner) -> None:
    # Written in place, not renamed: the hard link of the data folder is to this file. In one piece, with blanks for the
    # rest of a longer one, so that neither a reader nor a crash meets a part of it.
    descriptor = os.open(place / "owner", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        content = msgspec.json.encode(owner).ljust(os.fstat(descriptor).st_size - 1) + b"\n"
        os.pwrite(descriptor, content, 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class FoundPlace(msgspec.Struct, frozen=True):
    """A place below /var/lib/mercato.

    `state`: of its data folder. "used": it names the place, or a server runs there; "deleted": proven by the link;
    "moved": the link shows that it exists under another name; "missing": it is not at its path, for an unknown reason.
    """

    path: Path
    data: str
    state: Literal["used", "deleted", "moved", "missing"]
    has_database: bool

    @property
    def content(self) -> str:
        return "the database" if self.has_database else "the programs"


def places() -> list[FoundPlace]:
    """All places that name their data folder, sorted by path."""
    paths = sorted(PLACES.iterdir()) if PLACES.is_dir() else []
    return [found for path in paths if re.match(PLACE_NAME, path.name) and (found := _found(path)) is not None]


def _found(path: Path) -> FoundPlace | None:
    """What is known of a place; None if it names no data folder, or another process has just removed it."""
    owner = _read_owner(path)
    if owner is None:
        return None
    try:
        return FoundPlace(path, owner.data, _state(path, owner), (path / "postgres").exists())
    except FileNotFoundError:
        return None


def _state(place: Path, owner: PlaceOwner) -> Literal["used", "deleted", "moved", "missing"]:
    if _is_in_use(place, Path(owner.data)):
        return "used"
    if not owner.linked:
        return "missing"
    return "deleted" if (place / "owner").stat().st_nlink == 1 else "moved"


def _is_in_use(place: Path, data: Path) -> bool:
    """Whether a server runs in the place, or the data folder still names it, even if its link was removed."""
    try:
        return bool(serving(place / "postgres")) or read_record(data).place == place.name
    except (OSError, SupervisorError):
        return True


def prune() -> list[FoundPlace]:
    """Remove the places whose data folder is deleted or missing; gives them. Whether a missing one is deleted, only the
    operator knows.

    For root. Places whose folder was moved, or is used, stay.
    """
    _remove_leftovers()
    return [found for found in places() if found.state in ("deleted", "missing") and _discard(found)]


def remove_abandoned() -> list[str]:
    """Remove the places whose data folder was deleted; returns a line for each, and for each undecided one."""
    lines: list[str] = []
    _remove_leftovers()
    for found in places():
        if found.state == "deleted":
            if _discard(found):
                lines.append(f"removed {found.path}, {found.content} of {found.data}, which was deleted")
        elif found.state == "missing" or (found.state == "moved" and not Path(found.data).exists()):
            lines.append(
                f"kept {found.path}, {found.content} of {found.data}, which is not there: was it moved, or deleted? "
                "`mercato doctor` lists these"
            )
    return lines


def _discard(found: FoundPlace) -> bool:
    """Remove the place, if its data folder is still in the same state; gives whether this process has done so.

    Another process may have removed the place since it was found, or may be about to start on its data folder.
    """
    with _locked():
        again = _found(found.path)
        if again is None or again.state != found.state:
            return False
        removed = _give_up(found.path)
    remove(removed)
    return True


def remove_place(place: Path) -> None:
    """Remove a place, if there is one, whose data folder the caller owns: no other process removes it."""
    if place.exists():
        with _locked():
            removed = _give_up(place)
        remove(removed)


def _give_up(place: Path) -> Path:
    """Take the name from a place, which is then removed without the lock; if not by this process, by the next start."""
    removed = place.with_name(place.name + REMOVED)
    place.rename(removed)
    return removed


def _remove_leftovers() -> None:
    """Complete the removals that were interrupted, and remove what interrupted starts have begun to make."""
    if _with_suffix(NEW):
        with _locked():  # what is there now belongs to no process that lives
            for path in _with_suffix(NEW):
                remove(path)
    for path in _with_suffix(REMOVED):
        remove(path)


def _with_suffix(suffix: str) -> Collection[Path]:
    return [path for path in PLACES.glob(f"*{suffix}") if re.match(PLACE_NAME, path.name.removesuffix(suffix))]


@contextlib.contextmanager
def _locked() -> Generator[None]:
    """One process at a time makes places, or decides which ones are removed.

    The file is root's alone: a lock on the folder could be taken by each user who can read it.
    """
    with explained(PLACES):
        with contextlib.suppress(FileExistsError):
            _make_passable(PLACES)
        lock = os.open(PLACES / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        with explained(PLACES):
            _wait_for_lock(lock)
        yield
    finally:
        os.close(lock)


def _wait_for_lock(lock: int) -> None:
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise SupervisorError(
                    f"{PLACES} has been locked by another Mercato for {LOCK_SECONDS:.0f} s: "
                    f"end that process (`fuser {PLACES / LOCK}` shows it), and start again."
                ) from None
            time.sleep(LOCK_POLL_SECONDS)
        else:
            return


def _make_passable(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o755)  # Whatever the umask: the server's account must get through.
