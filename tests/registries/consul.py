"""A stand-in for Consul: no server of it is to be had here.

It is written against the documentation of the HTTP API alone (https://developer.hashicorp.com/consul/api-docs: agent
services, agent checks, health, blocking queries), and does no more than the adapter asks.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Generator
from typing import Any, Final

from aiohttp import web

from mercato.testing.served import free_address
from mercato.testing.waiting import BOUND_SECONDS

POLL_SECONDS: Final = 0.02
FIRST_INDEX: Final = 7


@contextlib.contextmanager
def consul_beside(token: str = "") -> Generator[FakeConsul]:
    """A running one in a thread of its own, for tests that block while processes ask it."""
    fake, loop = FakeConsul(token), asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="consul")
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(fake.start(), loop).result(BOUND_SECONDS)
        yield fake
    finally:
        asyncio.run_coroutine_threadsafe(fake.stop(), loop).result(BOUND_SECONDS)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(BOUND_SECONDS)
        loop.close()


class FakeConsul:
    """One agent and its servers. With a `token`, it answers 403 to requests without that."""

    def __init__(self, token: str = "") -> None:
        self.url = f"http://{free_address()}"
        self.token = token
        self.services: dict[str, dict[str, Any]] = {}
        self.requests: list[str] = []
        self.index = FIRST_INDEX
        self.failure: tuple[int, str] | None = None
        """What it answers to everything."""
        self._until: dict[str, float] = {}
        """When the TTL of a check is over, by its id."""
        self._passing: set[str] = set()
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        app = web.Application(middlewares=[self._middleware])
        app.router.add_put("/v1/agent/service/register", self._register)
        app.router.add_put("/v1/agent/service/deregister/{id}", self._deregister)
        app.router.add_put("/v1/agent/check/update/{id}", self._update)
        app.router.add_get("/v1/health/service/{name}", self._health)
        self._runner = web.AppRunner(app, shutdown_timeout=0)
        await self._runner.setup()
        host, _, port = self.url.partition("://")[2].rpartition(":")
        await web.TCPSite(self._runner, host, int(port), reuse_address=True).start()

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    def forget(self) -> None:
        """Everything, as servers do that were set up anew: their index begins again."""
        self.services.clear()
        self._until.clear()
        self.index = 1

    @web.middleware
    async def _middleware(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.requests.append(f"{request.method} {request.path_qs}")
        if self.failure is not None:
            return web.Response(status=self.failure[0], text=self.failure[1])
        if self.token and request.headers.get("X-Consul-Token") != self.token:
            return web.Response(status=403, text="Permission denied: anonymous token lacks permission 'service:write'")
        return await handler(request)

    async def _register(self, request: web.Request) -> web.Response:
        said = await request.json()
        check = said["Check"]
        assert check["DeregisterCriticalServiceAfter"] == "1m"
        assert check["Status"] == "passing", "a check is critical by default"
        assert isinstance(said["Port"], int)
        self.services[said["ID"]] = said
        self._until[check["CheckID"]] = time.monotonic() + float(check["TTL"].removesuffix("s"))
        self.index += 1
        return web.Response()

    async def _deregister(self, request: web.Request) -> web.Response:
        said = self.services.pop(request.match_info["id"], None)
        if said is None:
            return web.Response(status=404, text=f"Unknown service ID {request.match_info['id']!r}")
        del self._until[said["Check"]["CheckID"]]
        self.index += 1
        return web.Response()

    async def _update(self, request: web.Request) -> web.Response:
        id_ = request.match_info["id"]
        assert (await request.json())["Status"] == "passing"
        if id_ not in self._until:
            return web.Response(status=404, text=f'Unknown check ID "{id_}"')
        ttl = next(said["Check"]["TTL"] for said in self.services.values() if said["Check"]["CheckID"] == id_)
        self._until[id_] = time.monotonic() + float(ttl.removesuffix("s"))
        return web.Response()

    async def _health(self, request: web.Request) -> web.Response:
        asked = int(request.query.get("index", "0"))
        end = time.monotonic() + float(request.query.get("wait", "300s").removesuffix("s"))
        self._expire()
        while asked and self.index <= asked and time.monotonic() < end:
            await asyncio.sleep(POLL_SECONDS)
            self._expire()
        assert request.query["passing"] == "true"
        found = [
            {"Node": {"Node": "here", "Address": "127.0.0.1"}, "Service": _shown(said), "Checks": []}
            for said in self.services.values()
            if said["Name"] == request.match_info["name"] and said["Check"]["CheckID"] in self._passing
        ]
        return web.json_response(found, headers={"X-Consul-Index": str(self.index)})

    def _expire(self) -> None:
        """A check whose state has changed is a change."""
        now = time.monotonic()
        passing = {id_ for id_, until in self._until.items() if until > now}
        if passing != self._passing:
            self._passing = passing
            self.index += 1


def _shown(said: dict[str, Any]) -> dict[str, Any]:
    return {
        "ID": said["ID"], "Service": said["Name"], "Tags": said["Tags"], "Address": said["Address"],
        "Port": said["Port"], "Meta": said["Meta"], "Weights": {"Passing": 1, "Warning": 1},
    }  # fmt: skip
