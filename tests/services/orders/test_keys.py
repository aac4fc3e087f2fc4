"""Idempotency keys of placing: one key, one order, for ever, whatever dies in between."""

from __future__ import annotations

import asyncio
import datetime
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from mercato.chassis.contract import (
    Actor,
    IdempotencyKeyReused,
    Internal,
    OutcomeUnknown,
    RequestInProgress,
    ServiceError,
)
from mercato.chassis.observability.faults import Fault
from mercato.contracts.order_refusals import PriceChanged
from mercato.contracts.orders import MoveOrder, Order, PlacedOrder
from mercato.contracts.products import ProductNotFound
from mercato.testing.actors import ALICE, BOB, STAFF
from mercato.testing.builders import MUG, quote
from mercato.testing.injection import Inject, Pause, fail
from mercato.testing.proxy import TcpProxy
from services.orders.harness import OrdersHarness, mugs


async def try_place(
    harness: OrdersHarness, *, key: str = "key", fingerprint: bytes = b"mugs", actor: Actor = ALICE
) -> object:
    """The answer or the error, as a client receives it."""
    with harness.acting(actor):
        try:
            return await harness.orders.place(mugs(key=key, fingerprint=fingerprint, user_id=1))
        except ServiceError as error:
            return error


def order_ids(outcomes: object) -> list[int]:
    assert isinstance(outcomes, list | tuple)
    return [outcome.order.id for outcome in outcomes if isinstance(outcome, PlacedOrder)]


# --------------------------------------------------------------------------------------------------------- the answer


async def test_a_second_place_with_the_same_key_gets_the_first_answer(harness: OrdersHarness):
    with harness.acting(ALICE):
        first = await harness.orders.place(mugs(key="key"))
        again = await harness.orders.place(mugs(key="key"))

    assert not first.replayed
    assert again.replayed
    assert again.order == first.order
    assert await harness.count("orders") == 1


async def test_a_repeated_place_gives_the_order_as_it_was_placed(harness: OrdersHarness):
    placed = await harness.place(mugs(key="key"))
    with harness.acting(STAFF):
        await harness.orders.move(MoveOrder(id=placed.id, status="confirmed"))
    harness.products.answers[MUG] = quote(MUG, 77_777)
    harness.users.answers.clear()

    assert await harness.place(mugs(key="key")) == placed


async def test_the_same_key_with_another_request_is_refused(harness: OrdersHarness):
    await harness.place(mugs(key="key", fingerprint=b"one"))

    assert isinstance(await try_place(harness, fingerprint=b"another"), IdempotencyKeyReused)
    assert await harness.count("orders") == 1


async def test_keys_of_different_principals_are_different_keys(harness: OrdersHarness):
    with harness.acting(ALICE):
        alices = harness.orders.place(mugs(key="key"))
    with harness.acting(BOB):
        bobs = harness.orders.place(mugs(key="key", fingerprint=b"bob", user_id=2))
    with harness.acting(STAFF):
        staffs = harness.orders.place(mugs(key="key", fingerprint=b"staff"))
    with harness.acting(Actor("staff", 77)):
        others = harness.orders.place(mugs(key="key", fingerprint=b"other"))

    placed = await asyncio.gather(alices, bobs, staffs, others)

    assert len(set(order_ids(placed))) == 4


async def test_a_customer_who_becomes_staff_keeps_the_keys(harness: OrdersHarness):
    with harness.acting(ALICE):
        first = await harness.orders.place(mugs(key="key"))
    with harness.acting(Actor("staff", ALICE.id)):
        again = await harness.orders.place(mugs(key="key"))
    assert (again.replayed, again.order) == (True, first.order)


async def test_requests_without_a_key_make_an_order_each(harness: OrdersHarness):
    assert len(set(order_ids(await harness.place_many([mugs(), mugs(), mugs()])))) == 3


async def test_a_refused_request_leaves_its_key_free(harness: OrdersHarness):
    request = msgspec.structs.replace(mugs(key="key"), expected_total_minor=1_000)
    outcomes = await harness.place_many([request])
    assert [type(outcome) for outcome in outcomes] == [PriceChanged]
    assert await harness.count("orders") == 0

    harness.products.answers[MUG] = quote(MUG, 1_000)
    outcomes = await harness.place_many([request])

    assert [type(outcome) for outcome in outcomes] == [PlacedOrder]


# ------------------------------------------------------------------------------------ duplicates in a batch


async def test_duplicates_in_one_batch_make_one_order(harness: OrdersHarness):
    outcomes = await harness.place_many([mugs(key="a"), mugs(key="b"), mugs(key="a"), mugs(), mugs(key="a")])

    ids = order_ids(outcomes)
    assert ids[0] == ids[2] == ids[4]
    assert len(set(ids)) == 3
    assert [outcome.replayed for outcome in outcomes if isinstance(outcome, PlacedOrder)] == [
        False,
        False,
        True,
        False,
        True,
    ]
    assert await harness.count("orders") == 3


async def test_the_same_key_with_another_request_in_one_batch_is_refused(harness: OrdersHarness):
    outcomes = await harness.place_many([mugs(key="a"), mugs(2, key="a", fingerprint=b"two")])

    assert [type(outcome) for outcome in outcomes] == [PlacedOrder, IdempotencyKeyReused]
    assert await harness.count("orders") == 1


async def test_duplicates_of_an_order_are_compared_with_that_order_not_with_the_first_of_the_batch(
    harness: OrdersHarness,
):
    placed = await harness.place(mugs(key="a"))

    with capture_logs() as logs:
        outcomes = await harness.place_many([mugs(key="a", fingerprint=b"two"), mugs(key="a"), mugs(key="a")])

    assert [type(outcome) for outcome in outcomes] == [IdempotencyKeyReused, PlacedOrder, PlacedOrder]
    assert order_ids(outcomes) == [placed.id, placed.id]
    # A batch that was given up and run again, one by one, is a warning.
    assert {log["event"] for log in logs} == {"key_refused"}


async def test_refused_duplicates_have_an_error_each(harness: OrdersHarness):
    harness.products.answers.clear()

    outcomes = await harness.place_many([mugs(key="a"), mugs(key="a")])

    assert [type(outcome) for outcome in outcomes] == [ProductNotFound] * 2
    assert outcomes[0] is not outcomes[1]


# ------------------------------------------------------------------------------------ duplicates in two processes


async def test_twenty_duplicates_in_two_processes_make_one_order(harness: OrdersHarness):
    elsewhere = await harness.another_process()
    with harness.acting(ALICE):
        placed = await asyncio.gather(
            *((harness.orders if n % 2 else elsewhere).place(mugs(key="key")) for n in range(20))
        )

    assert len(set(order_ids(placed))) == 1
    assert await harness.count("orders") == 1
    assert await harness.count("order_products") == 1


async def test_batches_that_share_keys_in_opposite_orders_do_not_deadlock(harness: OrdersHarness):
    elsewhere = await harness.another_process()
    held = await hold_key(harness, "m")  # so that both batches have begun when either goes on
    requests = [mugs(key="a"), mugs(key="m"), mugs(key="z")]
    with harness.acting(ALICE):
        here = asyncio.ensure_future(harness.orders.place.many(requests))
        there = asyncio.ensure_future(elsewhere.place.many(requests[::-1]))
        await harness.until_blocked(2, by=[here, there])
        await held.rollback()
        ids = order_ids(list(await here))

    assert ids == order_ids(list(await there))[::-1]
    assert await harness.count("orders") == len(set(ids)) == 3
    assert len(harness.products.sizes) == harness.deliveries(2)  # neither was given up and run again, one by one


async def hold_key(harness: OrdersHarness, key: str) -> Any:
    """A transaction that has written an order with a key of Alice, and has not ended."""
    connection = await harness.connection()
    held = connection.transaction()
    await held.start()
    await connection.execute(
        """
        INSERT INTO orders (nonce, user_id, total_minor, currency, lines, principal, idempotency_key, fingerprint)
        VALUES (1, 1, 0, 'USD', '[]', 'user:1', $1, '')
        """,
        key,
    )
    return held


async def test_a_concurrent_duplicate_waits_for_the_first_and_gets_its_answer(harness: OrdersHarness, inject: Inject):
    pause = Pause()
    elsewhere = await harness.another_process()
    lift = inject("orders.place.before_commit", pause)
    with harness.acting(ALICE):
        first = asyncio.ensure_future(harness.orders.place(mugs(key="key")))
        await pause.reached.wait()
        lift()
        duplicate = asyncio.ensure_future(elsewhere.place(mugs(key="key")))
        other = asyncio.ensure_future(elsewhere.place(mugs(key="key", fingerprint=b"other")))
        await harness.until_blocked(by=[duplicate, other])
        pause.resume.set()
        placed = [await first, await duplicate]

    assert len(set(order_ids(placed))) == 1
    with pytest.raises(IdempotencyKeyReused):
        await other


async def test_a_key_that_stays_held_is_in_progress_and_fails_alone(harness: OrdersHarness):
    held = await hold_key(harness, "held")

    outcomes = await harness.place_many([mugs(key="a"), mugs(key="held"), mugs(), mugs(key="b")])

    assert [type(outcome) for outcome in outcomes] == [PlacedOrder, RequestInProgress, PlacedOrder, PlacedOrder]
    assert isinstance(outcomes[1], ServiceError)
    assert outcomes[1].retry_after_s == 1
    await held.rollback()
    assert isinstance(await try_place(harness, key="held"), PlacedOrder)


# -------------------------------------------------------------------------------------------------------------- crashes


async def test_a_crash_before_the_commit_leaves_nothing_and_the_retry_places_one(
    harness: OrdersHarness, inject: Inject
):
    lift = inject("orders.place.before_commit", fail)

    assert isinstance(await try_place(harness), Internal)
    for table in ("orders", "order_products", "history", "sagas", "outbox"):
        assert await harness.count(table) == 0

    lift()
    assert isinstance(await try_place(harness), PlacedOrder)
    assert await harness.count("orders") == 1


async def test_a_connection_that_dies_before_the_commit_leaves_nothing(harness: OrdersHarness, inject: Inject):
    killer = await harness.connection()

    async def kill(_point: str) -> None:
        await killer.execute(
            """
            SELECT pg_terminate_backend(pid) FROM pg_stat_activity
             WHERE datname = current_database() AND state = 'idle in transaction'
            """
        )

    lift = inject("orders.place.before_commit", kill)
    assert isinstance(await try_place(harness), ServiceError)
    assert await harness.count("orders") == await harness.count("sagas") == 0

    lift()
    placed = await try_place(harness)
    assert isinstance(placed, PlacedOrder)
    assert await harness.count("orders") == 1


@pytest.mark.parametrize("cut", ["before", "after"])
async def test_a_retry_after_a_commit_with_an_unknown_outcome_gives_one_order(
    harness: OrdersHarness, inject: Inject, cut: str
):
    proxy = await harness.proxy()
    orders = await harness.another_process(proxy.dsn)
    lift = inject("orders.place.before_commit", cutting(proxy, cut))
    with harness.acting(ALICE):
        with pytest.raises(OutcomeUnknown):
            await orders.place(mugs(key="key"))
        lift()
        proxy.cut = None
        placed = await orders.place(mugs(key="key"))

    assert proxy.cuts
    assert await harness.values("SELECT id FROM orders") == [placed.order.id]
    assert placed.replayed == (cut == "after")


def cutting(proxy: TcpProxy, cut: str) -> Fault:
    """Cuts the proxy at the next commit: not before, when the process only renews its lease."""

    async def cut_next(_point: str) -> None:
        proxy.cut = cut

    return cut_next


async def test_a_batch_whose_commit_has_an_unknown_outcome_is_not_run_again(harness: OrdersHarness, inject: Inject):
    proxy = await harness.proxy()
    orders = await harness.another_process(proxy.dsn)
    inject("orders.place.before_commit", cutting(proxy, "after"))
    with harness.acting(ALICE):
        outcomes = await orders.place.many([mugs(), mugs(), mugs()])

    assert [type(outcome) for outcome in outcomes] == [OutcomeUnknown] * 3
    assert await harness.count("orders") == 3


# -------------------------------------------------------------------------------------------------------- a month later


async def a_month_passes(harness: OrdersHarness) -> None:
    """Sets every order 30 days back."""
    connection = await harness.connection()
    past = "created_at = created_at - interval '30 days', updated_at = updated_at - interval '30 days'"
    await connection.execute(f"UPDATE orders SET {past}")


async def test_a_key_finds_its_order_after_30_days(harness: OrdersHarness):
    with harness.acting(ALICE):
        placed = await harness.orders.place(mugs(3, key="key"))
    with harness.acting(STAFF):
        await harness.orders.move(MoveOrder(id=placed.order.id, status="confirmed"))
    await a_month_passes(harness)

    with harness.acting(ALICE):
        again = await harness.orders.place(mugs(3, key="key"))

    assert again.replayed
    assert again.order == as_of_a_month_ago(placed.order)  # as it was placed, and not as it is now
    assert await harness.count("orders") == 1


def as_of_a_month_ago(order: Order) -> Order:
    at = order.created_at - datetime.timedelta(days=30)
    return msgspec.structs.replace(order, created_at=at, updated_at=at)


async def test_after_30_days_another_request_with_the_key_is_refused_and_the_right_one_is_not(harness: OrdersHarness):
    placed = await harness.place(mugs(key="key"))
    await a_month_passes(harness)

    assert isinstance(await try_place(harness, fingerprint=b"other"), IdempotencyKeyReused)
    again = await try_place(harness)

    assert isinstance(again, PlacedOrder)
    assert again.order == as_of_a_month_ago(placed)
    assert await harness.count("orders") == 1


async def test_after_30_days_a_key_finds_its_order_although_product_and_user_are_gone(harness: OrdersHarness):
    placed = await harness.place(mugs(key="key"))
    await a_month_passes(harness)
    harness.products.answers.clear()
    harness.users.answers.clear()

    again = await try_place(harness)

    assert isinstance(again, PlacedOrder)
    assert again.order == as_of_a_month_ago(placed)


async def test_a_known_key_does_not_make_the_others_of_its_batch_run_alone(harness: OrdersHarness):
    old = await harness.place(mugs(key="old"))
    await a_month_passes(harness)
    harness.products.batches.clear()

    outcomes = await harness.place_many([mugs(key=f"k{n}") for n in range(10)] + [mugs(key="old")])

    assert order_ids(outcomes)[-1] == old.id
    assert [type(outcome) for outcome in outcomes] == [PlacedOrder] * 11
    assert harness.products.sizes in (
        [1],
        [1] * harness.deliveries(),
    )  # the second of two keyed calls asks nothing any more
    assert len(set(await harness.values("SELECT xmin::text FROM orders WHERE id <> $1", old.id))) == 1
