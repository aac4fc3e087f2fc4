"""A worker that stands still for longer than its lease: another one goes on with its orders, and what it wants to save
when it comes back is refused. Every order is paid once."""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import Iterator
from typing import Any

import aiohttp
import asyncpg
import pytest

from mercato.embedded_postgres import processes
from mercato.testing.process import Process, used_folder

pytestmark = [pytest.mark.slow, pytest.mark.long]

LEASE_SECONDS = 1.0
ROUNDS = 40
"""At most: in most rounds the worker is stopped in the middle of a batch."""
ORDERS = 48
BOUND_SECONDS = 120.0
METHODS = ("sandbox:ok", "sandbox:slow:400")


@pytest.fixture(scope="module")
def shop() -> Iterator[Process]:
    environment = {"MERCATO_ORDERS_LEASE_SECONDS": str(LEASE_SECONDS), "MERCATO_ORDERS_SWEEP_SECONDS": "0.2"}
    with used_folder() as data, Process(data, "--workers", "2", environment=environment) as process:
        yield process.ready()


async def test_a_paused_worker_that_continues_after_others_took_over_changes_nothing(shop: Process):
    keys: list[str] = []
    for number in range(ROUNDS):
        keys += await stop_one_in_the_middle(shop, number)
        if number > 0 and await counted(shop, "mercato_saga_fenced_total"):
            break  # each of the two has been stopped
    assert await counted(shop, "mercato_saga_taken_over_total") > 0
    assert await counted(shop, "mercato_saga_fenced_total") > 0

    orders = await rows(shop, "orders", "SELECT id, payment FROM orders")
    assert len(orders) == len(keys)
    captures = """
        SELECT order_id, count(*) FROM operations
         WHERE kind IN ('charge', 'capture') AND status = 'succeeded' GROUP BY 1
    """
    assert dict(await rows(shop, "sandbox", captures)) == {order["id"]: 1 for order in orders}


async def stop_one_in_the_middle(shop: Process, number: int) -> list[str]:
    """Places orders, and stops one of the workers until the other has finished all of them; gives the keys."""
    worker = shop.tree().workers[number % 2]
    keys = [f"paused-{number}-{n}" for n in range(ORDERS)]
    async with aiohttp.ClientSession() as session:
        asking = [asyncio.create_task(order(session, shop.url, key, n)) for n, key in enumerate(keys)]
        # Where it is stopped is chance; a different moment each time finds it in the middle of a batch soon.
        await asyncio.wait(asking, timeout=0.02 + 0.02 * number, return_when=asyncio.FIRST_COMPLETED)
        processes.send(worker, signal.SIGSTOP)
        try:
            # What it has accepted it answers when it goes on; what its orders need, the other one does.
            placed = await answered_without(asking)
            await all_paid(shop, placed)
        finally:
            processes.send(worker, signal.SIGCONT)
        await all_paid(shop, set(await asyncio.gather(*asking)))
    return keys


async def order(session: aiohttp.ClientSession, url: str, key: str, number: int) -> int:
    body = {"user_id": 1, "product_id": 100, "payment_method": METHODS[number % len(METHODS)]}
    while True:
        async with session.post(f"{url}/orders", json=body, headers={"Idempotency-Key": key}) as answer:
            if answer.status == 201:
                return (await answer.json())["id"]
            # The worker that has accepted it stood still for longer than a request may take.
            assert answer.status in (503, 504), await answer.text()
        await asyncio.sleep(0.1)


async def answered_without(asking: list[asyncio.Task[int]]) -> set[int]:
    """The orders of those that were answered while a worker stands still: wait until no more come."""
    done, waiting = await asyncio.wait(asking, timeout=2 * LEASE_SECONDS)
    assert len(done) + len(waiting) == len(asking)
    return {task.result() for task in done}


async def all_paid(shop: Process, ids: set[int]) -> None:
    question = "SELECT count(*) FROM orders WHERE id = ANY ($1) AND payment <> 'paid'"
    async with asyncio.timeout(BOUND_SECONDS):
        while (await rows(shop, "orders", question, sorted(ids)))[0][0]:
            await asyncio.sleep(0.1)


async def counted(shop: Process, metric: str) -> float:
    """A counter of both workers together, as /metrics of any of them tells."""
    async with aiohttp.ClientSession() as session, session.get(f"{shop.url}/metrics") as answer:
        text = await answer.text()
    return sum(map(float, re.findall(rf'^{metric}{{service="orders"}} (\S+)', text, re.MULTILINE)))


async def rows(shop: Process, service: str, statement: str, *values: Any) -> list[Any]:
    connection: Any = await asyncpg.connect(shop.dsn(service))
    try:
        return await connection.fetch(statement, *values)
    finally:
        await connection.close()
