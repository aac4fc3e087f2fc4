"""The rules of stock without a database: every order of requests, duplicates and crashes leaves it sound."""

from __future__ import annotations

import datetime
import itertools
from collections import Counter
from typing import Any

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from mercato.chassis.contract import Actor, ServiceError
from mercato.contracts.inventory import (
    BelowReserved,
    Level,
    OutOfStock,
    Reservation,
    ReservationClosed,
    ReserveStock,
    ReturnStock,
    StockLine,
)
from mercato.services.inventory import rules
from mercato.services.inventory.rules import Books, HeldLine, Movement, Plan, Standing
from services.inventory.world import SHOP, STAFF, lines

NOW = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
HOLD_SECONDS = 10.0


def level(product_id: int, on_hand: int, reserved: int = 0, version: int = 1) -> Level:
    return Level(
        product_id=product_id,
        on_hand=on_hand,
        reserved=reserved,
        available=on_hand - reserved,
        updated_at=NOW,
        version=version,
    )


def standing(order_id: int, state: Any = "held", *, expires_in_s: float | None = 5.0, **quantities: int) -> Standing:
    held = tuple(HeldLine(line.product_id, line.quantity) for line in lines(**quantities))
    return Standing(order_id, state, 1, expires_in_s if state == "held" else None, held)


# ----------------------------------------------------------------------------------------------------------- moves


@pytest.mark.parametrize("before", rules.MOVES)
@pytest.mark.parametrize("after", rules.MOVES)
def test_a_reservation_moves_only_where_the_table_says(before: str, after: str):
    books = Books([level(1, 2, 2 if before == "held" else 0)], [standing(7, before, mug=2)])
    allowed = after in rules.MOVES[before]  # pyright: ignore[reportArgumentType]
    if after == "expired":
        if allowed:
            books.expire(7)
        else:
            with pytest.raises(AssertionError):
                books.expire(7)
        return
    if after == "held":
        assert not allowed
        return
    heard = books.commit(7, SHOP) if after == "committed" else books.release(7)
    changed = bool(books.close().changes)
    assert changed == allowed
    if not allowed:
        assert getattr(heard, "state", None) == before


def test_a_level_that_ends_as_it_was_has_not_changed():
    """One hold is over, and the next takes its pieces in the same batch: nobody needs to hear of it."""
    over = standing(7, expires_in_s=-1.0, mug=2)
    books = Books([level(1, 2, 2)], [over], [Standing(8, "held", 1, 10.0)])
    ask = ReserveStock(order_id=7, lines=lines(mug=2), for_payment=True, idempotency_key="7")
    assert isinstance(books.reserve(ask), ReservationClosed)
    assert isinstance(books.reserve(msgspec.structs.replace(ask, order_id=8)), Reservation)
    plan = books.close()

    assert plan.shifts == ()
    assert [event.type for event in plan.events] == ["stock.expired", "stock.held"]


def test_a_refused_order_stays_refused_in_its_batch_also_when_pieces_come_back():
    """Its first answer may have ended the order already: nothing may be held for it after that."""
    books = Books([level(1, 2, 2)], [standing(7, expires_in_s=-1.0, mug=2)], [Standing(8, "held", 1, 10.0)])
    ask = ReserveStock(order_id=8, lines=lines(mug=2), for_payment=True, idempotency_key="8")
    first = books.reserve(ask)
    books.reserve(msgspec.structs.replace(ask, order_id=7))  # it is over, and gives its pieces back
    again = books.reserve(ask)

    assert isinstance(first, OutOfStock)
    assert isinstance(again, OutOfStock)
    assert books.close().refused == (8,)


@pytest.mark.parametrize(
    ("before", "delta", "told"),
    [
        (level(1, 0), 3, ["stock.adjusted", "stock.available"]),
        (level(1, 3), -3, ["stock.adjusted", "stock.exhausted"]),
        (level(1, 3), 1, ["stock.adjusted"]),
        (level(1, 3, 2), -1, ["stock.adjusted", "stock.exhausted"]),
        (rules.never_counted(1), 0, ["stock.adjusted"]),
    ],
)
def test_availability_is_told_when_it_crosses_zero(before: Level, delta: int, told: list[str]):
    books = Books([before])
    books.count(Movement(1, "adjustment", delta, STAFF))
    plan = books.close()

    assert [event.type for event in plan.events] == told
    assert {event.version for event in plan.events} == {before.version + 1}


# --------------------------------------------------------------------------------------------------------- the machine

ORDERS = st.integers(1, 6)
PRODUCTS = (1, 2, 3)
LINES = st.dictionaries(st.sampled_from(PRODUCTS), st.integers(1, 3), min_size=1).map(
    lambda d: tuple(StockLine(product_id=i, quantity=q) for i, q in d.items())
)
Heard = list[Reservation | ServiceError]


class Stock(RuleBasedStateMachine):
    """Tables as the store keeps them, and batches that are decided, lost, decided again and written.

    `write` applies a plan only as the statements would: guards included.
    """

    def __init__(self) -> None:
        super().__init__()
        self.levels: dict[int, Level] = {}
        self.reservations: dict[int, Standing] = {}
        self.movements: list[Movement] = []
        self.versions: dict[tuple[str, int], int] = {}
        self.lines: dict[int, tuple[StockLine, ...]] = {}
        self.answered: dict[tuple[str, int], str] = {}
        self.references = itertools.count(1)
        self.available_told: dict[int, bool] = {}

    @initialize(on_hand=st.lists(st.integers(0, 6), min_size=3, max_size=3))
    def open(self, on_hand: list[int]) -> None:
        for product_id, pieces in zip(PRODUCTS, on_hand, strict=True):
            books = Books([rules.never_counted(product_id)])
            books.count(Movement(product_id, "receipt", pieces, STAFF))
            self.write(books.close())

    # ---------------------------------------------------------------------------------------------------- batches

    @rule(
        asked=st.lists(st.tuples(ORDERS, LINES, st.booleans()), min_size=1, max_size=6),
        crashes=st.integers(0, 2),
        doubled=st.booleans(),
    )
    def reserve(self, asked: list[tuple[int, tuple[StockLine, ...], bool]], crashes: int, doubled: bool) -> None:
        requests = [
            ReserveStock(order_id=o, lines=self.lines.setdefault(o, wanted), for_payment=p, idempotency_key="k")
            for o, wanted, p in asked
        ]
        for _ in range(crashes):
            self.decide_reserve(requests)  # decided and never written: a crash before the commit
        heard, plan = self.decide_reserve(requests)
        self.write(plan)
        for request, answer in zip(requests, heard, strict=True):
            if isinstance(answer, Reservation):
                assert answer.lines == rules.in_product_order(request.lines)
            else:
                assert isinstance(answer, OutOfStock | ReservationClosed)
                assert request.order_id not in self.reservations or isinstance(answer, ReservationClosed)
        if doubled:
            again, plan = self.decide_reserve([r for r, h in zip(requests, heard, strict=True) if held(h)])
            self.write(plan)
            assert all(isinstance(h, Reservation) for h in again)
            assert plan.movements == plan.shifts == plan.opened == ()

    def decide_reserve(self, requests: list[ReserveStock]) -> tuple[Heard, Plan]:
        opened: dict[int, Standing] = {}
        for r in requests:
            if r.order_id not in self.reservations:
                expires = None if r.for_payment else HOLD_SECONDS
                opened.setdefault(r.order_id, Standing(r.order_id, "held", 1, expires))
        there = [self.reservations[i] for i in {r.order_id for r in requests} if i in self.reservations]
        books = Books(self.levels.values(), there, opened.values())
        return [books.reserve(r) for r in requests], books.close()

    @rule(orders=st.lists(ORDERS, min_size=1, max_size=5), crashes=st.booleans())
    def commit(self, orders: list[int], crashes: bool) -> None:
        if crashes:  # decided and never written
            books = self.books(orders)
            _ = [books.commit(i, SHOP) for i in orders]
            books.close()
        books = self.books(orders)
        heard = [books.commit(i, SHOP) for i in orders]
        self.write(books.close())
        for order_id, answer in zip(orders, heard, strict=True):
            self.agree("commit", order_id, answer)

    @rule(orders=st.lists(ORDERS, min_size=1, max_size=5), crashes=st.booleans())
    def release(self, orders: list[int], crashes: bool) -> None:
        buried = [Standing(i, "released", 1, None) for i in set(orders) if i not in self.reservations]
        books = Books(self.levels.values(), [*buried, *self.there(orders)])
        heard = [books.release(i) for i in orders]
        plan = books.close()
        if crashes:
            return  # decided and never written
        self.reservations.update({tomb.order_id: tomb for tomb in buried})
        self.write(plan)
        for order_id, answer in zip(orders, heard, strict=True):
            self.agree("release", order_id, answer)

    @rule(order_id=ORDERS, wanted=LINES, twice=st.booleans())
    def restock(self, order_id: int, wanted: tuple[StockLine, ...], twice: bool) -> None:
        for _ in range(2 if twice else 1):
            request = ReturnStock(
                order_id=order_id, lines=wanted, reference=str(next(self.references)), idempotency_key="k"
            )
            books = self.books([order_id])
            books.restock(request, SHOP)
            self.write(books.close())

    @rule(order_id=ORDERS)
    def let_time_pass(self, order_id: int) -> None:
        reservation = self.reservations.get(order_id)
        if reservation and reservation.expires_in_s is not None:
            self.reservations[order_id] = msgspec.structs.replace(reservation, expires_in_s=-1.0)

    @rule()
    def expire(self) -> None:
        over = [r.order_id for r in self.reservations.values() if r.is_over]
        books = self.books(over)
        for order_id in over:
            books.expire(order_id)
        self.write(books.close())
        assert not any(r.is_over for r in self.reservations.values())

    @rule(product_id=st.sampled_from(PRODUCTS), delta=st.integers(-4, 4).filter(bool))
    def adjust(self, product_id: int, delta: int) -> None:
        books = Books([self.levels[product_id]])
        try:
            books.count(Movement(product_id, "receipt" if delta > 0 else "adjustment", delta, STAFF))
        except BelowReserved:
            assert self.levels[product_id].available + delta < 0
            return
        self.write(books.close())

    # ----------------------------------------------------------------------------------------------------- tables

    def there(self, orders: list[int]) -> list[Standing]:
        return [self.reservations[i] for i in sorted(set(orders)) if i in self.reservations]

    def books(self, orders: list[int]) -> Books:
        return Books(self.levels.values(), self.there(orders))

    def agree(self, operation: str, order_id: int, answer: Reservation | ServiceError) -> None:
        """What once ended a reservation is what everybody hears from then on."""
        if isinstance(answer, Reservation):
            before = self.answered.setdefault((operation, order_id), answer.state)
            assert before == answer.state

    def write(self, plan: Plan) -> None:
        for reservation in plan.opened:
            assert reservation.order_id not in self.reservations
            self.reservations[reservation.order_id] = reservation
        for change in plan.changes:
            old = self.reservations[change.order_id]
            assert old.version == change.version_before
            assert change.state == old.state or change.state in rules.MOVES[old.state]
            self.reservations[change.order_id] = msgspec.structs.replace(
                old, state=change.state, version=change.version, expires_in_s=None
            )
        for back in plan.returned:
            old = self.reservations[back.order_id]
            now = tuple(
                msgspec.structs.replace(h, returned=h.returned + back.quantity)
                if h.product_id == back.product_id
                else h
                for h in old.lines
            )
            self.reservations[back.order_id] = msgspec.structs.replace(old, lines=now)
        for shift in plan.shifts:
            old = self.levels.get(shift.product_id, rules.never_counted(shift.product_id))
            on_hand, reserved = old.on_hand + shift.on_hand, old.reserved + shift.reserved
            assert 0 <= reserved <= on_hand, "the guard of the statement would refuse this"
            self.levels[shift.product_id] = level(shift.product_id, on_hand, reserved, old.version + 1)
        self.movements += plan.movements
        self.hear(plan)

    def hear(self, plan: Plan) -> None:
        for event in plan.events:
            subject = (event.subject, event.subject_id)
            before = self.versions.get(subject, 0)
            assert event.version > before or (event.subject == "product" and event.version == before)
            self.versions[subject] = event.version
            if event.type in ("stock.available", "stock.exhausted"):
                now = event.type == "stock.available"
                assert self.available_told.get(event.subject_id, False) != now
                self.available_told[event.subject_id] = now

    # ------------------------------------------------------------------------------------------------- invariants

    @invariant()
    def on_hand_is_what_moved(self) -> None:
        moved = Counter[int]()
        for movement in self.movements:
            moved[movement.product_id] += movement.delta
        assert {i: found.on_hand for i, found in self.levels.items()} == {i: moved[i] for i in self.levels}

    @invariant()
    def reserved_is_what_is_held(self) -> None:
        held_pieces = Counter[int]()
        for reservation in self.reservations.values():
            if reservation.state == "held":
                held_pieces.update({line.product_id: line.quantity for line in reservation.lines})
        assert {i: found.reserved for i, found in self.levels.items()} == {i: held_pieces[i] for i in self.levels}

    @invariant()
    def each_sold_line_was_sold_once_and_no_more_came_back(self) -> None:
        sold = Counter((m.order_id, m.product_id) for m in self.movements if m.kind == "sale")
        wanted = Counter(
            (r.order_id, line.product_id)
            for r in self.reservations.values()
            if r.state == "committed"
            for line in r.lines
        )
        assert sold == wanted
        assert all(0 <= line.returned <= line.quantity for r in self.reservations.values() for line in r.lines)

    @invariant()
    def everybody_was_told_whether_there_is_any(self) -> None:
        for product_id, found in self.levels.items():
            assert self.available_told.get(product_id, False) == (found.available > 0)


def held(answer: Reservation | ServiceError) -> bool:
    return isinstance(answer, Reservation)


TestStock = Stock.TestCase
TestStock.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def test_actors_are_noted_on_movements():
    books = Books([level(1, 2, 2)], [standing(7, mug=2)])
    books.commit(7, Actor("staff", 3))
    assert [m.actor for m in books.close().movements] == [Actor("staff", 3)]
