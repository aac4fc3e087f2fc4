"""Reads the stats of each instance of a service over HTTP: `GET /rpc/orders`."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence
from typing import Final

import aiohttp
import msgspec

from mercato.chassis.rpc.discovery import Instance, Registry
from mercato.chassis.rpc.stats import Inspected, InstanceStats
from mercato.chassis.rpc.transports.direct.wire import AUTHORIZATION, BEARER, NOT_STARTED
from mercato.chassis.rpc.transports.server_names import ServerName, by_registry
from mercato.chassis.rpc.trust import TokenSigner

from .refused_certificates import why_refused
from .wire import PATH_PREFIX

ANSWER_SECONDS: Final = 1.0
NO_ANSWER_IN_THE_CLEAR: Final = (
    "it closes the connection without an answer; if it encrypts, set MERCATO_TLS_CA here too"
)


class Inspector:
    """Asks all instances in `registry`, as the caller whose tokens `signer` signs."""

    def __init__(
        self,
        registry: Registry,
        signer: TokenSigner,
        *,
        tls: ssl.SSLContext | None = None,
        server_name: ServerName = by_registry,
    ) -> None:
        self._registry = registry
        self._signer = signer
        self._tls = tls
        self._server_name = server_name
        self._session: aiohttp.ClientSession | None = None

    async def inspect(self, service: str) -> Sequence[Inspected]:
        """All instances of a service, in the order of the registry. Takes a second at most."""
        instances = self._registry.instances(service)
        return await asyncio.gather(*(self._ask(instance) for instance in instances))

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def _ask(self, instance: Instance) -> Inspected:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, ssl=self._tls or False),
                timeout=aiohttp.ClientTimeout(total=ANSWER_SECONDS),
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        scheme = "https" if self._tls else "http"
        url = f"{scheme}://{instance.address}{PATH_PREFIX}{instance.service}"
        headers = {AUTHORIZATION: BEARER + self._signer.token(instance.service)}
        name = self._server_name(instance)
        try:
            async with self._session.get(
                url, headers=headers, allow_redirects=False, server_hostname=name if self._tls else None
            ) as response:
                body = await response.read()
        except TimeoutError:
            return Inspected(instance.address, problem="no answer within a second")
        except aiohttp.ServerDisconnectedError:
            return Inspected(instance.address, problem="no answer" if self._tls else NO_ANSWER_IN_THE_CLEAR)
        except (aiohttp.ClientError, OSError) as error:
            return Inspected(instance.address, problem=why_refused(error, name) or "no connection")
        if response.status != 200:
            return Inspected(instance.address, problem=response.headers.get(NOT_STARTED, f"status {response.status}"))
        try:
            return Inspected(instance.address, msgspec.json.decode(body, type=InstanceStats))
        except msgspec.MsgspecError:
            return Inspected(instance.address, problem="an answer that is none of ours")
