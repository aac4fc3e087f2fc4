"""The receiving end of the HTTP transport: an ASGI application in front of the servers of one process."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

import msgspec
import structlog

from mercato.chassis.http import COMPLETE_RESPONSE
from mercato.chassis.observability.clock import Clock
from mercato.chassis.rpc.server import Server
from mercato.chassis.rpc.stats import Stats
from mercato.chassis.rpc.transports.direct.server import SHOWN_CHARACTERS, BatchReceiver, RefusedBatch
from mercato.chassis.rpc.transports.direct.wire import (
    AUTHORIZATION,
    DRAINING_SECONDS,
    LONGEST_REMAINING_MS,
    NOT_STARTED,
    TRACEPARENT,
    VERSION,
    NotStarted,
)
from mercato.chassis.rpc.trust import Trust

from .wire import CONTENT_TYPE, PATH_PREFIX, REMAINING_MS

log = structlog.stdlib.get_logger("mercato.rpc.http")

Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[Mapping[str, Any]]]
Send = Callable[[Mapping[str, Any]], Awaitable[None]]

STATUS: Final[Mapping[NotStarted, int]] = {
    NotStarted.DRAINING: 503,
    NotStarted.UNKNOWN_OPERATION: 404,
    NotStarted.UNTRUSTED: 401,
    NotStarted.WRONG_METHOD: 405,
    NotStarted.WRONG_CONTENT_TYPE: 415,
    NotStarted.MALFORMED_HEADER: 400,
    NotStarted.MALFORMED_BODY: 400,
    NotStarted.WRONG_BATCH_SIZE: 400,
}
PROBLEM: Final = b"content-type: application/problem+json"
JSON: Final = b"content-type: application/json"
OUTCOMES: Final = b"content-type: " + CONTENT_TYPE.encode()
MORE_LINES: Final[Mapping[NotStarted, tuple[bytes, ...]]] = {
    NotStarted.UNTRUSTED: (b"www-authenticate: Bearer",),
    NotStarted.WRONG_METHOD: (b"allow: POST",),
}
"""Headers that HTTP wants on an answer of that status."""


class CallerLeft(Exception):
    """The connection ended before the whole batch had arrived."""


class RpcApp:
    """Serves `servers`, by the name of their contract, under `/rpc/`; servers may be added to the mapping later.

    It must run in an `HttpServer`, which bounds the size and time of a body, and takes an answer as one message.
    """

    def __init__(self, servers: Mapping[str, Server], trust: Trust, clock: Clock, stats: Stats | None = None) -> None:
        self._receiver = BatchReceiver(servers, trust, clock, stats)

    def drain(self, seconds: float) -> None:
        """See `BatchReceiver.drain`."""
        self._receiver.drain(seconds)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        try:
            if scope["method"] == "GET":
                await _send(send, 200, self._describe(scope), JSON)
                return
            answer = await self._answer(scope, receive)
        except RefusedBatch as refused:
            await _refuse(send, refused)
        except CallerLeft:
            pass
        except Exception as error:  # an edge: the text of the error stays here
            log.error("rpc_failed", path=scope["path"][:SHOWN_CHARACTERS], exc_info=error)
            await _send(send, 500, _problem(500, "internal_error", "The batch failed unexpectedly."), PROBLEM)
        else:
            await _send(send, 200, answer, OUTCOMES)

    def _describe(self, scope: Scope) -> bytes:
        """The answer of `GET /rpc/orders`."""
        service = scope["path"].removeprefix(PATH_PREFIX)
        return self._receiver.describe(service, _text(dict(scope["headers"]), AUTHORIZATION))

    async def _answer(self, scope: Scope, receive: Receive) -> bytes:
        receiver, path = self._receiver, scope["path"]
        service, _, name = path.removeprefix(PATH_PREFIX).partition("/")
        server, operation = receiver.find(service if path.startswith(PATH_PREFIX) else "", name)
        with receiver.recording(operation) as recorder:
            receiver.check_not_draining()
            headers = dict(scope["headers"])
            remaining_s = _check_head(scope["method"], headers)
            caller = receiver.caller(service, _text(headers, AUTHORIZATION))
            body = await _whole_body(receive)
            traceparent, version = _text(headers, TRACEPARENT), _text(headers, VERSION)
            return await receiver.run(
                server, operation, recorder, caller, body, remaining_s, traceparent=traceparent, version=version
            )


def _text(headers: Mapping[bytes, bytes], name: str) -> str:
    return headers.get(name.encode(), b"").decode("ascii", "replace")


def _check_head(method: str, headers: Mapping[bytes, bytes]) -> float:
    """The time that is left, in seconds."""
    if method != "POST":
        raise RefusedBatch(NotStarted.WRONG_METHOD, "A batch is sent by POST.")
    content_type = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if content_type != CONTENT_TYPE.encode() or b"content-encoding" in headers:
        raise RefusedBatch(NotStarted.WRONG_CONTENT_TYPE, f"A batch is {CONTENT_TYPE}, without any encoding.")
    try:
        remaining_ms = float(headers.get(REMAINING_MS.encode(), b""))
    except ValueError:
        remaining_ms = math.nan
    if not 0 < remaining_ms <= LONGEST_REMAINING_MS:  # also not for NaN
        detail = f"The header {REMAINING_MS} is a number above 0, and at most {LONGEST_REMAINING_MS:.0f}."
        raise RefusedBatch(NotStarted.MALFORMED_HEADER, detail)
    return remaining_ms / 1_000


async def _whole_body(receive: Receive) -> bytes:
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise CallerLeft
        parts.append(message["body"])
        if not message["more_body"]:
            return b"".join(parts)


async def _refuse(send: Send, refused: RefusedBatch) -> None:
    status, reason = STATUS[refused.reason], refused.reason
    lines = [f"{NOT_STARTED}: {reason}".encode(), *MORE_LINES.get(reason, ())]
    if refused.draining_seconds is not None:
        lines.append(f"{DRAINING_SECONDS}: {refused.draining_seconds:.3f}".encode())
    await _send(send, status, _problem(status, reason, refused.detail), PROBLEM, *lines)


def _problem(status: int, code: str, detail: str) -> bytes:
    return msgspec.json.encode({"type": "about:blank", "status": status, "code": code, "detail": detail})


async def _send(send: Send, status: int, body: bytes, *lines: bytes) -> None:
    await send({"type": COMPLETE_RESPONSE, "status": status, "lines": lines, "body": body})
