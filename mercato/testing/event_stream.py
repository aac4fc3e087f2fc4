"""A client for streams of events (Server-Sent Events), over a socket of its own that it reads only when it is asked."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec

from .responses import Response
from .waiting import BOUND_SECONDS

MIB: Final = 1_048_576


class Message(msgspec.Struct, frozen=True):
    """One block of a stream. A block without data is a comment, or a position alone."""

    id: int | None = None
    event: str = ""
    data: Any = None
    comment: str = ""
    retry_ms: int | None = None

    @classmethod
    def read(cls, block: str) -> Message:
        """Reads the lines of a block (HTML Standard 9.2.6). Raises `ValueError` for a line of another form."""
        found: dict[str, str] = {}
        for line in block.split("\n"):
            name, colon, value = line.partition(":")
            if not colon or name in found or name not in ("", "id", "event", "data", "retry"):
                raise ValueError(f"this is no line of a stream: {line!r}")
            found[name] = value.removeprefix(" ")
        return cls(
            int(found["id"]) if "id" in found else None,
            found.get("event", ""),
            json.loads(found["data"]) if "data" in found else None,
            found.get("", ""),
            int(found["retry"]) if "retry" in found else None,
        )


class EventStream:
    """An open stream, or the refusal of one."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, head: Response) -> None:
        self.head = head
        """Status and headers; the body where it is a refusal."""
        self.position: int | None = None
        """The last id: what a client sends as Last-Event-ID when it comes back."""
        self.seen: list[Message] = []
        """The messages with data so far."""
        self.is_cut = False
        """Whether the stream has ended without the last chunk."""
        self._reader = reader
        self._writer = writer
        self._text = b""

    async def next(self) -> Message | None:
        """The next block; None at the end. Raises `TimeoutError`."""
        async with asyncio.timeout(BOUND_SECONDS):
            while b"\n\n" not in self._text:
                part = await self._chunk()
                if not part:
                    return None
                self._text += part
        block, _, self._text = self._text.partition(b"\n\n")
        message = Message.read(block.decode())
        if message.id is not None:
            self.position = message.id
        if message.data is not None:
            self.seen.append(message)
        return message

    async def _chunk(self) -> bytes:
        try:
            size = int(await self._reader.readuntil(b"\r\n"), 16)
            chunk = await self._reader.readexactly(size + 2)
        except (asyncio.IncompleteReadError, ConnectionError):
            self.is_cut = True
            return b""
        return chunk[:-2]

    async def until(self, is_wanted: Callable[[Message], bool]) -> Message:
        """Reads up to a message. Raises `EOFError` at the end of the stream, `TimeoutError` where it does not come.

        Heartbeats keep a stream alive that never has it.
        """
        try:
            async with asyncio.timeout(BOUND_SECONDS):
                while (message := await self.next()) is not None:
                    if is_wanted(message):
                        return message
        except TimeoutError as error:
            raise TimeoutError(f"the stream does not have it, after {self._events()}") from error
        raise EOFError(f"the stream has ended, after {self._events()}")

    def _events(self) -> list[tuple[str, int | None]]:
        return [(message.event, message.id) for message in self.seen]

    async def event(self, name: str) -> Message:
        """Reads up to an event of a type."""
        return await self.until(lambda message: message.event == name)

    async def to_the_end(self) -> None:
        """Reads the rest."""
        while await self.next() is not None:
            pass

    def cut(self) -> None:
        """Closes the connection at once."""
        self._writer.transport.abort()


@asynccontextmanager
async def event_stream(
    url: str,
    path: str,
    *,
    token: str | None = None,
    after: int | None = None,
    headers: Mapping[str, str] | None = None,
    receive_bytes: int = 0,
    method: str = "GET",
) -> AsyncGenerator[EventStream]:
    """Opens a stream. `after`: sent as Last-Event-ID; `receive_bytes`: the buffer of the socket, where it matters."""
    address = urlsplit(url)
    reader, writer = await _connect(address.hostname or "", address.port or 80, receive_bytes)
    try:
        sent = {"Host": address.netloc, "Accept": "text/event-stream", **(headers or {})}
        if token is not None:
            sent["Authorization"] = f"Bearer {token}"
        if after is not None:
            sent["Last-Event-ID"] = str(after)
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in sent.items()), "", ""]
        writer.write("\r\n".join(lines).encode())
        async with asyncio.timeout(BOUND_SECONDS):
            head = await reader.readuntil(b"\r\n\r\n")
            status, *fields = head.decode().strip().split("\r\n")
            known = {name.lower(): value for name, _, value in (field.partition(": ") for field in fields)}
            length = 0 if method == "HEAD" else int(known.get("content-length", "0"))
            body = await reader.readexactly(length)
        yield EventStream(reader, writer, Response(int(status.split(" ")[1]), known, body))
    finally:
        writer.transport.abort()


async def _connect(host: str, port: int, receive_bytes: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    connection = socket.socket()
    connection.setblocking(False)
    if receive_bytes:  # before the connection is made: it bounds what the kernel takes for a client that does not read
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    await asyncio.get_running_loop().sock_connect(connection, (host, port))
    return await asyncio.open_connection(sock=connection, limit=receive_bytes or MIB)
