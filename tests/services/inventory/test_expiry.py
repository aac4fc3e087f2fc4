"""What is held and not paid for ends by itself, by the clock of the database; what is being paid for does not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

import pytest
import pytest_asyncio

from mercato.chassis.hosting.options import OptionError
from mercato.chassis.observability.faults import Fault
from mercato.contracts.inventory import ReservationClosed, TraceStock
from mercato.services.inventory import reserving
from mercato.services.inventory.app import build
from mercato.testing.harness import Cluster, Rig
from mercato.testing.outbox import EVENTS
from mercato.testing.waiting import without_waiting
from services.inventory.world import NONCE, STAFF, World, opened

Plant = Callable[[str, Fault], Callable[[], None]]


@pytest_asyncio.fixture
async def brisk(cluster: Cluster) -> AsyncGenerator[World]:
    """A world that looks for what is over all the time."""
    rig = Rig(cluster, "local", {"MERCATO_INVENTORY_EXPIRE_EVERY_SECONDS": "0.02"})
    async with opened(rig) as world:
        yield world
    await rig.close()


async def test_what_is_over_ends_and_its_pieces_are_free(brisk: World):
    await brisk.stock(mug=2)
    await brisk.reserve(7, mug=2)
    await brisk.let_time_pass(7)

    async def over() -> bool:
        return await brisk.states() == {7: "expired"}

    await brisk.until(over)
    assert await brisk.pieces() == (2, 0)
    assert await brisk.told("reservation", 7) == [("stock.held", 1), ("stock.expired", 2)]
    assert [what for what, _ in await brisk.told("product", 1)][-1] == "stock.available"
    with pytest.raises(ReservationClosed):
        await brisk.commit(7)
    assert (await brisk.release(7)).state == "expired"
    with brisk.acting(STAFF):
        trace = await brisk.inventory.trace(TraceStock(order_id=7, order_nonce=NONCE))
    assert [step.what for step in trace.steps] == ["held", "expired"]


async def test_what_is_being_paid_for_does_not_end(brisk: World):
    await brisk.stock(mug=4)
    await brisk.reserve(7, mug=1)
    await brisk.reserve(7, mug=1, for_payment=True)
    await brisk.reserve(8, mug=1, for_payment=True)
    await brisk.reserve(9, mug=1)
    for order_id in (7, 8, 9):  # the first two have no time that could pass
        await (await brisk.connection()).execute(
            "UPDATE reservations SET expires_at = expires_at - interval '1 day' WHERE order_id = $1", order_id
        )

    async def nine_is_over() -> bool:
        return (await brisk.states())[9] == "expired"

    await brisk.until(nine_is_over)
    assert await brisk.states() == {7: "held", 8: "held", 9: "expired"}
    assert (await brisk.commit(7)).state == "committed"


async def test_the_operator_says_how_long_stock_is_held(cluster: Cluster):
    rig = Rig(cluster, "local", {"MERCATO_INVENTORY_HOLD_SECONDS": "120"})
    async with opened(rig) as world:
        await world.stock(mug=2)
        held = await world.reserve(7, mug=2)
        [left] = await world.values("SELECT extract(epoch FROM expires_at - created_at)::float8 FROM reservations")
    await rig.close()

    assert held.expires_in_s is not None
    assert 110 < held.expires_in_s <= 120
    assert left == 120


@pytest.mark.parametrize("name", ["HOLD_SECONDS", "EXPIRE_EVERY_SECONDS"])
@pytest.mark.parametrize("value", ["0", "-1", "soon", "nan", "inf"])
async def test_no_other_times_than_sensible_ones_are_taken(cluster: Cluster, name: str, value: str):
    rig = Rig(cluster, "local", {f"MERCATO_INVENTORY_{name}": value})
    with pytest.raises(OptionError, match=name):
        await rig.open(inventory=build)
    await rig.close()


# ------------------------------------------------------------------------------- before the loop has come to look


@pytest_asyncio.fixture
async def idle(cluster: Cluster) -> AsyncGenerator[World]:
    """A world whose loop never looks: a test calls it itself."""
    rig = Rig(cluster, "local", {"MERCATO_INVENTORY_EXPIRE_EVERY_SECONDS": "3600"})
    async with opened(rig) as world:
        yield world
    await rig.close()


@pytest.mark.parametrize("for_payment", [False, True])
async def test_a_payment_cannot_begin_when_the_time_is_over(idle: World, for_payment: bool):
    await idle.stock(mug=2)
    await idle.reserve(7, mug=2)
    await idle.let_time_pass(7)
    with pytest.raises(ReservationClosed) as refused:
        await idle.reserve(7, mug=2, for_payment=for_payment)

    assert refused.value.state == "expired"
    assert await idle.states() == {7: "expired"}
    assert await idle.pieces() == (2, 0)
    assert await idle.told("reservation", 7) == [("stock.held", 1), ("stock.expired", 2)]


async def test_what_is_over_is_still_sold_or_released_while_nobody_has_ended_it(idle: World):
    await idle.stock(mug=2)
    for order_id in (7, 8):
        await idle.reserve(order_id, mug=1)
        await idle.let_time_pass(order_id)

    assert (await idle.commit(7)).state == "committed"
    assert (await idle.release(8)).state == "released"
    assert await idle.pieces() == (1, 0)


async def test_the_pieces_of_what_is_over_go_to_the_next_of_the_same_batch(idle: World):
    await idle.stock(mug=1)
    await idle.reserve(7, mug=1)
    await idle.let_time_pass(7)
    with pytest.raises(ReservationClosed):
        await idle.reserve(7, mug=1)

    assert (await idle.reserve(8, mug=1)).state == "held"


async def test_one_round_is_bounded_and_says_that_there_are_more(idle: World, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reserving, "EXPIRED_AT_ONCE", 2)
    await idle.stock(mug=9)
    for order_id in range(1, 6):
        await idle.reserve(order_id, mug=1)
        await idle.let_time_pass(order_id)
    looker = reserving.Reserving(idle.database, 900)

    assert [await looker.expire() for _ in range(4)] == [2, 2, 1, 0]
    assert await idle.pieces() == (9, 0)


async def test_what_somebody_else_is_at_is_left_to_them(idle: World):
    await idle.stock(mug=2)
    for order_id in (7, 8):
        await idle.reserve(order_id, mug=1)
        await idle.let_time_pass(order_id)
    holder = await idle.connection()
    async with holder.transaction():
        await holder.execute("SELECT 1 FROM reservations WHERE order_id = 7 FOR UPDATE")
        expire = reserving.Reserving(idle.database, 900).expire()
        assert await without_waiting(idle.rig.dsns["inventory"], expire) == 1
    assert await idle.states() == {7: "held", 8: "expired"}


async def test_two_lookers_at_once_end_each_reservation_once(idle: World):
    await idle.stock(mug=20)
    for order_id in range(1, 21):
        await idle.reserve(order_id, mug=1)
    await (await idle.connection()).execute("UPDATE reservations SET expires_at = now() - interval '1 second'")
    ended = await asyncio.gather(*(reserving.Reserving(idle.database, 900).expire() for _ in range(4)))

    assert sum(ended) == 20
    assert await idle.values(f"SELECT count(*) FROM {EVENTS} WHERE type = 'stock.expired'") == [20]


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_crash_at_the_commit_of_a_round_is_made_good_by_the_next(idle: World, plant: Plant, when: str):
    async def fail(_point: str) -> None:
        raise RuntimeError("the power fails here")

    await idle.stock(mug=2)
    await idle.reserve(7, mug=2)
    await idle.let_time_pass(7)
    looker = reserving.Reserving(idle.database, 900)
    lift = plant(f"inventory.expire.{when}_commit", fail)
    with pytest.raises(RuntimeError):
        await looker.expire()
    lift()

    assert await looker.expire() == (1 if when == "before" else 0)
    assert await idle.pieces() == (2, 0)
