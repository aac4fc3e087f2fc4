"""Keys: done once, answered as often as asked, and nothing left behind by who fails or dies."""

# What fails stands inside a transaction, which is a block.
# ruff: noqa: PT012

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

import asyncpg
import pytest
import pytest_asyncio

from mercato.chassis.contract import Actor, IdempotencyKeyReused
from mercato.chassis.idempotency import keys as idempotency
from mercato.chassis.idempotency.keys import Keyed, StoredRow, principal_of
from mercato.chassis.postgres.database import Database, LockTimeout
from mercato.testing.cluster import Cluster
from mercato.testing.databases import fresh_dsn, opened
from mercato.testing.waiting import until_blocked, without_waiting

MIGRATIONS = Path(__file__).with_name("migrations_with_keys")
OPERATION = "things.put"


@pytest_asyncio.fixture
async def database(cluster: Cluster) -> AsyncGenerator[Database]:
    async with fresh_dsn(cluster, "keys", MIGRATIONS) as dsn, opened(dsn, "keys", size=3) as made:
        yield made


def keyed(key: str, principal: str = "customer:1", fingerprint: bytes = b"one") -> Keyed:
    return Keyed(principal, key, fingerprint)


async def recall(database: Database, *wanted: Keyed, operation: str = OPERATION) -> list[object]:
    async with database.read() as tx:
        stored = await idempotency.recall(tx, operation, wanted)
    return [_answer(stored.get(each.identity), each) for each in wanted]


def _answer(stored: StoredRow | None, wanted: Keyed) -> object:
    if stored is None:
        return None
    try:
        wanted.check(stored.fingerprint)
    except IdempotencyKeyReused as refused:
        return type(refused)
    return stored.answer


async def do(database: Database, wanted: Sequence[Keyed], answer: bytes = b"answer") -> set[tuple[str, str]]:
    """What a service does: claim, change, remember, in one transaction."""
    async with database.transaction() as tx:
        ours = await idempotency.claim(tx, OPERATION, wanted)
        mine = [w for w in wanted if w.identity in ours]
        await idempotency.remember(tx, OPERATION, mine, [answer + w.key.encode() for w in mine])
    return ours


async def count(database: Database) -> int:
    async with database.read() as tx:
        return (await tx.fetch_values(int, "SELECT count(*) FROM idempotency"))[0]


async def test_a_key_is_new_then_claimed_then_answered(database: Database):
    wanted = [keyed("b"), keyed("a")]
    assert await recall(database, *wanted) == [None, None]
    assert await do(database, wanted) == {("customer:1", "a"), ("customer:1", "b")}
    assert await recall(database, *wanted, keyed("c")) == [b"answerb", b"answera", None]
    assert await do(database, wanted, b"other") == set()
    assert await recall(database, *wanted) == [b"answerb", b"answera"]


async def test_another_request_with_a_used_key_is_refused_at_its_position(database: Database):
    await do(database, [keyed("a"), keyed("b")])
    wanted = [keyed("a"), keyed("b", fingerprint=b"two"), keyed("a")]
    assert await recall(database, *wanted) == [b"answera", IdempotencyKeyReused, b"answera"]


async def test_a_key_is_scoped_to_its_principal_and_its_operation(database: Database):
    await do(database, [keyed("a")])
    assert await recall(database, keyed("a", principal="customer:2")) == [None]
    assert await recall(database, keyed("a"), operation="things.other") == [None]
    assert await do(database, [keyed("a", principal="customer:2")]) == {("customer:2", "a")}
    assert principal_of(Actor("customer", 1)) != principal_of(Actor("customer", 2))
    assert principal_of(Actor("customer", 1)) == principal_of(Actor("staff", 1)), "who is promoted keeps their keys"


async def test_a_concurrent_duplicate_waits_and_gets_the_answer_of_the_first(database: Database):
    async with database.transaction() as tx:
        await idempotency.claim(tx, OPERATION, [keyed("a")])
        duplicate = asyncio.create_task(do(database, [keyed("a"), keyed("b")]))
        await until_blocked(database._dsn, by=[duplicate])
        await idempotency.remember(tx, OPERATION, [keyed("a")], [b"first"])
    assert await duplicate == {("customer:1", "b")}
    assert await recall(database, keyed("a"), keyed("b")) == [b"first", b"answerb"]


async def test_when_the_first_request_rolls_back_its_duplicate_runs(database: Database):
    duplicate: asyncio.Task[set[tuple[str, str]]] | None = None
    with pytest.raises(KeyError):
        async with database.transaction() as tx:
            await idempotency.claim(tx, OPERATION, [keyed("a")])
            duplicate = asyncio.create_task(do(database, [keyed("a")]))
            await until_blocked(database._dsn, by=[duplicate])
            raise KeyError
    assert duplicate is not None
    assert await duplicate == {("customer:1", "a")}


async def test_a_released_key_is_claimed_by_the_duplicate_that_waits(database: Database):
    async with database.transaction() as tx:
        await idempotency.claim(tx, OPERATION, [keyed("a"), keyed("b")])
        duplicate = asyncio.create_task(do(database, [keyed("a", fingerprint=b"two"), keyed("b")]))
        await until_blocked(database._dsn, by=[duplicate])
        await idempotency.release(tx, OPERATION, [keyed("a")])
        await idempotency.remember(tx, OPERATION, [keyed("b")], [b"first"])
    assert await duplicate == {("customer:1", "a")}
    assert await recall(database, keyed("a", fingerprint=b"two"), keyed("b")) == [b"answera", b"first"]


async def test_a_duplicate_that_waits_too_long_fails_and_writes_nothing(database: Database):
    async with database.transaction() as tx:
        await idempotency.claim(tx, OPERATION, [keyed("a")])
        with pytest.raises(LockTimeout):
            await do(database, [keyed("a"), keyed("b")])
    assert await recall(database, keyed("b")) == [None]


async def test_batches_with_the_same_keys_in_other_orders_do_not_deadlock(database: Database):
    """Both stop at "m", which a third one holds. Taken as they come, each would then wait for what the other has."""
    duplicates: list[asyncio.Task[set[tuple[str, str]]]] = []
    with pytest.raises(KeyError):
        async with database.transaction() as tx:
            await idempotency.claim(tx, OPERATION, [keyed("m")])
            for order in ("amb", "bma"):
                duplicates.append(asyncio.create_task(do(database, [keyed(key) for key in order])))
                await until_blocked(database._dsn, len(duplicates), by=duplicates)
            raise KeyError
    assert [len(ours) for ours in await asyncio.gather(*duplicates)] == [3, 0]


async def test_a_crash_between_claim_and_commit_leaves_no_key(database: Database):
    with pytest.raises(KeyError):
        async with database.transaction() as tx:
            await idempotency.claim(tx, OPERATION, [keyed("a")])
            await idempotency.remember(tx, OPERATION, [keyed("a")], [b"never stored"])
            raise KeyError
    assert await count(database) == 0


@pytest.mark.parametrize("key", ["", "x" * 256, "with space", "tab\t", "ümlaut"])
async def test_a_key_that_is_not_printable_is_refused_by_the_table_too(database: Database, key: str):
    with pytest.raises(asyncpg.CheckViolationError):
        await do(database, [keyed(key)])


@pytest.mark.parametrize("key", ["!", "~", "x" * 255])
async def test_keys_at_the_bounds_of_what_is_valid(database: Database, key: str):
    assert len(await do(database, [keyed(key)])) == 1


async def test_answers_are_deleted_after_their_day_and_not_before(database: Database):
    await do(database, [keyed("old"), keyed("new")])
    async with database.transaction() as tx:
        await tx.execute("UPDATE idempotency SET expires_at = expires_at - interval '24 hours' WHERE key = 'old'")
    async with database.transaction() as tx:
        assert await idempotency.purge_expired(tx) == 1
    assert await recall(database, keyed("old"), keyed("new")) == [None, b"answernew"]


async def test_an_answer_past_its_day_counts_until_it_is_deleted(database: Database):
    """Or a duplicate between the end of the day and the clean-up would find neither an answer nor a free key."""
    await do(database, [keyed("old")])
    async with database.transaction() as tx:
        await tx.execute("UPDATE idempotency SET expires_at = now() - interval '1 hour'")
    assert await do(database, [keyed("old")]) == set()
    assert await recall(database, keyed("old")) == [b"answerold"]


async def test_deleting_takes_a_bounded_number_and_passes_over_what_others_hold(database: Database):
    many = idempotency.PURGED_AT_ONCE + 10
    async with database.transaction() as tx:
        await tx.execute(
            """
            INSERT INTO idempotency (principal, operation, key, fingerprint, expires_at)
            SELECT 'p', 'o', n::text, '', now() - interval '1 hour' FROM generate_series(1, $1) AS n
            """,
            many,
        )
    async with database.transaction() as first, database.transaction() as second:
        deleted = await idempotency.purge_expired(first)
        assert deleted == idempotency.PURGED_AT_ONCE
        assert await without_waiting(database._dsn, idempotency.purge_expired(second)) == many - deleted
    assert await count(database) == 0
