"""A shop that is split, of which one service stands still: it is left alone soon, and everything else goes on."""

from __future__ import annotations

import contextlib
import itertools
import signal
import threading
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from mercato.embedded_postgres import processes
from mercato.testing.caller import Caller
from mercato.testing.process import Process, SharedProcess
from mercato.testing.waiting import BOUND_SECONDS, wait_until

CALLS_UNTIL_OPEN = 20
PROBES_MAX = 10
PAID_MEANWHILE = 5

pytestmark = pytest.mark.long


@pytest.fixture(params=["nats", "http"], scope="module")
def transport(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def keeper(data: Path) -> Iterator[SharedProcess]:
    with SharedProcess(data) as made:
        yield made
        made.stop()


@contextlib.contextmanager
def standing_still(shop: Process, service: str) -> Generator[None]:
    """A process that answers nothing for the time of the block, though it lives and its connections are open."""
    paused = shop.tree().instances[service]
    processes.send(paused, signal.SIGSTOP)
    try:
        yield
    finally:
        processes.send(paused, signal.SIGCONT)


def metric(caller: Caller, name: str, **labels: str) -> float:
    """Of the gateway; 0 where it has none with these labels."""
    for family in text_string_to_metric_families(caller.get("/metrics").body.decode()):
        for sample in family.samples:
            if sample.name == name and sample.labels == labels:
                return sample.value
    return 0.0


def is_open(caller: Caller, operations: str) -> bool:
    return bool(metric(caller, "mercato_breaker_open", service="products", operations=operations))


class Reads:
    """So many reads of a product at once, each by a client of its own."""

    def __init__(self, shop: Process, count: int) -> None:
        self.statuses: Counter[int] = Counter()
        self._shop = shop
        self._threads = [threading.Thread(target=self._read, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def _read(self) -> None:
        with self._shop.caller() as caller:
            self.statuses[caller.get("/products/100").status] += 1

    def join(self) -> None:
        for thread in self._threads:
            thread.join(BOUND_SECONDS)


def is_refused_at_once(caller: Caller) -> bool:
    refused = caller.get("/products/100")
    return refused.status == 503 and "retry-after" in refused.headers


def test_a_service_that_stands_still_is_left_alone_within_twenty_calls_and_called_again_when_it_goes_on(
    keeper: SharedProcess, transport: str
):
    shop = keeper.shop("--split", "--transport", transport)
    with shop.caller() as caller:
        assert caller.paid(f"before-{transport}").status == 201
        waiting = [caller.order(f"unpaid-{transport}-{n}").json["id"] for n in range(PAID_MEANWHILE)]
        assert caller.get("/products/100").status == 200

        with standing_still(shop, "products"):
            reads = Reads(shop, CALLS_UNTIL_OPEN)
            wait_until(lambda: is_open(caller, "reads"), BOUND_SECONDS, lambda: str(reads.statuses))
            # These twenty calls were enough: from now on the answer comes without a question, but for a probe at times.
            wait_until(lambda: is_refused_at_once(caller), explain=lambda: str(reads.statuses))
            assert not is_open(caller, "writes"), "no write of a product has been slow"
            for order_id in waiting:
                paid = caller.post("/payments", {"order_id": order_id}, Idempotency_Key=f"pay-{order_id}")
                assert paid.status == 201, paid.text
            assert caller.get("/users/1").status == 200
            reads.join()
            assert set(reads.statuses) <= {503, 504}, "a call that reached it has no answer, the others are refused"

        for turn in itertools.count():
            assert turn < 1_000, "products are called again"
            if caller.read("/products/100").status == 200 and not is_open(caller, "reads"):
                break
        of_reads = {"service": "products", "operations": "reads"}
        assert metric(caller, "mercato_breaker_changes_total", **of_reads, state="half_open") <= PROBES_MAX
        assert caller.paid(f"after-{transport}").status == 201
