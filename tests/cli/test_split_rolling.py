"""A shop that is split, with several processes of a service: one of them may go, and clients notice nothing."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mercato import topology
from mercato.embedded_postgres import processes
from mercato.testing.caller import Buyers, Caller, Clients
from mercato.testing.process import Process, SharedProcess
from mercato.testing.waiting import BOUND_SECONDS, wait_until

pytestmark = pytest.mark.long

TWICE = tuple(topology.SERVICES)
ORDERS = 10
IS_CAMPAIGN = os.environ.get("CAMPAIGN") == "full"
READS = 100


@pytest.fixture(params=["nats", *(["http", "grpc"] if IS_CAMPAIGN else [])], scope="module")
def transport(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def keeper(data: Path) -> Iterator[SharedProcess]:
    with SharedProcess(data) as made:
        yield made
        made.stop()


class Readers(Clients):
    """Clients that read products until the block ends."""

    def __init__(self, caller: Callable[[], Caller], count: int = 4) -> None:
        super().__init__(count)
        self.statuses: Counter[int] = Counter()
        self._caller = caller

    def work(self, number: int) -> None:
        with self._caller() as client:
            while not self.stopped.is_set():
                self.statuses[client.get("/products/100").status] += 1


def replaced(shop: Process, name: str, number: signal.Signals) -> None:
    """Ends a process by a signal, and waits until the next one with its name takes calls."""
    said = f"{name} is running again"
    before = shop.count_lines(said)
    processes.send(shop.tree().instances[name], number)
    wait_until(lambda: shop.count_lines(said) > before, BOUND_SECONDS)


def test_each_service_is_restarted_and_no_request_fails(keeper: SharedProcess, transport: str):
    shop = keeper.shop("--placement", "cluster", "--replicas", "gateway=1", "--transport", transport)
    with Buyers(shop.caller) as buyers, Readers(shop.caller) as readers:
        for name in TWICE:
            for number in (1, 2):
                placed = len(buyers.placed)
                replaced(shop, f"{name}.{number}", signal.SIGTERM)
                wait_until(lambda p=placed: len(buyers.placed) >= p + ORDERS, BOUND_SECONDS)
    assert set(buyers.statuses) == {201}, shop.output
    assert set(readers.statuses) == {200}, shop.output
    assert buyers.unanswered == 0, shop.output


def test_one_of_three_is_killed_and_no_read_fails(keeper: SharedProcess, transport: str):
    shop = keeper.shop("--replicas", "products=3", "--transport", transport)
    with Readers(shop.caller) as readers:
        wait_until(lambda: readers.statuses[200] >= READS, BOUND_SECONDS)
        for number in (1, 2, 3):
            replaced(shop, f"products.{number}", signal.SIGKILL)
            read = readers.statuses[200]
            wait_until(lambda r=read: readers.statuses[200] >= r + READS, BOUND_SECONDS)
    assert set(readers.statuses) == {200}
