"""A whole shop over real HTTP, inside the test's process: every service, the gateway, a socket on loopback.

For tests of the API. Tests of processes (start, stop, kill -9) start the real command instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import aiohttp

from mercato import topology
from mercato.chassis.http import HttpLimits, LoadLimits, Shedder, bind
from mercato.contracts.money import DEFAULT_CURRENCY
from mercato.contracts.roles import STAFF
from mercato.contracts.users import Register, Users
from mercato.gateway.app import Gateway
from mercato.gateway.streams.limits import StreamLimits

from .builds import builds
from .cluster import Cluster
from .harness import TEST_CALL_SECONDS, ServiceHarness
from .responses import Response
from .transports import AnyTransport

DEMO_PASSWORD = "demo-password"
STAFF_EMAIL = "staff@example.com"
STAFF_PASSWORD = "a password for the tests"
PATIENT = HttpLimits(response_grace_seconds=TEST_CALL_SECONDS)
"""On a busy machine all takes longer."""


class ShopClient:
    """A client of a running shop with the demo data. Alice is user 1, Bob is user 2."""

    def __init__(self, url: str, default_token: str | None = None) -> None:
        """`default_token`: the access token of requests that name none."""
        self.url = url
        self.default_token = default_token
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        self._tokens: dict[str, str] = {}

    async def close(self) -> None:
        await self._session.close()

    # ---------------------------------------------------------------------------------------------------- requests

    async def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        raw: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        token: str | None = None,
    ) -> Response:
        """Sends `body` as JSON, or `raw` as it is (give the Content-Type then)."""
        sent = dict(headers or {})
        if (token := token or self.default_token) is not None:
            sent["Authorization"] = f"Bearer {token}"
        data = raw
        if body is not None:
            data = json.dumps(body).encode()
            sent.setdefault("Content-Type", "application/json")
        async with self._session.request(
            method, self.url + path, data=data, headers=sent, allow_redirects=False
        ) as answer:
            # A stream has no end; its messages are read with `event_stream`.
            body = b"" if answer.content_type == "text/event-stream" else await answer.read()
            return Response(answer.status, {k.lower(): v for k, v in answer.headers.items()}, body)

    async def get(self, path: str, **options: Any) -> Response:
        return await self.request("GET", path, **options)

    async def post(self, path: str, body: Any = None, **options: Any) -> Response:
        return await self.request("POST", path, body, **options)

    async def patch(self, path: str, body: Any = None, **options: Any) -> Response:
        return await self.request("PATCH", path, body, **options)

    async def put(self, path: str, body: Any = None, **options: Any) -> Response:
        return await self.request("PUT", path, body, **options)

    # ------------------------------------------------------------------------------------------------------ tokens

    async def token(self, email: str, password: str = DEMO_PASSWORD) -> str:
        """An access token; it signs in once for each e-mail."""
        if email not in self._tokens:
            reply = await self.post("/login", {"email": email, "password": password})
            assert reply.status == 200, reply.body
            self._tokens[email] = reply.json["access_token"]
        return self._tokens[email]

    async def alice(self) -> str:
        return await self.token("alice@example.com")

    async def bob(self) -> str:
        return await self.token("bob@example.com")


class Shop(ShopClient):
    """A shop that runs here, and a client for it."""

    app: Gateway
    load: Shedder
    """The gateway's requests in work and in the queue."""

    def __init__(
        self, harness: ServiceHarness, url: str, stop: asyncio.Event, serving: asyncio.Task[None], *, is_open: bool
    ) -> None:
        super().__init__(url)
        self.harness = harness
        self.is_open = is_open
        self._stop = stop
        self._serving = serving
        self.grpc_address = ""
        self.stack = contextlib.AsyncExitStack()
        """What ends before the shop."""

    @classmethod
    async def start(
        cls,
        cluster: Cluster,
        transport: AnyTransport = "local",
        *,
        is_open: bool = True,
        options: Mapping[str, str] | None = None,
        currency: str = DEFAULT_CURRENCY,
        harness_class: type[ServiceHarness] = ServiceHarness,
        load: LoadLimits | None = None,
        cors_origins: Sequence[str] = (),
        log_requests: bool = False,
        slow_seconds: float = math.inf,
        metrics_token: str = "",
        streams: StreamLimits | None = None,
        limits: HttpLimits | None = None,
        has_grpc: bool = False,
    ) -> Self:
        """`slow_seconds`: by default no request is slow, however long a busy machine takes for it."""
        harness = harness_class(cluster, transport, options)
        await harness.open(builds())
        for contract in topology.SERVICES.values():
            harness.client(contract)  # calls of services and the gateway have as long as their caller
        for service in harness.host.services.values():
            if service.seed_demo:
                await service.seed_demo()
        listener = bind("127.0.0.1", 0)
        address = ("127.0.0.1", listener.getsockname()[1])
        app = topology.gateway(
            harness.host,
            open_to=address if is_open else None,
            currency=currency,
            load=load,
            cors_origins=cors_origins,
            log_requests=log_requests,
            slow_seconds=slow_seconds,
            metrics_token=metrics_token,
            streams=streams,
        )
        stop, ready = asyncio.Event(), asyncio.Event()
        server = topology.server(app, listener, harness.host.telemetry, ready.set, limits=limits or PATIENT)
        serving = asyncio.create_task(server.run_until(stop))
        await ready.wait()
        shop = cls(harness, f"http://127.0.0.1:{address[1]}", stop, serving, is_open=is_open)
        shop.app, shop.load = app, app.load
        app.seconds = TEST_CALL_SECONDS
        if has_grpc:
            shop.grpc_address = await shop.stack.enter_async_context(
                topology.public_grpc(app, harness.host.telemetry, "127.0.0.1", 0)
            )
        if not is_open:
            await shop._register_staff()
        return shop

    async def close(self) -> None:
        await super().close()
        await self.stack.aclose()
        self._stop.set()
        await self._serving
        await self.harness.close()

    async def staff(self) -> str:
        return await self.token(STAFF_EMAIL, STAFF_PASSWORD)

    async def _register_staff(self) -> None:
        users = self.harness.client(Users)
        account = Register(email=STAFF_EMAIL, name="Staff", password=STAFF_PASSWORD, role=STAFF)
        await topology.as_the_shop(self.harness.host, lambda: users.register(account))
