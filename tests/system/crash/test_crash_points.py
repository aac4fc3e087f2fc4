"""Every fault point is crashed at: here while a shop is made, elsewhere (`test_crash_*.py`) while it runs."""

from __future__ import annotations

from collections import Counter

import pytest

from mercato import topology
from mercato.chassis.observability import faults
from mercato.testing.process import data_folder
from system.crash.crashing import Shop
from system.crash.scenarios import AT_REPLAY, AT_START, CRASHES


def test_every_declared_point_is_crashed_at_once():
    topology.builds()

    crashed_at = Counter([*(crash.point for crash in CRASHES), *AT_START, *AT_REPLAY])

    assert crashed_at == Counter(faults.POINTS)


@pytest.mark.long
@pytest.mark.parametrize("point", AT_START)
def test_a_crash_while_demo_data_is_written_leaves_none_or_all_of_it(point: str):
    with data_folder() as data, Shop(data) as shop:
        for _ in range(2):
            assert not shop.start(point)
            assert shop.has_died(0)
        assert shop.start()
        with shop.caller() as caller:
            assert caller.get("/products/100").status == 200
            assert caller.get("/products/100/stock").json["on_hand"] == 1_000_000
            assert caller.get("/products/1/stock").json["available"] == 1_000_000
        assert shop.comes_to_rest()
        shop.assert_correct()
