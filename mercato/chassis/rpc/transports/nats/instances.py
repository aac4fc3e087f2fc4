"""Which instances of services there are on NATS, and their stats: one question to all of them.

It is for operators who inspect a running shop. Calls do not need it: NATS itself knows the subscribers.
"""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
import structlog
from nats.aio.msg import Msg

from .connection import NatsConnection
from .micro import NANOSECONDS
from .wire import MICRO

SECONDS: Final = 0.5
INSTANCES_MAX: Final = 10_000

log = structlog.stdlib.get_logger("mercato.rpc.nats")


class FoundEndpoint(msgspec.Struct, frozen=True):
    """One operation of an instance. The numbers are None if only its INFO arrived in time."""

    name: str
    subject: str
    num_requests: int | None
    num_errors: int | None
    average_processing_time_s: float | None
    data: Mapping[str, Any]
    """Mercato's own fields: `requests`, `p99_ms`, `open_breakers`, `callees`."""
    metadata: Mapping[str, str]


class FoundInstance(msgspec.Struct, frozen=True):
    """One service of one process. `metadata` is that of its `NatsServer`, and `service`: its contract."""

    name: str
    id: str
    version: str
    metadata: Mapping[str, str]
    endpoints: tuple[FoundEndpoint, ...]
    started: datetime.datetime | None = None


class _EndpointMessage(msgspec.Struct, frozen=True):
    """The fields of INFO and STATS; each message has a part of them."""

    name: str
    subject: str
    metadata: dict[str, str] | None = None
    num_requests: int | None = None
    num_errors: int | None = None
    average_processing_time: int | None = None
    data: dict[str, Any] | None = None


class _Message(msgspec.Struct, frozen=True):
    name: str
    id: str
    version: str
    metadata: dict[str, str] | None = None
    endpoints: tuple[_EndpointMessage, ...] | None = None
    started: datetime.datetime | None = None


_decode = msgspec.json.Decoder(_Message).decode


async def instances(connection: NatsConnection, seconds: float = SECONDS) -> Sequence[FoundInstance]:
    """All that answer within so many seconds, by name and id. The user must be allowed to ask: `watches`.

    Raises `NotConnected` without a connection.
    """
    messages: dict[tuple[str, str], list[_Message]] = {}

    async def note(message: Msg) -> None:
        try:
            answer = _decode(message.data)
        except (msgspec.MsgspecError, RecursionError) as error:  # no responders, or a service that is not ours
            log.debug("nats_instance_malformed", reason=type(error).__name__)
            return
        if len(messages) < INSTANCES_MAX or (answer.name, answer.id) in messages:
            messages.setdefault((answer.name, answer.id), []).append(answer)

    inbox = await connection.subscribe_inbox(note)
    try:
        for verb in ("INFO", "STATS"):
            await connection.publish(f"{MICRO}.{verb}", b"", reply=f"{inbox.subject}.{verb}")
        await asyncio.sleep(seconds)
    finally:
        await connection.unsubscribe(inbox)
    return [_found(answers) for _, answers in sorted(messages.items())]


def _found(answers: Sequence[_Message]) -> FoundInstance:
    first = answers[0]
    by_name: dict[str, list[_EndpointMessage]] = {}
    for answer in answers:
        for endpoint in answer.endpoints or ():
            by_name.setdefault(endpoint.name, []).append(endpoint)
    endpoints = tuple(_endpoint(said) for said in by_name.values())
    started = next((answer.started for answer in answers if answer.started), None)
    return FoundInstance(first.name, first.id, first.version, first.metadata or {}, endpoints, started)


def _endpoint(said: Sequence[_EndpointMessage]) -> FoundEndpoint:
    counted = next((one for one in said if one.num_requests is not None), said[0])
    average = counted.average_processing_time
    return FoundEndpoint(
        name=counted.name,
        subject=counted.subject,
        num_requests=counted.num_requests,
        num_errors=counted.num_errors,
        average_processing_time_s=None if average is None else average / NANOSECONDS,
        data=counted.data or {},
        metadata=next((one.metadata for one in said if one.metadata), dict[str, str]()),
    )
