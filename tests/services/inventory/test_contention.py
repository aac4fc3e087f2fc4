"""Many at once, over two hosts on one database: nothing is oversold, and no request waits for ever."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import asyncpg
import pytest

from mercato.chassis.contract import ServiceError
from mercato.chassis.postgres.database import Tx
from mercato.contracts.inventory import (
    Inventory,
    OutOfStock,
    Reservation,
    ReservationClosed,
    ReserveStock,
    StockLine,
)
from mercato.services.inventory import fast_path, store
from mercato.services.inventory.rules import LevelDelta, ReservationChange, ReservedLine
from mercato.services.inventory.store import NewReservation
from mercato.testing.actors import SERVICE
from mercato.testing.builders import LAMP, MUG
from mercato.testing.cluster import Cluster
from services.inventory.harness import NONCE, InventoryHarness, commit, release, reserve


async def test_two_hundred_buyers_of_fifty_pieces_get_fifty(harness: InventoryHarness):
    other = await harness.another_host()
    await harness.stock(mug=50)
    clients = [harness.inventory, other.client(Inventory)]
    with harness.acting(SERVICE):
        outcomes = await asyncio.gather(
            *(clients[i % 2].reserve(reserve(i, mug=1)) for i in range(1, 201)), return_exceptions=True
        )

    assert Counter(type(one) for one in outcomes) == {Reservation: 50, OutOfStock: 150}
    assert await harness.pieces() == (50, 50)
    assert [what for what, _ in await harness.emitted("product", MUG)].count("stock.exhausted") == 1


@pytest.mark.parametrize("way", ["as a whole", "one by one"])
async def test_two_concurrent_reservations_of_the_last_piece_do_not_oversell(harness: InventoryHarness, way: str):
    """Both wait for the level before either may go on: what they could read there by then is true for one alone.

    One by one: the piece comes while they wait, so that no batch fits before.
    """
    other = await harness.another_host()
    await harness.stock(mug=1 if way == "as a whole" else 0)
    holder = await harness.connection()
    async with holder.transaction():
        await holder.execute("SELECT 1 FROM levels FOR NO KEY UPDATE")
        if way == "one by one":
            await holder.execute("UPDATE levels SET on_hand = 1, version = 2")
            await holder.execute(
                """
                INSERT INTO movements (product_id, level_version, kind, delta, actor_role, actor_id)
                VALUES (1, 2, 'receipt', 1, 'staff', 9)
                """
            )
        with harness.acting(SERVICE):
            calls = [
                asyncio.ensure_future(client.reserve(reserve(order_id, mug=1)))
                for order_id, client in ((7, harness.inventory), (8, other.client(Inventory)))
            ]
        await harness.until_blocked(2, by=calls)
    outcomes = await asyncio.gather(*calls, return_exceptions=True)

    assert Counter(type(one) for one in outcomes) == {Reservation: 1, OutOfStock: 1}
    assert await harness.pieces() == (1, 1)


async def test_of_a_batch_that_waits_for_a_level_each_order_gets_what_is_left(harness: InventoryHarness):
    """The batch fits when its statement begins, and does not when it gets the lock: the first orders get the rest."""
    await harness.stock(mug=3)
    holder = await harness.connection()
    async with holder.transaction():
        await holder.execute("UPDATE levels SET on_hand = 2, version = 2")
        await holder.execute(
            """
            INSERT INTO movements (product_id, level_version, kind, delta, actor_role, actor_id)
            VALUES (1, 2, 'adjustment', -1, 'staff', 9)
            """
        )
        batch = asyncio.ensure_future(harness.reserve_many(*(reserve(order_id, mug=1) for order_id in (7, 8, 9))))
        await harness.until_blocked(by=[batch])
    outcomes = await batch

    assert [type(one) for one in outcomes] == [Reservation, Reservation, OutOfStock]
    assert await harness.pieces() == (2, 2)
    assert await harness.emitted("reservation", 9) == []


async def test_of_a_commit_and_a_release_at_the_same_moment_one_is_done(harness: InventoryHarness):
    other = await harness.another_host()
    await harness.stock(mug=2)
    await harness.reserve(7, mug=2)
    holder = await harness.connection()
    async with holder.transaction():
        await holder.execute("SELECT 1 FROM reservations FOR NO KEY UPDATE")
        with harness.acting(SERVICE):
            sold = asyncio.ensure_future(harness.inventory.commit(commit(7)))
            freed = asyncio.ensure_future(other.client(Inventory).release(release(7)))
        await harness.until_blocked(2, by=[sold, freed])
    outcomes = await asyncio.gather(sold, freed, return_exceptions=True)

    [state] = (await harness.states()).values()
    assert isinstance(outcomes[1], Reservation)
    assert outcomes[1].state == state
    assert isinstance(outcomes[0], Reservation if state == "committed" else ReservationClosed)
    assert await harness.pieces() == ((0, 0) if state == "committed" else (2, 0))


async def test_carts_in_opposite_orders_do_not_wait_for_each_other_for_ever(harness: InventoryHarness):
    """Each cart holds both products, and each is reserved and then sold or released."""
    other = await harness.another_host()
    await harness.stock(mug=1_000, lamp=1_000)
    clients = [harness.inventory, other.client(Inventory)]

    async def shop(order_id: int) -> None:
        client = clients[order_id % 2]
        products = (MUG, LAMP) if order_id % 4 < 2 else (LAMP, MUG)
        lines = tuple(StockLine(product_id=i, quantity=1) for i in products)
        await client.reserve(
            ReserveStock(order_id=order_id, lines=lines, for_payment=True, idempotency_key="r", order_nonce=NONCE)
        )
        if order_id % 3:
            await client.commit(commit(order_id))
        else:
            await client.release(release(order_id))

    with harness.acting(SERVICE):
        await asyncio.gather(*(shop(order_id) for order_id in range(1, 501)))

    sold = sum(1 for i in range(1, 501) if i % 3)
    assert (await harness.pieces(MUG), await harness.pieces(LAMP)) == ((1_000 - sold, 0), (1_000 - sold, 0))
    assert await deadlocks(harness) == 0


async def test_concurrent_operations_on_the_same_orders_end_each_of_them_once(cluster: Cluster):
    """Over `local` alone: `loopback` would send a reserve again after the release, and call that a failure."""
    async with InventoryHarness(cluster, "local").running() as harness:
        await operate_on_the_same_orders(harness)


async def operate_on_the_same_orders(harness: InventoryHarness) -> None:
    other = await harness.another_host()
    await harness.stock(mug=30, lamp=30)
    clients = [harness.inventory, other.client(Inventory)]

    async def operate(i: int) -> ServiceError | Reservation:
        order_id, client = i % 20 + 1, clients[i // 20 % 2]
        match i % 3:
            case 0:
                [outcome] = await client.commit.many([commit(order_id)])
            case 1:
                [outcome] = await client.release.many([release(order_id)])
            case _:
                [outcome] = await client.reserve.many([reserve(order_id, lamp=1, mug=1, for_payment=bool(i % 2))])
        return outcome

    with harness.acting(SERVICE):
        outcomes = await asyncio.gather(*(operate(i) for i in range(240)))

    assert {type(one) for one in outcomes} <= {Reservation, ReservationClosed}
    assert await deadlocks(harness) == 0
    states = Counter((await harness.states()).values())
    sold = states["committed"]
    assert await harness.pieces(MUG) == (30 - sold, states["held"])


async def deadlocks(harness: InventoryHarness) -> int:
    connection = await harness.connection()
    await connection.execute("SELECT pg_stat_clear_snapshot()")
    return await connection.fetchval("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")


async def test_a_concurrent_duplicate_waits_for_the_first_and_gets_the_same_answer(harness: InventoryHarness):
    """The first has inserted and not committed; the second must neither refuse nor take pieces of its own."""
    other = await harness.another_host()
    await harness.stock(mug=1)
    holder = await harness.connection()
    async with holder.transaction():
        await holder.execute("SELECT 1 FROM levels FOR UPDATE")
        with harness.acting(SERVICE):
            calls = [
                asyncio.ensure_future(c.reserve(reserve(7, mug=1)))
                for c in (harness.inventory, other.client(Inventory))
            ]
        await harness.until_blocked(2, by=calls)
    first, second = await asyncio.gather(*calls)

    assert (first.state, second.state) == ("held", "held")
    assert await harness.pieces() == (1, 1)


# ------------------------------------------------------------------------------------------------------------- store


async def test_pieces_are_taken_only_where_there_are_so_many_whatever_the_caller_believes(harness: InventoryHarness):
    await harness.stock(mug=3, lamp=3)
    async with harness.database.transaction() as tx:
        changed = await store.change_levels(tx, [LevelDelta(MUG, 0, 4), LevelDelta(LAMP, 0, 3)])
    assert [(level.product_id, level.reserved) for level in changed] == [(LAMP, 3)]

    async with harness.database.transaction() as tx:
        refused = [
            await store.change_levels(tx, [delta])
            for delta in (
                LevelDelta(LAMP, 0, 1),
                LevelDelta(LAMP, -1, 0),
                LevelDelta(MUG, 0, -1),
                LevelDelta(MUG, -4, 0),
                LevelDelta(99, 1, 0),
            )
        ]
        assert refused == [[]] * 5
        await store.change_levels(tx, [LevelDelta(LAMP, 0, -3)])


async def test_the_check_of_levels_is_a_lock_of_its_own(harness: InventoryHarness):
    """Whatever writes there, and however: no more is promised than there is."""
    await harness.stock(mug=3)

    with pytest.raises(asyncpg.CheckViolationError, match="levels_reserved_within_on_hand"):
        await (await harness.connection()).execute("UPDATE levels SET reserved = 4")


async def test_a_reservation_that_another_process_has_changed_is_not_overwritten(harness: InventoryHarness):
    await harness.stock(mug=3)
    await harness.reserve(7, mug=1)
    async with harness.database.transaction() as tx:
        assert (
            await store.change_reservations(
                tx, [ReservationChange(7, "held", 9, 8), ReservationChange(8, "held", 2, 1)]
            )
            == 0
        )


async def test_locks_are_taken_in_ascending_order(harness: InventoryHarness):
    """One holds the lowest row: who asks for all of them must not have locked any of the others by then."""
    await harness.stock(mug=3, lamp=3, p3=3)
    for order_id in (1, 2, 3):
        await harness.reserve(order_id, mug=1)
    holder = await harness.connection()

    async def lock_backwards() -> tuple[list[int], list[int]]:
        async with harness.database.transaction() as tx:
            reservations = await store.lock_reservations(tx, [3, 2, 1])
            levels = await store.lock_levels(tx, [3, LAMP, MUG])
        return [r.order_id for r in reservations], [level.product_id for level in levels]

    for table, key in (("reservations", "order_id"), ("levels", "product_id")):
        async with holder.transaction():
            await holder.execute(f"SELECT 1 FROM {table} WHERE {key} = 1 FOR UPDATE")
            task = asyncio.create_task(lock_backwards())
            await harness.until_blocked(by=[task])
            assert await free(harness, table, key) == [2, 3]
        assert await task == ([1, 2, 3], [1, 2, 3])


Lock = Callable[[Tx, Sequence[int]], Awaitable[object]]


async def lock_all_held(tx: Tx, order_ids: Sequence[int]) -> None:
    await fast_path.end_all_held(tx, dict.fromkeys(order_ids, NONCE), "released")


async def lock_levels_of_all(tx: Tx, product_ids: Sequence[int]) -> None:
    """Those of an order that names its products in this order."""
    new = NewReservation(10 + product_ids[0], NONCE, True, tuple(ReservedLine(i, 1) for i in sorted(product_ids)))
    assert len(await fast_path.reserve_all(tx, [new], dict.fromkeys(product_ids, 1), 900, {})) == 3


@pytest.mark.parametrize(
    ("table", "key", "lock"),
    [
        ("reservations", "order_id", store.lock_reservations),
        ("levels", "product_id", store.lock_levels),
        ("reservations", "order_id", lock_all_held),
        ("levels", "product_id", lock_levels_of_all),
    ],
    ids=["reservations", "levels", "reservations of a batch", "levels of a batch"],
)
async def test_batches_that_name_the_same_rows_in_opposite_orders_do_not_deadlock(
    harness: InventoryHarness, table: str, key: str, lock: Lock
):
    """A third one holds the middle one. Locked as named, each of the two would have what the other waits for."""
    await harness.stock(mug=9, lamp=9, p3=9)
    for order_id in (1, 2, 3):
        await harness.reserve(order_id, mug=1)

    async def lock_all(ids: list[int]) -> None:
        async with harness.database.transaction() as tx:
            await lock(tx, ids)

    holder = await harness.connection()
    locking: list[asyncio.Task[None]] = []
    async with holder.transaction():
        await holder.execute(f"SELECT 1 FROM {table} WHERE {key} = 2 FOR UPDATE")
        for ids in ([1, 2, 3], [3, 2, 1]):
            locking.append(asyncio.create_task(lock_all(ids)))
            await harness.until_blocked(len(locking), by=locking)

    await asyncio.gather(*locking)
    assert await deadlocks(harness) == 0


async def free(harness: InventoryHarness, table: str, key: str) -> list[Any]:
    connection = await harness.connection()
    rows = await connection.fetch(f"SELECT {key} FROM {table} ORDER BY 1 FOR UPDATE SKIP LOCKED")
    return [row[0] for row in rows]
