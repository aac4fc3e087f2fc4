"""Many at once, over two hosts on one database: nothing is oversold, and nobody waits for ever."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import asyncpg
import pytest

from mercato.chassis.contract import ServiceError
from mercato.chassis.testing import Cluster, Rig
from mercato.contracts.inventory import (
    CommitStock,
    Inventory,
    OutOfStock,
    ReleaseStock,
    Reservation,
    ReservationClosed,
    ReserveStock,
    StockLine,
)
from mercato.services.inventory import store
from mercato.services.inventory.rules import Change, Shift
from services.inventory.world import LAMP, MUG, SHOP, World, opened, reserve


async def test_two_hundred_buyers_of_fifty_pieces_get_fifty(world: World):
    other = await world.another_rig()
    await world.stock(mug=50)
    clients = [world.inventory, other.client(Inventory)]
    with world.acting(SHOP):
        heard = await asyncio.gather(
            *(clients[i % 2].reserve(reserve(i, mug=1)) for i in range(1, 201)), return_exceptions=True
        )

    assert Counter(type(h) for h in heard) == {Reservation: 50, OutOfStock: 150}
    assert await world.pieces() == (50, 50)
    assert [what for what, _ in await world.told("product", MUG)].count("stock.exhausted") == 1


async def test_two_who_come_for_the_last_piece_at_the_same_moment_are_not_both_promised_it(world: World):
    """Both have come as far as its level before either may go on: what they could read there is true for one alone."""
    other = await world.another_rig()
    await world.stock(mug=1)
    holder = await world.connection()
    async with holder.transaction():
        await holder.execute("SELECT 1 FROM levels FOR NO KEY UPDATE")
        with world.acting(SHOP):
            calls = [
                asyncio.ensure_future(client.reserve(reserve(order_id, mug=1)))
                for order_id, client in ((7, world.inventory), (8, other.client(Inventory)))
            ]
        await world.until_waiting(2)
    heard = await asyncio.gather(*calls, return_exceptions=True)

    assert Counter(type(h) for h in heard) == {Reservation: 1, OutOfStock: 1}
    assert await world.pieces() == (1, 1)


async def test_carts_in_opposite_orders_do_not_wait_for_each_other_for_ever(world: World):
    """Each cart holds both products, and each is reserved and then sold or released."""
    other = await world.another_rig()
    await world.stock(mug=1_000, lamp=1_000)
    clients = [world.inventory, other.client(Inventory)]

    async def shop(order_id: int) -> None:
        client = clients[order_id % 2]
        products = (MUG, LAMP) if order_id % 4 < 2 else (LAMP, MUG)
        lines = tuple(StockLine(product_id=i, quantity=1) for i in products)
        await client.reserve(ReserveStock(order_id=order_id, lines=lines, for_payment=True, idempotency_key="r"))
        if order_id % 3:
            await client.commit(CommitStock(order_id=order_id, idempotency_key="c"))
        else:
            await client.release(ReleaseStock(order_id=order_id, idempotency_key="l"))

    with world.acting(SHOP):
        await asyncio.gather(*(shop(order_id) for order_id in range(1, 501)))

    sold = sum(1 for i in range(1, 501) if i % 3)
    assert (await world.pieces(MUG), await world.pieces(LAMP)) == ((1_000 - sold, 0), (1_000 - sold, 0))
    assert await deadlocks(world) == 0


async def test_everything_at_once_about_the_same_orders_ends_each_of_them_once(cluster: Cluster):
    """Over `local` alone: `wire` would send a reserve again after somebody else's release, and call that a failure."""
    rig = Rig(cluster, "local")
    async with opened(rig) as world:
        await hurry_about_the_same_orders(world)
    await rig.close()


async def hurry_about_the_same_orders(world: World) -> None:
    other = await world.another_rig()
    await world.stock(mug=30, lamp=30)
    clients = [world.inventory, other.client(Inventory)]

    async def hurry(i: int) -> ServiceError | Reservation:
        order_id, client = i % 20 + 1, clients[i // 20 % 2]
        match i % 3:
            case 0:
                request = CommitStock(order_id=order_id, idempotency_key="c")
                [heard] = await client.commit.many([request])
            case 1:
                [heard] = await client.release.many([ReleaseStock(order_id=order_id, idempotency_key="l")])
            case _:
                [heard] = await client.reserve.many([reserve(order_id, lamp=1, mug=1, for_payment=bool(i % 2))])
        return heard

    with world.acting(SHOP):
        heard = await asyncio.gather(*(hurry(i) for i in range(240)))

    assert {type(h) for h in heard} <= {Reservation, ReservationClosed}
    assert await deadlocks(world) == 0
    states = Counter((await world.states()).values())
    sold = states["committed"]
    assert await world.pieces(MUG) == (30 - sold, states["held"])


async def deadlocks(world: World) -> int:
    connection = await world.connection()
    await connection.execute("SELECT pg_stat_clear_snapshot()")
    return await connection.fetchval("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")


async def test_a_twin_waits_for_the_first_and_hears_the_same(world: World):
    """The first has inserted and not committed; the second must neither refuse nor take pieces of its own."""
    other = await world.another_rig()
    await world.stock(mug=1)
    holder = await world.connection()
    async with holder.transaction():
        await holder.execute("SELECT 1 FROM levels FOR UPDATE")
        with world.acting(SHOP):
            calls = [
                asyncio.ensure_future(c.reserve(reserve(7, mug=1))) for c in (world.inventory, other.client(Inventory))
            ]
        await world.until_waiting(2)
    first, second = await asyncio.gather(*calls)

    assert (first.state, second.state) == ("held", "held")
    assert await world.pieces() == (1, 1)


# ------------------------------------------------------------------------------------------------------------- store


async def test_pieces_are_taken_only_where_there_are_so_many_whatever_the_caller_believes(world: World):
    await world.stock(mug=3, lamp=3)
    async with world.database.transaction() as tx:
        changed = await store.shift_levels(tx, [Shift(MUG, 0, 4), Shift(LAMP, 0, 3)])
    assert [(level.product_id, level.reserved) for level in changed] == [(LAMP, 3)]

    async with world.database.transaction() as tx:
        refused = [
            await store.shift_levels(tx, [shift])
            for shift in (Shift(LAMP, 0, 1), Shift(LAMP, -1, 0), Shift(MUG, 0, -1), Shift(MUG, -4, 0), Shift(99, 1, 0))
        ]
        assert refused == [[]] * 5
        await store.shift_levels(tx, [Shift(LAMP, 0, -3)])


async def test_the_check_of_levels_is_a_lock_of_its_own(world: World):
    """Whatever writes there, and however: no more is promised than there is."""
    await world.stock(mug=3)

    with pytest.raises(asyncpg.CheckViolationError, match="levels_reserved_within_on_hand"):
        await (await world.connection()).execute("UPDATE levels SET reserved = 4")


async def test_a_reservation_that_was_changed_by_somebody_else_is_not_changed(world: World):
    await world.stock(mug=3)
    await world.reserve(7, mug=1)
    async with world.database.transaction() as tx:
        assert await store.change_reservations(tx, [Change(7, "held", 9, 8), Change(8, "held", 2, 1)]) == 0


async def test_locks_are_taken_in_ascending_order(world: World):
    """One holds the lowest row: who asks for all of them must not have locked any of the others by then."""
    await world.stock(mug=3, lamp=3, p3=3)
    for order_id in (1, 2, 3):
        await world.reserve(order_id, mug=1)
    holder = await world.connection()

    async def lock_backwards() -> tuple[list[int], list[int]]:
        async with world.database.transaction() as tx:
            reservations = await store.lock_reservations(tx, [3, 2, 1])
            levels = await store.lock_levels(tx, [3, LAMP, MUG])
        return [r.order_id for r in reservations], [level.product_id for level in levels]

    for table, key in (("reservations", "order_id"), ("levels", "product_id")):
        async with holder.transaction():
            await holder.execute(f"SELECT 1 FROM {table} WHERE {key} = 1 FOR UPDATE")
            task = asyncio.create_task(lock_backwards())
            await world.until_waiting()
            assert await free(world, table, key) == [2, 3]
        assert await task == ([1, 2, 3], [1, 2, 3])


@pytest.mark.parametrize(
    ("table", "key", "lock"),
    [
        ("reservations", "order_id", store.lock_reservations),
        ("levels", "product_id", store.lock_levels),
    ],
    ids=["reservations", "levels"],
)
async def test_who_names_the_same_rows_the_other_way_round_waits_and_does_not_deadlock(
    world: World, table: str, key: str, lock: Any
):
    """Somebody holds the middle one. Locked as they are named, each of the two would have what the other waits for."""
    await world.stock(mug=3, lamp=3, p3=3)
    for order_id in (1, 2, 3):
        await world.reserve(order_id, mug=1)

    async def lock_all(ids: list[int]) -> int:
        async with world.database.transaction() as tx:
            return len(await lock(tx, ids))

    holder = await world.connection()
    locking: list[asyncio.Task[int]] = []
    async with holder.transaction():
        await holder.execute(f"SELECT 1 FROM {table} WHERE {key} = 2 FOR UPDATE")
        for ids in ([1, 2, 3], [3, 2, 1]):
            locking.append(asyncio.create_task(lock_all(ids)))
            await world.until_waiting(len(locking))

    assert await asyncio.gather(*locking) == [3, 3]


async def free(world: World, table: str, key: str) -> list[Any]:
    connection = await world.connection()
    rows = await connection.fetch(f"SELECT {key} FROM {table} ORDER BY 1 FOR UPDATE SKIP LOCKED")
    return [row[0] for row in rows]
