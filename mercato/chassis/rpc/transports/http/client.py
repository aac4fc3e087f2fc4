"""The calling end of the HTTP transport. See the top of this package."""

from __future__ import annotations

import asyncio
import math
import random
import re
import ssl
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import aiohttp
import msgspec
import structlog

from mercato.chassis.contract import (
    Context,
    DeadlineExceeded,
    Internal,
    Operation,
    Unavailable,
)
from mercato.chassis.observability.clock import Clock
from mercato.chassis.rpc.balancing import Balancer, Pick
from mercato.chassis.rpc.batching import Outcome
from mercato.chassis.rpc.codec import encode_requests, traceparent_of
from mercato.chassis.rpc.discovery import Instance, Registry
from mercato.chassis.rpc.transports.encoded import in_parts, not_known, outcomes_of
from mercato.chassis.rpc.transports.server_names import ServerName, by_registry
from mercato.chassis.rpc.trust import TokenSigner

from .refused_certificates import why_refused
from .wire import (
    AUTHORIZATION,
    BEARER,
    CONTENT_TYPE,
    DRAINING_SECONDS,
    LARGEST_ANSWER_BYTES,
    LARGEST_BATCH_BYTES,
    LONGEST_REMAINING_MS,
    NOT_STARTED,
    PATH_PREFIX,
    REMAINING_MS,
    TRACEPARENT,
    VERSION,
    NotStarted,
)

log = structlog.stdlib.get_logger("mercato.rpc.http")

HEADER_WORD: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")
"""What is put into a header unescaped: a trace id may come from a client."""

TRY_NEXT_INSTANCE: Final = frozenset({503, 404})
"""Statuses of answers that nothing was started, after which another instance may start the batch."""


class HttpClientLimits(msgspec.Struct, frozen=True, kw_only=True):
    """The limits of one calling process for each service."""

    connections: int = 512
    """Connections to one instance. In HTTP/1.1 a call in flight holds one."""
    calls: int = 256
    """Calls of one operation in flight, to all instances: long calls do not use up the connections of others."""
    connect_seconds: float = 1.0
    keep_alive_seconds: float = 1.0
    """The client closes an unused connection before a draining server closes it: no call uses a closing connection."""
    batch_bytes: int = LARGEST_BATCH_BYTES
    """A larger batch is sent in parts."""
    answer_bytes: int = LARGEST_ANSWER_BYTES


class NotConnected(Exception):
    """There was no connection, so that nothing was sent."""


class ConnectionBroke(Exception):
    """The connection ended, or the answer was not HTTP, after the batch was sent, at least in part."""


class AnswerTooLarge(Exception):
    """The answer is larger than the bound. The rest of it was not read."""


class HttpAnswer(msgspec.Struct, frozen=True):
    """A complete answer of an instance."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class HttpTransport:
    """Sends each batch to one of the instances in `registry`. One a process.

    `version` is the release of this process. With `tls`, all calls are encrypted, and each server must have a
    certificate of its `server_name`. `chance` gives 0.0 up to 1.0, without 1.0. It belongs to one event loop.
    """

    def __init__(
        self,
        registry: Registry,
        signer: TokenSigner,
        clock: Clock,
        *,
        version: str = "",
        tls: ssl.SSLContext | None = None,
        server_name: ServerName = by_registry,
        limits: HttpClientLimits | None = None,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._registry = registry
        self._signer = signer
        self._clock = clock
        self._tls = tls
        self._server_name = server_name
        self._scheme = "https" if tls else "http"
        self._limits = limits or HttpClientLimits()
        self._chance = chance
        self._headers = {"Content-Type": CONTENT_TYPE}
        if HEADER_WORD.fullmatch(version):
            self._headers[VERSION] = version
        self._balancers: dict[str, Balancer] = {}
        self._slots: dict[str, asyncio.Semaphore] = {}
        self._session: aiohttp.ClientSession | None = None
        self._stop_watching = registry.watch(self._update)

    async def send(
        self, operation: Operation[Any, Any], requests: Sequence[Any], contexts: Sequence[Context]
    ) -> Sequence[Outcome]:
        """See `Transport`. A batch that is larger than the bound is sent in parts; each may fail without the others."""
        now = self._clock.monotonic()
        remaining_s = min(max(context.deadline for context in contexts) - now, LONGEST_REMAINING_MS / 1_000)
        if remaining_s <= 0:
            raise DeadlineExceeded(operation=operation.full_name)
        body = encode_requests(requests, contexts, now)
        if len(body) > self._limits.batch_bytes:
            return await in_parts(self.send, operation, requests, contexts, self._limits.batch_bytes)
        try:
            # The time-out includes the wait for a slot.
            async with asyncio.timeout(remaining_s), self._slot(operation):
                return await self._deliver(operation, requests, contexts, body)
        except TimeoutError:
            raise DeadlineExceeded(operation=operation.full_name) from None

    async def close(self) -> None:
        """Closes the connections; batches in flight are lost. For the end, after the connector has been closed."""
        self._stop_watching()
        if self._session is not None:
            await self._session.close()

    # --------------------------------------------------------------------------------------------------- the batch

    async def _deliver(
        self, operation: Operation[Any, Any], requests: Sequence[Any], contexts: Sequence[Context], body: bytes
    ) -> Sequence[Outcome]:
        """Tries the instances one after the other, each once, until one has started the batch, or may have."""
        balancer = self._balancer(operation.service)
        tried: list[Instance] = []
        while (pick := balancer.pick(len(requests), tried)) is not None:
            if tried:
                body = encode_requests(requests, contexts, self._clock.monotonic())
            tried.append(pick.instance)
            try:
                outcomes = await self._try(pick, operation, requests, contexts, body)
            finally:
                pick.given_up()
            if outcomes is not None:
                return outcomes
        raise Unavailable(service=operation.service)

    async def _try(
        self,
        pick: Pick,
        operation: Operation[Any, Any],
        requests: Sequence[Any],
        contexts: Sequence[Context],
        body: bytes,
    ) -> Sequence[Outcome] | None:
        """The outcomes at one instance; None if it started nothing and another instance may start the batch."""
        try:
            answer = await self._post(pick.instance, operation, contexts, body)
        except NotConnected as error:
            pick.failed()
            if reason := why_refused(error.__cause__, self._server_name(pick.instance)):
                where = {"operation": operation.full_name, "address": pick.instance.address}
                log.warning("rpc_not_encrypted", **where, reason=reason)
            return None
        except ConnectionBroke as error:
            pick.failed()
            where = {"operation": operation.full_name, "address": pick.instance.address}
            log.warning("rpc_connection_broke", **where, reason=str(error))
            return not_known(operation, requests)
        except AnswerTooLarge:
            pick.answered()
            log.error("rpc_answer_too_large", operation=operation.full_name, address=pick.instance.address)
            return not_known(operation, requests)
        if answer.headers.get(NOT_STARTED) == NotStarted.DRAINING:
            pick.drains(_seconds(answer.headers.get(DRAINING_SECONDS, "")))
            return None
        pick.answered()
        if answer.status == 200:
            return outcomes_of(operation, requests, answer.body)
        return _refused(operation, requests, answer, pick.instance)

    # ------------------------------------------------------------------------------------------------ the connection

    async def _post(
        self, instance: Instance, operation: Operation[Any, Any], contexts: Sequence[Context], body: bytes
    ) -> HttpAnswer:
        """Raises `NotConnected`, `ConnectionBroke` or `AnswerTooLarge`, into which it translates aiohttp's errors."""
        url = f"{self._scheme}://{instance.address}{PATH_PREFIX}{operation.service}/{operation.name}"
        try:
            async with self._open_session().post(
                url,
                data=body,
                headers=self._headers_for(operation, contexts),
                allow_redirects=False,
                server_hostname=self._server_name(instance) if self._tls else None,
            ) as response:
                return HttpAnswer(response.status, response.headers, await self._read(response))
        # Only opening a connection raises these; the last one means that the address is malformed.
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError, aiohttp.InvalidURL) as error:
            raise NotConnected(str(error)) from error
        except (aiohttp.ClientError, OSError) as error:
            raise ConnectionBroke(repr(error)) from error

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        """The body. A connection whose answer is not read to its end is closed by aiohttp."""
        limit = self._limits.answer_bytes
        if (response.content_length or 0) > limit:
            response.close()
            raise AnswerTooLarge
        parts, size = list[bytes](), 0
        async for part in response.content.iter_any():
            parts.append(part)
            size += len(part)
            if size > limit:
                response.close()
                raise AnswerTooLarge
        return b"".join(parts)

    def _headers_for(self, operation: Operation[Any, Any], contexts: Sequence[Context]) -> Mapping[str, str]:
        remaining_ms = (max(context.deadline for context in contexts) - self._clock.monotonic()) * 1_000
        # At least a little, also if the deadline passes right now: the receiver then refuses each expired request.
        headers = {**self._headers, REMAINING_MS: f"{min(max(remaining_ms, 0.001), LONGEST_REMAINING_MS):.3f}"}
        headers[AUTHORIZATION] = BEARER + self._signer.token(operation.service)
        if (parent := traceparent_of(contexts)) is not None:
            headers[TRACEPARENT] = parent
        return headers

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            limits = self._limits
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    limit=0,
                    limit_per_host=limits.connections,
                    keepalive_timeout=limits.keep_alive_seconds,
                    ssl=self._tls or False,
                ),
                # The time that the callers wait is measured outside, over all attempts.
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=limits.connect_seconds),
                cookie_jar=aiohttp.DummyCookieJar(),
                # A small answer cannot be decompressed into a large one.
                auto_decompress=False,
                skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding"),
            )
        return self._session

    # ------------------------------------------------------------------------------------------------- the instances

    def _balancer(self, service: str) -> Balancer:
        balancer = self._balancers.get(service)
        if balancer is None:
            balancer = self._balancers[service] = Balancer(clock=self._clock, chance=self._chance)
            balancer.update(self._registry.instances(service))
        return balancer

    def _update(self, service: str) -> None:
        if service in self._balancers:
            self._balancers[service].update(self._registry.instances(service))

    def _slot(self, operation: Operation[Any, Any]) -> asyncio.Semaphore:
        slot = self._slots.get(operation.full_name)
        if slot is None:
            slot = self._slots[operation.full_name] = asyncio.Semaphore(self._limits.calls)
        return slot


# ------------------------------------------------------------------------------------------------- what an answer means


def _refused(
    operation: Operation[Any, Any], requests: Sequence[Any], answer: HttpAnswer, instance: Instance
) -> Sequence[Outcome] | None:
    """The outcomes of a batch that was answered without outcomes; None if another instance may start it."""
    reason = answer.headers.get(NOT_STARTED)
    fields = {"operation": operation.full_name, "address": instance.address, "status": answer.status, "reason": reason}
    log.warning("rpc_refused", **fields)
    if reason is None:
        return not_known(operation, requests)
    if answer.status in TRY_NEXT_INSTANCE:
        return None
    # The instance does not understand the batch, and another one would not either: a bug on one of the two sides.
    return [Internal(operation=operation.full_name) for _ in requests]


def _seconds(text: str) -> float:
    """The value of a header, or 0; the balancer bounds it."""
    try:
        seconds = float(text)
    except ValueError:
        return 0.0
    return seconds if math.isfinite(seconds) else 0.0
