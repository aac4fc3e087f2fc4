"""Moving orders along their axes, cancelling them, and their history."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any, cast

import asyncpg
import pytest

from mercato.chassis.contract import Actor, Forbidden, Internal, StaleVersion, attempt
from mercato.chassis.observability.faults import Fault
from mercato.contracts.orders import (
    Axis,
    CancelOrder,
    GetHistory,
    GetOrder,
    HistoryEntry,
    IllegalMove,
    MoveOrder,
    Order,
    OrderNotFound,
)
from mercato.services.orders import rules, store
from services.orders.world import ALICE, BOB, STAFF, World

MOVED_BY_STAFF: tuple[Axis, ...] = ("status", "fulfilment")


def pairs(axis: Axis) -> list[tuple[str, str]]:
    return list(itertools.product(rules.AXES[axis], rules.AXES[axis]))


async def fail(_point: str) -> None:
    raise RuntimeError("the power fails here")


async def history(world: World, order_id: int, actor: Actor = STAFF) -> tuple[HistoryEntry, ...]:
    with world.acting(actor):
        return (await world.orders.history(GetHistory(id=order_id))).entries


async def move(world: World, order_id: int, **fields: Any) -> Order:
    with world.acting(STAFF):
        return await world.orders.move(MoveOrder(id=order_id, **fields))


async def at_rest(world: World, order: Order) -> Order:
    """Once nothing is under way for it any more: its stock is held."""
    return await world.settled(order.id)


async def find(world: World, order_id: int) -> Order:
    with world.acting(STAFF):
        return await world.orders.get(GetOrder(id=order_id))


async def cancel(world: World, order_id: int, actor: Actor, **fields: Any) -> Order:
    with world.acting(actor):
        return await world.orders.cancel(CancelOrder(id=order_id, **fields))


# ------------------------------------------------------------------------------------------------------- all the pairs


@pytest.mark.parametrize("axis", MOVED_BY_STAFF)
async def test_each_pair_of_states_is_legal_or_refused_with_the_legal_ones(world: World, axis: Axis):
    for before, after in pairs(axis):
        order = await world.placed_in(axis, before)
        entries = await history(world, order.id)
        if after in rules.AXES[axis][before]:
            await legal_move(world, order, axis, after)
        elif after == before:
            assert await move(world, order.id, **{axis: after}) == order  # a move that comes again is harmless
            assert await history(world, order.id) == entries
        else:
            await illegal_move(world, order, axis, after)
            assert await history(world, order.id) == entries


async def legal_move(world: World, order: Order, axis: Axis, after: str) -> None:
    moved = await move(world, order.id, **{axis: after})

    assert (getattr(moved, axis), moved.version) == (after, order.version + 1)
    last = (await history(world, order.id))[-1]
    assert (last.axis, last.before, last.after, last.version) == (axis, getattr(order, axis), after, moved.version)
    assert (last.actor_role, last.actor_id, last.at) == ("staff", STAFF.id, moved.updated_at)


async def illegal_move(world: World, order: Order, axis: Axis, after: str) -> None:
    with pytest.raises(IllegalMove) as refused:
        await move(world, order.id, **{axis: after})

    before = getattr(order, axis)
    assert (refused.value.axis, refused.value.current, refused.value.wanted) == (axis, before, after)
    assert set(refused.value.legal) == rules.AXES[axis][before]
    assert refused.value.order_id == order.id


@pytest.mark.parametrize("axis", rules.AXES)
async def test_only_declared_moves_are_written(world: World, axis: Axis):
    """Of all three axes, and without the checks in front of it."""
    order = await at_rest(world, await world.place())
    connection = await world.connection()
    for before, after in pairs(axis):
        await connection.execute(f"UPDATE orders SET {axis} = $2 WHERE id = $1", order.id, before)
        now = await find(world, order.id)
        wanted = store.Move(now, again=axis, **cast(Any, {axis: after}))

        moved = await try_to_move(world, wanted)

        assert moved == (after in rules.AXES[axis][before]), (before, after)
        row = (await world.raw(order.id)).order
        assert (getattr(row, axis), row.version) == (after if moved else before, now.version + moved)


async def try_to_move(world: World, wanted: store.Move) -> bool:
    try:
        async with world.database.transaction() as tx:
            [moved] = await store.move(tx, [wanted], STAFF)
            assert moved
    except AssertionError:
        return False
    return True


async def test_a_batch_moves_only_the_orders_that_are_where_their_move_starts(world: World):
    orders = [await at_rest(world, await world.place()) for _ in range(3)]
    await move(world, orders[1].id, status="confirmed")
    wanted = [store.Move(order, status="cancelled", note="all") for order in orders]

    async with world.database.transaction() as tx:
        moved = await store.move(tx, wanted, STAFF)

    assert [order and (order.id, order.status) for order in moved] == [
        (orders[0].id, "cancelled"),
        None,
        (orders[2].id, "cancelled"),
    ]
    assert [(await world.raw(order.id)).order.status for order in orders] == ["cancelled", "confirmed", "cancelled"]
    assert [len(await history(world, order.id)) for order in orders] == [2, 2, 2]


async def test_a_payment_moves_although_the_goods_were_shipped_meanwhile(world: World):
    order = await move(world, (await world.place()).id, status="confirmed")
    await move(world, order.id, fulfilment="shipped")

    async with world.database.transaction() as tx:
        [moved] = await store.move(tx, [store.Move(order, payment="authorized")], STAFF)

    assert moved
    assert (moved.fulfilment, moved.payment, moved.version) == ("shipped", "authorized", 4)
    assert [(e.version, e.axis, e.after) for e in await history(world, order.id)][2:] == [
        (3, "fulfilment", "shipped"),
        (4, "payment", "authorized"),
    ]


async def test_one_move_along_two_axes_is_one_version_one_row_and_two_entries(world: World):
    order = await at_rest(world, await world.place())

    async with world.database.transaction() as tx:
        [moved] = await store.move(tx, [store.Move(order, status="confirmed", payment="authorized")], STAFF)

    assert moved
    assert moved.version == 2
    assert {(e.version, e.axis, e.after) for e in (await history(world, order.id))[1:]} == {
        (2, "status", "confirmed"),
        (2, "payment", "authorized"),
    }
    assert [type_ for type_, _ in await world.emitted(order.id)] == [
        "order.placed",
        "order.confirmed",
        "order.authorized",
    ]
    rows = "SELECT format('%s %s %s %s', version, status, payment, events) FROM history ORDER BY version"
    assert await world.values(rows) == [
        "1 pending unpaid {order.placed}",
        "2 confirmed authorized {order.confirmed,order.authorized}",
    ]


@pytest.mark.parametrize("statement", ["UPDATE history SET note = 'other'", "DELETE FROM history"])
async def test_rows_of_the_history_are_neither_changed_nor_deleted(world: World, statement: str):
    await world.place()
    connection = await world.connection()

    with pytest.raises(asyncpg.RestrictViolationError):
        await connection.execute(statement)


# -------------------------------------------------------------------------------------------------------------- moving


@pytest.mark.parametrize("status", ["pending", "cancelled"])
async def test_goods_move_only_for_confirmed_orders(world: World, status: str):
    order = await world.placed_in("status", status)

    with pytest.raises(IllegalMove) as refused:
        await move(world, order.id, fulfilment="shipped")

    assert (refused.value.axis, refused.value.legal) == ("fulfilment", ())


async def test_both_axes_move_together_status_first(world: World):
    order = await world.place()

    moved = await move(world, order.id, status="confirmed", fulfilment="shipped")

    assert (moved.status, moved.fulfilment, moved.version) == ("confirmed", "shipped", 3)
    with world.acting(ALICE):
        assert await world.orders.get(GetOrder(id=order.id)) == moved
    assert [(e.version, e.axis, e.after) for e in await history(world, order.id)] == [
        (1, "status", "pending"),
        (2, "status", "confirmed"),
        (3, "fulfilment", "shipped"),
    ]


@pytest.mark.parametrize("wanted", [("confirmed", "delivered"), ("cancelled", "shipped")])
async def test_of_two_axes_both_move_or_none(world: World, wanted: tuple[Any, Any]):
    order = await world.place()

    with pytest.raises(IllegalMove) as refused:
        await move(world, order.id, status=wanted[0], fulfilment=wanted[1])

    assert (refused.value.axis, refused.value.wanted) == ("fulfilment", wanted[1])
    assert (await world.raw(order.id)).order.status == "pending"
    assert await world.count("history") == 1


async def test_a_move_keeps_lines_total_and_owner(world: World):
    order = await world.place()

    moved = await move(world, order.id, status="confirmed")

    assert (moved.lines, moved.total_minor, moved.user_id) == (order.lines, order.total_minor, order.user_id)
    assert moved.created_at == order.created_at
    assert moved.updated_at > order.updated_at


async def test_a_move_with_another_version_than_the_orders_is_refused_as_stale(world: World):
    order = await world.place()
    await move(world, order.id, status="confirmed", version=1)

    with pytest.raises(StaleVersion) as stale:
        await move(world, order.id, fulfilment="shipped", version=1)
    with pytest.raises(StaleVersion):
        await cancel(world, order.id, ALICE, version=1)

    assert (stale.value.expected, stale.value.actual) == (1, 2)
    assert (await move(world, order.id, fulfilment="shipped", version=2)).version == 3


async def test_of_two_concurrent_moves_from_one_version_one_is_made(world: World):
    order = await world.place()
    elsewhere = await world.another_process()
    with world.acting(STAFF):
        outcomes = await asyncio.gather(
            world.orders.move(MoveOrder(id=order.id, status="confirmed", version=1)),
            elsewhere.cancel(CancelOrder(id=order.id, version=1)),
            return_exceptions=True,
        )

    # Who confirms may have begun when the cancel came, and be told so; or hears that the version is another by now.
    assert sorted(type(outcome).__name__ for outcome in outcomes) in (
        ["Order", "StaleVersion"],
        ["Order", "OrderCancelled"],
    )
    assert (await world.raw(order.id)).order.version == 2
    assert await world.count("history") == 2


async def test_a_move_that_waited_for_another_starts_from_where_that_one_ended(
    world: World, plant: Callable[[str, Fault], Callable[[], None]]
):
    order = await world.placed_in("status", "confirmed")
    elsewhere = await world.another_process()
    reached, go_on = asyncio.Event(), asyncio.Event()

    async def hold(_point: str) -> None:
        reached.set()
        await go_on.wait()

    lift = plant("orders.move.before_commit", hold)
    with world.acting(STAFF):
        first = asyncio.ensure_future(world.orders.move(MoveOrder(id=order.id, fulfilment="shipped")))
        await reached.wait()
        lift()
        second = asyncio.ensure_future(elsewhere.move(MoveOrder(id=order.id, fulfilment="delivered")))
        await world.until_waiting()
        go_on.set()
        moved = [await first, await second]

    assert [(order.version, order.status, order.fulfilment) for order in moved] == [
        (3, "confirmed", "shipped"),
        (4, "confirmed", "delivered"),
    ]
    times = [entry.at for entry in await history(world, order.id)]
    assert times == sorted(times)


async def test_times_of_an_order_go_forward_when_a_move_waited_for_a_later_one(world: World):
    order = await world.place()
    async with world.database.transaction() as tx:
        await tx.execute("SELECT now()")  # this transaction begins before the next one, and moves after it
        moved = await asyncio.create_task(move_in_task(world, order.id))
        [later] = await store.move(tx, [store.Move(moved, fulfilment="shipped")], STAFF)

    assert later
    assert later.updated_at >= moved.updated_at


async def move_in_task(world: World, order_id: int) -> Order:
    attempt.set(None)  # as somebody else, who is in no transaction
    return await move(world, order_id, status="confirmed")


@pytest.mark.parametrize(
    ("point", "change"),
    [
        ("orders.move.before_commit", {"fulfilment": "shipped"}),
        ("orders.cancel.before_commit", {"status": "cancelled"}),
        ("orders.confirm.before_commit", {"status": "confirmed"}),
    ],
)
async def test_a_crash_before_the_commit_of_a_move_leaves_nothing(
    world: World, plant: Callable[[str, Fault], Callable[[], None]], point: str, change: dict[str, Any]
):
    order = await world.placed_in("status", "confirmed" if "fulfilment" in change else "pending")
    lift = plant(point, fail)
    with pytest.raises(Internal):
        await move(world, order.id, **change)
    assert (await world.raw(order.id)).order.version == order.version
    assert len(await history(world, order.id)) == order.version

    lift()
    assert (await move(world, order.id, **change)).version == order.version + 1


async def test_a_repeated_move_whose_answer_was_lost_changes_nothing(
    world: World, plant: Callable[[str, Fault], Callable[[], None]]
):
    order = await world.placed_in("status", "confirmed")
    lift = plant("orders.move.after_commit", fail)
    with pytest.raises(Internal):
        await move(world, order.id, fulfilment="shipped")
    lift()
    assert (await world.emitted(order.id))[-1] == ("order.shipped", order.id)

    assert (await move(world, order.id, fulfilment="shipped")).version == 3
    assert await world.count("history") == 3


async def test_only_staff_move(world: World):
    order = await world.place()
    with world.acting(ALICE), pytest.raises(Forbidden):
        await world.orders.move(MoveOrder(id=order.id, status="confirmed"))


async def test_an_unknown_order_cannot_be_moved(world: World):
    with pytest.raises(OrderNotFound) as unknown:
        await move(world, 404, status="confirmed")

    assert unknown.value.order_id == 404


# ------------------------------------------------------------------------------------------------------------- cancel


@pytest.mark.parametrize("status", ["pending", "confirmed"])
@pytest.mark.parametrize("actor", [ALICE, STAFF])
async def test_owner_and_staff_cancel_what_has_not_been_shipped(world: World, status: str, actor: Actor):
    order = await world.placed_in("status", status)

    cancelled = await cancel(world, order.id, actor, reason="ordered by mistake")

    assert (cancelled.status, cancelled.version) == ("cancelled", order.version + 1)
    last = (await history(world, order.id))[-1]
    assert (last.before, last.after, last.reason) == (status, "cancelled", "ordered by mistake")
    assert (last.actor_role, last.actor_id) == (actor.role, actor.id)


async def test_a_cancel_by_another_customer_is_refused_as_for_an_unknown_order(world: World):
    order = await world.place()

    with pytest.raises(OrderNotFound) as others:
        await cancel(world, order.id, BOB)
    with pytest.raises(OrderNotFound) as others_with_version:
        await cancel(world, order.id, BOB, version=77)
    with pytest.raises(OrderNotFound) as unknown:
        await cancel(world, order.id + 1, BOB)

    assert others.value.details == others_with_version.value.details == {"order_id": order.id}
    assert unknown.value.details == {"order_id": order.id + 1}
    assert (await world.raw(order.id)).order.status == "pending"


@pytest.mark.parametrize("actor", [ALICE, STAFF])
async def test_a_shipped_order_cannot_be_cancelled(world: World, actor: Actor):
    """It comes back, and is refunded."""
    order = await world.placed_in("fulfilment", "shipped")

    with pytest.raises(IllegalMove) as refused:
        await cancel(world, order.id, actor)

    assert (refused.value.current, refused.value.wanted) == ("confirmed", "cancelled")
    assert refused.value.legal == ("completed",)
    assert (await world.raw(order.id)).order.status == "confirmed"


async def test_a_completed_order_cannot_be_cancelled(world: World):
    order = await world.placed_in("status", "completed")

    for actor in (ALICE, STAFF):
        with pytest.raises(IllegalMove):
            await cancel(world, order.id, actor)


async def test_a_repeated_cancel_changes_nothing(world: World):
    order = await world.place()
    once = await cancel(world, order.id, ALICE, reason="first")

    assert await cancel(world, order.id, ALICE, reason="second") == once
    assert await cancel(world, order.id, STAFF) == once
    assert [entry.reason for entry in await history(world, order.id)] == ["", "first"]


async def test_concurrent_cancels_in_two_processes_are_one_transition(world: World):
    order = await world.place()
    elsewhere = await world.another_process()
    with world.acting(ALICE):
        cancelled = await asyncio.gather(
            *((world.orders if n % 2 else elsewhere).cancel(CancelOrder(id=order.id)) for n in range(10))
        )

    assert {order.version for order in cancelled} == {2}
    assert await world.count("history") == 2


# ---------------------------------------------------------------------------------------------------- get and history


async def test_owner_and_staff_read_an_order_which_others_do_not_find(world: World):
    order = await world.place()
    with world.acting(ALICE):
        own = world.orders.get(GetOrder(id=order.id))
    with world.acting(STAFF):
        staffs = world.orders.get(GetOrder(id=order.id))
    with world.acting(BOB):
        others = world.orders.get(GetOrder(id=order.id))
        unknown = world.orders.get(GetOrder(id=404))

    outcomes = await asyncio.gather(own, staffs, others, unknown, return_exceptions=True)

    assert outcomes[:2] == [order, order]
    assert [type(outcome) for outcome in outcomes[2:]] == [OrderNotFound, OrderNotFound]
    assert [getattr(outcome, "order_id", None) for outcome in outcomes[2:]] == [order.id, 404]


async def test_owner_and_staff_read_a_history_which_others_do_not_find(world: World):
    order = await world.place()
    await move(world, order.id, status="confirmed")

    assert await history(world, order.id, ALICE) == await history(world, order.id, STAFF)
    assert [(e.before, e.after) for e in await history(world, order.id)] == [
        (None, "pending"),
        ("pending", "confirmed"),
    ]
    for order_id in (order.id, 404):
        with pytest.raises(OrderNotFound) as unknown:
            await history(world, order_id, BOB)
        assert unknown.value.details == {"order_id": order_id}
