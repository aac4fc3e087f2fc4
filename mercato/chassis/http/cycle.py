"""One request and its answer: uvicorn's cycle, which also takes a whole answer in one message.

An application that knows its whole answer sends it as one message of the ASGI extension `http.response.complete`:

    {"type": "http.response.complete", "status": 201, "lines": [b"etag: \"1\"", ...], "body": b"..."}

`lines` are header fields as they stand on the wire, `name: value`, names in lower case, at least one. Content-Length,
Date and Connection are added here and may not be among them. It costs one check of the head and one write, where the
two messages of plain ASGI cost two checks of each header and two passes through the flow control.

An application whose answer takes long on purpose sends one message of `http.response.long` before it answers:

    {"type": "http.response.long", "seconds": 60.0, "interrupt": task.cancel}

Its answer may take so many seconds more. The server calls `interrupt` at most once, when the wait has become useless:
the server is about to stop, or the client has left. An answer that follows at once is still sent.

An application whose answer has no end of its own, such as a stream of events, begins it with `http.response.stream`:

    {"type": "http.response.stream", "status": 200, "lines": [...], "interrupt": stream.end}

Messages of `http.response.body` follow, as in plain ASGI. Such an answer is the last of its connection. It has no
deadline; its connection is closed when the client takes nothing for `HttpLimits.stalled_seconds`. The server calls
`interrupt` as above; where the client does not read at that moment, the connection is aborted.

The scope announces all three under `extensions`; plain ASGI messages work unchanged.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, cast

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

COMPLETE_RESPONSE: Final = "http.response.complete"
LONG_RESPONSE: Final = "http.response.long"
STREAM_RESPONSE: Final = "http.response.stream"
EXTENSIONS: Final[Mapping[str, Mapping[str, Any]]] = {COMPLETE_RESPONSE: {}, LONG_RESPONSE: {}, STREAM_RESPONSE: {}}

READS: Final = frozenset({"GET", "HEAD"})
"""The methods of requests that change nothing."""

WITHOUT_CONTENT: Final = frozenset({204, 304})

# RFC 9110 5.5: no control characters in a header, except tabs.
CONTROLS: Final = bytes(set(range(32)) - {9}) + b"\x7f"


def whole_answer(
    status: int,
    lines: Sequence[bytes],
    body: bytes,
    *,
    default_headers: Iterable[tuple[bytes, bytes]],
    keep_alive: bool,
    is_head: bool,
) -> bytes:
    """The bytes of an answer. Raises `RuntimeError` for a control character in a header, which could add another."""
    head = head_of(status, lines, default_headers)
    if not keep_alive:
        head.append(b"\r\nconnection: close")
    if status in WITHOUT_CONTENT:
        head.append(b"\r\n\r\n")
    else:
        head.append(b"\r\ncontent-length: %d\r\n\r\n" % len(body))
        if not is_head:
            head.append(body)
    return b"".join(head)


def head_of(status: int, lines: Sequence[bytes], default_headers: Iterable[tuple[bytes, bytes]]) -> list[bytes]:
    """The head of an answer, without the end of its last line."""
    fields = b"\r\n".join(lines)
    # The only control characters are the line breaks of the join.
    if len(fields.translate(None, CONTROLS)) != len(fields) - 2 * (len(lines) - 1):
        raise RuntimeError("A header has a control character.")
    head = [STATUS_LINE[status]]
    for name, value in default_headers:
        head += (name, b": ", value, b"\r\n")
    head.append(fields)
    return head


class ResponseBuffer:
    """The transport of one answer: holds the head back until the first part of the body, and writes both at once.

    uvicorn writes head and body separately, and the loop sends each at once: two system calls and two packets
    instead of one. Sending is a quarter of what a small request costs.
    """

    __slots__ = ("_held", "_transport", "is_closing")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._held: bytes | None = None
        self.is_closing = transport.is_closing

    def write(self, data: bytes) -> None:
        if self._held is None:
            self._held = data
        else:
            self._transport.write(self._held + data)
            self._held = b""

    def close(self) -> None:
        if self._held:
            self._transport.write(self._held)
        self._transport.close()


class BoundedCycle(RequestResponseCycle):
    """One request of a `BoundedProtocol`."""

    more_seconds: float = 0.0
    """How much longer than others this answer may take."""
    is_stream: bool = False
    """Whether the answer has begun as a stream."""
    _on_stream: Callable[[], None] | None = None
    """Called when the answer to a read begins as a stream."""
    _interrupt: Callable[[], object] | None = None
    _task: asyncio.Task[None] | None = None
    """The running task of the application, for a read."""

    def interrupt(self) -> None:
        """Interrupts an application that has sent `http.response.long` or `http.response.stream`."""
        interrupt, self._interrupt = self._interrupt, None
        if interrupt is not None:
            interrupt()
            if self.is_stream and self.flow.write_paused and not self.disconnected:
                self.transport.abort()  # what is still to be sent would wait for the client

    def start(
        self,
        app: Any,
        loop: asyncio.AbstractEventLoop,
        tasks: set[asyncio.Task[None]],
        on_stream: Callable[[], None],
    ) -> BoundedCycle:
        """Runs the application in a task, which is in `tasks` until it has ended.

        `on_stream` is called if it answers a read with a stream.
        """
        is_read = self.scope["method"] in READS
        task = loop.create_task(self.run_asgi(functools.partial(self._read, app) if is_read else app))
        if is_read:
            self._task, self._on_stream = task, on_stream
        task.add_done_callback(tasks.discard)
        tasks.add(task)
        return self

    def on_connection_lost(self) -> None:
        """Cancels a read that has no answer yet. A write goes on, but no longer waits on purpose."""
        self.interrupt()
        if self._task is not None and not self.response_complete:
            self.disconnected = True
            self._task.cancel()

    async def _read(self, app: Any, scope: Any, receive: Any, send: Any) -> None:
        try:
            await app(scope, receive, send)
        except asyncio.CancelledError:
            if not self.disconnected:  # it was cancelled at the end of a drain
                raise
        finally:
            self._on_stream = None  # the connection refers to this cycle

    async def send(self, message: Any) -> None:
        if self.is_stream:
            return await self._send_part(message["body"], is_last=not message.get("more_body", False))
        if message["type"] == STREAM_RESPONSE:
            return self._begin_stream(message["status"], message["lines"], message["interrupt"])
        if message["type"] == LONG_RESPONSE:
            self.more_seconds, self._interrupt = message["seconds"], message["interrupt"]
            if self.disconnected:
                self.interrupt()
            return None
        if not self.response_complete and self.transport.is_closing():
            # asyncio notifies the protocol in a later turn of the loop; until then, each write would raise.
            self.disconnected = True
        if message["type"] != COMPLETE_RESPONSE:
            # The answer to HEAD has no body: its head would never be written.
            if message["type"] == "http.response.start" and self.scope["method"] != "HEAD":
                self.transport = cast(asyncio.Transport, ResponseBuffer(self.transport))
            return await super().send(message)
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        if not self.disconnected:
            self._respond(message["status"], message["lines"], message["body"])
        return None

    def _respond(self, status: int, lines: Sequence[bytes], body: bytes) -> None:
        if self.response_started:
            raise RuntimeError("A second answer was sent to one request.")
        answer = whole_answer(
            status,
            lines,
            body,
            default_headers=self.default_headers,
            keep_alive=self.keep_alive,
            is_head=self.scope["method"] == "HEAD",
        )
        self.response_started = True
        self.waiting_for_100_continue = False
        self.transport.write(answer)
        self.response_complete = True
        self.message_event.set()
        if not self.keep_alive:
            self.transport.close()
        self.on_response()

    def _begin_stream(self, status: int, lines: Sequence[bytes], interrupt: Callable[[], object]) -> None:
        on_stream = self._on_stream
        if self.response_started or on_stream is None:
            raise RuntimeError("A second answer was sent to one request, or a stream to one that is no read.")
        head = head_of(status, lines, self.default_headers)
        head.append(b"\r\nconnection: close")
        self.chunked_encoding = self.scope["http_version"] != "1.0"
        if self.chunked_encoding:
            head.append(b"\r\ntransfer-encoding: chunked")
        head.append(b"\r\n\r\n")
        self.is_stream = self.response_started = True
        self.keep_alive = self.waiting_for_100_continue = False
        self._interrupt = interrupt
        if self.disconnected or self.transport.is_closing():
            self.disconnected = True
            self.interrupt()
            return
        self.transport.write(b"".join(head))
        on_stream()

    async def _send_part(self, part: bytes, *, is_last: bool) -> None:
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        if self.disconnected or self.transport.is_closing():
            self.disconnected = True
            return
        if self.chunked_encoding and part:
            part = b"%x\r\n%b\r\n" % (len(part), part)
        if not is_last:
            self.transport.write(part)
            return
        self.transport.write(part + b"0\r\n\r\n" if self.chunked_encoding else part)
        self.response_complete = True
        self.message_event.set()
        self.transport.close()
        self.on_response()
