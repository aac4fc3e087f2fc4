"""The programs of `docs/events.md` miss nothing, and take nothing twice, whatever is killed while orders are placed."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import sqlite3
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import pytest

from embedded_nats.subscriber import delete_store, subscriber_file
from mercato.testing.caller import Buyers, Caller, everything
from mercato.testing.process import Process, used_folder
from mercato.testing.responses import Response
from mercato.testing.served import variables
from mercato.testing.tables import rows
from mercato.testing.waiting import BOUND_SECONDS, wait_until
from system.nats_js.documented import AcknowledgementsHeld, Program, write

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it looks into /proc"),
]

EVENTS: Final = 30
PAUSE_SECONDS: Final = 0.1
PAID: Final = b"mercato.events.order.paid"


class Payers(Buyers):
    """Each of their orders is paid at once, and they do not place more than the programs take."""

    def __init__(self, shop: Process) -> None:
        super().__init__(shop.caller, count=2)

    def order(self, caller: Caller, key: str) -> Response:
        self.stopped.wait(PAUSE_SECONDS)
        return caller.paid(key)


@pytest.fixture(scope="module")
def shop() -> Iterator[Process]:
    with used_folder() as data, Process(data, "--split") as made:
        yield made.ready()
        made.stop()


@pytest.fixture(params=["py", "mjs"])
def packages_of(request: pytest.FixtureRequest) -> tuple[str, Path | None]:
    """The ending of the programs in a language, and where its packages are."""
    return request.param, request.getfixturevalue("packages") if request.param == "mjs" else None


def orders_in_feed(shop: Process) -> list[Any]:
    with shop.caller() as caller:
        return [entry for entry in everything(caller, "/events?limit=500") if entry["type"].startswith("order.")]


def address(shop: Process) -> dict[str, str]:
    return variables(subscriber_file(shop.data))


def until_more(done: Sequence[object], count: int = EVENTS) -> None:
    before = len(done)
    wait_until(lambda: len(done) >= before + count, explain=lambda: f"{len(done)}, and {before} before")


def entries(*runs: Program) -> list[Any]:
    """What runs of the first program have taken, without what came once more."""
    taken = [json.loads(line) for run in runs for line in run.lines]
    return [entry for entry, _ in itertools.groupby(taken)]


def test_the_first_program_misses_nothing_and_keeps_the_order(
    shop: Process, packages_of: tuple[str, Path | None], tmp_path: Path
):
    ending, packages = packages_of
    file = write(f"follow.{ending}", tmp_path, packages)
    with Payers(shop) as buyers:
        with Program(file, address(shop)) as killed:
            until_more(killed.lines)
        with Program(file, address(shop)) as again:
            until_more(again.lines)
    with Program(file, address(shop)) as last:
        wait_until(lambda: has_all(buyers, entries(killed, again, last), shop))
    # Behind each of the two kills the last event may come once more.
    assert sum(len(run.lines) for run in (killed, again, last)) <= len(orders_in_feed(shop)) + 2


def has_all(buyers: Buyers, taken: Sequence[Any], shop: Process) -> bool:
    """Whether it is what the feed has, in order, and that has all orders."""
    placed = {entry["data"]["order_id"] for entry in taken if entry["type"] == "order.placed"}
    return set(buyers.placed.values()) <= placed and taken == orders_in_feed(shop)


class Sales:
    """What the second program has stored."""

    def __init__(self, ending: str, folder: Path, shop: Process) -> None:
        self._file = folder / "sales.db"
        self._dsn = shop.admin_dsn.replace("/postgres?", "/sales?") if ending == "mjs" else None
        self.environment = address(shop)
        if self._dsn is not None:
            asyncio.run(rows(shop.admin_dsn, "CREATE DATABASE sales"))
            self.environment["SALES_DATABASE"] = self._dsn

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        if self._dsn is not None:
            return asyncio.run(rows(self._dsn, sql))
        with contextlib.closing(sqlite3.connect(self._file)) as database:
            return database.execute(sql).fetchall()

    def taken(self) -> list[tuple[str, int]]:
        return self.rows("SELECT id, position FROM taken ORDER BY position")

    def total(self) -> list[tuple[Any, ...]]:
        return self.rows("SELECT currency, orders, total_minor FROM sales")


def test_the_second_program_takes_each_event_once(shop: Process, packages_of: tuple[str, Path | None], tmp_path: Path):
    ending, packages = packages_of
    file = write(f"sales.{ending}", tmp_path, packages)
    sales = Sales(ending, tmp_path, shop)
    url = sales.environment["NATS_URL"]
    with Payers(shop):
        with AcknowledgementsHeld(url, PAID) as proxy, Program(file, {**sales.environment, "NATS_URL": proxy.url}):
            assert proxy.held.wait(BOUND_SECONDS)
        [*_, (stored, _)] = sales.taken()
        with Program(file, sales.environment) as program:
            wait_until(lambda: program.lines)
            assert program.lines == [f"again: {stored}\n"]
            before = len(sales.taken())
            wait_until(lambda: len(sales.taken()) >= before + EVENTS)
            delete_store(shop)
            # It has lost its consumer with the stream.
            assert program.exit_code() == 1
        before = len(sales.taken())
        with Program(file, sales.environment) as program:
            wait_until(lambda: len(sales.taken()) >= before + EVENTS)
    with Program(file, sales.environment):
        wait_until(lambda: sales.taken() == [(entry["id"], entry["position"]) for entry in orders_in_feed(shop)])
    # The stream was really made again.
    assert len(program.lines) >= before
    paid = [entry["data"]["total_minor"] for entry in orders_in_feed(shop) if entry["type"] == "order.paid"]
    assert sales.total() == [("USD", len(paid), sum(paid))]
