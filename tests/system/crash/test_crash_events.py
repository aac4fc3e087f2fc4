"""Crashes while events are consumed, parked, retried, given up and replayed. See `support/crashing.py`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mercato.testing.process import used_folder
from system.crash.crashing import Crash, Shop, crash_and_recover
from system.crash.scenarios import AT_REPLAY, EVENTS, assert_replayed, mend, poison, replay, try_again


@pytest.fixture(scope="module")
def shop() -> Iterator[Shop]:
    with used_folder() as data, Shop(data) as made:
        yield made


@pytest.mark.parametrize("crash", EVENTS, ids=str)
def test_every_invariant_holds_after_a_crash_at(crash: Crash, shop: Shop):
    crash_and_recover(shop, crash)


@pytest.mark.long
@pytest.mark.parametrize("point", AT_REPLAY)
def test_a_dead_event_has_one_effect_though_its_replay_crashes_at(point: str, shop: Shop):
    was_committed = point.endswith("after_commit")
    shop.ensure()
    letter = poison(shop, f"{point}-replayed")
    with shop.caller() as caller:
        try_again(caller, letter)
    mend(letter)

    assert replay(letter, crash_at=point).returncode == -9
    assert replay(letter, crash_at=point).returncode == (1 if was_committed else -9)
    assert replay(letter).returncode == (1 if was_committed else 0)

    assert_replayed(letter)
    assert shop.comes_to_rest()
    shop.assert_correct()
