"""Payments with the bank behind it, and the books of both, read without either."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from typing import Any, Final, TypeVar, cast

import asyncpg
import msgspec

from mercato.chassis.contract import Actor, Message
from mercato.chassis.hosting.host import Host
from mercato.chassis.hosting.service import Env, Service
from mercato.contracts.payments import (
    AuthorizePayment,
    CapturePayment,
    ChargePayment,
    Payment,
    Payments,
    RefundPayment,
    VoidPayment,
)
from mercato.services.payments import app
from mercato.services.payments.charging import Charging
from mercato.services.payments.provider import SandboxProvider
from mercato.services.payments.reconciling import Reconciling
from mercato.simulators.bank.app import build as build_sandbox
from mercato.simulators.bank.contract import Sandbox
from mercato.testing.harness import TEST_SECRET, Rig, migrations_folder
from mercato.testing.outbox import EVENTS

SERVICE: Final = Actor("service")
ALICE: Final = Actor("customer", 1)
BOB: Final = Actor("customer", 2)
STAFF: Final = Actor("staff", 9)
POLLS: Final = 1_000
POLL_SECONDS: Final = 0.01
NEVER_SECONDS: Final = "86400"
NONCE: Final = 0x0123456789ABCDEF
"""Of every order here, unless a test names another."""

Request = AuthorizePayment | ChargePayment
R = TypeVar("R", bound=Message)

INVARIANTS: Final = {
    "M1 transfers are those of the operations that moved money": """
        SELECT coalesce(o.payment_id, t.payment_id) FROM (
            SELECT * FROM operations
             WHERE status = 'succeeded' AND kind IN ('charge', 'capture', 'refund') AND amount_minor > 0) o
          FULL JOIN transfers t ON t.payment_id = o.payment_id AND t.kind = o.kind AND t.reference = o.reference
         WHERE (t.amount_minor, t.currency) IS DISTINCT FROM (o.amount_minor, o.currency)
        """,
    "M2 a balance is the sum of its transfers": """
        SELECT a.account FROM accounts a LEFT JOIN (
            SELECT account, currency, sum(amount) AS s FROM (
                SELECT debit AS account, currency, amount_minor AS amount FROM transfers
                UNION ALL SELECT credit, currency, -amount_minor FROM transfers) e GROUP BY 1, 2
            ) e USING (account, currency)
         WHERE a.balance_minor <> coalesce(e.s, 0)
        """,
    "M2 a payment's money is that of its operations": """
        SELECT p.id FROM payments p LEFT JOIN (
            SELECT payment_id,
                   coalesce(sum(amount_minor) FILTER (WHERE kind IN ('charge', 'capture')), 0) AS captured,
                   coalesce(sum(amount_minor) FILTER (WHERE kind = 'refund'), 0) AS refunded
              FROM operations WHERE status = 'succeeded' GROUP BY 1) o ON o.payment_id = p.id
         WHERE (p.captured_minor, p.refunded_minor) <> (coalesce(o.captured, 0), coalesce(o.refunded, 0))
        """,
    "a payment is pending exactly while its authorize or charge is an intent": """
        SELECT p.id FROM payments p
          FULL JOIN (SELECT * FROM intents WHERE kind IN ('authorize', 'charge')) i ON i.payment_id = p.id
         WHERE (p.status = 'pending') IS DISTINCT FROM (i.payment_id IS NOT NULL)
        """,
    "an operation is an intent or settled": """
        SELECT payment_id FROM intents JOIN operations USING (payment_id, kind, reference)
        """,
    "E7 each version has its event": f"""
        SELECT p.id FROM payments p LEFT JOIN {EVENTS}
            ON (events.subject, events.subject_id, events.version) = ('payment', p.id, p.version)
         WHERE events.id IS NULL AND p.status <> 'pending'
        """,
    "events of a payment rise": f"""
        SELECT subject_id FROM (
            SELECT subject_id, version, lag(version) OVER (PARTITION BY subject_id ORDER BY id) AS before
              FROM {EVENTS}) e
         WHERE version <= before
        """,
}
"""Each finds what contradicts it in our tables alone."""


class World:
    """`payments` is the client. `charging` and `reconciling` are on the same database, for rounds by hand."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self._orders = itertools.count(1)
        self._closing = contextlib.AsyncExitStack()
        rig.options = {
            "MERCATO_PAYMENTS_SWEEP_SECONDS": NEVER_SECONDS,
            "MERCATO_PAYMENTS_RECONCILE_SECONDS": NEVER_SECONDS,
            "MERCATO_SANDBOX_STATEMENT_DELAY_SECONDS": "0",
            **rig.options,
        }

    def build(self, env: Env) -> Service:
        """The service as it is, of which a test also runs the inner parts."""
        providers = {"sandbox": SandboxProvider(env.client(Sandbox))}
        self.telemetry = env.telemetry
        self.charging = Charging(env.database, providers)
        self.reconciling = Reconciling(
            env.database, providers, self.charging, env.telemetry, period_seconds=0.0, lag_seconds=0.0
        )
        return app.build(env)

    async def open(self) -> None:
        # The test's own parts are built by a module that is not the service's: its database is looked up by hand.
        self.rig.dsns["payments"] = await self.rig.cluster.fresh_database("payments", migrations_folder(app.build))
        await self.rig.open(sandbox=build_sandbox, payments=self.build)
        self.payments = self.rig.client(Payments)
        self.sandbox = self.rig.client(Sandbox)

    async def close(self) -> None:
        await self._closing.aclose()

    async def another_process(self) -> Payments:
        """The client of a second host on the same databases."""
        host = Host(
            {"sandbox": build_sandbox, "payments": app.build},
            self.rig.dsns,
            secret=TEST_SECRET,
            transport=self.rig.transport,
            options=self.rig.options,
        )
        await host.open()
        self._closing.push_async_callback(host.close)
        return host.client(Payments)

    @contextlib.contextmanager
    def calling(self) -> Generator[None]:
        with self.rig.acting(SERVICE):
            yield

    # ---------------------------------------------------------------------------------------------------- requests

    def authorization(
        self,
        method: str = "sandbox:ok",
        amount: int = 1_000,
        *,
        attempt: int = 1,
        order_id: int = 0,
        user_id: int = 1,
        nonce: int = NONCE,
    ) -> AuthorizePayment:
        """Of a new order, unless one is named."""
        order_id = order_id or next(self._orders)
        return AuthorizePayment(
            order_id=order_id,
            attempt=attempt,
            user_id=user_id,
            amount_minor=amount,
            currency="EUR",
            method=method,
            idempotency_key=f"{order_id}:{attempt}:authorize",
            order_nonce=nonce,
        )

    def charge(self, method: str = "sandbox:ok", amount: int = 1_000, **fields: int) -> ChargePayment:
        """Of a new order, unless one is named."""
        return ChargePayment(**msgspec.structs.asdict(self.authorization(method, amount, **fields)))

    async def charged(self, method: str = "sandbox:ok", amount: int = 1_000) -> Payment:
        return await self.payments.charge(self.charge(method, amount))

    async def authorized(self, method: str = "sandbox:ok", amount: int = 1_000) -> Payment:
        return await self.payments.authorize(self.authorization(method, amount))

    async def captured(self, amount: int = 1_000) -> Payment:
        return await self.payments.capture(capture(await self.authorized(amount=amount)))

    # ------------------------------------------------------------------------------------------------------- books

    async def ours(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        return await rows(self.rig.dsns["payments"], sql, *values)

    async def bank(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        return await rows(self.rig.dsns["sandbox"], sql, *values)

    async def steps(self) -> list[tuple[str, str]]:
        """Our operations and intents: kind and status, in the order in which they began."""
        found = """
            SELECT kind, status, began_at, payment_id FROM operations
             UNION ALL SELECT kind, status, began_at, payment_id FROM intents
             ORDER BY began_at, payment_id
        """
        return [(kind, status) for kind, status, _, _ in await self.ours(found)]

    async def taken(self) -> dict[str, int]:
        """How often each kind of operation has succeeded at the bank."""
        return dict(await self.bank("SELECT kind, count(*) FROM operations WHERE status = 'succeeded' GROUP BY kind"))

    async def violations(self) -> dict[str, int]:
        """What contradicts an invariant of our books."""
        found = {name: await self.ours(sql) for name, sql in INVARIANTS.items()}
        return {name: len(wrong) for name, wrong in found.items() if wrong}

    async def differences(self) -> set[tuple[Any, ...]]:
        """What only one side says was done: kind, amount, currency and key (reliability: M4)."""
        done = "SELECT key, kind, amount_minor, currency FROM operations WHERE status = 'succeeded'"
        return set(await self.ours(done)) ^ set(await self.bank(done))

    async def until(self, holds: Callable[[], Awaitable[object]]) -> None:
        for _ in range(POLLS):
            if await holds():
                return
            await asyncio.sleep(POLL_SECONDS)
        raise AssertionError("what the test waits for does not happen")

    async def age(self, hours: float) -> None:
        """Lets time pass for all intents."""
        await self.ours(
            """
            UPDATE intents SET began_at = began_at - make_interval(mins => $1),
                   asked_at = asked_at - make_interval(mins => $1)
            """,
            int(hours * 60),
        )

    async def age_everything(self, days: int) -> None:
        """Lets time pass for all that there is, with the bank's keys forgotten."""
        past = f"- interval '{days} days'"
        await self.ours(f"UPDATE payments SET created_at = created_at {past}, updated_at = updated_at {past}")
        await self.ours("ALTER TABLE operations DISABLE TRIGGER USER")
        await self.ours(f"UPDATE operations SET began_at = began_at {past}, settled_at = settled_at {past}")
        await self.ours("ALTER TABLE operations ENABLE TRIGGER USER")
        await self.age(hours=24 * days)
        await self.bank("UPDATE operations SET key = 'forgotten-' || id")


def capture(payment: Payment | Request, nonce: int = NONCE) -> CapturePayment:
    return CapturePayment(
        order_id=payment.order_id,
        attempt=payment.attempt,
        idempotency_key=f"{payment.order_id}:capture",
        order_nonce=nonce,
    )


def void(payment: Payment | Request, nonce: int = NONCE) -> VoidPayment:
    return VoidPayment(
        order_id=payment.order_id,
        attempt=payment.attempt,
        user_id=payment.user_id,
        amount_minor=payment.amount_minor,
        currency=payment.currency,
        method=payment.method,
        idempotency_key=f"{payment.order_id}:void",
        order_nonce=nonce,
    )


def refund(payment: Payment, amount: int, reference: str = "return-1", nonce: int = NONCE) -> RefundPayment:
    return RefundPayment(
        order_id=payment.order_id,
        attempt=payment.attempt,
        amount_minor=amount,
        reference=reference,
        idempotency_key=f"{payment.order_id}:refund:{reference}",
        order_nonce=nonce,
    )


def again(request: R, **changes: Any) -> R:
    """The same request, but for what is named."""
    return msgspec.structs.replace(request, **changes)


def key(payment: Payment | Request, kind: str, reference: str = "") -> str:
    """The key for the provider, written out."""
    return f"{payment.order_id}-0123456789abcdef-{payment.attempt}-{kind}" + (f"-{reference}" if reference else "")


async def rows(dsn: str, sql: str, *values: object) -> list[tuple[Any, ...]]:
    async with connected(dsn) as connection:
        return [tuple(row) for row in await connection.fetch(sql, *values)]


@contextlib.asynccontextmanager
async def connected(dsn: str) -> AsyncGenerator[Any]:
    connection = await cast(Any, asyncpg).connect(dsn)
    try:
        yield connection
    finally:
        await connection.close()
