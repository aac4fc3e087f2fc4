"""`mercato logs`: the logs of all processes of a shop as one, from the files in its data folder.

Each process that `mercato up` starts writes its log to standard error, and to a file of its own, `logs/NAME.log`, with
an older one beside it. So a shop that has ended still says why.
"""

from __future__ import annotations

import asyncio
import heapq
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from mercato.cli import databases
from mercato.cli.progress import is_coloured, show
from mercato.cli.starting import CannotStart

FOLDER: Final = "logs"
OWNER: Final = "shop"
"""The name of the process of `mercato up` itself: of a shop in one process all of it."""
OLDER: Final = ".1"
FOLLOW_SECONDS: Final = 0.2
LEVELS: Final = ("debug", "info", "warning", "error", "critical")
SHOWN_FIRST: Final = frozenset({"timestamp", "level", "event", "process", "service"})
COLOURS: Final = {"error": "\033[31m", "critical": "\033[31m", "warning": "\033[33m"}
PLAIN: Final = "\033[0m"

Entry = Mapping[str, Any]


class Wanted(msgspec.Struct, frozen=True):
    """Which lines are shown: all that are given must fit."""

    service: str | None = None
    level: str = "debug"
    trace_id: str | None = None
    order_id: int | None = None

    def fits(self, entry: Entry) -> bool:
        level = str(entry.get("level", "info"))
        if level in LEVELS and LEVELS.index(level) < LEVELS.index(self.level):
            return False
        names = (entry.get("service"), str(entry.get("process", "")).partition(".")[0])
        if self.service is not None and self.service not in names:
            return False
        if self.order_id is not None and entry.get("order_id") != self.order_id:
            return False
        return self.trace_id is None or entry.get("trace_id") == self.trace_id


def log_file(data: Path, name: str) -> Path:
    """The file of the log of a process, by its name."""
    return data / FOLDER / f"{name}.log"


def logs(data: Path, wanted: Wanted, *, last: int, follow: bool, as_json: bool) -> int:
    """Prints the last lines, the oldest first, and with `follow` those that are written from now on, until Ctrl-C."""
    return databases.run(lambda: _logs(data, wanted, last=last, follow=follow, as_json=as_json))


async def _logs(data: Path, wanted: Wanted, *, last: int, follow: bool, as_json: bool) -> int:
    folder = data / FOLDER
    if not folder.is_dir():
        raise CannotStart(f"no shop has written a log in {data}: `mercato up` does")
    readers = Readers(folder)
    found = [entry for entry in readers.read() if wanted.fits(entry)]
    has_colours = is_coloured()
    for entry in found[len(found) - min(last, len(found)) :]:
        _show(entry, as_json=as_json, has_colours=has_colours)
    try:
        while follow:
            await asyncio.sleep(FOLLOW_SECONDS)
            for entry in readers.read():
                if wanted.fits(entry):
                    _show(entry, as_json=as_json, has_colours=has_colours)
    except asyncio.CancelledError:
        pass  # Ctrl-C is how following ends
    return 0


def _show(entry: Entry, *, as_json: bool, has_colours: bool) -> None:
    if as_json:
        show(json.dumps(entry, ensure_ascii=False))
        return
    level = str(entry.get("level", ""))
    text = line_of(entry)
    show(f"{COLOURS[level]}{text}{PLAIN}" if has_colours and level in COLOURS else text)


def line_of(entry: Entry) -> str:
    """An entry for people: time, level, process, event, and then all else. A traceback follows on lines of its own."""
    at = str(entry.get("timestamp", ""))[:23].replace("T", " ")
    rest = {name: value for name, value in entry.items() if name not in SHOWN_FIRST and value != ""}
    trace = rest.pop("exception", None)
    where = str(entry.get("process", ""))
    service = entry.get("service")
    if service and service != where.partition(".")[0]:
        where = f"{where}/{service}"
    values = " ".join(f"{name}={_value(value)}" for name, value in rest.items())
    text = f"{at:<23} {entry.get('level', ''):<8} {where:<18} {entry.get('event', '')}  {values}".rstrip()
    return text if trace is None else f"{text}\n{str(trace).rstrip()}"


def _value(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return json.dumps(text, ensure_ascii=False) if " " in text and isinstance(value, str) else text


# --------------------------------------------------------------------------------------------------------- the files


class Readers:
    """Reads what was appended to the files of a folder since the last time, ordered by time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[str, LogReader] = {}

    def read(self) -> list[Entry]:
        for file in sorted(self._folder.glob("*.log")):
            if file.stem not in self._known:
                self._known[file.stem] = LogReader(file)
        each = [reader.read() for reader in self._known.values()]
        return list(heapq.merge(*each, key=lambda entry: str(entry.get("timestamp", ""))))


class LogReader:
    """Reads one log: first the older file, then the current one; goes on when that becomes the older one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._name = path.stem
        self._inode: int | None = None
        self._offset = 0
        self._is_first = True

    def read(self) -> list[Entry]:
        """The whole lines that were written since the last time."""
        entries: list[Entry] = []
        older = self._path.with_name(self._path.name + OLDER)
        if self._is_first:
            self._is_first = False
            entries += self._entries(older, 0)[0]
        inode = _inode_of(self._path)
        if self._inode is not None and inode != self._inode:
            if _inode_of(older) == self._inode:
                entries += self._entries(older, self._offset)[0]
            self._offset = 0
        self._inode = inode
        found, self._offset = self._entries(self._path, self._offset)
        return entries + found

    def _entries(self, path: Path, offset: int) -> tuple[list[Entry], int]:
        """The entries behind `offset`, and where they end: a line that is not whole yet is left."""
        try:
            with path.open("rb") as file:
                file.seek(offset)
                text = file.read()
        except OSError:
            return [], offset
        whole = text[: text.rfind(b"\n") + 1]
        return list(self._parsed(whole.splitlines())), offset + len(whole)

    def _parsed(self, lines: Sequence[bytes]) -> Iterator[Entry]:
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:
                entry = {"event": line.decode(errors="replace")}
            if isinstance(entry, dict):
                yield {"process": self._name, **entry}


def _inode_of(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except OSError:
        return None
