"""The protocol of the HTTP transport: names, limits, and reasons of refusals."""

from __future__ import annotations

from typing import Final

from mercato.chassis.http import HttpLimits
from mercato.chassis.rpc.transports.direct.wire import LARGEST_BATCH_BYTES

CONTENT_TYPE: Final = "application/vnd.msgpack"  # registered with IANA
PATH_PREFIX: Final = "/rpc/"
REMAINING_MS: Final = "mercato-remaining-ms"

RPC_LIMITS: Final = HttpLimits(
    body_bytes=LARGEST_BATCH_BYTES,
    # Together with the seconds for the request, longer than the longest deadline of an operation: no answer is cut off.
    response_grace_seconds=110.0,
    connections=4_096,
    # Callers are the shop's own processes, of which many may be on one machine; one that closes its half has given up.
    connections_of_one=4_096,
    answers_half_closed=False,
    # Longer than the client keeps an unused connection, so that the server never closes one.
    keep_alive_seconds=60.0,
)
"""The bounds of an `HttpServer` that serves a `RpcApp`."""
