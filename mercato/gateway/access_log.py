"""The access log: one line for a request that failed or was slow at `info`, and one for each other at `debug`.

A line has method and route, never the path and its query: the client writes those, and they may hold secrets. A line
costs CPU, so not each request has one by default.
"""

from __future__ import annotations

import logging
from typing import Final

import structlog

from mercato.chassis.hosting.host import GATEWAY
from mercato.gateway.headers import RequestHeaders

SLOW_SECONDS: Final = 1.0
"""A request that takes so long is slow."""

log = structlog.stdlib.get_logger("mercato.access", service=GATEWAY)


def note(
    method: str,
    route: str,
    status: int | str,
    seconds: float,
    headers: RequestHeaders,
    *,
    is_slow: bool,
    is_failure: bool = False,
) -> None:
    """Logs one request. `route` is the path of its route in the table, `none` for a path that is not there;
    or the method of gRPC, and `status` its code, of which `is_failure` says what HTTP says by its status."""
    log.log(
        logging.INFO if is_slow or is_failure or (isinstance(status, int) and status >= 500) else logging.DEBUG,
        "request",
        method=method,
        route=route,
        status=status,
        actor_id=headers.actor_id,
        **({"order_id": headers.order_id} if headers.order_id else {}),
        milliseconds=round(seconds * 1_000, 3),
        trace_id=headers.trace_id,
        request_id=headers.request_id,
    )
