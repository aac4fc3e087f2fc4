"""The client of nats-py for one connection, with functions that its public interface lacks.

Only this module depends on the internals of nats-py 2.16:

- It writes a PING at once, and everything else from a task: the PING of `flush` overtakes what was sent before it, so
  that a `flush` proves nothing. The second PING cannot: the task has run before the first PONG arrives.
- `Subscription.drain` relies on `flush`, and drops what arrives between the overtaking PING and the UNSUB.
- `publish` spends most of its time on headers: `send` takes frames that `wire.py` has encoded.
- It swallows cancellations in places, and waits without a bound for a server that does not read. Its coroutines
  therefore run in tasks that `within` abandons, and `_abort` ends what they wait for.
- It connects without TLS to a server that does not offer it, whatever the scheme of the URL.
- A connection ends in several ways (EOF, an error, a missing PONG, `-ERR`, a bug while reading); some of them call no
  callback.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Final, cast

import nats.errors
from nats.aio.client import Client
from nats.aio.subscription import Subscription

ABORT_SECONDS: Final = 0.2
"""How long tasks may take to end after the socket is closed."""


class NatsClient(Client):
    """One connection, which never reconnects: `NatsConnection` makes a new one. Made inside an event loop."""

    def __init__(self, *, needs_tls: bool) -> None:
        super().__init__()
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done as soon as the connection begins to end, in any way."""
        self.in_use = asyncio.Event()
        """Set when the attempt to connect has succeeded. No message is handled before."""
        self._needs_tls = needs_tls

    async def connect(self, *args: Any, **options: Any) -> None:
        """As in nats-py, without reconnection; raises if nats-py returns without a connection."""
        # 1 and 0: two attempts without a pause between them, for there is no value for one attempt.
        once = {"allow_reconnect": False, "max_reconnect_attempts": 1, "reconnect_time_wait": 0}
        await cast(Any, super()).connect(*args, **options, **once)
        if not self.is_connected:
            raise nats.errors.ConnectionClosedError
        cast("asyncio.Task[None]", self._reading_task).add_done_callback(lambda _: self._note_end())

    async def send(self, frames: bytes) -> None:
        """Gives encoded messages to the task that writes. Does nothing on a lost connection."""
        await self._send_command(frames)
        assert self._flush_queue is not None, "it is connected"
        if self._flush_queue.empty():
            await self._flush_pending()

    async def synchronize(self) -> None:
        """Returns when the server has processed all sent messages, and all that it had sent before are read."""
        await self.flush()
        await self.flush()

    async def stop_receiving(self, subscription: Subscription) -> None:
        """The server sends no more; messages that it has already sent are still handled."""
        await self._send_unsubscribe(cast(Any, subscription)._id)

    async def handled(self, subscription: Subscription) -> None:
        """Returns when all messages that were read are handled."""
        await cast(Any, subscription)._pending_queue.join()

    async def end(self, seconds: float) -> None:
        """Sends the waiting messages, for at most so many seconds, and ends the connection with all its tasks."""
        if not seconds:
            self._abort()
        closing = asyncio.create_task(self.close())
        closing.add_done_callback(_retrieve)
        try:
            await asyncio.wait({closing}, timeout=seconds or ABORT_SECONDS)
            self._abort()
            await asyncio.wait({closing}, timeout=ABORT_SECONDS)
        finally:
            closing.cancel()
            for subscription in list(cast("dict[int, Any]", self._subs).values()):
                subscription._stop_processing()

    def _abort(self) -> None:
        """Drops messages that were not sent, and fails whatever waits for the server."""
        writer = getattr(cast(Any, self._transport), "_io_writer", None)
        if writer is not None:
            writer.transport.abort()

    def _note_end(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)

    async def _close(self, status: int, do_cbs: bool = True) -> None:
        self._note_end()
        await super()._close(status, do_cbs)

    def _connect_command(self) -> bytes:
        """The password is sent without TLS only if the URL says so."""
        if self._needs_tls and not self._server_info.get("tls_required"):
            raise nats.errors.SecureConnWantedError
        return super()._connect_command()


async def within(seconds: float, client: NatsClient, work: Coroutine[Any, Any, None]) -> bool:
    """True when `work` has ended in time and before the connection. Raises what it raises."""
    task = asyncio.create_task(work)
    task.add_done_callback(_retrieve)
    try:
        await asyncio.wait({task, client.ended}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
        return task.done()
    finally:
        task.cancel()


def _retrieve(task: asyncio.Task[None]) -> None:
    """Retrieves the error of an abandoned task, so that asyncio does not log it."""
    if not task.cancelled():
        task.exception()
