"""A folder in which the processes on one port share their metrics: each of them shows the metrics of all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import deque
from pathlib import Path
from typing import Final

from prometheus_client.multiprocess import (
    mark_process_dead,  # pyright: ignore[reportUnknownVariableType]  # it has no types
)

from mercato.chassis.hosting import variables
from mercato.chassis.observability.telemetry import MULTIPROCESS_VARIABLE

SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108  # a folder with a random name is made in it
"""Where the folder is, on systems that have it: a mapped file on a full disk ends its process."""
PREFIX: Final = "mercato-metrics-"
ENDED_KEPT: Final = 64
"""How many ended processes keep their counts in the metrics."""


class MetricsFolder:
    """Creates the folder; its owner calls `remove` in the end."""

    def __init__(self) -> None:
        shared = SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else None
        self.path = tempfile.mkdtemp(prefix=PREFIX, dir=shared)
        self._ended: deque[int] = deque()

    def note_end(self, pid: int) -> None:
        """Removes the gauges of a process that has ended; its counters stay.

        Each restart leaves files: beyond `ENDED_KEPT` processes, those of the first one are removed, with its counts.
        """
        mark_process_dead(pid, self.path)
        self._ended.append(pid)
        if len(self._ended) > ENDED_KEPT:
            for file in Path(self.path).glob(f"*_{self._ended.popleft()}.db"):
                file.unlink(missing_ok=True)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def folder_of_owner() -> str | None:
    """The folder in which this process shares its metrics; None if it shares none, or not in a folder of Mercato."""
    folder = variables.value(MULTIPROCESS_VARIABLE)
    return folder if folder and Path(folder).name.startswith(PREFIX) else None
