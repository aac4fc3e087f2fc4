"""The decisions of the bank. Pure: no I/O, no clock, no randomness.

`REFUSALS` is the state machine of a charge: a state allows what it does not refuse.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, Protocol, TypeVar, cast

import msgspec

from mercato.simulators.bank.contract import (
    AuthorizeCharge,
    CaptureCharge,
    ChargeCard,
    OperationKind,
    RefundCharge,
    VoidCharge,
)

State = Literal["open", "captured", "voided", "expired"]
OpeningRequest = AuthorizeCharge | ChargeCard
"""A request that opens a charge."""
ChargeRequest = CaptureCharge | VoidCharge | RefundCharge
"""A request that changes a charge."""

LONGEST_SLOW_MS: Final = 60_000
LOST_ANSWER: Final = "sandbox:lost_answer"
ERROR_THEN_OK: Final = "sandbox:error_then_ok"
CAPTURE_EXPIRED: Final = "sandbox:capture_expired"
SLOW: Final = "sandbox:slow:"

OPENING: Final[frozenset[OperationKind]] = frozenset({"authorize", "charge"})
"""The operations that open a charge."""

DECLINED: Final[Mapping[OperationKind, Mapping[str, str]]] = {
    "authorize": {"sandbox:declined": "card_declined", "sandbox:insufficient_funds": "insufficient_funds"},
    "charge": {
        "sandbox:declined": "card_declined",
        "sandbox:insufficient_funds": "insufficient_funds",
        # The amount could be authorized but not captured: as one operation it is declined, and nothing is authorized.
        CAPTURE_EXPIRED: "authorization_expired",
    },
}
"""The methods for which no charge is opened: the code by kind and method."""

REFUSALS: Final[Mapping[OperationKind, Mapping[State, str]]] = {
    "capture": {
        "captured": "already_captured",
        "voided": "charge_voided",
        "expired": "authorization_expired",
    },
    "void": {
        "captured": "already_captured",
        "voided": "already_voided",
        "expired": "authorization_expired",
    },
    "refund": {
        "open": "not_captured",
        "voided": "not_captured",
        "expired": "not_captured",
    },
}


class Charge(Protocol):
    """The fields of a charge that decisions need. Amounts in minor units."""

    @property
    def id(self) -> int: ...
    @property
    def order_id(self) -> int: ...
    @property
    def method(self) -> str: ...
    @property
    def currency(self) -> str: ...
    @property
    def authorized_minor(self) -> int: ...
    @property
    def captured_minor(self) -> int: ...
    @property
    def refunded_minor(self) -> int: ...
    @property
    def state(self) -> State: ...


C = TypeVar("C", bound=Charge)


class RequestedOperation(msgspec.Struct, frozen=True):
    """An operation that a client requests. Two with the same key are the same operation, or one is refused."""

    key: str
    kind: OperationKind
    charge_id: int | None
    """None for authorize and charge: they open one."""
    order_id: int
    amount_minor: int
    currency: str
    method: str


def opening(kind: OperationKind, request: OpeningRequest) -> RequestedOperation:
    return RequestedOperation(
        key=request.idempotency_key,
        kind=kind,
        charge_id=None,
        order_id=request.order_id,
        amount_minor=request.amount_minor,
        currency=request.currency,
        method=request.method,
    )


def on_charge(kind: OperationKind, request: ChargeRequest, charge: Charge) -> RequestedOperation:
    """A void, and a capture without an amount, are for the whole authorization."""
    asked_minor = None if isinstance(request, VoidCharge) else request.amount_minor
    return RequestedOperation(
        key=request.idempotency_key,
        kind=kind,
        charge_id=charge.id,
        order_id=charge.order_id,
        amount_minor=charge.authorized_minor if asked_minor is None else asked_minor,
        currency=charge.currency,
        method=charge.method,
    )


def carry_out(charge: C, kind: OperationKind, amount_minor: int) -> tuple[C, str | None]:
    """The charge after an operation, and the code of its decline, if any."""
    if code := REFUSALS[kind].get(charge.state):
        return charge, code
    match kind:
        case "capture" if charge.method == CAPTURE_EXPIRED:
            return _replaced(charge, state="expired"), "authorization_expired"
        case "capture" if amount_minor > charge.authorized_minor:
            return charge, "amount_too_large"
        case "capture":
            return _replaced(charge, state="captured", captured_minor=amount_minor), None
        case "void":
            return _replaced(charge, state="voided"), None
        case _:
            if amount_minor > charge.captured_minor - charge.refunded_minor:
                return charge, "amount_too_large"
            return _replaced(charge, refunded_minor=charge.refunded_minor + amount_minor), None


def _replaced(charge: C, **changes: object) -> C:
    return cast(C, msgspec.structs.replace(cast(msgspec.Struct, charge), **changes))


def delay_ms(method: str) -> int | None:
    """How long an operation of this method is `processing`; None where it is settled at once."""
    if not method.startswith(SLOW):
        return None
    return min(int(method.removeprefix(SLOW)), LONGEST_SLOW_MS)
