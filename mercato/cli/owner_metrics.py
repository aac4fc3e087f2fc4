"""The metrics of the owner of a split shop. It makes the audits, and serves no clients that could ask for them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from mercato.chassis.observability.telemetry import Telemetry
from mercato.cli.diagnostics import LOOPBACK, serving
from mercato.gateway.pages import is_of_this_machine, rendered_metrics


@contextlib.asynccontextmanager
async def answering(telemetry: Telemetry) -> AsyncGenerator[str]:
    """Answers a collector on this machine, at `/metrics`, for the time of the block; gives the URL.

    What is counted is added up meanwhile, for the owner has no host that would do it.
    """

    async def metrics(request: Request) -> Response:
        if not is_of_this_machine(request):
            raise HTTPException(403)
        return await rendered_metrics(telemetry, request)

    app = Starlette(routes=[Route("/metrics", metrics)])
    settling = asyncio.create_task(telemetry.settle_for_ever(), name="metrics")
    try:
        async with serving(app, (LOOPBACK, 0), name="metrics") as address:
            yield f"http://{address}"
    finally:
        settling.cancel()
        await asyncio.wait({settling})
