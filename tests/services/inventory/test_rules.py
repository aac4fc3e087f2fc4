"""The rules of stock without a database, one at a time; all together: `tests/models/test_stock.py`."""

from __future__ import annotations

import msgspec
import pytest

from mercato.chassis.contract import Actor
from mercato.contracts.inventory import (
    AnotherOrder,
    Level,
    OutOfStock,
    Reservation,
    ReservationClosed,
    ReturnStock,
)
from mercato.services.inventory import rules
from mercato.services.inventory.rules import (
    Movement,
    StockLedger,
    WriteSet,
)
from mercato.testing.actors import SERVICE, STAFF
from mercato.testing.builders import stock_lines
from services.inventory.harness import NONCE
from services.inventory.values import ask, level, stored

# ----------------------------------------------------------------------------------------------------------- moves


@pytest.mark.parametrize("before", rules.MOVES)
@pytest.mark.parametrize("after", rules.MOVES)
def test_a_reservation_moves_only_where_the_table_says(before: str, after: str):
    ledger = StockLedger([level(1, 2, 2 if before == "held" else 0)], [stored(7, before, mug=2)])
    allowed = after in rules.MOVES[before]  # pyright: ignore[reportArgumentType]
    if after == "expired":
        if allowed:
            ledger.expire(7)
        else:
            with pytest.raises(AssertionError):
                ledger.expire(7)
        return
    if after == "held":
        assert not allowed
        return
    outcome = ledger.commit(7, NONCE) if after == "committed" else ledger.release(7, NONCE)
    changed = bool(ledger.write_set().changes)
    assert changed == allowed
    if not allowed:
        assert getattr(outcome, "state", None) == before


def test_a_level_that_ends_as_it_was_has_not_changed():
    """One hold is over, and the next takes its pieces in the same batch: no event is needed."""
    ledger = StockLedger([level(1, 2, 2)], [stored(7, expires_in_s=-1.0, mug=2)], [stored(8, mug=2)])
    assert isinstance(ledger.reserve(ask(7, stock_lines(mug=2))), ReservationClosed)
    assert isinstance(ledger.reserve(ask(8, stock_lines(mug=2))), Reservation)
    written = ledger.write_set()

    assert written.deltas == ()
    assert [event.type for event in written.events] == ["stock.expired", "stock.held"]


def test_a_refused_order_stays_refused_in_its_batch_also_when_pieces_come_back():
    """Its first answer may have ended the order already: nothing may be held for it after that."""
    ledger = StockLedger([level(1, 2, 2)], [stored(7, expires_in_s=-1.0, mug=2)], [stored(8, mug=2)])
    first = ledger.reserve(ask(8, stock_lines(mug=2)))
    ledger.reserve(ask(7, stock_lines(mug=2)))  # it is overdue, and gives its pieces back
    again = ledger.reserve(ask(8, stock_lines(mug=2)))

    assert isinstance(first, OutOfStock)
    assert isinstance(again, OutOfStock)
    assert ledger.write_set().refused == (8,)


@pytest.mark.parametrize(
    ("before", "delta", "emitted"),
    [
        (level(1, 0), 3, ["stock.adjusted", "stock.available"]),
        (level(1, 3), -3, ["stock.adjusted", "stock.exhausted"]),
        (level(1, 3), 1, ["stock.adjusted"]),
        (level(1, 3, 2), -1, ["stock.adjusted", "stock.exhausted"]),
        (rules.never_counted(1), 0, ["stock.adjusted"]),
    ],
)
def test_availability_is_emitted_when_it_crosses_zero(before: Level, delta: int, emitted: list[str]):
    ledger = StockLedger([before])
    ledger.count(Movement(1, "adjustment", delta, STAFF))
    written = ledger.write_set()

    assert [event.type for event in written.events] == emitted
    assert {event.version for event in written.events} == {before.version + 1}


def test_actors_are_noted_on_movements():
    ledger = StockLedger([level(1, 2)])
    ledger.count(Movement(1, "receipt", 1, Actor("staff", 3)))
    assert [m.actor for m in ledger.write_set().movements] == [Actor("staff", 3)]


@pytest.mark.parametrize("state", rules.MOVES)
def test_an_order_of_another_nonce_changes_nothing(state: str):
    ledger = StockLedger([level(1, 2, 2)], [stored(7, state, mug=2)])
    request = msgspec.structs.replace(ask(7, stock_lines(mug=2)), order_nonce=NONCE + 1)
    back = ReturnStock(order_id=7, lines=stock_lines(mug=1), reference="r", idempotency_key="k", order_nonce=NONCE + 1)
    outcomes = [
        ledger.reserve(request),
        ledger.commit(7, NONCE + 1),
        ledger.release(7, NONCE + 1),
        ledger.return_items(back, SERVICE),
        ledger.return_items(back, SERVICE, back.lines),
    ]

    assert {type(one) for one in outcomes} == {AnotherOrder}
    assert ledger.write_set() == WriteSet((), (), (), (), ())
