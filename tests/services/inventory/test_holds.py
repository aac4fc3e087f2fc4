"""Holds that have no end of their own are listed for orders, a page of reservations at a time."""

from __future__ import annotations

import pytest

from mercato.contracts.inventory import Hold, HoldPage, ListHolds
from mercato.services.inventory import store
from mercato.testing.actors import SERVICE
from services.inventory.harness import NONCE, InventoryHarness


async def holds(harness: InventoryHarness, before: int | None = None, quiet_seconds: float = 0.0) -> HoldPage:
    with harness.acting(SERVICE):
        return await harness.inventory.holds(ListHolds(before=before, quiet_seconds=quiet_seconds))


def hold(order_id: int) -> Hold:
    return Hold(order_id=order_id, order_nonce=NONCE)


async def test_only_what_is_held_without_an_end_is_listed(harness: InventoryHarness):
    await harness.stock(mug=9)
    for order_id in (7, 8, 9):
        await harness.reserve(order_id, for_payment=True, mug=1)
    await harness.reserve(10, mug=1)
    await harness.commit(8)
    await harness.release(9)

    assert await holds(harness) == HoldPage(holds=(hold(7),))


async def test_what_has_just_been_held_is_not_listed(harness: InventoryHarness):
    await harness.stock(mug=2)
    await harness.reserve(7, for_payment=True, mug=1)

    assert await holds(harness, quiet_seconds=600.0) == HoldPage(holds=())

    await harness.let_days_pass(1)
    assert await holds(harness, quiet_seconds=600.0) == HoldPage(holds=(hold(7),))


async def test_every_page_leads_to_the_next(harness: InventoryHarness, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store, "PAGE", 2)
    await harness.stock(mug=9)
    for order_id in range(1, 6):
        await harness.reserve(order_id, for_payment=True, mug=1)
    await harness.release(4)
    await harness.release(3)

    pages = [await holds(harness)]
    while (before := pages[-1].next_before) is not None:
        pages.append(await holds(harness, before))

    assert pages == [
        HoldPage(holds=(hold(5),), next_before=4),
        HoldPage(holds=(hold(2),), next_before=2),
        HoldPage(holds=(hold(1),)),
    ]


async def test_a_page_lists_a_bounded_number(harness: InventoryHarness, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store, "HOLDS_LIMIT", 2)
    await harness.stock(mug=9)
    for order_id in range(1, 4):
        await harness.reserve(order_id, for_payment=True, mug=1)

    assert len((await holds(harness)).holds) == 2
