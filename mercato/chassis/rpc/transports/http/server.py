"""The receiving end of the HTTP transport: an ASGI application in front of the servers of one process."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

import msgspec
import structlog

from mercato.chassis.contract import Context, DeadlineExceeded, Operation, Unauthenticated
from mercato.chassis.http import COMPLETE_RESPONSE
from mercato.chassis.observability.clock import Clock
from mercato.chassis.rpc.codec import decode_requests, encode_outcomes
from mercato.chassis.rpc.server import Server
from mercato.chassis.rpc.stats import OperationRecorder, Stats
from mercato.chassis.rpc.transports.encoded import answer_decoded
from mercato.chassis.rpc.trust import Trust

from .wire import (
    AUTHORIZATION,
    BEARER,
    CONTENT_TYPE,
    DRAINING_SECONDS,
    LONGEST_REMAINING_MS,
    NOT_STARTED,
    PATH_PREFIX,
    REMAINING_MS,
    TRACEPARENT,
    VERSION,
    NotStarted,
)

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
SHOWN_CHARACTERS: Final = 200
"""How much of a caller's input may be written in a line of the log."""


class RefusedBatch(Exception):
    """Nothing was started. `detail` is a sentence for the caller's engineer; `lines` are headers of the answer."""

    def __init__(self, reason: NotStarted, detail: str, *lines: bytes) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail
        self.lines = lines


class CallerLeft(Exception):
    """The connection ended before the whole batch had arrived."""


class RpcApp:
    """Serves `servers`, by the name of their contract, under `/rpc/`; servers may be added to the mapping later.

    It must run in an `HttpServer`, which bounds the size and time of a body, and takes an answer as one message.
    A batch whose caller has left is not cancelled: it may have committed. As within one process, it is cancelled when
    the deadlines of its callers have passed.
    """

    def __init__(self, servers: Mapping[str, Server], trust: Trust, clock: Clock, stats: Stats | None = None) -> None:
        self._servers = servers
        self._trust = trust
        self._clock = clock
        self._stats = stats or Stats("", "")
        self._ends_at: float | None = None

    def drain(self, seconds: float) -> None:
        """From now on refuses each batch unstarted, so that its caller uses another instance; answers running ones.

        `seconds`: this process has ended by then; until then callers send nothing to it.
        """
        self._ends_at = self._clock.monotonic() + seconds

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
        """The answer of `GET /rpc/orders` to any authenticated caller: the `InstanceStats` of a service."""
        service = scope["path"].removeprefix(PATH_PREFIX)
        if service not in self._servers:
            raise RefusedBatch(NotStarted.UNKNOWN_OPERATION, "This process does not serve such a service.")
        self._check_not_draining()
        self._caller(service, dict(scope["headers"]))
        return msgspec.json.encode(self._stats.of(service))

    async def _answer(self, scope: Scope, receive: Receive) -> bytes:
        server, operation = self._find(scope["path"])
        recorder = self._stats.recorder(operation.service, operation.name)
        try:
            return await self._run(server, operation, recorder, scope, receive)
        except RefusedBatch:
            recorder.failed()
            raise

    async def _run(
        self,
        server: Server,
        operation: Operation[Any, Any],
        recorder: OperationRecorder,
        scope: Scope,
        receive: Receive,
    ) -> bytes:
        self._check_not_draining()
        headers = dict(scope["headers"])
        remaining_s = _check_head(scope["method"], headers)
        caller = self._caller(operation.service, headers)
        body = await _whole_body(receive)
        # Checked again, for the body may have taken long; from here to the handler there is no further wait.
        self._check_not_draining()
        requests, contexts = self._decode(operation, body, headers)
        refusals = self._trust.refusals(caller, operation, contexts)
        requests = [refusals.get(place, request) for place, request in enumerate(requests)]
        started = self._clock.monotonic()
        try:
            async with asyncio.timeout(remaining_s):
                return await answer_decoded(server, operation, requests, contexts)
        except TimeoutError:
            return encode_outcomes(operation, [DeadlineExceeded(operation=operation.full_name) for _ in requests])
        finally:
            recorder.answered(len(requests), self._clock.monotonic() - started)

    def _find(self, path: str) -> tuple[Server, Operation[Any, Any]]:
        service, _, name = path.removeprefix(PATH_PREFIX).partition("/")
        server = self._servers.get(service) if path.startswith(PATH_PREFIX) else None
        operation = server.contract.operations.get(name) if server else None
        if server is None or operation is None:
            raise RefusedBatch(NotStarted.UNKNOWN_OPERATION, "This process does not serve such an operation.")
        return server, operation

    def _caller(self, service: str, headers: Mapping[bytes, bytes]) -> str:
        """The service that calls, by its token."""
        scheme, _, token = headers.get(AUTHORIZATION.encode(), b"").decode("ascii", "replace").partition(" ")
        try:
            return self._trust.caller(token if f"{scheme} " == BEARER else None, service)
        except Unauthenticated as error:
            raise RefusedBatch(NotStarted.UNTRUSTED, error.reason, b"www-authenticate: Bearer") from None

    def _check_not_draining(self) -> None:
        if self._ends_at is not None:
            seconds = max(0.0, self._ends_at - self._clock.monotonic())
            header = f"{DRAINING_SECONDS}: {seconds:.3f}".encode()
            raise RefusedBatch(NotStarted.DRAINING, "This process is about to end.", header)

    def _decode(
        self, operation: Operation[Any, Any], body: bytes, headers: Mapping[bytes, bytes]
    ) -> tuple[Sequence[Any], Sequence[Context]]:
        try:
            parent = headers.get(TRACEPARENT.encode(), b"").decode("ascii", "replace")
            requests, contexts = decode_requests(operation, body, self._clock.monotonic(), parent)
        except (msgspec.MsgspecError, RecursionError) as error:  # RecursionError: deeply nested lists
            caller = headers.get(VERSION.encode(), b"").decode("ascii", "replace")[:SHOWN_CHARACTERS]
            log.warning("rpc_malformed", operation=operation.full_name, caller_version=caller, reason=str(error))
            raise RefusedBatch(NotStarted.MALFORMED_BODY, "The body is not a batch in MessagePack.") from error
        if not 1 <= len(requests) <= operation.size:
            raise RefusedBatch(NotStarted.WRONG_BATCH_SIZE, f"A batch has 1 to {operation.size} requests here.")
        return requests, contexts


def _check_head(method: str, headers: Mapping[bytes, bytes]) -> float:
    """The time that is left, in seconds."""
    if method != "POST":
        raise RefusedBatch(NotStarted.WRONG_METHOD, "A batch is sent by POST.", b"allow: POST")
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
    header = f"{NOT_STARTED}: {reason}".encode()
    await _send(send, status, _problem(status, reason, refused.detail), PROBLEM, header, *refused.lines)


def _problem(status: int, code: str, detail: str) -> bytes:
    return msgspec.json.encode({"type": "about:blank", "status": status, "code": code, "detail": detail})


async def _send(send: Send, status: int, body: bytes, *lines: bytes) -> None:
    await send({"type": COMPLETE_RESPONSE, "status": status, "lines": lines, "body": body})
