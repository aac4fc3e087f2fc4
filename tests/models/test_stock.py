"""The rules of stock without a database: every order of requests, duplicates and crashes leaves it sound."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict

import msgspec
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from mercato.chassis.contract import ServiceError
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
from mercato.services.inventory.rules import (
    Movement,
    ReservationChange,
    StockLedger,
    StoredReservation,
    WriteSet,
)
from mercato.testing.actors import SERVICE, STAFF
from services.inventory.harness import NONCE
from services.inventory.values import HOLD_SECONDS, ask, level, reserved

ORDERS = st.integers(1, 6)
PRODUCTS = (1, 2, 3)
LINES = st.dictionaries(st.sampled_from(PRODUCTS), st.integers(1, 3), min_size=1).map(
    lambda d: tuple(StockLine(product_id=i, quantity=q) for i, q in d.items())
)
Outcomes = list[Reservation | ServiceError]


class Stock(RuleBasedStateMachine):
    """Tables as the store keeps them, and batches that are decided, lost, decided again and written.

    `write` applies a plan only as the statements would: guards included.
    """

    def __init__(self) -> None:
        super().__init__()
        self.levels: dict[int, Level] = {}
        self.reservations: dict[int, StoredReservation] = {}
        self.inserted: dict[int, StoredReservation] = {}
        self.movements: list[Movement] = []
        self.on_hand: defaultdict[int, Counter[int]] = defaultdict(Counter)
        """By product: what each version of its level has put there."""
        self.versions: dict[tuple[str, int], int] = {}
        self.lines: dict[int, tuple[StockLine, ...]] = {}
        self.answered: dict[tuple[str, int], str] = {}
        self.references = itertools.count(1)
        self.available_emitted: dict[int, bool] = {}

    @initialize(on_hand=st.lists(st.integers(0, 6), min_size=3, max_size=3))
    def open(self, on_hand: list[int]) -> None:
        for product_id, pieces in zip(PRODUCTS, on_hand, strict=True):
            ledger = StockLedger([rules.never_counted(product_id)])
            ledger.count(Movement(product_id, "receipt", pieces, STAFF))
            self.write(ledger.write_set())

    # ---------------------------------------------------------------------------------------------------- batches

    @rule(
        asked=st.lists(st.tuples(ORDERS, LINES, st.booleans()), min_size=1, max_size=6),
        crashes=st.integers(0, 2),
        doubled=st.booleans(),
    )
    def reserve(self, asked: list[tuple[int, tuple[StockLine, ...], bool]], crashes: int, doubled: bool) -> None:
        requests = [
            ask(order_id, self.lines.setdefault(order_id, wanted), for_payment=for_payment)
            for order_id, wanted, for_payment in asked
        ]
        for _ in range(crashes):
            self.decide_reserve(requests)  # decided and never written: a crash before the commit
        outcomes, written = self.decide_reserve(requests)
        self.write(written)
        for request, answer in zip(requests, outcomes, strict=True):
            if isinstance(answer, Reservation):
                assert answer.lines == rules.in_product_order(request.lines)
            else:
                assert isinstance(answer, OutOfStock | ReservationClosed)
                assert request.order_id not in self.reservations or isinstance(answer, ReservationClosed)
        if doubled:
            again, written = self.decide_reserve([r for r, h in zip(requests, outcomes, strict=True) if held(h)])
            self.write(written)
            assert all(isinstance(h, Reservation) for h in again)
            assert written.movements == written.deltas == written.refused == ()

    def decide_reserve(self, requests: list[ReserveStock]) -> tuple[Outcomes, WriteSet]:
        self.inserted = {}
        for r in requests:
            if r.order_id not in self.reservations:
                expires = None if r.for_payment else HOLD_SECONDS
                new = StoredReservation(r.order_id, NONCE, "held", 1, expires, reserved(r.lines))
                self.inserted.setdefault(r.order_id, new)
        there = [self.reservations[i] for i in {r.order_id for r in requests} if i in self.reservations]
        ledger = StockLedger(self.levels.values(), there, self.inserted.values())
        return [ledger.reserve(r) for r in requests], ledger.write_set()

    @rule(orders=st.lists(ORDERS, min_size=1, max_size=5), crashes=st.booleans())
    def commit(self, orders: list[int], crashes: bool) -> None:
        if crashes:  # decided and never written
            ledger = self.ledger(orders)
            _ = [ledger.commit(i, NONCE) for i in orders]
            ledger.write_set()
        ledger = self.ledger(orders)
        outcomes = [ledger.commit(i, NONCE) for i in orders]
        self.write(ledger.write_set())
        for order_id, answer in zip(orders, outcomes, strict=True):
            self.agree("commit", order_id, answer)

    @rule(orders=st.lists(ORDERS, min_size=1, max_size=5), crashes=st.booleans())
    def release(self, orders: list[int], crashes: bool) -> None:
        tombstones = [
            StoredReservation(i, NONCE, "released", 1, None) for i in set(orders) if i not in self.reservations
        ]
        ledger = StockLedger(self.levels.values(), [*tombstones, *self.there(orders)])
        outcomes = [ledger.release(i, NONCE) for i in orders]
        written = ledger.write_set()
        if crashes:
            return  # decided and never written
        self.reservations.update({tombstone.order_id: tombstone for tombstone in tombstones})
        self.write(written)
        for order_id, answer in zip(orders, outcomes, strict=True):
            self.agree("release", order_id, answer)

    @rule(order_id=ORDERS, wanted=LINES, twice=st.booleans())
    def restock(self, order_id: int, wanted: tuple[StockLine, ...], twice: bool) -> None:
        for _ in range(2 if twice else 1):
            request = ReturnStock(
                order_id=order_id,
                lines=wanted,
                reference=str(next(self.references)),
                idempotency_key="k",
                order_nonce=NONCE,
            )
            ledger = self.ledger([order_id])
            ledger.return_items(request, SERVICE)
            self.write(ledger.write_set())

    @rule(order_id=ORDERS)
    def let_time_pass(self, order_id: int) -> None:
        reservation = self.reservations.get(order_id)
        if reservation and reservation.expires_in_s is not None:
            self.reservations[order_id] = msgspec.structs.replace(reservation, expires_in_s=-1.0)

    @rule()
    def expire(self) -> None:
        over = [r.order_id for r in self.reservations.values() if r.is_overdue]
        ledger = self.ledger(over)
        for order_id in over:
            ledger.expire(order_id)
        self.write(ledger.write_set())
        assert not any(r.is_overdue for r in self.reservations.values())

    @rule(product_id=st.sampled_from(PRODUCTS), delta=st.integers(-4, 4).filter(bool))
    def adjust(self, product_id: int, delta: int) -> None:
        ledger = StockLedger([self.levels[product_id]])
        try:
            ledger.count(Movement(product_id, "receipt" if delta > 0 else "adjustment", delta, STAFF))
        except BelowReserved:
            assert self.levels[product_id].available + delta < 0
            return
        self.write(ledger.write_set())

    # ----------------------------------------------------------------------------------------------------- tables

    def there(self, orders: list[int]) -> list[StoredReservation]:
        return [self.reservations[i] for i in sorted(set(orders)) if i in self.reservations]

    def ledger(self, orders: list[int]) -> StockLedger:
        return StockLedger(self.levels.values(), self.there(orders))

    def agree(self, operation: str, order_id: int, answer: Reservation | ServiceError) -> None:
        """What once ended a reservation is answered from then on."""
        if isinstance(answer, Reservation):
            before = self.answered.setdefault((operation, order_id), answer.state)
            assert before == answer.state

    def write(self, written: WriteSet) -> None:
        for order_id, reservation in self.inserted.items():
            assert order_id not in self.reservations
            if order_id not in written.refused:
                self.reservations[order_id] = reservation
        self.inserted = {}
        for delta in written.deltas:
            old = self.levels.get(delta.product_id, rules.never_counted(delta.product_id))
            on_hand, taken = old.on_hand + delta.on_hand, old.reserved + delta.reserved
            assert 0 <= taken <= on_hand, "the guard of the statement would refuse this"
            self.levels[delta.product_id] = level(delta.product_id, on_hand, taken, old.version + delta.versions)
        for change in written.changes:
            self.change(change)
        for movement in written.movements:
            self.put_on_hand(movement.product_id, movement.level_version, movement.delta)
        self.movements += written.movements
        self.record_events(written)

    def change(self, change: ReservationChange) -> None:
        old = self.reservations[change.order_id]
        assert old.version == change.version_before
        assert change.state == old.state or change.state in rules.MOVES[old.state]
        assert bool(change.level_versions) == (change.state == "committed" and old.state == "held")
        for line, version in zip(old.lines, change.level_versions, strict=False):
            self.put_on_hand(line.product_id, version, -line.quantity)
        returned = change.returned or tuple(line.returned for line in old.lines)
        now = tuple(msgspec.structs.replace(line, returned=n) for line, n in zip(old.lines, returned, strict=True))
        self.reservations[change.order_id] = msgspec.structs.replace(
            old, state=change.state, version=change.version, expires_in_s=None, lines=now
        )

    def put_on_hand(self, product_id: int, level_version: int, pieces: int) -> None:
        assert 1 <= level_version <= self.levels[product_id].version
        self.on_hand[product_id][level_version] += pieces

    def record_events(self, written: WriteSet) -> None:
        for event in written.events:
            subject = (event.subject, event.subject_id)
            before = self.versions.get(subject, 0)
            assert event.version > before or (event.subject == "product" and event.version == before)
            self.versions[subject] = event.version
            if event.type in ("stock.available", "stock.exhausted"):
                now = event.type == "stock.available"
                assert self.available_emitted.get(event.subject_id, False) != now
                self.available_emitted[event.subject_id] = now

    # ------------------------------------------------------------------------------------------------- invariants

    @invariant()
    def on_hand_is_what_moved_and_was_never_negative(self) -> None:
        for product_id, found in self.levels.items():
            moved = [pieces for _, pieces in sorted(self.on_hand[product_id].items())]
            assert found.on_hand == sum(moved)
            assert all(total >= 0 for total in itertools.accumulate(moved))

    @invariant()
    def reserved_is_what_is_held(self) -> None:
        held_pieces = Counter[int]()
        for reservation in self.reservations.values():
            if reservation.state == "held":
                held_pieces.update({line.product_id: line.quantity for line in reservation.lines})
        assert {i: found.reserved for i, found in self.levels.items()} == {i: held_pieces[i] for i in self.levels}

    @invariant()
    def no_more_came_back_than_was_sold(self) -> None:
        came_back = Counter[tuple[int, int]]()
        for movement in self.movements:
            if movement.kind == "return":
                assert movement.order_id
                came_back[movement.order_id, movement.product_id] += movement.delta
        lines_ = [(r.order_id, line) for r in self.reservations.values() for line in r.lines]
        assert came_back == Counter({(o, line.product_id): line.returned for o, line in lines_ if line.returned})
        assert all(0 <= line.returned <= line.quantity for r in self.reservations.values() for line in r.lines)

    @invariant()
    def availability_events_match_the_levels(self) -> None:
        for product_id, found in self.levels.items():
            assert self.available_emitted.get(product_id, False) == (found.available > 0)


def held(answer: Reservation | ServiceError) -> bool:
    return isinstance(answer, Reservation)


TestStock = Stock.TestCase
TestStock.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
