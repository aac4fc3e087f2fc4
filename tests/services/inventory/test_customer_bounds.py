"""What open orders of one customer may hold of a product, as a reservation states it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, strategies as st

from mercato.chassis.contract import InvalidRequest
from mercato.chassis.postgres.database import Tx
from mercato.contracts.inventory import (
    ON_HAND_LIMIT,
    CustomerBound,
    HoldLimitReached,
    OutOfStock,
    ReserveStock,
    ShortLine,
)
from mercato.services.inventory import fast_path, rules
from mercato.testing.builders import LAMP, MUG
from services.inventory.harness import InventoryHarness, reserve


def bounded(order_id: int, *before: int, units: int = 10, percent: int = 20, **quantities: int) -> ReserveStock:
    """`before`: an element a line; 0 for all where there are none."""
    bound = CustomerBound(units=units, share_percent=percent, before=before or (0,) * len(quantities))
    return msgspec.structs.replace(reserve(order_id, for_payment=False, **quantities), customer_bound=bound)


async def kinds(harness: InventoryHarness, *requests: ReserveStock) -> list[str]:
    return [type(answer).__name__ for answer in await harness.reserve_many(*requests)]


async def test_a_batch_within_its_bounds_is_one_statement(harness: InventoryHarness, monkeypatch: pytest.MonkeyPatch):
    await harness.stock(mug=100, lamp=100)
    run: list[str] = []
    fetch = Tx.fetch

    async def noting(tx: Tx, row: Any, sql: str, *values: object) -> Any:
        run.append(sql)
        return await fetch(tx, row, sql, *values)

    monkeypatch.setattr(Tx, "fetch", noting)
    answers = await kinds(harness, bounded(1, mug=20), bounded(2, 19, 0, mug=1, lamp=20), reserve(3, mug=50))
    monkeypatch.undo()

    assert answers == ["Reservation"] * 3
    if not harness.repeats:
        assert run == [fast_path.RESERVE_ALL]


async def test_an_order_over_its_bound_is_refused_and_the_others_are_held(harness: InventoryHarness):
    await harness.stock(mug=100, lamp=10)
    requests = (bounded(1, 3, 0, mug=18, lamp=11), bounded(2, mug=20), reserve(3, mug=70), bounded(4, 15, mug=6))
    answers = await harness.reserve_many(*requests)

    assert [type(answer).__name__ for answer in answers] == [
        "OutOfStock",
        "Reservation",
        "Reservation",
        "HoldLimitReached",
    ]
    refusal = answers[3]
    assert isinstance(refusal, HoldLimitReached)
    assert refusal.lines == (ShortLine(product_id=MUG, requested=6, available=5),)
    assert refusal.bounds == (20,)
    assert await harness.pieces() == (100, 90)
    assert await harness.pieces(LAMP) == (10, 0)


@pytest.mark.parametrize("before", [0, 15])
async def test_a_batch_of_one_is_refused_where_it_passes_the_bound(harness: InventoryHarness, before: int):
    await harness.stock(mug=100)
    assert await kinds(harness, bounded(1, before, mug=21 - before)) == ["HoldLimitReached"]
    assert await kinds(harness, bounded(2, before, mug=20 - before)) == ["Reservation"]
    assert await harness.states() == {2: "held"}


async def test_what_is_missing_is_said_before_what_is_too_much(harness: InventoryHarness):
    await harness.stock(mug=5)
    [refusal] = await harness.reserve_many(bounded(1, 40, mug=6))
    assert isinstance(refusal, OutOfStock)


async def test_a_reservation_that_is_there_is_answered_whatever_the_bound(harness: InventoryHarness):
    await harness.stock(mug=100)
    assert await kinds(harness, bounded(1, mug=20)) == ["Reservation"]
    assert await kinds(harness, bounded(1, 20, mug=20)) == ["Reservation"]
    assert await harness.pieces() == (100, 20)


async def test_a_refused_order_may_be_asked_again_when_there_is_more(harness: InventoryHarness):
    await harness.stock(mug=100)
    assert await kinds(harness, bounded(1, mug=21), bounded(1, mug=21)) == ["HoldLimitReached"] * 2
    await harness.stock(mug=105)
    assert await kinds(harness, bounded(1, mug=21)) == ["Reservation"]


async def test_a_bound_must_have_an_element_for_each_line(harness: InventoryHarness):
    await harness.stock(mug=100, lamp=100)
    [refusal] = await harness.reserve_many(bounded(1, 0, mug=1, lamp=1))
    assert isinstance(refusal, InvalidRequest)
    assert [error.field for error in refusal.errors] == ["customer_bound.before"]


@given(
    st.integers(1, 3_000),
    st.integers(0, 60),
    st.integers(0, 100),
    st.integers(0, 20_000),
)
def test_the_least_on_hand_is_where_the_share_begins_to_suffice(wanted: int, units: int, percent: int, on_hand: int):
    """The statement compares pieces on hand, the ledger shares: both decide alike."""
    bound = CustomerBound(units=units, share_percent=percent, before=(0,))
    assert (on_hand >= rules.least_on_hand(wanted, bound)) == (rules.customer_share(on_hand, bound) >= wanted)


def test_without_a_percentage_no_stock_is_enough_for_more_than_the_units():
    bound = CustomerBound(units=5, share_percent=0, before=(0,))
    assert rules.least_on_hand(6, bound) > ON_HAND_LIMIT
    assert rules.least_on_hand(10**12, msgspec.structs.replace(bound, share_percent=1)) == ON_HAND_LIMIT + 1
