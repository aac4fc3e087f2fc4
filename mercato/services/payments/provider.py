"""Payment providers: what this service needs of one, and the one that there is.

An adapter never raises for what a provider says or fails to say. It answers with an outcome for each operation, and
with `Unknown` whenever it is not certain what was done. The same key always means the same operation to a provider, so
that repeating one is safe.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol, TypeVar

import msgspec
import structlog

from mercato.chassis.contract import Call, InvalidRequest, Kind, Message, ServiceError
from mercato.contracts.sandbox import (
    PAGE_LIMIT,
    AuthorizeCharge,
    CaptureCharge,
    ListOperations,
    LookUpOperation,
    OperationUnknown,
    RefundCharge,
    Sandbox,
    SandboxOperation,
    VoidCharge,
)

from .rules import Declined, Listed, Outcome, Succeeded, Unknown

Q = TypeVar("Q", bound=Message)

log = structlog.stdlib.get_logger("mercato.payments")


class Asked(msgspec.Struct, frozen=True):
    """An operation as a provider is asked for it. Amounts in minor units."""

    key: str
    order_id: int
    charge_id: int | None
    """None for authorize."""
    amount_minor: int
    currency: str
    method: str


class Page(msgspec.Struct, frozen=True):
    """A part of a statement: operations that are settled, by ascending `provider_id`."""

    operations: tuple[Listed, ...]
    next_after: int
    is_last: bool
    """Nothing came after it when it was asked for."""


class Provider(Protocol):
    """Each method takes any number of operations and answers for each, in order."""

    async def authorize(self, asked: Sequence[Asked]) -> Sequence[Outcome]: ...
    async def capture(self, asked: Sequence[Asked]) -> Sequence[Outcome]: ...
    async def void(self, asked: Sequence[Asked]) -> Sequence[Outcome]: ...
    async def refund(self, asked: Sequence[Asked]) -> Sequence[Outcome]: ...

    async def look_up(self, keys: Sequence[str]) -> Sequence[Listed | Unknown | None]:
        """What was done with each key. None: the provider says that it has never heard of it."""
        ...

    async def statement(self, after: int) -> Page:
        """The operations after a `provider_id`. Raises `ServiceError` where the provider does not answer."""
        ...


DONE_ALREADY: Final = frozenset({("capture", "already_captured"), ("void", "already_voided")})
"""Declines that say that what was asked for is so. They come when the provider has forgotten a key after a day: we ask
with one key alone, so nobody else can have done it."""

NO_ANSWER: Final = frozenset({Kind.UNAVAILABLE, Kind.DEADLINE, Kind.INTERNAL})


class SandboxProvider:
    """The sandbox as a provider."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox

    async def authorize(self, asked: Sequence[Asked]) -> Sequence[Outcome]:
        requests = [
            AuthorizeCharge(
                idempotency_key=a.key,
                order_id=a.order_id,
                amount_minor=a.amount_minor,
                currency=a.currency,
                method=a.method,
            )
            for a in asked
        ]
        return await _ask(self._sandbox.authorize, requests)

    async def capture(self, asked: Sequence[Asked]) -> Sequence[Outcome]:
        requests = [CaptureCharge(idempotency_key=a.key, charge_id=_charge(a)) for a in asked]
        return await _ask(self._sandbox.capture, requests)

    async def void(self, asked: Sequence[Asked]) -> Sequence[Outcome]:
        requests = [VoidCharge(idempotency_key=a.key, charge_id=_charge(a)) for a in asked]
        return await _ask(self._sandbox.void, requests)

    async def refund(self, asked: Sequence[Asked]) -> Sequence[Outcome]:
        requests = [
            RefundCharge(idempotency_key=a.key, charge_id=_charge(a), amount_minor=a.amount_minor) for a in asked
        ]
        return await _ask(self._sandbox.refund, requests)

    async def look_up(self, keys: Sequence[str]) -> Sequence[Listed | Unknown | None]:
        try:
            answers = await self._sandbox.look_up.many([LookUpOperation(key=key) for key in keys])
        except ServiceError:
            return [Unknown() for _ in keys]
        return [_found(answer) for answer in answers]

    async def statement(self, after: int) -> Page:
        page = await self._sandbox.statement(ListOperations(after=after))
        operations = tuple(_listed(o) for o in page.operations)
        return Page(operations, page.next_after, is_last=len(operations) < PAGE_LIMIT)


async def _ask(call: Call[Q, SandboxOperation], requests: Sequence[Q]) -> Sequence[Outcome]:
    try:
        answers = await call.many(requests)
    except ServiceError:  # not even sent
        return [Unknown() for _ in requests]
    return [_outcome(answer) for answer in answers]


def _outcome(answer: SandboxOperation | ServiceError) -> Outcome:
    if isinstance(answer, InvalidRequest):
        return Declined("invalid_request")  # refused before the bank looked at it
    if isinstance(answer, ServiceError):
        if answer.kind not in NO_ANSWER:
            # A key that stands for something else, a charge that is not there: no retry helps, and nothing is settled.
            log.error("provider_refused", code=answer.code, reason=str(answer))
        return Unknown()
    if answer.status == "processing":
        return Unknown()
    if answer.status == "declined" and (answer.kind, answer.code) not in DONE_ALREADY:
        return Declined(answer.code or "declined")
    return Succeeded(answer.id, answer.charge_id)


def _found(answer: SandboxOperation | ServiceError) -> Listed | Unknown | None:
    if isinstance(answer, OperationUnknown):
        return None
    if isinstance(answer, ServiceError) or answer.status == "processing":
        return Unknown()
    return _listed(answer)


def _listed(operation: SandboxOperation) -> Listed:
    return Listed(
        provider_id=operation.id,
        key=operation.key,
        kind=operation.kind,
        charge_id=operation.charge_id,
        amount_minor=operation.amount_minor,
        currency=operation.currency,
        code=operation.code,
    )


def _charge(asked: Asked) -> int:
    assert asked.charge_id is not None, f"{asked.key}: only what was authorized is asked for"
    return asked.charge_id
