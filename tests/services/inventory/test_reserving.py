"""Reservations through the contract: all lines or none, once for each order, and what ends them."""

from __future__ import annotations

from collections.abc import Callable

import asyncpg
import pytest

from mercato.chassis.contract import Forbidden, Internal, InvalidRequest, ServiceError
from mercato.chassis.observability.faults import Fault
from mercato.contracts.inventory import (
    AnotherOrder,
    OutOfStock,
    Reservation,
    ReservationClosed,
    ReserveStock,
    ReturnTooLarge,
    ShortLine,
    StockLine,
    TraceStock,
)
from services.inventory.world import LAMP, MUG, NONCE, SHOP, STAFF, World, commit, give_back, lines, release, reserve

Plant = Callable[[str, Fault], Callable[[], None]]


async def fail(_point: str) -> None:
    raise RuntimeError("the power fails here")


# ----------------------------------------------------------------------------------------------------------- reserve


async def test_a_reservation_takes_pieces_from_what_is_available_and_not_from_the_shelf(world: World):
    await world.stock(mug=5, lamp=2)
    held = await world.reserve(7, lamp=2, mug=3)

    assert (held.order_id, held.state, held.lines) == (7, "held", lines(mug=3, lamp=2))
    assert held.expires_in_s is not None
    assert 890 < held.expires_in_s <= 900
    assert (await world.pieces(MUG), await world.pieces(LAMP)) == ((5, 3), (2, 2))
    assert await world.told("reservation", 7) == [("stock.held", 1)]
    assert [what for what, _ in await world.told("product", LAMP)] == [
        "stock.adjusted",
        "stock.available",
        "stock.exhausted",
    ]


async def test_all_lines_or_none(world: World):
    await world.stock(mug=5, lamp=1)
    with pytest.raises(OutOfStock) as refused:
        await world.reserve(7, mug=5, lamp=2)

    assert refused.value.lines == (ShortLine(product_id=LAMP, requested=2, available=1),)
    assert (await world.pieces(MUG), await world.pieces(LAMP)) == ((5, 0), (1, 0))
    assert await world.states() == {}
    assert await world.told("reservation", 7) == []


async def test_of_what_nobody_has_counted_there_is_nothing(world: World):
    with pytest.raises(OutOfStock) as refused:
        await world.reserve(7, p3=1)

    assert refused.value.lines == (ShortLine(product_id=3, requested=1, available=0),)


async def test_a_refused_order_may_ask_again_when_there_is_more(world: World):
    await world.stock(mug=1)
    with pytest.raises(OutOfStock):
        await world.reserve(7, mug=2)
    await world.stock(mug=2)

    assert (await world.reserve(7, mug=2)).state == "held"


async def test_asked_again_it_answers_the_same_and_takes_nothing(world: World):
    await world.stock(mug=5)
    first, again = await world.reserve(7, mug=2), await world.reserve(7, mug=2)

    assert (again.state, again.lines) == (first.state, first.lines)
    assert await world.pieces() == (5, 2)
    assert await world.told("reservation", 7) == [("stock.held", 1)]


async def test_asked_again_with_other_lines_it_refuses(world: World):
    await world.stock(mug=5)
    await world.reserve(7, mug=2)
    with pytest.raises(InvalidRequest):
        await world.reserve(7, mug=3)

    assert await world.pieces() == (5, 2)


async def test_a_product_in_two_lines_is_refused_and_its_neighbours_are_not(world: World):
    await world.stock(mug=5)
    twice = tuple(StockLine(product_id=MUG, quantity=1) for _ in range(2))
    wrong = ReserveStock(order_id=8, lines=twice, for_payment=False, idempotency_key="8", order_nonce=NONCE)
    heard = await world.reserve_many(reserve(7, mug=1), wrong, reserve(9, mug=1))

    assert [type(h) for h in heard] == [Reservation, InvalidRequest, Reservation]
    assert [e.field for e in getattr(heard[1], "errors")] == ["lines[0].product_id", "lines[1].product_id"]  # noqa: B009
    assert await world.states() == {7: "held", 9: "held"}


async def test_in_one_batch_the_first_get_what_there_is(world: World):
    await world.stock(mug=3)
    heard = await world.reserve_many(*(reserve(i, mug=2 if i == 2 else 1) for i in range(1, 6)))

    assert [type(h) for h in heard] == [Reservation, Reservation, OutOfStock, OutOfStock, OutOfStock]
    assert await world.states() == {1: "held", 2: "held"}
    [level_versions] = [[v for _, v in await world.told("product", MUG)]]
    assert level_versions == [1, 1, 2]  # one change of the level for the whole batch


async def test_the_same_order_twice_in_one_batch_hears_the_same(world: World):
    await world.stock(mug=3)
    held = await world.reserve_many(reserve(7, mug=2), reserve(8, mug=2), reserve(7, mug=2), reserve(8, mug=2))

    assert [type(h) for h in held] == [Reservation, OutOfStock, Reservation, OutOfStock]
    assert isinstance(held[3], OutOfStock)
    assert held[3].lines == (ShortLine(product_id=MUG, requested=2, available=1),)
    assert await world.pieces() == (3, 2)


async def test_the_twin_of_a_batch_may_begin_the_payment(world: World):
    await world.stock(mug=3)
    _, paid = await world.reserve_many(reserve(7, mug=2), reserve(7, mug=2, for_payment=True))

    assert isinstance(paid, Reservation)
    assert paid.expires_in_s is None
    assert await world.values("SELECT expires_at FROM reservations") == [None]


async def test_payment_takes_the_expiry_away(world: World):
    await world.stock(mug=3)
    await world.reserve(7, mug=2)
    begun = await world.reserve(7, mug=2, for_payment=True)

    assert (begun.state, begun.expires_in_s) == ("held", None)
    assert (await world.reserve(7, mug=2)).expires_in_s is None
    assert await world.pieces() == (3, 2)


async def test_only_services_reserve(world: World):
    with world.acting(STAFF), pytest.raises(Forbidden):
        await world.inventory.reserve(reserve(7, mug=1))


# ---------------------------------------------------------------------------------------------------- commit, release


async def test_a_commit_is_a_sale_and_happens_once(world: World):
    await world.stock(mug=5, lamp=5)
    await world.reserve(7, mug=2, lamp=1)
    first, again = await world.commit(7), await world.commit(7)

    assert first == again
    assert (first.state, first.expires_in_s) == ("committed", None)
    assert (await world.pieces(MUG), await world.pieces(LAMP)) == ((3, 0), (4, 0))
    assert await world.movements() == [("receipt", 5)]
    assert await world.told("reservation", 7) == [("stock.held", 1), ("stock.committed", 2)]
    assert (await world.reserve(7, mug=2, lamp=1)).state == "committed"


async def test_a_release_gives_back_and_happens_once(world: World):
    await world.stock(mug=2)
    await world.reserve(7, mug=2)
    first, again = await world.release(7), await world.release(7)

    assert first == again
    assert (first.state, first.lines) == ("released", lines(mug=2))
    assert await world.pieces() == (2, 0)
    assert await world.told("reservation", 7) == [("stock.held", 1), ("stock.released", 2)]
    assert [what for what, _ in await world.told("product", MUG)][-2:] == ["stock.exhausted", "stock.available"]


async def test_a_release_before_the_reserve_closes_the_door(world: World):
    await world.stock(mug=2)
    assert (await world.release(7)).lines == ()
    with pytest.raises(ReservationClosed) as refused:
        await world.reserve(7, mug=1)

    assert refused.value.state == "released"
    assert await world.pieces() == (2, 0)
    assert await world.told("reservation", 7) == []  # nobody hears of a tombstone


async def test_what_is_sold_is_not_released(world: World):
    await world.stock(mug=2)
    await world.reserve(7, mug=2)
    sold = await world.commit(7)

    assert await world.release(7) == sold
    assert await world.pieces() == (0, 0)


@pytest.mark.parametrize("state", ["released", "expired", None])
async def test_what_is_not_held_is_not_sold(world: World, state: str | None):
    await world.stock(mug=2)
    if state == "released":
        await world.release(7)
    if state == "expired":
        await world.reserve(7, mug=1)
        await world.let_time_pass(7)
        with pytest.raises(ReservationClosed):
            await world.reserve(7, mug=1, for_payment=True)
    with pytest.raises(ReservationClosed) as refused:
        await world.commit(7)

    assert refused.value.state == state
    assert await world.pieces() == (2, 0)


async def test_a_mixed_batch_gives_each_its_own_answer_in_order(world: World):
    await world.stock(mug=9)
    for order_id in (1, 2, 3):
        await world.reserve(order_id, mug=order_id)
    await world.release(2)
    with world.acting(SHOP):
        sold = await world.inventory.commit.many([commit(i) for i in (3, 2, 4, 1, 3)])
        freed = await world.inventory.release.many([release(i) for i in (5, 1, 2, 5)])

    assert [_said(s) for s in sold] == [
        (3, "committed"),
        (2, "released"),
        (4, None),
        (1, "committed"),
        (3, "committed"),
    ]
    assert [type(s) is ReservationClosed for s in sold] == [False, True, True, False, False]
    assert [_said(f) for f in freed] == [(5, "released"), (1, "committed"), (2, "released"), (5, "released")]
    assert await world.pieces() == (5, 0)


def _said(outcome: Reservation | ServiceError) -> tuple[int, str | None]:
    assert isinstance(outcome, Reservation | ReservationClosed)
    return outcome.order_id, outcome.state


# ----------------------------------------------------------------------------------------------------------- restock


async def test_a_return_comes_back_to_the_shelf_once_for_its_reference(world: World):
    await world.stock(mug=5)
    await world.reserve(7, mug=4)
    sold = await world.commit(7)

    assert await world.restock(7, "a", mug=1) == sold
    assert await world.restock(7, "a", mug=1) == sold
    assert await world.restock(7, "b", mug=3) == sold
    assert await world.pieces() == (5, 0)
    assert await world.movements() == [("receipt", 5), ("return", 1), ("return", 3)]
    assert [v for what, v in await world.told("reservation", 7) if what == "stock.returned"] == [3, 4]


async def test_no_more_comes_back_than_was_sold(world: World):
    await world.stock(mug=5, lamp=5)
    await world.reserve(7, mug=2)
    await world.commit(7)
    await world.restock(7, "a", mug=1)
    with pytest.raises(ReturnTooLarge) as too_many:
        await world.restock(7, "b", mug=2)
    with pytest.raises(ReturnTooLarge) as never_sold:
        await world.restock(7, "c", mug=1, lamp=1)

    assert (too_many.value.quantity, too_many.value.left) == (2, 1)
    assert (never_sold.value.product_id, never_sold.value.left) == (LAMP, 0)
    assert (await world.pieces(MUG), await world.pieces(LAMP)) == ((4, 0), (5, 0))


async def test_returns_of_one_batch_are_counted_together(world: World, plant: Plant):
    rounds: list[str] = []

    async def note(point: str) -> None:
        rounds.append(point)

    plant("inventory.restock.before_commit", note)
    await world.stock(mug=5)
    await world.reserve(7, mug=2)
    await world.commit(7)
    with world.acting(SHOP):
        heard = await world.inventory.restock.many(
            [give_back(7, reference, mug=1) for reference in ("a", "a", "b", "c")]
        )

    assert [type(h) for h in heard] == [Reservation, Reservation, Reservation, ReturnTooLarge]
    assert await world.pieces() == (5, 0)
    # One transaction for the batch (`loopback` sends it twice): the duplicate was seen before the key refused it.
    assert len(rounds) == (2 if world.rig.transport == "loopback" else 1)


async def test_only_what_was_sold_comes_back(world: World):
    await world.stock(mug=5)
    await world.reserve(7, mug=2)
    for order_id, state in ((7, "held"), (8, None)):
        with pytest.raises(ReservationClosed) as refused:
            await world.restock(order_id, mug=1)
        assert refused.value.state == state


async def test_a_return_is_made_once_for_its_reference_also_after_30_days(world: World):
    await world.stock(mug=5)
    await world.reserve(7, mug=4)
    sold = await world.commit(7)
    await world.restock(7, "a", mug=1)
    await world.let_days_pass(30)

    assert await world.restock(7, "a", mug=1) == sold
    assert await world.movements() == [("receipt", 5), ("return", 1)]
    assert await world.pieces() == (2, 0)


async def test_no_more_comes_back_than_was_sold_whatever_the_code_believes(world: World):
    """The CHECK of the table is a second lock."""
    await world.stock(mug=5, lamp=5)
    await world.reserve(7, mug=2, lamp=2)
    await world.commit(7)

    for returned in ([3, 0], [0, -1], [1]):
        with pytest.raises(asyncpg.CheckViolationError, match="reservations_returned_within_quantities"):
            await (await world.connection()).execute("UPDATE reservations SET returned = $1", returned)


# -------------------------------------------------------------------------------------------------------- another order


@pytest.mark.parametrize("state", ["held", "committed", "released", "tombstone"])
@pytest.mark.parametrize("neighbours", [False, True])
async def test_a_request_of_another_order_with_the_same_id_is_refused_and_changes_nothing(
    world: World, state: str, neighbours: bool
):
    await world.stock(mug=9)
    if state != "tombstone":
        await world.reserve(7, mug=2)
    if state == "committed":
        await world.commit(7)
    if state in ("released", "tombstone"):
        await world.release(7)
    before = await world.pieces(), await world.states(), await world.told("reservation", 7)
    with world.acting(SHOP):
        heard = [
            *await world.inventory.reserve.many([reserve(7, mug=2, nonce=5)]),
            *await world.inventory.commit.many([commit(7, 5)]),
            *await world.inventory.release.many([release(7, 5)]),
            *await world.inventory.restock.many([give_back(7, mug=1, nonce=5)]),
        ]

    assert [(type(h), getattr(h, "order_id", None)) for h in heard] == [(AnotherOrder, 7)] * 4
    assert (await world.pieces(), await world.states(), await world.told("reservation", 7)) == before
    if not neighbours:
        return
    with world.acting(SHOP):
        taken = await world.inventory.reserve.many([reserve(8, mug=1), reserve(7, mug=2, nonce=5)])
        sold = await world.inventory.commit.many([commit(7, 5), commit(8)])
        freed = await world.inventory.release.many([release(7, 5), release(9), release(7)])

    assert [type(h) for h in taken] == [Reservation, AnotherOrder]
    assert [type(h) for h in sold] == [AnotherOrder, Reservation]
    assert [type(h) for h in freed] == [AnotherOrder, Reservation, Reservation]
    assert (await world.states())[8] == "committed"


async def test_of_two_orders_with_one_id_in_one_batch_the_first_is_taken(world: World):
    await world.stock(mug=9)
    taken = await world.reserve_many(reserve(7, mug=1), reserve(7, mug=1, nonce=5))
    with world.acting(SHOP):
        sold = await world.inventory.commit.many([commit(7, 5), commit(7)])

    assert [type(h) for h in taken] == [Reservation, AnotherOrder]
    assert [type(h) for h in sold] == [AnotherOrder, Reservation]
    assert await world.pieces() == (8, 0)


async def test_a_tombstone_keeps_the_nonce_of_its_order(world: World):
    await world.stock(mug=2)
    await world.release(7)

    assert await world.values("SELECT nonce FROM reservations") == [NONCE]
    with pytest.raises(ReservationClosed):
        await world.reserve(7, mug=1)


# ------------------------------------------------------------------------------------------------------------- trace


async def test_the_trace_of_another_order_with_the_same_id_is_empty(world: World):
    await world.stock(mug=2)
    await world.reserve(7, mug=2)
    with world.acting(STAFF):
        assert (await world.inventory.trace(TraceStock(order_id=7, order_nonce=5))).steps == ()


async def test_a_return_does_not_move_the_time_of_the_sale(world: World):
    await world.stock(mug=2)
    await world.reserve(7, mug=2)
    await world.commit(7)
    with world.acting(STAFF):
        before = await world.inventory.trace(TraceStock(order_id=7, order_nonce=NONCE))
        await world.restock(7, mug=1)
        after = await world.inventory.trace(TraceStock(order_id=7, order_nonce=NONCE))

    assert after.steps[:2] == before.steps


async def test_the_trace_of_an_order_has_every_step_in_order(world: World):
    await world.stock(mug=5, lamp=5)
    await world.reserve(7, mug=2, lamp=1)
    await world.commit(7)
    await world.restock(7, "a", mug=1, lamp=1)
    await world.restock(7, "b", mug=1)
    await world.reserve(8, mug=1)
    await world.release(8)
    await world.release(9)
    with world.acting(STAFF):
        traces = [await world.inventory.trace(TraceStock(order_id=i, order_nonce=NONCE)) for i in (7, 8, 9, 10)]

    assert [[(s.what, s.lines) for s in t.steps] for t in traces] == [
        [
            ("held", lines(mug=2, lamp=1)),
            ("committed", lines(mug=2, lamp=1)),
            ("returned", lines(mug=1, lamp=1)),
            ("returned", lines(mug=1)),
        ],
        [("held", lines(mug=1)), ("released", lines(mug=1))],
        [],
        [],
    ]
    times = [step.at for step in traces[0].steps]
    assert times == sorted(times)


# ----------------------------------------------------------------------------------------------------------- crashes


@pytest.mark.parametrize("operation", ["reserve", "commit", "release", "restock"])
@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_crash_at_the_commit_and_a_retry_come_to_the_same(
    world: World, plant: Plant, operation: str, when: str
):
    await world.stock(mug=5)
    if operation != "reserve":
        await world.reserve(7, mug=2)
    if operation == "restock":
        await world.commit(7)
    steps = {
        "reserve": lambda: world.reserve(7, mug=2),
        "commit": lambda: world.commit(7),
        "release": lambda: world.release(7),
        "restock": lambda: world.restock(7, mug=1),
    }
    before = await world.pieces()
    lift = plant(f"inventory.{operation}.{when}_commit", fail)
    with pytest.raises(Internal):
        await steps[operation]()
    lift()
    expected = {"reserve": (5, 2), "commit": (3, 0), "release": (5, 0), "restock": (4, 0)}[operation]
    assert await world.pieces() == (before if when == "before" else expected)
    await steps[operation]()

    assert await world.pieces() == expected
