"""One connection: `BoundedProtocol`."""

import asyncio
import logging
from collections.abc import Iterable, Sequence
from typing import Any, Final, cast
from urllib.parse import unquote

import httptools
import uvicorn
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.utils import get_remote_addr
from uvicorn.server import ServerState

from .addresses import network_of
from .connection_table import ConnectionTable
from .cycle import EXTENSIONS, BoundedCycle
from .limits import (
    INTERNAL_ERROR,
    MALFORMED,
    TOO_MANY_CONNECTIONS,
    TOO_MANY_CONNECTIONS_OF_ONE,
    TOO_MANY_PIPELINED,
    Refusal,
    RequestRefused,
)
from .refused_cycle import RefusedCycle
from .shedding import EarlyRefusals
from .targets import VERSIONS, check_host_of_target, path_of_other_form, refusal_of, refusal_of_version

logger = logging.getLogger(__name__)

# What a refused client may still send, and how long it may take to read its answer, before it is cut off.
LINGER_SECONDS: Final = 2.0
LINGER_BYTES: Final = 4_194_304
# Rejected connections that may linger at once; beyond it they are closed as soon as their answer is written.
LINGERING_CONNECTIONS: Final = 128
# Requests of one connection that may wait for their turn. One read can hold ten thousand tiny ones.
PIPELINED_REQUESTS: Final = 64

IDLE: Final = 0
HEAD: Final = 1
BODY: Final = 2
WAITING: Final = 3
LINGERING: Final = 4

UNSTAMPED: Final = -1.0

ASGI_VERSIONS: Final = {"version": "3.0", "spec_version": "2.3"}


class BoundedProtocol(HttpToolsProtocol):
    """One HTTP connection within the limits of its `ConnectionTable`.

    What it depends on in uvicorn, each pinned by a test (`test_uvicorn_is_the_one_this_was_written_for`):

    - `data_received` and `on_response_complete` are replaced: the first answers malformed input in plain text, in the
      middle of another answer if need be; the second arms a timer for every request, where the sweep needs none, and
      starts a pipelined request at once, where they take turns here.
    - `eof_received` is replaced: it closes the connection of a client that sends no more and waits for its answer.
    - `on_message_begin`, `on_headers_complete`, `on_body` and `on_message_complete` are replaced, without the questions
      about WebSockets, concurrency limits and root paths: that pays for a part of what the bounds cost. The scope is
      made when the head is complete, and its cycle is a `BoundedCycle`.
    - Read and set: `cycle` (`body`, `more_body`, `message_event`, `response_started`, `response_complete`,
      `disconnected`, `keep_alive`, `waiting_for_100_continue`, `send_500_response`), `pipeline`, `flow`, `headers`,
      `url`, `scope`.
    """

    # uvicorn sets it to None when the connection is lost, after which nothing arrives.
    parser: httptools.HttpRequestParser  # pyright: ignore[reportIncompatibleVariableOverride]
    app: Any

    _refusal_headers: Sequence[bytes] = ()
    """Headers of the refusal that ends this connection, besides those of all answers."""

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.access_log = False  # uvicorn asks the global loggers, which others may have changed since
        assert isinstance(server_state, ConnectionTable), "BoundedProtocol needs the limits: serve it with HttpServer"
        self._table = server_state
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
        self._network = ""
        self._has_turn = False
        self._half_closed = False
        self._has_sent = False
        self._answering: BoundedCycle | None = None
        """The request that the application works on, or answered last; `cycle` is the newest request."""
        self.waits_for_turn = False
        """The first request of `pipeline` waits until others that were pipelined are answered; none is in work."""

    @property
    def idle_since(self) -> float:
        """When it became idle, by the clock of the sweeps."""
        return self._stamped_at

    @property
    def is_idle(self) -> bool:
        """A sweep has seen it wait for a request, and none has begun since."""
        return self._stamped_at != UNSTAMPED and self._phase == IDLE and not self._is_answering()

    @property
    def is_lingering(self) -> bool:
        """The last answer is written; what the client still sends is dropped."""
        return self._phase == LINGERING

    # The connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        table = self._table
        peer = get_remote_addr(transport)
        network = network_of(peer[0]) if peer else ""
        if table.by_network[network] >= table.limits.connections_of_one:
            self._reject(transport, TOO_MANY_CONNECTIONS_OF_ONE)
        elif not table.ensure_place():
            self._reject(transport, TOO_MANY_CONNECTIONS)
        else:
            self._network = network
            table.by_network[network] += 1
            table.silent[self] = None
            super().connection_made(transport)

    def evict(self) -> None:
        """Closes an idle connection; its place is free at once."""
        self._table.connections.discard(self)
        self._table.silent.pop(self, None)
        self.transport.close()

    def _reject(self, transport: asyncio.Transport, refusal: Refusal) -> None:
        # uvicorn does not register this connection, so that connections that linger take no place from others.
        self.transport = transport
        rejected = self._table.rejected
        rejected.add(self)
        self._table.on_refused(refusal.code)
        self._linger(refusal)
        if len(rejected) > LINGERING_CONNECTIONS:
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if self in self._table.rejected:
            self._table.rejected.discard(self)
            return
        self._table.silent.pop(self, None)
        if self in self._table.streams:
            self._table.streams.discard(self)
        else:
            self._leave_network()
        super().connection_lost(exc)
        if self._answering is not None:
            self._answering.on_connection_lost()
            self._answering = None
        self.waits_for_turn = False
        self._end_turn()
        if self.cycle is not None:  # pyright: ignore[reportUnnecessaryComparison]  # uvicorn: None before the first
            # The only way back from the cycle to this protocol; without it both are freed without the collector.
            del self.cycle.send_500_response

    def _leave_network(self) -> None:
        by_network = self._table.by_network
        by_network[self._network] -= 1
        if not by_network[self._network]:
            del by_network[self._network]

    def eof_received(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]  # asyncio reads the answer
        """A client that ends its half may still wait for answers: True keeps the connection open for them.

        False while a chunked answer is sent, which may go on for ever: a client that has left looks the same.
        """
        if not self._table.limits.answers_half_closed or self.scheme == "https":
            return False
        self._half_closed = True
        if self._phase in (HEAD, BODY):
            self._refuse(MALFORMED)
        elif self._phase != LINGERING and self._answer_is_due():
            cycle = self.cycle
            cycle.keep_alive = False
            return bool(self.pipeline) or not (cycle.response_started and cycle.chunked_encoding)
        return self._phase == WAITING

    def data_received(self, data: bytes) -> None:
        if self._phase >= WAITING:
            self._discard(data)
            return
        self._read_bytes = len(data)
        if not self._has_sent:
            self._has_sent = True
            self._table.silent.pop(self, None)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._decline_upgrade()
        except httptools.HttpParserCallbackError as error:
            self._refuse(self._refusal_behind(error))
        except httptools.HttpParserError as error:
            self._refuse(refusal_of(error))
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
        self.url = b""
        self.headers = []
        self.expect_100_continue = False
        self._phase = HEAD
        self._framing_bytes = 0
        cycle = self.cycle
        if cycle is None or cycle.response_complete:  # pyright: ignore[reportUnnecessaryComparison]
            self._stamped_at = UNSTAMPED

    def on_headers_complete(self) -> None:
        self._check_head()
        parser = self.parser
        try:
            url = httptools.parse_url(self.url)
        except httptools.HttpParserInvalidURLError as error:
            raise RequestRefused(MALFORMED) from error
        raw_path: Any = url.path  # None: `OPTIONS http://host`, `CONNECT host:80`
        if raw_path is None or raw_path[:1] != b"/":
            raw_path = path_of_other_form(self.url, raw_path, parser.get_method())
        path = raw_path.decode("ascii")
        http_version = parser.get_http_version()
        if http_version not in VERSIONS:
            raise RequestRefused(refusal_of_version(http_version))
        if url.schema is not None:  # pyright: ignore[reportUnnecessaryComparison]  # None for a path alone
            check_host_of_target(self.url, self.headers)
        # A request that is half received when the drain begins is answered, as the last one of its connection.
        keep_alive = http_version != "1.0" and parser.should_keep_alive() and not self._table.draining
        method = parser.get_method().decode("ascii")
        path = unquote(path) if "%" in path else path
        early = self._table.early
        if early is not None and early.load.waiting and self._refuse_early(early, method, path, keep_alive=keep_alive):
            return
        scope: Any = {
            "type": "http",
            "asgi": ASGI_VERSIONS,
            "http_version": http_version,
            "server": self.server,
            "client": self.client,
            "scheme": self.scheme,
            "root_path": "",
            "headers": self.headers,
            "state": {},
            "method": method,
            "path": path,
            "raw_path": raw_path,
            "query_string": url.query or b"",
            "extensions": EXTENSIONS,
        }
        self._start_request(scope, keep_alive=keep_alive)

    def _start_request(self, scope: Any, *, keep_alive: bool) -> None:
        """Calls the application, or queues the request behind earlier ones of this connection."""
        before = self.cycle
        self.scope = scope
        self.cycle = cycle = BoundedCycle(
            scope=scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=False,
            default_headers=self._table.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=self.expect_100_continue,
            keep_alive=keep_alive,
            on_response=self.on_response_complete,
        )
        cycle.send_500_response = self._answer_internal_error
        if before is None or before.response_complete:  # pyright: ignore[reportUnnecessaryComparison]
            self._answering = cycle.start(self.app, self.loop, self.tasks, self._begin_stream)
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((cycle, self.app))
        self._expect_body()

    def _expect_body(self) -> None:
        self._phase = BODY
        self._framing_bytes = 0
        self._body_bytes = 0
        # The application holds the list of headers. The parser appends trailers, which no check has seen: they go to
        # another list, which is dropped.
        self.headers = []

    def _refuse_early(self, early: EarlyRefusals, method: str, path: str, *, keep_alive: bool) -> bool:
        """Refuses the request before the application is called, if the server is too full; gives whether it did.

        Not behind an unanswered request, for answers keep their order; nor if the client waits for `100 Continue`.
        """
        if self._answer_is_due() or self.flow.write_paused or self.expect_100_continue:
            return False
        received_at = self.loop.time()
        render = early.refuse(method, path, self.headers, lambda: self.loop.time() - received_at)
        if render is None:
            return False
        headers, is_head = self._table.default_headers, method == "HEAD"
        refused = RefusedCycle(early, render, headers, keep_alive=keep_alive, is_head=is_head)
        refused.attach(self.transport, self.on_response_complete, self._answer_internal_error)
        self.cycle = cast(BoundedCycle, refused)
        self.scope = cast(Any, {"method": method, "path": path, "headers": self.headers})
        self._expect_body()
        return True

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
                    raise RequestRefused(self._table.refusals.body_too_large)
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
        # 4 for the colon, space and line end of each header; 16 for method, version and spaces of the request line.
        head_bytes = len(self.url) + 16 + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if head_bytes > self._header_limit_bytes:
            raise RequestRefused(self._head_refusal())

    def _head_refusal(self) -> Refusal:
        refusals = self._table.refusals
        return refusals.uri_too_long if len(self.url) > self._header_limit_bytes else refusals.headers_too_large

    def _check_transfer_encoding(self, value: bytes) -> None:
        # The parser refuses a wrong coding only after the application has been started, and accepts `gzip, chunked`.
        # RFC 9112 6.1: in HTTP/1.0 its mere presence is a framing error.
        if value.lower() != b"chunked" or self.parser.get_http_version() != "1.1":
            raise RequestRefused(MALFORMED)

    def _check_upgrade(self) -> None:
        # The parser treats all bytes after an upgrade as another protocol. A declared body would be lost, and in a
        # later read it would be parsed as a request (request smuggling).
        for name, value in self.headers:
            if name == b"transfer-encoding" or (name == b"content-length" and int(value) > 0):
                raise RequestRefused(MALFORMED)

    def on_body(self, body: bytes) -> None:
        self._framing_bytes = 0
        self._body_bytes += len(body)
        # A declared length was checked with the head; this is for chunked bodies.
        if self._body_bytes > self._body_limit_bytes:
            raise RequestRefused(self._table.refusals.body_too_large)
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
            self.waits_for_turn = True
        elif self._phase == WAITING:
            self._linger(self._refusal)
        self._end_turn()
        if self.waits_for_turn:
            self._table.turns.ask(self)

    def _begin_stream(self) -> None:
        """The answer is a stream: its connection frees its place and its turn, which are those of requests."""
        self._table.streams.add(self)
        self._leave_network()
        self._end_turn()
        self._stamped_at = UNSTAMPED

    def resume_writing(self) -> None:
        super().resume_writing()
        if self in self._table.streams:
            self._stamped_at = UNSTAMPED

    def take_turn(self) -> None:
        """Starts the first request of `pipeline`."""
        self.waits_for_turn = False
        self._has_turn = True
        cycle, app = self.pipeline.pop()
        self._answering = cast(BoundedCycle, cycle).start(app, self.loop, self.tasks, self._begin_stream)

    def _end_turn(self) -> None:
        if self._has_turn:
            self._has_turn = False
            self._table.turns.end()

    def _answer_is_due(self) -> bool:
        """A request was handed to the application, and its answer is not written yet."""
        cycle = self.cycle
        return cycle is not None and not cycle.response_complete  # pyright: ignore[reportUnnecessaryComparison]

    def _refuse(self, refusal: Refusal) -> None:
        """Answers the request that is being received, after the answers to earlier ones, and accepts no further one."""
        self._table.on_refused(refusal.code)
        phase, self._phase = self._phase, WAITING
        self._refusal = refusal
        # `headers` are those of the head that is being received, or trailers.
        self._note_headers(self.scope["headers"] if phase == BODY else self.headers or ())
        if phase != BODY:
            if not self._answer_is_due():
                self._linger(refusal)
        elif self.pipeline:
            # Its turn has not come: the application is not called for it.
            self.pipeline.popleft()
            if self.waits_for_turn and not self.pipeline:
                self.waits_for_turn = False
                self._linger(refusal)
        else:
            self._interrupt(refusal)

    def _note_headers(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        self._refusal_headers = self._table.refusal_headers(headers)

    def _interrupt(self, refusal: Refusal) -> None:
        """Refuses a request that the application works on: `receive` reports a disconnect, `send` drops the answer."""
        cycle = self.cycle
        if cycle.response_complete:
            # The application answered without waiting for the body; no refusal follows that answer.
            self._linger(None)
            return
        cycle.disconnected = True
        # A late `receive` must not send `100 Continue` after the final answer.
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
            transport.write(refusal.answer(self._table.default_headers, self._refusal_headers))
        if self._half_closed:
            transport.close()
            return
        transport.write_eof()
        if self.flow is not None:  # pyright: ignore[reportUnnecessaryComparison]  # None if rejected at once
            self.flow.resume_reading()

    async def _answer_internal_error(self) -> None:
        """Answers for an application that failed before it began to answer, instead of uvicorn's plain text."""
        if self._phase != LINGERING:
            # Requests behind the failed one are not answered, which a client that pipelines must expect of any close.
            self.pipeline.clear()
            if self._answering is not None:
                self._note_headers(self._answering.scope["headers"])
            self._linger(INTERNAL_ERROR)
        self._end_turn()

    # Deadlines and the end

    def sweep(self, now: float) -> None:
        """Enforces the deadlines; called every `SWEEP_SECONDS` with a clock that only this server's sweeps share."""
        if self._stamped_at == UNSTAMPED:
            self._stamped_at = now
            return
        age_seconds = now - self._stamped_at
        limits = self._table.limits
        if self in self._table.streams and self._answer_is_due():
            self._sweep_stream(age_seconds)
        elif self._phase == LINGERING:
            if age_seconds >= LINGER_SECONDS:
                self.transport.abort()
        elif self._is_answering():
            cycle = self._answering
            more_seconds = 0.0 if cycle is None or cycle.response_complete else cycle.more_seconds
            if age_seconds >= self._table.response_seconds + more_seconds:
                self._abandon_answer()
        elif self._phase != IDLE:
            if age_seconds >= limits.request_seconds:
                self._refuse(self._table.refusals.request_timeout)
        elif age_seconds >= (limits.keep_alive_seconds if self._has_sent else limits.first_byte_seconds):
            self.transport.close()

    def _sweep_stream(self, age_seconds: float) -> None:
        """Closes the connection of a stream whose client has taken nothing since `_stamped_at`."""
        if not self.flow.write_paused:
            self._stamped_at = UNSTAMPED
        elif age_seconds >= self._table.limits.stalled_seconds:
            self._table.on_refused("stream_stalled")
            self.transport.abort()

    def _is_answering(self) -> bool:
        # An answer that is complete for uvicorn may still be in the transport's buffer, and stays there if the client
        # does not read. While the body of a request is still arriving, the deadline is that of the body.
        if self._answer_is_due():
            return self._phase != BODY or bool(self.pipeline)
        return self.transport.get_write_buffer_size() > 0 or self.transport.is_closing()

    def _abandon_answer(self) -> None:
        self._table.on_refused("response_timeout")
        # A client that does not read is no fault of this process: it is counted, but not logged.
        if self._answer_is_due() and not self.transport.get_write_buffer_size():
            logger.warning(
                "connection aborted: %s %s of %s was not answered in time",
                self.scope.get("method", "?"),
                self.scope.get("path", "?"),
                self.client,
            )
        self.transport.abort()

    def shutdown(self) -> None:
        """Asks the connection to end: at once if it is idle, else with its answer. Called repeatedly while draining."""
        if self._answering is not None:
            self._answering.interrupt()
        if self._phase == HEAD or self._phase >= WAITING:
            return
        if self._answer_is_due():
            self.cycle.keep_alive = False
        else:
            self.transport.close()
