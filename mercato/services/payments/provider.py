"""Payment providers: the port, and the adapter of the sandbox.

An adapter never raises for an answer of the provider, or for a missing one. It gives a result for each operation, and
`Unknown` whenever the effect is uncertain. The same key always means the same operation to a provider, so that
repeating one is safe.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final, Protocol, TypeVar

import msgspec
import structlog

from mercato.chassis.contract import (
    Call,
    InvalidRequest,
    Kind,
    Message,
    ServiceError,
    current_span,
    within,
)
from mercato.chassis.contract.context import CLIENT
from mercato.simulators.bank.contract import (
    METHOD_PATTERN,
    PAGE_LIMIT,
    AuthorizeCharge,
    CaptureCharge,
    ChargeCard,
    ListOperations,
    LookUpOperation,
    OperationUnknown,
    RefundCharge,
    Sandbox,
    SandboxOperation,
    VoidCharge,
)

from .rules import Declined, ProviderResult, StatementLine, Succeeded, Unknown

Q = TypeVar("Q", bound=Message)

log = structlog.stdlib.get_logger("mercato.payments")


class ProviderRequest(msgspec.Struct, frozen=True, gc=False):
    """An operation for a call of the provider. Amounts in minor units."""

    key: str
    order_id: int
    charge_id: int | None
    """None for authorize and charge."""
    amount_minor: int
    currency: str
    method: str


class Page(msgspec.Struct, frozen=True):
    """A part of a statement: operations that are settled, by ascending `provider_id`."""

    operations: tuple[StatementLine, ...]
    next_after: int
    is_last: bool
    """No operation followed when it was read."""


class Provider(Protocol):
    """Each method takes any number of operations and answers for each, in order. `check_method` calls nothing."""

    def check_method(self, method: str) -> str | None:
        """Why a method of this provider is not valid, as far as is known without calling it; None: it is."""
        ...

    async def authorize(self, requests: Sequence[ProviderRequest]) -> Sequence[ProviderResult]: ...
    async def charge(self, requests: Sequence[ProviderRequest]) -> Sequence[ProviderResult]:
        """Authorizes and captures in one operation."""
        ...

    async def capture(self, requests: Sequence[ProviderRequest]) -> Sequence[ProviderResult]:
        """Takes the amount, which is at most the authorized one, and releases the rest."""
        ...

    async def void(self, requests: Sequence[ProviderRequest]) -> Sequence[ProviderResult]: ...
    async def refund(self, requests: Sequence[ProviderRequest]) -> Sequence[ProviderResult]: ...

    async def look_up(self, keys: Sequence[str]) -> Sequence[StatementLine | Unknown | None]:
        """The operation of each key. None: the provider says that it does not know the key."""
        ...

    async def statement(self, after: int) -> Page:
        """The operations after a `provider_id`. Raises `ServiceError` where the provider does not answer."""
        ...


DONE_ALREADY: Final = frozenset({("capture", "already_captured"), ("void", "already_voided")})
"""Declines that say that the operation was done before. The provider answers so when it has forgotten a key after a
day: each operation has one key, so no other operation can have done it."""

METHOD: Final = re.compile(METHOD_PATTERN)
NO_ANSWER: Final = frozenset({Kind.UNAVAILABLE, Kind.DEADLINE, Kind.INTERNAL})


def provider_of(method: str) -> str:
    """The name of the provider of a method, `provider:token`."""
    return method.partition(":")[0]


class SandboxProvider:
    """The sandbox as a provider."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox

    def check_method(self, method: str) -> str | None:
        return None if METHOD.fullmatch(method) else "the sandbox has no such token"

    async def authorize(self, requests: Sequence[ProviderRequest]) -> Sequence[ProviderResult]:
        return await _call("authorize", self._sandbox.authorize, [_opening(AuthorizeCharge, r) for r in requests])

    async def charge(self, requests: Sequence[ProviderRequest]) -> Sequence[ProviderResult]:
        return await _call("charge", self._sandbox.charge, [_opening(ChargeCard, r) for r in requests])

    async def capture(self, requests: Sequence[ProviderRequest]) -> Sequence[ProviderResult]:
        captures = [
            CaptureCharge(idempotency_key=r.key, charge_id=_charge(r), amount_minor=r.amount_minor) for r in requests
        ]
        return await _call("capture", self._sandbox.capture, captures)

    async def void(self, requests: Sequence[ProviderRequest]) -> Sequence[ProviderResult]:
        voids = [VoidCharge(idempotency_key=r.key, charge_id=_charge(r)) for r in requests]
        return await _call("void", self._sandbox.void, voids)

    async def refund(self, requests: Sequence[ProviderRequest]) -> Sequence[ProviderResult]:
        refunds = [
            RefundCharge(idempotency_key=r.key, charge_id=_charge(r), amount_minor=r.amount_minor) for r in requests
        ]
        return await _call("refund", self._sandbox.refund, refunds)

    async def look_up(self, keys: Sequence[str]) -> Sequence[StatementLine | Unknown | None]:
        try:
            answers = await self._sandbox.look_up.many([LookUpOperation(key=key) for key in keys])
        except ServiceError:
            return [Unknown() for _ in keys]
        return [_found(answer) for answer in answers]

    async def statement(self, after: int) -> Page:
        page = await self._sandbox.statement(ListOperations(after=after))
        operations = tuple(_line(o) for o in page.operations if _is_settled(o))
        if len(operations) < len(page.operations):
            # The reconciliation looks up our operations of this page one by one; the others need a newer version.
            log.error("statement_with_unknown_status", after=after, skipped=len(page.operations) - len(operations))
        return Page(operations, page.next_after, is_last=len(page.operations) < PAGE_LIMIT)


Opening = TypeVar("Opening", AuthorizeCharge, ChargeCard)


def _opening(message: type[Opening], request: ProviderRequest) -> Opening:
    return message(
        idempotency_key=request.key,
        order_id=request.order_id,
        amount_minor=request.amount_minor,
        currency=request.currency,
        method=request.method,
    )


async def _call(what: str, call: Call[Q, SandboxOperation], requests: Sequence[Q]) -> Sequence[ProviderResult]:
    serving = current_span()
    span = None if serving is None else serving.child(f"provider {what}", CLIENT)
    try:
        with within(span):
            answers = await call.many(requests)
    except ServiceError:  # the batch was not sent
        return [Unknown() for _ in requests]
    return [_result(answer) for answer in answers]


def _result(answer: SandboxOperation | ServiceError) -> ProviderResult:
    if isinstance(answer, InvalidRequest):
        return Declined("invalid_request")  # refused before the bank processed it
    if isinstance(answer, ServiceError):
        if answer.kind not in NO_ANSWER:
            # Such as a key of another operation, or a missing charge: no retry helps, and nothing is settled.
            log.error("provider_refused", code=answer.code, reason=str(answer))
        return Unknown()
    if not _is_settled(answer):
        return Unknown(answer.settles_at)
    if answer.status == "declined" and (answer.kind, answer.code) not in DONE_ALREADY:
        return Declined(answer.code or "declined")
    return Succeeded(answer.id, answer.charge_id)


def _found(answer: SandboxOperation | ServiceError) -> StatementLine | Unknown | None:
    if isinstance(answer, OperationUnknown):
        return None
    if isinstance(answer, ServiceError) or not _is_settled(answer):
        return Unknown()
    return _line(answer)


def _is_settled(operation: SandboxOperation) -> bool:
    """False while the provider processes it, and for a status that this version does not know."""
    return operation.status in ("succeeded", "declined")


def _line(operation: SandboxOperation) -> StatementLine:
    return StatementLine(
        provider_id=operation.id,
        key=operation.key,
        kind=operation.kind,
        charge_id=operation.charge_id,
        amount_minor=operation.amount_minor,
        currency=operation.currency,
        code=operation.code,
    )


def _charge(request: ProviderRequest) -> int:
    assert request.charge_id is not None, f"{request.key}: there is no charge to change"
    return request.charge_id
