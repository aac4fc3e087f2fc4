"""Links between processes: TCP proxies that delay, cut, or swallow what passes, each by itself, while it passes.

A link is what a cable is: neither end knows of it. `Links` runs them on a thread of its own, so that they go on while a
test waits. What a link does is changed at once, also for the connections that are open.
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
    """The way from callers to one listener: `there` are the bytes of callers, `back` the answers.

    `target` is a host and a port, or the path of a socket. `address` is what callers connect to.
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

    # ------------------------------------------------------------------------- what it does, on the thread of the links

    def heal(self) -> None:
        """Carries everything at once. What a silent link has kept arrives now, as TCP would send it again."""
        self._is_cut, self._delay_s = False, 0.0
        for flow in self._flows.values():
            flow.set()

    def slow(self, seconds: float) -> None:
        """Each piece arrives so much later."""
        self._delay_s = seconds

    def cut(self) -> None:
        """Resets all connections, and every new one."""
        self._is_cut = True
        for ends in self._open:
            _reset(ends.near)
            _reset(ends.far)

    def silence(self, *directions: Direction) -> None:
        """Nothing arrives, and neither end hears of it: new connections open, and stay silent."""
        for direction in directions or DIRECTIONS:
            self._flows[direction].clear()

    def halve(self) -> None:
        """The listener loses all connections; the callers keep their half, and hear nothing. New ones are whole."""
        for ends in self._open:
            ends.is_halved = True
            _reset(ends.far)

    # --------------------------------------------------------------------------------------------------------- carrying

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
                pass  # the caller's half stays open until the caller ends it
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

        async def made() -> Link:
            link = Link(name, target)
            await link.open()
            return link

        self.made[name] = self._on_the_loop(made())
        return self.made[name]

    def do(self, what: str, links: Iterable[Link], *how: Any) -> None:
        """Calls a method of each: `do("slow", [link], 0.5)`."""

        async def done() -> None:
            for link in links:
                getattr(link, what)(*how)

        self._on_the_loop(done())

    def heal(self) -> None:
        self.do("heal", self.made.values())

    def _on_the_loop(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        async def closed() -> None:
            for link in self.made.values():
                await link.close()

        self._on_the_loop(closed())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _reset(writer: asyncio.StreamWriter) -> None:
    if (end := writer.get_extra_info("socket")) is not None and end.family != socket.AF_UNIX:
        with contextlib.suppress(OSError):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORTED_AT_ONCE)
    writer.transport.abort()
