"""Reservations through the contract: all lines or none, once for each order, and what ends them."""

from __future__ import annotations

import asyncpg
import pytest

from mercato.chassis.contract import Forbidden, Internal, InvalidRequest, ServiceError
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
from mercato.testing.actors import SERVICE, STAFF
from mercato.testing.builders import LAMP, MUG, stock_lines
from mercato.testing.injection import Inject, fail
from services.inventory.harness import NONCE, InventoryHarness, commit, give_back, release, reserve

# ----------------------------------------------------------------------------------------------------------- reserve


async def test_a_reservation_takes_pieces_from_what_is_available_and_not_from_the_shelf(harness: InventoryHarness):
    await harness.stock(mug=5, lamp=2)
    held = await harness.reserve(7, lamp=2, mug=3)

    assert (held.order_id, held.state, held.lines) == (7, "held", stock_lines(mug=3, lamp=2))
    assert held.expires_in_s is not None
    assert 890 < held.expires_in_s <= 900
    assert (await harness.pieces(MUG), await harness.pieces(LAMP)) == ((5, 3), (2, 2))
    assert await harness.emitted("reservation", 7) == [("stock.held", 1)]
    assert [what for what, _ in await harness.emitted("product", LAMP)] == [
        "stock.adjusted",
        "stock.available",
        "stock.exhausted",
    ]


async def test_all_lines_or_none(harness: InventoryHarness):
    await harness.stock(mug=5, lamp=1)
    with pytest.raises(OutOfStock) as refused:
        await harness.reserve(7, mug=5, lamp=2)

    assert refused.value.lines == (ShortLine(product_id=LAMP, requested=2, available=1),)
    assert (await harness.pieces(MUG), await harness.pieces(LAMP)) == ((5, 0), (1, 0))
    assert await harness.states() == {}
    assert await harness.emitted("reservation", 7) == []


async def test_a_product_without_a_count_has_no_stock(harness: InventoryHarness):
    with pytest.raises(OutOfStock) as refused:
        await harness.reserve(7, p3=1)

    assert refused.value.lines == (ShortLine(product_id=3, requested=1, available=0),)


async def test_a_refused_order_may_ask_again_when_there_is_more(harness: InventoryHarness):
    await harness.stock(mug=1)
    with pytest.raises(OutOfStock):
        await harness.reserve(7, mug=2)
    await harness.stock(mug=2)

    assert (await harness.reserve(7, mug=2)).state == "held"


async def test_asked_again_it_answers_the_same_and_takes_nothing(harness: InventoryHarness):
    await harness.stock(mug=5)
    first, again = await harness.reserve(7, mug=2), await harness.reserve(7, mug=2)

    assert (again.state, again.lines) == (first.state, first.lines)
    assert await harness.pieces() == (5, 2)
    assert await harness.emitted("reservation", 7) == [("stock.held", 1)]


async def test_asked_again_with_other_lines_it_refuses(harness: InventoryHarness):
    await harness.stock(mug=5)
    await harness.reserve(7, mug=2)
    with pytest.raises(InvalidRequest):
        await harness.reserve(7, mug=3)

    assert await harness.pieces() == (5, 2)


async def test_a_product_in_two_lines_is_refused_and_its_neighbours_are_not(harness: InventoryHarness):
    await harness.stock(mug=5)
    twice = tuple(StockLine(product_id=MUG, quantity=1) for _ in range(2))
    wrong = ReserveStock(order_id=8, lines=twice, for_payment=False, idempotency_key="8", order_nonce=NONCE)
    outcomes = await harness.reserve_many(reserve(7, mug=1), wrong, reserve(9, mug=1))

    assert [type(one) for one in outcomes] == [Reservation, InvalidRequest, Reservation]
    assert [e.field for e in getattr(outcomes[1], "errors")] == ["lines[0].product_id", "lines[1].product_id"]  # noqa: B009
    assert await harness.states() == {7: "held", 9: "held"}


async def test_in_one_batch_the_first_get_what_there_is(harness: InventoryHarness):
    await harness.stock(mug=3)
    outcomes = await harness.reserve_many(*(reserve(i, mug=2 if i == 2 else 1) for i in range(1, 6)))

    assert [type(one) for one in outcomes] == [Reservation, Reservation, OutOfStock, OutOfStock, OutOfStock]
    assert await harness.states() == {1: "held", 2: "held"}
    [level_versions] = [[v for _, v in await harness.emitted("product", MUG)]]
    assert level_versions == [1, 1, 2]  # one change of the level for the whole batch


async def test_the_same_order_twice_in_one_batch_gets_the_same_answer(harness: InventoryHarness):
    await harness.stock(mug=3)
    held = await harness.reserve_many(reserve(7, mug=2), reserve(8, mug=2), reserve(7, mug=2), reserve(8, mug=2))

    assert [type(h) for h in held] == [Reservation, OutOfStock, Reservation, OutOfStock]
    assert isinstance(held[3], OutOfStock)
    assert held[3].lines == (ShortLine(product_id=MUG, requested=2, available=1),)
    assert await harness.pieces() == (3, 2)


async def test_a_duplicate_in_a_batch_may_begin_the_payment(harness: InventoryHarness):
    await harness.stock(mug=3)
    _, paid = await harness.reserve_many(reserve(7, mug=2), reserve(7, mug=2, for_payment=True))

    assert isinstance(paid, Reservation)
    assert paid.expires_in_s is None
    assert await harness.values("SELECT expires_at FROM reservations") == [None]


async def test_a_payment_that_begins_removes_the_expiry(harness: InventoryHarness):
    await harness.stock(mug=3)
    await harness.reserve(7, mug=2)
    begun = await harness.reserve(7, mug=2, for_payment=True)

    assert (begun.state, begun.expires_in_s) == ("held", None)
    assert (await harness.reserve(7, mug=2)).expires_in_s is None
    assert await harness.pieces() == (3, 2)


async def test_only_services_reserve(harness: InventoryHarness):
    with harness.acting(STAFF), pytest.raises(Forbidden):
        await harness.inventory.reserve(reserve(7, mug=1))


# ---------------------------------------------------------------------------------------------------- commit, release


async def test_a_commit_is_a_sale_and_happens_once(harness: InventoryHarness):
    await harness.stock(mug=5, lamp=5)
    await harness.reserve(7, mug=2, lamp=1)
    first, again = await harness.commit(7), await harness.commit(7)

    assert first == again
    assert (first.state, first.expires_in_s) == ("committed", None)
    assert (await harness.pieces(MUG), await harness.pieces(LAMP)) == ((3, 0), (4, 0))
    assert await harness.movements() == [("receipt", 5)]
    assert await harness.emitted("reservation", 7) == [("stock.held", 1), ("stock.committed", 2)]
    assert (await harness.reserve(7, mug=2, lamp=1)).state == "committed"


async def test_a_release_gives_back_and_happens_once(harness: InventoryHarness):
    await harness.stock(mug=2)
    await harness.reserve(7, mug=2)
    first, again = await harness.release(7), await harness.release(7)

    assert first == again
    assert (first.state, first.lines) == ("released", stock_lines(mug=2))
    assert await harness.pieces() == (2, 0)
    assert await harness.emitted("reservation", 7) == [("stock.held", 1), ("stock.released", 2)]
    assert [what for what, _ in await harness.emitted("product", MUG)][-2:] == ["stock.exhausted", "stock.available"]


async def test_a_tombstone_rejects_a_reserve_that_arrives_after_the_release(harness: InventoryHarness):
    await harness.stock(mug=2)
    assert (await harness.release(7)).lines == ()
    with pytest.raises(ReservationClosed) as refused:
        await harness.reserve(7, mug=1)

    assert refused.value.state == "released"
    assert await harness.pieces() == (2, 0)
    assert await harness.emitted("reservation", 7) == []  # a tombstone emits nothing


async def test_sold_pieces_are_not_released(harness: InventoryHarness):
    await harness.stock(mug=2)
    await harness.reserve(7, mug=2)
    sold = await harness.commit(7)

    assert await harness.release(7) == sold
    assert await harness.pieces() == (0, 0)


@pytest.mark.parametrize("state", ["released", "expired", None])
async def test_pieces_that_are_not_held_are_not_sold(harness: InventoryHarness, state: str | None):
    await harness.stock(mug=2)
    if state == "released":
        await harness.release(7)
    if state == "expired":
        await harness.reserve(7, mug=1)
        await harness.let_time_pass(7)
        with pytest.raises(ReservationClosed):
            await harness.reserve(7, mug=1, for_payment=True)
    with pytest.raises(ReservationClosed) as refused:
        await harness.commit(7)

    assert refused.value.state == state
    assert await harness.pieces() == (2, 0)


async def test_a_mixed_batch_gives_each_its_own_answer_in_order(harness: InventoryHarness):
    await harness.stock(mug=9)
    for order_id in (1, 2, 3):
        await harness.reserve(order_id, mug=order_id)
    await harness.release(2)
    with harness.acting(SERVICE):
        sold = await harness.inventory.commit.many([commit(i) for i in (3, 2, 4, 1, 3)])
        freed = await harness.inventory.release.many([release(i) for i in (5, 1, 2, 5)])

    assert [_said(s) for s in sold] == [
        (3, "committed"),
        (2, "released"),
        (4, None),
        (1, "committed"),
        (3, "committed"),
    ]
    assert [type(s) is ReservationClosed for s in sold] == [False, True, True, False, False]
    assert [_said(f) for f in freed] == [(5, "released"), (1, "committed"), (2, "released"), (5, "released")]
    assert await harness.pieces() == (5, 0)


def _said(outcome: Reservation | ServiceError) -> tuple[int, str | None]:
    assert isinstance(outcome, Reservation | ReservationClosed)
    return outcome.order_id, outcome.state


# ----------------------------------------------------------------------------------------------------------- restock


async def test_a_return_comes_back_to_the_shelf_once_for_its_reference(harness: InventoryHarness):
    await harness.stock(mug=5)
    await harness.reserve(7, mug=4)
    sold = await harness.commit(7)

    assert await harness.restock(7, "a", mug=1) == sold
    assert await harness.restock(7, "a", mug=1) == sold
    assert await harness.restock(7, "b", mug=3) == sold
    assert await harness.pieces() == (5, 0)
    assert await harness.movements() == [("receipt", 5), ("return", 1), ("return", 3)]
    assert [v for what, v in await harness.emitted("reservation", 7) if what == "stock.returned"] == [3, 4]


async def test_no_more_comes_back_than_was_sold(harness: InventoryHarness):
    await harness.stock(mug=5, lamp=5)
    await harness.reserve(7, mug=2)
    await harness.commit(7)
    await harness.restock(7, "a", mug=1)
    with pytest.raises(ReturnTooLarge) as too_many:
        await harness.restock(7, "b", mug=2)
    with pytest.raises(ReturnTooLarge) as never_sold:
        await harness.restock(7, "c", mug=1, lamp=1)

    assert (too_many.value.quantity, too_many.value.left) == (2, 1)
    assert (never_sold.value.product_id, never_sold.value.left) == (LAMP, 0)
    assert (await harness.pieces(MUG), await harness.pieces(LAMP)) == ((4, 0), (5, 0))


async def test_returns_of_one_batch_are_counted_together(harness: InventoryHarness, inject: Inject):
    rounds: list[str] = []

    async def note(point: str) -> None:
        rounds.append(point)

    inject("inventory.restock.before_commit", note)
    await harness.stock(mug=5)
    await harness.reserve(7, mug=2)
    await harness.commit(7)
    with harness.acting(SERVICE):
        outcomes = await harness.inventory.restock.many(
            [give_back(7, reference, mug=1) for reference in ("a", "a", "b", "c")]
        )

    assert [type(one) for one in outcomes] == [Reservation, Reservation, Reservation, ReturnTooLarge]
    assert await harness.pieces() == (5, 0)
    # One transaction for the batch (`loopback` sends it twice): the duplicate was seen before the key refused it.
    assert len(rounds) == (2 if harness.repeats else 1)


async def test_only_what_was_sold_comes_back(harness: InventoryHarness):
    await harness.stock(mug=5)
    await harness.reserve(7, mug=2)
    for order_id, state in ((7, "held"), (8, None)):
        with pytest.raises(ReservationClosed) as refused:
            await harness.restock(order_id, mug=1)
        assert refused.value.state == state


async def test_a_return_is_made_once_for_its_reference_also_after_30_days(harness: InventoryHarness):
    await harness.stock(mug=5)
    await harness.reserve(7, mug=4)
    sold = await harness.commit(7)
    await harness.restock(7, "a", mug=1)
    await harness.let_days_pass(30)

    assert await harness.restock(7, "a", mug=1) == sold
    assert await harness.movements() == [("receipt", 5), ("return", 1)]
    assert await harness.pieces() == (2, 0)


async def test_no_more_comes_back_than_was_sold_whatever_the_code_believes(harness: InventoryHarness):
    """The CHECK of the table is a second lock."""
    await harness.stock(mug=5, lamp=5)
    await harness.reserve(7, mug=2, lamp=2)
    await harness.commit(7)

    for returned in ([3, 0], [0, -1], [1]):
        with pytest.raises(asyncpg.CheckViolationError, match="reservations_returned_within_quantities"):
            await (await harness.connection()).execute("UPDATE reservations SET returned = $1", returned)


# -------------------------------------------------------------------------------------------------------- another order


@pytest.mark.parametrize("state", ["held", "committed", "released", "tombstone"])
@pytest.mark.parametrize("neighbours", [False, True])
async def test_a_request_of_another_order_with_the_same_id_is_refused_and_changes_nothing(
    harness: InventoryHarness, state: str, neighbours: bool
):
    await harness.stock(mug=9)
    if state != "tombstone":
        await harness.reserve(7, mug=2)
    if state == "committed":
        await harness.commit(7)
    if state in ("released", "tombstone"):
        await harness.release(7)
    before = await harness.pieces(), await harness.states(), await harness.emitted("reservation", 7)
    with harness.acting(SERVICE):
        outcomes = [
            *await harness.inventory.reserve.many([reserve(7, mug=2, nonce=5)]),
            *await harness.inventory.commit.many([commit(7, 5)]),
            *await harness.inventory.release.many([release(7, 5)]),
            *await harness.inventory.restock.many([give_back(7, mug=1, nonce=5)]),
        ]

    assert [(type(h), getattr(h, "order_id", None)) for h in outcomes] == [(AnotherOrder, 7)] * 4
    assert (await harness.pieces(), await harness.states(), await harness.emitted("reservation", 7)) == before
    if not neighbours:
        return
    with harness.acting(SERVICE):
        taken = await harness.inventory.reserve.many([reserve(8, mug=1), reserve(7, mug=2, nonce=5)])
        sold = await harness.inventory.commit.many([commit(7, 5), commit(8)])
        freed = await harness.inventory.release.many([release(7, 5), release(9), release(7)])

    assert [type(h) for h in taken] == [Reservation, AnotherOrder]
    assert [type(h) for h in sold] == [AnotherOrder, Reservation]
    assert [type(h) for h in freed] == [AnotherOrder, Reservation, Reservation]
    assert (await harness.states())[8] == "committed"


async def test_of_two_orders_with_one_id_in_one_batch_the_first_is_taken(harness: InventoryHarness):
    await harness.stock(mug=9)
    taken = await harness.reserve_many(reserve(7, mug=1), reserve(7, mug=1, nonce=5))
    with harness.acting(SERVICE):
        sold = await harness.inventory.commit.many([commit(7, 5), commit(7)])

    assert [type(h) for h in taken] == [Reservation, AnotherOrder]
    assert [type(h) for h in sold] == [AnotherOrder, Reservation]
    assert await harness.pieces() == (8, 0)


async def test_a_tombstone_keeps_the_nonce_of_its_order(harness: InventoryHarness):
    await harness.stock(mug=2)
    await harness.release(7)

    assert await harness.values("SELECT nonce FROM reservations") == [NONCE]
    with pytest.raises(ReservationClosed):
        await harness.reserve(7, mug=1)


# ------------------------------------------------------------------------------------------------------------- trace


async def test_the_trace_of_another_order_with_the_same_id_is_empty(harness: InventoryHarness):
    await harness.stock(mug=2)
    await harness.reserve(7, mug=2)
    with harness.acting(STAFF):
        assert (await harness.inventory.trace(TraceStock(order_id=7, order_nonce=5))).steps == ()


async def test_a_return_does_not_move_the_time_of_the_sale(harness: InventoryHarness):
    await harness.stock(mug=2)
    await harness.reserve(7, mug=2)
    await harness.commit(7)
    with harness.acting(STAFF):
        before = await harness.inventory.trace(TraceStock(order_id=7, order_nonce=NONCE))
        await harness.restock(7, mug=1)
        after = await harness.inventory.trace(TraceStock(order_id=7, order_nonce=NONCE))

    assert after.steps[:2] == before.steps


async def test_the_trace_of_an_order_has_every_step_in_order(harness: InventoryHarness):
    await harness.stock(mug=5, lamp=5)
    await harness.reserve(7, mug=2, lamp=1)
    await harness.commit(7)
    await harness.restock(7, "a", mug=1, lamp=1)
    await harness.restock(7, "b", mug=1)
    await harness.reserve(8, mug=1)
    await harness.release(8)
    await harness.release(9)
    with harness.acting(STAFF):
        traces = [await harness.inventory.trace(TraceStock(order_id=i, order_nonce=NONCE)) for i in (7, 8, 9, 10)]

    assert [[(s.what, s.lines) for s in t.steps] for t in traces] == [
        [
            ("held", stock_lines(mug=2, lamp=1)),
            ("committed", stock_lines(mug=2, lamp=1)),
            ("returned", stock_lines(mug=1, lamp=1)),
            ("returned", stock_lines(mug=1)),
        ],
        [("held", stock_lines(mug=1)), ("released", stock_lines(mug=1))],
        [],
        [],
    ]
    times = [step.at for step in traces[0].steps]
    assert times == sorted(times)


# ----------------------------------------------------------------------------------------------------------- crashes


@pytest.mark.parametrize("operation", ["reserve", "commit", "release", "restock"])
@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_crash_at_the_commit_and_a_retry_come_to_the_same(
    harness: InventoryHarness, inject: Inject, operation: str, when: str
):
    await harness.stock(mug=5)
    if operation != "reserve":
        await harness.reserve(7, mug=2)
    if operation == "restock":
        await harness.commit(7)
    steps = {
        "reserve": lambda: harness.reserve(7, mug=2),
        "commit": lambda: harness.commit(7),
        "release": lambda: harness.release(7),
        "restock": lambda: harness.restock(7, mug=1),
    }
    before = await harness.pieces()
    lift = inject(f"inventory.{operation}.{when}_commit", fail)
    with pytest.raises(Internal):
        await steps[operation]()
    lift()
    expected = {"reserve": (5, 2), "commit": (3, 0), "release": (5, 0), "restock": (4, 0)}[operation]
    assert await harness.pieces() == (before if when == "before" else expected)
    await steps[operation]()

    assert await harness.pieces() == expected
