"""One request and its answer: uvicorn's cycle, which also takes a whole answer in one message.

An application that knows its whole answer sends it as one message of the ASGI extension `http.response.complete`:

    {"type": "http.response.complete", "status": 201, "lines": [b"etag: \"1\"", ...], "body": b"..."}

`lines` are header fields as they stand on the wire, `name: value`, names in lower case, at least one. Content-Length,
Date and Connection are added here and may not be among them. It costs one check of the head and one write, where the
two messages of plain ASGI cost two checks of each header and two passes through the flow control.

The scope announces it under `extensions`; plain ASGI messages work as ever.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

COMPLETE_RESPONSE: Final = "http.response.complete"
EXTENSIONS: Final[Mapping[str, Mapping[str, Any]]] = {COMPLETE_RESPONSE: {}}

WITHOUT_CONTENT: Final = frozenset({204, 304})

# RFC 9110 5.5: no control characters in a header, except tabs.
CONTROLS: Final = bytes(set(range(32)) - {9}) + b"\x7f"


class ResponseBuffer:
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

    async def send(self, message: Any) -> None:
        if not self.response_complete and self.transport.is_closing():
            # The protocol hears of it in a later turn of the loop; until then, each write would raise.
            self.disconnected = True
        if message["type"] != COMPLETE_RESPONSE:
            # The answer to HEAD has a head only, which would wait for ever.
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
        fields = b"\r\n".join(lines)
        # Only the line breaks of the join may be taken out of it: a header cannot smuggle another one in.
        if len(fields.translate(None, CONTROLS)) != len(fields) - 2 * (len(lines) - 1):
            raise RuntimeError("A header has a control character.")
        self.response_started = True
        self.waiting_for_100_continue = False
        head = [STATUS_LINE[status]]
        for name, value in self.default_headers:
            head += (name, b": ", value, b"\r\n")
        head.append(fields)
        if not self.keep_alive:
            head.append(b"\r\nconnection: close")
        if status in WITHOUT_CONTENT:
            head.append(b"\r\n\r\n")
        else:
            head.append(b"\r\ncontent-length: %d\r\n\r\n" % len(body))
            if self.scope["method"] != "HEAD":
                head.append(body)
        self.transport.write(b"".join(head))
        self.response_complete = True
        self.message_event.set()
        if not self.keep_alive:
            self.transport.close()
        self.on_response()
