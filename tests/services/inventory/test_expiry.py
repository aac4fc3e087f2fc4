"""What is held and not paid for ends by itself, by the clock of the database; what is being paid for does not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest
import pytest_asyncio

from mercato.chassis.hosting.options import OptionError
from mercato.contracts.inventory import ReservationClosed, TraceStock
from mercato.services.inventory import reserving
from mercato.services.inventory.app import build
from mercato.testing.actors import STAFF
from mercato.testing.cluster import Cluster
from mercato.testing.harness import ServiceHarness
from mercato.testing.injection import Inject, fail
from mercato.testing.tables import EVENTS
from mercato.testing.waiting import until, without_waiting
from services.inventory.harness import NONCE, InventoryHarness


@pytest_asyncio.fixture
async def brisk(cluster: Cluster) -> AsyncGenerator[InventoryHarness]:
    """Expired holds are ended all the time."""
    async with InventoryHarness(cluster, "local").running(inventory_expire_every_seconds=0.02) as harness:
        yield harness


async def test_an_expired_hold_ends_and_frees_its_pieces(brisk: InventoryHarness):
    await brisk.stock(mug=2)
    await brisk.reserve(7, mug=2)
    await brisk.let_time_pass(7)

    async def over() -> bool:
        return await brisk.states() == {7: "expired"}

    await until(over)
    assert await brisk.pieces() == (2, 0)
    assert await brisk.emitted("reservation", 7) == [("stock.held", 1), ("stock.expired", 2)]
    assert [what for what, _ in await brisk.emitted("product", 1)][-1] == "stock.available"
    with pytest.raises(ReservationClosed):
        await brisk.commit(7)
    assert (await brisk.release(7)).state == "expired"
    with brisk.acting(STAFF):
        trace = await brisk.inventory.trace(TraceStock(order_id=7, order_nonce=NONCE))
    assert [step.what for step in trace.steps] == ["held", "expired"]


async def test_a_hold_of_a_payment_under_way_does_not_expire(brisk: InventoryHarness):
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

    await until(nine_is_over)
    assert await brisk.states() == {7: "held", 8: "held", 9: "expired"}
    assert (await brisk.commit(7)).state == "committed"


async def test_the_operator_says_how_long_stock_is_held(cluster: Cluster):
    async with InventoryHarness(cluster, "local").running(inventory_hold_seconds=120) as harness:
        await harness.stock(mug=2)
        held = await harness.reserve(7, mug=2)
        [left] = await harness.values("SELECT extract(epoch FROM expires_at - created_at)::float8 FROM reservations")

    assert held.expires_in_s is not None
    assert 110 < held.expires_in_s <= 120
    assert left == 120


@pytest.mark.parametrize("name", ["HOLD_SECONDS", "EXPIRE_EVERY_SECONDS"])
@pytest.mark.parametrize("value", ["0", "-1", "soon", "nan", "inf"])
async def test_a_hold_time_out_of_its_bounds_is_refused(cluster: Cluster, name: str, value: str):
    harness = ServiceHarness(cluster, "local", {f"MERCATO_INVENTORY_{name}": value})
    with pytest.raises(OptionError, match=name):
        await harness.open({"inventory": build})


# ------------------------------------------------------------------------------- before the loop has come to look


@pytest_asyncio.fixture
async def idle(cluster: Cluster) -> AsyncGenerator[InventoryHarness]:
    """The loop that ends expired holds sleeps: a test runs it itself."""
    async with InventoryHarness(cluster, "local").running(inventory_expire_every_seconds=3600) as harness:
        yield harness


@pytest.mark.parametrize("for_payment", [False, True])
async def test_a_payment_cannot_begin_when_its_hold_has_expired(idle: InventoryHarness, for_payment: bool):
    await idle.stock(mug=2)
    await idle.reserve(7, mug=2)
    await idle.let_time_pass(7)
    with pytest.raises(ReservationClosed) as refused:
        await idle.reserve(7, mug=2, for_payment=for_payment)

    assert refused.value.state == "expired"
    assert await idle.states() == {7: "expired"}
    assert await idle.pieces() == (2, 0)
    assert await idle.emitted("reservation", 7) == [("stock.held", 1), ("stock.expired", 2)]


async def test_an_expired_hold_that_has_not_ended_yet_can_be_committed_or_released(idle: InventoryHarness):
    await idle.stock(mug=2)
    for order_id in (7, 8):
        await idle.reserve(order_id, mug=1)
        await idle.let_time_pass(order_id)

    assert (await idle.commit(7)).state == "committed"
    assert (await idle.release(8)).state == "released"
    assert await idle.pieces() == (1, 0)


async def test_pieces_of_an_expired_hold_go_to_the_next_request_of_the_same_batch(idle: InventoryHarness):
    await idle.stock(mug=1)
    await idle.reserve(7, mug=1)
    await idle.let_time_pass(7)
    with pytest.raises(ReservationClosed):
        await idle.reserve(7, mug=1)

    assert (await idle.reserve(8, mug=1)).state == "held"


async def test_one_round_is_bounded_and_says_that_there_are_more(
    idle: InventoryHarness, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(reserving, "EXPIRED_AT_ONCE", 2)
    await idle.stock(mug=9)
    for order_id in range(1, 6):
        await idle.reserve(order_id, mug=1)
        await idle.let_time_pass(order_id)
    looker = reserving.Reserving(idle.database, 900)

    assert [await looker.expire() for _ in range(4)] == [2, 2, 1, 0]
    assert await idle.pieces() == (9, 0)


async def test_a_hold_that_another_transaction_has_locked_is_skipped(idle: InventoryHarness):
    await idle.stock(mug=2)
    for order_id in (7, 8):
        await idle.reserve(order_id, mug=1)
        await idle.let_time_pass(order_id)
    holder = await idle.connection()
    async with holder.transaction():
        await holder.execute("SELECT 1 FROM reservations WHERE order_id = 7 FOR UPDATE")
        expire = reserving.Reserving(idle.database, 900).expire()
        assert await without_waiting(idle.dsns["inventory"], expire) == 1
    assert await idle.states() == {7: "held", 8: "expired"}


async def test_two_concurrent_scans_end_each_reservation_once(idle: InventoryHarness):
    await idle.stock(mug=20)
    for order_id in range(1, 21):
        await idle.reserve(order_id, mug=1)
    await (await idle.connection()).execute("UPDATE reservations SET expires_at = now() - interval '1 second'")
    ended = await asyncio.gather(*(reserving.Reserving(idle.database, 900).expire() for _ in range(4)))

    assert sum(ended) == 20
    assert await idle.values(f"SELECT count(*) FROM {EVENTS} WHERE type = 'stock.expired'") == [20]


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_crash_at_the_commit_of_a_round_is_made_good_by_the_next(
    idle: InventoryHarness, inject: Inject, when: str
):
    await idle.stock(mug=2)
    await idle.reserve(7, mug=2)
    await idle.let_time_pass(7)
    looker = reserving.Reserving(idle.database, 900)
    lift = inject(f"inventory.expire.{when}_commit", fail)
    with pytest.raises(RuntimeError):
        await looker.expire()
    lift()

    assert await looker.expire() == (1 if when == "before" else 0)
    assert await idle.pieces() == (2, 0)
