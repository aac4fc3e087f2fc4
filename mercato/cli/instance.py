"""One process of a shop that is split. See `split.py`, which starts it.

It runs `mercato serve`. It gets the variables of that command, secrets included, as a line on its standard input: other
processes can read its environment. The pipe stays open: its end means that the owner asks the process to stop, or has
died. The output of `serve --json` goes to standard output, the log to standard error.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys

from mercato.cli.worker import OwnerWatch


def main() -> None:
    """Serves until the pipe is closed; exits with 1, after a sentence, when it cannot begin."""
    # Before the assignment arrives: imports take longest, and the owner prepares the databases meanwhile.
    import socket

    import msgspec

    from mercato import topology
    from mercato.chassis.hosting import variables
    from mercato.chassis.observability import faults
    from mercato.cli import serve
    from mercato.cli.shared_metrics import folder_of_owner
    from mercato.cli.split import InstanceAssignment

    transport, hosts, _ = sys.argv[1:]
    importlib.import_module(f"mercato.chassis.rpc.transports.{transport}.remote")
    topology.builds([name for name in hosts.split(",") if name in topology.SERVICES])
    owner_watch = OwnerWatch(metrics=folder_of_owner())
    assignment = owner_watch.assignment()
    if not assignment:
        owner_watch.clean_up()
        sys.exit(1)
    owner_watch.follow()
    assigned = msgspec.json.decode(assignment, type=InstanceAssignment)
    variables.replace(assigned.environment)
    if wanted := variables.value("MERCATO_FAULTS"):
        # The options of all services, which the owner has checked: each process uses those of its own services.
        own = (entry for entry in wanted.split(",") if entry.partition("=")[0] in faults.POINTS)
        variables.replace({"MERCATO_FAULTS": ",".join(own)})

    def ask_to_stop() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    owner_watch.on_end(ask_to_stop)
    listener = None if assigned.listener is None else socket.socket(fileno=assigned.listener)
    options = serve.Options(names=assigned.hosts, host=assigned.host, port=0, auth=assigned.auth, json=True)
    try:
        code = serve.run(options, listener, assigned.counts, assigned.grpc)
    finally:
        owner_watch.clean_up()
    sys.exit(code)


if __name__ == "__main__":
    main()
