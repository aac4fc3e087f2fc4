"""The few requests to JetStream that the bridge needs, on the connection of a user of NATS.

A request to JetStream is a message with a reply subject, answered in JSON. The connection reconnects by itself, and
`JetStream` then works again. All waiting is bounded; it ends at once when the connection of the answer is lost.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
import structlog
from nats.aio.msg import Msg

from mercato.chassis.contract import Unavailable
from mercato.chassis.rpc.transports.nats import NatsConnection, NotConnected, Subscribed
from mercato.chassis.rpc.transports.nats.wire import frame, header_block

API: Final = "$JS.API"
ANSWER_SECONDS: Final = 5.0
BATCH_MAX: Final = 1_000
"""The most messages that the server accepts in one batch."""

MESSAGE_ID: Final = "Nats-Msg-Id"
EXPECTED_SEQUENCE: Final = "Nats-Expected-Last-Sequence"
TRACEPARENT: Final = "traceparent"
BATCH_ID: Final = "Nats-Batch-Id"
BATCH_SEQUENCE: Final = "Nats-Batch-Sequence"
BATCH_COMMIT: Final = "Nats-Batch-Commit"
BATCH_ID_BYTES: Final = 12
BATCH_HEADERS_BYTES: Final = 256
"""An upper bound of the headers of a message in a batch, which count against `max_payload`."""
STATUS: Final = "Status"
NO_RESPONDERS: Final = "503"
STREAM_NOT_FOUND: Final = 10059
MESSAGE_NOT_FOUND: Final = 10037
WRONG_LAST_SEQUENCE: Final = 10071
STREAM_EXISTS: Final = 10058
INCOMPLETE_BATCH: Final = 10176
DUPLICATE_IN_BATCH: Final = 10201

log = structlog.stdlib.get_logger("mercato.bridge")


class JetStreamMissing(Exception):
    """The server has no JetStream, or has not started it yet, or no stream has the subject."""


class JetStreamRefused(Exception):
    """JetStream has answered with an error; `code` is its `err_code`. The server's text is left out."""

    def __init__(self, code: int) -> None:
        super().__init__(f"JetStream error {code}")
        self.code = code


class StreamState(msgspec.Struct, frozen=True):
    messages: int
    last_seq: int


class StreamConfig(msgspec.Struct, frozen=True):
    allow_atomic: bool = False
    """Whether it accepts batches. A server before 2.12 does not support them, and leaves this field out."""


class StoredMessage(msgspec.Struct, frozen=True):
    seq: int
    subject: str
    hdrs: bytes = b""
    data: bytes = b""

    def header(self, name: str) -> str:
        """A header of the message; empty if it has none of this name."""
        for line in self.hdrs.decode(errors="replace").split("\r\n"):
            found, _, value = line.partition(":")
            if found == name:
                return value.strip()
        return ""


class _Error(msgspec.Struct, frozen=True):
    err_code: int = 0


class JetStreamAnswer(msgspec.Struct, frozen=True):
    """An answer of JetStream: of each kind of answer the fields that are used."""

    error: _Error | None = None
    config: StreamConfig | None = None
    state: StreamState | None = None
    message: StoredMessage | None = None
    seq: int = 0
    """The sequence number of the last message of a published batch."""
    duplicate: bool = False


class Published(msgspec.Struct, frozen=True):
    """A message of a batch."""

    subject: str
    id: str
    """Its header `Nats-Msg-Id`."""
    body: bytes
    traceparent: str | None = None
    """Its header of that name (W3C Trace Context)."""


_decode: Final = msgspec.json.Decoder(JetStreamAnswer).decode


class JetStream:
    """A client of JetStream. `open` once, before the first request. It belongs to one event loop."""

    def __init__(self, connection: NatsConnection) -> None:
        self._connection = connection
        self._inbox: Subscribed | None = None
        self._numbers = itertools.count(1)
        self._pending: dict[str, asyncio.Future[Msg | None]] = {}

    async def open(self) -> None:
        """Subscribes to an inbox, now or as soon as there is a connection."""
        self._connection.on_lost.append(self._lose)
        self._inbox = await self._connection.subscribe_inbox(self._on_answer)

    @property
    def max_payload(self) -> int:
        """The largest message, headers included. Raises `Unavailable`."""
        try:
            return self._connection.max_payload
        except NotConnected:
            raise self._unavailable() from None

    async def ask(self, what: str, question: Mapping[str, Any] | None = None) -> JetStreamAnswer:
        """The answer to one request of the API.

        Raises `JetStreamRefused` for an error, `Unavailable` without an answer, and `JetStreamMissing` if there is no
        JetStream.
        """
        body = b"" if question is None else msgspec.json.encode(question)
        return await self._ask(b"", f"{API}.{what}", body)

    async def publish(self, messages: Sequence[Published], last_sequence: int) -> JetStreamAnswer:
        """Stores all of 1 to `BATCH_MAX` messages in a stream that accepts batches, in order, or none of them.

        The server refuses them if the last message of the stream has another number than `last_sequence`. It writes
        them with one `fsync`, and acknowledges only the last one. Raises as `ask` does; after `Unavailable` it is
        unknown whether they are stored.
        """
        assert 1 <= len(messages) <= BATCH_MAX, f"{len(messages)} messages are no batch"
        batch = secrets.token_urlsafe(BATCH_ID_BYTES)
        headers = [{MESSAGE_ID: one.id, BATCH_ID: batch, BATCH_SEQUENCE: str(n)} for n, one in enumerate(messages, 1)]
        for one, own in zip(messages, headers, strict=True):
            if one.traceparent is not None:
                own[TRACEPARENT] = one.traceparent
        headers[0][EXPECTED_SEQUENCE] = str(last_sequence)
        headers[-1][BATCH_COMMIT] = "1"
        blocks = [header_block(each) for each in headers]
        frames = [frame(one.subject, one.body, "", block) for one, block in zip(messages, blocks, strict=True)]
        return await self._ask(b"".join(frames[:-1]), messages[-1].subject, messages[-1].body, blocks[-1])

    async def _ask(self, before: bytes, subject: str, body: bytes, block: bytes = b"") -> JetStreamAnswer:
        """The answer to one message, which is sent behind messages (`before`) that get none."""
        assert self._inbox is not None, "it is not open"
        word = str(next(self._numbers))
        awaited: asyncio.Future[Msg | None] = asyncio.get_running_loop().create_future()
        self._pending[word] = awaited
        try:
            await self._connection.send(before + frame(subject, body, f"{self._inbox.subject}.{word}", block))
            async with asyncio.timeout(ANSWER_SECONDS):
                answer = await awaited
        except (NotConnected, TimeoutError):
            raise self._unavailable() from None
        finally:
            self._pending.pop(word, None)
        return self._read(answer)

    def _read(self, answer: Msg | None) -> JetStreamAnswer:
        if answer is None:
            raise self._unavailable()
        if answer.headers and answer.headers.get(STATUS) == NO_RESPONDERS:
            raise JetStreamMissing
        try:
            read = _decode(answer.data)
        except msgspec.MsgspecError as error:
            log.error("jetstream_answer_malformed", reason=type(error).__name__)
            raise self._unavailable() from None
        if read.error is not None:
            raise JetStreamRefused(read.error.err_code)
        return read

    async def _on_answer(self, message: Msg) -> None:
        awaited = self._pending.pop(message.subject.rpartition(".")[2], None)
        if awaited is not None and not awaited.done():
            awaited.set_result(message)

    def _lose(self) -> None:
        for awaited in self._pending.values():
            if not awaited.done():
                awaited.set_result(None)

    def _unavailable(self) -> Unavailable:
        return Unavailable(service=f"JetStream at {self._connection.address}")
