"""The keyed batch, on a service that counts: each request adds to a counter once for its key."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from mercato.chassis.contract import (
    Actor,
    Batch,
    Context,
    IdempotencyKeyReused,
    Kind,
    Message,
    RequestInProgress,
    ServiceError,
)
from mercato.chassis.idempotency import keys
from mercato.chassis.idempotency.batch import KeyedAttempt, KeyedBatch, StoredAnswer
from mercato.chassis.idempotency.keys import Identity
from mercato.chassis.observability.telemetry import Telemetry
from mercato.chassis.postgres.database import Database, LockTimeout, UniqueViolation
from mercato.testing.cluster import Cluster

MIGRATIONS = Path(__file__).with_name("migrations_with_keys")
OPERATION = "counter.add"
CONTEXT = Context(Actor("customer", 7), 1e9, "", "")


class Add(Message):
    idempotency_key: str | None
    amount: int
    fingerprint: bytes = b"one"


class Sum(Message):
    total: int
    replayed: bool = False


class NotPositive(ServiceError, code="test_keyed_batch.not_positive", kind=Kind.REFUSED):
    sentence = "It adds nothing."


class TooMuch(ServiceError, code="test_keyed_batch.too_much", kind=Kind.REFUSED):
    sentence = "It adds too much."


class Counter(KeyedBatch[Add, Sum, int]):
    """Refuses what is not positive when it prepares, and what is above 100 when it writes."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.total = 0
        self.writes: list[int] = []
        self.prepared: list[int] = []
        self.between = _nothing

    async def recall(self, attempts: Sequence[KeyedAttempt[Add, Sum, int]]) -> Mapping[Identity, StoredAnswer[Sum]]:
        async with self.database.read() as tx:
            rows = await keys.recall(tx, OPERATION, [a.keyed for a in attempts if a.keyed])
        return {i: StoredAnswer(row.fingerprint, msgspec.json.decode(row.answer, type=Sum)) for i, row in rows.items()}

    async def prepare(self, attempts: Sequence[KeyedAttempt[Add, Sum, int]]) -> None:
        for attempt in attempts:
            self.prepared.append(attempt.request.amount)
            attempt.prepared = attempt.request.amount
            if attempt.request.amount <= 0:
                attempt.answer = NotPositive()
        await self.between()

    async def write(self, attempts: Sequence[KeyedAttempt[Add, Sum, int]]) -> None:
        self.writes.append(len(attempts))
        async with self.database.transaction() as tx:
            ours = await keys.claim(tx, OPERATION, [a.keyed for a in attempts if a.keyed])
            claimed = [a for a in attempts if a.keyed is None or a.identity in ours]
            answers = [self._add(attempt.prepared or 0) for attempt in claimed]
            settled = [(a.keyed, answer) for a, answer in zip(claimed, answers, strict=True) if a.keyed]
            made = [(keyed, answer) for keyed, answer in settled if isinstance(answer, Sum)]
            await keys.remember(
                tx, OPERATION, [k for k, _ in made], [msgspec.json.encode(answer) for _, answer in made]
            )
            await keys.release(tx, OPERATION, [k for k, answer in settled if isinstance(answer, ServiceError)])
        for attempt, answer in zip(claimed, answers, strict=True):
            attempt.answer = answer

    def _add(self, amount: int) -> Sum | ServiceError:
        if amount > 100:
            return TooMuch()
        self.total += amount
        return Sum(total=self.total)


async def _nothing() -> None:
    pass


@pytest_asyncio.fixture
async def counter(cluster: Cluster) -> AsyncGenerator[Counter]:
    dsn = await cluster.fresh_database("keyed", MIGRATIONS)
    database = Database(dsn, "keyed", Telemetry())
    await database.open()
    yield Counter(database)
    await database.close()
    await cluster.release_database(dsn)


def add(amount: int, key: str | None = None, fingerprint: bytes = b"one") -> Add:
    return Add(idempotency_key=key, amount=amount, fingerprint=fingerprint)


async def run(counter: Counter, *requests: Add) -> list[Any]:
    """The answers; of a refusal its type."""
    answers = await counter.run(Batch[Add].of(requests, [CONTEXT] * len(requests)))
    return [type(answer) if isinstance(answer, ServiceError) else (answer.total, answer.replayed) for answer in answers]


async def test_requests_without_a_key_are_done_each_time(counter: Counter):
    assert await run(counter, add(1), add(1)) == [(1, False), (2, False)]
    assert await run(counter, add(1)) == [(3, False)]


async def test_a_key_that_comes_again_is_answered_and_not_done_again(counter: Counter):
    assert await run(counter, add(5, "a")) == [(5, False)]
    assert await run(counter, add(7, "b"), add(5, "a")) == [(12, False), (5, True)]
    assert counter.total == 12
    assert counter.prepared == [5, 7]


async def test_a_key_of_another_request_is_refused(counter: Counter):
    await run(counter, add(5, "a"))
    assert await run(counter, add(5, "a", b"two")) == [IdempotencyKeyReused]


async def test_duplicates_in_one_batch_get_the_answer_of_the_first(counter: Counter):
    assert await run(counter, add(5, "a"), add(5, "a"), add(6, "a", b"two")) == [
        (5, False),
        (5, True),
        IdempotencyKeyReused,
    ]
    assert counter.total == 5


async def test_duplicates_of_a_refused_request_are_refused_alike(counter: Counter):
    assert await run(counter, add(0, "a"), add(0, "a"), add(3, "a", b"two")) == [
        NotPositive,
        NotPositive,
        IdempotencyKeyReused,
    ]


async def test_the_request_that_has_the_key_is_recalled_behind_another_that_claims_it(counter: Counter):
    await run(counter, add(5, "a"))
    assert await run(counter, add(6, "a", b"two"), add(5, "a")) == [IdempotencyKeyReused, (5, True)]


@pytest.mark.parametrize(("amount", "refusal"), [(0, NotPositive), (101, TooMuch)])
async def test_the_key_of_a_refused_request_can_be_used_again(
    counter: Counter, amount: int, refusal: type[ServiceError]
):
    assert await run(counter, add(amount, "a"), add(1, "b")) == [refusal, (1, False)]
    assert await run(counter, add(2, "a", b"two")) == [(3, False)]


async def test_a_request_that_was_refused_is_recalled_where_its_duplicate_was_done_meanwhile(counter: Counter):
    other = Counter(counter.database)

    async def meanwhile() -> None:
        await run(other, add(4, "a"))

    counter.between = meanwhile
    assert await run(counter, add(0, "a")) == [(4, True)]


async def test_a_key_that_is_used_between_recall_and_write_is_recalled_and_the_rest_is_done(counter: Counter):
    other = Counter(counter.database)
    times = itertools.count()

    async def meanwhile() -> None:
        if next(times) == 0:
            await run(other, add(4, "a"))

    counter.between = meanwhile
    assert await run(counter, add(4, "a"), add(1, "b"), add(9, "a", b"two")) == [
        (4, True),
        (1, False),
        IdempotencyKeyReused,
    ]
    assert counter.total == 1


async def test_a_unique_violation_writes_those_again_whose_key_was_not_used(counter: Counter):
    class Unique(Counter):
        """Its keys are unique in its own table: the whole transaction fails."""

        async def write(self, attempts: Sequence[KeyedAttempt[Add, Sum, int]]) -> None:
            async with self.database.transaction() as tx:
                taken = await keys.recall(tx, OPERATION, [a.keyed for a in attempts if a.keyed])
            if taken:
                raise UniqueViolation("key")
            await super().write(attempts)

    unique, other = Unique(counter.database), Counter(counter.database)

    async def meanwhile() -> None:
        await run(other, add(4, "a"))

    unique.between = meanwhile
    assert await run(unique, add(4, "a"), add(1, "b")) == [(4, True), (1, False)]
    assert unique.writes == [1]


async def test_a_unique_violation_of_something_else_is_raised(counter: Counter):
    class Broken(Counter):
        async def write(self, attempts: Sequence[KeyedAttempt[Add, Sum, int]]) -> None:
            raise UniqueViolation("something else")

    with pytest.raises(UniqueViolation, match="something else"):
        await run(Broken(counter.database), add(4, "a"))


async def test_a_key_in_use_is_in_progress_alone_and_raised_for_a_batch(counter: Counter):
    async with counter.database.transaction() as tx:
        await keys.claim(tx, OPERATION, [_keyed("a")])
        alone, together = await asyncio.gather(
            run(counter, add(4, "a")), run(counter, add(4, "a"), add(1, "b")), return_exceptions=True
        )
        await keys.release(tx, OPERATION, [_keyed("a")])
    assert alone == [RequestInProgress]
    assert isinstance(together, LockTimeout)
    assert counter.total == 0
    assert await run(counter, add(4, "a")) == [(4, False)]


def _keyed(key: str) -> keys.Keyed:
    return keys.Keyed("user:7", key, b"one")
