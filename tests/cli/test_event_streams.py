"""Streams of events of a whole shop: however its processes end, a client that comes back misses nothing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from mercato.testing.caller import Buyers, everything
from mercato.testing.event_stream import event_stream
from mercato.testing.process import Process
from mercato.testing.waiting import BOUND_SECONDS, until, wait_until

pytestmark = pytest.mark.long

ORDERS = 20
AGAIN_SECONDS = 0.05


class Follower:
    """A client that follows the feed, and comes back whenever its stream ends."""

    def __init__(self, shop: Process) -> None:
        self._shop = shop
        self.position: int | None = None
        self.begun_at: int | None = None
        self.seen: list[int] = []
        self.connections = 0

    async def follow(self) -> None:
        while True:
            with contextlib.suppress(OSError, EOFError, asyncio.IncompleteReadError):
                await self._follow_one()
            await asyncio.sleep(AGAIN_SECONDS)

    async def _follow_one(self) -> None:
        async with event_stream(self._shop.url, "/events", after=self.position) as stream:
            self.connections += stream.head.status == 200
            while stream.head.status == 200 and (message := await stream.next()) is not None:
                self.position = stream.position
                if self.begun_at is None:
                    self.begun_at = self.position
                if message.data is not None:
                    self.seen.append(message.data["position"])


@contextlib.asynccontextmanager
async def followed(shop: Process) -> AsyncGenerator[Follower]:
    follower = Follower(shop)
    following = asyncio.create_task(follower.follow())
    try:
        await until(lambda: _is_open(follower), "the stream is open")
        yield follower
    finally:
        following.cancel()
        await asyncio.wait((following,))


async def _is_open(follower: Follower) -> bool:
    return follower.begun_at is not None


def placed_more(shop: Process) -> None:
    with Buyers(shop.caller, count=4) as buyers:
        wait_until(lambda: len(buyers.placed) >= ORDERS, BOUND_SECONDS, lambda: str(buyers.statuses))


async def assert_complete(shop: Process, follower: Follower) -> None:
    """The client has seen what the pages show after the position at which it began, each once and in order."""
    pages: list[Any] = []

    def read() -> list[Any]:
        with shop.caller() as caller:
            return everything(caller, f"/events?limit=500&after={follower.begun_at}")

    async def is_complete() -> bool:
        nonlocal pages
        pages = [entry["position"] for entry in await asyncio.to_thread(read)]
        return bool(pages) and follower.seen[-1:] == pages[-1:]

    await until(is_complete, "the client has the last event")
    assert follower.seen == pages


async def check(shop: Process, strikes: Sequence[Callable[[], object]]) -> Follower:
    async with followed(shop) as follower:
        for strike in strikes:
            await asyncio.to_thread(placed_more, shop)
            await asyncio.to_thread(strike)
            await asyncio.to_thread(placed_more, shop)
        await assert_complete(shop, follower)
        return follower


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_a_client_misses_nothing_when_the_shop_or_a_worker_is_killed_and_the_shop_started_again(
    data: Path, workers: str
):
    """A worker takes the shop with it: what starts it starts all of it again."""
    with Process(data, "--workers", workers) as shop:
        port = int(shop.ready().url.rpartition(":")[2])
        async with followed(shop) as follower:
            await asyncio.to_thread(placed_more, shop)
            shop.kill(shop.tree().workers[0] if workers == "2" else None)
            await asyncio.to_thread(shop.assert_gone)
            with Process(data, "--workers", workers, port=port) as again:
                await asyncio.to_thread(again.ready)
                await asyncio.to_thread(placed_more, again)
                await assert_complete(again, follower)
                again.stop()
        assert follower.connections >= 2


@pytest.mark.parametrize("transport", ["nats", "http"])
async def test_a_client_of_a_split_shop_misses_nothing_when_the_feed_or_the_gateway_is_killed(
    data: Path, transport: str
):
    with Process(data, "--split", "--transport", transport) as shop:
        shop.ready()
        names = [name for name in shop.tree().instances if name.partition(".")[0] in ("events", "gateway")]
        kills = [lambda name=name: shop.kill(shop.tree().instances[name]) for name in names]
        assert len(kills) >= 2
        await check(shop, kills)
        shop.stop()
