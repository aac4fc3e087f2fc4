"""Payments and the bank, and the tables of both. The loops sleep: a test runs a sweep or a reconciliation itself."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, TypeVar, cast

import msgspec

from mercato.chassis.contract import Message
from mercato.chassis.hosting.service import Env, Service
from mercato.contracts.payments import (
    AuthorizePayment,
    CapturePayment,
    ChargePayment,
    OutcomePending,
    Payment,
    Payments,
    RefundPayment,
    VoidPayment,
)
from mercato.services.payments import app
from mercato.services.payments.charging import Charging
from mercato.services.payments.finishing import Finishing
from mercato.services.payments.provider import SandboxProvider
from mercato.services.payments.reconciling import Reconciling
from mercato.simulators.bank.app import build as build_sandbox
from mercato.simulators.bank.contract import Sandbox
from mercato.testing.actors import SERVICE
from mercato.testing.harness import ServiceHarness
from mercato.testing.rules import EVENT_VERSIONS_RISE, audit_rules
from mercato.testing.tables import EVENTS

NEVER_SECONDS: Final = 86_400
NONCE: Final = 0x0123456789ABCDEF
"""Of every order here, unless a test names another."""

Request = AuthorizePayment | ChargePayment
R = TypeVar("R", bound=Message)

EACH_VERSION_HAS_ITS_EVENT: Final = f"""
    SELECT p.id FROM payments p
      LEFT JOIN {EVENTS} ON (events.subject, events.subject_id, events.version) = ('payment', p.id, p.version)
     WHERE events.id IS NULL AND p.status <> 'pending'
"""


class PaymentsHarness(ServiceHarness):
    """`payments` is the client. `finishing` and `reconciling` are on the same database, for rounds by hand."""

    service = "payments"
    actor = SERVICE
    rules = {  # noqa: RUF012  # not changed
        **audit_rules("payments", "M1", "M2", "M10"),
        "each version has its event": EACH_VERSION_HAS_ITS_EVENT,
        "event versions rise": EVENT_VERSIONS_RISE,
    }
    defaults = {  # noqa: RUF012  # not changed
        "payments_sweep_seconds": NEVER_SECONDS,
        "payments_reconcile_seconds": NEVER_SECONDS,
        "sandbox_statement_delay_seconds": 0,
    }

    def _build(self, env: Env) -> Service:
        """The service as it is, of which a test also runs the inner parts."""
        providers = {"sandbox": SandboxProvider(env.client(Sandbox))}
        self.telemetry = env.telemetry
        self.finishing = Finishing(env.database, Charging(env.database, providers))
        self.reconciling = Reconciling(
            env.database, providers, self.finishing, env.telemetry, period_seconds=0.0, lag_seconds=0.0
        )
        return app.build(env)

    async def start(self) -> None:
        self._orders = itertools.count(1)
        await self.open({"sandbox": build_sandbox, "payments": self._build})
        self.payments = self.client(Payments)
        self.sandbox = self.client(Sandbox)

    async def another_process(self) -> Payments:
        """The client of a second host on the same databases."""
        return (await self.another_host({"payments": app.build})).client(Payments)

    # ------------------------------------------------------------------------------------------------------ requests

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

    # -------------------------------------------------------------------------------------------------------- tables

    async def bank(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        """The rows of one statement in the ledger of the bank."""
        return await self.rows(sql, *values, of="sandbox")

    async def steps(self) -> list[tuple[str, str]]:
        """Operations and intents of payments: kind and status, in the order in which they began."""
        found = """
            SELECT kind, status, began_at, payment_id FROM operations
             UNION ALL SELECT kind, status, began_at, payment_id FROM intents
             ORDER BY began_at, payment_id
        """
        return [(kind, status) for kind, status, _, _ in await self.rows(found)]

    async def taken(self) -> dict[str, int]:
        """How often each kind of operation has succeeded at the bank."""
        return dict(await self.bank("SELECT kind, count(*) FROM operations WHERE status = 'succeeded' GROUP BY kind"))

    async def differences(self) -> set[tuple[Any, ...]]:
        """What only one side says was done: kind, amount, currency and key (reliability: M4)."""
        done = "SELECT key, kind, amount_minor, currency FROM operations WHERE status = 'succeeded'"
        return set(await self.rows(done)) ^ set(await self.bank(done))

    async def age(self, hours: float) -> None:
        """Lets time pass for all intents."""
        await self.rows(
            """
            UPDATE intents SET began_at = began_at - make_interval(mins => $1),
                   asked_at = asked_at - make_interval(mins => $1)
            """,
            int(hours * 60),
        )

    async def age_everything(self, days: int) -> None:
        """Lets time pass for all that there is, with the bank's keys forgotten."""
        past = f"- interval '{days} days'"
        await self.rows(f"UPDATE payments SET created_at = created_at {past}, updated_at = updated_at {past}")
        await self.rows("ALTER TABLE operations DISABLE TRIGGER USER")
        await self.rows(f"UPDATE operations SET began_at = began_at {past}, settled_at = settled_at {past}")
        await self.rows("ALTER TABLE operations ENABLE TRIGGER USER")
        await self.age(hours=24 * days)
        await self.bank("UPDATE operations SET key = 'forgotten-' || id")


async def settled(
    call: Callable[[Sequence[R]], Awaitable[Sequence[Payment | Exception]]], requests: Sequence[R]
) -> list[Payment]:
    """The payments once their outcome is known, asked for again as orders does: a busy machine's bank answers late.

    Raises what a request is refused with.
    """
    while True:
        answers = await call(requests)
        failures = [answer for answer in answers if isinstance(answer, Exception)]
        if not failures:
            return cast(list[Payment], answers)
        if others := [failure for failure in failures if not isinstance(failure, OutcomePending)]:
            raise others[0]


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
