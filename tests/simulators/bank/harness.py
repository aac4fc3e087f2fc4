"""The bank, the requests of its clients, and its ledger."""

from __future__ import annotations

import itertools

from mercato.simulators.bank.app import build
from mercato.simulators.bank.contract import (
    AuthorizeCharge,
    CaptureCharge,
    ChargeCard,
    RefundCharge,
    Sandbox,
    SandboxOperation,
    VoidCharge,
)
from mercato.testing.actors import SERVICE
from mercato.testing.harness import ServiceHarness


class BankHarness(ServiceHarness):
    """`sandbox` is the client. `key()` gives a new key; the verbs make requests out of what a test names."""

    service = "sandbox"
    actor = SERVICE
    defaults = {"sandbox_statement_delay_seconds": 0}  # noqa: RUF012  # not changed

    async def start(self) -> None:
        self._numbers = itertools.count(1)
        await self.open({"sandbox": build})
        self.sandbox = self.client(Sandbox)

    async def another_process(self) -> Sandbox:
        """The client of a second host on the same database."""
        return (await self.another_host()).client(Sandbox)

    def key(self) -> str:
        return f"key-{next(self._numbers)}"

    def authorization(self, method: str = "sandbox:ok", amount: int = 1_000, key: str | None = None) -> AuthorizeCharge:
        return AuthorizeCharge(
            idempotency_key=key or self.key(), order_id=7, amount_minor=amount, currency="EUR", method=method
        )

    def card_charge(self, method: str = "sandbox:ok", amount: int = 1_000, key: str | None = None) -> ChargeCard:
        return ChargeCard(
            idempotency_key=key or self.key(), order_id=7, amount_minor=amount, currency="EUR", method=method
        )

    def capture(self, charge_id: int, key: str | None = None, amount: int | None = None) -> CaptureCharge:
        return CaptureCharge(idempotency_key=key or self.key(), charge_id=charge_id, amount_minor=amount)

    def void(self, charge_id: int, key: str | None = None) -> VoidCharge:
        return VoidCharge(idempotency_key=key or self.key(), charge_id=charge_id)

    def refund(self, charge_id: int, amount: int, key: str | None = None) -> RefundCharge:
        return RefundCharge(idempotency_key=key or self.key(), charge_id=charge_id, amount_minor=amount)

    async def charge(self, method: str = "sandbox:ok", amount: int = 1_000) -> int:
        """A new open charge."""
        opened = await self.sandbox.authorize(self.authorization(method, amount))
        assert opened.charge_id is not None
        return opened.charge_id

    async def captured(self, amount: int = 1_000) -> int:
        charge_id = await self.charge(amount=amount)
        assert (await self.sandbox.capture(self.capture(charge_id))).status == "succeeded"
        return charge_id


def result(operation: SandboxOperation) -> tuple[str, str | None]:
    """Status and code."""
    return operation.status, operation.code
