"""From the last release to this checkout, container by container, under load; meanwhile both serve one shop.

`tests/system/versions` does that with processes, and has each pair of a service and its callers.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator

import pytest

from deploy.containers import SERVING, TAG, build, missing
from deploy.rolling import REPLICAS, RollingShop
from mercato import topology
from mercato.chassis.hosting.host import GATEWAY
from mercato.testing.waiting import wait_until
from system.versions.code import last_release
from system.versions.load import PayingBuyers, Readers

VERSION, RELEASE = last_release()
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


@pytest.fixture(scope="module")
def shop() -> Iterator[RollingShop]:
    build([*SERVING, "migrate"], VERSION, RELEASE.commit)
    build([*SERVING, "migrate"])
    with RollingShop(VERSION) as made:
        yield made


def test_every_container_is_replaced_under_load_and_no_request_fails(shop: RollingShop):
    began_at = time.monotonic()
    with PayingBuyers(shop.caller, count=2) as buyers, Readers(shop.caller) as readers:
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
