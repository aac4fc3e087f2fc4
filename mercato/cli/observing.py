"""The commands that show what a running shop does, and what its API is. Each imports the module that implements it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter, validators

from mercato.cli.options import DataFolder, LogLevel


def register(app: App) -> None:
    """Adds these commands to the command line."""
    for command in (services, doctor, trace, top, logs, openapi):
        app.command(command)


def services(*, data: DataFolder = Path(".mercato"), json: Annotated[bool, Parameter(negative="")] = False) -> int:
    """List the processes of a shop with several processes: version, health, calls per second, 99th percentile.

    Exits with 1 if a service has no process that answers. NATS_URL or MERCATO_SERVICES say where they are, else
    the data folder of `mercato up --split`.

    Parameters
    ----------
    data
        The folder of the shop's data.
    json
        Print one JSON document.
    """
    from mercato.cli.looking import services as run

    return run(data, as_json=json)


def trace(
    wanted: str | None = None,
    /,
    *,
    data: DataFolder = Path(".mercato"),
    at: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    limit: Annotated[int, Parameter(validator=validators.Number(gte=1, lte=100))] = 5,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Show what was done for an order: by which service, from when to when, over all processes.

    Traces are kept for an hour: those of the first requests a second, and of a share of the others.

    Parameters
    ----------
    wanted
        The id of an order, as in 1001, or of a trace. Without it, the latest traces are listed.
    data
        The folder of the shop's data.
    at
        An address of a process that was started by `mercato serve`: its MERCATO_DIAGNOSTICS_ADDRESS. May be given
        several times.
    limit
        How many traces at most, the latest ones.
    json
        Print one JSON document.
    """
    from mercato.cli.trace import trace as run

    return run(wanted, data, at, limit=limit, as_json=json)


def top(
    *,
    data: DataFolder = Path(".mercato"),
    at: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    every: Annotated[float, Parameter(validator=validators.Number(gte=0.1, lte=3_600))] = 2.0,
    count: Annotated[int | None, Parameter(validator=validators.Number(gte=1))] = None,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Show what each service does at the moment: calls a second, percentiles, errors, queue, breaker.

    Ctrl-C ends it.

    Parameters
    ----------
    data
        The folder of the shop's data.
    at
        An address of a process that was started by `mercato serve`: its MERCATO_DIAGNOSTICS_ADDRESS. May be given
        several times.
    every
        Seconds between two tables.
    count
        How many tables; without it, until Ctrl-C.
    json
        Print one JSON document a line instead of tables.
    """
    from mercato.cli.top import top as run

    return run(data, at, every=every, count=count, as_json=json)


def doctor(
    *,
    data: DataFolder = Path(".mercato"),
    prune: Annotated[bool, Parameter(negative="")] = False,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Show by which registry the services of a shop are found, what it lists, and why it does not list a service.

    Also lists the databases that root's shops have below /var/lib/mercato, with the data folder of each.

    Parameters
    ----------
    data
        The folder of the shop's data.
    prune
        Instead, permanently delete the databases below /var/lib/mercato whose data folder is missing. A folder on a
        disk that is not mounted also counts as missing.
    json
        Print one JSON document.
    """
    from mercato.cli.looking import doctor as run, prune as run_prune

    return run_prune(as_json=json) if prune else run(data, as_json=json)


def logs(
    *,
    data: DataFolder = Path(".mercato"),
    service: str | None = None,
    level: LogLevel = "debug",
    trace: str | None = None,
    order: int | None = None,
    last: Annotated[int, Parameter(validator=validators.Number(gte=0))] = 20,
    follow: Annotated[bool, Parameter(negative="")] = False,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Show the logs of all processes of a shop as one, also of a shop that has ended.

    What is logged is decided by MERCATO_LOG_LEVEL when the shop starts.

    Parameters
    ----------
    data
        The folder of the shop's data.
    service
        Only lines of this service, or of its process: orders
    level
        Only lines of this level or a graver one.
    trace
        Only lines with this trace id.
    order
        Only lines about this order.
    last
        How many lines are shown at first.
    follow
        Wait for new lines, until Ctrl-C.
    json
        Print one JSON object a line.
    """
    from mercato.cli.logs import Wanted, logs as run

    return run(data, Wanted(service, level, trace, order), last=last, follow=follow, as_json=json)


def openapi() -> int:
    """Print the OpenAPI document of the API."""
    import json

    from mercato.cli.progress import show
    from mercato.gateway import openapi as description
    from mercato.gateway.routes import ROUTES

    show(json.dumps(description.document(ROUTES, open_shop=False, server_url=None), indent=2))
    return 0
