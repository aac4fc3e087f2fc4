"""From the last release to this checkout, container by container, under load; meanwhile both serve one shop."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from contracts.release import Releases
from deploy.containers import SERVING, TAG, build, missing
from deploy.rolling import REPLICAS, RollingShop
from mercato import topology
from mercato.chassis.hosting.host import GATEWAY
from mercato.testing.caller import Buyers, Caller, Clients
from mercato.testing.responses import Response
from mercato.testing.waiting import wait_until

VERSION, RELEASE = list(Releases().entries().items())[-1]
"""The last release: N-1."""
PAUSE_SECONDS = 0.02
"""Between two reads: eighteen processes start beside them."""
ORDERS = 20
"""Orders that are placed between two replacements, at least."""

pytestmark = [
    pytest.mark.long,
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=missing()),
    pytest.mark.skipif(
        shutil.which("haproxy") is None, reason="a rolling upgrade was not tried: apt-get install haproxy"
    ),
]


class PayingBuyers(Buyers):
    """Buyers whose orders are paid at once."""

    def order(self, caller: Caller, key: str) -> Response:
        body = {"user_id": 1, "product_id": 100, "payment_method": "sandbox:ok"}
        return caller.post("/orders", body, Idempotency_Key=key, Prefer="wait=20")


class Readers(Clients):
    """Clients that read what several services answer, until the block ends."""

    def __init__(self, shop: RollingShop, count: int = 1) -> None:
        super().__init__(count)
        self.statuses: Counter[int] = Counter()
        self.failures: list[str] = []
        self._shop = shop

    def work(self, number: int) -> None:
        paths = ("/products/100", "/users/1", "/orders?user_id=1&limit=5", "/products/100/stock", "/events?limit=5")
        with self._shop.caller() as caller:
            while not self.stopped.is_set():
                for path in paths:
                    self._read(caller, path)
                    self.stopped.wait(PAUSE_SECONDS)

    def _read(self, caller: Caller, path: str) -> None:
        try:
            answer = caller.get(path)
        except OSError as error:
            self.failures.append(f"{path}: {error}")
            return
        self.statuses[answer.status] += 1
        if answer.status != 200:
            self.failures.append(f"{path}: {answer.text}")


@pytest.fixture(scope="module")
def shop() -> Iterator[RollingShop]:
    build([*SERVING, "migrate"], VERSION, RELEASE.commit)
    build([*SERVING, "migrate"])
    with RollingShop(VERSION) as made:
        yield made


def test_every_container_is_replaced_under_load_and_no_request_fails(shop: RollingShop):
    began_at = time.monotonic()
    with PayingBuyers(shop.caller, count=2) as buyers, Readers(shop) as readers:
        wait_until(lambda: len(buyers.placed) >= ORDERS)
        shop.migrate(TAG)
        # A release is made to be installed callee first; half of the processes of each service serve beside the other.
        for number in REPLICAS:
            for name in (*topology.SERVICES, GATEWAY):
                placed = len(buyers.placed)
                shop.replace(name, number, TAG)
                wait_until(lambda p=placed: len(buyers.placed) >= p + ORDERS)
    assert (dict(buyers.statuses.items()), buyers.unanswered) == ({201: len(buyers.placed)}, 0)
    assert (set(readers.statuses), readers.failures) == ({200}, [])
    assert set(shop.versions()) == {TAG}
    with shop.caller() as caller:
        buyers.assert_nothing_lost(caller)
    print(  # noqa: T201  # figures of the run
        f"from {VERSION}: {len(SERVING) * len(REPLICAS)} containers in {time.monotonic() - began_at:.0f} s, "
        f"{len(buyers.placed)} orders, {readers.statuses[200]} reads, 0 failed"
    )


def test_the_shop_is_right_after_the_upgrade(shop: RollingShop):
    assert "invariants hold" in shop.audit(TAG)
