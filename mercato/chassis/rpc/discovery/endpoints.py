"""Requests to a registry that has several endpoints: to the one that answered last, and to the next if it fails."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Final

import aiohttp
import msgspec

from .leased import StoreUnavailable

CONNECT_SECONDS: Final = 1.0
ANSWER_SECONDS: Final = 1.5
"""How long one endpoint may take; then the next one is asked."""
ANSWER_BYTES: Final = 4 * 1024 * 1024
"""The largest answer. A record has some 300 bytes."""
LINE_BYTES: Final = 1024 * 1024
"""The longest line of a stream; a longer one ends the stream."""


class RegistryAnswer(msgspec.Struct, frozen=True):
    """A complete answer of an endpoint."""

    endpoint: int
    status: int
    headers: Mapping[str, str]
    body: bytes


class Endpoints:
    """`urls` are `http://` or `https://` with host and port; `name` names the registry in messages."""

    def __init__(self, name: str, urls: Sequence[str], tls: ssl.SSLContext | None = None) -> None:
        assert urls
        self._name = name
        self._urls = tuple(urls)
        self._tls = tls
        self._current = 0
        self._session: aiohttp.ClientSession | None = None

    def open(self) -> None:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=self._tls or True),
            timeout=aiohttp.ClientTimeout(sock_connect=CONNECT_SECONDS),
            cookie_jar=aiohttp.DummyCookieJar(),
            read_bufsize=LINE_BYTES,
        )

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    def where(self, endpoint: int) -> str:
        """The name of an endpoint in messages."""
        return f"{self._name} at {self._urls[endpoint].partition('://')[2]}"

    def unavailable(self, endpoint: int, why: str) -> StoreUnavailable:
        """The error of an endpoint that cannot be used now; later requests go to the next one."""
        if self._current == endpoint:
            self._current = (endpoint + 1) % len(self._urls)
        return StoreUnavailable(f"{self.where(endpoint)} {why}")

    async def request(
        self,
        method: str,
        path: str,
        *,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        seconds: float = ANSWER_SECONDS,
    ) -> RegistryAnswer:
        """The answer of the first endpoint that gives one, whatever its status; each has `seconds`.

        An endpoint may have done a request whose connection broke: only repeatable requests are sent here. Raises
        `StoreUnavailable` if none answers.
        """
        error: StoreUnavailable | None = None
        for _ in self._urls:
            try:
                return await self._ask(method, path, body, headers, seconds)
            except StoreUnavailable as failure:
                error = error or failure
        assert error is not None
        raise error

    async def _ask(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str] | None, seconds: float
    ) -> RegistryAnswer:
        timeout = aiohttp.ClientTimeout(total=seconds, sock_connect=CONNECT_SECONDS)
        endpoint = self._current
        async with self._connected(endpoint, method, path, body, headers, timeout) as response:
            parts, size = list[bytes](), 0
            async for part in response.content.iter_any():
                parts.append(part)
                size += len(part)
                if size > ANSWER_BYTES:
                    response.close()
                    raise self.unavailable(endpoint, f"answers with more than {ANSWER_BYTES} bytes")
            return RegistryAnswer(endpoint, response.status, response.headers, b"".join(parts))

    @contextlib.asynccontextmanager
    async def _connected(
        self,
        endpoint: int,
        method: str,
        path: str,
        body: bytes | None,
        headers: Mapping[str, str] | None,
        timeout: aiohttp.ClientTimeout,
    ) -> AsyncGenerator[aiohttp.ClientResponse]:
        """A response whose headers have arrived. Translates aiohttp's errors."""
        assert self._session is not None, "it is not open"
        url = self._urls[endpoint] + path
        try:
            async with self._session.request(
                method, url, data=body, headers=headers, timeout=timeout, allow_redirects=False
            ) as response:
                yield response
        except aiohttp.ClientConnectorCertificateError as error:
            why = f"has a certificate that is not accepted ({error.certificate_error})"
            raise self.unavailable(endpoint, why) from error
        except TimeoutError as error:
            raise self.unavailable(endpoint, "does not answer in time") from error
        except aiohttp.ClientConnectorError as error:
            reason = error.os_error.strerror or type(error.os_error).__name__
            raise self.unavailable(endpoint, f"cannot be connected to ({reason})") from error
        except (aiohttp.ClientError, OSError) as error:
            raise self.unavailable(endpoint, f"broke the connection off ({type(error).__name__})") from error

    async def stream(
        self, path: str, *, body: bytes, headers: Mapping[str, str] | None = None, idle_seconds: float
    ) -> AsyncGenerator[bytes]:
        """The lines of an endless answer of the current endpoint to a POST, until none arrives for `idle_seconds`.

        Raises `StoreUnavailable` if the connection breaks.
        """
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=idle_seconds)
        async with self._connected(self._current, "POST", path, body, headers, timeout) as response:
            while True:
                try:
                    line = await response.content.readline()
                except (aiohttp.SocketTimeoutError, ValueError):  # ValueError: the line is too long
                    response.close()
                    return
                if not line:
                    return
                yield line
