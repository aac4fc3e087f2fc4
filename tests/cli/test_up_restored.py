"""`mercato up` on databases of which one alone was restored from an older backup."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from mercato.testing.process import Process
from mercato.testing.tables import connected

pytestmark = pytest.mark.long

FORGET = """
    TRUNCATE orders, order_products, history, refunds, payment_keys, sagas;
    ALTER SEQUENCE orders_id_seq RESTART
"""
"""As a backup from before the first order has it."""


pytestmark = pytest.mark.long


async def execute(dsn: str, statement: str) -> None:
    async with connected(dsn) as connection:
        await connection.execute(statement)


def test_the_next_start_gives_no_id_again_that_another_service_knows(data: Path):
    with Process(data) as shop:
        caller = shop.ready().caller()
        lost = [caller.order(f"before-{n}").json["id"] for n in range(3)]
        asyncio.run(execute(shop.dsn("orders"), FORGET))
        shop.stop()

    with Process(data) as shop:
        placed = shop.ready().caller().order("after")
        said = [event["message"] for event in shop.events if event["event"] == "progress"]
        assert placed.status == 201, placed.text
        assert placed.json["id"] > max(lost)
        assert any(f"inventory knows ids up to {max(lost)} of orders" in line for line in said), said
        assert any('"sequence_moved"' in line for line in shop.errors), shop.errors
        shop.stop()

    with Process(data) as shop:
        shop.ready()
        assert not any('"sequence_moved"' in line for line in shop.errors), shop.errors
        shop.stop()
