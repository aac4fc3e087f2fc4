"""A folder in which the processes that answer on one port share their metrics: each of them shows those of all."""

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
"""Of so many processes that have ended, what they had counted is shown on."""


class MetricsFolder:
    """Made at once; its owner calls `remove` in the end."""

    def __init__(self) -> None:
        shared = SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else None
        self.path = tempfile.mkdtemp(prefix=PREFIX, dir=shared)
        self._ended: deque[int] = deque()

    def note_end(self, pid: int) -> None:
        """Of a process that has ended, what it had in work is gone, and what it has counted stays.

        Each that is started again leaves its files: of more than `ENDED_KEPT`, those of the first are removed, and
        what it had counted with them.
        """
        mark_process_dead(pid, self.path)
        self._ended.append(pid)
        if len(self._ended) > ENDED_KEPT:
            for file in Path(self.path).glob(f"*_{self._ended.popleft()}.db"):
                file.unlink(missing_ok=True)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def folder_of_owner() -> str | None:
    """The folder in which this process shares its metrics; None where it does not, or in one that others have made."""
    folder = variables.value(MULTIPROCESS_VARIABLE)
    return folder if folder and Path(folder).name.startswith(PREFIX) else None
