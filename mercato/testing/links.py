"""Links between processes: TCP proxies that delay, cut or hold back their traffic, each for itself.

The processes at both ends do not know of a link. `Links` runs them on a thread of its own, so that they continue while
a test waits. A change of a link also applies to its open connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Coroutine, Iterable
from typing import Any, Final, Literal, Self, TypeVar

T = TypeVar("T")

Direction = Literal["there", "back"]
DIRECTIONS: Final[tuple[Direction, Direction]] = ("there", "back")
CHUNK_BYTES: Final = 65_536
ABORTED_AT_ONCE: Final = struct.pack("ii", 1, 0)
"""SO_LINGER: the connection ends with RST, and not with FIN."""


class _Ends:
    """The two halves of one connection."""

    def __init__(self, near: asyncio.StreamWriter, far: asyncio.StreamWriter) -> None:
        self.near = near
        self.far = far
        self.is_halved = False


class Link:
    """A proxy from callers to one listener: `there` are the bytes of callers, `back` the answers.

    `target` is a host and a port, or the path of a socket. Callers connect to `address`.
    """

    def __init__(self, name: str, target: tuple[str, int] | str) -> None:
        self.name = name
        self.address = ""
        self.carried = 0
        self._target = target
        self._flows: dict[Direction, asyncio.Event] = {direction: asyncio.Event() for direction in DIRECTIONS}
        self._delay_s = 0.0
        self._is_cut = False
        self._open: list[_Ends] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self.heal()

    # ---------------------------------------------------------------------------- faults, on the thread of the links

    def heal(self) -> None:
        """Forwards everything at once. The bytes that a silent link has held back arrive now, as TCP resends them."""
        self._is_cut, self._delay_s = False, 0.0
        for flow in self._flows.values():
            flow.set()

    def slow(self, seconds: float) -> None:
        """Delays each chunk by so many seconds."""
        self._delay_s = seconds

    def cut(self) -> None:
        """Resets all connections, and every new one."""
        self._is_cut = True
        for ends in self._open:
            _reset(ends.near)
            _reset(ends.far)

    def silence(self, *directions: Direction) -> None:
        """Holds all bytes back, and reports no error to either end: new connections open, and stay silent."""
        for direction in directions or DIRECTIONS:
            self._flows[direction].clear()

    def halve(self) -> None:
        """Resets the listener's half of all connections, and keeps the callers' half open. New ones are whole."""
        for ends in self._open:
            ends.is_halved = True
            _reset(ends.far)

    # ------------------------------------------------------------------------------------------------------- forwarding

    async def open(self) -> None:
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        host, port = self._listener.sockets[0].getsockname()[:2]
        self.address = f"{host}:{port}"

    async def close(self) -> None:
        self._listener.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)
        try:
            await self._carry(reader, writer)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._flows["there"].wait()
        if self._is_cut:
            _reset(writer)
            return
        far_reader, far_writer = await self._connected()
        ends = _Ends(writer, far_writer)
        self._open.append(ends)
        try:
            await asyncio.gather(self._pump(reader, ends, "there"), self._pump(far_reader, ends, "back"))
            while ends.is_halved and await reader.read(CHUNK_BYTES):
                pass  # the caller's half stays open until the caller closes it
        finally:
            far_writer.transport.abort()
            self._open.remove(ends)

    async def _connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if isinstance(self._target, str):
            return await asyncio.open_unix_connection(self._target)
        return await asyncio.open_connection(*self._target)

    async def _pump(self, reader: asyncio.StreamReader, ends: _Ends, direction: Direction) -> None:
        writer, flows = (ends.far if direction == "there" else ends.near), self._flows[direction]
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(CHUNK_BYTES):
                if self._delay_s:
                    await asyncio.sleep(self._delay_s)
                await flows.wait()
                if ends.is_halved:
                    return
                self.carried += len(data)
                writer.write(data)
                await writer.drain()
            await flows.wait()
            if not ends.is_halved and not writer.is_closing():
                writer.write_eof()


class Links:
    """All links of a shop, on a thread of their own. Use it as a context manager."""

    def __init__(self) -> None:
        self.made: dict[str, Link] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def make(self, name: str, target: tuple[str, int] | str) -> Link:
        """A new link, which is open."""
        link = self.made[name] = Link(name, target)
        self._on_the_loop(link.open())
        return link

    def do(self, what: str, links: Iterable[Link], *how: Any) -> None:
        """Calls a method of each on their thread: `do("slow", [link], 0.5)`."""
        self._on_the_loop(_do(what, links, *how))

    def heal(self) -> None:
        self.do("heal", self.made.values())

    def _on_the_loop(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for link in self.made.values():
            self._on_the_loop(link.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _do(what: str, links: Iterable[Link], *how: Any) -> None:
    for link in links:
        getattr(link, what)(*how)


def _reset(writer: asyncio.StreamWriter) -> None:
    if (end := writer.get_extra_info("socket")) is not None and end.family != socket.AF_UNIX:
        with contextlib.suppress(OSError):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORTED_AT_ONCE)
    writer.transport.abort()
