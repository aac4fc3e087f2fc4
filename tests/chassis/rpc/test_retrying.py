"""Retries: only what may come again, within the time of its caller and the budget of its service."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from mercato.chassis.contract import (
    Actor,
    Context,
    Contract,
    Empty,
    Message,
    Operation,
    OutcomeUnknown,
    Retry,
    Unavailable,
    batched,
)
from mercato.chassis.observability.clock import SystemClock
from mercato.chassis.observability.telemetry import Telemetry
from mercato.chassis.rpc.batching import Outcome
from mercato.chassis.rpc.retrying import ATTEMPTS, BUDGET_ADVANCE, BUDGET_LARGEST, Budget, RetryingTransport


class Pick(Message):
    number: int
    idempotency_key: str | None = None


class Things(Contract, name="things"):
    read = batched(Pick, Empty, size=64, allow=frozenset(), retry=Retry.SAFE)
    write = batched(Pick, Empty, size=64, allow=frozenset(), retry=Retry.KEYED)
    once = batched(Pick, Empty, size=64, allow=frozenset())


class Flaky:
    """Answers each attempt from a list: what it raises, or the numbers that are unavailable; then everything."""

    def __init__(self, *attempts: Exception | set[int]) -> None:
        self.attempts = list(attempts)
        self.sent: list[list[int]] = []

    async def send(
        self, operation: Operation[Any, Any], requests: Sequence[Any], contexts: Sequence[Context]
    ) -> Sequence[Outcome]:
        self.sent.append([request.number for request in requests])
        failing = self.attempts.pop(0) if self.attempts else set[int]()
        if isinstance(failing, Exception):
            raise failing
        return [Unavailable(service="things") if r.number in failing else r.number for r in requests]


class Silent(Flaky):
    """Never answers the first attempt."""

    async def send(
        self, operation: Operation[Any, Any], requests: Sequence[Any], contexts: Sequence[Context]
    ) -> Sequence[Outcome]:
        outcomes = await super().send(operation, requests, contexts)
        if len(self.sent) == 1:
            await asyncio.Event().wait()
        return outcomes


def transport(flaky: Flaky, telemetry: Telemetry | None = None) -> RetryingTransport:
    return RetryingTransport(flaky, SystemClock(), telemetry or Telemetry(), lambda: 0.0)


def contexts(count: int, seconds: float = 10.0) -> list[Context]:
    return [Context(Actor("staff", 1), SystemClock().monotonic() + seconds, "0" * 32, "test")] * count


def picks(*numbers: int, key: str | None = None) -> list[Pick]:
    return [Pick(number=number, idempotency_key=key) for number in numbers]


async def test_only_what_failed_is_sent_again_and_outcomes_keep_their_places():
    flaky, telemetry = Flaky({2, 3}, {3}), Telemetry()

    outcomes = await transport(flaky, telemetry).send(Things.read, picks(1, 2, 3), contexts(3))

    assert (list(outcomes), flaky.sent) == ([1, 2, 3], [[1, 2, 3], [2, 3], [3]])
    assert telemetry.registry.get_sample_value("mercato_rpc_retried_total", {"service": "things"}) == 3


async def test_a_batch_that_reached_no_instance_is_sent_again():
    flaky = Flaky(Unavailable(service="things"))

    assert await transport(flaky).send(Things.read, picks(1, 2), contexts(2)) == [1, 2]
    assert flaky.sent == [[1, 2], [1, 2]]


async def test_after_the_last_attempt_the_failure_stands():
    flaky = Flaky(*[{1}] * ATTEMPTS)

    outcomes = await transport(flaky).send(Things.read, picks(1, 2), contexts(2))

    assert isinstance(outcomes[0], Unavailable)
    assert (outcomes[1], len(flaky.sent)) == (2, ATTEMPTS)


@pytest.mark.parametrize(
    ("operation", "key"), [(Things.once, None), (Things.once, "key"), (Things.write, None)], ids=["never", "k", "keyed"]
)
async def test_a_request_that_must_not_be_repeated_is_sent_once(operation: Operation[Any, Any], key: str | None):
    flaky = Flaky({1})

    outcomes = await transport(flaky).send(operation, picks(1, key=key), contexts(1))

    assert isinstance(outcomes[0], Unavailable)
    assert flaky.sent == [[1]]


async def test_a_request_with_a_key_is_sent_again():
    flaky = Flaky({1})

    assert await transport(flaky).send(Things.write, picks(1, key="key"), contexts(1)) == [1]


async def test_unavailability_of_another_service_is_not_retried_here():
    flaky = Flaky(Unavailable(service="others"))

    with pytest.raises(Unavailable):
        await transport(flaky).send(Things.read, picks(1), contexts(1))
    assert flaky.sent == [[1]]


async def test_other_failures_are_not_repeated():
    flaky = Flaky(OutcomeUnknown(operation="things.read"))

    with pytest.raises(OutcomeUnknown):
        await transport(flaky).send(Things.read, picks(1), contexts(1))
    assert flaky.sent == [[1]]


async def test_a_request_whose_deadline_is_within_the_pause_is_not_retried():
    flaky = Flaky({1, 2})

    outcomes = await transport(flaky).send(Things.read, picks(1, 2), [*contexts(1, 0.01), *contexts(1)])

    assert isinstance(outcomes[0], Unavailable)
    assert (outcomes[1], flaky.sent) == (2, [[1, 2], [2]])


async def test_an_instance_that_is_silent_costs_a_share_of_the_time():
    silent = Silent()

    outcomes = await transport(silent).send(Things.read, picks(1), contexts(1, 0.9))

    assert (list(outcomes), silent.sent) == ([1], [[1], [1]])


async def test_a_request_that_must_not_be_repeated_is_awaited_until_its_deadline():
    silent = Silent()

    waiting = asyncio.create_task(transport(silent).send(Things.once, picks(1), contexts(1, 0.3)))
    done, _ = await asyncio.wait({waiting}, timeout=0.6)
    waiting.cancel()

    assert (done, silent.sent) == (set(), [[1]])


async def test_a_service_that_is_down_gets_a_tenth_more_than_its_load():
    """In the long run: 3 attempts for all would be three times the load."""
    flaky = Flaky(*[set(range(64))] * 10_000)
    retrying = transport(flaky)
    for _ in range(100):
        await retrying.send(Things.read, picks(*range(64)), contexts(64))

    sent, first = sum(len(batch) for batch in flaky.sent), 100 * 64
    assert first < sent <= 1.1 * first


class PartlyDown(Flaky):
    """Of three attempts in ten it says that the service is unavailable; each request is a batch of its own."""

    async def send(
        self, operation: Operation[Any, Any], requests: Sequence[Any], contexts: Sequence[Context]
    ) -> Sequence[Outcome]:
        self.sent.append([request.number for request in requests])
        failing = len(self.sent) % 10 in (2, 5, 9)
        return [Unavailable(service="things") if failing else r.number for r in requests]


async def test_where_three_calls_in_ten_fail_there_is_a_tenth_more_attempts_than_requests(
    monkeypatch: pytest.MonkeyPatch,
):
    pauses: list[float] = []

    async def no_time(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", no_time)
    things, telemetry = PartlyDown(), Telemetry()
    retrying = transport(things, telemetry)
    for number in range(5_000):
        await retrying.send(Things.read, picks(number), contexts(1))
        if number >= 100:
            assert len(things.sent) <= 1.1 * (number + 1)

    attempts, requests = len(things.sent), 5_000
    sample = telemetry.registry.get_sample_value
    assert sample("mercato_rpc_retried_total", {"service": "things"}) == attempts - requests == len(pauses)
    refused = sample("mercato_rpc_retries_refused_total", {"service": "things"})
    assert attempts > 1.09 * requests
    assert refused is not None
    assert refused > 0.15 * requests, "most of what fails is not sent again"
    left = sample("mercato_rpc_retry_budget", {"service": "things"})
    assert left == pytest.approx(retrying.budgets["things"].left)
    assert left is not None
    assert 0 <= left < 1


def test_what_a_budget_advances_is_paid_back_before_it_grows():
    changes: list[float] = []
    budget = Budget(0.1, changes.append)

    assert budget.spend(int(BUDGET_ADVANCE))
    budget.earn(100)
    assert not budget.spend(1)
    budget.earn(10)
    assert budget.spend(1)
    budget.earn(1_000_000)

    assert budget.left == BUDGET_LARGEST
    assert sum(changes) == pytest.approx(BUDGET_LARGEST)


def test_a_share_of_zero_repeats_nothing():
    budget = Budget(0.0)
    budget.earn(1_000_000)

    assert not budget.spend(1)
