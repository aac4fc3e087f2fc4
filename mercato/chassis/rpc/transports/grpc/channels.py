"""Connections to instances: one each, which many calls share."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import grpc
import grpc.aio

from mercato.chassis.grpc.limits import milliseconds
from mercato.chassis.rpc.discovery import Instance
from mercato.chassis.rpc.transports.direct.client import ClientLimits, NotConnected
from mercato.chassis.rpc.transports.server_names import ServerName

from .wire import ENVELOPE_BYTES

IDLE_SECONDS: Final = 30.0
"""A client closes an unused connection before the server does (`GrpcLimits.idle_seconds`)."""
PING_SECONDS: Final = 10.0
PING_ANSWER_SECONDS: Final = 5.0
"""A connection with calls is probed when it is quiet: calls to a machine that is gone end after these two."""

READY: Final = grpc.ChannelConnectivity.READY
FAILED: Final = (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN)

Metadata = Sequence[tuple[str, str]]


class _Channel:
    """A channel and the calls on it. `is_gone`: it gets no more calls, and is closed when those have ended."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.calls = 0
        self.is_gone = False
        self._methods: dict[str, Any] = {}

    def method(self, path: str) -> Callable[..., Awaitable[bytes]]:
        """A method that takes and gives bytes."""
        if path not in self._methods:
            self._methods[path] = self.channel.unary_unary(path)
        return self._methods[path]


class Channels:
    """The channels of one caller. With `ca` (PEM), they are encrypted, and each server is verified by `server_name`."""

    def __init__(self, limits: ClientLimits, server_name: ServerName, ca: bytes | None) -> None:
        self._limits = limits
        self._server_name = server_name
        self._credentials = None if ca is None else grpc.ssl_channel_credentials(ca)
        self._channels: dict[tuple[str, str], _Channel] = {}
        self._closing: set[asyncio.Task[None]] = set()

    async def call(self, instance: Instance, path: str, message: bytes, seconds: float, metadata: Metadata) -> bytes:
        """Sends a message when there is a connection; gives the answer.

        Raises `NotConnected` if there is none, so that nothing was sent, or `grpc.aio.AioRpcError`.
        """
        key = instance.address, self._server_name(instance)
        held = self._channels.get(key)
        if held is None:
            held = self._channels[key] = _Channel(self._open(*key))
        held.calls += 1
        try:
            await self._connect(held.channel)
            return await held.method(path)(message, timeout=seconds, metadata=metadata)
        except NotConnected:
            # A new channel connects at once; this one would wait before it tried again.
            self._retire(key, held)
            raise
        finally:
            held.calls -= 1
            if held.is_gone and not held.calls:
                self._close(held)

    def keep(self, addresses: frozenset[str]) -> None:
        """Closes the channels to other addresses, when their calls have ended."""
        for key, held in tuple(self._channels.items()):
            if key[0] not in addresses:
                self._retire(key, held)
                if not held.calls:
                    self._close(held)

    async def close(self) -> None:
        """Ends the calls that run."""
        for key, held in tuple(self._channels.items()):
            self._retire(key, held)
            self._close(held)
        if self._closing:
            await asyncio.wait(self._closing)

    async def _connect(self, channel: grpc.aio.Channel) -> None:
        """Raises `NotConnected`. gRPC gives one status for a call that was not sent and one that may have been."""
        state = channel.get_state(try_to_connect=True)
        if state is READY:
            return
        try:
            async with asyncio.timeout(self._limits.connect_seconds):
                while state is not READY:
                    if state in FAILED:
                        raise NotConnected(str(state))
                    await channel.wait_for_state_change(state)
                    state = channel.get_state(try_to_connect=True)
        except TimeoutError as error:
            raise NotConnected("there is no connection in time") from error
        except grpc.aio.UsageError as error:  # another call has found that it cannot connect, and closed it
            raise NotConnected(str(error)) from error

    def _open(self, address: str, name: str) -> grpc.aio.Channel:
        longest = self._limits.batch_bytes + ENVELOPE_BYTES, self._limits.answer_bytes + ENVELOPE_BYTES
        options: list[tuple[str, int | str]] = [
            ("grpc.max_send_message_length", longest[0]),
            ("grpc.max_receive_message_length", longest[1]),
            ("grpc.enable_retries", 0),
            ("grpc.enable_http_proxy", 0),
            ("grpc.enable_channelz", 0),
            ("grpc.per_message_compression", 0),
            ("grpc.service_config_disable_resolution", 1),
            # Else a new channel shares the pause of a failed one.
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.client_idle_timeout_ms", milliseconds(IDLE_SECONDS)),
            ("grpc.keepalive_time_ms", milliseconds(PING_SECONDS)),
            ("grpc.keepalive_timeout_ms", milliseconds(PING_ANSWER_SECONDS)),
            ("grpc.http2.ping_timeout_ms", milliseconds(PING_ANSWER_SECONDS)),  # as in `GrpcLimits.options`
        ]
        if self._credentials is None:
            return grpc.aio.insecure_channel(address, options=options)
        options.append(("grpc.ssl_target_name_override", name))
        return grpc.aio.secure_channel(address, self._credentials, options=options)

    def _retire(self, key: tuple[str, str], held: _Channel) -> None:
        held.is_gone = True
        if self._channels.get(key) is held:
            del self._channels[key]

    def _close(self, held: _Channel) -> None:
        task = asyncio.ensure_future(held.channel.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
