"""The HTTP server: uvicorn's httptools protocol with a bound on everything that a client can do to it.

uvicorn parses and answers well, but lets a request take for ever, a header or a body grow without end, and
answers some abuses in plain text. Here are the parts that close those gaps:

`HttpLimits`       the bounds.
`bind`             a listening socket, or one sentence that says why not.
`HttpServer`       listens on sockets, sweeps over its connections four times a second, drains on stop.
`BoundedProtocol`  one connection: counts what arrives, refuses what crosses a bound.
`Refusal`          why a request was refused, as an RFC 9457 problem.

A connection is always in one of these phases:

    IDLE ─ first byte ─> HEAD ─ empty line ─> BODY ─ last byte ─> IDLE
      any of them ─ refused ─> WAITING ─ earlier answers are written ─> LINGERING ─> closed

WAITING exists because of pipelining: the refusal of a second request may not be written into the middle of the
answer to the first. LINGERING exists because of TCP: closing a socket that still has unread input resets the
connection, and a reset may destroy the answer before the client has read it. So the sending half is closed, and
what the client still sends is read and thrown away, for a bounded time.

Guaranteed: an application never receives more than `body_bytes` of a body; a refused request gets one answer, in
its turn, and is the last of its connection. Deadlines are up to one sweep late and never early: the hot path reads
no clock, it only forgets the connection's time stamp, and the next sweep sets a new one.
"""

import asyncio
import contextlib
import errno
import logging
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from email.utils import formatdate
from typing import Any, Final, cast

import httptools
import msgspec
import uvicorn
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

logger = logging.getLogger(__name__)

SWEEP_SECONDS: Final = 0.25
LISTEN_BACKLOG: Final = 2_048
# What a refused client may still send, and how long it may take to read its answer, before it is cut off.
LINGER_SECONDS: Final = 2.0
LINGER_BYTES: Final = 4_194_304
# Turned-away connections that may linger at once; beyond it they are closed as soon as their answer is written.
LINGERING_CONNECTIONS: Final = 128
# Requests of one connection that may wait for their turn. One read can hold ten thousand tiny ones.
PIPELINED_REQUESTS: Final = 64
DRAIN_POLL_SECONDS: Final = 0.02
# How long a cancelled request may take to unwind after a drain that ran out of time.
UNWIND_SECONDS: Final = 1.0

CONTINUE: Final = b"HTTP/1.1 100 "

IDLE: Final = 0
HEAD: Final = 1
BODY: Final = 2
WAITING: Final = 3
LINGERING: Final = 4

UNSTAMPED: Final = -1.0


class HttpLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What one server grants to its clients."""

    header_bytes: int = 16_384  # request line and headers together; also chunked trailers
    body_bytes: int = 1_048_576
    request_seconds: float = 10.0  # from a request's first byte to its last
    response_grace_seconds: float = 5.0  # an answer may take request_seconds and this, until the client has read it
    connections: int = 1_024
    keep_alive_seconds: float = 30.0
    drain_seconds: float = 3.0


class Refusal(msgspec.Struct, frozen=True):
    """Why a request was refused by the server itself, before or instead of the application."""

    status: int
    title: str
    code: str
    detail: str
    retry_after_seconds: int | None = None

    def answer(self, default_headers: Iterable[tuple[bytes, bytes]]) -> bytes:
        """The whole HTTP response: an RFC 9457 problem that announces the end of the connection."""
        problem = {
            "type": "about:blank",
            "title": self.title,
            "status": self.status,
            "code": self.code,
            "detail": self.detail,
        }
        body = msgspec.json.encode(problem)
        lines = [f"HTTP/1.1 {self.status} {self.title}".encode()]
        lines += [name + b": " + value for name, value in default_headers]
        lines += [b"content-type: application/problem+json", b"content-length: %d" % len(body), b"connection: close"]
        if self.retry_after_seconds is not None:
            lines.append(b"retry-after: %d" % self.retry_after_seconds)
        return b"\r\n".join([*lines, b"", body])


MALFORMED: Final = Refusal(400, "Bad Request", "malformed_request", "The request is not valid HTTP/1.1.")
INTERNAL_ERROR: Final = Refusal(500, "Internal Server Error", "internal_error", "The request failed unexpectedly.")
TOO_MANY_CONNECTIONS: Final = Refusal(
    503, "Service Unavailable", "too_many_connections", "Too many connections are open.", retry_after_seconds=1
)
TOO_MANY_PIPELINED: Final = Refusal(
    503, "Service Unavailable", "too_many_pipelined", "Too many requests wait for earlier answers on this connection."
)


class LimitRefusals(msgspec.Struct, frozen=True):
    """The refusals whose sentence names a limit."""

    uri_too_long: Refusal
    headers_too_large: Refusal
    body_too_large: Refusal
    request_timeout: Refusal

    @classmethod
    def of(cls, limits: HttpLimits) -> "LimitRefusals":
        """Words the refusals for these limits."""
        header = f"The request line and headers together may be at most {limits.header_bytes} bytes."
        body = f"The request body may be at most {limits.body_bytes} bytes."
        late = f"The request was not received completely within {limits.request_seconds:g} seconds."
        return cls(
            uri_too_long=Refusal(414, "URI Too Long", "uri_too_long", header),
            headers_too_large=Refusal(431, "Request Header Fields Too Large", "request_header_too_large", header),
            body_too_large=Refusal(413, "Content Too Large", "body_too_large", body),
            request_timeout=Refusal(408, "Request Timeout", "request_timeout", late),
        )


class RequestRefused(Exception):
    """Raised inside a parser callback: it is what makes the parser stop in the middle of a read."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.code)
        self.refusal = refusal


def ignore_refusal(code: str) -> None:
    """The default for `on_refused`."""


class ConnectionBook(ServerState):
    """What the connections of one server share: uvicorn's own state, the limits, and who was turned away."""

    def __init__(self, limits: HttpLimits, on_refused: Callable[[str], None] = ignore_refusal) -> None:
        super().__init__()
        self.limits = limits
        self.refusals = LimitRefusals.of(limits)
        self.on_refused = on_refused
        self.response_seconds = limits.request_seconds + limits.response_grace_seconds
        self.turned_away: set[BoundedProtocol] = set()
        self.draining = False

    @property
    def admitted(self) -> "set[BoundedProtocol]":
        """The open connections, without those that were turned away at the door."""
        return cast("set[BoundedProtocol]", self.connections)


class Cork:
    """The transport as one answer sees it: its head waits for the first piece of its body, and both go together.

    uvicorn writes head and body by themselves, and the loop sends each at once: two system calls and two packets
    where one does. Sending is a quarter of what a small request costs.
    """

    __slots__ = ("_held", "_transport", "is_closing")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._held: bytes | None = None
        self.is_closing = transport.is_closing

    def write(self, data: bytes) -> None:
        if self._held is None:
            if data.startswith(CONTINUE):
                self._transport.write(data)
            else:
                self._held = data
        else:
            self._transport.write(self._held + data)
            self._held = b""

    def close(self) -> None:
        if self._held:
            self._transport.write(self._held)
        self._transport.close()


class BoundedProtocol(HttpToolsProtocol):
    """One HTTP connection within the limits of its `ConnectionBook`.

    What it depends on in uvicorn, each pinned by a test (`test_uvicorn_is_the_one_this_was_written_for`):

    - The parser callbacks `on_message_begin` and `on_headers_complete` are extended.
    - `data_received` and `on_response_complete` are replaced: the first answers malformed input in plain text, in the
      middle of another answer if need be; the second arms a timer for every request, where the sweep needs none.
    - `on_body` and `on_message_complete` are replaced, without the questions about WebSockets: that pays for a part
      of what the bounds cost.
    - Read and set: `cycle` (`body`, `more_body`, `message_event`, `response_started`, `response_complete`,
      `disconnected`, `keep_alive`, `waiting_for_100_continue`, `send_500_response`), `pipeline`, `flow`, `headers`,
      `url`, `scope`.
    """

    # uvicorn sets it to None when the connection is lost, after which nothing arrives.
    parser: httptools.HttpRequestParser  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        assert isinstance(server_state, ConnectionBook), "BoundedProtocol needs the limits: serve it with HttpServer"
        self._book = server_state
        self._header_limit_bytes = server_state.limits.header_bytes
        self._body_limit_bytes = server_state.limits.body_bytes
        self._phase = IDLE
        self._stamped_at = UNSTAMPED
        self._refusal: Refusal | None = None
        # Of the current read, the bytes that may belong to the newest head; 0 when it began somewhere in the middle.
        self._read_bytes = 0
        # Bytes of this head, or of chunk framing and trailers, in the earlier reads; 0 when it began in this read.
        self._framing_bytes = 0
        self._body_bytes = 0
        self._discarded_bytes = 0

    @property
    def is_lingering(self) -> bool:
        """Everything that this client will ever get is written; what it still sends is thrown away."""
        return self._phase == LINGERING

    # The connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        if len(self._book.connections) < self._book.limits.connections:
            super().connection_made(transport)
        else:
            self._turn_away(transport)

    def _turn_away(self, transport: asyncio.Transport) -> None:
        # uvicorn never learns of this connection, so that those who linger do not fill the places of those who left.
        self.transport = transport
        turned_away = self._book.turned_away
        turned_away.add(self)
        self._book.on_refused(TOO_MANY_CONNECTIONS.code)
        self._linger(TOO_MANY_CONNECTIONS)
        if len(turned_away) > LINGERING_CONNECTIONS:
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if self in self._book.turned_away:
            self._book.turned_away.discard(self)
            return
        super().connection_lost(exc)
        if self.cycle is not None:  # pyright: ignore[reportUnnecessaryComparison]  # uvicorn: None before the first
            # The only way back from the cycle to this protocol; without it both are freed without the collector.
            del self.cycle.send_500_response

    def data_received(self, data: bytes) -> None:
        if self._phase >= WAITING:
            self._discard(data)
            return
        self._read_bytes = len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._decline_upgrade()
        except httptools.HttpParserCallbackError as error:
            self._refuse(self._refusal_behind(error))
        except httptools.HttpParserError:
            self._refuse(MALFORMED)
        else:
            if self._phase != IDLE:
                self._count_framing(len(data))

    def _discard(self, data: bytes) -> None:
        self._discarded_bytes += len(data)
        if self._discarded_bytes > LINGER_BYTES:
            # Not closed: it may still read its answer until the sweep cuts it off.
            self.transport.pause_reading()

    def _decline_upgrade(self) -> None:
        # RFC 9110 7.8: a server may ignore an upgrade and answer as usual. But the parser has stopped, and what
        # follows is in a protocol that we do not speak, so this answer is the last one.
        self._phase = WAITING
        self.cycle.keep_alive = False

    def _refusal_behind(self, error: httptools.HttpParserCallbackError) -> Refusal:
        # httptools hands over what a callback raised as the context of its own error.
        cause = error.__context__
        if isinstance(cause, RequestRefused):
            return cause.refusal
        logger.error("the HTTP parser's callback failed", exc_info=cause or error)
        return INTERNAL_ERROR

    def _count_framing(self, read_bytes: int) -> None:
        """Counts a head or a run of trailers that did not end in this read; a head is measured again when it does."""
        if self._framing_bytes:
            self._framing_bytes += read_bytes
        else:
            # It began in this read. If that was in the middle, at most one read goes uncounted until the head is whole.
            self._framing_bytes = (self._read_bytes if self._phase == HEAD else 0) or 1
        if self._framing_bytes > self._header_limit_bytes:
            self._refuse(self._head_refusal())

    # The parser's callbacks: what they raise stops the parser and comes out of feed_data

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._phase = HEAD
        self._framing_bytes = 0
        cycle = self.cycle
        if cycle is None or cycle.response_complete:  # pyright: ignore[reportUnnecessaryComparison]
            self._stamped_at = UNSTAMPED

    def on_headers_complete(self) -> None:
        self._check_head()
        try:
            super().on_headers_complete()
        except (httptools.HttpParserInvalidURLError, AttributeError) as error:
            # A target without a path (`CONNECT host:80`, `GET http://host`) has None where uvicorn expects bytes.
            raise RequestRefused(MALFORMED) from error
        self.cycle.send_500_response = self._answer_internal_error
        if self.scope["method"] != "HEAD":  # its answer has a head only, which would wait for ever
            self.cycle.transport = Cork(self.transport)  # pyright: ignore[reportAttributeAccessIssue]  # see Cork
        if self._book.draining:
            # It was half received when the server was told to stop: it is answered, and is the last one.
            self.cycle.keep_alive = False
        self._phase = BODY
        self._framing_bytes = 0
        self._body_bytes = 0
        # The application holds the list of headers; trailers would be appended to it while it is being read, behind
        # the back of every check. They go to a list that nobody reads.
        self.headers = []

    def _check_head(self) -> None:
        read_bytes = self._read_bytes
        if not read_bytes or self._framing_bytes + read_bytes > self._header_limit_bytes:
            self._measure_head()
        hosts = 0
        for name, value in self.headers:
            if name == b"host":
                hosts += 1
            elif name == b"content-length":
                if int(value) > self._body_limit_bytes:
                    raise RequestRefused(self._book.refusals.body_too_large)
            elif name == b"transfer-encoding":
                self._check_transfer_encoding(value)
        # RFC 9112 3.2: an HTTP/1.1 request names its host exactly once.
        if hosts != 1 and (hosts or self.parser.get_http_version() == "1.1"):
            raise RequestRefused(MALFORMED)
        if self.parser.should_upgrade():
            self._check_upgrade()
        if self.pipeline and len(self.pipeline) >= PIPELINED_REQUESTS:
            raise RequestRefused(TOO_MANY_PIPELINED)

    def _measure_head(self) -> None:
        # Each header stands for its colon, space and line end; the request line for method, version and the rest.
        head_bytes = len(self.url) + 16 + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if head_bytes > self._header_limit_bytes:
            raise RequestRefused(self._head_refusal())

    def _head_refusal(self) -> Refusal:
        refusals = self._book.refusals
        return refusals.uri_too_long if len(self.url) > self._header_limit_bytes else refusals.headers_too_large

    def _check_transfer_encoding(self, value: bytes) -> None:
        # The parser refuses a wrong coding only after the application has been started, and accepts `gzip, chunked`.
        # RFC 9112 6.1: in HTTP/1.0 its mere presence is a framing error.
        if value.lower() != b"chunked" or self.parser.get_http_version() != "1.1":
            raise RequestRefused(MALFORMED)

    def _check_upgrade(self) -> None:
        # The parser takes whatever follows an upgrade for another protocol. A declared body would be lost, and when
        # it comes in a later read, it would be taken for a request: smuggling.
        for name, value in self.headers:
            if name == b"transfer-encoding" or (name == b"content-length" and int(value) > 0):
                raise RequestRefused(MALFORMED)

    def on_body(self, body: bytes) -> None:
        self._framing_bytes = 0
        self._body_bytes += len(body)
        # A declared length was checked with the head; this is for chunked bodies.
        if self._body_bytes > self._body_limit_bytes:
            raise RequestRefused(self._book.refusals.body_too_large)
        cycle = self.cycle
        if not cycle.response_complete:
            cycle.body += body
            if len(cycle.body) > HIGH_WATER_LIMIT:
                self.flow.pause_reading()
            cycle.message_event.set()

    def on_message_complete(self) -> None:
        self._phase = IDLE
        self._read_bytes = 0
        if not self.pipeline:
            self._stamped_at = UNSTAMPED
        cycle = self.cycle
        if not cycle.response_complete:
            cycle.more_body = False
            cycle.message_event.set()

    # Answers

    def on_response_complete(self) -> None:
        self._stamped_at = UNSTAMPED
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            cycle, app = self.pipeline.pop()
            self._start_asgi_task(cycle, app)
        elif self._phase == WAITING:
            self._linger(self._refusal)

    def _answer_is_due(self) -> bool:
        """A request was handed to the application, and its answer is not written yet."""
        cycle = self.cycle
        return cycle is not None and not cycle.response_complete  # pyright: ignore[reportUnnecessaryComparison]

    def _refuse(self, refusal: Refusal) -> None:
        """Answers the request that is being received, after the answers to those before it, and takes no other."""
        self._book.on_refused(refusal.code)
        phase, self._phase = self._phase, WAITING
        self._refusal = refusal
        if phase != BODY:
            if not self._answer_is_due():
                self._linger(refusal)
        elif self.pipeline:
            # Its turn has not come, and never will: the application is not called.
            self.pipeline.popleft()
        else:
            self._interrupt(refusal)

    def _interrupt(self, refusal: Refusal) -> None:
        """The application works on the very request that is refused: it hears of a disconnect, and is not heard."""
        cycle = self.cycle
        if cycle.response_complete:
            # It answered without waiting for the body. That was the answer.
            self._linger(None)
            return
        cycle.disconnected = True
        # A late `receive` must not invite the body after the final answer.
        cycle.waiting_for_100_continue = False
        cycle.message_event.set()
        self.flow.resume_writing()
        self._linger(None if cycle.response_started else refusal)

    def _linger(self, refusal: Refusal | None) -> None:
        self._phase = LINGERING
        self._stamped_at = UNSTAMPED
        transport = self.transport
        if transport.is_closing():
            return
        if refusal is not None:
            transport.write(refusal.answer(self._book.default_headers))
        transport.write_eof()
        if self.flow is not None:  # pyright: ignore[reportUnnecessaryComparison]  # None when turned away at the door
            self.flow.resume_reading()

    async def _answer_internal_error(self) -> None:
        """In the place of uvicorn's plain text, for an application that failed before it began to answer."""
        if self._phase != LINGERING:
            # Requests behind the failed one are not answered, which a client that pipelines must expect of any close.
            self.pipeline.clear()
            self._linger(INTERNAL_ERROR)

    # Deadlines and the end

    def sweep(self, now: float) -> None:
        """Enforces the deadlines; called every `SWEEP_SECONDS` with a clock that only this server's sweeps share."""
        if self._stamped_at == UNSTAMPED:
            self._stamped_at = now
            return
        age_seconds = now - self._stamped_at
        limits = self._book.limits
        if self._phase == LINGERING:
            if age_seconds >= LINGER_SECONDS:
                self.transport.abort()
        elif self._is_answering():
            if age_seconds >= self._book.response_seconds:
                self._abandon_answer()
        elif self._phase != IDLE:
            if age_seconds >= limits.request_seconds:
                self._refuse(self._book.refusals.request_timeout)
        elif age_seconds >= limits.keep_alive_seconds:
            self.transport.close()

    def _is_answering(self) -> bool:
        # An answer that is complete for uvicorn may still be in the transport's buffer, and stay there for ever if
        # the client does not read. While the application answers a request whose body is still on its way, what is
        # late is the body.
        if self._answer_is_due():
            return self._phase != BODY or bool(self.pipeline)
        return self.transport.get_write_buffer_size() > 0 or self.transport.is_closing()

    def _abandon_answer(self) -> None:
        self._book.on_refused("response_timeout")
        logger.warning(
            "connection aborted: %s %s of %s was not answered and read within %g seconds",
            self.scope.get("method", "?"),
            self.scope.get("path", "?"),
            self.client,
            self._book.response_seconds,
        )
        self.transport.abort()

    def shutdown(self) -> None:
        """Asks the connection to end: at once if it is idle, else with its answer. Called repeatedly while draining."""
        if self._phase == HEAD or self._phase >= WAITING:
            return
        if self._answer_is_due():
            self.cycle.keep_alive = False
        else:
            self.transport.close()


class HttpServer:
    """Serves one ASGI application on sockets that are already bound.

    uvicorn's own Server is not used: its signal handlers, its ten polls a second and its shutdown (which leaves
    connections open when the time is over) would all have to be replaced, and a call of `create_server` is the rest.

    `on_ready` is called once, when every socket accepts connections. `on_refused` is called with the code of each
    refusal, and with `response_timeout` for each answer that was abandoned. The sockets are closed at the end; other
    processes that inherited them go on accepting.
    """

    def __init__(
        self,
        app: Callable[..., Any],
        *,
        sockets: Sequence[socket.socket],
        limits: HttpLimits | None = None,
        on_ready: Callable[[], None] | None = None,
        on_refused: Callable[[str], None] = ignore_refusal,
        date_header: bool = True,
    ) -> None:
        self._sockets = tuple(sockets)
        self._limits = limits or HttpLimits()
        self._book = ConnectionBook(self._limits, on_refused)
        self._on_ready = on_ready
        self._date_header = date_header
        self._config = uvicorn.Config(
            app,
            http=BoundedProtocol,
            ws="none",
            interface="asgi3",
            lifespan="off",
            log_config=None,
            # Above uvicorn's own TRACE level: without a level, it would format two trace lines for each connection.
            log_level="info",
            access_log=False,
            workers=1,  # or it would be read from the environment
            proxy_headers=False,
            server_header=False,
        )
        self._config.load()

    @property
    def open_connections(self) -> int:
        """How many connections are open now, without those that were turned away."""
        return len(self._book.connections)

    async def run_until(self, stop: asyncio.Event) -> None:
        """Serves until `stop` is set, then lets running requests finish for up to `drain_seconds`, and returns.

        When it returns or raises, no connection is open and no request is running. Installs no signal handlers.
        """
        listeners: list[asyncio.Server] = []
        self._refresh_date()
        sweeper = asyncio.create_task(self._sweep_for_ever())
        try:
            await self._listen(listeners)
            if self._on_ready is not None:
                self._on_ready()
            await stop.wait()
            self._stop_accepting(listeners)
            await self._drain()
        finally:
            self._stop_accepting(listeners)
            sweeper.cancel()
            await self._force()

    async def _listen(self, listeners: list[asyncio.Server]) -> None:
        loop = asyncio.get_running_loop()

        def connection() -> BoundedProtocol:
            return BoundedProtocol(self._config, self._book, {}, loop)

        for sock in self._sockets:
            # One by one: when a later socket fails, the caller closes those that already accept.
            listeners.append(  # noqa: PERF401
                await loop.create_server(connection, sock=sock, backlog=LISTEN_BACKLOG)
            )

    def _stop_accepting(self, listeners: Iterable[asyncio.Server]) -> None:
        for listener in listeners:
            listener.close()
        for sock in self._sockets:
            sock.close()

    async def _sweep_for_ever(self) -> None:
        loop = asyncio.get_running_loop()
        swept_at, now = loop.time(), 0.0
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            # A process that was stopped or starved for a while does not blame its clients for it: their bytes may be
            # waiting in the kernel. So the sweeps' own clock never jumps.
            elapsed, swept_at = loop.time() - swept_at, loop.time()
            now += min(elapsed, 2 * SWEEP_SECONDS)
            self._refresh_date()
            for connection in (*self._book.admitted, *self._book.turned_away):
                try:
                    connection.sweep(now)
                except Exception:
                    # One connection in a state that nobody foresaw must not take the deadlines from all the others.
                    logger.exception("the sweep failed for a connection, which is aborted")
                    connection.transport.abort()

    def _refresh_date(self) -> None:
        # RFC 9110 6.6.1 wants a date from a server with a clock; formatting it a few times a second costs nothing.
        if self._date_header:
            self._book.default_headers = [(b"date", formatdate(time.time(), usegmt=True).encode())]

    async def _drain(self) -> None:
        self._book.draining = True
        loop = asyncio.get_running_loop()
        drained_at = loop.time() + self._limits.drain_seconds
        # Polled, so that a running server pays nothing for the day when it is stopped.
        while self._shut_down_connections() and loop.time() < drained_at:  # noqa: ASYNC110
            await asyncio.sleep(DRAIN_POLL_SECONDS)

    def _shut_down_connections(self) -> bool:
        """Asks every connection to end; True while one of them, or a request without one, still has to be waited for.

        Every round asks again: a request that was half received in the last round is running in this one.
        """
        for connection in tuple(self._book.admitted):
            connection.shutdown()
        return bool(self._book.tasks) or any(not connection.is_lingering for connection in self._book.admitted)

    async def _force(self) -> None:
        for connection in (*self._book.admitted, *self._book.turned_away):
            connection.transport.abort()
        tasks = tuple(self._book.tasks)
        if tasks:
            logger.warning("cancelling %d requests that did not finish within the drain", len(tasks))
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=UNWIND_SECONDS)
        # Transports report their end in the next turns of the loop.
        for _ in range(2):
            await asyncio.sleep(0)


# Sockets


class CannotListen(Exception):
    """A socket cannot listen where it was told to; the message is one sentence that names the way out."""


class PortTaken(CannotListen):
    """Another process listens there."""


class PortForbidden(CannotListen):
    """The port needs a privilege that this process does not have."""


class HostUnknown(CannotListen):
    """The host is not a name or an address of this machine."""


def bind(host: str, port: int) -> socket.socket:
    """A listening TCP socket on the first address of `host`; port 0 takes a free one.

    `host` is a name, an IPv4 address, or an IPv6 address with or without brackets. `::` also takes IPv4 where the
    system allows it. Raises a `CannotListen`.
    """
    if not 0 <= port <= 65_535:
        raise CannotListen(f"{port} is not a port: choose one from 0 to 65535 with --port.")
    family, address = resolve(host.removeprefix("[").removesuffix("]"), port)
    with contextlib.ExitStack() as undo:
        sock = undo.enter_context(socket.socket(family, socket.SOCK_STREAM))
        # So that a restart does not wait for the old process's connections to time out.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(address)
            # Here and not later: of two processes that only bound the port, the second one to listen would fail.
            sock.listen(LISTEN_BACKLOG)
        except OSError as error:
            raise translate(error, host, port) from error
        sock.setblocking(False)
        undo.pop_all()
        return sock


def resolve(host: str, port: int) -> tuple[socket.AddressFamily, Any]:
    """The address family and the address of `host`; raises `HostUnknown`."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise HostUnknown(f"The host {host!r} is unknown: choose another with --host.") from error
    family, _, _, _, address = found[0]
    return family, address


def translate(error: OSError, host: str, port: int) -> CannotListen:
    """What the operating system said, in the words of the one who has to act on it."""
    where = f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"
    if error.errno == errno.EADDRINUSE:
        return PortTaken(f"{where} is taken by another process: stop it, or choose another port with --port.")
    if error.errno in (errno.EACCES, errno.EPERM):
        return PortForbidden(f"{where} needs a privilege: choose a port from 1024 upwards with --port.")
    if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
        return HostUnknown(f"{host} is not an address of this machine: choose another with --host.")
    return CannotListen(f"Cannot listen on {where}: {error.strerror}.")
