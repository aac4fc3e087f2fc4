"""What becomes of a payment. Pure: no I/O, no clock.

Three functions carry the service:

    next_step   what has to be asked of the provider next so that a goal is reached; or that it is, or cannot be
    settle      the payment after an outcome is known
    compare     what a line of the provider's statement says against what we have

The first two are called under the lock of the payment's row. They need not know whether an operation was asked for
before: the answer to a crash, a duplicate and a repeated request is the same next step, with the same key.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Final, Literal, Protocol, TypeVar, cast

import msgspec

from mercato.chassis.contract import Actor, ServiceError
from mercato.contracts.payments import (
    OperationKind,
    OperationStatus,
    PaymentStateConflict,
    RefundDeclined,
    RefundReferenceReused,
    RefundTooLarge,
    Status,
)
from mercato.contracts.roles import CUSTOMER

Account = Literal["provider", "sales", "refunds"]
Side = Literal["debit", "credit"]

MOVES: Final[Mapping[Status, frozenset[Status]]] = {
    "pending": frozenset({"authorized", "failed"}),
    "failed": frozenset(),
    "authorized": frozenset({"captured", "voided"}),
    "voided": frozenset(),
    "captured": frozenset({"partially_refunded", "refunded"}),
    "partially_refunded": frozenset({"partially_refunded", "refunded"}),
    "refunded": frozenset(),
}
"""The life of a payment. It begins `pending`, or `voided` where it is to be void before it was begun."""

OPEN: Final[Collection[OperationStatus]] = frozenset({"intent", "unknown"})
"""The provider may or may not have heard of it, or have done it."""

CAPTURED: Final[Collection[Status]] = frozenset({"captured", "partially_refunded", "refunded"})
CLOSED: Final[Collection[Status]] = frozenset({"failed", "voided"})
"""No money was taken, and none will be: an authorization that the provider still holds for it is to be given back."""

AUTHORIZATION_GONE: Final = frozenset({"authorization_expired", "charge_voided", "already_voided"})
"""An operation that is declined with one of these says that the provider holds nothing any more."""

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
    "capture": "captured",
    "void": "voided",
    "refund": "refunded",
}


class PaymentState(Protocol):
    """What a payment's life is decided by. Amounts in minor units."""

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


# --------------------------------------------------------------------------------------------------------- outcomes


class Succeeded(msgspec.Struct, frozen=True):
    provider_id: int
    """The provider's number of the operation."""
    charge_id: int | None
    """What it was done to; None where the provider does not say."""


class Declined(msgspec.Struct, frozen=True):
    """Not done, and it never will be, with this key."""

    code: str


class Unknown(msgspec.Struct, frozen=True):
    """No answer, or none that says what was done."""


Outcome = Succeeded | Declined | Unknown


# ------------------------------------------------------------------------------------------------------------ steps


class Goal(msgspec.Struct, frozen=True):
    """What somebody wants of a payment."""

    kind: OperationKind
    reference: str = ""
    amount_minor: int = 0
    """Of a refund."""


class Ask(msgspec.Struct, frozen=True):
    """The operation that the provider is to be asked for: the one that exists, or a new one."""

    kind: OperationKind
    reference: str
    amount_minor: int


def next_step(goal: Goal, payment: PaymentState, operations: Iterable[OperationState]) -> Ask | ServiceError | None:
    """What is to be asked next. None: nothing, the payment as it is is the answer. An error: it cannot be had.

    `operations` are all that this payment has. A capture and a void are never open at the same time: whoever comes
    second first finds out what became of the other.
    """
    known = {(o.kind, o.reference): o for o in operations}
    match goal.kind:
        case "authorize":
            return Ask("authorize", "", payment.amount_minor) if payment.status == "pending" else None
        case "capture":
            return _next_to_capture(payment, known)
        case "void":
            return _next_to_void(payment, known)
        case "refund":
            return _next_to_refund(goal, payment, known)


Known = Mapping[tuple[str, str], OperationState]
"""By kind and reference."""


def _next_to_capture(payment: PaymentState, known: Known) -> Ask | ServiceError | None:
    if payment.status in CAPTURED:
        return None
    if payment.status == "voided" and ("capture", "") in known:
        return None  # the provider has declined it: told again
    if payment.status != "authorized":
        return _conflict(payment, "capture")
    return Ask("void" if _is_open(known, "void") else "capture", "", payment.amount_minor)


def _next_to_void(payment: PaymentState, known: Known) -> Ask | ServiceError | None:
    if payment.status == "pending":
        # An authorize may be on its way to the provider at this moment, so that looking for it would prove nothing.
        # Sent again with its key, it is settled; then there is something to void, or there never will be.
        return Ask("authorize", "", payment.amount_minor)
    if payment.status != "authorized":
        return None
    if _is_open(known, "capture"):
        return Ask("capture", "", payment.amount_minor)
    void = known.get(("void", ""))
    if void is not None and void.status not in OPEN:
        return _conflict(payment, "void")  # declined, though nothing of ours has captured it
    return Ask("void", "", payment.amount_minor)


def _next_to_refund(goal: Goal, payment: PaymentState, known: Known) -> Ask | ServiceError | None:
    if payment.status not in CAPTURED:
        return _conflict(payment, "refund")
    same = known.get(("refund", goal.reference))
    if same is None:
        return _check_refund(goal, payment, known) or Ask("refund", goal.reference, goal.amount_minor)
    if same.amount_minor != goal.amount_minor:
        return RefundReferenceReused(
            reference=goal.reference,
            amount_minor=same.amount_minor,
            wanted_minor=goal.amount_minor,
            currency=payment.currency,
        )
    if same.status in OPEN:
        return Ask("refund", goal.reference, same.amount_minor)
    return RefundDeclined(payment_id=payment.id, reason=same.code or "") if same.status == "declined" else None


def _check_refund(goal: Goal, payment: PaymentState, known: Known) -> RefundTooLarge | None:
    """Refunds whose outcome is not known count as done: what is given back never exceeds what was taken."""
    promised = sum(o.amount_minor for o in known.values() if o.kind == "refund" and o.status != "declined")
    left_minor = payment.captured_minor - promised
    if goal.amount_minor <= left_minor:
        return None
    return RefundTooLarge(
        payment_id=payment.id, wanted_minor=goal.amount_minor, left_minor=left_minor, currency=payment.currency
    )


def _is_open(known: Known, kind: OperationKind) -> bool:
    operation = known.get((kind, ""))
    return operation is not None and operation.status in OPEN


def _conflict(payment: PaymentState, kind: OperationKind) -> PaymentStateConflict:
    return PaymentStateConflict(payment_id=payment.id, status=payment.status, wanted=PAST[kind])


# ---------------------------------------------------------------------------------------------------------- outcomes


def settle(payment: P, operation: OperationState, outcome: Outcome) -> P:
    """The payment after the outcome of one of its operations; the same object where that changes nothing.

    The version rises where the status or the money changes. Called once for each operation: with the outcome that
    closed it.
    """
    match operation.kind, outcome:
        case "authorize", Succeeded(charge_id=charge_id):
            return _authorized(payment, charge_id)
        case "authorize", Declined(code=code) if payment.status == "pending":
            return _moved(payment, "failed", code=code)
        case "capture", Succeeded() if payment.status == "authorized":
            return _moved(payment, "captured", captured_minor=operation.amount_minor)
        case "capture", Declined(code=code) if payment.status == "authorized":
            # Without it there is no money. An authorization that the provider still holds runs out by itself.
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
        # The payment is closed, and the provider has opened a charge: remembered, so that it can be voided.
        return _replaced(payment, charge_id=charge_id)
    return payment


def _moved(payment: P, status: Status, **changes: object) -> P:
    assert status in MOVES[payment.status], f"a payment does not go from {payment.status} to {status}"
    return _replaced(payment, status=status, version=payment.version + 1, **changes)


def _replaced(payment: P, **changes: object) -> P:
    return cast(P, msgspec.structs.replace(cast(msgspec.Struct, payment), **changes))


def entries(kind: OperationKind, amount_minor: int) -> tuple[tuple[Account, Side, int], ...]:
    """The ledger entries of an operation that succeeded: they add up to nothing, and there are none for nothing."""
    if amount_minor and kind == "capture":
        return ("provider", "debit", amount_minor), ("sales", "credit", amount_minor)
    if amount_minor and kind == "refund":
        return ("refunds", "debit", amount_minor), ("provider", "credit", amount_minor)
    return ()


def key_of(payment_id: int, kind: OperationKind, reference: str) -> str:
    """The provider's idempotency key. Derived from what is stored: whoever repeats an operation has the same."""
    return f"{payment_id}:{kind}:{reference}" if reference else f"{payment_id}:{kind}"


def may_see(actor: Actor, user_id: int) -> bool:
    """Customers see their own; staff, and services on behalf of the shop, see all."""
    return actor.role != CUSTOMER or actor.id == user_id


# ---------------------------------------------------------------------------------------------------- reconciliation


class Listed(msgspec.Struct, frozen=True):
    """An operation that is settled, as the provider has it."""

    provider_id: int
    key: str
    kind: OperationKind
    charge_id: int | None
    amount_minor: int
    currency: str
    code: str | None
    """Why it was declined; None: it succeeded."""

    @property
    def outcome(self) -> Succeeded | Declined:
        return Succeeded(self.provider_id, self.charge_id) if self.code is None else Declined(self.code)


class Ours(Protocol):
    """An operation as we have it, with what matters of its payment."""

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
"""Safe to do at once: what the provider says decides, or nobody will ever want the authorization."""

Mismatch = Literal["not_in_our_books", "not_at_the_provider", "other_amount", "other_outcome"]
"""For people to look at."""

REPAIRS: Final[tuple[Repair, ...]] = ("outcome_recorded", "authorization_voided")
MISMATCHES: Final[tuple[Mismatch, ...]] = ("not_in_our_books", "not_at_the_provider", "other_amount", "other_outcome")


def compare(theirs: Listed | None, ours: Ours | None) -> Repair | Mismatch | None:
    """What is wrong with one operation; None where both sides agree. Each side is None where it has no such key."""
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
