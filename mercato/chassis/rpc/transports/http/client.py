"""The calling end of the HTTP transport. See the top of this package."""

from __future__ import annotations

import random
import ssl
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import aiohttp

from mercato.chassis.contract import Context, Operation
from mercato.chassis.observability.clock import Clock
from mercato.chassis.rpc.codec import traceparent_of
from mercato.chassis.rpc.discovery import Instance, Registry
from mercato.chassis.rpc.transports.direct.client import (
    Answer,
    AnswerTooLarge,
    ClientLimits,
    ConnectionBroke,
    DirectTransport,
    NotConnected,
    seconds_of,
)
from mercato.chassis.rpc.transports.direct.wire import (
    AUTHORIZATION,
    BEARER,
    DRAINING_SECONDS,
    HEADER_WORD,
    LONGEST_REMAINING_MS,
    NOT_STARTED,
    TRACEPARENT,
    VERSION,
)
from mercato.chassis.rpc.transports.server_names import ServerName, by_registry
from mercato.chassis.rpc.trust import TokenSigner

from .refused_certificates import why_refused
from .wire import CONTENT_TYPE, PATH_PREFIX, REMAINING_MS

TRY_NEXT_INSTANCE: Final = frozenset({503, 404})
"""Statuses of answers that nothing was started, after which another instance may start the batch."""


class HttpClientLimits(ClientLimits, frozen=True, kw_only=True):
    """The limits of one calling process for each service."""

    connections: int = 512
    """Connections to one instance. In HTTP/1.1 a call in flight holds one."""
    keep_alive_seconds: float = 1.0
    """The client closes an unused connection before a draining server closes it: no call uses a closing connection."""


class HttpTransport(DirectTransport):
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
        self._http_limits = limits or HttpClientLimits()
        super().__init__(registry, clock, self._http_limits, chance)
        self._signer = signer
        self._tls = tls
        self._server_name = server_name
        self._scheme = "https" if tls else "http"
        self._headers = {"Content-Type": CONTENT_TYPE}
        if HEADER_WORD.fullmatch(version):
            self._headers[VERSION] = version
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        await super().close()
        if self._session is not None:
            await self._session.close()

    async def _exchange(
        self, instance: Instance, operation: Operation[Any, Any], contexts: Sequence[Context], body: bytes
    ) -> Answer:
        """Translates aiohttp's errors."""
        url = f"{self._scheme}://{instance.address}{PATH_PREFIX}{operation.service}/{operation.name}"
        name = self._server_name(instance)
        try:
            async with self._open_session().post(
                url,
                data=body,
                headers=self._headers_for(operation, contexts),
                allow_redirects=False,
                server_hostname=name if self._tls else None,
            ) as response:
                return _answer(response.status, response.headers, await self._read(response))
        # Only opening a connection raises these; the last one means that the address is malformed.
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError, aiohttp.InvalidURL) as error:
            raise NotConnected(str(error), why_refused(error, name)) from error
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
            limits = self._http_limits
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


def _answer(status: int, headers: Mapping[str, str], body: bytes) -> Answer:
    not_started = headers.get(NOT_STARTED)
    return Answer(
        str(status),
        body if status == 200 and not_started is None else None,
        not_started,
        seconds_of(headers.get(DRAINING_SECONDS, "")),
        status in TRY_NEXT_INSTANCE,
    )
