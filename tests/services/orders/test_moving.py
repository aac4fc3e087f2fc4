"""Moving orders along their axes, cancelling them, and their history."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any, cast

import asyncpg
import msgspec
import pytest

from mercato.chassis.contract import Actor, Forbidden, Internal, StaleVersion, handler_run
from mercato.contracts.order_history import HistoryEntry
from mercato.contracts.order_refusals import Axis, IllegalMove, OrderNotFound
from mercato.contracts.orders import CancelOrder, GetHistory, GetOrder, MoveOrder, Order
from mercato.services.orders import rules, store
from mercato.testing.actors import ALICE, BOB, STAFF
from mercato.testing.injection import Inject, Pause, fail
from services.orders.harness import OrdersHarness

MOVED_BY_STAFF: tuple[Axis, ...] = ("status", "fulfilment")


def pairs(axis: Axis) -> list[tuple[str, str]]:
    return list(itertools.product(rules.AXES[axis], rules.AXES[axis]))


async def history(harness: OrdersHarness, order_id: int, actor: Actor = STAFF) -> tuple[HistoryEntry, ...]:
    with harness.acting(actor):
        return (await harness.orders.history(GetHistory(id=order_id))).entries


async def move(harness: OrdersHarness, order_id: int, **fields: Any) -> Order:
    with harness.acting(STAFF):
        return await harness.orders.move(MoveOrder(id=order_id, **fields))


async def at_rest(harness: OrdersHarness, order: Order) -> Order:
    """Once nothing is under way for it any more: its stock is held."""
    return await harness.settled(order.id)


async def find(harness: OrdersHarness, order_id: int) -> Order:
    with harness.acting(STAFF):
        return await harness.orders.get(GetOrder(id=order_id))


async def cancel(harness: OrdersHarness, order_id: int, actor: Actor, **fields: Any) -> Order:
    with harness.acting(actor):
        return await harness.orders.cancel(CancelOrder(id=order_id, **fields))


# ------------------------------------------------------------------------------------------------------- all the pairs


@pytest.mark.parametrize("axis", MOVED_BY_STAFF)
async def test_each_pair_of_states_is_legal_or_refused_with_the_legal_ones(harness: OrdersHarness, axis: Axis):
    for before, after in pairs(axis):
        order = await harness.placed_in(axis, before)
        entries = await history(harness, order.id)
        if after in rules.AXES[axis][before]:
            await legal_move(harness, order, axis, after)
        elif after == before:
            assert await move(harness, order.id, **{axis: after}) == order  # a move that comes again is harmless
            assert await history(harness, order.id) == entries
        else:
            await illegal_move(harness, order, axis, after)
            assert await history(harness, order.id) == entries


async def legal_move(harness: OrdersHarness, order: Order, axis: Axis, after: str) -> None:
    moved = await move(harness, order.id, **{axis: after})

    assert (getattr(moved, axis), moved.version) == (after, order.version + 1)
    last = (await history(harness, order.id))[-1]
    assert (last.axis, last.before, last.after, last.version) == (axis, getattr(order, axis), after, moved.version)
    assert (last.actor_role, last.actor_id, last.at) == ("staff", STAFF.id, moved.updated_at)


async def illegal_move(harness: OrdersHarness, order: Order, axis: Axis, after: str) -> None:
    with pytest.raises(IllegalMove) as refused:
        await move(harness, order.id, **{axis: after})

    before = getattr(order, axis)
    assert (refused.value.axis, refused.value.current, refused.value.wanted) == (axis, before, after)
    assert set(refused.value.legal) == rules.AXES[axis][before]
    assert refused.value.order_id == order.id


@pytest.mark.parametrize("axis", rules.AXES)
async def test_only_declared_moves_are_written(harness: OrdersHarness, axis: Axis):
    """Of all three axes, and without the checks in front of it."""
    order = await at_rest(harness, await harness.place())
    connection = await harness.connection()
    for before, after in pairs(axis):
        await connection.execute(f"UPDATE orders SET {axis} = $2 WHERE id = $1", order.id, before)
        now = await find(harness, order.id)
        wanted = store.Move(now, again=axis, **cast(Any, {axis: after}))

        moved = await try_to_move(harness, wanted)

        assert moved == (after in rules.AXES[axis][before]), (before, after)
        row = (await harness.raw(order.id)).order
        assert (getattr(row, axis), row.version) == (after if moved else before, now.version + moved)


async def try_to_move(harness: OrdersHarness, wanted: store.Move) -> bool:
    try:
        async with harness.database.transaction() as tx:
            [moved] = await store.move(tx, [wanted], STAFF)
            assert moved
    except AssertionError:
        return False
    return True


async def test_a_batch_moves_only_the_orders_that_are_where_their_move_starts(harness: OrdersHarness):
    orders = [await at_rest(harness, await harness.place()) for _ in range(3)]
    await move(harness, orders[1].id, status="confirmed")
    wanted = [store.Move(order, status="cancelled", note="all") for order in orders]

    async with harness.database.transaction() as tx:
        moved = await store.move(tx, wanted, STAFF)

    assert [order and (order.id, order.status) for order in moved] == [
        (orders[0].id, "cancelled"),
        None,
        (orders[2].id, "cancelled"),
    ]
    assert [(await harness.raw(order.id)).order.status for order in orders] == ["cancelled", "confirmed", "cancelled"]
    assert [len(await history(harness, order.id)) for order in orders] == [2, 2, 2]


async def test_a_payment_moves_although_the_goods_were_shipped_meanwhile(harness: OrdersHarness):
    order = await move(harness, (await harness.place()).id, status="confirmed")
    await move(harness, order.id, fulfilment="shipped")

    async with harness.database.transaction() as tx:
        [moved] = await store.move(tx, [store.Move(order, payment="authorized")], STAFF)

    assert moved
    assert (moved.fulfilment, moved.payment, moved.version) == ("shipped", "authorized", 4)
    assert [(e.version, e.axis, e.after) for e in await history(harness, order.id)][2:] == [
        (3, "fulfilment", "shipped"),
        (4, "payment", "authorized"),
    ]


async def test_one_move_along_two_axes_is_one_version_one_row_and_two_entries(harness: OrdersHarness):
    order = await at_rest(harness, await harness.place())

    async with harness.database.transaction() as tx:
        [moved] = await store.move(tx, [store.Move(order, status="confirmed", payment="authorized")], STAFF)

    assert moved
    assert moved.version == 2
    assert {(e.version, e.axis, e.after) for e in (await history(harness, order.id))[1:]} == {
        (2, "status", "confirmed"),
        (2, "payment", "authorized"),
    }
    assert [type_ for type_, _ in await harness.emitted(order.id)] == [
        "order.placed",
        "order.confirmed",
        "order.authorized",
    ]
    rows = "SELECT format('%s %s %s %s', version, status, payment, events) FROM history ORDER BY version"
    assert await harness.values(rows) == [
        "1 pending unpaid {order.placed}",
        "2 confirmed authorized {order.confirmed,order.authorized}",
    ]


@pytest.mark.parametrize("statement", ["UPDATE history SET note = 'other'", "DELETE FROM history"])
async def test_rows_of_the_history_are_neither_changed_nor_deleted(harness: OrdersHarness, statement: str):
    await harness.place()
    connection = await harness.connection()

    with pytest.raises(asyncpg.RestrictViolationError):
        await connection.execute(statement)


# -------------------------------------------------------------------------------------------------------------- moving


@pytest.mark.parametrize("status", ["pending", "cancelled"])
async def test_goods_move_only_for_confirmed_orders(harness: OrdersHarness, status: str):
    order = await harness.placed_in("status", status)

    with pytest.raises(IllegalMove) as refused:
        await move(harness, order.id, fulfilment="shipped")

    assert (refused.value.axis, refused.value.legal) == ("fulfilment", ())


async def test_both_axes_move_together_status_first(harness: OrdersHarness):
    order = await harness.place()

    moved = await move(harness, order.id, status="confirmed", fulfilment="shipped")

    assert (moved.status, moved.fulfilment, moved.version) == ("confirmed", "shipped", 3)
    with harness.acting(ALICE):
        assert await harness.orders.get(GetOrder(id=order.id)) == moved
    assert [(e.version, e.axis, e.after) for e in await history(harness, order.id)] == [
        (1, "status", "pending"),
        (2, "status", "confirmed"),
        (3, "fulfilment", "shipped"),
    ]


@pytest.mark.parametrize("wanted", [("confirmed", "delivered"), ("cancelled", "shipped")])
async def test_of_two_axes_both_move_or_none(harness: OrdersHarness, wanted: tuple[Any, Any]):
    order = await harness.place()

    with pytest.raises(IllegalMove) as refused:
        await move(harness, order.id, status=wanted[0], fulfilment=wanted[1])

    assert (refused.value.axis, refused.value.wanted) == ("fulfilment", wanted[1])
    assert (await harness.raw(order.id)).order.status == "pending"
    assert await harness.count("history") == 1


async def test_a_move_keeps_lines_total_and_owner(harness: OrdersHarness):
    order = await harness.place()

    moved = await move(harness, order.id, status="confirmed")

    assert (moved.lines, moved.total_minor, moved.user_id) == (order.lines, order.total_minor, order.user_id)
    assert moved.created_at == order.created_at
    assert moved.updated_at > order.updated_at


async def test_a_move_with_another_version_than_the_orders_is_refused_as_stale(harness: OrdersHarness):
    order = await harness.place()
    await move(harness, order.id, status="confirmed", version=1)

    with pytest.raises(StaleVersion) as stale:
        await move(harness, order.id, fulfilment="shipped", version=1)
    with pytest.raises(StaleVersion):
        await cancel(harness, order.id, ALICE, version=1)

    assert (stale.value.expected, stale.value.actual) == (1, 2)
    assert (await move(harness, order.id, fulfilment="shipped", version=2)).version == 3


async def test_of_two_concurrent_moves_from_one_version_one_is_made(harness: OrdersHarness):
    order = await harness.place()
    elsewhere = await harness.another_process()
    with harness.acting(STAFF):
        outcomes = await asyncio.gather(
            harness.orders.move(MoveOrder(id=order.id, status="confirmed", version=1)),
            elsewhere.cancel(CancelOrder(id=order.id, version=1)),
            return_exceptions=True,
        )

    # The confirming request may have begun when the cancel came, and is refused for that; or its version is stale.
    assert sorted(type(outcome).__name__ for outcome in outcomes) in (
        ["Order", "StaleVersion"],
        ["Order", "OrderCancelled"],
    )
    assert (await harness.raw(order.id)).order.version == 2
    assert await harness.count("history") == 2


async def test_a_move_that_waited_for_another_starts_from_where_that_one_ended(harness: OrdersHarness, inject: Inject):
    order = await harness.placed_in("status", "confirmed")
    elsewhere = await harness.another_process()
    pause = Pause()
    lift = inject("orders.move.before_commit", pause)
    with harness.acting(STAFF):
        first = asyncio.ensure_future(harness.orders.move(MoveOrder(id=order.id, fulfilment="shipped")))
        await pause.reached.wait()
        lift()
        second = asyncio.ensure_future(elsewhere.move(MoveOrder(id=order.id, fulfilment="delivered")))
        await harness.until_blocked(by=[second])
        pause.resume.set()
        moved = [await first, await second]

    assert [(order.version, order.status, order.fulfilment) for order in moved] == [
        (3, "confirmed", "shipped"),
        (4, "confirmed", "delivered"),
    ]
    times = [entry.at for entry in await history(harness, order.id)]
    assert times == sorted(times)


async def test_times_of_an_order_go_forward_when_a_move_waited_for_a_later_one(harness: OrdersHarness):
    order = await harness.place()
    async with harness.database.transaction() as tx:
        await tx.execute("SELECT now()")  # this transaction begins before the next one, and moves after it
        moved = await asyncio.create_task(move_in_task(harness, order.id))
        [later] = await store.move(tx, [store.Move(moved, fulfilment="shipped")], STAFF)

    assert later
    assert later.updated_at >= moved.updated_at


async def move_in_task(harness: OrdersHarness, order_id: int) -> Order:
    handler_run.set(None)  # as another caller, which is in no transaction
    return await move(harness, order_id, status="confirmed")


@pytest.mark.parametrize(
    ("point", "change"),
    [
        ("orders.move.before_commit", {"fulfilment": "shipped"}),
        ("orders.cancel.before_commit", {"status": "cancelled"}),
        ("orders.confirm.before_commit", {"status": "confirmed"}),
    ],
)
async def test_a_crash_before_the_commit_of_a_move_leaves_nothing(
    harness: OrdersHarness, inject: Inject, point: str, change: dict[str, Any]
):
    order = await harness.placed_in("status", "confirmed" if "fulfilment" in change else "pending")
    lift = inject(point, fail)
    with pytest.raises(Internal):
        await move(harness, order.id, **change)
    assert (await harness.raw(order.id)).order.version == order.version
    assert len(await history(harness, order.id)) == order.version

    lift()
    assert (await move(harness, order.id, **change)).version == order.version + 1


async def test_a_repeated_move_whose_answer_was_lost_changes_nothing(harness: OrdersHarness, inject: Inject):
    order = await harness.placed_in("status", "confirmed")
    lift = inject("orders.move.after_commit", fail)
    with pytest.raises(Internal):
        await move(harness, order.id, fulfilment="shipped")
    lift()
    assert (await harness.emitted(order.id))[-1] == ("order.shipped", order.id)

    assert (await move(harness, order.id, fulfilment="shipped")).version == 3
    assert await harness.count("history") == 3


async def test_only_staff_move(harness: OrdersHarness):
    order = await harness.place()
    with harness.acting(ALICE), pytest.raises(Forbidden):
        await harness.orders.move(MoveOrder(id=order.id, status="confirmed"))


async def test_an_unknown_order_cannot_be_moved(harness: OrdersHarness):
    with pytest.raises(OrderNotFound) as unknown:
        await move(harness, 404, status="confirmed")

    assert unknown.value.order_id == 404


# ------------------------------------------------------------------------------------------------------------- cancel


@pytest.mark.parametrize("status", ["pending", "confirmed"])
@pytest.mark.parametrize("actor", [ALICE, STAFF])
async def test_owner_and_staff_cancel_what_has_not_been_shipped(harness: OrdersHarness, status: str, actor: Actor):
    order = await harness.placed_in("status", status)

    cancelled = await cancel(harness, order.id, actor, reason="ordered by mistake")

    assert (cancelled.status, cancelled.version) == ("cancelled", order.version + 1)
    last = (await history(harness, order.id))[-1]
    assert (last.before, last.after, last.reason) == (status, "cancelled", "ordered by mistake")
    assert (last.actor_role, last.actor_id) == (actor.role, actor.id)


async def test_a_cancel_by_another_customer_is_refused_as_for_an_unknown_order(harness: OrdersHarness):
    order = await harness.place()

    with pytest.raises(OrderNotFound) as others:
        await cancel(harness, order.id, BOB)
    with pytest.raises(OrderNotFound) as others_with_version:
        await cancel(harness, order.id, BOB, version=77)
    with pytest.raises(OrderNotFound) as unknown:
        await cancel(harness, order.id + 1, BOB)

    assert others.value.details == others_with_version.value.details == {"order_id": order.id}
    assert unknown.value.details == {"order_id": order.id + 1}
    assert (await harness.raw(order.id)).order.status == "pending"


@pytest.mark.parametrize("actor", [ALICE, STAFF])
async def test_a_shipped_order_cannot_be_cancelled(harness: OrdersHarness, actor: Actor):
    """It comes back, and is refunded."""
    order = await harness.placed_in("fulfilment", "shipped")

    with pytest.raises(IllegalMove) as refused:
        await cancel(harness, order.id, actor)

    assert (refused.value.current, refused.value.wanted) == ("confirmed", "cancelled")
    assert refused.value.legal == ("completed",)
    assert (await harness.raw(order.id)).order.status == "confirmed"


async def test_a_completed_order_cannot_be_cancelled(harness: OrdersHarness):
    order = await harness.placed_in("status", "completed")

    for actor in (ALICE, STAFF):
        with pytest.raises(IllegalMove):
            await cancel(harness, order.id, actor)


async def test_a_repeated_cancel_changes_nothing(harness: OrdersHarness):
    order = await harness.place()
    once = await cancel(harness, order.id, ALICE, reason="first")

    assert await cancel(harness, order.id, ALICE, reason="second") == once
    assert await cancel(harness, order.id, STAFF) == once
    assert [entry.reason for entry in await history(harness, order.id)] == ["", "first"]


async def test_concurrent_cancels_in_two_processes_are_one_transition(harness: OrdersHarness):
    order = await harness.place()
    elsewhere = await harness.another_process()
    with harness.acting(ALICE):
        cancelled = await asyncio.gather(
            *((harness.orders if n % 2 else elsewhere).cancel(CancelOrder(id=order.id)) for n in range(10))
        )

    assert {order.version for order in cancelled} == {2}
    assert await harness.count("history") == 2


# ---------------------------------------------------------------------------------------------------- get and history


async def test_owner_and_staff_read_an_order_which_others_do_not_find(harness: OrdersHarness):
    order = await harness.place()
    with harness.acting(ALICE):
        own = harness.orders.get(GetOrder(id=order.id))
    with harness.acting(STAFF):
        staffs = harness.orders.get(GetOrder(id=order.id))
    with harness.acting(BOB):
        others = harness.orders.get(GetOrder(id=order.id))
        unknown = harness.orders.get(GetOrder(id=404))

    outcomes = await asyncio.gather(own, staffs, others, unknown, return_exceptions=True)

    assert outcomes[:2] == [order, order]
    assert [type(outcome) for outcome in outcomes[2:]] == [OrderNotFound, OrderNotFound]
    assert [getattr(outcome, "order_id", None) for outcome in outcomes[2:]] == [order.id, 404]


async def test_owner_and_staff_read_a_history_which_others_do_not_find(harness: OrdersHarness):
    order = await harness.place()
    await move(harness, order.id, status="confirmed")

    shown, staffs = await history(harness, order.id, ALICE), await history(harness, order.id, STAFF)
    assert [e.actor_id for e in staffs if e.actor_role == "staff"] == [STAFF.id]
    assert shown == tuple(
        msgspec.structs.replace(e, actor_id=0 if e.actor_role == "staff" else e.actor_id) for e in staffs
    )
    assert [(e.before, e.after) for e in await history(harness, order.id)] == [
        (None, "pending"),
        ("pending", "confirmed"),
    ]
    for order_id in (order.id, 404):
        with pytest.raises(OrderNotFound) as unknown:
            await history(harness, order_id, BOB)
        assert unknown.value.details == {"order_id": order_id}
