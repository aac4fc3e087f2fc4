"""What a thousand streams of events cost, and how late events come.

    make bench-streams [ARGS="--seconds 20 --orders 500"]

A shop in one process. 990 streams follow one order each, 10 follow the feed. Then orders are placed at a fixed pace for
some seconds, while the followed orders are cancelled one after the other. Measured is the memory that the process gains
by the streams, and how long after its transaction began each event is received by the client.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import itertools
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import aiohttp

ROOT: Final = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from bench.throughput import shops  # noqa: E402
from bench.throughput.report import Progress  # noqa: E402

OF_ORDERS: Final = 990
OF_FEED: Final = 10
FEED: Final = "/events"
OPENED_AT_ONCE: Final = 16
PLACERS: Final = 64
SECONDS_MAX: Final = 300.0
MEMORY_GOAL_MB: Final = 200
DELAY_GOAL_S: Final = 1.0
AT: Final = re.compile(rb'"version":\d+,"data":\{[^\n]*\},"at":"([^"]+)"')


class Reader:
    """One stream, read as fast as it comes. `delays`: of each event, in seconds."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.delays: list[float] = []
        self._rest = b""

    async def open(self, host: str, port: int) -> None:
        """Opens the stream, and reads up to its first message."""
        self._input, self._output = await asyncio.open_connection(host, port)
        self._output.write(
            f"GET {self.path} HTTP/1.1\r\nHost: {host}:{port}\r\nAccept: text/event-stream\r\n\r\n".encode()
        )
        head = await self._input.readuntil(b"\r\n\r\n")
        if b" 200 " not in head.partition(b"\r\n")[0]:
            raise shops.ShopFailed(f"{self.path} was answered {head.decode()}")
        await self._input.readuntil(b"\n\n")

    async def read(self) -> None:
        """Notes the delay of each event, for ever."""
        while part := await self._input.read(262_144):
            now, lines = time.time(), self._rest + part
            whole, _, self._rest = lines.rpartition(b"\n")
            for found in AT.finditer(whole):
                self.delays.append(now - datetime.datetime.fromisoformat(found[1].decode()).timestamp())

    def close(self) -> None:
        self._output.close()


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench-streams", description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help=f"how long, at most {SECONDS_MAX:g}")
    parser.add_argument("--orders", type=float, default=500.0, help="orders a second")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="mercato-bench-"))
    folder.chmod(0o755)  # under root, PostgreSQL runs under another account
    try:
        asyncio.run(_measure(folder, min(options.seconds, SECONDS_MAX), options.orders))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


async def _measure(folder: Path, seconds: float, pace: float) -> None:
    progress = Progress(silent=False)
    settings = {"MERCATO_STREAMS_OF_ONE": str(OF_ORDERS + OF_FEED)}
    async with (
        shops.server_in(folder / "mercato") as server,
        shops.mercato(folder, server, settings=settings) as shop,
        aiohttp.ClientSession(f"http://{shop.address}", connector=aiohttp.TCPConnector(limit=0)) as client,
    ):
        await shop.fill()
        products = itertools.cycle([product.id for product in shop.products])
        progress.line("placing the orders that are followed")
        await _placed(client, products, 0.0, round(2 * pace))  # so that what a first load needs is there
        followed = await _placed(client, products, 0.0, OF_ORDERS)
        [pid] = shop.pids("up")
        before = _resident_mb(pid)
        readers = await _opened(shop.address, followed)
        reading = [asyncio.create_task(reader.read()) for reader in readers]
        opened = _resident_mb(pid)
        progress.line(f"{len(reading)} streams are open; placing {pace:g} orders a second for {seconds:g} s")
        load, start = os.getloadavg()[0], time.perf_counter()
        placed, _ = await asyncio.gather(
            _placed(client, products, pace, round(pace * seconds)), _cancelled(client, followed, seconds)
        )
        took = time.perf_counter() - start
        await asyncio.sleep(2 * DELAY_GOAL_S)
        at_end = _resident_mb(pid)
        for reader in readers:
            reader.close()
        await asyncio.gather(*reading, return_exceptions=True)
    of_orders = [delay for reader in readers if reader.path != FEED for delay in reader.delays]
    of_feed = [delay for reader in readers if reader.path == FEED for delay in reader.delays]
    print(f"orders placed: {len(placed)} in {took:.1f} s, {len(placed) / took:.0f} a second; load average {load:.1f}")
    print(
        f"memory of {len(reading)} streams: {opened - before:.0f} MB, {at_end - before:.0f} MB after the load", end=""
    )
    print(f"   less than {MEMORY_GOAL_MB}")
    for name, delays in (("one order each", of_orders), ("the feed", of_feed)):
        print(f"delay of {len(delays)} events, streams of {name}: {_shown(delays)}   p99 at most {DELAY_GOAL_S:g} s")


async def _opened(address: str, orders: Sequence[int]) -> list[Reader]:
    host, _, port = address.rpartition(":")
    paths = iter([*(f"/orders/{order}/events" for order in orders), *[FEED] * OF_FEED])
    readers: list[Reader] = []

    async def open_next() -> None:
        for path in paths:
            reader = Reader(path)
            await reader.open(host, int(port))
            readers.append(reader)

    await asyncio.gather(*(open_next() for _ in range(OPENED_AT_ONCE)))
    return readers


async def _placed(client: aiohttp.ClientSession, products: itertools.cycle[int], pace: float, count: int) -> list[int]:
    """Ids of orders that are placed at a pace; 0: as fast as they are answered."""
    placed: list[int] = []
    numbers, start = iter(range(count)), time.perf_counter()

    async def place() -> None:
        for number in numbers:
            if pace:
                await asyncio.sleep(start + number / pace - time.perf_counter())
            async with client.post("/orders", json={"user_id": 1, "product_id": next(products)}) as answer:
                answer.raise_for_status()
                placed.append((await answer.json())["id"])

    await asyncio.gather(*(place() for _ in range(PLACERS)))
    return placed


async def _cancelled(client: aiohttp.ClientSession, orders: Sequence[int], seconds: float) -> None:
    """Cancels the orders one after the other, in so many seconds."""
    start = time.perf_counter()
    for number, order in enumerate(orders):
        await asyncio.sleep(start + number * seconds / len(orders) - time.perf_counter())
        async with client.post(f"/orders/{order}/cancel") as answer:
            answer.raise_for_status()


def _resident_mb(pid: int) -> float:
    """The resident memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _shown(delays: list[float]) -> str:
    cuts = statistics.quantiles(delays, n=100)
    return f"p50 {cuts[49]:.3f} s, p99 {cuts[98]:.3f} s, longest {max(delays):.3f} s"


if __name__ == "__main__":
    sys.exit(main())
