"""The commands and their options. What they do is in the module that each imports."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, CycloptsError, Parameter, UnusedCliTokensError, validators

from mercato import __version__


def _wrong_usage(error: CycloptsError) -> str:
    if isinstance(error, UnusedCliTokensError):
        return f"mercato: Unexpected argument: {' '.join(error.unused_tokens or ())}."
    return f"mercato: {str(error).strip()}"


app = App(
    name="mercato",
    error_formatter=_wrong_usage,
    help="An e-commerce backend that keeps its promises when processes die.",
    version=__version__,
)


@app.command
def up(
    *,
    host: str = "127.0.0.1",
    port: Annotated[int, Parameter(validator=validators.Number(gte=0, lte=65_535))] = 8080,
    data: Path = Path(".mercato"),
    demo: bool | None = None,
    workers: Annotated[int, Parameter(validator=validators.Number(gte=1, lte=64))] = 1,
    auth: Literal["open", "required"] | None = None,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Start the shop: PostgreSQL, all services and the gateway.

    Ctrl-C stops it. Everything it keeps is in the data folder.

    Parameters
    ----------
    host
        The address to listen on. On anything but loopback, tokens are required.
    port
        The port to listen on; 0 takes a free one.
    data
        The folder of the shop's data; made when it is not there.
    demo
        Put demo users and products, whose passwords everybody knows, into an empty shop. [default: on loopback only]
    workers
        How many processes serve requests.
    auth
        "open": callers without a token act as staff (loopback only). "required": they do not. [default: open on
        loopback, required elsewhere]
    json
        Tell what happens as one JSON object a line.
    """
    from mercato.cli.up import Options, run

    return run(Options(host=host, port=port, data=data, demo=demo, workers=workers, auth=auth, json=json))


@app.command
def audit(
    *,
    data: Path = Path(".mercato"),
    dsn: str | None = None,
    settled: Annotated[float, Parameter(validator=validators.Number(gte=0, lte=31_536_000))] = 60.0,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Check that no order is lost or doubled, no card is charged twice, nothing is oversold.

    Copies the databases of a shop, running or not, and asks every invariant of the copies. Changes nothing in the shop;
    a small database for the copies, mercato_audit, stays on its server. A shop that does not run is judged as of its
    last sign of life. Exits with 0 if all hold, 1 if any does not, 2 if it could not be asked.

    Parameters
    ----------
    data
        The folder of the shop's data.
    dsn
        An administrator's DSN of the shop's server, where that is not the embedded one. [env: MERCATO_POSTGRES_DSN]
    settled
        Leave out what was touched within so many seconds, where services must agree that are still at work. 0 for a
        shop that stands still: everything must have come to its end.
    json
        Tell what was found as one JSON document.
    """
    from mercato.cli.audit import Options, audit_shop

    return audit_shop(Options(data=data, dsn=dsn, settled=settled, json=json))


events = App(name="events", help="Read the feed of events, and replay those that a consumer could not take.")
app.command(events)


@events.command
def tail(
    *,
    after: Annotated[int, Parameter(validator=validators.Number(gte=0, lte=9_007_199_254_740_991))] | None = None,
    types: str = "",
    follow: bool = False,
    json: Annotated[bool, Parameter(negative="")] = False,
    data: Path = Path(".mercato"),
    dsn: str | None = None,
) -> int:
    """Print what has become true in the shop, the oldest first.

    Parameters
    ----------
    after
        Only positions behind this one. [default: the last 20 entries]
    types
        Only events of these types, with commas between: order.placed,order.paid
    follow
        Go on with what comes, until Ctrl-C, while the shop runs.
    json
        Print one JSON object a line.
    data
        The folder of the shop's data.
    dsn
        An administrator's DSN of the shop's server, where that is not the embedded one. [env: MERCATO_POSTGRES_DSN]
    """
    from mercato.cli.events import Place, tail as run

    return run(Place(data, dsn), after=after, types=types, follow=follow, as_json=json)


@events.command
def dead(
    *,
    json: Annotated[bool, Parameter(negative="")] = False,
    data: Path = Path(".mercato"),
    dsn: str | None = None,
) -> int:
    """List the events that a consumer could not take, and why.

    Parameters
    ----------
    json
        Print one JSON object a line.
    data
        The folder of the shop's data.
    dsn
        An administrator's DSN of the shop's server, where that is not the embedded one. [env: MERCATO_POSTGRES_DSN]
    """
    from mercato.cli.events import Place, dead as run

    return run(Place(data, dsn), as_json=json)


@events.command
def replay(
    *ids: str,
    all: Annotated[bool, Parameter(negative="")] = False,
    data: Path = Path(".mercato"),
    dsn: str | None = None,
) -> int:
    """Let consumers take what they could not take before, once its cause is mended.

    Each is taken and struck off the list in one transaction: whatever happens meanwhile, the command can be repeated.
    What is replayed comes out of order: behind what has happened to its subject since.
    Exits with 1 if one could not be taken again.

    Parameters
    ----------
    ids
        The events, as `mercato events dead` shows them: orders:17
    all
        All of them.
    data
        The folder of the shop's data.
    dsn
        An administrator's DSN of the shop's server, where that is not the embedded one. [env: MERCATO_POSTGRES_DSN]
    """
    from mercato.cli.events import Place, replay as run

    return run(Place(data, dsn), ids, all_=all)


@app.command
def openapi() -> int:
    """Print the OpenAPI document of the API."""
    import json

    from mercato.gateway import openapi as description
    from mercato.gateway.routes import ROUTES

    print(json.dumps(description.document(ROUTES, open_shop=False, server_url=None), indent=2))
    return 0
