"""One process of a shop that is split. See `split.py`, which starts it.

It runs `mercato serve`. What that finds in its environment, this one is given as a line on its standard input, secrets
included: the environment of a process can be read by others. The pipe stays open: its end means that the owner asks the
process to stop, or is gone. What `serve --json` tells goes to standard output, and the log to standard error.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys

from mercato.cli.worker import OwnerWatch


def main() -> None:
    """Serves until the pipe is closed; exits with 1, after a sentence, when it cannot begin."""
    # Before it is told what to do: this takes longest, and the owner has not yet made the databases ready meanwhile.
    import socket

    import msgspec

    from mercato import topology
    from mercato.chassis.hosting import variables
    from mercato.chassis.observability import faults
    from mercato.cli import serve
    from mercato.cli.shared_metrics import folder_of_owner
    from mercato.cli.split import InstanceAssignment

    owner, transport, hosts, _ = sys.argv[1:]
    importlib.import_module(f"mercato.chassis.rpc.transports.{transport}")
    topology.builds([name for name in hosts.split(",") if name in topology.SERVICES])
    assignment = sys.stdin.buffer.readline()
    if not assignment:  # the owner stops already, or has died
        sys.exit(1)
    owner_watch = OwnerWatch(owner=int(owner), metrics=folder_of_owner())
    owner_watch.follow()
    told = msgspec.json.decode(assignment, type=InstanceAssignment)
    variables.replace(told.environment)
    if wanted := variables.value("MERCATO_FAULTS"):
        # Those of all services, which the owner has looked at: each process takes its own.
        own = (entry for entry in wanted.split(",") if entry.partition("=")[0] in faults.POINTS)
        variables.replace({"MERCATO_FAULTS": ",".join(own)})

    def ask_to_stop() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    owner_watch.on_end(ask_to_stop)
    listener = None if told.listener is None else socket.socket(fileno=told.listener)
    options = serve.Options(names=told.hosts, host=told.host, port=0, auth=told.auth, json=True)
    try:
        code = serve.run(options, listener, told.counts)
    finally:
        owner_watch.clean_up()
    sys.exit(code)


if __name__ == "__main__":
    main()
