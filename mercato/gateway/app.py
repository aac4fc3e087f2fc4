"""The API as an ASGI application: from bytes to a row of the table, and from its answer to bytes.

What happens to a request, in this order; each step may refuse:

    1. find the row          unknown path 404, unknown method 405 with Allow
    2. who asks              address of an open shop 403, token 401, role 403, rate 429
    3. what is asked         size 413, content type 415, JSON, path, query and headers 400, all wrong fields at once
    4. call the operation    its errors become problems
    5. answer

Everything that can be decided before the first request is decided in `_Compiled`, once a row.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from typing import Any, Final
from urllib.parse import parse_qsl, urlencode

import msgspec
import structlog

from mercato.chassis.clock import Clock
from mercato.chassis.contract import (
    ANONYMOUS,
    MAX_ID,
    Actor,
    Call,
    Context,
    FieldError,
    Forbidden,
    Internal,
    InvalidRequest,
    Operation,
    ServiceError,
    current,
)
from mercato.chassis.telemetry import Telemetry
from mercato.gateway import idempotency, problems
from mercato.gateway.auth import Gatekeeper
from mercato.gateway.rates import RateLimiter
from mercato.gateway.route import Ask, Page, Route
from mercato.gateway.validation import decode_body, decode_query, invalid

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

REQUEST_SECONDS: Final = 10.0

JSON: Final = (b"content-type", b"application/json")

log = structlog.stdlib.get_logger("mercato.gateway")


class ClientGone(Exception):
    """The client closed the connection before its request was complete. Nobody is there to be answered."""


class Gateway:
    """The table as an ASGI application. `fallback` gets what is not in the table: pages, health, metrics."""

    def __init__(
        self,
        routes: Sequence[Route],
        *,
        client: Callable[[Operation[Any, Any]], Call[Any, Any]],
        gatekeeper: Gatekeeper,
        telemetry: Telemetry,
        clock: Clock,
        fallback: Asgi,
        request_seconds: float = REQUEST_SECONDS,
        log_requests: bool = False,
    ) -> None:
        self._table = Table([_Compiled(route, client, telemetry) for route in routes])
        self._gatekeeper = gatekeeper
        self._telemetry = telemetry
        self._clock = clock
        self._fallback = fallback
        self._seconds = request_seconds
        self._rates = RateLimiter()
        self._log_requests = log_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return None
        started = time.perf_counter()
        picked = _Picked(scope["headers"])
        trace_id, request_id = picked.ids()
        found, numbers = self._table.find(scope["method"], scope["path"])
        route = found if isinstance(found, _Compiled) else None
        try:
            if route is None:
                if not isinstance(found, ServiceError):
                    return await self._turn_page(scope, receive, send, picked, trace_id, request_id)
                raise found
            status, headers, body = await self._serve(route, numbers, scope, receive, picked, trace_id, request_id)
        except ServiceError as error:
            status, headers, body = problems.render(error, trace_id)
        except ClientGone:
            return None
        except Exception as error:  # an edge: whatever went wrong, the client gets an answer and the log the cause
            log.error("request_failed", trace_id=trace_id, route=route.name if route else "none", exc_info=error)
            status, headers, body = problems.render(Internal(operation=scope["path"]), trace_id)
        headers.append((b"x-request-id", request_id.encode()))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})
        self._note(route, status, time.perf_counter() - started, trace_id, request_id)
        return None

    async def _turn_page(
        self, scope: Scope, receive: Receive, send: Send, picked: _Picked, trace_id: str, request_id: str
    ) -> None:
        """What is not in the table. It answers by itself; request id and count are added on the way."""
        self._gatekeeper.check_address(picked.host, picked.origin, picked.forwarded)
        started, begun = time.perf_counter(), False
        deadline = self._clock.monotonic() + self._seconds
        current.set(Context(ANONYMOUS, deadline, trace_id, request_id))

        async def send_noted(message: MutableMapping[str, Any]) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
                self._note(None, message["status"], time.perf_counter() - started, trace_id, request_id)
            await send(message)

        try:
            await self._fallback(scope, receive, send_noted)
        except Exception as error:  # an edge: a page that fails in the middle of its answer cannot be given another
            if not begun:
                raise
            log.error("page_failed", trace_id=trace_id, exc_info=error)

    async def _serve(
        self,
        route: _Compiled,
        numbers: Mapping[str, str],
        scope: Scope,
        receive: Receive,
        picked: _Picked,
        trace_id: str,
        request_id: str,
    ) -> tuple[int, Headers, bytes]:
        actor = await self._admit(route, scope, picked, trace_id, request_id)
        ask = await route.ask(actor, numbers, scope, receive, picked)
        deadline = self._clock.monotonic() + self._seconds
        current.set(Context(actor, deadline, trace_id, request_id))
        try:
            answer = await route.call(route.request(ask))
        except InvalidRequest as error:
            raise route.reworded(error) from None
        if ask.wait_ms is None:
            return route.respond(answer, scope)
        current.set(Context(actor, deadline + ask.wait_ms / 1_000, trace_id, request_id))
        status, headers, body = route.respond(await route.waited(answer, ask.wait_ms), scope)
        return status, [*headers, (b"preference-applied", f"wait={ask.wait_ms // 1_000}".encode())], body

    async def _admit(self, route: _Compiled, scope: Scope, picked: _Picked, trace_id: str, request_id: str) -> Actor:
        """Who asks, if they may."""
        gatekeeper = self._gatekeeper
        gatekeeper.check_address(picked.host, picked.origin, picked.forwarded)
        if picked.authorization is None or route.ignores_token:
            actor = gatekeeper.nobody()
        else:
            # Verifying may ask the users service for its keys; that is a call like any other.
            deadline = self._clock.monotonic() + self._seconds
            current.set(Context(gatekeeper.nobody(), deadline, trace_id, request_id))
            actor = await gatekeeper.actor(picked.authorization)
        if actor.role not in route.roles:
            raise _refused(actor, route)
        if route.limits.per_second is not None:
            client = scope.get("client")
            self._rates.check(route.name, route.limits, actor, client[0] if client else "")
        return actor

    def _note(self, route: _Compiled | None, status: int, seconds: float, trace_id: str, request_id: str) -> None:
        if route is not None:
            route.count(status)
            route.seconds.observe(seconds)
        else:
            self._telemetry.requests.labels("none", str(status)).inc()
        if self._log_requests:
            # The row, not the path and its query: those are the client's words, and may hold what no log should.
            log.info(
                "request",
                route=route.name if route else "none",
                status=status,
                milliseconds=round(seconds * 1_000, 3),
                trace_id=trace_id,
                request_id=request_id,
            )


def _refused(actor: Actor, route: _Compiled) -> ServiceError:
    if actor.role == "anonymous":
        return problems.SignInFirst()
    return Forbidden(operation=route.name, role=actor.role)


# --------------------------------------------------------------------------------------------------------- headers

_TRACEPARENT: Final = re.compile(rb"^(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?$")
_REQUEST_ID: Final = re.compile(rb"^[\x21-\x7e]{1,128}$")


class _Picked:
    """The headers that the API looks at, found in one pass."""

    __slots__ = (
        "authorization",
        "content_type",
        "forwarded",
        "host",
        "idempotency_key",
        "if_match",
        "origin",
        "prefer",
        "request_id",
        "traceparent",
    )

    def __init__(self, headers: Sequence[tuple[bytes, bytes]]) -> None:
        self.authorization: bytes | None = None
        self.content_type: bytes | None = None
        self.forwarded: bytes | None = None
        self.host: bytes | None = None
        self.idempotency_key: bytes | None = None
        self.if_match: bytes | None = None
        self.origin: bytes | None = None
        self.prefer: bytes | None = None
        self.request_id: bytes | None = None
        self.traceparent: bytes | None = None
        for name, value in headers:
            slot = _SLOTS.get(name)
            if slot is not None:
                setattr(self, slot, value)

    def ids(self) -> tuple[str, str]:
        """The trace id (W3C traceparent, else a new one) and the request id (X-Request-Id, else a new one)."""
        trace_id = None
        if self.traceparent is not None and (match := _TRACEPARENT.match(self.traceparent)):
            trace_id = match[1].decode()
        if not trace_id or trace_id == "0" * 32:
            trace_id = f"{random.getrandbits(128) or 1:032x}"
        if self.request_id is not None and _REQUEST_ID.match(self.request_id):
            return trace_id, self.request_id.decode()
        return trace_id, f"{random.getrandbits(64):016x}"


_SLOTS: Final = {name.replace("_", "-").encode(): name for name in _Picked.__slots__} | {
    b"x-request-id": "request_id",
    b"x-forwarded-for": "forwarded",
    b"x-real-ip": "forwarded",
    b"via": "forwarded",
}
del _SLOTS[b"request-id"]


# ----------------------------------------------------------------------------------------------------------- table


class Table:
    """Finds the row of a method and path: fixed paths by one look-up, paths with numbers by their shape."""

    def __init__(self, rows: Sequence[_Compiled]) -> None:
        self._fixed: dict[str, dict[str, _Compiled]] = {}
        self._shaped: list[tuple[re.Pattern[str], dict[str, _Compiled]]] = []
        shapes: dict[str, dict[str, _Compiled]] = {}
        for row in rows:
            by_path = self._fixed if "{" not in row.route.path else shapes
            methods = by_path.setdefault(row.route.path, {})
            assert row.route.method not in methods, f"two rows for {row.name}"
            methods[row.route.method] = row
        for path, methods in shapes.items():
            self._shaped.append((re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", path) + r"\Z"), methods))

    def find(self, method: str, path: str) -> tuple[_Compiled | ServiceError | None, Mapping[str, str]]:
        """The row and the path's parts by name; an error where the path takes other methods; None for unknown paths."""
        methods, parts = self._fixed.get(path), _NOTHING
        if methods is None:
            for pattern, shaped in self._shaped:
                if match := pattern.match(path):
                    methods, parts = shaped, match.groupdict()
                    break
            else:
                return None, _NOTHING
        row = methods.get("GET" if method == "HEAD" else method)
        if row is None:
            allowed = sorted(set(methods) | ({"HEAD"} if "GET" in methods else set()))
            return problems.MethodNotAllowed(path=path, allowed=tuple(allowed)), _NOTHING
        return row, parts


_NOTHING: Final[Mapping[str, Any]] = {}


# ------------------------------------------------------------------------------------------------------------- rows


class _Compiled:
    """A row, with everything that can be known before a request."""

    def __init__(
        self, route: Route, client: Callable[[Operation[Any, Any]], Call[Any, Any]], telemetry: Telemetry
    ) -> None:
        self.route = route
        self.call = client(route.operation)
        self._wait_call = client(route.wait.operation) if route.wait else None
        self.name = f"{route.method} {route.path}"
        self.roles = route.roles
        self.ignores_token = route.ignores_token
        self.limits = route.limits
        self.request = route.request
        self.seconds = telemetry.request_seconds.labels(self.name)
        self._requests = telemetry.requests
        self._counters: dict[int, Any] = {}
        self._decoder = msgspec.json.Decoder(route.body) if route.body else None
        self._no_body = b"{}" if route.body_optional else b""
        self._encode = msgspec.json.Encoder().encode
        self._plain = not (route.etag or route.location or route.replayed)

    def count(self, status: int) -> None:
        counter = self._counters.get(status)
        if counter is None:
            counter = self._counters[status] = self._requests.labels(self.name, str(status))
        counter.inc()

    # ------------------------------------------------------------------------------------------------- what is asked

    async def ask(self, actor: Actor, parts: Mapping[str, str], scope: Scope, receive: Receive, picked: _Picked) -> Ask:
        route = self.route
        body = raw = None
        if self._decoder is not None:
            raw = await _read_body(receive, self.limits.body_bytes)
            if raw or not route.body_optional:
                _check_content_type(picked.content_type)
            body = decode_body(self._decoder, raw or self._no_body)
        path = _numbers(parts, scope["path"]) if parts else _NOTHING
        query = None
        if route.query is not None:
            query = decode_query(route.query, scope["query_string"])
        elif scope["query_string"]:
            raise invalid(("?", "this takes no query parameters"))
        key = fingerprint = None
        if picked.idempotency_key is not None:
            if not route.idempotency:
                raise invalid(("header Idempotency-Key", f"{self.name} does not take one"))
            key = idempotency.key_of(picked.idempotency_key)
            fingerprint = idempotency.fingerprint(route.method, route.path, parts, scope["query_string"], raw or b"")
        elif route.idempotency_required:
            raise problems.IdempotencyKeyMissing(operation=self.name)
        version = _version(picked.if_match, self) if picked.if_match is not None else None
        wait_ms = _wait_ms(picked.prefer) if picked.prefer is not None and route.wait is not None else None
        return Ask(actor, path, query, body, version, key, fingerprint or b"", wait_ms)

    async def waited(self, answer: Any, wait_ms: int) -> Any:
        """The answer after having waited for what the row waits for, or as it was where that cannot be had."""
        wait, call = self.route.wait, self._wait_call
        assert wait is not None
        assert call is not None
        try:
            return wait.answer(answer, await call(wait.request(answer, wait_ms)))
        except ServiceError as error:
            log.warning("wait_failed", route=self.name, reason=error.code)
            return answer

    def reworded(self, error: InvalidRequest) -> InvalidRequest:
        """The error with the fields called as the API calls them."""
        named = self.route.fields
        errors = (FieldError(field=named.get(e.field, e.field), message=e.message) for e in error.errors)
        return InvalidRequest(errors=tuple(errors))

    # ----------------------------------------------------------------------------------------------- what is answered

    def respond(self, answer: Any, scope: Scope) -> tuple[int, Headers, bytes]:
        route = self.route
        shown = route.answer(answer)
        headers: Headers
        if shown is None:
            return 204, [], b""
        if isinstance(shown, Page):
            body = self._encode(shown.items)
            headers = [JSON, (b"content-length", str(len(body)).encode())]
            if shown.next_query is not None:
                headers.append((b"link", _next_link(scope, shown.next_query)))
            return route.status, headers, body
        body = self._encode(shown)
        headers = [JSON, (b"content-length", str(len(body)).encode())]
        if not self._plain:
            self._add_headers(answer, headers)
        return route.status, headers, body

    def _add_headers(self, answer: Any, headers: Headers) -> None:
        route = self.route
        if route.etag is not None and (version := route.etag(answer)) is not None:
            headers.append((b"etag", f'"{version}"'.encode()))
        if route.location is not None:
            headers.append((b"location", route.location(answer).encode()))
        if route.replayed is not None and route.replayed(answer):
            headers.append((b"idempotent-replayed", b"true"))


async def _read_body(receive: Receive, limit_bytes: int) -> bytes:
    message = await receive()
    if message["type"] == "http.disconnect":
        raise ClientGone
    body: bytes = message.get("body", b"")
    if message.get("more_body"):
        chunks, size = [body], len(body)
        while message.get("more_body"):
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            if size > limit_bytes:
                break
        body = b"".join(chunks)
    if len(body) > limit_bytes:
        raise problems.BodyTooLarge(limit_bytes=limit_bytes)
    return body


def _check_content_type(value: bytes | None) -> None:
    if value == b"application/json":
        return
    kind, _, parameters = (value or b"").lower().partition(b";")
    charset = parameters.strip().removeprefix(b"charset=").strip(b'"')
    if kind.strip() != b"application/json" or charset not in (b"", b"utf-8"):
        raise problems.UnsupportedMediaType


def _numbers(parts: Mapping[str, str], path: str) -> Mapping[str, int]:
    numbers: dict[str, int] = {}
    errors: list[FieldError] = []
    for name, text in parts.items():
        if text.isascii() and text.isdigit():
            numbers[name] = int(text) if len(text) <= MAX_ID_DIGITS else MAX_ID + 1
        else:
            errors.append(FieldError(field=f"path {name}", message="is not a number"))
    if errors:
        raise InvalidRequest(errors=tuple(errors))
    # A number that no id can be is not a mistake in the request: there is nothing there.
    if not all(1 <= number <= MAX_ID for number in numbers.values()):
        raise problems.RouteNotFound(path=path)
    return numbers


MAX_ID_DIGITS: Final = len(str(MAX_ID))


_ETAG: Final = re.compile(rb'^(?:W/)?"([1-9]\d{0,8})"$')


def _version(if_match: bytes, row: _Compiled) -> int | None:
    if not row.route.if_match:
        raise invalid(("header If-Match", f"{row.name} does not take one"))
    if if_match == b"*":
        return None
    if not (match := _ETAG.match(if_match)):
        raise invalid(("header If-Match", 'is not one ETag such as "3"'))
    return int(match[1])


WAIT_LIMIT_SECONDS: Final = 60
_WAIT: Final = re.compile(rb"(?:^|[,;])\s*wait\s*=\s*([^,;\s]*)", re.IGNORECASE)


def _wait_ms(prefer: bytes) -> int | None:
    """The milliseconds of `wait`, at most a minute. None where only other preferences are named: nobody knows them."""
    if not (match := _WAIT.search(prefer)):
        return None
    seconds = match[1].strip(b'"')
    if not seconds.isdigit():
        raise invalid(("header Prefer", "wait is not a whole number of seconds, as in wait=5"))
    return min(int(seconds[:6]), WAIT_LIMIT_SECONDS) * 1_000


def _next_link(scope: Scope, changed: Mapping[str, str]) -> bytes:
    query = {**dict(parse_qsl(str(scope["query_string"], "ascii"))), **changed}
    return f'<{scope["path"]}?{urlencode(query)}>; rel="next"'.encode()
