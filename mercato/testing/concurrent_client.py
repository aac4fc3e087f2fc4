"""Many requests at once to one running shop, each on a connection of its own up to a limit."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any, Self

import aiohttp

from .responses import Response
from .waiting import BOUND_SECONDS

CONNECTIONS = 400
"""At once: open files are limited to a thousand or so by default, in this process and in the shop."""


class ConcurrentClient:
    """Sends requests, and sends them again when the shop asks for it or closes the connection.

    The shop may close a connection that was idle, or that sent nothing for seconds because this machine was busy. The
    client then repeats requests that are safe to repeat. `statuses` counts every response, final or not.
    """

    def __init__(self, url: str, connections: int = CONNECTIONS) -> None:
        self.statuses: Counter[int] = Counter()
        self._url = url
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=connections),
            timeout=aiohttp.ClientTimeout(total=None, sock_read=BOUND_SECONDS),
        )

    async def request(self, method: str, path: str, body: Any = None, key: str | None = None) -> Response:
        """Sends a request until its response is final.

        Raises `aiohttp.ClientConnectionError` where a request that is not safe to repeat lost its connection.
        """
        headers = {"Idempotency-Key": key} if key else {}
        while True:
            try:
                async with self._session.request(method, self._url + path, json=body, headers=headers) as answer:
                    response = Response(
                        answer.status, {k.lower(): v for k, v in answer.headers.items()}, await answer.read()
                    )
            except aiohttp.ClientConnectionError:
                if method != "GET" and not key:
                    raise
                await asyncio.sleep(0.1)
                continue
            self.statuses[response.status] += 1
            if response.is_final:
                return response
            await asyncio.sleep(min(1.0, float(response.headers.get("retry-after", 1.0))))

    async def orders(self, path: str) -> list[dict[str, Any]]:
        """All orders of a list, over all its pages."""
        found: list[dict[str, Any]] = []
        before = ""
        while True:
            page = (await self.request("GET", f"{path}{'&' if '?' in path else '?'}limit=200{before}")).json
            found += page
            if len(page) < 200:
                return found
            before = f"&before={page[-1]['id']}"

    async def product(self, sku: str, pieces: int) -> int:
        """The id of a new product, of which so many pieces are in stock."""
        price = {"amount": "10.00", "currency": "USD"}
        made = await self.request("POST", "/products", {"sku": sku, "name": sku, "price": price, "category": "things"})
        assert made.status == 201, made.body
        counted = await self.request("PUT", f"/products/{made.json['id']}/stock", {"on_hand": pieces})
        assert counted.status == 200, counted.body
        return made.json["id"]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()
