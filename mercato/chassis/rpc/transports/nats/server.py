"""The serving end of the NATS transport: bounded handlers in front of the servers of one process."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
import structlog
from nats.aio.msg import Msg

from mercato.chassis.contract import Context, DeadlineExceeded, Operation, ServiceError, Unauthenticated, Unavailable
from mercato.chassis.observability.clock import Clock
from mercato.chassis.rpc.codec import decode_requests, encode_outcomes
from mercato.chassis.rpc.server import Server
from mercato.chassis.rpc.stats import Stats
from mercato.chassis.rpc.transports.encoded import answer_decoded
from mercato.chassis.rpc.trust import Trust

from .connection import NatsConnection, Subscribed
from .micro import Endpoint, MicroService
from .wire import (
    AUTHORIZATION,
    ERROR,
    ERROR_CODE,
    LARGEST_ANSWER_BYTES,
    LONGEST_REMAINING_MS,
    NOT_STARTED,
    PART,
    PARTS_MAX,
    QUEUE_GROUP,
    REMAINING_MS,
    TRACEPARENT,
    NotStarted,
    header_block,
    subject_of,
)

log = structlog.stdlib.get_logger("mercato.rpc.nats")

FAILED: Final[Mapping[str, str]] = {ERROR_CODE: "500", ERROR: "The batch failed unexpectedly."}


class NatsServerLimits(msgspec.Struct, frozen=True, kw_only=True):
    """The limits of one operation in one process."""

    running: int = 64
    """Batches that run at once; the number of lanes of the operation if that is larger."""
    waiting: int = 256
    """Further batches that wait. Others are refused at once: another instance may have a slot."""


class RefusedBatch(Exception):
    """Nothing was started."""

    def __init__(self, reason: NotStarted) -> None:
        super().__init__(reason)
        self.reason = reason


class _Arrived(msgspec.Struct, frozen=True):
    """A batch as it was decoded on arrival. An error in place of a request is its outcome."""

    requests: Sequence[Any | ServiceError]
    contexts: Sequence[Context]
    ends_at: float


class _Handler:
    """The batches of one operation: a bounded number runs, a bounded number waits."""

    def __init__(
        self,
        server: NatsServer,
        served: Server,
        operation: Operation[Any, Any],
        endpoint: Endpoint,
        limits: NatsServerLimits,
    ) -> None:
        self._server = server
        self._served = served
        self._operation = operation
        self._endpoint = endpoint
        running = max(limits.running, operation.lanes)
        self._slots = asyncio.Semaphore(running)
        self._batches_max = running + limits.waiting
        self.tasks: set[asyncio.Task[None]] = set()

    async def take(self, message: Msg) -> None:
        """Called by the subscription for one message after the other: it starts a task, and does not wait."""
        arrived_at = self._server.clock.monotonic()
        if self._server.is_draining:
            await self._refuse(message, NotStarted.DRAINING)
        elif len(self.tasks) >= self._batches_max:
            await self._refuse(message, NotStarted.OVERLOADED)
        else:
            task = asyncio.create_task(self._answer(message, arrived_at))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    async def _refuse(self, message: Msg, reason: NotStarted) -> None:
        self._endpoint.failed(reason.value)
        await self._server.answer(message, b"", {NOT_STARTED: reason.value})

    async def _answer(self, message: Msg, arrived_at: float) -> None:
        try:
            batch = self._read(message, arrived_at)
            answer = await self._run(batch)
        except RefusedBatch as refused:
            await self._refuse(message, refused.reason)
        except Exception as error:  # an edge: the text of the error stays here
            log.error("rpc_failed", operation=self._operation.full_name, exc_info=error)
            self._endpoint.failed("internal")
            await self._server.answer(message, b"", FAILED)
        else:
            await self._server.answer(message, answer, {})

    def _read(self, message: Msg, arrived_at: float) -> _Arrived:
        """Reads the whole batch at once, so that a refused batch takes no slot."""
        operation, headers = self._operation, message.headers or {}
        caller = self._server.caller(operation, headers)
        ends_at = arrived_at + _remaining_s(headers)
        try:
            requests, contexts = decode_requests(operation, message.data, arrived_at, headers.get(TRACEPARENT, ""))
        except (msgspec.MsgspecError, RecursionError) as error:  # RecursionError: deeply nested lists
            log.warning("rpc_malformed", operation=operation.full_name, reason=str(error))
            raise RefusedBatch(NotStarted.MALFORMED_BODY) from error
        if not 1 <= len(requests) <= operation.size:
            raise RefusedBatch(NotStarted.WRONG_BATCH_SIZE)
        refusals = self._server.trust.refusals(caller, operation, contexts)
        return _Arrived([refusals.get(i, request) for i, request in enumerate(requests)], contexts, ends_at)

    async def _run(self, batch: _Arrived) -> bytes:
        """Waits for a slot and runs the batch in it, both before its deadline. An expired batch is not started."""
        clock, started_at = self._server.clock, None
        try:
            async with asyncio.timeout(batch.ends_at - clock.monotonic()), self._slots:
                started_at = clock.monotonic()
                # A free slot is acquired without a wait, and so without a check of the deadline.
                if started_at >= batch.ends_at:
                    raise TimeoutError
                answer = await answer_decoded(self._served, self._operation, batch.requests, batch.contexts)
        except TimeoutError:
            late = DeadlineExceeded(operation=self._operation.full_name)
            self._endpoint.failed(late.code, 0.0 if started_at is None else clock.monotonic() - started_at)
            return encode_outcomes(self._operation, [late] * len(batch.requests))
        self._endpoint.answered(len(batch.requests), clock.monotonic() - started_at)
        return answer


class NatsServer:
    """Serves `servers`, by the name of their contract, on a connection. `open`, and `close` at the end.

    `version` is the release of this process, as semver; `name` distinguishes this instance from others of the same
    services. It records in `stats`. `metadata` is shown with the instances: the pid, the address of the HTTP server.
    """

    def __init__(
        self,
        connection: NatsConnection,
        servers: Mapping[str, Server],
        trust: Trust,
        clock: Clock,
        *,
        version: str,
        name: str,
        metadata: Mapping[str, str] | None = None,
        limits: NatsServerLimits | None = None,
        stats: Stats | None = None,
    ) -> None:
        self.trust = trust
        self.clock = clock
        self.is_draining = False
        """Every batch that arrives is refused unstarted; NATS sends no more."""
        self._connection = connection
        self._servers = servers
        self._metadata = metadata or {}
        self._limits = limits or NatsServerLimits()
        self._stats = stats or Stats(name, version)
        self._handlers: list[_Handler] = []
        self._subscribed: list[Subscribed] = []

    async def open(self) -> None:
        """Returns when callers find this instance. The connection must be open; later it reconnects by itself."""
        for served in self._servers.values():
            service = MicroService(self._connection, served.contract.service, self._stats, self._metadata)
            for operation in served.contract.operations.values():
                endpoint = service.add(operation.name, subject_of(operation), QUEUE_GROUP, _metadata(operation))
                handler = _Handler(self, served, operation, endpoint, self._limits)
                self._handlers.append(handler)
                self._subscribed.append(
                    await self._connection.subscribe(subject_of(operation), handler.take, QUEUE_GROUP)
                )
            self._subscribed += await service.open()
        await self._connection.flush()  # otherwise the first caller might find no responder

    async def close(self) -> None:
        """Accepts no more batches, and finishes the accepted ones. Does not close the connection.

        A batch that still arrives is refused, and its caller sends it again. It reaches another instance: NATS gets the
        UNSUB of this one before the refusal, because it processes the messages of this process in order.
        """
        await self._connection.unsubscribe(*self._subscribed, begun=self._drain)
        while running := [task for handler in self._handlers for task in handler.tasks]:
            await asyncio.wait(running)
        try:
            await self._connection.flush()
        except Unavailable as error:
            log.warning("rpc_answers_lost", reason=type(error).__name__)

    def _drain(self) -> None:
        self.is_draining = True

    def caller(self, operation: Operation[Any, Any], headers: Mapping[str, str]) -> str:
        """The service that calls, by its token. Raises `RefusedBatch`."""
        try:
            return self.trust.caller(headers.get(AUTHORIZATION), operation.service)
        except Unauthenticated:
            raise RefusedBatch(NotStarted.UNTRUSTED) from None

    async def answer(self, message: Msg, body: bytes, headers: Mapping[str, str]) -> None:
        """Answers in as many parts as needed. Without a connection, the outcome is already unknown to the caller."""
        if not message.reply:
            return
        try:
            for part, block in _parts(body, headers, self._connection.max_payload):
                await self._connection.publish(message.reply, part, block=block)
        except Exception as error:  # an edge: there is no connection, or the reply subject is not valid
            log.warning("rpc_answer_lost", reason=type(error).__name__, exc_info=error)


def _parts(body: bytes, headers: Mapping[str, str], max_payload: int) -> Sequence[tuple[bytes, bytes]]:
    """Splits an answer into messages that the server accepts, with headers. An answer over the limit is a failure."""
    if len(body) > LARGEST_ANSWER_BYTES:
        log.error("rpc_answer_too_large", size=len(body))
        body, headers = b"", FAILED
    block = header_block(headers)
    if len(block) + len(body) <= max_payload:
        return [(body, block)]
    part_bytes = max_payload - len(header_block({**headers, PART: f"{PARTS_MAX}/{PARTS_MAX}"}))
    parts = [body[i : i + part_bytes] for i in range(0, len(body), part_bytes)]
    assert len(parts) <= PARTS_MAX, "max_payload of the server is too small"
    return [(part, header_block({**headers, PART: f"{n}/{len(parts)}"})) for n, part in enumerate(parts, 1)]


def _remaining_s(headers: Mapping[str, str]) -> float:
    try:
        remaining_ms = float(headers.get(REMAINING_MS, ""))
    except ValueError:
        remaining_ms = 0.0
    if not 0 < remaining_ms <= LONGEST_REMAINING_MS:  # also not for NaN
        raise RefusedBatch(NotStarted.MALFORMED_HEADER)
    return remaining_ms / 1_000


def _metadata(operation: Operation[Any, Any]) -> Mapping[str, str]:
    roles: Sequence[str] = sorted(operation.allow)
    return {"batch": str(operation.size), "retry": operation.retry.value, "roles": ",".join(roles)}
