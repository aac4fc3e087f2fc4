"""Levels through the contract: set, adjusted once for a key, read and listed; and the stock of the demo shop."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import asyncpg
import pytest

from mercato.chassis.contract import (
    ANONYMOUS_ACTOR,
    Actor,
    Forbidden,
    IdempotencyKeyReused,
    Internal,
    InvalidRequest,
    RequestInProgress,
    ServiceError,
    StaleVersion,
    Unavailable,
)
from mercato.chassis.rpc.codec import encode_outcome
from mercato.contracts.inventory import (
    ON_HAND_LIMIT,
    AdjustedLevel,
    AdjustLevel,
    BelowReserved,
    GetLevel,
    Inventory,
    Level,
    ListLevels,
    SetLevel,
)
from mercato.contracts.products import ProductNotFound
from mercato.services.inventory import demo
from mercato.testing.actors import STAFF
from mercato.testing.builders import LAMP, MUG, product
from mercato.testing.cluster import Cluster
from mercato.testing.injection import Inject, fail
from services.inventory.harness import UNKNOWN, InventoryHarness


def adjusting(delta: int, key: str = "key", *, reason: str = "delivery", product_id: int = MUG) -> AdjustLevel:
    fingerprint = f"{product_id} {delta} {reason}".encode()
    return AdjustLevel(product_id=product_id, delta=delta, reason=reason, idempotency_key=key, fingerprint=fingerprint)


async def adjust(harness: InventoryHarness, request: AdjustLevel, actor: Actor = STAFF) -> AdjustedLevel:
    with harness.acting(actor):
        return await harness.inventory.adjust(request)


async def count(harness: InventoryHarness, on_hand: int, version: int | None = None) -> Level:
    with harness.acting(STAFF):
        return await harness.inventory.set(SetLevel(product_id=MUG, on_hand=on_hand, version=version))


async def adjust_many(harness: InventoryHarness, *requests: AdjustLevel) -> Sequence[AdjustedLevel | ServiceError]:
    """One batch."""
    with harness.acting(STAFF):
        return await harness.inventory.adjust.many(requests)


async def count_many(harness: InventoryHarness, *requests: SetLevel) -> Sequence[Level | ServiceError]:
    """One batch."""
    with harness.acting(STAFF):
        return await harness.inventory.set.many(requests)


def counting(on_hand: int, version: int | None = None, *, product_id: int = MUG) -> SetLevel:
    return SetLevel(product_id=product_id, on_hand=on_hand, version=version)


async def transactions(harness: InventoryHarness) -> int:
    """In how many transactions everything that has moved was written."""
    return (await harness.values("SELECT count(DISTINCT xmin::text) FROM movements"))[0]


# --------------------------------------------------------------------------------------------------------------- set


async def test_the_first_count_is_a_receipt_and_later_ones_are_differences(harness: InventoryHarness):
    first, second = await count(harness, 5), await count(harness, 3)

    assert (first.on_hand, first.available, first.version) == (5, 5, 1)
    assert (second.on_hand, second.available, second.version) == (3, 3, 2)
    assert second == await harness.level()
    assert await harness.movements() == [("receipt", 5), ("adjustment", -2)]
    assert await harness.emitted("product", MUG) == [
        ("stock.adjusted", 1),
        ("stock.available", 1),
        ("stock.adjusted", 2),
    ]


async def test_nothing_can_be_counted_and_is_not_available(harness: InventoryHarness):
    assert (await count(harness, 0)).version == 1
    assert await harness.movements() == [("receipt", 0)]
    assert await harness.emitted("product", MUG) == [("stock.adjusted", 1)]


async def test_the_same_count_again_changes_nothing(harness: InventoryHarness):
    first, again = await count(harness, 5), await count(harness, 5)

    assert first == again
    assert await harness.movements() == [("receipt", 5)]


async def test_a_count_of_what_has_changed_since_is_refused(harness: InventoryHarness):
    level = await count(harness, 5)
    await harness.reserve(7, mug=1)
    with pytest.raises(StaleVersion) as refused:
        await count(harness, 4, version=level.version)

    assert (refused.value.expected, refused.value.actual) == (1, 2)
    assert (await count(harness, 4, version=2)).on_hand == 4


async def test_a_version_of_a_product_without_a_count_is_refused_and_leaves_nothing(harness: InventoryHarness):
    with pytest.raises(StaleVersion):
        await count(harness, 4, version=1)
    assert await harness.values("SELECT 1 FROM levels") == []


async def test_reserved_pieces_cannot_be_counted_away(harness: InventoryHarness):
    await count(harness, 5)
    await harness.reserve(7, mug=3)
    with pytest.raises(BelowReserved) as refused:
        await count(harness, 2)

    assert (refused.value.wanted, refused.value.reserved) == (2, 3)
    assert (await count(harness, 3)).available == 0
    assert (await harness.emitted("product", MUG))[-2:] == [("stock.adjusted", 3), ("stock.exhausted", 3)]


async def test_two_concurrent_first_counts_are_two_versions(harness: InventoryHarness):
    other = await harness.another_host()
    clients = [harness.inventory, other.client(Inventory)]
    with harness.acting(STAFF):
        levels = await asyncio.gather(*(c.set(counting(n)) for c, n in zip(clients, (3, 4), strict=True)))

    assert sorted(level.version for level in levels) == [1, 2]
    assert sum(delta for _, delta in await harness.movements()) == (await harness.level()).on_hand


# ------------------------------------------------------------------------------------------------------------ adjust


async def test_adjusting_adds_and_takes_away(harness: InventoryHarness):
    more, fewer = await adjust(harness, adjusting(5, "a")), await adjust(harness, adjusting(-2, "b", reason="broken"))

    assert (more.level.on_hand, more.level.version, more.replayed) == (5, 1, False)
    assert (fewer.level.on_hand, fewer.level.version, fewer.replayed) == (3, 2, False)
    assert await harness.movements() == [("receipt", 5), ("adjustment", -2)]


async def test_a_repeated_key_gets_the_first_answer(harness: InventoryHarness):
    first = await adjust(harness, adjusting(5))
    await count(harness, 9)
    again = await adjust(harness, adjusting(5))

    assert (again.level, again.replayed) == (first.level, True)
    assert (await harness.level()).on_hand == 9


async def test_the_same_key_for_another_adjustment_is_refused(harness: InventoryHarness):
    await adjust(harness, adjusting(5))
    for other in (adjusting(6), adjusting(5, product_id=LAMP), adjusting(5, reason="gift")):
        with pytest.raises(IdempotencyKeyReused):
            await adjust(harness, other)
    assert await harness.movements() == [("receipt", 5)]


async def test_keys_are_scoped_to_their_principal(harness: InventoryHarness):
    await adjust(harness, adjusting(5), Actor("staff", 1))
    await adjust(harness, adjusting(5), Actor("staff", 2))

    assert (await harness.level()).on_hand == 10


async def test_a_key_is_used_once_for_ever_also_when_its_answer_is_gone(harness: InventoryHarness):
    await adjust(harness, adjusting(5))
    await harness.let_days_pass(30)
    await count(harness, 8)
    with pytest.raises(IdempotencyKeyReused):
        await adjust(harness, adjusting(6))
    again = await adjust(harness, adjusting(5))

    assert (again.level.on_hand, again.replayed) == (8, True)
    assert await adjust(harness, adjusting(5)) == again
    assert await harness.movements() == [("receipt", 5), ("adjustment", 3)]


async def test_many_with_one_key_at_once_adjust_once(harness: InventoryHarness):
    other = await harness.another_host()
    clients = [harness.inventory, other.client(type(harness.inventory))]
    with harness.acting(STAFF):
        outcomes = await asyncio.gather(
            *(clients[i % 2].adjust(adjusting(5)) for i in range(12)), return_exceptions=True
        )

    done = [h for h in outcomes if isinstance(h, AdjustedLevel)]
    assert all(isinstance(h, AdjustedLevel | RequestInProgress) for h in outcomes)
    assert sum(not h.replayed for h in done) == 1
    assert (await harness.level()).on_hand == 5


async def test_a_concurrent_duplicate_waits_and_gets_the_first_answer(harness: InventoryHarness):
    level = await count(harness, 5)
    request = adjusting(3)
    holder = await harness.connection()
    async with holder.transaction():
        await holder.execute(
            """
            INSERT INTO idempotency (principal, operation, key, fingerprint, answer, expires_at)
            VALUES ('user:9', 'inventory.adjust', 'key', $1, $2, now() + interval '1 hour')
            """,
            request.fingerprint,
            encode_outcome(AdjustedLevel(level=level)),
        )
        waiting = asyncio.create_task(adjust(harness, request))
        await harness.until_blocked(by=[waiting])
    outcome = await waiting

    assert (outcome.level, outcome.replayed) == (level, True)
    assert await harness.movements() == [("receipt", 5)]


async def test_a_key_that_is_being_used_for_too_long_is_in_progress(harness: InventoryHarness):
    holder = await harness.connection()
    async with holder.transaction():
        await holder.execute(
            """
            INSERT INTO idempotency (principal, operation, key, fingerprint, expires_at)
            VALUES ('user:9', 'inventory.adjust', 'key', '', now() + interval '1 hour')
            """
        )
        with pytest.raises(RequestInProgress):
            await adjust(harness, adjusting(5))
        await holder.execute("DELETE FROM idempotency")
    assert not (await adjust(harness, adjusting(5))).replayed


@pytest.mark.parametrize(
    ("delta", "error"), [(0, InvalidRequest), (-6, BelowReserved), (ON_HAND_LIMIT, InvalidRequest)]
)
async def test_an_impossible_adjustment_is_refused_and_its_key_stays_free(
    harness: InventoryHarness, delta: int, error: type[Exception]
):
    await count(harness, 5)
    with pytest.raises(error):
        await adjust(harness, adjusting(delta))

    assert await harness.movements() == [("receipt", 5)]
    assert (await adjust(harness, adjusting(-5))).level.on_hand == 0


async def test_nothing_can_be_taken_from_a_product_without_a_count(harness: InventoryHarness):
    with pytest.raises(BelowReserved):
        await adjust(harness, adjusting(-1))
    assert (await harness.level()).version == 0


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("operation", ["set", "adjust"])
async def test_a_crash_at_the_commit_and_a_retry_come_to_the_same(
    harness: InventoryHarness, inject: Inject, operation: str, when: str
):
    async def act() -> None:
        await (count(harness, 5) if operation == "set" else adjust(harness, adjusting(5)))

    lift = inject(f"inventory.{operation}.{when}_commit", fail)
    with pytest.raises(Internal):
        await act()
    lift()
    await act()

    assert await harness.movements() == [("receipt", 5)]


@pytest.mark.parametrize("statement", ["UPDATE movements SET delta = 9", "DELETE FROM movements"])
async def test_what_has_moved_stays_as_it_was_written(harness: InventoryHarness, statement: str):
    await count(harness, 5)
    with pytest.raises(asyncpg.RestrictViolationError, match="movements"):
        await (await harness.connection()).execute(statement)

    assert await harness.movements() == [("receipt", 5)]


# ----------------------------------------------------------------------------------------------------------- batches


async def test_thousands_are_counted_a_batch_at_a_time_and_not_one_by_one(harness: InventoryHarness):
    harness.products.answers |= {i: product(i) for i in range(1, 513)}
    outcomes = await count_many(harness, *(counting(i, product_id=i) for i in range(1, 513)))
    more = await adjust_many(harness, *(adjusting(1, f"k{i}", product_id=i) for i in range(1, 513)))

    assert [level.on_hand for level in outcomes if isinstance(level, Level)] == list(range(1, 513))
    assert [m.level.on_hand for m in more if isinstance(m, AdjustedLevel)] == list(range(2, 514))
    assert await transactions(harness) == 4


async def test_each_count_of_a_batch_has_its_own_answer_or_its_own_error(harness: InventoryHarness):
    await harness.stock(mug=5, p3=9)
    await harness.reserve(7, mug=3)
    outcomes = await count_many(
        harness,
        counting(2),
        counting(8, product_id=LAMP),
        counting(1, product_id=UNKNOWN),
        counting(4, version=2, product_id=4),
        counting(7, version=9, product_id=3),
        counting(6, version=1, product_id=3),
        counting(0, product_id=5),
    )

    assert [type(one) for one in outcomes] == [
        BelowReserved,
        Level,
        ProductNotFound,
        StaleVersion,
        StaleVersion,
        Level,
        Level,
    ]
    assert [(h.product_id, h.on_hand, h.version) for h in outcomes if isinstance(h, Level)] == [
        (LAMP, 8, 1), (3, 6, 2), (5, 0, 1)
    ]  # fmt: skip
    assert [(h.expected, h.actual) for h in outcomes if isinstance(h, StaleVersion)] == [(2, 0), (9, 1)]
    assert await transactions(harness) == 3, "two before, and one for the batch"
    assert await harness.values("SELECT product_id FROM levels ORDER BY 1") == [MUG, LAMP, 3, 5]
    assert await harness.pieces() == (5, 3)


async def test_each_adjustment_of_a_batch_has_its_own_answer_or_its_own_error(harness: InventoryHarness):
    await adjust(harness, adjusting(1, "used"))
    outcomes = await adjust_many(
        harness,
        adjusting(4, "a"),
        adjusting(-9, "b"),
        adjusting(1, "c", product_id=UNKNOWN),
        adjusting(0, "d"),
        adjusting(9, "used"),
        adjusting(1, "used"),
        adjusting(-1, "e", product_id=3),
        adjusting(ON_HAND_LIMIT, "f"),
        adjusting(2, "g", product_id=LAMP),
    )

    assert [type(one) for one in outcomes] == [
        AdjustedLevel, BelowReserved, ProductNotFound, InvalidRequest, IdempotencyKeyReused, AdjustedLevel,
        BelowReserved, InvalidRequest, AdjustedLevel,
    ]  # fmt: skip
    assert [(h.level.on_hand, h.replayed) for h in outcomes if isinstance(h, AdjustedLevel)] == [
        (5, False), (1, True), (2, False)
    ]  # fmt: skip
    assert await harness.movements() == [("receipt", 1), ("receipt", 4)]
    assert await transactions(harness) == 2, "one before, and one for the batch"
    assert await harness.values("SELECT product_id FROM levels ORDER BY 1") == [MUG, LAMP]
    assert await harness.values("SELECT key FROM idempotency ORDER BY 1") == ["a", "g", "used"]


async def test_a_key_that_was_refused_in_a_batch_is_free_again(harness: InventoryHarness):
    refused, _ = await adjust_many(harness, adjusting(-9, "key"), adjusting(5, "other"))
    assert isinstance(refused, BelowReserved)
    assert not (await adjust(harness, adjusting(-4, "key"))).replayed


async def test_each_request_of_a_batch_is_its_own_callers(harness: InventoryHarness):
    outcomes = await asyncio.gather(*(adjust(harness, adjusting(5), Actor("staff", i)) for i in (1, 2, 1)))

    assert [(h.level.on_hand, h.replayed) for h in outcomes] == [(5, False), (10, False), (5, True)]
    assert await harness.values("SELECT actor_id FROM movements ORDER BY id") == [1, 2]
    assert await transactions(harness) == 1


async def test_duplicates_in_one_batch_adjust_once(harness: InventoryHarness):
    first, duplicate, other, neighbour = await adjust_many(
        harness, adjusting(5), adjusting(5), adjusting(6), adjusting(2, "another")
    )

    assert isinstance(first, AdjustedLevel)
    assert isinstance(duplicate, AdjustedLevel)
    assert (duplicate.level, first.replayed, duplicate.replayed) == (first.level, False, True)
    assert isinstance(other, IdempotencyKeyReused)
    assert isinstance(neighbour, AdjustedLevel)
    assert (first.level.on_hand, neighbour.level.on_hand) == (5, 7)
    assert await harness.movements() == [("receipt", 5), ("receipt", 2)]
    assert await adjust(harness, adjusting(5)) == duplicate


async def test_duplicates_in_one_batch_are_refused_alike(harness: InventoryHarness):
    outcomes = await adjust_many(harness, adjusting(-1), adjusting(-1), adjusting(5))

    assert [type(one) for one in outcomes] == [BelowReserved, BelowReserved, IdempotencyKeyReused]
    assert outcomes[0] is not outcomes[1]
    assert await harness.movements() == []


async def test_two_counts_of_one_product_in_one_batch_are_two_versions(harness: InventoryHarness):
    """Or who was overtaken would have a version that promises what is not there any more."""
    first, second, same = await count_many(harness, counting(5), counting(3), counting(3))

    assert isinstance(first, Level)
    assert isinstance(second, Level)
    assert (first.on_hand, first.available, first.version) == (5, 5, 1)
    assert (second.on_hand, second.available, second.version) == (3, 3, 2)
    assert first.updated_at == second.updated_at
    assert same == second == await harness.level()
    assert await harness.movements() == [("receipt", 5), ("adjustment", -2)]
    assert await harness.emitted("product", MUG) == [
        ("stock.adjusted", 1),
        ("stock.adjusted", 2),
        ("stock.available", 2),
    ]


async def test_two_adjustments_of_one_product_in_one_batch_see_what_the_first_has_left(harness: InventoryHarness):
    await harness.stock(mug=2)
    await harness.reserve(7, mug=1)
    more, fewer, too_many = await adjust_many(harness, adjusting(3, "a"), adjusting(-2, "b"), adjusting(-3, "c"))

    assert isinstance(more, AdjustedLevel)
    assert isinstance(fewer, AdjustedLevel)
    assert (more.level.on_hand, more.level.available, more.level.version) == (5, 4, 3)
    assert (fewer.level.on_hand, fewer.level.available, fewer.level.version) == (3, 2, 4)
    assert fewer.level == await harness.level()
    assert isinstance(too_many, BelowReserved)
    assert (too_many.wanted, too_many.reserved) == (0, 1)


async def test_of_two_counts_of_one_version_in_one_batch_the_second_is_stale(harness: InventoryHarness):
    seen = await count(harness, 5)
    same, first, second = await count_many(
        harness, counting(5, version=1), counting(4, version=1), counting(6, version=1)
    )

    assert same == seen, "it has changed nothing, and what comes after it has not happened yet"
    assert isinstance(first, Level)
    assert isinstance(second, StaleVersion)
    assert (first.on_hand, first.version) == (4, 2)
    assert (second.expected, second.actual) == (1, 2)
    assert await harness.level() == first


@pytest.mark.parametrize("counted", [False, True])
async def test_batches_in_opposite_orders_do_not_wait_for_each_other_for_ever(harness: InventoryHarness, counted: bool):
    """Both come to the lamp, which a third one holds. Taken as they come, each would then wait for what the other has.

    PostgreSQL would end one of them, and its requests would run one by one, in transactions of their own.
    """
    if counted:
        await count_many(harness, *(counting(1, product_id=i) for i in (MUG, LAMP, 3)))
    before = await transactions(harness)
    holder = await harness.connection()
    held = holder.transaction()
    await held.start()
    await holder.execute(
        "SELECT 1 FROM levels WHERE product_id = 2 FOR UPDATE"
        if counted
        else "INSERT INTO levels (product_id) VALUES (2)"
    )
    sets = asyncio.create_task(count_many(harness, *(counting(7, product_id=i) for i in (MUG, LAMP, 3))))
    await harness.until_blocked(by=[sets])
    adjusts = asyncio.create_task(adjust_many(harness, *(adjusting(2, f"k{i}", product_id=i) for i in (3, LAMP, MUG))))
    await harness.until_blocked(2, by=[sets, adjusts])
    await held.rollback()
    outcomes = [*(await sets), *(await adjusts)]

    assert [h for h in outcomes if isinstance(h, ServiceError)] == []
    assert await transactions(harness) == before + 2


async def test_a_key_used_longer_than_a_day_ago_is_known_inside_a_batch(harness: InventoryHarness):
    await adjust(harness, adjusting(5, "old"))
    await harness.let_days_pass(30)
    new, reused, old, duplicate = await adjust_many(
        harness, adjusting(2, "new"), adjusting(6, "old"), adjusting(5, "old"), adjusting(5, "old")
    )

    assert isinstance(new, AdjustedLevel)
    assert isinstance(reused, IdempotencyKeyReused)
    assert old == duplicate == AdjustedLevel(level=new.level, replayed=True), "as it is by then"
    assert new.level.on_hand == 7
    assert await adjust(harness, adjusting(5, "old")) == old
    assert await harness.movements() == [("receipt", 5), ("receipt", 2)]


async def test_the_key_of_an_old_adjustment_starts_no_level_elsewhere(harness: InventoryHarness):
    await adjust(harness, adjusting(5, "old"))
    await harness.let_days_pass(30)
    elsewhere, _ = await adjust_many(harness, adjusting(5, "old", product_id=LAMP), adjusting(1, "new"))

    assert isinstance(elsewhere, IdempotencyKeyReused)
    assert await harness.values("SELECT product_id FROM levels") == [MUG]


async def test_a_key_in_use_for_too_long_delays_no_other_request_of_its_batch(cluster: Cluster):
    """Over `local` alone: each wait for the key takes seconds, and `loopback` would wait twice as often."""
    async with InventoryHarness(cluster, "local").running() as harness:
        holder = await harness.connection()
        async with holder.transaction():
            await holder.execute(
                """
                INSERT INTO idempotency (principal, operation, key, fingerprint, expires_at)
                VALUES ('user:9', 'inventory.adjust', 'key', '', now() + interval '1 hour')
                """
            )
            held, neighbour = await adjust_many(harness, adjusting(5), adjusting(2, "another"))
            await holder.execute("DELETE FROM idempotency WHERE key = 'key'")

        assert isinstance(held, RequestInProgress)
        assert isinstance(neighbour, AdjustedLevel)
        assert await harness.movements() == [("receipt", 2)]


# ----------------------------------------------------------------------------------------------------- levels, list


async def test_a_product_without_a_count_has_a_level_of_0_and_an_unknown_one_is_not_found(harness: InventoryHarness):
    await harness.stock(mug=5)
    with harness.acting(ANONYMOUS_ACTOR):
        mug, lamp, unknown, again = await harness.inventory.levels.many(
            [GetLevel(product_id=i) for i in (MUG, LAMP, UNKNOWN, MUG)]
        )

    assert isinstance(mug, Level)
    assert (mug.on_hand, mug.version) == (5, 1)
    assert lamp == Level(product_id=LAMP, on_hand=0, reserved=0, available=0, updated_at=None, version=0)
    assert isinstance(unknown, ProductNotFound)
    assert again == mug


async def test_levels_that_are_known_need_no_products(harness: InventoryHarness):
    await harness.stock(mug=5)
    harness.products.failure = Unavailable(service="products")
    with harness.acting(ANONYMOUS_ACTOR):
        mug, lamp = await harness.inventory.levels.many([GetLevel(product_id=i) for i in (MUG, LAMP)])

    assert isinstance(mug, Level)
    assert isinstance(lamp, Unavailable)


async def test_unknown_products_have_no_stock(harness: InventoryHarness):
    with harness.acting(STAFF):
        with pytest.raises(ProductNotFound):
            await harness.inventory.set(SetLevel(product_id=UNKNOWN, on_hand=1))
        with pytest.raises(ProductNotFound):
            await harness.inventory.adjust(adjusting(1, product_id=UNKNOWN))
    assert await harness.values("SELECT 1 FROM levels") == []


async def test_pieces_of_a_product_that_a_restore_has_lost_are_written_off(harness: InventoryHarness):
    await harness.stock(mug=5, lamp=2)
    del harness.products.answers[MUG]
    with harness.acting(STAFF):
        adjusted = await harness.inventory.adjust(adjusting(-5, product_id=MUG))
        counted, unknown = await harness.inventory.set.many(
            [SetLevel(product_id=MUG, on_hand=0), SetLevel(product_id=UNKNOWN, on_hand=0)]
        )

    assert adjusted.level.on_hand == 0
    assert isinstance(counted, Level)
    assert isinstance(unknown, ProductNotFound)


async def test_customers_read_stock_and_cannot_change_it(harness: InventoryHarness):
    with harness.acting(Actor("customer", 1)):
        assert (await harness.inventory.levels(GetLevel(product_id=MUG))).on_hand == 0
        with pytest.raises(Forbidden):
            await harness.inventory.set(SetLevel(product_id=MUG, on_hand=1))
        with pytest.raises(Forbidden):
            await harness.inventory.adjust(adjusting(1))
        with pytest.raises(Forbidden):
            await harness.inventory.list(ListLevels())


async def test_levels_are_listed_page_by_page(harness: InventoryHarness):
    await harness.stock(p1=1, p2=20, p3=3, p4=30, p5=5)
    await harness.reserve(7, p4=28)
    with harness.acting(STAFF):
        first = await harness.inventory.list(ListLevels(below=5, limit=2))
        second = await harness.inventory.list(ListLevels(below=5, limit=2, after=first.next_after))
        everything = await harness.inventory.list(ListLevels())

    assert [level.product_id for level in first.levels] == [1, 3]
    assert [(level.product_id, level.available) for level in second.levels] == [(4, 2)]
    assert (first.next_after, second.next_after) == (3, None)
    assert [level.product_id for level in everything.levels] == [1, 2, 3, 4, 5]


# -------------------------------------------------------------------------------------------------------------- demo


async def test_the_demo_shop_has_enough_of_everything_once(harness: InventoryHarness):
    seed = harness.host.services["inventory"].seed_demo
    assert seed
    assert [await seed(), await seed()] == [True, False]

    assert await harness.values("SELECT product_id FROM levels ORDER BY 1") == list(demo.PRODUCT_IDS)
    assert len(demo.PRODUCT_IDS) == 25
    assert await harness.movements(204) == [("receipt", 1_000_000)]
    assert await harness.emitted("product", 100) == [("stock.adjusted", 1), ("stock.available", 1)]
    assert await harness.values("SELECT DISTINCT reason FROM movements") == ["demo"]


async def test_a_shop_with_stock_gets_no_demo_stock(harness: InventoryHarness):
    await harness.stock(mug=1)
    seed = harness.host.services["inventory"].seed_demo
    assert seed
    assert await seed() is False
    assert await harness.values("SELECT product_id FROM levels") == [MUG]


async def test_of_two_processes_that_seed_the_stock_at_the_same_time_one_does(
    harness: InventoryHarness, inject: Inject
):
    seed = harness.host.services["inventory"].seed_demo
    assert seed
    second: list[asyncio.Future[bool]] = []

    async def seed_once_more(_point: str) -> None:
        if not second:
            second.append(asyncio.ensure_future(seed()))
            await harness.until_blocked(by=second)

    inject(demo.SEED_BEFORE_COMMIT, seed_once_more)

    assert await seed() is True
    assert await second[0] is False
    assert await harness.values("SELECT count(*) FROM movements") == [len(demo.PRODUCT_IDS)]


async def test_the_demo_stock_waits_for_a_count_that_is_not_committed_and_is_left_out(harness: InventoryHarness):
    seed = harness.host.services["inventory"].seed_demo
    assert seed
    counting = await harness.connection()
    async with counting.transaction():
        await counting.execute("INSERT INTO levels (product_id) VALUES ($1)", UNKNOWN)
        seeding = asyncio.ensure_future(seed())
        await harness.until_blocked(by=[seeding])

    assert await seeding is False
    assert await harness.values("SELECT product_id FROM levels") == [UNKNOWN]
