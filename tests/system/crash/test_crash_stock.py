"""Crashes at the points of stock. See `support/crashing.py`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mercato.testing.process import used_folder
from system.crash.crashing import Crash, Shop, crash_and_recover
from system.crash.scenarios import STOCK, STOCK_SETTINGS


@pytest.fixture(scope="module")
def shop() -> Iterator[Shop]:
    with used_folder() as data, Shop(data, STOCK_SETTINGS) as made:
        yield made


@pytest.mark.parametrize("crash", STOCK, ids=str)
def test_every_invariant_holds_after_a_crash_at(crash: Crash, shop: Shop):
    crash_and_recover(shop, crash)
