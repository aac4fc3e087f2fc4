"""Orders of guests hold a share of each product's stock, and no more, however many ask at once."""

from __future__ import annotations

import asyncio
from collections import Counter

import msgspec
import pytest

from mercato.chassis.contract import ServiceError
from mercato.contracts.inventory import Inventory, OutOfStock, Reservation, ReserveStock
from mercato.services.inventory.reserving import Reserving
from mercato.services.inventory.rules import guest_share
from mercato.testing.actors import SERVICE
from services.inventory.harness import InventoryHarness, reserve


def of_guest(order_id: int, *, for_payment: bool = False, **quantities: int) -> ReserveStock:
    return msgspec.structs.replace(reserve(order_id, for_payment=for_payment, **quantities), guest=True)


async def held(harness: InventoryHarness, *requests: ReserveStock) -> list[bool]:
    """Which of the requests get a reservation."""
    return [isinstance(answer, Reservation) for answer in await harness.reserve_many(*requests)]


@pytest.mark.parametrize(("on_hand", "share"), [(0, 0), (1, 1), (4, 1), (9, 1), (10, 2), (99, 19), (100, 20)])
def test_the_share_is_a_fifth_and_at_least_a_piece(on_hand: int, share: int):
    assert guest_share(on_hand) == share


async def test_guests_on_two_hosts_at_once_hold_their_share_and_no_more(harness: InventoryHarness):
    """All wait for the level before any may go on: what each could read of the others by then is nothing."""
    other = await harness.another_host()
    await harness.stock(mug=50)
    clients = [harness.inventory, other.client(Inventory)]
    holder = await harness.connection()
    async with holder.transaction():
        await holder.execute("SELECT 1 FROM levels FOR NO KEY UPDATE")
        with harness.acting(SERVICE):
            calls = [asyncio.ensure_future(clients[i % 2].reserve(of_guest(i, mug=1 + i % 2))) for i in range(1, 41)]
        await harness.until_blocked(2, by=calls)
    outcomes = await asyncio.gather(*calls, return_exceptions=True)

    assert {type(one) for one in outcomes} == {Reservation, OutOfStock}
    pieces = sum(line.quantity for h in outcomes if isinstance(h, Reservation) for line in h.lines)
    assert pieces == 10
    assert await harness.pieces() == (50, 10)


async def test_accounts_hold_what_guests_may_not(harness: InventoryHarness):
    await harness.stock(mug=10)
    assert await held(harness, of_guest(1, mug=2), of_guest(2, mug=1), reserve(3, mug=8)) == [True, False, True]
    assert await harness.pieces() == (10, 10)


async def test_a_refusal_says_what_guests_may_still_have(harness: InventoryHarness):
    await harness.stock(mug=10)
    [refusal] = await harness.reserve_many(of_guest(1, mug=3))
    assert isinstance(refusal, OutOfStock)
    assert [(line.requested, line.available) for line in refusal.lines] == [(3, 2)]


@pytest.mark.parametrize("end", ["release", "commit", "expire"])
async def test_what_has_ended_does_not_count(harness: InventoryHarness, end: str):
    await harness.stock(mug=10)
    assert await held(harness, of_guest(1, mug=2)) == [True]
    if end == "expire":
        await harness.let_time_pass(1)
        await Reserving(harness.database, 900).expire()
    else:
        await getattr(harness, end)(1)
    pieces = guest_share(8 if end == "commit" else 10)
    assert await held(harness, of_guest(2, mug=pieces + 1), of_guest(3, mug=pieces)) == [False, True]
    assert await harness.rows("SELECT order_id, quantity FROM guest_holds") == [(3, pieces)]


async def test_a_guest_who_asks_again_keeps_what_is_held(harness: InventoryHarness):
    await harness.stock(mug=10)
    first = of_guest(1, mug=2)
    again = of_guest(1, mug=2, for_payment=True)
    assert await held(harness, first, first) == [True, True]
    assert await held(harness, again, of_guest(2, mug=1)) == [True, False]
    assert await harness.pieces() == (10, 2)


async def test_answers_of_guests_and_others_are_in_order(harness: InventoryHarness):
    await harness.stock(mug=10)
    answers = await harness.reserve_many(reserve(1, mug=1), of_guest(2, mug=9), reserve(3, mug=1), of_guest(4, mug=1))
    assert [None if isinstance(a, ServiceError) else a.order_id for a in answers] == [1, None, 3, 4]
    assert Counter(type(a) for a in answers) == {Reservation: 3, OutOfStock: 1}
