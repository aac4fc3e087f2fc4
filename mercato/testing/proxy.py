"""A TCP proxy in front of PostgreSQL that cuts or refuses connections at the moment that a test sets."""

from __future__ import annotations

import asyncio
import contextlib
from urllib.parse import parse_qs, urlsplit

_IN_RECOVERY = b"SFATAL\0C57P03\0Mthe database system is in recovery mode\0\0"
"""The fields of an ErrorResponse (severity, SQLSTATE, message) of PostgreSQL's protocol, version 3."""


class TcpProxy:
    """Forwards bytes between a service and PostgreSQL, and cuts the connection at a COMMIT.

    `cut` is "before" (the server never receives the COMMIT) or "after" (it has committed, and its answer is lost); None
    cuts nothing. The next `refusals` connections are refused with the error of a server in recovery; `refused` counts
    them. A service connects to `dsn`, which `open` sets.
    """

    def __init__(self, dsn: str) -> None:
        self._target = urlsplit(dsn)
        self.cut: str | None = None
        self.cuts = 0
        self.refusals = 0
        self.refused = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        port = self._listener.sockets[0].getsockname()[1]
        user = self._target.netloc.rpartition("@")[0]
        self.dsn = f"postgresql://{user}@127.0.0.1:{port}{self._target.path}?sslmode=disable"

    async def close(self) -> None:
        self._listener.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            if self.refused < self.refusals:
                self.refused += 1
                await self._refuse(reader, writer)
                return
            far_reader, far_writer = await self._connect()
            try:
                await self._forward(reader, writer, far_reader, far_writer)
            finally:
                writer.transport.abort()
                far_writer.transport.abort()

    async def _refuse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answers the start of a session with an error; the message begins with its own length."""
        length = int.from_bytes(await reader.readexactly(4), "big")
        await reader.readexactly(length - 4)
        writer.write(b"E" + (len(_IN_RECOVERY) + 4).to_bytes(4, "big") + _IN_RECOVERY)
        await writer.drain()
        writer.close()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        folder = parse_qs(self._target.query).get("host", [""])[0]
        if folder.startswith("/"):
            port = parse_qs(self._target.query).get("port", ["5432"])[0]
            return await asyncio.open_unix_connection(f"{folder}/.s.PGSQL.{port}")
        return await asyncio.open_connection(self._target.hostname, self._target.port)

    async def _forward(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        far_reader: asyncio.StreamReader,
        far_writer: asyncio.StreamWriter,
    ) -> None:
        back = asyncio.create_task(self._pump(far_reader, writer))
        try:
            while data := await reader.read(65_536):
                if not (self.cut and data.endswith(b"COMMIT\x00")):
                    far_writer.write(data)
                    continue
                self.cuts += 1
                if self.cut == "after":
                    back.cancel()
                    await asyncio.gather(back, return_exceptions=True)
                    far_writer.write(data)
                    assert b"COMMIT" in await far_reader.read(1_024)
                return
        finally:
            back.cancel()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            writer.write(data)
        writer.close()
