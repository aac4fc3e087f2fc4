"""The rules of orders, for all inputs."""

from __future__ import annotations

import datetime
from typing import Final, cast, get_args

import msgspec
import pytest
from hypothesis import given, strategies as st

from mercato.chassis.contract import Actor, InvalidRequest
from mercato.contracts.money import MAX_MINOR
from mercato.contracts.order_refusals import (
    Axis,
    IllegalMove,
    MixedCurrencies,
    NothingToRefund,
    NotReturnable,
    OrderNotFound,
)
from mercato.contracts.orders import (
    LINES_LIMIT,
    QUANTITY_LIMIT,
    Fulfilment,
    Order,
    OrderLine,
    Payment,
    PlaceLine,
    PlaceOrder,
    RefundOrder,
    ReturnLine,
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


BACK: Final = {("payment", "authorized", "unpaid")}
"""The one move that leads back: the authorization of what was sold on account ran out."""


@pytest.mark.parametrize("axis", STATES)
def test_each_state_is_reached_from_the_first_one_and_none_is_reached_again(axis: Axis):
    moves = rules.AXES[axis]

    def after(state: str, path: tuple[str, ...]) -> set[str]:
        assert state not in path, "a circle"
        following = moves[state] - {state}  # one more part of the same
        onward = [reached for reached in following if (axis, state, reached) not in BACK]
        return {state}.union(*(after(reached, (*path, state)) for reached in onward))

    assert after(rules.PLACED[axis], ()) == set(moves)
    begin = rules.PLACED[axis]
    assert {(axis, before, begin) for before in rules.sources(axis, begin)} <= BACK


def test_only_a_partial_refund_may_be_repeated():
    again = {(axis, state) for axis, moves in rules.AXES.items() for state in moves if state in moves[state]}
    assert again == {("payment", "partially_refunded")}


@pytest.mark.parametrize("axis", STATES)
def test_sources_are_the_inverse_of_the_moves(axis: Axis):
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


@given(orders)
def test_an_open_order_that_was_not_shipped_can_be_cancelled(order: Order):
    may = order.status in ("pending", "confirmed") and order.fulfilment == "unfulfilled"

    assert ("cancelled" in rules.legal_moves(order, "status")) == may


@given(orders)
def test_an_order_is_neither_shipped_nor_completed_while_its_payment_is_only_authorized(order: Order):
    if order.payment == "authorized":
        assert "completed" not in rules.legal_moves(order, "status")
        assert "shipped" not in rules.legal_moves(order, "fulfilment")


@given(orders)
def test_what_was_refunded_before_it_left_is_neither_shipped_nor_completed_but_cancelled(order: Order):
    if order.payment == "refunded" and order.fulfilment == "unfulfilled":
        assert "completed" not in rules.legal_moves(order, "status")
        assert "shipped" not in rules.legal_moves(order, "fulfilment")
        assert ("cancelled" in rules.legal_moves(order, "status")) == (order.status in ("pending", "confirmed"))


@given(orders)
def test_what_has_left_goes_on_although_it_was_refunded(order: Order):
    if order.payment == "refunded" and order.fulfilment != "unfulfilled" and order.status in ("confirmed", "completed"):
        assert set(rules.legal_moves(order, "fulfilment")) == rules.AXES["fulfilment"][order.fulfilment]
        assert ("completed" in rules.legal_moves(order, "status")) == (order.status == "confirmed")


@given(orders, st.sampled_from(["status", "payment", "fulfilment"]), st.data())
def test_a_refusal_says_why_the_move_is_not_made(order: Order, axis: Axis, data: st.DataObject):
    wanted = data.draw(st.sampled_from(STATES[axis]))
    if wanted in rules.legal_moves(order, axis):
        return

    refused = rules.illegal(order, axis, wanted)

    is_declared = wanted in rules.AXES[axis][getattr(order, axis)]
    assert refused.why
    assert f", because {refused.why}; legal from here" in str(refused)
    if not is_declared:
        assert getattr(order, axis) in refused.why


@pytest.mark.parametrize(
    ("axis", "current", "wanted", "why"),
    [
        ("fulfilment", "shipped", "shipped", "its goods are shipped already"),
        ("fulfilment", "shipped", "unfulfilled", "its goods are shipped, and no order goes back to unfulfilled"),
        (
            "fulfilment",
            "unfulfilled",
            "delivered",
            "its goods are unfulfilled, and only an order that is shipped can become delivered",
        ),
        (
            "status",
            "completed",
            "cancelled",
            "it is completed, and only an order that is pending or confirmed can become cancelled",
        ),
    ],
)
def test_a_move_that_its_axis_does_not_have_is_refused_with_where_the_order_is(
    axis: Axis, current: str, wanted: str, why: str
):
    assert rules._why_not_from(axis, current, wanted) == why


@given(orders, st.data())
def test_a_move_that_is_not_declared_is_never_written(order: Order, data: st.DataObject):
    wanted = {axis: data.draw(st.none() | st.sampled_from(states)) for axis, states in STATES.items()}
    declared = all(
        after is None or after in rules.AXES[cast(Axis, axis)][getattr(order, axis)] for axis, after in wanted.items()
    )

    if declared:
        rules.check_declared(order, **wanted)
    else:
        with pytest.raises(AssertionError):
            rules.check_declared(order, **wanted)


# ---------------------------------------------------------------------------------------------------- refunds, returns


@given(
    orders,
    st.none() | st.integers(1, 12),
    st.none() | st.sampled_from(["USD", "EUR"]),
    st.integers(0, 10),
)
def test_a_refund_is_all_that_is_left_or_a_part_of_it(
    order: Order, amount: int | None, currency: str | None, left: int
):
    request = RefundOrder(payment_id=1, idempotency_key="key", amount_minor=amount, currency=currency)
    wanted = left if amount is None else amount
    may = order.payment in ("paid", "partially_refunded") and currency in (None, "USD") and 0 < wanted <= left

    if may:
        assert rules.check_refund(order, request, left) == wanted
    else:
        with pytest.raises((IllegalMove, InvalidRequest, NothingToRefund)):
            rules.check_refund(order, request, left)


class Sold(msgspec.Struct, frozen=True):
    """A line of a delivered order."""

    quantity: int
    returned: int
    total_minor: int
    """What was paid for it, which need not be a multiple of `quantity`."""


sold = st.builds(
    lambda quantity, returned, total_minor: Sold(quantity, min(quantity, returned), total_minor),
    st.integers(1, 7),
    st.integers(0, 7),
    st.integers(0, 1_000),
)


def delivered(lines: list[Sold]) -> Order:
    """A delivered order; line n is of product 10 + n."""
    return Order(
        id=1001,
        user_id=1,
        status="confirmed",
        payment="paid",
        fulfilment="delivered",
        currency="USD",
        total_minor=sum(line.total_minor for line in lines),
        lines=tuple(
            OrderLine(
                id=i,
                product_id=10 + i,
                sku=f"SKU-{i}",
                name=f"Thing {i}",
                quantity=line.quantity,
                unit_price_minor=200,
                discount_minor=max(0, 200 * line.quantity - line.total_minor),
                tax_minor=max(0, line.total_minor - 200 * line.quantity),
                line_total_minor=line.total_minor,
                returned=line.returned,
            )
            for i, line in enumerate(lines, 1)
        ),
        created_at=EPOCH,
        updated_at=EPOCH,
        version=5,
    )


@given(
    st.lists(sold, min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 7), st.sampled_from(["line", "product", "both"])), max_size=4),
)
def test_pieces_that_were_sold_and_not_returned_can_be_returned(lines: list[Sold], back: list[tuple[int, int, str]]):
    order = delivered(lines)
    wanted = [
        ReturnLine(
            quantity=quantity,
            line_id=None if by == "product" else i,
            product_id=None if by == "line" else 10 + i,
        )
        for i, quantity, by in back
    ]
    left = {line.id: line.quantity - line.returned for line in order.lines}
    is_once = len({i for i, _, _ in back}) == len(back)

    if is_once and all(quantity <= left.get(i, 0) for i, quantity, _ in back):
        found = rules.check_return(order, wanted)
        assert [(line.line_id, line.product_id, line.quantity) for line in found] == [
            (i, 10 + i, n) for i, n, _ in back
        ]
        assert rules.is_all(order, found) == (sum(n for _, n, _ in back) == sum(left.values()))
        returned = rules.returned_after(order, found)
        assert sum(returned) == sum(line.returned for line in lines) + sum(n for _, n, _ in back)
        assert all(now <= line.quantity for now, line in zip(returned, lines, strict=True))
    else:
        with pytest.raises((InvalidRequest, NotReturnable)):
            rules.check_return(order, wanted)


@pytest.mark.parametrize(
    "wanted",
    [
        {},
        {"line_id": 3},
        {"line_id": 1, "product_id": 12},
        {"line_id": 3, "product_id": 11},
    ],
)
def test_an_item_that_names_no_line_is_refused_at_its_place(wanted: dict[str, int]):
    order = delivered([Sold(3, 0, 100), Sold(3, 0, 100)])

    with pytest.raises(InvalidRequest) as refused:
        rules.check_return(order, [ReturnLine(quantity=1, line_id=2), ReturnLine(quantity=1, **wanted)])

    assert [error.field for error in refused.value.errors] == ["items[1]"]


def test_two_items_that_name_one_line_in_two_ways_are_refused():
    order = delivered([Sold(3, 0, 100)])

    with pytest.raises(InvalidRequest) as refused:
        rules.check_return(order, [ReturnLine(quantity=1, line_id=1), ReturnLine(quantity=1, product_id=11)])

    assert [error.field for error in refused.value.errors] == ["items[1]"]


@given(st.lists(sold, min_size=1, max_size=4))
def test_what_is_not_returned_can_be_returned_and_is_all(lines: list[Sold]):
    order = delivered(lines)
    rest = rules.not_returned(order)

    assert rules.check_return(order, rest) == rest
    assert rules.is_all(order, rest)


@given(st.lists(sold, min_size=1, max_size=4), st.data())
def test_the_refunds_of_all_pieces_of_an_order_add_up_to_its_total(lines: list[Sold], data: st.DataObject):
    order = delivered([Sold(line.quantity, 0, line.total_minor) for line in lines])
    refunded_minor = 0

    while rest := rules.not_returned(order):
        back = [
            msgspec.structs.replace(line, quantity=data.draw(st.integers(1, line.quantity)))
            for line in data.draw(st.lists(st.sampled_from(rest), min_size=1, unique=True))
        ]
        value = rules.refund_value(order, back)
        assert value >= 0
        refunded_minor += value
        returned = rules.returned_after(order, back)
        after = [msgspec.structs.replace(line, returned=now) for line, now in zip(order.lines, returned, strict=True)]
        order = msgspec.structs.replace(order, lines=tuple(after))

    assert refunded_minor == order.total_minor


@given(sold)
def test_the_refund_of_a_part_of_a_line_is_its_share_to_the_last_unit(line: Sold):
    order = delivered([Sold(line.quantity, 0, line.total_minor)])

    for pieces in range(1, line.quantity + 1):
        value = rules.refund_value(order, [ReturnLine(line_id=1, product_id=11, quantity=pieces)])
        assert abs(value - line.total_minor * pieces / line.quantity) < 1


@given(orders)
def test_an_order_as_placed_differs_only_by_its_moves(order: Order):
    placed = rules.as_placed(order, "user:1")

    assert all(getattr(placed, axis) == state for axis, state in rules.PLACED.items())
    assert (placed.version, placed.updated_at) == (1, order.created_at)
    assert (placed.id, placed.user_id, placed.lines, placed.total_minor) == (
        order.id,
        order.user_id,
        order.lines,
        order.total_minor,
    )
    assert rules.as_placed(order, "anonymous").user_id == 0, "of a guest, whose order may have been claimed since"


@given(baskets)
def test_totals_are_exact_and_fit_into_64_bits(basket: dict[int, tuple[int, Quote]]):
    lines = tuple(PlaceLine(product_id=i, quantity=quantity) for i, (quantity, _) in basket.items())

    priced = rules.priced(lines, {i: quote for i, (_, quote) in basket.items()})

    assert [line.product_id for line in priced] == list(basket)
    assert [line.id for line in priced] == list(range(1, len(priced) + 1))
    assert all(line.line_total_minor == line.quantity * line.unit_price_minor for line in priced)
    assert all(line.discount_minor == line.tax_minor == 0 for line in priced)
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
    wrong = rules.check_request(PlaceOrder(user_id=1, lines=tuple(PlaceLine(product_id=i) for i in product_ids)))

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
def test_another_total_or_currency_than_the_catalogues_is_refused(
    shown: int | None, shown_currency: str | None, actual: int, currency: str
):
    request = PlaceOrder(user_id=1, lines=(), expected_total_minor=shown, expected_currency=shown_currency)

    changed = rules.check_total(request, actual, currency)

    assert (changed is None) == (shown in (None, actual) and shown_currency in (None, currency))


@given(orders)
def test_a_guest_sees_the_order_until_an_account_has_claimed_it(order: Order):
    guest = Actor("guest", order.id)
    of_guest = msgspec.structs.replace(order, user_id=0)

    assert rules.visible(of_guest, order.id, guest) is of_guest
    assert isinstance(rules.visible(order, order.id, guest), OrderNotFound)
    assert isinstance(rules.visible(of_guest, order.id, Actor("guest", order.id + 1)), OrderNotFound)
