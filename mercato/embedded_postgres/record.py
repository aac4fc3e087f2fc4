"""The record of a cluster, `<data>/postgres.json`: where it is, whether it is complete, and its format."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import msgspec

from mercato.embedded_postgres.folder import SupervisorError, explained, write_atomically

if TYPE_CHECKING:
    from pathlib import Path

FORMAT = 2
"""The format of the databases in a cluster. 1: before revisions had checksums, which this version cannot use."""
REMOVE_COMMAND = "python -m mercato.embedded_postgres --remove"
PLACE_NAME = r"^[0-9a-f]{16}\Z"
Place = Annotated[str, msgspec.Meta(pattern=PLACE_NAME)]
SocketFolder = Annotated[str, msgspec.Meta(pattern=r"^/[^\0]*/mercato-[a-z0-9_]+\Z")]


class ClusterRecord(msgspec.Struct, frozen=True):
    """`<data>/postgres.json`. Written before the folders that it names are made, so that none is lost track of.

    `place` is the folder's name below /var/lib/mercato; `outside` says that the cluster is in it (else only binaries);
    `initialized` is set once the cluster is complete: from then on its absence is a loss, not a first start;
    `format` is that of the databases in it (`FORMAT`), written with `initialized`;
    `socket_folder` is a folder for sockets elsewhere, if the path would be too long; the next process removes it.
    Root deletes the folders named here, and another user may have written the file: hence the patterns.
    """

    place: Place | None = None
    outside: bool = False
    initialized: bool = False
    format: int = 1
    socket_folder: SocketFolder | None = None


def read_record(data: Path) -> ClusterRecord:
    """The record of the cluster of this data folder; the defaults if it never had one."""
    file = data / "postgres.json"
    try:
        return msgspec.json.decode(file.read_bytes(), type=ClusterRecord)
    except FileNotFoundError:
        return ClusterRecord()
    except msgspec.DecodeError as error:
        raise SupervisorError(f"{file} is damaged ({error}): restore it, or remove {data} to start anew.") from error


def require_known_format(data: Path) -> None:
    """Raise SupervisorError for a folder whose cluster was made by a version of Mercato that is not compatible.

    Reads one file and changes none, so that it needs no lock: no version changes the format of a complete cluster.
    """
    with explained(data):
        record = read_record(data)
    if not record.initialized or record.format == FORMAT:
        return
    if record.format > FORMAT:
        raise SupervisorError(
            f"The shop in {data} was made by a newer version of Mercato; nothing in it was changed: "
            f"start it with that version, or begin a new shop in another folder (--data)."
        )
    raise SupervisorError(
        f"The shop in {data} was made by an earlier commit of Mercato, whose databases this one cannot continue; "
        f"nothing in it was changed: start it with the commit that made it, or begin a new shop in another folder "
        f"(--data)."
    )


def write_record(data: Path, record: ClusterRecord) -> None:
    """Replace the record, unless it says the same already."""
    if record != read_record(data) or not (data / "postgres.json").exists():
        write_atomically(data / "postgres.json", msgspec.json.encode(record) + b"\n")


def note_initialized(data: Path) -> None:
    """Record that the cluster is complete."""
    record = read_record(data)
    if not record.initialized:
        write_record(data, msgspec.structs.replace(record, initialized=True, format=FORMAT))


def note_socket_folder(data: Path, folder: Path | None) -> None:
    """Record a socket folder outside of `home`; None: there is none, or no longer."""
    wanted = None if folder is None else str(folder)
    write_record(data, msgspec.structs.replace(read_record(data), socket_folder=wanted))
