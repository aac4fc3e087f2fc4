"""Crashes at a part of all points in a shop that is split, over each transport. See `splitting.py`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mercato.testing.process import used_folder
from system.crash.crashing import NO_SETTINGS, Crash
from system.crash.scenarios import CRASHES, PAYMENTS, PAYMENTS_SETTINGS, STOCK, STOCK_SETTINGS
from system.crash.splitting import SplitShop, crash_one_and_recover, part

SETTINGS = {
    crash.point: settings
    for table, settings in ((PAYMENTS, PAYMENTS_SETTINGS), (STOCK, STOCK_SETTINGS))
    for crash in table
}
POINTS = [(transport, crash) for transport in ("nats", "http") for crash in part(CRASHES, transport)]


@pytest.fixture(scope="module")
def shop(request: pytest.FixtureRequest) -> Iterator[SplitShop]:
    with used_folder() as data, SplitShop(data, request.param) as made:
        yield made


@pytest.mark.long
@pytest.mark.parametrize(("shop", "crash"), POINTS, ids=str, indirect=["shop"], scope="module")
def test_every_invariant_holds_after_a_crash_of_one_process_at(shop: SplitShop, crash: Crash):
    crash_one_and_recover(shop, crash, SETTINGS.get(crash.point, NO_SETTINGS))
