"""Payments and operations as the rules take them."""

from __future__ import annotations

import msgspec

from mercato.contracts.payments import OperationKind, OperationStatus, Status
from mercato.services.payments import rules

AMOUNT = 100


class Payment(msgspec.Struct, frozen=True):
    id: int = 1
    currency: str = "EUR"
    amount_minor: int = AMOUNT
    authorized_minor: int = 0
    captured_minor: int = 0
    refunded_minor: int = 0
    status: Status = "pending"
    code: str | None = None
    charge_id: int | None = None
    version: int = 1


class Operation(msgspec.Struct, frozen=True):
    kind: OperationKind
    reference: str
    amount_minor: int
    status: OperationStatus = "intent"
    code: str | None = None

    @property
    def key(self) -> str:
        return rules.key_of(1, 7, 1, self.kind, self.reference)
