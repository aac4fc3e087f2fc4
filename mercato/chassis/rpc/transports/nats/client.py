"""The calling end of the NATS transport. See the top of this package."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
import structlog
from nats.aio.msg import Msg

from mercato.chassis.contract import Context, DeadlineExceeded, Internal, Operation, Overloaded, Unavailable
from mercato.chassis.observability.clock import Clock
from mercato.chassis.rpc.batching import Outcome
from mercato.chassis.rpc.codec import encode_requests, traceparent_of
from mercato.chassis.rpc.transports.encoded import in_parts, not_known, outcomes_of
from mercato.chassis.rpc.trust import TokenSigner

from .connection import NatsConnection, NotConnected, Subscribed
from .wire import (
    AUTHORIZATION,
    ERROR_CODE,
    LARGEST_ANSWER_BYTES,
    LONGEST_REMAINING_MS,
    NOT_STARTED,
    PART,
    PARTS_MAX,
    REMAINING_MS,
    TRACEPARENT,
    VERSION,
    NotStarted,
    header_block,
    subject_of,
)

log = structlog.stdlib.get_logger("mercato.rpc.nats")

HEADER_WORD: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")
"""What is put into a header unescaped: a trace id may come from a client."""
PART_OF: Final = re.compile(r"([1-9][0-9]{0,3})/([1-9][0-9]{0,3})")
REPLY_BYTES: Final = 9
"""Random bytes of each reply subject: only the process that was called can answer."""

STATUS: Final = "Status"
NO_RESPONDERS: Final = "503"


class NatsAnswer(msgspec.Struct, frozen=True):
    """A complete answer of an instance, with the headers of the part that arrived last."""

    headers: Mapping[str, str]
    body: bytes


class PendingAnswer:
    """An answer that is awaited, and may arrive in parts. `whole` is None if it cannot arrive or is malformed."""

    __slots__ = ("_bytes", "_parts", "whole")

    def __init__(self) -> None:
        self.whole: asyncio.Future[NatsAnswer | None] = asyncio.get_running_loop().create_future()
        self._parts: dict[int, bytes] = {}
        self._bytes = 0

    def add(self, headers: Mapping[str, str], body: bytes) -> None:
        """Adds a part; parts arrive in any order. A part after the last one is ignored."""
        if self.whole.done():
            return
        place = PART_OF.fullmatch(headers.get(PART, "1/1"))
        if place is None or int(place[1]) in self._parts or self._bytes + len(body) > LARGEST_ANSWER_BYTES:
            log.error("rpc_answer_malformed", part=headers.get(PART, "")[:20], size=self._bytes + len(body))
            self.whole.set_result(None)
            return
        self._parts[int(place[1])] = body
        self._bytes += len(body)
        if len(self._parts) == int(place[2]):
            self.whole.set_result(NatsAnswer(headers, b"".join(part for _, part in sorted(self._parts.items()))))

    def give_up(self) -> None:
        if not self.whole.done():
            self.whole.set_result(None)


class NatsTransport:
    """Sends each batch to the queue group of its operation. One a process and connection; `open` before the first call.

    `version` is the release of this process. It belongs to one event loop.
    """

    def __init__(self, connection: NatsConnection, signer: TokenSigner, clock: Clock, *, version: str = "") -> None:
        assert PARTS_MAX <= 9_999, "PART_OF reads four digits"
        self._connection = connection
        self._signer = signer
        self._clock = clock
        self._headers = {VERSION: version} if HEADER_WORD.fullmatch(version) else {}
        self._pending: dict[str, PendingAnswer] = {}
        self._inbox: Subscribed | None = None

    async def open(self) -> None:
        """Subscribes to an inbox. The connection must be open; a reconnection subscribes to the inbox again."""
        self._connection.on_lost.append(self._lose)
        self._inbox = await self._connection.subscribe_inbox(self._on_answer)
        await self._connection.flush()

    def _lose(self) -> None:
        """Ends the calls in flight: the connection is lost, and with it their answers."""
        for pending in self._pending.values():
            pending.give_up()

    async def send(
        self, operation: Operation[Any, Any], requests: Sequence[Any], contexts: Sequence[Context]
    ) -> Sequence[Outcome]:
        """See `Transport`. A batch that is larger than a message is sent in parts; each may fail without the others."""
        while (outcomes := await self._try(operation, requests, contexts)) is None:
            pass
        return outcomes

    async def _try(
        self, operation: Operation[Any, Any], requests: Sequence[Any], contexts: Sequence[Context]
    ) -> Sequence[Outcome] | None:
        """The outcomes at one instance; None if it drains and has started nothing."""
        now = self._clock.monotonic()
        remaining_s = min(max(context.deadline for context in contexts) - now, LONGEST_REMAINING_MS / 1_000)
        if remaining_s <= 0:
            raise DeadlineExceeded(operation=operation.full_name)
        block = header_block(self._headers_for(operation, contexts, remaining_s))
        body = encode_requests(requests, contexts, now)
        try:
            largest_body = self._connection.max_payload - len(block)
            if len(body) > largest_body:
                return await in_parts(self.send, operation, requests, contexts, largest_body)
            async with asyncio.timeout(remaining_s):
                answer = await self._ask(operation, block, body)
        except NotConnected:
            raise Unavailable(service=operation.service) from None
        except TimeoutError:
            raise DeadlineExceeded(operation=operation.full_name) from None
        return not_known(operation, requests) if answer is None else _outcomes(operation, requests, answer)

    async def _ask(self, operation: Operation[Any, Any], block: bytes, body: bytes) -> NatsAnswer | None:
        """None if the answer cannot arrive any more. Raises `NotConnected` if nothing was sent."""
        assert self._inbox is not None, "the transport is not open"
        word = secrets.token_urlsafe(REPLY_BYTES)
        pending = self._pending[word] = PendingAnswer()
        try:
            reply = f"{self._inbox.subject}.{word}"
            await self._connection.publish(subject_of(operation), body, reply=reply, block=block)
            return await pending.whole
        finally:
            del self._pending[word]

    async def _on_answer(self, message: Msg) -> None:
        pending = self._pending.get(message.subject.rpartition(".")[2])
        if pending is not None:
            pending.add(message.headers or {}, message.data)

    def _headers_for(
        self, operation: Operation[Any, Any], contexts: Sequence[Context], remaining_s: float
    ) -> dict[str, str]:
        headers = {
            **self._headers,
            AUTHORIZATION: self._signer.token(operation.service),
            REMAINING_MS: f"{max(remaining_s * 1_000, 0.001):.3f}",
        }
        if (parent := traceparent_of(contexts)) is not None:
            headers[TRACEPARENT] = parent
        return headers


def _outcomes(operation: Operation[Any, Any], requests: Sequence[Any], answer: NatsAnswer) -> Sequence[Outcome] | None:
    """The outcomes in an answer; None if another instance may start the batch."""
    if answer.headers.get(STATUS) == NO_RESPONDERS:
        raise Unavailable(service=operation.service)
    reason = answer.headers.get(NOT_STARTED)
    if reason == NotStarted.DRAINING:
        return None
    if reason == NotStarted.OVERLOADED:
        raise Overloaded(operation=operation.full_name)
    if reason is not None:
        # The instance does not understand the batch, and another one would not either: a bug on one of the two sides.
        log.warning("rpc_refused", operation=operation.full_name, reason=reason)
        return [Internal(operation=operation.full_name) for _ in requests]
    if ERROR_CODE in answer.headers:
        log.warning("rpc_failed_there", operation=operation.full_name, code=answer.headers[ERROR_CODE][:20])
        return not_known(operation, requests)
    return outcomes_of(operation, requests, answer.body)
