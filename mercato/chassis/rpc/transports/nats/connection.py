"""One connection of a process to NATS, which reconnects by itself."""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Final, cast
from urllib.parse import urlsplit

import nats.errors
import structlog
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from mercato.chassis.contract import Unavailable

from .nats_py import NatsClient, within
from .permissions import inbox_prefix as inbox_prefix_of
from .wire import frame

OPEN_SECONDS: Final = 10.0
CONNECT_SECONDS: Final = 2.0
"""The deadline of one attempt, subscriptions included."""
FIRST_RETRY_SECONDS: Final = 0.1
LAST_RETRY_SECONDS: Final = 2.0
FLUSH_SECONDS: Final = 5.0
CLOSE_SECONDS: Final = 1.0
PING_SECONDS: Final = 5.0
SILENT_PINGS: Final = 1
"""A connection is lost when the next PING is due while so many have no PONG: after two times `PING_SECONDS`."""
PENDING_BYTES_MAX: Final = 64 * 1_048_576
"""The most bytes that wait for the socket: more than the largest answer."""
REFUSED: Final = re.compile(r"permissions violation for (publish|subscription) to \"([^\"]*)\"", re.IGNORECASE)

log = structlog.stdlib.get_logger("mercato.nats")

Handle = Callable[[Msg], Awaitable[None]]


class NotConnected(Exception):
    """There is no connection, or too many bytes wait for it already: nothing was sent."""


class Subscribed:
    """A subscription that each new connection makes again, until it is unsubscribed; an inbox with a new `subject`."""

    def __init__(self, subject: str, handle: Handle, queue: str = "", *, is_inbox: bool = False) -> None:
        self.subject = subject
        self._handle = handle
        self._queue = queue
        self._is_inbox = is_inbox
        self._on: tuple[NatsClient, Subscription] | None = None

    async def subscribe_on(self, client: NatsClient) -> None:
        if self._is_inbox:
            self.subject = client.new_inbox()
        pattern = f"{self.subject}.*" if self._is_inbox else self.subject

        async def handle(message: Msg) -> None:
            # The server may send before the attempt to connect has ended, when an answer could not be published yet.
            await client.in_use.wait()
            await self._handle(message)

        self._on = (client, await cast(Any, client).subscribe(pattern, queue=self._queue, cb=handle))

    def on(self, client: NatsClient) -> Subscription | None:
        """The subscription on this connection, if there is one."""
        return self._on[1] if self._on is not None and self._on[0] is client else None


class NatsConnection:
    """`open` before use, and `close` at the end. In between it reconnects by itself, for ever.

    Each connection starts anew: it makes all subscriptions again, and does not publish earlier messages again.
    `on_lost` is called at once whenever the connection is lost. It belongs to one event loop.

    `url` is `nats://host:port`, or `tls://host:port` with the certificates of `tls_ca` (None: those of the system).
    The tools of NATS show `name`. The user may subscribe below `inbox_prefix`; None: that of `permissions.py`.
    """

    def __init__(
        self,
        url: str,
        user: str,
        password: str,
        name: str,
        inbox_prefix: str | None = None,
        *,
        tls_ca: Path | None = None,
        ping_seconds: float = PING_SECONDS,
    ) -> None:
        self.on_lost: list[Callable[[], None]] = []
        self.address = urlsplit(url).netloc.rpartition("@")[2]
        self._url = url
        self._user = user
        self._password = password
        self._name = name
        self._inbox_prefix = inbox_prefix or inbox_prefix_of(user)
        self._tls = ssl.create_default_context(cafile=tls_ca) if urlsplit(url).scheme == "tls" else None
        self._ping_seconds = ping_seconds
        self._client: NatsClient | None = None
        self._subscribed: list[Subscribed] = []
        # An attempt to connect makes the subscriptions that exist when it begins: none may be added or removed then.
        self._changing = asyncio.Lock()
        self._keeping: asyncio.Task[None] | None = None
        self._reason = ""

    @property
    def is_connected(self) -> bool:
        return self._connected() is not None

    @property
    def max_payload(self) -> int:
        """The largest message that the server accepts, in bytes, headers included. Raises `NotConnected`."""
        if (client := self._connected()) is None:
            raise NotConnected
        return client.max_payload

    def _connected(self) -> NatsClient | None:
        return self._client if self._client is not None and self._client.is_connected else None

    # ------------------------------------------------------------------------------------------------ open and close

    async def open(self, seconds: float = OPEN_SECONDS) -> None:
        """Raises `Unavailable` when there is no connection after so many seconds."""
        assert self._keeping is None, "a connection is opened once"
        clock = asyncio.get_running_loop().time
        end = clock() + seconds
        for delay in _delays():
            if await self._connect(min(end - clock(), CONNECT_SECONDS)):
                break
            if clock() + delay >= end:
                raise self._unavailable()
            await asyncio.sleep(delay)
        self._keeping = asyncio.create_task(self._keep())

    async def close(self) -> None:
        """Sends what was published, and ends the connection; returns within two seconds. It may be called twice."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.wait({self._keeping})
        client, self._client = self._client, None
        if client is not None:
            await client.end(CLOSE_SECONDS)
            self._lose()

    def _unavailable(self) -> Unavailable:
        refused = f" (it refuses the user {self._user})" if self._reason == "unauthorized" else ""
        return Unavailable(service=f"NATS at {self.address}{refused}")

    # ------------------------------------------------------------------------------------------------------- messages

    async def subscribe(self, subject: str, handle: Handle, queue: str = "") -> Subscribed:
        """Calls `handle` for one message after the other, on this connection and on all later ones."""
        return await self._add(Subscribed(subject, handle, queue))

    async def subscribe_inbox(self, handle: Handle) -> Subscribed:
        """An inbox: it receives messages to its `subject`, a dot and one word."""
        return await self._add(Subscribed("", handle, is_inbox=True))

    async def _add(self, subscribed: Subscribed) -> Subscribed:
        async with self._changing:
            self._subscribed.append(subscribed)
            if (client := self._connected()) is not None:
                await subscribed.subscribe_on(client)
        return subscribed

    async def unsubscribe(self, *subscribed: Subscribed, begun: Callable[[], None] = lambda: None) -> None:
        """Returns when all messages that the server had sent are handled; it sends no more.

        `begun` is called when the request to the server is written. The server processes later messages after it.
        """
        async with self._changing:
            self._subscribed = [kept for kept in self._subscribed if kept not in subscribed]
            if (client := self._connected()) is None:
                begun()
                return
            made = [on for one in subscribed if (on := one.on(client)) is not None]
            for subscription in made:
                await client.stop_receiving(subscription)
            begun()
            try:
                await within(FLUSH_SECONDS, client, _finish(client, made))
            except nats.errors.Error as error:  # the connection is lost, and with it the subscriptions
                log.info("nats_not_unsubscribed", address=self.address, reason=type(error).__name__)

    async def publish(self, subject: str, body: bytes, *, reply: str = "", block: bytes = b"") -> None:
        """Writes a message to the connection; `block` has its headers. Raises `NotConnected` as `send` does."""
        await self.send(frame(subject, body, reply, block))

    async def send(self, frames: bytes) -> None:
        """Writes messages to the connection, in order. Raises `NotConnected` without a connection: nothing is sent."""
        client = self._connected()
        if client is None or client.pending_data_size > PENDING_BYTES_MAX:
            raise NotConnected
        await client.send(frames)

    async def flush(self) -> None:
        """Returns when the server has processed all messages so far. Raises `Unavailable` if it does not."""
        if (client := self._connected()) is not None:
            try:
                if await within(FLUSH_SECONDS, client, client.synchronize()) and client.is_connected:
                    return
            except nats.errors.Error as error:
                log.warning("nats_not_flushed", address=self.address, reason=type(error).__name__)
        raise self._unavailable()

    # ---------------------------------------------------------------------------------------------------- connections

    async def _keep(self) -> None:
        """Reconnects whenever the connection is lost, until it is cancelled."""
        while (client := self._client) is not None:
            await asyncio.wait({client.ended})
            log.warning("nats_connection_lost", address=self.address)
            self._lose()
            await client.end(0.0)
            for delay in _delays():
                await asyncio.sleep(delay)
                if await self._connect(CONNECT_SECONDS):
                    log.info("nats_connection_is_back", address=self.address)
                    break

    def _lose(self) -> None:
        self._client = None
        for lost in self.on_lost:
            lost()

    async def _connect(self, seconds: float) -> bool:
        """One attempt: a new client, with all subscriptions."""
        client, is_ready = NatsClient(needs_tls=self._tls is not None), False
        async with self._changing:
            try:
                is_ready = await within(seconds, client, self._prepare(client)) and client.is_connected
                self._note("" if is_ready else "timeout")
            except Exception as error:  # an edge; no traceback: nats-py raises any error, at each attempt
                self._note("unauthorized" if "authorization" in str(error).lower() else type(error).__name__)
            finally:
                if is_ready:
                    self._client = client
                    client.in_use.set()
                else:
                    await client.end(0.0)
        return is_ready

    async def _prepare(self, client: NatsClient) -> None:
        await client.connect(
            self._url,
            user=self._user,
            password=self._password,
            name=self._name,
            inbox_prefix=self._inbox_prefix,
            tls=self._tls,
            error_cb=self._report,
            connect_timeout=CONNECT_SECONDS,
            ping_interval=self._ping_seconds,
            max_outstanding_pings=SILENT_PINGS,
            # Otherwise `publish` would wait for the socket, and swallow its caller's cancellation; `send` bounds it.
            pending_size=0,
        )
        for subscribed in self._subscribed:
            await subscribed.subscribe_on(client)
        await client.synchronize()

    def _note(self, reason: str) -> None:
        """Logs why there is no connection: once, not at each attempt."""
        if reason and reason != self._reason:
            log.warning("nats_not_connected", address=self.address, user=self._user, reason=reason)
        self._reason = reason

    async def _report(self, error: Exception) -> None:
        """Called by nats-py with an error of the server or of a handler. Their texts are not logged."""
        if refused := REFUSED.search(str(error)):
            # nats-py gives the error in lower case.
            log.warning("nats_refused", user=self._user, action=refused[1], subject=refused[2])
        elif self.is_connected:
            log.warning("nats_error", address=self.address, reason=type(error).__name__)


async def _finish(client: NatsClient, made: list[Subscription]) -> None:
    await client.synchronize()
    for subscription in made:
        await client.handled(subscription)
        await subscription.unsubscribe()


def _delays() -> Iterator[float]:
    """How long to wait after each attempt that failed."""
    delay = FIRST_RETRY_SECONDS
    while True:
        yield delay
        delay = min(delay * 2, LAST_RETRY_SECONDS)
