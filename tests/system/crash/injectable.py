"""The real command, with a door for tests: a fault is planted, or taken away, while it runs.

    injectable.py up ...        a line `plant POINT` or `uproot POINT` on standard input, and it says when it is done
    injectable.py events ...    with `CRASH_AT=POINT`: a fault in a command that knows no `MERCATO_FAULTS`

What `MERCATO_FAULTS` plants is there when a shop starts, and kills it wherever it gets to the point first. A test that
wants a crash in the middle of one request plants the fault when everything else has come to rest.
"""

from __future__ import annotations

import json
import os
import threading

from mercato import topology
from mercato.chassis.observability import faults
from mercato.cli import main


def _obey(line: str) -> None:
    verb, _, point = line.partition(" ")
    uproot = faults.plant(point, faults.kill)
    if verb == "uproot":
        uproot()
    os.write(1, (json.dumps({"event": "obeyed", "line": line}) + "\n").encode())


def _listen() -> None:
    rest = b""
    # Not through `sys.stdin`, whose lock the interpreter needs when it ends.
    while read := os.read(0, 4_096):
        *lines, rest = (rest + read).split(b"\n")
        for line in lines:
            _obey(line.decode())


if __name__ == "__main__":
    topology.builds()  # a service declares its points when it is imported
    if wanted := os.environ.get("CRASH_AT"):
        faults.plant(wanted, faults.kill)
    threading.Thread(target=_listen, daemon=True).start()
    main()
