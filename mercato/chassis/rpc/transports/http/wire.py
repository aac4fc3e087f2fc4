"""The protocol of the HTTP transport: names, limits, and reasons of refusals."""

from __future__ import annotations

import enum
from typing import Final

from mercato.chassis.http import HttpLimits

CONTENT_TYPE: Final = "application/vnd.msgpack"  # registered with IANA
PATH_PREFIX: Final = "/rpc/"

AUTHORIZATION: Final = "authorization"
BEARER: Final = "Bearer "
REMAINING_MS: Final = "mercato-remaining-ms"
TRACEPARENT: Final = "traceparent"  # W3C Trace Context
VERSION: Final = "mercato-version"
NOT_STARTED: Final = "mercato-not-started"
"""On an answer: nothing was started, and why, as a `NotStarted`. A proxy in between does not send this header."""
DRAINING_SECONDS: Final = "mercato-draining-seconds"
"""On an answer: the instance accepts no more calls, and will have ended after so many seconds."""

LARGEST_BATCH_BYTES: Final = 16 * 1_048_576
LARGEST_ANSWER_BYTES: Final = 64 * 1_048_576
LONGEST_REMAINING_MS: Final = 600_000.0
"""Ten minutes; the longest deadline of an operation is little more than one."""

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


class NotStarted(enum.StrEnum):
    """Why the receiving process did not start a batch."""

    DRAINING = "draining"
    UNKNOWN_OPERATION = "unknown_operation"
    UNTRUSTED = "untrusted"
    WRONG_METHOD = "wrong_method"
    WRONG_CONTENT_TYPE = "wrong_content_type"
    MALFORMED_HEADER = "malformed_header"
    MALFORMED_BODY = "malformed_body"
    WRONG_BATCH_SIZE = "wrong_batch_size"
