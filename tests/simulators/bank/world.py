"""A bank, and a look into its ledger that does not go through it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from typing import Any, Final, cast

import asyncpg

from mercato.chassis.contract import Actor
from mercato.chassis.hosting.host import Host
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
from mercato.testing.harness import TEST_SECRET, Rig

SERVICE: Final = Actor("service")
POLLS: Final = 5_000
POLL_SECONDS: Final = 0.01


class Bank:
    """`key()` gives a new key; the verbs make requests out of the little that a test cares about."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self._numbers = itertools.count(1)
        self._closing = contextlib.AsyncExitStack()

    async def open(self) -> Bank:
        await self.rig.open(sandbox=build)
        self.sandbox = self.rig.client(Sandbox)
        return self

    async def close(self) -> None:
        await self._closing.aclose()

    async def another_process(self) -> Sandbox:
        host = Host({"sandbox": build}, self.rig.dsns, secret=TEST_SECRET, transport=self.rig.transport)
        await host.open()
        self._closing.push_async_callback(host.close)
        return host.client(Sandbox)

    @contextlib.contextmanager
    def calling(self) -> Generator[None]:
        with self.rig.acting(SERVICE):
            yield

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

    def capture(self, charge_id: int, key: str | None = None) -> CaptureCharge:
        return CaptureCharge(idempotency_key=key or self.key(), charge_id=charge_id)

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

    async def rows(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        async with connected(self.rig.dsns["sandbox"]) as connection:
            return [tuple(row) for row in await connection.fetch(sql, *values)]

    async def until(self, holds: Callable[[], Awaitable[object]]) -> None:
        for _ in range(POLLS):
            if await holds():
                return
            await asyncio.sleep(POLL_SECONDS)
        raise AssertionError("what the test waits for does not happen")


@contextlib.asynccontextmanager
async def connected(dsn: str) -> AsyncGenerator[Any]:
    """A connection of the test's own."""
    connection = await cast(Any, asyncpg).connect(dsn)
    try:
        yield connection
    finally:
        await connection.close()


def told(operation: SandboxOperation) -> tuple[str, str | None]:
    return operation.status, operation.code
