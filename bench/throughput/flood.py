"""A flood of sign-ins: more than the shop can hash, from several addresses, with right and with wrong passwords.

The shop lets each address try 20 times a second. Wrong passwords are for accounts that there are not, each another one:
they cost a hash as right ones do, and none of them has to wait for the one before.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from typing import Final

import aiohttp

from bench.throughput.load import LoadFailed

SOURCES: Final = tuple(f"127.0.0.{n}" for n in range(11, 19))
"""Addresses of this machine that the sign-ins come from."""
PER_SECOND: Final = 20
"""Of each address."""
UNDER_WAY: Final = 16
"""Of each address at most: one that is due meanwhile is left out."""
MOST: Final = 20_000
"""Sign-ins of one flood, from all addresses."""
PEOPLE: Final = (("alice@example.com", "demo-password"), ("bob@example.com", "demo-password"))
SIGNED_IN: Final = 200
WRONG: Final = 401
ANSWERS: Final = frozenset({SIGNED_IN, WRONG, 429, 504})
"""429: refused before the hash; 504: its time was over before a thread was free."""


class Flood:
    """What was answered so far, by status."""

    def __init__(self, address: str) -> None:
        self.answers: Counter[int] = Counter()
        self._url = f"http://{address}/login"
        self._bodies = _bodies()

    async def pour(self, source: str) -> None:
        """Sends until it is cancelled, or has sent its share of `MOST`; then waits for what is under way."""
        connector = aiohttp.TCPConnector(limit=0, local_addr=(source, 0))
        loop, under_way = asyncio.get_running_loop(), set[asyncio.Task[None]]()
        async with aiohttp.ClientSession(connector=connector) as session:
            try:
                due = loop.time()
                for _ in range(MOST // len(SOURCES)):
                    if len(under_way) < UNDER_WAY:
                        task = asyncio.create_task(self._sign_in(session))
                        under_way.add(task)
                        task.add_done_callback(under_way.discard)
                    due += 1 / PER_SECOND
                    await asyncio.sleep(due - loop.time())
            finally:
                await asyncio.gather(*under_way)

    async def _sign_in(self, session: aiohttp.ClientSession) -> None:
        async with session.post(self._url, json=next(self._bodies)) as answer:
            await answer.read()
            self.answers[answer.status] += 1


@contextlib.asynccontextmanager
async def flooded(address: str) -> AsyncGenerator[Flood]:
    """A flood of the shop at HOST:PORT for the time of a block, once it is under way.

    Raises `LoadFailed` for an answer that the shop must not give, and where nothing was hashed.
    """
    flood = Flood(address)
    pouring = [asyncio.create_task(flood.pour(source)) for source in SOURCES]
    try:
        async with asyncio.timeout(60):
            while not flood.answers[SIGNED_IN] or not flood.answers[WRONG]:
                if any(task.done() for task in pouring):
                    break
                await asyncio.sleep(0.05)
        flood.answers.clear()
        yield flood
    finally:
        for task in pouring:
            task.cancel()
        ended = await asyncio.gather(*pouring, return_exceptions=True)
    if failed := [each for each in ended if isinstance(each, Exception)]:
        raise LoadFailed(f"a sign-in was not answered: {failed[0]!r}") from failed[0]
    check(flood.answers)


def check(answers: Counter[int]) -> None:
    """Raises `LoadFailed` where sign-ins were not answered as they must be."""
    if unexpected := sorted(answers.keys() - ANSWERS):
        raise LoadFailed(f"sign-ins were answered with {unexpected}")
    if not answers[SIGNED_IN] or not answers[WRONG]:
        raise LoadFailed(f"of {answers.total()} sign-ins, none was right, or none was wrong: it was no flood")


def _bodies() -> Iterator[dict[str, str]]:
    for n in itertools.count():
        email, password = PEOPLE[n // 2 % len(PEOPLE)]
        yield {"email": email, "password": password}
        yield {"email": f"guess-{n}@example.com", "password": "a guess that is wrong"}
