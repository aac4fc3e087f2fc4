"""Placing orders through the contract: what is kept of the catalogue, what is refused, and what a batch costs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from mercato.chassis.contract import (
    Actor,
    Internal,
    InvalidRequest,
    ServiceError,
    Unavailable,
)
from mercato.chassis.hosting.host import TransportName
from mercato.chassis.observability.faults import Fault
from mercato.contracts.money import MAX_MINOR
from mercato.contracts.order_refusals import MixedCurrencies, PriceChanged
from mercato.contracts.orders import (
    LINES_LIMIT,
    NO_USER,
    QUANTITY_LIMIT,
    GetOrder,
    Orders,
    PlacedOrder,
    PlaceLine,
    PlaceOrder,
)
from mercato.contracts.products import (
    ArchiveProduct,
    CreateProduct,
    ProductArchived,
    ProductNotFound,
    Products,
    UpdateProduct,
)
from mercato.contracts.users import Register, UserNotFound, Users
from mercato.services.orders.app import build
from mercato.services.products.app import build as build_products
from mercato.testing.actors import ALICE, BOB, STAFF
from mercato.testing.builders import LAMP, MUG, quote, user
from mercato.testing.builds import build_users
from mercato.testing.cluster import Cluster, database_name
from mercato.testing.harness import ServiceHarness
from mercato.testing.injection import fail
from services.orders.harness import OrdersHarness, mugs


def of(*product_ids: int, **fields: Any) -> PlaceOrder:
    return PlaceOrder(user_id=1, lines=tuple(PlaceLine(product_id=i) for i in product_ids), **fields)


# ------------------------------------------------------------------------------------- with the real users, products


async def test_an_order_keeps_names_and_prices_of_the_time_it_was_placed(cluster: Cluster, transport: TransportName):
    async with ServiceHarness(cluster, transport).running() as services:
        await services.open({"users": build_users, "products": build_products, "orders": build})
        orders, users, products = services.client(Orders), services.client(Users), services.client(Products)
        with services.acting(STAFF):
            alice = await users.register(
                Register(email="alice@example.com", name="Alice", password="a good long password")
            )
            mug = await products.create(
                CreateProduct(sku="MUG", name="Mug", price_minor=1_250, currency="EUR", category="kitchen")
            )
            lamp = await products.create(
                CreateProduct(sku="LAMP", name="Lamp", price_minor=9_999, currency="EUR", category="light")
            )
        with services.acting(Actor("customer", alice.id)):
            lines = (PlaceLine(product_id=lamp.id, quantity=3), PlaceLine(product_id=mug.id))
            placed = (await orders.place(PlaceOrder(user_id=alice.id, lines=lines))).order
        with services.acting(STAFF):
            await products.update(UpdateProduct(id=lamp.id, name="Old lamp", price_minor=1, currency="USD"))
            await products.archive(ArchiveProduct(id=mug.id))
            read = await orders.get(GetOrder(id=placed.id))
            with pytest.raises(ProductArchived):
                await orders.place(PlaceOrder(user_id=alice.id, lines=(PlaceLine(product_id=mug.id),)))

    assert read == placed
    assert [(line.sku, line.name, line.quantity, line.unit_price_minor) for line in read.lines] == [
        ("LAMP", "Lamp", 3, 9_999),
        ("MUG", "Mug", 1, 1_250),
    ]
    assert [line.line_total_minor for line in read.lines] == [29_997, 1_250]
    assert (read.total_minor, read.currency) == (31_247, "EUR")


# ---------------------------------------------------------------------------------------------------------- one order


async def test_a_new_order_is_pending_unpaid_and_unfulfilled(harness: OrdersHarness):
    with harness.acting(ALICE):
        placed = await harness.orders.place(mugs(2))

    order = placed.order
    assert not placed.replayed
    assert (order.status, order.payment, order.fulfilment, order.version) == ("pending", "unpaid", "unfulfilled", 1)
    assert (order.user_id, order.total_minor, order.currency) == (ALICE.id, 2_500, "USD")
    assert order.created_at == order.updated_at
    assert order.created_at.utcoffset() is not None
    assert order.id > 1_000


async def test_the_default_quantity_is_one(harness: OrdersHarness):
    order = await harness.place(of(MUG, LAMP))

    assert [line.quantity for line in order.lines] == [1, 1]


async def test_each_line_has_an_id_and_a_total_from_the_start(harness: OrdersHarness):
    await harness.place(of(MUG))  # of another order: ids begin with each order again

    order = await harness.place(
        PlaceOrder(user_id=1, lines=(PlaceLine(product_id=LAMP, quantity=2), PlaceLine(product_id=MUG)))
    )

    assert [(line.id, line.product_id) for line in order.lines] == [(1, LAMP), (2, MUG)]
    assert [(line.discount_minor, line.tax_minor, line.line_total_minor) for line in order.lines] == [
        (0, 0, 2 * 4_999),
        (0, 0, 1_250),
    ]
    products = "SELECT product_id FROM order_products WHERE order_id = $1 ORDER BY product_id"
    assert await harness.values(products, order.id) == [MUG, LAMP]


async def test_each_order_has_a_random_part_of_its_own(harness: OrdersHarness):
    await harness.place_many([mugs() for _ in range(50)])

    nonces = await harness.values("SELECT nonce FROM orders")

    assert len(set(nonces)) == 50
    assert 2**60 < max(nonces) < 2**63  # 50 numbers of 63 bits are all smaller once in 10^45 runs
    assert min(nonces) > 0


@pytest.mark.parametrize(("method", "attempt"), [(None, 0), ("sandbox:ok", 1)])
async def test_an_order_says_which_payment_it_has_begun(harness: OrdersHarness, method: str | None, attempt: int):
    order = await harness.place(of(MUG, payment_method=method))

    assert (await harness.raw(order.id)).payment_attempt == attempt


async def test_lines_keep_the_order_of_the_request(harness: OrdersHarness):
    forth, back = await harness.place(of(MUG, LAMP)), await harness.place(of(LAMP, MUG))
    with harness.acting(ALICE):
        read = [await harness.orders.get(GetOrder(id=order.id)) for order in (forth, back)]

    assert [[line.product_id for line in order.lines] for order in read] == [[MUG, LAMP], [LAMP, MUG]]


async def test_the_largest_order_does_not_overflow(harness: OrdersHarness):
    harness.products.answers |= {i: quote(i, MAX_MINOR) for i in range(1, LINES_LIMIT + 1)}
    lines = tuple(PlaceLine(product_id=i, quantity=QUANTITY_LIMIT) for i in harness.products.answers)

    order = await harness.place(PlaceOrder(user_id=1, lines=lines))
    with harness.acting(ALICE):
        read = await harness.orders.get(GetOrder(id=order.id))

    assert read.total_minor == LINES_LIMIT * QUANTITY_LIMIT * MAX_MINOR
    assert read == order


async def test_a_free_product_can_be_ordered(harness: OrdersHarness):
    harness.products.answers[MUG] = quote(MUG, 0)

    assert (await harness.place(of(MUG, expected_total_minor=0))).total_minor == 0


# ----------------------------------------------------------------------------------------------------------- refusals


async def refusal(harness: OrdersHarness, request: PlaceOrder, actor: Actor = ALICE) -> ServiceError:
    with pytest.raises(ServiceError) as refused:
        await harness.place(request, actor)
    assert await harness.count("orders") == await harness.count("order_products") == await harness.count("history") == 0
    return refused.value


async def test_an_unknown_user_cannot_order(harness: OrdersHarness):
    refused = await refusal(harness, mugs(user_id=404), STAFF)

    assert isinstance(refused, UserNotFound)
    assert refused.user_id == 404


async def test_an_order_for_another_customer_is_refused_like_one_for_an_unknown_user(harness: OrdersHarness):
    for_bob, for_unknown = await refusal(harness, mugs(user_id=2)), await refusal(harness, mugs(user_id=404))

    assert isinstance(for_bob, UserNotFound)
    assert isinstance(for_unknown, UserNotFound)
    assert (for_bob.user_id, for_unknown.user_id) == (2, 404)
    assert harness.users.sizes == []  # nor does the time that it takes tell who exists


async def test_an_unknown_product_is_named(harness: OrdersHarness):
    refused = await refusal(harness, of(MUG, 404, LAMP))

    assert isinstance(refused, ProductNotFound)
    assert refused.product_id == 404


async def test_an_archived_product_is_named(harness: OrdersHarness):
    harness.products.answers[LAMP] = ProductArchived(product_id=LAMP)

    refused = await refusal(harness, of(MUG, LAMP))

    assert isinstance(refused, ProductArchived)
    assert refused.product_id == LAMP


async def test_a_product_stands_in_one_line(harness: OrdersHarness):
    refused = await refusal(harness, of(MUG, LAMP, MUG, MUG))

    assert isinstance(refused, InvalidRequest)
    assert [error.field for error in refused.errors] == ["items[2].product_id", "items[3].product_id"]
    assert harness.products.sizes == []


async def test_one_order_has_one_currency(harness: OrdersHarness):
    harness.products.answers[LAMP] = quote(LAMP, 1, "EUR")

    refused = await refusal(harness, of(MUG, LAMP))

    assert isinstance(refused, MixedCurrencies)
    assert refused.currencies == ("EUR", "USD")


async def test_another_total_than_was_shown_is_refused(harness: OrdersHarness):
    refused = await refusal(harness, of(MUG, expected_total_minor=1_249))

    assert isinstance(refused, PriceChanged)
    assert (refused.expected_minor, refused.actual_minor, refused.actual_currency) == (1_249, 1_250, "USD")


@pytest.mark.parametrize("shown", [{}, {"expected_total_minor": 1_250}])
async def test_another_currency_than_was_shown_is_refused(harness: OrdersHarness, shown: dict[str, Any]):
    refused = await refusal(harness, of(MUG, expected_currency="EUR", **shown))

    assert isinstance(refused, PriceChanged)
    assert (refused.actual_minor, refused.actual_currency) == (1_250, "USD")


async def test_the_total_that_was_shown_is_accepted(harness: OrdersHarness):
    assert (await harness.place(of(MUG, expected_total_minor=1_250, expected_currency="USD"))).total_minor == 1_250


async def test_staff_place_for_others_and_anonymous_actors_for_guests_alone(harness: OrdersHarness):
    assert (await harness.place(mugs(user_id=2), STAFF)).user_id == 2
    with pytest.raises(UserNotFound):
        await harness.place(mugs(), Actor("anonymous"))
    of_guest = msgspec.structs.replace(mugs(), user_id=NO_USER, guest=True)
    assert (await harness.place(of_guest, Actor("anonymous"))).user_id == 0
    with pytest.raises(UserNotFound):
        await harness.place(of_guest, Actor("customer", 1))


# ------------------------------------------------------------------------------------------------------------ batches


async def test_each_request_of_a_batch_has_its_own_answer(harness: OrdersHarness):
    harness.products.answers[3] = ProductArchived(product_id=3)
    harness.products.answers[4] = quote(4, 1, "JPY")

    outcomes = await harness.place_many(
        [
            mugs(1),
            mugs(user_id=404),
            of(404),
            mugs(2),
            of(3),
            of(MUG, 4),
            of(MUG, MUG),
            of(MUG, expected_total_minor=1),
            mugs(3),
        ],
        STAFF,
    )

    kinds = [type(outcome) for outcome in outcomes]
    assert kinds == [
        PlacedOrder,
        UserNotFound,
        ProductNotFound,
        PlacedOrder,
        ProductArchived,
        MixedCurrencies,
        InvalidRequest,
        PriceChanged,
        PlacedOrder,
    ]
    placed = [outcome.order for outcome in outcomes if isinstance(outcome, PlacedOrder)]
    assert [order.total_minor for order in placed] == [1_250, 2_500, 3_750]
    assert [order.id for order in placed] == sorted(order.id for order in placed)
    assert await harness.count("orders") == 3
    with harness.acting(STAFF):
        assert await harness.orders.get.many([GetOrder(id=order.id) for order in placed]) == placed


async def test_each_refusal_is_an_error_of_its_own(harness: OrdersHarness):
    outcomes = await harness.place_many([of(404), of(404)])

    assert outcomes[0] is not outcomes[1]


async def test_each_request_of_a_batch_has_the_rights_of_its_own_actor(harness: OrdersHarness):
    with harness.acting(ALICE):
        own, others = harness.orders.place(mugs()), harness.orders.place(mugs(user_id=2))
    with harness.acting(BOB):
        bobs = harness.orders.place(mugs(user_id=2))
    with harness.acting(STAFF):
        staffs = harness.orders.place(mugs(user_id=2))

    outcomes = await asyncio.gather(own, others, bobs, staffs, return_exceptions=True)

    assert [getattr(getattr(outcome, "order", None), "user_id", None) for outcome in outcomes] == [1, None, 2, 2]
    assert isinstance(outcomes[1], UserNotFound)
    actors = await harness.values("SELECT actor_role || ':' || actor_id FROM history ORDER BY order_id")
    assert actors == ["customer:1", "customer:2", "staff:9"]


async def test_a_batch_is_one_call_to_users_one_to_products_and_one_transaction(harness: OrdersHarness):
    harness.users.answers |= {i: user(i) for i in range(1, 257)}
    harness.products.answers |= {i: quote(i, i) for i in range(1, 513)}
    requests = [
        PlaceOrder(user_id=i, lines=(PlaceLine(product_id=i), PlaceLine(product_id=i + 256))) for i in range(1, 257)
    ]

    outcomes = await harness.place_many(requests, STAFF)

    assert all(isinstance(outcome, PlacedOrder) for outcome in outcomes)
    assert harness.users.sizes == [256] * harness.deliveries()
    assert harness.products.sizes == [512] * harness.deliveries()
    assert len(set(await harness.values("SELECT xmin::text FROM orders"))) == 1
    assert len(set(await harness.values("SELECT xmin::text FROM order_products"))) == 1


async def test_the_largest_batch_is_quoted_in_parts_that_fit_the_queue(harness: OrdersHarness):
    harness.products.answers |= {i: quote(i, 1) for i in range(1, 12_001)}
    requests = [
        PlaceOrder(user_id=1, lines=tuple(PlaceLine(product_id=n * 100 + i) for i in range(1, 101))) for n in range(120)
    ]

    outcomes = await harness.place_many(requests)

    assert [type(outcome) for outcome in outcomes] == [PlacedOrder] * 120
    assert await harness.count("order_products") == 12_000


async def test_nothing_is_asked_for_a_batch_that_is_refused_without_asking(harness: OrdersHarness):
    outcomes = await harness.place_many([of(MUG, MUG), mugs(user_id=2)])

    assert [type(outcome) for outcome in outcomes] == [InvalidRequest, UserNotFound]
    assert harness.users.sizes == harness.products.sizes == []


@pytest.mark.parametrize("who", ["users", "products"])
async def test_when_users_or_products_are_unavailable_every_request_of_a_batch_is_refused(
    harness: OrdersHarness, who: str
):
    getattr(harness, who).failure = Unavailable(service=who)

    outcomes = await harness.place_many([mugs(), mugs(2), mugs(key="k"), of(LAMP)])

    assert [type(outcome) for outcome in outcomes] == [Unavailable] * 4
    assert {outcome.service for outcome in outcomes if isinstance(outcome, Unavailable)} == {who}
    assert await harness.count("orders") == await harness.count("history") == 0


async def test_when_the_database_is_unavailable_every_request_of_a_batch_is_refused(harness: OrdersHarness):
    await harness.cluster.execute(f'DROP DATABASE "{database_name(harness.dsn)}" WITH (FORCE)')

    outcomes = await harness.place_many([mugs(), mugs(2, key="k")])

    assert [type(outcome) for outcome in outcomes] == [Unavailable] * 2


async def test_a_request_that_the_database_refuses_fails_alone(harness: OrdersHarness):
    harness.products.answers[LAMP] = quote(LAMP, -1)  # against a constraint: as if products had a bug

    outcomes = await harness.place_many([mugs(1), of(LAMP), mugs(2)])

    assert [type(outcome) for outcome in outcomes] == [PlacedOrder, Internal, PlacedOrder]
    assert await harness.count("orders") == 2


async def test_a_crash_after_the_commit_is_not_run_again(
    harness: OrdersHarness, inject: Callable[[str, Fault], object]
):
    inject("orders.place.after_commit", fail)

    outcomes = await harness.place_many([mugs(), mugs()])

    assert [type(outcome) for outcome in outcomes] == [Internal, Internal]
    assert await harness.count("orders") == 2


async def test_a_committed_order_is_emitted_and_continued_after_a_crash_right_after_the_commit(
    harness: OrdersHarness, inject: Callable[[str, Fault], object]
):
    inject("orders.place.after_commit", fail)

    await harness.place_many([mugs(), mugs()])

    ids = await harness.values("SELECT id FROM orders ORDER BY id")
    assert sorted(i for type_, i in await harness.emitted() if type_ == "order.placed") == ids
    assert await harness.values("SELECT subject_id FROM sagas ORDER BY subject_id") == ids


async def test_the_first_entry_of_the_history_says_who_placed_it(harness: OrdersHarness):
    order = await harness.place(mugs(user_id=1), STAFF)

    entries = await harness.values(
        """
        SELECT format('%s %s %s %s %s %s %s %s', version, status, payment, fulfilment, events, note, actor_role,
                      actor_id)
          FROM history WHERE order_id = $1
        """,
        order.id,
    )

    assert entries == ["1 pending unpaid unfulfilled {order.placed}  staff 9"]
