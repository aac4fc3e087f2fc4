"""Connections to instances: one each, with a stream for each service."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, cast

import grpc
import grpc.aio

from mercato.chassis.grpc.limits import milliseconds
from mercato.chassis.rpc.discovery import Instance
from mercato.chassis.rpc.transports.direct.client import ClientLimits, NotConnected
from mercato.chassis.rpc.transports.direct.wire import NOT_STARTED
from mercato.chassis.rpc.transports.server_names import ServerName

from .streams import IDLE_SECONDS, Stream
from .wire import ACCEPTED, EXCHANGE, PREFIX, RPC_LIMITS, Batch, Outcomes

PING_SECONDS: Final = 10.0
PING_ANSWER_SECONDS: Final = 5.0
"""A connection with streams is probed when it is quiet: those to a machine that is gone end after these two."""

READY: Final = grpc.ChannelConnectivity.READY
FAILED: Final = (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN)

Metadata = Sequence[tuple[str, str]]


class _Channel:
    """A channel, and what runs on it. `is_gone`: it gets no more calls, and is closed when those have ended."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.calls = 0
        """Those that run, streams too."""
        self.is_gone = False
        self.is_closed = False
        self.streams: dict[str, Stream] = {}
        """Those that take batches, by service."""
        self.opening: dict[str, asyncio.Task[Stream]] = {}


class Channels:
    """The channels of one caller. With `ca` (PEM), they are encrypted, and each server is verified by `server_name`."""

    def __init__(self, limits: ClientLimits, server_name: ServerName, ca: bytes | None) -> None:
        self._limits = limits
        self._server_name = server_name
        self._credentials = None if ca is None else grpc.ssl_channel_credentials(ca)
        self._channels: dict[tuple[str, str], _Channel] = {}
        self._closing: set[asyncio.Task[None]] = set()

    async def exchange(self, instance: Instance, batch: Batch, metadata: Callable[[], Metadata]) -> Outcomes:
        """Sends a batch on the stream to its service, which is opened with `metadata` if there is none.

        Raises `NotConnected` if the batch was not sent, `ConnectionBroke` if that is unknown, and
        `grpc.aio.AioRpcError` if the instance has refused the stream.
        """
        stream = self._kept_stream(instance)
        if stream is not None:
            # It may have ended right now.
            with contextlib.suppress(NotConnected):
                return await stream.exchange(batch)
        stream = await self._new_stream(instance, metadata)
        return await stream.exchange(batch)

    async def call(self, instance: Instance, path: str, message: bytes, seconds: float, metadata: Metadata) -> bytes:
        """Sends a message when there is a connection; gives the answer.

        Raises `NotConnected` if there is none, so that nothing was sent, or `grpc.aio.AioRpcError`.
        """
        key = self._key(instance)
        held = self._held(key)
        held.calls += 1
        try:
            await self._connect(key, held)
            method = cast(Callable[..., Awaitable[bytes]], held.channel.unary_unary(path))
            return await method(message, timeout=seconds, metadata=metadata)
        finally:
            self._has_ended(held)

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

    def _kept_stream(self, instance: Instance) -> Stream | None:
        held = self._channels.get(self._key(instance))
        return held.streams.get(instance.service) if held else None

    async def _new_stream(self, instance: Instance, metadata: Callable[[], Metadata]) -> Stream:
        """The stream that is being opened, for all who wait for it. Raises as `exchange`."""
        key, service = self._key(instance), instance.service
        held = self._held(key)
        if service in held.streams:
            return held.streams[service]
        opening = held.opening.get(service)
        if opening is None:
            opening = asyncio.create_task(self._open_stream(key, held, service, metadata()))
            held.opening[service] = opening
        return await asyncio.shield(opening)

    async def _open_stream(self, key: tuple[str, str], held: _Channel, service: str, metadata: Metadata) -> Stream:
        """The stream, when the instance has accepted it. Raises as `exchange`."""
        open_stream = cast(Callable[..., Any], held.channel.stream_stream(f"{PREFIX}{service}/{EXCHANGE}"))
        held.calls += 1
        try:
            was_connected = await self._connect(key, held)
            try:
                call = await _accepted(open_stream(metadata=metadata), self._limits.connect_seconds)
            except NotConnected:
                if not was_connected or held.channel.get_state() is READY:
                    raise
                # The connection that was kept has ended right now.
                await self._connect(key, held)
                call = await _accepted(open_stream(metadata=metadata), self._limits.connect_seconds)
        except BaseException:
            self._has_ended(held)
            raise
        finally:
            del held.opening[service]

        def leaves(stream: Stream) -> None:
            if held.streams.get(service) is stream:
                del held.streams[service]

        stream = held.streams[service] = Stream(call, leaves, lambda stream: self._has_ended(held))
        if held.is_gone:
            stream.leave()
        return stream

    async def _connect(self, key: tuple[str, str], held: _Channel) -> bool:
        """Whether there was a connection before. Raises `NotConnected`.

        gRPC gives one status for a call that was not sent and one that may have been.
        """
        channel = held.channel
        try:
            if channel.get_state() is READY:
                return True
            async with asyncio.timeout(self._limits.connect_seconds):
                state = channel.get_state(try_to_connect=True)
                while state is not READY:
                    if state in FAILED:
                        raise NotConnected(str(state))
                    await channel.wait_for_state_change(state)
                    state = channel.get_state(try_to_connect=True)
            return False
        except (NotConnected, TimeoutError, grpc.aio.UsageError) as error:
            # A new channel connects at once; this one would wait before it tried again. The usage error: another call
            # has found the same, and closed it.
            self._retire(key, held)
            raise NotConnected(str(error) or "there is no connection in time") from error

    def _key(self, instance: Instance) -> tuple[str, str]:
        return instance.address, self._server_name(instance)

    def _held(self, key: tuple[str, str]) -> _Channel:
        held = self._channels.get(key)
        if held is None:
            held = self._channels[key] = _Channel(self._open(*key))
        return held

    def _open(self, address: str, name: str) -> grpc.aio.Channel:
        options: list[tuple[str, int | str]] = [
            # A message beyond these would end the stream for all its batches: a batch or an answer beyond a smaller
            # limit of this caller is split, or given up, alone.
            ("grpc.max_send_message_length", RPC_LIMITS.message_bytes),
            ("grpc.max_receive_message_length", RPC_LIMITS.answer_bytes),
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
        for stream in tuple(held.streams.values()):
            stream.leave()

    def _has_ended(self, held: _Channel) -> None:
        """A call has."""
        held.calls -= 1
        if held.is_gone and not held.calls:
            self._close(held)

    def _close(self, held: _Channel) -> None:
        if held.is_closed:
            return
        held.is_closed = True
        task = asyncio.ensure_future(held.channel.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


async def _accepted(call: Any, seconds: float) -> Any:
    """The call, when the instance has said that it takes batches. Raises `NotConnected`, or its refusal."""
    try:
        async with asyncio.timeout(seconds):
            if ACCEPTED in dict(await call.initial_metadata()):
                return call
            await call.read()  # raises the status
            raise NotConnected("it answers a stream without a word")
    except BaseException as error:
        call.cancel()
        if isinstance(error, TimeoutError):
            raise NotConnected("the stream was not accepted in time") from error
        if isinstance(error, grpc.aio.AioRpcError) and NOT_STARTED not in dict(error.trailing_metadata() or ()):
            raise NotConnected(f"{error.code().name}: {error.details()}") from error
        raise
