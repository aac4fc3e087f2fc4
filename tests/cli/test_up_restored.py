"""`mercato up` on databases of which one alone was restored from an older backup."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from mercato.testing.caller import Caller
from mercato.testing.process import Process
from mercato.testing.tables import connected
from mercato.testing.waiting import wait_until

pytestmark = pytest.mark.long

FORGET = """
    TRUNCATE orders, order_products, history, refunds, payment_keys, sagas;
    ALTER SEQUENCE orders_id_seq RESTART
"""
"""As a backup from before the first order has it."""


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


def test_a_shop_under_which_orders_was_put_back_goes_on_behind_the_ids_that_others_know(data: Path):
    with Process(data) as shop:
        caller = shop.ready().caller()
        lost = [settled(caller, caller.paid(f"before-{n}").json["id"]) for n in range(3)]
        asyncio.run(execute(shop.dsn("orders"), FORGET))

        first = settled(caller, caller.paid("first").json["id"])
        retried = settled(caller, caller.paid("retried").json["id"])

        assert first["id"] < lost[-1]["id"]
        assert (first["status"], first["payment"]) == ("cancelled", "unpaid")
        assert retried["id"] > max(order["id"] for order in lost)
        assert (retried["status"], retried["payment"]) == ("confirmed", "paid")
        [line] = [json.loads(line) for line in shop.errors if '"sequence_moved"' in line]
        assert (line["owner"], line["known_by"], line["known_id"]) == ("orders", "inventory", lost[-1]["id"])
        shop.stop()


def settled(caller: Caller, order_id: int) -> Any:
    """The order once its checkout has come to an end."""

    def order() -> Any:
        return caller.read(f"/orders/{order_id}").json

    wait_until(lambda: order()["status"] != "pending", explain=lambda: str(order()))
    return order()
