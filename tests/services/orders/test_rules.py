"""The rules of orders, for all inputs."""

from __future__ import annotations

import datetime
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mercato.chassis.contract import Actor
from mercato.contracts.money import MAX_MINOR
from mercato.contracts.orders import (
    LINES_LIMIT,
    QUANTITY_LIMIT,
    Axis,
    Fulfilment,
    IllegalMove,
    MixedCurrencies,
    Order,
    Payment,
    PlaceLine,
    PlaceOrder,
    Status,
)
from mercato.contracts.products import Quote
from mercato.services.orders import rules

STATES = {"status": get_args(Status), "payment": get_args(Payment), "fulfilment": get_args(Fulfilment)}
EPOCH = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
ACTORS = st.builds(Actor, st.sampled_from(["customer", "staff", "service"]), st.integers(0, 3))

orders = st.builds(
    Order,
    id=st.just(1001),
    user_id=st.integers(1, 3),
    status=st.sampled_from(STATES["status"]),
    payment=st.sampled_from(STATES["payment"]),
    fulfilment=st.sampled_from(STATES["fulfilment"]),
    currency=st.just("USD"),
    total_minor=st.integers(0, 10**6),
    lines=st.just(()),
    created_at=st.just(EPOCH),
    updated_at=st.datetimes(timezones=st.just(datetime.UTC)),
    version=st.integers(1, 9),
)
quotes = st.builds(
    Quote,
    id=st.just(0),
    sku=st.just("SKU"),
    name=st.just("Thing"),
    price_minor=st.integers(0, MAX_MINOR),
    currency=st.sampled_from(["USD", "EUR"]),
)
baskets = st.dictionaries(
    st.integers(1, 10**6), st.tuples(st.integers(1, QUANTITY_LIMIT), quotes), min_size=1, max_size=LINES_LIMIT
)


@pytest.mark.parametrize("axis", STATES)
def test_each_state_of_the_contract_has_its_moves_and_there_are_no_others(axis: Axis):
    moves = rules.AXES[axis]

    assert set(moves) == set(STATES[axis])
    assert set().union(*moves.values()) <= set(moves)


@pytest.mark.parametrize("axis", STATES)
def test_each_state_is_reached_from_where_an_order_begins_and_none_is_reached_again(axis: Axis):
    moves = rules.AXES[axis]

    def after(state: str, path: tuple[str, ...]) -> set[str]:
        assert state not in path, "a circle"
        return {state}.union(*(after(following, (*path, state)) for following in moves[state]))

    assert after(rules.PLACED[axis], ()) == set(moves)
    assert rules.sources(axis, rules.PLACED[axis]) == []


@pytest.mark.parametrize("axis", STATES)
def test_sources_are_the_moves_read_backwards(axis: Axis):
    moves = rules.AXES[axis]

    assert {(before, after) for before, following in moves.items() for after in following} == {
        (before, after) for after in moves for before in rules.sources(axis, after)
    }


@given(orders, st.sampled_from(["status", "payment", "fulfilment"]), st.data())
def test_a_move_is_refused_exactly_when_it_is_not_among_the_legal_ones(order: Order, axis: Axis, data: st.DataObject):
    wanted = data.draw(st.sampled_from(STATES[axis]))
    legal = rules.legal_moves(order, axis)

    assert set(legal) <= rules.AXES[axis][getattr(order, axis)]
    if wanted in legal:
        rules.check_move(order, axis, wanted)
        assert getattr(order, axis) in rules.sources(axis, wanted)
    else:
        with pytest.raises(IllegalMove) as refused:
            rules.check_move(order, axis, wanted)
        assert refused.value.legal == legal == tuple(sorted(legal))


@given(orders)
def test_goods_move_only_for_orders_that_are_confirmed_and_not_cancelled(order: Order):
    assert not rules.legal_moves(order, "fulfilment") or order.status in ("confirmed", "completed")


@given(orders, ACTORS)
def test_who_may_cancel(order: Order, actor: Actor):
    open_status = order.status in ("pending", "confirmed")
    may = open_status and (actor.role != "customer" or order.fulfilment == "unfulfilled")

    if may:
        rules.check_cancel(order, actor)
    else:
        with pytest.raises(IllegalMove):
            rules.check_cancel(order, actor)


@given(ACTORS, st.integers(0, 3))
def test_customers_see_their_own_and_nothing_else(actor: Actor, user_id: int):
    assert rules.may_see(actor, user_id) == (actor.role != "customer" or actor.id == user_id)


@given(orders)
def test_as_placed_forgets_every_move_and_nothing_else(order: Order):
    placed = rules.as_placed(order)

    assert all(getattr(placed, axis) == state for axis, state in rules.PLACED.items())
    assert (placed.version, placed.updated_at) == (1, order.created_at)
    assert (placed.id, placed.user_id, placed.lines, placed.total_minor) == (
        order.id,
        order.user_id,
        order.lines,
        order.total_minor,
    )


@given(baskets)
def test_totals_are_exact_and_fit_into_64_bits(basket: dict[int, tuple[int, Quote]]):
    lines = tuple(PlaceLine(product_id=i, quantity=quantity) for i, (quantity, _) in basket.items())

    priced = rules.priced(lines, {i: quote for i, (_, quote) in basket.items()})

    assert [line.product_id for line in priced] == list(basket)
    assert all(line.line_total_minor == line.quantity * line.unit_price_minor for line in priced)
    assert rules.total(priced) == sum(quantity * quote.price_minor for quantity, quote in basket.values()) < 2**63


@given(baskets)
def test_an_order_has_the_one_currency_of_its_products_or_is_refused(basket: dict[int, tuple[int, Quote]]):
    lines = [PlaceLine(product_id=i) for i in basket]
    currencies = {quote.currency for _, quote in basket.values()}

    currency = rules.currency_of(lines, {i: quote for i, (_, quote) in basket.items()})

    if isinstance(currency, MixedCurrencies):
        assert currency.currencies == tuple(sorted(currencies))
        assert len(currencies) > 1
    else:
        assert {currency} == currencies


@given(st.lists(st.integers(1, 5), min_size=1, max_size=12))
def test_every_repetition_of_a_product_is_named(product_ids: list[int]):
    wrong = rules.check_lines([PlaceLine(product_id=i) for i in product_ids])

    repeated = [n for n, i in enumerate(product_ids) if i in product_ids[:n]]
    named = [error.field for error in wrong.errors] if wrong else []
    assert named == [f"items[{n}].product_id" for n in repeated]
    assert (wrong is None) == (not repeated)


@given(
    st.none() | st.integers(0, 2),
    st.none() | st.sampled_from(["USD", "EUR"]),
    st.integers(0, 2),
    st.sampled_from(["USD", "EUR"]),
)
def test_what_was_shown_must_be_what_it_costs(
    shown: int | None, shown_currency: str | None, actual: int, currency: str
):
    request = PlaceOrder(user_id=1, lines=(), expected_total_minor=shown, expected_currency=shown_currency)

    changed = rules.check_total(request, actual, currency)

    assert (changed is None) == (shown in (None, actual) and shown_currency in (None, currency))
