"""Faults in the processes of a split shop, for tests: Python imports this file at its start, where it is on PYTHONPATH.

In the folder MERCATO_TEST_FAULTS, a file `armed` names a point. Each process confirms that it has read it by a file
`seen-PID`. The first that comes to the point renames `armed` to `killed`, and dies there; no other does.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

POLL_SECONDS = 0.02


def _armed(folder: Path) -> str:
    try:
        return (folder / "armed").read_text()
    except OSError:
        return ""


def _follow(folder: Path) -> None:
    known = ""
    remove = None

    async def kill_once(_: str) -> None:
        try:
            (folder / "armed").rename(folder / "killed")
        except OSError:  # another process was first, or it is disarmed
            return
        os.kill(os.getpid(), signal.SIGKILL)

    while True:
        time.sleep(POLL_SECONDS)
        point = _armed(folder)
        if point == known:
            continue
        # Loaded by now: a point is armed while the shop is at rest.
        faults = sys.modules["mercato.chassis.observability.faults"]
        if remove is not None:
            remove()
            remove = None
        if point in faults.POINTS:
            remove = faults.inject(point, kill_once)
        known = point
        if point:
            (folder / f"seen-{os.getpid()}").touch()


if "mercato.cli.instance" in sys.orig_argv:
    threading.Thread(target=_follow, args=(Path(os.environ["MERCATO_TEST_FAULTS"]),), daemon=True).start()
