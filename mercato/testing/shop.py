"""A whole shop over real HTTP, inside the test's process: every service, the gateway, a socket on loopback.

For tests of what the API answers. Tests of processes (start, stop, kill -9) start the real command instead.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any, Self

import aiohttp
import msgspec

from mercato import topology
from mercato.chassis.hosting.host import TransportName
from mercato.chassis.http import bind
from mercato.contracts.roles import STAFF
from mercato.contracts.users import Register, Users
from mercato.testing.harness import Cluster, Rig

DEMO_PASSWORD = "demo-password"
STAFF_EMAIL = "staff@example.com"
STAFF_PASSWORD = "a password for the tests"


class Reply(msgspec.Struct, frozen=True):
    """An answer, as a client sees it. `json` is None where the body is not JSON."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    json: Any

    @property
    def code(self) -> str:
        """The code of a problem."""
        return self.json["code"]

    @property
    def wrong_fields(self) -> set[str]:
        return {error["field"] for error in self.json.get("errors", [])}


class Shop:
    """A running shop with the demo data, and a client for it. Alice is user 1, Bob is user 2."""

    def __init__(self, rig: Rig, url: str, stop: asyncio.Event, serving: asyncio.Task[None], *, is_open: bool) -> None:
        self.rig = rig
        self.url = url
        self.is_open = is_open
        self._stop = stop
        self._serving = serving
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        self._tokens: dict[str, str] = {}

    @classmethod
    async def start(
        cls,
        cluster: Cluster,
        transport: TransportName = "local",
        *,
        is_open: bool = True,
        options: Mapping[str, str] | None = None,
    ) -> Self:
        rig = Rig(cluster, transport, options)
        await rig.open(**topology.builds())
        for service in rig.host.services.values():
            if service.seed_demo:
                await service.seed_demo()
        listener = bind("127.0.0.1", 0)
        address = ("127.0.0.1", listener.getsockname()[1])
        app = topology.gateway(rig.host, open_to=address if is_open else None)
        stop, ready = asyncio.Event(), asyncio.Event()
        server = topology.server(app, listener, rig.host.telemetry, ready.set)
        serving = asyncio.create_task(server.run_until(stop))
        await ready.wait()
        shop = cls(rig, f"http://127.0.0.1:{address[1]}", stop, serving, is_open=is_open)
        if not is_open:
            await shop._make_staff()
        return shop

    async def close(self) -> None:
        await self._session.close()
        self._stop.set()
        await self._serving
        await self.rig.close()

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
    ) -> Reply:
        """Sends `body` as JSON, or `raw` as it is (give the Content-Type then)."""
        sent = dict(headers or {})
        if token is not None:
            sent["Authorization"] = f"Bearer {token}"
        data = raw
        if body is not None:
            data = json.dumps(body).encode()
            sent.setdefault("Content-Type", "application/json")
        async with self._session.request(
            method, self.url + path, data=data, headers=sent, allow_redirects=False
        ) as answer:
            content = await answer.read()
            is_json = "json" in answer.headers.get("Content-Type", "")
            value = json.loads(content) if is_json and content else None
            return Reply(answer.status, {k.lower(): v for k, v in answer.headers.items()}, content, value)

    async def get(self, path: str, **options: Any) -> Reply:
        return await self.request("GET", path, **options)

    async def post(self, path: str, body: Any = None, **options: Any) -> Reply:
        return await self.request("POST", path, body, **options)

    async def patch(self, path: str, body: Any = None, **options: Any) -> Reply:
        return await self.request("PATCH", path, body, **options)

    async def put(self, path: str, body: Any = None, **options: Any) -> Reply:
        return await self.request("PUT", path, body, **options)

    # ------------------------------------------------------------------------------------------------------ tokens

    async def token(self, email: str, password: str = DEMO_PASSWORD) -> str:
        """An access token; signed in once for each e-mail."""
        if email not in self._tokens:
            reply = await self.post("/login", {"email": email, "password": password})
            assert reply.status == 200, reply.body
            self._tokens[email] = reply.json["access_token"]
        return self._tokens[email]

    async def alice(self) -> str:
        return await self.token("alice@example.com")

    async def bob(self) -> str:
        return await self.token("bob@example.com")

    async def staff(self) -> str:
        return await self.token(STAFF_EMAIL, STAFF_PASSWORD)

    async def _make_staff(self) -> None:
        users = self.rig.client(Users)
        account = Register(email=STAFF_EMAIL, name="Staff", password=STAFF_PASSWORD, role=STAFF)
        await topology.as_the_shop(self.rig.host, lambda: users.register(account))
