"""Faults that are injected into a command, or removed from it, while it runs: `prepare` is called there first.

    mercato up ...        reads lines `inject POINT` and `remove POINT`, and prints each when it is done
    mercato events ...    with `CRASH_AT=POINT`: a fault in a command that knows no `MERCATO_FAULTS`

A fault from `MERCATO_FAULTS` is there when a shop starts, and kills it where it first gets to the point. A test that
wants a crash in the middle of one request injects the fault when the shop is idle.
"""

from __future__ import annotations

import json
import os
import threading

from mercato import topology
from mercato.chassis.observability import faults


def prepare() -> None:
    topology.builds()  # a service declares its points when it is imported
    if wanted := os.environ.get("CRASH_AT"):
        faults.inject(wanted, faults.kill)
    threading.Thread(target=_listen, daemon=True).start()


def _listen() -> None:
    rest = b""
    # Not through `sys.stdin`, whose lock the interpreter needs when it ends.
    while read := os.read(0, 4_096):
        *lines, rest = (rest + read).split(b"\n")
        for line in lines:
            _execute(line.decode())


def _execute(line: str) -> None:
    verb, _, point = line.partition(" ")
    remove = faults.inject(point, faults.kill)
    if verb == "remove":
        remove()
    os.write(1, (json.dumps({"event": "executed", "line": line}) + "\n").encode())
