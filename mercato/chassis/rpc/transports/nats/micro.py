"""The NATS micro protocol: the tools of NATS list, inspect and measure services by it.

An instance answers on `$SRV.PING`, `$SRV.INFO` and `$SRV.STATS`, each for all services, for those with its name, and
for itself (`$SRV.INFO.orders.<id>`). The shapes are those of the public protocol, version 1. It runs no handlers:
the library's own run one request at a time, and send the text of an exception to the caller.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
from nats.aio.msg import Msg

from mercato.chassis.rpc.stats import CalleeStats, OperationRecorder, Stats

from .connection import NatsConnection, NotConnected, Subscribed
from .wire import MICRO, micro_name

TYPE: Final = "io.nats.micro.v1."
NANOSECONDS: Final = 1_000_000_000


class Endpoint:
    """The statistics of one operation of an instance since its start."""

    def __init__(
        self, name: str, subject: str, queue_group: str, metadata: Mapping[str, str], recorder: OperationRecorder
    ) -> None:
        self.name = name
        self.subject = subject
        self.queue_group = queue_group
        self.metadata = dict(metadata)
        self._last_error = ""
        self._recorder = recorder

    def answered(self, requests: int, seconds: float) -> None:
        """A batch of so many requests was answered after `seconds`. Errors of the service are answers."""
        self._recorder.answered(requests, seconds)

    def failed(self, reason: str, seconds: float = 0.0) -> None:
        """A batch was refused, or failed unexpectedly. `reason` is one word: any caller can read it."""
        self._recorder.failed(seconds)
        self._last_error = reason

    def info(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "subject": self.subject,
            "queue_group": self.queue_group,
            "metadata": self.metadata,
        }

    def stats(self, open_breakers: Sequence[str], callees: Sequence[CalleeStats]) -> dict[str, Any]:
        stats = self._recorder.stats()
        spent = int(stats.seconds * NANOSECONDS)
        return {
            "name": self.name,
            "subject": self.subject,
            "queue_group": self.queue_group,
            "num_requests": stats.batches,
            "num_errors": stats.errors,
            "last_error": self._last_error,
            "processing_time": spent,
            "average_processing_time": spent // stats.batches if stats.batches else 0,
            "data": {
                "requests": stats.requests,
                "p99_ms": stats.p99_ms,
                "open_breakers": open_breakers,
                "callees": callees,
            },
        }


class MicroService:
    """One service of one instance in the protocol of NATS. `service` is the name of its contract."""

    def __init__(self, connection: NatsConnection, service: str, recorded: Stats, metadata: Mapping[str, str]) -> None:
        self._connection = connection
        self._recorded = recorded
        self._service = service
        self._identity = {
            "name": micro_name(service),
            "id": recorded.instance,
            "version": recorded.version,
            "metadata": {**metadata, "service": service},
        }
        self._started = datetime.datetime.now(datetime.UTC).isoformat().replace("+00:00", "Z")
        self._endpoints: list[Endpoint] = []

    def add(self, name: str, subject: str, queue_group: str, metadata: Mapping[str, str]) -> Endpoint:
        recorder = self._recorded.recorder(self._service, name)
        endpoint = Endpoint(name, subject, queue_group, metadata, recorder)
        self._endpoints.append(endpoint)
        return endpoint

    async def open(self) -> Sequence[Subscribed]:
        """Begins to answer; gives the subscriptions that the caller unsubscribes at the end."""
        verbs = {"PING": self._ping, "INFO": self._info, "STATS": self._stats}
        name, instance = self._identity["name"], self._identity["id"]
        return [
            await self._connection.subscribe(f"{MICRO}.{verb}{suffix}", handle)
            for verb, handle in verbs.items()
            for suffix in ("", f".{name}", f".{name}.{instance}")
        ]

    async def _ping(self, message: Msg) -> None:
        await self._respond(message, "ping_response", {})

    async def _info(self, message: Msg) -> None:
        endpoints = [endpoint.info() for endpoint in self._endpoints]
        await self._respond(message, "info_response", {"description": "", "endpoints": endpoints})

    async def _stats(self, message: Msg) -> None:
        breakers = sorted(self._recorded.open_breakers())
        # These belong to the process, not to an operation: only the first endpoint has them.
        callees = tuple(self._recorded.callees())
        endpoints = [endpoint.stats(breakers, () if i else callees) for i, endpoint in enumerate(self._endpoints)]
        await self._respond(message, "stats_response", {"started": self._started, "endpoints": endpoints})

    async def _respond(self, message: Msg, kind: str, more: Mapping[str, Any]) -> None:
        if message.reply:
            body = msgspec.json.encode({"type": TYPE + kind, **self._identity, **more})
            with contextlib.suppress(NotConnected):  # the asking client waits only for a moment
                await self._connection.publish(message.reply, body)
