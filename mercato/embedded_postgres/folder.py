"""The data folder: one owner at a time, and the secret that it keeps.

An embedded Mercato stores its data below one folder; under root the database may be elsewhere (`place.py`).
`DataFolder.open` locks it for this process: an exclusive `flock` on `<data>/lock`, which the kernel releases when the
process ends in any way, so that there are no stale locks. The content of the file only tells another process which
process has the folder.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import sys
import time
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Self

import msgspec

if TYPE_CHECKING:
    from collections.abc import Generator

SECRET_BYTES = 32
OWNER_BYTES_MAX = 4096
OWNER_WAIT_SECONDS = 0.2


class SupervisorError(Exception):
    """A supervised server or folder cannot be used: one sentence that names the path and the fix."""


class DataFolderBusy(SupervisorError):
    """Another process owns the data folder; it has written `pid` and `url`, or they are None."""

    def __init__(self, path: Path, pid: int | None, url: str | None) -> None:
        self.pid = pid
        self.url = url
        who = "another Mercato" if pid is None else f"the Mercato with pid {pid} at {url}"
        super().__init__(f"{path} is in use by {who}: stop that one, or choose another data folder.")


class Owner(msgspec.Struct, frozen=True):
    """The content of the lock file: the process that holds the lock; `started` is RFC 3339, UTC."""

    pid: int
    url: str
    started: str


class DataFolder:
    """An open data folder, owned by this process until `close()` or its death."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock: int | None = lock

    @classmethod
    def open(cls, path: Path, url: str) -> DataFolder:
        """Take the folder for this process, creating it (mode 0700) when it does not exist; its parent must.

        `url` is the address of this process, for the error of another process that wants the folder.
        Raises DataFolderBusy, or SupervisorError when the folder cannot be used.
        """
        path = Path(os.path.abspath(path))
        require_text(path)
        with explained(path):
            _create(path)
            lock = _lock(path)
            try:
                _sign(lock, url)
            except BaseException:
                os.close(lock)
                raise
        return cls(path, lock)

    def secret(self) -> bytes:
        """The 32 random bytes of this folder, made on first use. Raises SupervisorError when they were damaged."""
        file = self.path / "secret"
        with explained(self.path):
            if not file.exists():
                write_atomically(file, secrets.token_bytes(SECRET_BYTES))
            found = file.read_bytes()
        if len(found) != SECRET_BYTES:
            # A new secret would make every password that was derived from the old one useless: the operator decides.
            raise SupervisorError(
                f"{file} holds {len(found)} bytes instead of {SECRET_BYTES}: restore it from a backup, "
                f"or remove {self.path} to start anew."
            )
        return found

    def close(self) -> None:
        """Release the folder. The lock file stays: otherwise two owners could lock two different files."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def require_text(path: Path) -> None:
    """Raise SupervisorError for a path with bytes that are no text: DSNs and JSON, which contain it, cannot."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        shown = os.fsencode(path).decode("ascii", "backslashreplace")
        encoding = sys.getfilesystemencoding()
        raise SupervisorError(
            f"The path {shown} is not text in the encoding {encoding} of this system: rename the folder, or choose "
            "another (--data)."
        ) from None


def _create(path: Path) -> None:
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        if not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from None
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def _lock(path: Path) -> int:
    file = path / "lock"
    while True:
        # Close-on-exec (Python's default): a child that kept the descriptor would keep the lock after our death.
        lock = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(lock, file):
                return lock
            os.close(lock)
        except BlockingIOError:
            owner = _read_owner(lock)
            os.close(lock)
            raise DataFolderBusy(path, owner and owner.pid, owner and owner.url) from None
        except BaseException:
            os.close(lock)
            raise


def _is_still(lock: int, file: Path) -> bool:
    """Whether the locked file is still at its path: the folder may have been deleted between opening and locking."""
    try:
        return os.path.samestat(os.fstat(lock), file.stat())
    except FileNotFoundError:
        return False


def _read_owner(lock: int) -> Owner | None:
    """The process that holds the lock; waits a moment for one that has not written its name yet."""
    deadline = time.monotonic() + OWNER_WAIT_SECONDS
    while True:
        try:
            return msgspec.json.decode(os.pread(lock, OWNER_BYTES_MAX, 0), type=Owner)
        except msgspec.DecodeError:
            if time.monotonic() > deadline:
                return None
            time.sleep(0.01)


def _sign(lock: int, url: str) -> None:
    owner = Owner(pid=os.getpid(), url=url, started=datetime.now(UTC).isoformat(timespec="seconds"))
    os.ftruncate(lock, 0)
    os.pwrite(lock, msgspec.json.encode(owner) + b"\n", 0)


def write_atomically(file: Path, content: bytes) -> None:
    """Replace `file` (mode 0600) so that after any crash it holds the old content or the new, never a part.

    Only the owner of the folder may call it: the temporary name is fixed, so that a crash leaves at most one file.
    """
    new = file.with_name(file.name + ".new")
    new.unlink(missing_ok=True)
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(descriptor)
    new.rename(file)
    sync_folder(file.parent)


def sync_folder(path: Path) -> None:
    """Make the names in a folder (a rename, a new file) survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that can be removed of it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def explained(path: Path) -> Generator[None]:
    """Turn an OSError about `path` into a SupervisorError that says what to do about it."""
    try:
        yield
    except OSError as error:
        raise SupervisorError(_sentence(path, error)) from error


def _sentence(path: Path, error: OSError) -> str:
    match error.errno:
        case errno.ENOENT if error.filename in (None, str(path)):
            return f"{path} cannot be created because {path.parent} does not exist: create that, or choose another."
        case errno.ENOTDIR | errno.EEXIST | errno.ELOOP:
            return f"{error.filename or path} is not what it must be ({error.strerror}): move it, or choose another."
        case errno.ENOSPC | errno.EDQUOT:
            return f"The disk that holds {path} is full: free some space, or choose a data folder on another disk."
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return f"{error.filename or path} may not be written by this user ({error.strerror}): change that, " \
                   "or choose another data folder."  # fmt: skip
        case errno.ENOLCK | errno.EOPNOTSUPP:
            return f"{path} is on a file system without locks: choose a data folder on a local disk."
        case _:
            return f"{path} cannot be used ({error}): repair it, or choose another data folder."
