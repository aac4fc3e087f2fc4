"""Requests without a route in the table: pages, health, metrics, and other methods of a path."""

from __future__ import annotations

import time
from collections.abc import Iterable, MutableMapping
from typing import TYPE_CHECKING, Any

import structlog

from mercato.chassis.contract import ANONYMOUS_ACTOR, current
from mercato.chassis.hosting.host import GATEWAY
from mercato.gateway import problems, representations
from mercato.gateway.asgi import Asgi, Receive, Scope, Send
from mercato.gateway.headers import RequestHeaders

if TYPE_CHECKING:
    from mercato.gateway.app import Gateway

log = structlog.stdlib.get_logger("mercato.gateway", service=GATEWAY)


def allowed(methods: Iterable[str]) -> tuple[str, ...]:
    """The value of Allow for routes of these methods."""
    found = {*methods, "OPTIONS"}
    return tuple(sorted(found | {"HEAD"} if "GET" in found else found))


def answer_other_method(
    gateway: Gateway, found: problems.MethodNotAllowed, method: str, headers: RequestHeaders
) -> tuple[int, list[bytes], bytes]:
    """Answers OPTIONS with the methods of the path; raises `found` for any other method."""
    gateway.check_source(headers, method)
    if method != "OPTIONS":
        raise found
    return 204, [b"allow: " + ", ".join(found.allowed).encode()], b""


async def serve_page(
    gateway: Gateway, fallback: Asgi, scope: Scope, receive: Receive, send: Send, headers: RequestHeaders
) -> None:
    """Answers by `fallback`, with the request id added; `gateway` counts and logs it."""
    gateway.check_source(headers, scope["method"])
    started, begun = time.perf_counter(), False
    current.set(headers.context(ANONYMOUS_ACTOR, gateway.deadline()))

    async def send_noted(message: MutableMapping[str, Any]) -> None:
        nonlocal begun
        if message["type"] == "http.response.start":
            begun = True
            lines = [b"x-request-id: " + headers.request_id.encode()]
            if gateway.cross_origin is not None:
                lines += gateway.cross_origin.lines(headers, scope["method"])
            message["headers"] = [*message.get("headers", ()), *representations.fields(lines)]
            gateway.note(None, message["status"], time.perf_counter() - started, headers, scope["method"])
        await send(message)

    try:
        await fallback(scope, receive, send_noted)
    except Exception as error:  # a page that fails after its answer has begun cannot get another
        if not begun:
            raise
        log.error("page_failed", trace_id=headers.trace_id, exc_info=error)
