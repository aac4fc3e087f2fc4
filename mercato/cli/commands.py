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
def openapi() -> int:
    """Print the OpenAPI document of the API."""
    import json

    from mercato.gateway import openapi as description
    from mercato.gateway.routes import ROUTES

    print(json.dumps(description.document(ROUTES, open_shop=False, server_url=None), indent=2))
    return 0
