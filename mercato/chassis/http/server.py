"""The server: listens on sockets, sweeps over its connections, drains on stop."""

import asyncio
import logging
import socket
import ssl
import time
from collections.abc import Callable, Iterable, Sequence
from email.utils import formatdate
from typing import Any, Final

import uvicorn

from .connection_table import ConnectionTable, RefusalHeaders
from .limits import HttpLimits, ignore_refusal, no_more_headers
from .listening import LISTEN_BACKLOG
from .protocol import BoundedProtocol
from .shedding import EarlyRefusals

logger = logging.getLogger(__name__)
uvicorn_logger = logging.getLogger("uvicorn.error")

SWEEP_SECONDS: Final = 0.25
DRAIN_POLL_SECONDS: Final = 0.02
# How long a cancelled request may take to unwind after a drain that ran out of time.
UNWIND_SECONDS: Final = 1.0


class HttpServer:
    """Serves one ASGI application on sockets that are already bound.

    uvicorn's own Server is not used: its signal handlers, its ten polls a second and its shutdown (which leaves
    connections open at its timeout) would all have to be replaced; what is left is a call of `create_server`.

    `on_ready` is called once, when every socket accepts connections. `on_refused` is called with the code of each
    refusal, and with `response_timeout` for each answer that was abandoned. The sockets are closed at the end; other
    processes that inherited them go on accepting. `early` refuses requests before the application is called.
    `headers` are on every answer, also on those of the server itself. `refusal_headers` makes further ones for its
    refusals from those headers of the request that were read; a connection that is rejected at once has none.
    """

    def __init__(
        self,
        app: Callable[..., Any],
        *,
        sockets: Sequence[socket.socket],
        limits: HttpLimits | None = None,
        on_ready: Callable[[], None] | None = None,
        on_refused: Callable[[str], None] = ignore_refusal,
        early: EarlyRefusals | None = None,
        date_header: bool = True,
        headers: Iterable[tuple[bytes, bytes]] = (),
        refusal_headers: RefusalHeaders | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._sockets = tuple(sockets)
        self._tls = tls
        self._limits = limits or HttpLimits()
        self._table = ConnectionTable(self._limits, on_refused, early, refusal_headers or no_more_headers)
        self._on_ready = on_ready
        self._date_header = date_header
        self._headers = list(headers)
        self._table.default_headers = self._headers
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
        """How many connections are open now, without the rejected ones."""
        return len(self._table.connections)

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
            return BoundedProtocol(self._config, self._table, {}, loop)

        for sock in self._sockets:
            # One by one: when a later socket fails, the caller closes those that already accept.
            listeners.append(  # noqa: PERF401
                await loop.create_server(connection, sock=sock, backlog=LISTEN_BACKLOG, ssl=self._tls)
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
            # After a pause of the whole process, the bytes of clients may wait in the kernel: their deadlines must not
            # have passed meanwhile. So the clock of the sweeps advances by two intervals at most.
            elapsed, swept_at = loop.time() - swept_at, loop.time()
            now += min(elapsed, 2 * SWEEP_SECONDS)
            self._refresh_date()
            self._table.note_idle()
            for connection in (*self._table.admitted, *self._table.rejected):
                try:
                    connection.sweep(now)
                except Exception:
                    # A bug in one connection's state must not end the deadlines of all other connections.
                    logger.exception("the sweep failed for a connection, which is aborted")
                    connection.transport.abort()

    def _refresh_date(self) -> None:
        # RFC 9110 6.6.1: a server with a clock sends a date. Formatting it a few times a second costs nothing.
        if self._date_header:
            date = formatdate(time.time(), usegmt=True).encode()
            self._table.default_headers = [(b"date", date), *self._headers]

    async def _drain(self) -> None:
        self._table.draining = True
        loop = asyncio.get_running_loop()
        drained_at = loop.time() + self._limits.drain_seconds
        # Polled, so that requests pay nothing for it before the stop.
        while self._shut_down_connections() and loop.time() < drained_at:  # noqa: ASYNC110
            await asyncio.sleep(DRAIN_POLL_SECONDS)

    def _shut_down_connections(self) -> bool:
        """Asks every connection to end; True while one of them, or a request without one, is still open.

        Each poll asks again: a request that was half received at the last poll may be running now.
        """
        for connection in tuple(self._table.admitted):
            connection.shutdown()
        return bool(self._table.tasks) or any(not connection.is_lingering for connection in self._table.admitted)

    async def _force(self) -> None:
        for connection in (*self._table.admitted, *self._table.rejected):
            connection.transport.abort()
        tasks = tuple(self._table.tasks)
        if tasks:
            logger.warning("cancelling %d requests that did not finish within the drain", len(tasks))
            uvicorn_logger.addFilter(_is_no_cancellation)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=UNWIND_SECONDS)
            uvicorn_logger.removeFilter(_is_no_cancellation)
        # Transports report their end in the next turns of the loop.
        for _ in range(2):
            await asyncio.sleep(0)


def _is_no_cancellation(record: logging.LogRecord) -> bool:
    """False for the traceback that uvicorn logs for a cancelled request: the warning above has reported it."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))
