"""Levels through the contract: set, adjusted once for a key, read and listed; and the stock of the demo shop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import asyncpg
import pytest

from mercato.chassis import idempotency
from mercato.chassis.codec import encode_outcome
from mercato.chassis.contract import (
    ANONYMOUS,
    Actor,
    Forbidden,
    IdempotencyKeyReused,
    Internal,
    InvalidRequest,
    RequestInProgress,
    StaleVersion,
    Unavailable,
)
from mercato.chassis.faults import Fault
from mercato.contracts.inventory import (
    ON_HAND_LIMIT,
    AdjustedLevel,
    AdjustLevel,
    BelowReserved,
    GetLevel,
    Level,
    ListLevels,
    SetLevel,
)
from mercato.contracts.products import ProductNotFound
from mercato.services.inventory import demo
from services.inventory.world import LAMP, MUG, STAFF, UNKNOWN, World

Plant = Callable[[str, Fault], Callable[[], None]]


def adjusting(delta: int, key: str = "key", *, reason: str = "delivery", product_id: int = MUG) -> AdjustLevel:
    fingerprint = f"{product_id} {delta} {reason}".encode()
    return AdjustLevel(product_id=product_id, delta=delta, reason=reason, idempotency_key=key, fingerprint=fingerprint)


async def adjust(world: World, request: AdjustLevel, actor: Actor = STAFF) -> AdjustedLevel:
    with world.acting(actor):
        return await world.inventory.adjust(request)


async def count(world: World, on_hand: int, version: int | None = None) -> Level:
    with world.acting(STAFF):
        return await world.inventory.set(SetLevel(product_id=MUG, on_hand=on_hand, version=version))


# --------------------------------------------------------------------------------------------------------------- set


async def test_the_first_count_is_a_receipt_and_later_ones_are_differences(world: World):
    first, second = await count(world, 5), await count(world, 3)

    assert (first.on_hand, first.available, first.version) == (5, 5, 1)
    assert (second.on_hand, second.available, second.version) == (3, 3, 2)
    assert second == await world.level()
    assert await world.movements() == [("receipt", 5), ("adjustment", -2)]
    assert await world.told("product", MUG) == [("stock.adjusted", 1), ("stock.available", 1), ("stock.adjusted", 2)]


async def test_nothing_can_be_counted_and_is_not_available(world: World):
    assert (await count(world, 0)).version == 1
    assert await world.movements() == [("receipt", 0)]
    assert await world.told("product", MUG) == [("stock.adjusted", 1)]


async def test_the_same_count_again_changes_nothing(world: World):
    first, again = await count(world, 5), await count(world, 5)

    assert first == again
    assert await world.movements() == [("receipt", 5)]


async def test_a_count_of_what_has_changed_since_is_refused(world: World):
    level = await count(world, 5)
    await world.reserve(7, mug=1)
    with pytest.raises(StaleVersion) as refused:
        await count(world, 4, version=level.version)

    assert (refused.value.expected, refused.value.actual) == (1, 2)
    assert (await count(world, 4, version=2)).on_hand == 4


async def test_a_version_of_what_nobody_has_counted_is_refused_and_leaves_nothing(world: World):
    with pytest.raises(StaleVersion):
        await count(world, 4, version=1)
    assert await world.values("SELECT 1 FROM levels") == []


async def test_promised_pieces_are_not_counted_away(world: World):
    await count(world, 5)
    await world.reserve(7, mug=3)
    with pytest.raises(BelowReserved) as refused:
        await count(world, 2)

    assert (refused.value.wanted, refused.value.reserved) == (2, 3)
    assert (await count(world, 3)).available == 0
    assert (await world.told("product", MUG))[-2:] == [("stock.adjusted", 3), ("stock.exhausted", 3)]


async def test_of_two_first_counts_at_once_both_are_told_and_one_is_last(world: World):
    with world.acting(STAFF):
        counts = [SetLevel(product_id=MUG, on_hand=n) for n in (3, 4)]
        levels = await asyncio.gather(*(world.inventory.set(c) for c in counts))

    assert sorted(level.version for level in levels) == [1, 2]
    assert sum(delta for _, delta in await world.movements()) == (await world.level()).on_hand


# ------------------------------------------------------------------------------------------------------------ adjust


async def test_adjusting_adds_and_takes_away(world: World):
    more, fewer = await adjust(world, adjusting(5, "a")), await adjust(world, adjusting(-2, "b", reason="broken"))

    assert (more.level.on_hand, more.level.version, more.replayed) == (5, 1, False)
    assert (fewer.level.on_hand, fewer.level.version, fewer.replayed) == (3, 2, False)
    assert await world.movements() == [("receipt", 5), ("adjustment", -2)]


async def test_the_same_key_again_hears_the_first_answer(world: World):
    first = await adjust(world, adjusting(5))
    await count(world, 9)
    again = await adjust(world, adjusting(5))

    assert (again.level, again.replayed) == (first.level, True)
    assert (await world.level()).on_hand == 9


async def test_the_same_key_for_another_adjustment_is_refused(world: World):
    await adjust(world, adjusting(5))
    for other in (adjusting(6), adjusting(5, product_id=LAMP), adjusting(5, reason="gift")):
        with pytest.raises(IdempotencyKeyReused):
            await adjust(world, other)
    assert await world.movements() == [("receipt", 5)]


async def test_keys_belong_to_whoever_sent_them(world: World):
    await adjust(world, adjusting(5), Actor("staff", 1))
    await adjust(world, adjusting(5), Actor("staff", 2))

    assert (await world.level()).on_hand == 10


async def test_a_key_is_used_once_for_ever_also_when_its_answer_is_gone(world: World):
    await adjust(world, adjusting(5))
    await (await world.connection()).execute("UPDATE idempotency SET expires_at = now() - interval '1 hour'")
    async with world.database.transaction() as tx:
        assert await idempotency.reap(tx) == 1
    await count(world, 8)
    with pytest.raises(IdempotencyKeyReused):
        await adjust(world, adjusting(6))
    again = await adjust(world, adjusting(5))

    assert (again.level.on_hand, again.replayed) == (8, True)
    assert await adjust(world, adjusting(5)) == again
    assert await world.movements() == [("receipt", 5), ("adjustment", 3)]


async def test_many_with_one_key_at_once_adjust_once(world: World):
    other = await world.another_rig()
    clients = [world.inventory, other.client(type(world.inventory))]
    with world.acting(STAFF):
        heard = await asyncio.gather(*(clients[i % 2].adjust(adjusting(5)) for i in range(12)), return_exceptions=True)

    done = [h for h in heard if isinstance(h, AdjustedLevel)]
    assert all(isinstance(h, AdjustedLevel | RequestInProgress) for h in heard)
    assert sum(not h.replayed for h in done) == 1
    assert (await world.level()).on_hand == 5


async def test_who_waits_for_a_twin_hears_its_answer(world: World):
    level = await count(world, 5)
    request = adjusting(3)
    holder = await world.connection()
    async with holder.transaction():
        await holder.execute(
            """
            INSERT INTO idempotency (principal, operation, key, fingerprint, answer, expires_at)
            VALUES ('user:9', 'inventory.adjust', 'key', $1, $2, now() + interval '1 hour')
            """,
            request.fingerprint,
            encode_outcome(AdjustedLevel(level=level)),
        )
        waiting = asyncio.create_task(adjust(world, request))
        await world.until_waiting()
    heard = await waiting

    assert (heard.level, heard.replayed) == (level, True)
    assert await world.movements() == [("receipt", 5)]


async def test_a_key_that_is_being_used_for_too_long_is_in_progress(world: World):
    holder = await world.connection()
    async with holder.transaction():
        await holder.execute(
            """
            INSERT INTO idempotency (principal, operation, key, fingerprint, expires_at)
            VALUES ('user:9', 'inventory.adjust', 'key', '', now() + interval '1 hour')
            """
        )
        with pytest.raises(RequestInProgress):
            await adjust(world, adjusting(5))
        await holder.execute("DELETE FROM idempotency")
    assert not (await adjust(world, adjusting(5))).replayed


@pytest.mark.parametrize(
    ("delta", "error"), [(0, InvalidRequest), (-6, BelowReserved), (ON_HAND_LIMIT, InvalidRequest)]
)
async def test_an_impossible_adjustment_is_refused_and_its_key_stays_free(
    world: World, delta: int, error: type[Exception]
):
    await count(world, 5)
    with pytest.raises(error):
        await adjust(world, adjusting(delta))

    assert await world.movements() == [("receipt", 5)]
    assert (await adjust(world, adjusting(-5))).level.on_hand == 0


async def test_nothing_is_taken_away_where_nobody_has_counted(world: World):
    with pytest.raises(BelowReserved):
        await adjust(world, adjusting(-1))
    assert (await world.level()).version == 0


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("operation", ["set", "adjust"])
async def test_a_crash_at_the_commit_and_a_retry_come_to_the_same(
    world: World, plant: Plant, operation: str, when: str
):
    async def fail(_point: str) -> None:
        raise RuntimeError("the power fails here")

    async def act() -> None:
        await (count(world, 5) if operation == "set" else adjust(world, adjusting(5)))

    lift = plant(f"inventory.{operation}.{when}_commit", fail)
    with pytest.raises(Internal):
        await act()
    lift()
    await act()

    assert await world.movements() == [("receipt", 5)]


@pytest.mark.parametrize("statement", ["UPDATE movements SET delta = 9", "DELETE FROM movements"])
async def test_what_has_moved_stays_as_it_was_written(world: World, statement: str):
    await count(world, 5)
    with pytest.raises(asyncpg.RestrictViolationError, match="movements"):
        await (await world.connection()).execute(statement)

    assert await world.movements() == [("receipt", 5)]


# ----------------------------------------------------------------------------------------------------- levels, list


async def test_a_product_that_nobody_has_counted_has_nothing_and_an_unknown_one_is_unknown(world: World):
    await world.stock(mug=5)
    with world.acting(ANONYMOUS):
        mug, lamp, unknown, again = await world.inventory.levels.many(
            [GetLevel(product_id=i) for i in (MUG, LAMP, UNKNOWN, MUG)]
        )

    assert isinstance(mug, Level)
    assert (mug.on_hand, mug.version) == (5, 1)
    assert lamp == Level(product_id=LAMP, on_hand=0, reserved=0, available=0, updated_at=None, version=0)
    assert isinstance(unknown, ProductNotFound)
    assert again == mug


async def test_levels_that_are_known_need_no_products(world: World):
    await world.stock(mug=5)
    world.products.failure = Unavailable(service="products")
    with world.acting(ANONYMOUS):
        mug, lamp = await world.inventory.levels.many([GetLevel(product_id=i) for i in (MUG, LAMP)])

    assert isinstance(mug, Level)
    assert isinstance(lamp, Unavailable)


async def test_unknown_products_have_no_stock(world: World):
    with world.acting(STAFF):
        with pytest.raises(ProductNotFound):
            await world.inventory.set(SetLevel(product_id=UNKNOWN, on_hand=1))
        with pytest.raises(ProductNotFound):
            await world.inventory.adjust(adjusting(1, product_id=UNKNOWN))
    assert await world.values("SELECT 1 FROM levels") == []


async def test_customers_look_and_change_nothing(world: World):
    with world.acting(Actor("customer", 1)):
        assert (await world.inventory.levels(GetLevel(product_id=MUG))).on_hand == 0
        with pytest.raises(Forbidden):
            await world.inventory.set(SetLevel(product_id=MUG, on_hand=1))
        with pytest.raises(Forbidden):
            await world.inventory.adjust(adjusting(1))
        with pytest.raises(Forbidden):
            await world.inventory.list(ListLevels())


async def test_levels_are_listed_page_by_page(world: World):
    await world.stock(p1=1, p2=20, p3=3, p4=30, p5=5)
    await world.reserve(7, p4=28)
    with world.acting(STAFF):
        first = await world.inventory.list(ListLevels(below=5, limit=2))
        second = await world.inventory.list(ListLevels(below=5, limit=2, after=first.next_after))
        everything = await world.inventory.list(ListLevels())

    assert [level.product_id for level in first.levels] == [1, 3]
    assert [(level.product_id, level.available) for level in second.levels] == [(4, 2)]
    assert (first.next_after, second.next_after) == (3, None)
    assert [level.product_id for level in everything.levels] == [1, 2, 3, 4, 5]


# -------------------------------------------------------------------------------------------------------------- demo


async def test_the_demo_shop_has_enough_of_everything_once(world: World):
    seed = world.rig.host.services["inventory"].seed_demo
    assert seed
    assert [await seed(), await seed()] == [True, False]

    assert await world.values("SELECT product_id FROM levels ORDER BY 1") == list(demo.PRODUCT_IDS)
    assert len(demo.PRODUCT_IDS) == 25
    assert await world.movements(204) == [("receipt", 1_000_000)]
    assert await world.told("product", 100) == [("stock.adjusted", 1), ("stock.available", 1)]
    assert await world.values("SELECT DISTINCT reason FROM movements") == ["demo"]


async def test_a_shop_with_stock_gets_no_demo_stock(world: World):
    await world.stock(mug=1)
    seed = world.rig.host.services["inventory"].seed_demo
    assert seed
    assert await seed() is False
    assert await world.values("SELECT product_id FROM levels") == [MUG]
