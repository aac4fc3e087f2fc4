"""A real shop as the provider of pacts: every service on a host of its own, over the http transport, and the REST API.

    Pact's verifier ─► ProviderBridge ─► POST /rpc/inventory/reserve of the host of inventory, in MessagePack
                             │
                             ├─► the gateway, for every other path
                             ├─  /_pact/state: makes a state
                             └─  /_pact/message: gives an event

The bridge changes the encoding and nothing else: it knows no message of a contract. It sends a call as the consumer
that the pact names, with its token, so that the provider also decides whether that consumer may call it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
from collections.abc import AsyncGenerator, Callable, Mapping
from pathlib import Path
from typing import Any, Final, Self

# Read by Pact's core when it is loaded: it reports its use to its makers otherwise.
os.environ["PACT_DO_NOT_TRACK"] = "true"

import aiohttp
import msgspec
from aiohttp import web
from pact import Verifier

from mercato.chassis.hosting.keys import service_secrets, signing_seed
from mercato.chassis.rpc.transports.direct.wire import AUTHORIZATION, BEARER
from mercato.chassis.rpc.transports.http.wire import CONTENT_TYPE, PATH_PREFIX, REMAINING_MS
from mercato.chassis.rpc.trust import TokenSigner
from mercato.testing.cluster import Cluster
from mercato.testing.harness import TEST_SECRET
from mercato.testing.shop import Shop
from mercato.testing.split_hosts import SplitHosts
from pacts.rpc import HOST, JSON
from pacts.states import ProviderStates

CONSUMER: Final = "pact-consumer"
"""The header by which the verifier says whose pact it is."""
REMAINING: Final = 60_000.0
ENVELOPE: Final[Mapping[str, Any]] = {"remaining_ms": REMAINING, "trace_id": "0" * 32, "request_id": "pact"}
OPTIONS: Final = {
    "MERCATO_SANDBOX_STATEMENT_DELAY_SECONDS": "0",
    "MERCATO_ORDERS_CUSTOMER_OPEN_ORDERS": "0",
}


Change = Callable[[Any], Any]


def unchanged(answer: Any) -> Any:
    return answer


class ProviderBridge:
    """The HTTP server that Pact verifies."""

    def __init__(self, shop: Shop) -> None:
        self._shop = shop
        self.states = ProviderStates(shop)
        self._session = aiohttp.ClientSession()
        self._signers: dict[str, TokenSigner] = {}
        self._failures: list[str] = []
        """States that could not be made in this verification: the verifier does not show why."""
        application = web.Application()
        application.router.add_post("/_pact/state", self._state)
        application.router.add_post("/_pact/message", self._message)
        application.router.add_post(f"{PATH_PREFIX}{{service}}/{{operation}}", self._call)
        application.router.add_route("*", "/{path:.*}", self._forward)
        self._runner = web.AppRunner(application, access_log=None)
        self._port = 0
        self.change: Change = unchanged
        """What a test does to the answers of the provider and to its events, as an error in its code would."""

    @classmethod
    async def start(cls, shop: Shop) -> Self:
        bridge = cls(shop)
        await bridge._runner.setup()
        site = web.TCPSite(bridge._runner, HOST, 0)
        await site.start()
        bridge._port = bridge._runner.addresses[0][1]
        return bridge

    async def close(self) -> None:
        await self._runner.cleanup()
        await self._session.close()

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self._port}"

    async def verify(self, pact: Path, only: str | None = None) -> Verification:
        """Has Pact's verifier replay a pact; with `only`, one interaction of it.

        The verifier waits for this event loop, which answers it: so it has a thread of its own.
        """
        return await asyncio.to_thread(self._verify, pact, only)

    def _verify(self, pact: Path, only: str | None) -> Verification:
        content = json.loads(pact.read_text())
        self._failures.clear()
        verifier = (
            Verifier(content["provider"]["name"], host=HOST)
            .add_transport(url=self.url)
            .add_transport(protocol="message", port=self._port, path="/_pact/message", scheme="http")
            .state_handler(f"{self.url}/_pact/state", body=True)
            .add_custom_header(CONSUMER, content["consumer"]["name"])
            .set_error_on_empty_pact(enabled=True)
            .set_coloured_output(enabled=False)
            .add_source(pact)
        )
        if only is not None:
            verifier.filter(description=re.escape(only))
        with contextlib.suppress(RuntimeError):  # it says so in its results
            verifier.verify()
        return Verification(verifier.results, verifier.output(strip_ansi=True), tuple(self._failures))

    # ------------------------------------------------------------------------------------------------------ its answers

    async def _state(self, request: web.Request) -> web.Response:
        wanted = await request.json()
        try:
            if wanted["state"]:  # an interaction without a state is announced too
                await self.states.make(wanted["state"], wanted["params"])
        except Exception as error:  # an edge: Pact reports the text with the interaction
            self._failures.append(f"{wanted['state']!r} cannot be made: {type(error).__name__}: {error}")
            # Not 500, which the verifier tries again, with pauses.
            return web.Response(status=422, text=self._failures[-1])
        return web.json_response({})

    async def _message(self, request: web.Request) -> web.Response:
        wanted = await request.json()
        [state] = wanted["providerStates"]
        body = await self.states.message(state["name"], state["params"])
        return web.Response(body=json.dumps(self.change(json.loads(body))).encode(), content_type=JSON)

    async def _call(self, request: web.Request) -> web.Response:
        service, operation = request.match_info["service"], request.match_info["operation"]
        sent = [{**each, **ENVELOPE} for each in msgspec.json.decode(await request.read())]
        headers = {
            "Content-Type": CONTENT_TYPE,
            REMAINING_MS: str(REMAINING),
            AUTHORIZATION: BEARER + self._signer(request.headers[CONSUMER]).token(service),
        }
        url = f"http://{self._address(service)}{PATH_PREFIX}{service}/{operation}"
        async with self._session.post(url, data=msgspec.msgpack.encode(sent), headers=headers) as response:
            body = await response.read()
            if response.status != 200:
                return web.Response(status=response.status, body=body, content_type=JSON)
        answer = json.loads(msgspec.json.encode(msgspec.msgpack.decode(body)))
        return web.Response(body=json.dumps(self.change(answer)).encode(), content_type=JSON)

    async def _forward(self, request: web.Request) -> web.Response:
        kept = ("content-type", "idempotency-key", "prefer", "accept")
        headers = {name: request.headers[name] for name in kept if name in request.headers}
        if "authorization" in request.headers:
            headers["Authorization"] = f"Bearer {await self.states.token_of(request.headers['authorization'])}"
        async with self._session.request(
            request.method,
            self._shop.url + request.raw_path,
            data=await request.read(),
            headers=headers,
            allow_redirects=False,
        ) as response:
            body = json.dumps(self.change(json.loads(await response.read()))).encode()
            content_type = response.headers.get("Content-Type", JSON)
            return web.Response(status=response.status, body=body, headers={"Content-Type": content_type})

    def _address(self, service: str) -> str:
        host = self._shop.harness.host
        if not isinstance(host, SplitHosts):
            raise AssertionError("the shop of a provider is split")
        [instance] = host._registry.instances(service)
        return instance.address

    def _signer(self, consumer: str) -> TokenSigner:
        if consumer not in self._signers:
            seed = signing_seed(service_secrets(TEST_SECRET, [consumer])[consumer])
            self._signers[consumer] = TokenSigner(consumer, seed, self._shop.harness.host.clock)
        return self._signers[consumer]


class Verification(msgspec.Struct, frozen=True):
    """What Pact's verifier has found."""

    results: dict[str, Any]
    output: str
    failed_states: tuple[str, ...]
    """Those that could not be made, and why."""

    @property
    def is_kept(self) -> bool:
        return self.results["result"] is True

    @property
    def report(self) -> str:
        return "\n".join([*self.failed_states, self.output])


@contextlib.asynccontextmanager
async def provider(cluster: Cluster) -> AsyncGenerator[ProviderBridge]:
    """A shop that requires tokens, with every service on a host of its own."""
    shop = await Shop.start(cluster, "http", is_open=False, options=OPTIONS)
    try:
        bridge = await ProviderBridge.start(shop)
        try:
            yield bridge
        finally:
            await bridge.close()
    finally:
        await shop.close()
