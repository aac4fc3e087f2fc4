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

The scope announces both under `extensions`; plain ASGI messages work unchanged.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, cast

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

COMPLETE_RESPONSE: Final = "http.response.complete"
LONG_RESPONSE: Final = "http.response.long"
EXTENSIONS: Final[Mapping[str, Mapping[str, Any]]] = {COMPLETE_RESPONSE: {}, LONG_RESPONSE: {}}

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
    fields = b"\r\n".join(lines)
    # The only control characters are the line breaks of the join.
    if len(fields.translate(None, CONTROLS)) != len(fields) - 2 * (len(lines) - 1):
        raise RuntimeError("A header has a control character.")
    head = [STATUS_LINE[status]]
    for name, value in default_headers:
        head += (name, b": ", value, b"\r\n")
    head.append(fields)
    if not keep_alive:
        head.append(b"\r\nconnection: close")
    if status in WITHOUT_CONTENT:
        head.append(b"\r\n\r\n")
    else:
        head.append(b"\r\ncontent-length: %d\r\n\r\n" % len(body))
        if not is_head:
            head.append(body)
    return b"".join(head)


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
    _interrupt: Callable[[], object] | None = None
    _task: asyncio.Task[None] | None = None
    """The running task of the application, for a read."""

    def interrupt(self) -> None:
        """Interrupts an application that has sent `http.response.long`."""
        interrupt, self._interrupt = self._interrupt, None
        if interrupt is not None:
            interrupt()

    def start(self, app: Any, loop: asyncio.AbstractEventLoop, tasks: set[asyncio.Task[None]]) -> BoundedCycle:
        """Runs the application in a task, which is in `tasks` until it has ended."""
        is_read = self.scope["method"] in READS
        task = loop.create_task(self.run_asgi(functools.partial(self._read, app) if is_read else app))
        if is_read:
            self._task = task
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

    async def send(self, message: Any) -> None:
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
