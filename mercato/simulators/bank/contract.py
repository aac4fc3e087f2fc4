"""The sandbox: a payment provider that simulates a bank. Its ledger is independent of the payments service's.

Money moves only here. The name of a payment method says what it does:

    sandbox:ok                   everything succeeds
    sandbox:declined             authorize and charge are declined with `card_declined`
    sandbox:insufficient_funds   authorize and charge are declined with `insufficient_funds`
    sandbox:lost_answer          everything succeeds, but the first answer to each operation is lost
    sandbox:error_then_ok        the first call of each operation fails and does nothing; the next succeeds
    sandbox:slow:MS              each operation is `processing` for MS milliseconds, then succeeds (at most 60 000)
    sandbox:capture_expired      authorize succeeds, and capture is declined with `authorization_expired`; charge, which
                                 does both, is declined with it and leaves nothing authorized

An operation is done once for each `idempotency_key`. The same key with other parameters raises `SandboxKeyReused`. Keys
never expire here. Only the key counts: a second charge for one order, with another key, takes the money again.
"""

from __future__ import annotations

import datetime
from typing import Annotated, Final, Literal

from msgspec import Meta

from mercato.chassis.contract import MAX_ID, Contract, Kind, Message, Open, Retry, ServiceError, batched, single
from mercato.contracts.roles import SERVICES_ONLY

Key = Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[\x21-\x7e]+\Z")]
OrderReference = Annotated[int, Meta(ge=1, le=MAX_ID)]
AmountMinor = Annotated[int, Meta(ge=0, le=2**62)]
Currency = Annotated[str, Meta(pattern=r"^[A-Z]{3}\Z")]

OperationKind = Literal["authorize", "charge", "capture", "void", "refund"]
OperationStatus = Literal["processing", "succeeded", "declined"]

METHOD_PATTERN: Final = (
    r"^sandbox:(ok|declined|insufficient_funds|lost_answer|error_then_ok|capture_expired|slow:[0-9]{1,5})\Z"
)
PAGE_LIMIT: Final = 500
DEADLINE_MS: Final = 2_500
"""Shorter than the deadlines of callers: when the bank hangs, they have time left to record that."""


class AuthorizeCharge(Message):
    """Authorizes an amount on a card: opens a charge."""

    idempotency_key: Key
    order_id: OrderReference
    amount_minor: AmountMinor
    currency: Currency
    method: Annotated[str, Meta(pattern=METHOD_PATTERN)]


class ChargeCard(Message):
    """Takes an amount from a card in one operation: opens a charge that is captured at once."""

    idempotency_key: Key
    order_id: OrderReference
    amount_minor: AmountMinor
    currency: Currency
    method: Annotated[str, Meta(pattern=METHOD_PATTERN)]


class CaptureCharge(Message):
    """Captures an authorized charge: its whole amount, or a part, and releases the rest of the authorization.

    A charge is captured once, whatever the key. More than was authorized is declined with `amount_too_large`.
    """

    idempotency_key: Key
    charge_id: int
    amount_minor: AmountMinor | None = None
    """None: all that was authorized."""


class VoidCharge(Message):
    """Releases an authorization. A captured charge is refunded instead."""

    idempotency_key: Key
    charge_id: int


class RefundCharge(Message):
    """Refunds captured money: in any number of parts, never more than was captured."""

    idempotency_key: Key
    charge_id: int
    amount_minor: AmountMinor


class LookUpOperation(Message):
    key: Key


class SandboxOperation(Message):
    """An operation in the bank's ledger."""

    id: int
    key: str
    kind: Open[OperationKind]
    charge_id: int | None
    """None where an authorize or a charge was declined, or is not settled yet."""
    order_id: int
    amount_minor: int
    currency: str
    status: Open[OperationStatus]
    code: str | None
    """Why it was declined."""
    created_at: datetime.datetime
    settles_at: datetime.datetime | None = None
    """While it is `processing`: when its result is known. Only in the answer to the operation itself."""


class ListOperations(Message):
    """The bank statement: operations by ascending id, those after `after`.

    It lists an operation some time after its request (a minute by default), when it and every earlier one are settled:
    a reader that continues from the last id misses none.
    """

    after: int = 0
    limit: Annotated[int, Meta(ge=1, le=PAGE_LIMIT)] = PAGE_LIMIT


class Statement(Message):
    operations: tuple[SandboxOperation, ...]
    next_after: int
    """The `after` of the next page; that of the request where there is nothing new."""


class SandboxKeyReused(ServiceError, code="sandbox.key_reused", kind=Kind.INVALID):
    key_field = "parameters"
    sentence = "The key {key} was used for another operation."
    key: str


class OperationUnknown(ServiceError, code="sandbox.operation_unknown", kind=Kind.NOT_FOUND):
    sentence = "The bank knows no operation {key}."
    key: str


class ChargeUnknown(ServiceError, code="sandbox.charge_unknown", kind=Kind.NOT_FOUND):
    sentence = "The bank knows no charge {charge_id}."
    charge_id: int


class AnswerLost(ServiceError, code="sandbox.answer_lost", kind=Kind.DEADLINE):
    """Simulates a broken connection. The operation may or may not have been done."""

    sentence = "The bank did not answer."


class BankFailed(ServiceError, code="sandbox.failed", kind=Kind.UNAVAILABLE):
    """Simulates a 500 of the bank. The operation may or may not have been done."""

    sentence = "The bank has failed."


class Sandbox(Contract, name="sandbox"):
    """The bank. Only services may call it."""

    authorize = batched(
        AuthorizeCharge, SandboxOperation, allow=SERVICES_ONLY, size=256, deadline_ms=DEADLINE_MS, retry=Retry.KEYED
    )
    charge = batched(
        ChargeCard, SandboxOperation, allow=SERVICES_ONLY, size=256, deadline_ms=DEADLINE_MS, retry=Retry.KEYED
    )
    capture = batched(
        CaptureCharge, SandboxOperation, allow=SERVICES_ONLY, size=256, deadline_ms=DEADLINE_MS, retry=Retry.KEYED
    )
    void = batched(
        VoidCharge, SandboxOperation, allow=SERVICES_ONLY, size=256, deadline_ms=DEADLINE_MS, retry=Retry.KEYED
    )
    refund = batched(
        RefundCharge, SandboxOperation, allow=SERVICES_ONLY, size=256, deadline_ms=DEADLINE_MS, retry=Retry.KEYED
    )
    look_up = batched(
        LookUpOperation, SandboxOperation, allow=SERVICES_ONLY, size=256, deadline_ms=DEADLINE_MS, retry=Retry.SAFE
    )
    statement = single(ListOperations, Statement, allow=SERVICES_ONLY, deadline_ms=DEADLINE_MS, retry=Retry.SAFE)
