"""The file of a backup: a zip archive.

    orders/orders.copy       the rows of a table, in the format of PostgreSQL's `COPY ... TO STDOUT`, in UTF-8
    ...
    manifest.json            the last entry: `Manifest`

It has no schema: the migrations of the version in the manifest create it. The manifest has the SHA-256 of the rows of
each table; the checksums of zip protect the manifest.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import hashlib
import os
import secrets
import struct
import zipfile
import zlib
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import IO, Annotated, Final

import msgspec

from mercato.operations.copying import CopyError

FORMAT: Final = 1
MANIFEST: Final = "manifest.json"
MANIFEST_BYTES_MAX: Final = 16 * 1024 * 1024
CHUNK_BYTES: Final = 1024 * 1024
MODE: Final = 0o600
VIOLATED: Final = ".violated"
"""The suffix of the name of a backup in which an invariant does not hold."""

# The errors of the libraries for bytes that are not, or no longer, an archive.
_UNREADABLE: Final = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    msgspec.MsgspecError,
    EOFError,
    OSError,
    OverflowError,
    RuntimeError,
    ValueError,
)

Sha256 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]


class TableEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The rows of a table in the archive."""

    columns: tuple[str, ...]
    rows: int
    sha256: Sha256


class Sequence(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The position of a sequence."""

    last_value: int
    is_called: bool


class DatabaseEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The database of a service in the archive."""

    revisions: Mapping[str, Sha256]
    """The revisions of its schema, with the checksums of their statements."""
    tables: Mapping[str, TableEntry]
    sequences: Mapping[str, Sequence]


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of the archive. `holds`: no invariant was violated; `violated` names those that were."""

    format: int
    version: str
    taken_at: datetime.datetime
    pause_seconds: float
    holds: bool
    violated: tuple[str, ...]
    databases: Mapping[str, DatabaseEntry]


class Writer:
    """Writes an archive, table by table."""

    def __init__(self, archive: zipfile.ZipFile, target: Path) -> None:
        self._archive = archive
        self._target = target

    @contextlib.contextmanager
    def table(self, service: str, table: str) -> Generator[TableWriter]:
        """Writes the rows of a table for the time of the block. Raises `CopyError`."""
        with _explained(self._target), self._archive.open(_entry(service, table), "w", force_zip64=True) as stream:
            yield TableWriter(stream, self._target)

    def finish(self, manifest: Manifest) -> None:
        """Writes the manifest, which must be the last entry."""
        self._archive.writestr(MANIFEST, msgspec.json.format(msgspec.json.encode(manifest), indent=1))


class TableWriter:
    """Writes the rows of one table, and computes their checksum."""

    def __init__(self, stream: IO[bytes], target: Path) -> None:
        self._stream = stream
        self._target = target
        self._digest = hashlib.sha256()

    async def write(self, chunk: bytes) -> None:
        self._digest.update(chunk)
        with _explained(self._target):
            self._stream.write(chunk)

    @property
    def sha256(self) -> Sha256:
        return self._digest.hexdigest()


class Draft:
    """A temporary file in the folder of `target`, until it is published."""

    def __init__(self, stream: IO[bytes], path: Path, target: Path) -> None:
        self._path = path
        self.stream = stream
        self.target = target

    def publish(self, target: Path) -> None:
        """Gives it a name, atomically and with all its content. Raises `CopyError` where the name is taken."""
        self.stream.flush()
        os.fsync(self.stream.fileno())
        try:
            os.link(self._path, target)
        except FileExistsError:
            raise CopyError(_taken(target)) from None
        _sync_folder(target.parent)


@contextlib.contextmanager
def draft(target: Path) -> Generator[Draft]:
    """A file in the folder of `target`, which is deleted at the end of the block unless it was published.

    Raises `CopyError` for a name that is taken, or a file that cannot be written.
    """
    if os.path.lexists(target):
        raise CopyError(_taken(target))
    path = target.with_name(f".{target.name}.{secrets.token_hex(8)}.part")
    with _explained(target):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, MODE)
        try:
            with os.fdopen(descriptor, "w+b") as stream:
                yield Draft(stream, path, target)
        finally:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def writer(file: Draft) -> Generator[Writer]:
    """Writes an archive into `file` for the time of the block; it is complete at its end."""
    archive = zipfile.ZipFile(file.stream, "w", zipfile.ZIP_DEFLATED, compresslevel=1)
    try:
        yield Writer(archive, file.target)
    except BaseException:
        with contextlib.suppress(OSError, ValueError):  # the file is not published
            archive.close()
        raise
    archive.close()


class Archive:
    """An archive whose checksums were all verified."""

    def __init__(self, archive: zipfile.ZipFile, path: Path, manifest: Manifest) -> None:
        self._archive = archive
        self._path = path
        self.manifest = manifest

    def rows(self, service: str, table: str) -> Iterator[bytes]:
        """The rows of a table, in pieces. Raises `CopyError` where the file has changed since it was checked."""
        digest = hashlib.sha256()
        for chunk in _chunks(self._archive, _entry(service, table)):
            digest.update(chunk)
            yield chunk
        if digest.hexdigest() != self.manifest.databases[service].tables[table].sha256:
            raise CopyError(_damaged(self._path))


@contextlib.contextmanager
def opened(path: Path) -> Generator[Archive]:
    """Reads a whole archive and verifies its checksums, then gives it for the time of the block.

    Raises `CopyError` for a file that is no archive, is damaged or truncated, or has another format.
    """
    with contextlib.ExitStack() as stack:
        try:
            stream = stack.enter_context(path.open("rb"))
        except OSError as error:
            raise CopyError(f"{path} cannot be read: {error.strerror}; name the file of a backup") from error
        try:
            found = _checked(stack.enter_context(zipfile.ZipFile(stream)), path)
        except _UNREADABLE as error:
            raise CopyError(_damaged(path)) from error
        yield found


def _checked(archive: zipfile.ZipFile, path: Path) -> Archive:
    if any(info.compress_type != zipfile.ZIP_DEFLATED for info in archive.infolist()):
        raise CopyError(_damaged(path))
    manifest = _manifest(archive, path)
    expected = [_entry(name, table) for name, entry in manifest.databases.items() for table in entry.tables]
    if sorted(archive.namelist()) != sorted([*expected, MANIFEST]):
        raise CopyError(_damaged(path))
    found = Archive(archive, path, manifest)
    for name, entry in manifest.databases.items():
        for table in entry.tables:
            for _ in found.rows(name, table):
                pass
    return found


def _manifest(archive: zipfile.ZipFile, path: Path) -> Manifest:
    try:
        info = archive.getinfo(MANIFEST)
    except KeyError:
        raise CopyError(_damaged(path)) from None
    if info.file_size > MANIFEST_BYTES_MAX:
        raise CopyError(_damaged(path))
    encoded = archive.read(info)
    found = msgspec.json.decode(encoded, type=dict[str, msgspec.Raw]).get("format")
    if found != msgspec.Raw(str(FORMAT).encode()):
        raise CopyError(f"{path} is a backup of another format: restore it with the version of mercato that made it")
    return msgspec.json.decode(encoded, type=Manifest)


def _chunks(archive: zipfile.ZipFile, entry: str) -> Iterator[bytes]:
    with archive.open(entry) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            yield chunk


def _entry(service: str, table: str) -> str:
    return f"{service}/{table}.copy"


def _damaged(path: Path) -> str:
    return f"{path} is damaged, cut short or no backup: nothing was changed; take another backup"


def _taken(target: Path) -> str:
    return f"{target} is there already, and a backup never overwrites a file: choose another name"


@contextlib.contextmanager
def _explained(target: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CopyError(f"the disk that holds {target} is full: nothing is left there; free some space") from error
        if error.errno is None or isinstance(error, TimeoutError | ConnectionError):
            raise
        raise CopyError(f"{target} cannot be written: {error.strerror}; choose another place") from error


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
