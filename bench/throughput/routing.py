"""What finding the row of a request costs: our table against Starlette's router with the same paths.

    .venv/bin/python -m bench.throughput.routing

Prints microseconds a request for the first and the last row of the table, application call included, no network.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from mercato.chassis.observability.telemetry import Telemetry
from mercato.gateway.app import BoundRoute, Table
from mercato.gateway.routes import ROUTES

ROUNDS = 20_000


async def _nothing(_: Any) -> Response:
    return Response(b"")


async def _receive() -> dict[str, Any]:
    return {"type": "http.request", "body": b""}


async def _send(_: Any) -> None:
    pass


async def _starlette(method: str, path: str) -> float:
    app = Starlette(routes=[Route(r.path, _nothing, methods=[r.method]) for r in ROUTES])
    bare = _nothing(None)
    bare.close()
    started = time.perf_counter()
    for _ in range(ROUNDS):
        await app({"type": "http", "method": method, "path": path, "headers": [], "root_path": ""}, _receive, _send)
    return (time.perf_counter() - started) / ROUNDS * 1e6


async def _response_alone() -> float:
    started = time.perf_counter()
    for _ in range(ROUNDS):
        await (await _nothing(None))({"type": "http"}, _receive, _send)
    return (time.perf_counter() - started) / ROUNDS * 1e6


def _table(method: str, path: str) -> float:
    telemetry = Telemetry()
    table = Table([BoundRoute(route, lambda _: None, telemetry) for route in ROUTES])  # type: ignore[arg-type]
    started = time.perf_counter()
    for _ in range(ROUNDS):
        table.find(method, path)
    return (time.perf_counter() - started) / ROUNDS * 1e6


async def main() -> None:
    alone = await _response_alone()
    print(f"{'request':<28} {'table':>8} {'Starlette':>10}   microseconds")
    for method, path in (("POST", "/register"), ("POST", "/orders"), ("GET", "/orders/1/history")):
        print(f"{method + ' ' + path:<28} {_table(method, path):>8.2f} {await _starlette(method, path) - alone:>10.2f}")


if __name__ == "__main__":
    asyncio.run(main())
