"""What payments notice while products stands still.

    make bench-standing [ARGS="--transport http"]

A shop whose services are processes of their own. Orders are paid at a fixed pace while customers look at products; in
each round products is stopped by SIGSTOP, and goes on. A round has the latency of payments before and meanwhile, from
the time at which a payment was due, and the seconds after which a product was shown again.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Final

import aiohttp

ROOT: Final = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from bench.throughput import shops  # noqa: E402
from bench.throughput.report import Progress  # noqa: E402

STOPPED: Final = "products"
PACE: Final = 40.0
"""Payments a second."""
BROWSERS: Final = 20
BROWSE_SECONDS: Final = 0.1
"""Between two reads of one of them."""
PLACERS: Final = 16
GOAL: Final = 1.25
HEALED_SECONDS: Final = 60.0


class Round:
    """What was measured: latencies in seconds."""

    def __init__(self, before: list[float], meanwhile: list[float], healed: float) -> None:
        self.before, self.meanwhile = _percentile(before), _percentile(meanwhile)
        self.healed = healed

    @property
    def ratio(self) -> float:
        return self.meanwhile / self.before


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench-standing", description=__doc__)
    parser.add_argument("--transport", choices=("nats", "http", "grpc"), default="nats")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=15.0, help="how long products stands still in each round")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="mercato-bench-"))
    folder.chmod(0o755)  # under root, PostgreSQL runs under another account
    try:
        asyncio.run(_measure(folder, options.transport, options.rounds, options.seconds))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


async def _measure(folder: Path, transport: str, rounds: int, seconds: float) -> None:
    progress = Progress(silent=False)
    found: list[Round] = []
    async with (
        shops.server_in(folder / "mercato") as server,
        shops.mercato(folder, server, transport=transport) as shop,
        aiohttp.ClientSession(f"http://{shop.address}", connector=aiohttp.TCPConnector(limit=0)) as client,
    ):
        await shop.fill()
        products = itertools.cycle([product.id for product in shop.products])
        for number in range(1, rounds + 1):
            progress.line(f"round {number} of {rounds}: placing orders")
            orders = await _placed(client, products, round(2 * seconds * PACE))
            async with _browsing(client, products):
                await _paid(client, orders[: round(PACE)])  # what only the first ones do is done
                half = len(orders) // 2
                before = await _paid(client, orders[round(PACE) : half])
                pids = shop.pids(STOPPED)
                _send(pids, signal.SIGSTOP)
                try:
                    meanwhile = await _paid(client, orders[half:])
                finally:
                    _send(pids, signal.SIGCONT)
                one = Round(before, meanwhile, await _healed(client, next(products)))
            found.append(one)
            progress.line(
                f"round {number} of {rounds}: p99 of {len(meanwhile)} payments {one.before * 1e3:.1f} ms before, "
                f"{one.meanwhile * 1e3:.1f} ms meanwhile: {one.ratio:.2f}; shown again after {one.healed:.1f} s"
            )
    ratio, healed = statistics.median(one.ratio for one in found), max(one.healed for one in found)
    print(f"payments over {transport}, p99 while {STOPPED} stands still / before: {ratio:.2f}   at most {GOAL}")
    print(f"products are shown again after {healed:.1f} s at most")


def _send(pids: list[int], what: signal.Signals) -> None:
    for pid in pids:
        os.kill(pid, what)


def _percentile(latencies: list[float]) -> float:
    return statistics.quantiles(latencies, n=100)[98]


async def _placed(client: aiohttp.ClientSession, products: itertools.cycle[int], count: int) -> list[int]:
    """Ids of orders that are not paid."""
    placed: list[int] = []

    async def place() -> None:
        while len(placed) < count:
            async with client.post("/orders", json={"user_id": 1, "product_id": next(products)}) as answer:
                answer.raise_for_status()
                placed.append((await answer.json())["id"])

    await asyncio.gather(*(place() for _ in range(PLACERS)))
    return placed


async def _paid(client: aiohttp.ClientSession, orders: list[int]) -> list[float]:
    """Pays the orders at `PACE`; gives the seconds of each. Raises `ClientResponseError` for one that is refused."""
    start = time.perf_counter()

    async def pay(number: int, order: int) -> float:
        due = start + number / PACE
        await asyncio.sleep(due - time.perf_counter())
        async with client.post("/payments", json={"order_id": order}) as answer:
            answer.raise_for_status()
            await answer.read()
        return time.perf_counter() - due

    return await asyncio.gather(*(pay(number, order) for number, order in enumerate(orders)))


@contextlib.asynccontextmanager
async def _browsing(client: aiohttp.ClientSession, products: itertools.cycle[int]) -> AsyncGenerator[None]:
    """Customers who look at products for the time of the block, whatever they are answered."""

    async def browse() -> None:
        while True:
            async with client.get(f"/products/{next(products)}") as answer:
                await answer.read()
            await asyncio.sleep(BROWSE_SECONDS)

    tasks = [asyncio.create_task(browse()) for _ in range(BROWSERS)]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _healed(client: aiohttp.ClientSession, product: int) -> float:
    """Seconds until a product is shown. Raises `ShopFailed` if it is not within `HEALED_SECONDS`."""
    start = time.perf_counter()
    while (took := time.perf_counter() - start) < HEALED_SECONDS:
        async with client.get(f"/products/{product}") as answer:
            if answer.status == 200:
                return took
        await asyncio.sleep(BROWSE_SECONDS)
    raise shops.ShopFailed(f"no product was shown within {HEALED_SECONDS:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
