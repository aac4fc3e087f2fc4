"""What payments needs of the bank: its adapter, `SandboxProvider`, against the pact."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from typing import Any, Final

import pytest
import pytest_asyncio

from mercato.chassis.contract import current
from mercato.chassis.observability.clock import SystemClock
from mercato.chassis.observability.telemetry import Telemetry
from mercato.chassis.rpc.client import Connector, acting
from mercato.services.payments.provider import ProviderRequest, SandboxProvider
from mercato.services.payments.rules import Declined, StatementLine, Succeeded, Unknown
from mercato.simulators.bank.contract import ChargeUnknown, OperationUnknown, Sandbox, SandboxKeyReused
from mercato.testing.actors import SERVICE
from pacts.book import PactBook
from pacts.examples import exactly
from pacts.rpc import Exchange, Stage, State, given, refusal

CONSUMER: Final = "payments"

pytestmark = pytest.mark.asyncio(loop_scope="module")

FIRST: Final = 9_000_001
"""The first operation of a statement that is read from its middle on: every operation after it is a charge."""
AT: Final = "2026-11-30T12:00:00Z"


class Bank:
    """The adapter of payments, and the bank that Pact plays."""

    def __init__(self, book: PactBook) -> None:
        self.stage = Stage(book)
        self._connector = Connector(SystemClock(), Telemetry())
        self.provider = SandboxProvider(self._connector.client(Sandbox, self.stage.transport))

    async def close(self) -> None:
        await self._connector.close()
        await self.stage.transport.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bank(book: PactBook) -> AsyncGenerator[Bank]:
    made = Bank(book)
    yield made
    await made.close()


@pytest.fixture(autouse=True)
def as_service() -> Generator[None]:
    token = current.set(acting(SERVICE, clock=SystemClock(), seconds=120.0))
    yield
    current.reset(token)


def operation(kind: str, status: str = "succeeded", **fields: Any) -> dict[str, Any]:
    """An operation as the bank answers it; `charge_id` and `code` as the adapter needs them."""
    return {
        "id": 1,
        "key": "pay:7001:1",
        "kind": exactly(kind),
        "charge_id": 8_001,
        "order_id": 7_001,
        "amount_minor": 2_500,
        "currency": "USD",
        "status": exactly(status),
        "code": None,
        "created_at": AT,
        **fields,
    }


def wanted(key: str, charge_id: int | None = None, method: str = "sandbox:ok") -> ProviderRequest:
    return ProviderRequest(key, 7_001, charge_id, 2_500, "USD", method)


def opening(key: str, method: str = "sandbox:ok") -> dict[str, Any]:
    return {
        "idempotency_key": key,
        "order_id": 7_001,
        "amount_minor": 2_500,
        "currency": "USD",
        "method": exactly(method),
    }


def authorized(charge_id: int) -> State:
    return given("a charge is authorized", charge_id=charge_id, order_id=7_001, amount_minor=2_500, currency="USD")


def captured(charge_id: int) -> State:
    return given("a charge is captured", charge_id=charge_id, order_id=7_001, amount_minor=2_500, currency="USD")


async def test_an_amount_is_authorized(bank: Bank):
    authorize = Exchange(
        description="an amount is authorized",
        operation=Sandbox.authorize,
        request=opening("authorize:1"),
        answer=operation("authorize"),
    )
    async with bank.stage.expects(authorize):
        assert await bank.provider.authorize([wanted("authorize:1")]) == [Succeeded(1, 8_001)]


async def test_an_amount_is_charged(bank: Bank):
    charge = Exchange(
        description="an amount is charged",
        operation=Sandbox.charge,
        request=opening("charge:1"),
        answer=operation("charge"),
    )
    async with bank.stage.expects(charge):
        assert await bank.provider.charge([wanted("charge:1")]) == [Succeeded(1, 8_001)]


async def test_a_charge_that_the_bank_declines_has_its_code(bank: Bank):
    charge = Exchange(
        description="a charge is declined",
        operation=Sandbox.charge,
        request=opening("charge:2", "sandbox:insufficient_funds"),
        answer=operation("charge", "declined", charge_id=None, code=exactly("insufficient_funds")),
    )
    async with bank.stage.expects(charge):
        [result] = await bank.provider.charge([wanted("charge:2", method="sandbox:insufficient_funds")])
    assert result == Declined("insufficient_funds")


async def test_a_charge_that_is_processing_says_when_it_settles(bank: Bank):
    charge = Exchange(
        description="a charge is processing",
        operation=Sandbox.charge,
        request=opening("charge:3", "sandbox:slow:60000"),
        answer=operation("charge", "processing", charge_id=None, settles_at=AT),
    )
    async with bank.stage.expects(charge):
        [result] = await bank.provider.charge([wanted("charge:3", method="sandbox:slow:60000")])
    assert isinstance(result, Unknown)
    assert result.settles_at is not None


async def test_a_key_that_was_used_for_another_operation_is_refused(bank: Bank):
    charge = Exchange(
        description="a key is used for another amount",
        operation=Sandbox.charge,
        request=opening("charge:4"),
        error=refusal(SandboxKeyReused, key="charge:4"),
        states=(given("the bank knows a key", key="charge:4"),),
    )
    async with bank.stage.expects(charge):
        assert await bank.provider.charge([wanted("charge:4")]) == [Unknown()]


async def test_a_charge_is_captured(bank: Bank):
    capture = Exchange(
        description="a charge is captured",
        operation=Sandbox.capture,
        request={"idempotency_key": "capture:1", "charge_id": 8_101, "amount_minor": 2_500},
        answer=operation("capture"),
        states=(authorized(8_101),),
    )
    async with bank.stage.expects(capture):
        assert await bank.provider.capture([wanted("capture:1", 8_101)]) == [Succeeded(1, 8_001)]


async def test_a_second_capture_with_another_key_was_done_before(bank: Bank):
    capture = Exchange(
        description="a charge is captured again",
        operation=Sandbox.capture,
        request={"idempotency_key": "capture:2", "charge_id": 8_102, "amount_minor": 2_500},
        answer=operation("capture", "declined", code=exactly("already_captured")),
        states=(captured(8_102),),
    )
    async with bank.stage.expects(capture):
        assert await bank.provider.capture([wanted("capture:2", 8_102)]) == [Succeeded(1, 8_001)]


async def test_a_charge_that_the_bank_does_not_know_is_not_settled(bank: Bank):
    capture = Exchange(
        description="an unknown charge is captured",
        operation=Sandbox.capture,
        request={"idempotency_key": "capture:3", "charge_id": 9_999_999, "amount_minor": 2_500},
        error=refusal(ChargeUnknown, charge_id=9_999_999),
    )
    async with bank.stage.expects(capture):
        assert await bank.provider.capture([wanted("capture:3", 9_999_999)]) == [Unknown()]


async def test_an_authorization_is_voided(bank: Bank):
    void = Exchange(
        description="an authorization is voided",
        operation=Sandbox.void,
        request={"idempotency_key": "void:1", "charge_id": 8_103},
        answer=operation("void"),
        states=(authorized(8_103),),
    )
    async with bank.stage.expects(void):
        assert await bank.provider.void([wanted("void:1", 8_103)]) == [Succeeded(1, 8_001)]


async def test_a_captured_charge_is_refunded(bank: Bank):
    refund = Exchange(
        description="a charge is refunded",
        operation=Sandbox.refund,
        request={"idempotency_key": "refund:1", "charge_id": 8_104, "amount_minor": 2_500},
        answer=operation("refund"),
        states=(captured(8_104),),
    )
    async with bank.stage.expects(refund):
        assert await bank.provider.refund([wanted("refund:1", 8_104)]) == [Succeeded(1, 8_001)]


async def test_an_operation_is_found_by_its_key(bank: Bank):
    look_up = Exchange(
        description="an operation is looked up",
        operation=Sandbox.look_up,
        request={"key": "charge:5"},
        answer=operation("charge", key="charge:5"),
        states=(given("the bank knows a key", key="charge:5"),),
    )
    async with bank.stage.expects(look_up):
        [found] = await bank.provider.look_up(["charge:5"])
    assert found == StatementLine(1, "charge:5", "charge", 8_001, 2_500, "USD", None)


async def test_a_key_that_the_bank_does_not_know_was_not_done(bank: Bank):
    look_up = Exchange(
        description="an unknown key is looked up",
        operation=Sandbox.look_up,
        request={"key": "charge:none"},
        error=refusal(OperationUnknown, key="charge:none"),
    )
    async with bank.stage.expects(look_up):
        assert await bank.provider.look_up(["charge:none"]) == [None]


async def test_the_statement_has_settled_operations(bank: Bank):
    statement = Exchange(
        description="the statement is read",
        operation=Sandbox.statement,
        request={"after": exactly(FIRST - 1), "limit": 500},
        answer={"operations": [operation("charge")], "next_after": FIRST},
        states=(
            given(
                "a charge is on the statement", operation_id=FIRST, order_id=7_001, amount_minor=2_500, currency="USD"
            ),
        ),
    )
    async with bank.stage.expects(statement):
        page = await bank.provider.statement(FIRST - 1)
    assert page.operations == (StatementLine(1, "pay:7001:1", "charge", 8_001, 2_500, "USD", None),)
    assert (page.next_after, page.is_last) == (FIRST, True)
