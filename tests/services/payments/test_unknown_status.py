"""A status that a newer provider has says nothing about money: the outcome is unknown, and is looked up again."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any, cast

import msgspec

from mercato.services.payments.provider import ProviderRequest, SandboxProvider
from mercato.services.payments.rules import Declined, StatementLine, Succeeded, Unknown
from mercato.simulators.bank.contract import Sandbox, SandboxOperation, Statement

NEWER = "newer_than_you"
STATUSES = ("succeeded", "declined", "processing", NEWER)


def operation(number: int, status: str) -> SandboxOperation:
    """As it was decoded: a reader takes any status."""
    ids = {"id": number, "charge_id": number, "order_id": 1, "amount_minor": 100}
    text = {"key": str(number), "kind": "charge", "currency": "USD", "status": status}
    code = "card_declined" if status == "declined" else None
    at = datetime.datetime(2026, 1, 15, 9, 30, tzinfo=datetime.UTC)
    return msgspec.convert({**ids, **text, "code": code, "created_at": at}, SandboxOperation)


ANSWERS = tuple(operation(number, status) for number, status in enumerate(STATUSES, 1))


class AnsweringCall:
    async def many(self, requests: Sequence[Any]) -> Sequence[SandboxOperation]:
        return ANSWERS


class NewerSandbox:
    charge = look_up = AnsweringCall()

    async def statement(self, request: Any) -> Statement:
        return Statement(operations=ANSWERS, next_after=4)


def provider() -> SandboxProvider:
    return SandboxProvider(cast(Sandbox, NewerSandbox()))


async def test_an_unknown_status_is_not_taken_for_success():
    requests = [ProviderRequest(answer.key, 1, None, 100, "USD", "sandbox:ok") for answer in ANSWERS]

    results = await provider().charge(requests)

    assert list(results) == [Succeeded(1, 1), Declined("card_declined"), Unknown(), Unknown()]


async def test_an_operation_of_an_unknown_status_is_not_known_when_looked_up():
    found = await provider().look_up([answer.key for answer in ANSWERS])

    assert [type(each) for each in found] == [StatementLine, StatementLine, Unknown, Unknown]


async def test_a_statement_leaves_out_what_has_an_unknown_status_and_goes_on():
    page = await provider().statement(0)

    assert [line.provider_id for line in page.operations] == [1, 2]
    assert page.next_after == 4
