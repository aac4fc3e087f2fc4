"""The states of a payment. Pure: no I/O, no clock.

Three functions make the decisions of the service:

    next_operation  the next operation of the provider towards the target state of a payment; or none, or an error
    settle          the payment after the result of an operation is known
    compare         a line of the provider's statement with what we have recorded

The first two are called under the lock of the payment's row. After a crash, for a duplicate and for a repeated request
they give the same next operation, with the same key.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Final, Literal, Protocol, TypeVar, cast

import msgspec

from mercato.chassis.contract import RuleBroken, ServiceError
from mercato.contracts.payments import (
    CaptureAmountChanged,
    CaptureTooLarge,
    OperationKind,
    OperationStatus,
    PaymentStateConflict,
    RefundDeclined,
    RefundReferenceReused,
    RefundTooLarge,
    Status,
)

Account = Literal["provider", "sales", "refunds"]

MOVES: Final[Mapping[Status, frozenset[Status]]] = {
    "pending": frozenset({"authorized", "captured", "failed"}),
    "failed": frozenset(),
    "authorized": frozenset({"captured", "voided"}),
    "voided": frozenset(),
    "captured": frozenset({"partially_refunded", "refunded"}),
    "partially_refunded": frozenset({"partially_refunded", "refunded"}),
    "refunded": frozenset(),
}
"""The legal moves of a payment. It begins `pending`, or `voided` as the tombstone of an attempt that never began."""

OPEN: Final[Collection[OperationStatus]] = frozenset({"intent", "unknown"})
"""The provider may or may not have received the operation, and may or may not have done it."""

OPENING: Final[Collection[OperationKind]] = frozenset({"authorize", "charge"})
"""A payment begins with one of these two operations. It is open exactly while the payment is `pending`."""

CAPTURED: Final[Collection[Status]] = frozenset({"captured", "partially_refunded", "refunded"})
CLOSED: Final[Collection[Status]] = frozenset({"failed", "voided"})
"""No money was taken, and none will be: an authorization that the provider still holds for it is to be voided."""

AUTHORIZATION_GONE: Final = frozenset({"authorization_expired", "charge_voided", "already_voided"})
"""Codes of declined operations that say that the provider holds no authorization any more."""

EVENTS: Final[Mapping[Status, str]] = {
    "authorized": "payment.authorized",
    "failed": "payment.failed",
    "captured": "payment.captured",
    "voided": "payment.voided",
    "partially_refunded": "payment.refunded",
    "refunded": "payment.refunded",
}

PAST: Final[Mapping[OperationKind, str]] = {
    "authorize": "authorized",
    "charge": "captured",
    "capture": "captured",
    "void": "voided",
    "refund": "refunded",
}


class PaymentState(Protocol):
    """The fields of a payment on which decisions are based. Amounts in minor units."""

    @property
    def id(self) -> int: ...
    @property
    def currency(self) -> str: ...
    @property
    def amount_minor(self) -> int: ...
    @property
    def captured_minor(self) -> int: ...
    @property
    def refunded_minor(self) -> int: ...
    @property
    def status(self) -> Status: ...
    @property
    def charge_id(self) -> int | None: ...
    @property
    def version(self) -> int: ...


class OperationState(Protocol):
    @property
    def kind(self) -> OperationKind: ...
    @property
    def reference(self) -> str: ...
    @property
    def amount_minor(self) -> int: ...
    @property
    def status(self) -> OperationStatus: ...
    @property
    def code(self) -> str | None: ...


P = TypeVar("P", bound=PaymentState)


# ---------------------------------------------------------------------------------------------------------- results


class Succeeded(msgspec.Struct, frozen=True, gc=False):
    provider_id: int
    """The provider's number of the operation."""
    charge_id: int | None
    """The charge that it opened or changed; None: the provider does not say so."""


class Declined(msgspec.Struct, frozen=True, gc=False):
    """The operation was not done, and never will be with this key."""

    code: str


class Unknown(msgspec.Struct, frozen=True, gc=False):
    """No answer, or one without a result."""

    settles_at: datetime.datetime | None = None
    """When the result will be known, as the provider says; None: it does not say so."""


ProviderResult = Succeeded | Declined | Unknown


def status_of(result: ProviderResult) -> OperationStatus:
    """The status of an operation with this result."""
    match result:
        case Succeeded():
            return "succeeded"
        case Declined():
            return "declined"
        case Unknown():
            return "unknown"


NOT_ASKED: Final = Succeeded(provider_id=0, charge_id=None)
"""The result of an operation on an amount of 0: it succeeds without the provider, and is not recorded."""


# ------------------------------------------------------------------------------------------------------- operations


class Target(msgspec.Struct, frozen=True, gc=False):
    """The target state of a request, as the operation that leads to it."""

    kind: OperationKind
    reference: str = ""
    amount_minor: int = 0
    """Of a refund; of a capture, 0 is all that was authorized."""


class NextOperation(msgspec.Struct, frozen=True, gc=False):
    """The operation for the next call of the provider: one that was begun before, or a new one."""

    kind: OperationKind
    reference: str
    amount_minor: int


def next_operation(
    target: Target, payment: PaymentState, operations: Iterable[OperationState]
) -> NextOperation | ServiceError | None:
    """The operation for the next call of the provider. None: the payment is the answer. An error: it cannot be done.

    `operations` are all that this payment has. Of authorize, charge, capture and void at most one is open at any time:
    a request for another one first settles the open one.
    """
    known = {(o.kind, o.reference): o for o in operations}
    match target.kind:
        case "authorize":
            return _opening("authorize", payment, known) if payment.status == "pending" else None
        case "charge":
            return _next_to_charge(payment, known)
        case "capture":
            return _next_to_capture(target, payment, known)
        case "void":
            return _next_to_void(payment, known)
        case "refund":
            return _next_to_refund(target, payment, known)


Known = Mapping[tuple[str, str], OperationState]
"""By kind and reference."""


def _opening(new: OperationKind, payment: PaymentState, known: Known) -> NextOperation:
    """The operation with which the payment began, whatever the target; `new` for a payment that has none."""
    begun: list[OperationKind] = [kind for kind in OPENING if (kind, "") in known]
    return NextOperation(begun[0] if begun else new, "", payment.amount_minor)


def _next_to_charge(payment: PaymentState, known: Known) -> NextOperation | ServiceError | None:
    if payment.status == "pending":
        return _opening("charge", payment, known)
    return _next_to_capture(Target("capture"), payment, known) if payment.status == "authorized" else None


def _next_to_capture(target: Target, payment: PaymentState, known: Known) -> NextOperation | ServiceError | None:
    if payment.status in CAPTURED:
        return _check_captured(target, payment, payment.captured_minor)
    if payment.status == "voided" and ("capture", "") in known:
        return None  # the provider has declined the capture: the same answer again
    if payment.status != "authorized":
        return _conflict(payment, "capture")
    if _is_open(known, "void"):
        return NextOperation("void", "", payment.amount_minor)
    if (begun := known.get(("capture", ""))) is not None:
        changed = _check_captured(target, payment, begun.amount_minor)
        return changed or NextOperation("capture", "", begun.amount_minor)
    if target.amount_minor > payment.amount_minor:
        return CaptureTooLarge(
            payment_id=payment.id,
            wanted_minor=target.amount_minor,
            authorized_minor=payment.amount_minor,
            currency=payment.currency,
        )
    return NextOperation("capture", "", target.amount_minor or payment.amount_minor)


def _check_captured(target: Target, payment: PaymentState, captured_minor: int) -> CaptureAmountChanged | None:
    """A capture of all joins one that was begun; a capture of a part must have the same amount."""
    if target.amount_minor in (0, captured_minor):
        return None
    return CaptureAmountChanged(
        payment_id=payment.id,
        wanted_minor=target.amount_minor,
        captured_minor=captured_minor,
        currency=payment.currency,
    )


def _next_to_void(payment: PaymentState, known: Known) -> NextOperation | ServiceError | None:
    if payment.status == "pending":
        # Another process may be calling the provider now, so that a look-up would prove nothing. A repeated call with
        # its key settles the operation; then there is something to void or to refund, or there never will be.
        return _opening("authorize", payment, known)
    if payment.status != "authorized":
        return None
    if _is_open(known, "capture"):
        return NextOperation("capture", "", known["capture", ""].amount_minor)
    void = known.get(("void", ""))
    if void is not None and void.status not in OPEN:
        return _conflict(payment, "void")  # declined, though we have not captured it
    return NextOperation("void", "", payment.amount_minor)


def _next_to_refund(target: Target, payment: PaymentState, known: Known) -> NextOperation | ServiceError | None:
    if payment.status not in CAPTURED:
        return _conflict(payment, "refund")
    same = known.get(("refund", target.reference))
    if same is None:
        too_large = _check_refund(target, payment, known)
        return too_large or NextOperation("refund", target.reference, target.amount_minor)
    if same.amount_minor != target.amount_minor:
        return RefundReferenceReused(
            reference=target.reference,
            amount_minor=same.amount_minor,
            wanted_minor=target.amount_minor,
            currency=payment.currency,
        )
    if same.status in OPEN:
        return NextOperation("refund", target.reference, same.amount_minor)
    return RefundDeclined(payment_id=payment.id, reason=same.code or "") if same.status == "declined" else None


def _check_refund(target: Target, payment: PaymentState, known: Known) -> RefundTooLarge | None:
    """Refunds whose result is not known count as done: refunds never exceed what was captured."""
    refunded_minor = sum(o.amount_minor for o in known.values() if o.kind == "refund" and o.status != "declined")
    left_minor = payment.captured_minor - refunded_minor
    if target.amount_minor <= left_minor:
        return None
    return RefundTooLarge(
        payment_id=payment.id, wanted_minor=target.amount_minor, left_minor=left_minor, currency=payment.currency
    )


def _is_open(known: Known, kind: OperationKind) -> bool:
    operation = known.get((kind, ""))
    return operation is not None and operation.status in OPEN


def _conflict(payment: PaymentState, kind: OperationKind) -> PaymentStateConflict:
    return PaymentStateConflict(payment_id=payment.id, status=payment.status, wanted=PAST[kind])


# --------------------------------------------------------------------------------------------------- what follows


class SettledOperation(Protocol):
    @property
    def kind(self) -> OperationKind: ...
    @property
    def amount_minor(self) -> int: ...


def after_result(payment: P, operation: SettledOperation, result: ProviderResult) -> P:
    """The payment after the result of one of its operations; the same object where that changes nothing.

    The version rises where the status or the money changes. Called once for each operation: with the result that
    settled it.
    """
    match operation.kind, result:
        case "authorize", Succeeded(charge_id=charge_id):
            return _authorized(payment, charge_id)
        case "charge", Succeeded(charge_id=charge_id) if payment.status == "pending":
            taken_minor = operation.amount_minor
            return _moved(
                payment, "captured", charge_id=charge_id, authorized_minor=taken_minor, captured_minor=taken_minor
            )
        case "authorize" | "charge", Declined(code=code) if payment.status == "pending":
            return _moved(payment, "failed", code=code)
        case "capture", Succeeded() if payment.status == "authorized":
            return _moved(payment, "captured", captured_minor=operation.amount_minor)
        case "capture", Declined(code=code) if payment.status == "authorized":
            # No money can be taken any more. An authorization that the provider still holds expires.
            return _moved(payment, "voided", code=code)
        case "void", Succeeded() if payment.status == "authorized":
            return _moved(payment, "voided")
        case "void", Declined(code=code) if payment.status == "authorized" and code in AUTHORIZATION_GONE:
            return _moved(payment, "voided", code=code)
        case "refund", Succeeded() if payment.status in CAPTURED:
            refunded_minor = payment.refunded_minor + operation.amount_minor
            status = "refunded" if refunded_minor == payment.captured_minor else "partially_refunded"
            return _moved(payment, status, refunded_minor=refunded_minor)
        case _:
            return payment


def _authorized(payment: P, charge_id: int | None) -> P:
    if payment.status == "pending":
        return _moved(payment, "authorized", charge_id=charge_id, authorized_minor=payment.amount_minor)
    if payment.charge_id is None:
        # The payment is closed, and the provider has opened a charge: stored, so that it can be voided.
        return _replaced(payment, charge_id=charge_id)
    return payment


def _moved(payment: P, status: Status, **changes: object) -> P:
    if status not in MOVES[payment.status]:
        raise RuleBroken(f"a payment does not go from {payment.status} to {status}")
    return _replaced(payment, status=status, version=payment.version + 1, **changes)


def _replaced(payment: P, **changes: object) -> P:
    return cast(P, msgspec.structs.replace(cast(msgspec.Struct, payment), **changes))


TRANSFERS: Final[Mapping[OperationKind, tuple[Account, Account]]] = {
    "charge": ("provider", "sales"),
    "capture": ("provider", "sales"),
    "refund": ("refunds", "provider"),
}
"""The operations that move money: the account that is debited, and the one that is credited."""


# --------------------------------------------------------------------------------------------------------------- keys


class KeyParts(msgspec.Struct, frozen=True, gc=False):
    """The parts of a provider's key."""

    order_id: int
    nonce: int
    attempt: int
    kind: str
    reference: str


def key_of(order_id: int, nonce: int, attempt: int, kind: OperationKind, reference: str = "") -> str:
    """The provider's idempotency key: unique for each operation; with the nonce also where order ids are used again."""
    key = f"{order_id}-{nonce:016x}-{attempt}-{kind}"
    return f"{key}-{reference}" if reference else key


_KEY: Final = re.compile(r"([0-9]{1,16})-([0-9a-f]{16})-([0-9]{1,9})-([a-z]+)(?:-(.+))?", re.ASCII)


def parts_of(key: str) -> KeyParts | None:
    """None for a key that was not made by `key_of`."""
    found = _KEY.fullmatch(key)
    if found is None:
        return None
    order_id, nonce, attempt, kind, reference = found.groups()
    return KeyParts(int(order_id), int(nonce, 16), int(attempt), kind, reference or "")


# ---------------------------------------------------------------------------------------------------- reconciliation


class StatementLine(msgspec.Struct, frozen=True):
    """A settled operation, as the provider has recorded it."""

    provider_id: int
    key: str
    kind: OperationKind
    charge_id: int | None
    amount_minor: int
    currency: str
    code: str | None
    """Why it was declined; None: it succeeded."""

    @property
    def result(self) -> Succeeded | Declined:
        return Succeeded(self.provider_id, self.charge_id) if self.code is None else Declined(self.code)


class RecordedOperation(Protocol):
    """An operation or intent as we have recorded it, with the state of its payment."""

    @property
    def kind(self) -> OperationKind: ...
    @property
    def amount_minor(self) -> int: ...
    @property
    def currency(self) -> str: ...
    @property
    def status(self) -> OperationStatus: ...
    @property
    def payment_status(self) -> Status: ...
    @property
    def payment_code(self) -> str | None: ...
    @property
    def has_void(self) -> bool: ...


Repair = Literal["outcome_recorded", "authorization_voided"]
"""Safe to do at once: the provider's result decides, or the payment will never use its authorization."""

Mismatch = Literal["not_in_our_books", "not_at_the_provider", "other_amount", "other_outcome"]
"""For staff to examine."""

REPAIRS: Final[tuple[Repair, ...]] = ("outcome_recorded", "authorization_voided")
MISMATCHES: Final[tuple[Mismatch, ...]] = ("not_in_our_books", "not_at_the_provider", "other_amount", "other_outcome")


def compare(theirs: StatementLine | None, ours: RecordedOperation | None) -> Repair | Mismatch | None:
    """The difference in one operation; None where both sides agree. Each side is None where it has no such key."""
    if theirs is None:
        return "not_at_the_provider" if ours is not None and ours.status == "succeeded" else None
    done = theirs.code is None
    if ours is None:
        return "not_in_our_books" if done else None
    if done and (theirs.kind, theirs.amount_minor, theirs.currency) != (ours.kind, ours.amount_minor, ours.currency):
        return "other_amount"
    if ours.status in OPEN:
        return "outcome_recorded"
    if done and ours.kind == "authorize" and ours.payment_status in CLOSED:
        return None if ours.has_void or ours.payment_code in AUTHORIZATION_GONE else "authorization_voided"
    return None if done == (ours.status == "succeeded") else "other_outcome"
