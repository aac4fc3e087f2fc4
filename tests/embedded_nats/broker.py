"""A NATS server for tests, which can be stopped, killed and started again, and one that only a test controls."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import ssl
import tempfile
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path

from mercato.embedded_nats import EmbeddedNats, NatsUser

PASSWORD = "a-password-of-tests"
ALL = (">",)


def user(name: str, publish: Sequence[str] = ALL, subscribe: Sequence[str] = ALL) -> NatsUser:
    return NatsUser(name, PASSWORD, tuple(publish), tuple(subscribe))


class Broker:
    """A server with these users, on the same port after each start; with JetStream where `has_streams` is set."""

    def __init__(self, folder: Path, users: Sequence[NatsUser], *, has_streams: bool = False) -> None:
        self.has_streams = has_streams
        self.store = folder / "streams"
        self._folder = folder
        self._users = users
        self._server: EmbeddedNats | None = None
        self._port: int | None = None

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self._port}"

    async def start(self) -> None:
        streams = self.store if self.has_streams else None
        self._server = await EmbeddedNats.start(self._folder, users=self._users, port=self._port, streams=streams)
        self._port = self._server.port

    def signal(self, number: signal.Signals) -> None:
        assert self._server is not None
        os.kill(self._server.pid, number)

    async def kill(self) -> None:
        """It ends without a word, and can be started again."""
        assert self._server is not None
        self.signal(signal.SIGKILL)
        await self._server.died()
        await self._server.stop()
        self._server = None

    async def end(self) -> None:
        if self._server is not None:
            with contextlib.suppress(ProcessLookupError):
                self.signal(signal.SIGCONT)
            await self._server.stop()


@contextlib.asynccontextmanager
async def started(*users: NatsUser, has_streams: bool = False) -> AsyncGenerator[Broker]:
    with tempfile.TemporaryDirectory(prefix="mercato-test-") as folder:
        broker = Broker(Path(folder), users, has_streams=has_streams)
        await broker.start()
        try:
            yield broker
        finally:
            await broker.end()


INFO = 'INFO {"server_id":"T","version":"2.15.0","headers":true,"max_payload":1048576,"tls_required":%s}\r\n'


class ScriptedBroker:
    """Speaks as much of the protocol as one client needs, and does something more on a line that begins with a word.

    `lines` are the commands that it got, in order. With `tls` it requires TLS.
    """

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls
        self.pause_seconds = 0.0
        """After each line: what is sent then arrives by itself."""
        self.lines: list[str] = []
        self.on: dict[str, Callable[[str], bytes]] = {}
        self._writers: list[asyncio.StreamWriter] = []

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"nats://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def close(self) -> None:
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        writer.write((INFO % ("true" if self._tls else "false")).encode())
        with contextlib.suppress(OSError):
            if self._tls:
                await writer.start_tls(self._tls)
            while line := (await reader.readline()).decode().strip():
                self.lines.append(line)
                word = line.split()[0]
                if word == "PING":
                    writer.write(b"PONG\r\n")
                if word in self.on:
                    writer.write(self.on[word](line))
                await asyncio.sleep(self.pause_seconds)
        writer.close()
