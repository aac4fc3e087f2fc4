"""Many clients at once against one running shop, each on a connection of its own, as far as there are that many."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any, Self

import aiohttp
import msgspec

CONNECTIONS = 400
"""At once: open files are limited to a thousand or so by default, in this process and in the shop."""
NOT_FINAL = frozenset({409, 429, 503, 504})
ANSWER_SECONDS = 60.0


class Told(msgspec.Struct, frozen=True):
    """An answer, as bytes."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def is_final(self) -> bool:
        """Not, when the shop asks to send the same again, or its outcome is unknown (504)."""
        return self.status != 504 and not (self.status in NOT_FINAL and "retry-after" in self.headers)


class Crowd:
    """Sends requests, and the same again when it is asked to. `statuses` counts every answer, final or not."""

    def __init__(self, url: str, connections: int = CONNECTIONS) -> None:
        self.statuses: Counter[int] = Counter()
        self._url = url
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=connections),
            timeout=aiohttp.ClientTimeout(total=None, sock_read=ANSWER_SECONDS),
        )

    async def ask(self, method: str, path: str, body: Any = None, key: str | None = None) -> Told:
        """Sends a request until its answer is final."""
        headers = {"Idempotency-Key": key} if key else {}
        while True:
            async with self._session.request(method, self._url + path, json=body, headers=headers) as answer:
                told = Told(answer.status, {k.lower(): v for k, v in answer.headers.items()}, await answer.read())
            self.statuses[told.status] += 1
            if told.is_final:
                return told
            await asyncio.sleep(min(1.0, float(told.headers.get("retry-after", 1.0))))

    async def orders(self, path: str) -> list[dict[str, Any]]:
        """All orders of a list, over all its pages."""
        found: list[dict[str, Any]] = []
        before = ""
        while True:
            page = (await self.ask("GET", f"{path}{'&' if '?' in path else '?'}limit=200{before}")).json
            found += page
            if len(page) < 200:
                return found
            before = f"&before={page[-1]['id']}"

    async def product(self, sku: str, pieces: int) -> int:
        """A new product, of which there is so much."""
        price = {"amount": "10.00", "currency": "USD"}
        made = await self.ask("POST", "/products", {"sku": sku, "name": sku, "price": price, "category": "crowd"})
        assert made.status == 201, made.body
        counted = await self.ask("PUT", f"/products/{made.json['id']}/stock", {"on_hand": pieces})
        assert counted.status == 200, counted.body
        return made.json["id"]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()
