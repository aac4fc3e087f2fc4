"""What payments needs of the bank: its adapter, `SandboxProvider`, against the pact."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from typing import Any, Final, NamedTuple

import pytest
import pytest_asyncio

from mercato.chassis.contract import Operation, current
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


class Example(NamedTuple):
    """What the adapter is asked, and what it makes of the outcome of the exchange."""

    exchange: Exchange
    wanted: ProviderRequest
    result: Succeeded | Declined | Unknown


def opened(
    description: str,
    operation: Operation[Any, Any],
    result: Succeeded | Declined | Unknown,
    *states: State,
    key: str,
    method: str = "sandbox:ok",
    **outcome: Any,
) -> Example:
    """A charge is opened."""
    exchange = Exchange(
        description=description, operation=operation, request=opening(key, method), states=states, **outcome
    )
    return Example(exchange, wanted(key, method=method), result)


def changed(
    description: str,
    operation: Operation[Any, Any],
    result: Succeeded | Declined | Unknown,
    *states: State,
    key: str,
    charge_id: int,
    **outcome: Any,
) -> Example:
    """Something is done with a charge."""
    amount = {} if operation is Sandbox.void else {"amount_minor": 2_500}
    request = {"idempotency_key": key, "charge_id": charge_id, **amount}
    exchange = Exchange(description=description, operation=operation, request=request, states=states, **outcome)
    return Example(exchange, wanted(key, charge_id), result)


DONE: Final = Succeeded(1, 8_001)
UNKNOWN: Final = Unknown()
EXAMPLES: Final = (
    opened("an amount is authorized", Sandbox.authorize, DONE, key="authorize:1", answer=operation("authorize")),
    opened("an amount is charged", Sandbox.charge, DONE, key="charge:1", answer=operation("charge")),
    opened(
        "a charge is declined",
        Sandbox.charge,
        Declined("insufficient_funds"),
        key="charge:2",
        method="sandbox:insufficient_funds",
        answer=operation("charge", "declined", charge_id=None, code=exactly("insufficient_funds")),
    ),
    opened(
        "a key is used for another amount",
        Sandbox.charge,
        UNKNOWN,
        given("the bank knows a key", key="charge:4"),
        key="charge:4",
        error=refusal(SandboxKeyReused, key="charge:4"),
    ),
    changed(
        "a charge is captured",
        Sandbox.capture,
        DONE,
        authorized(8_101),
        key="capture:1",
        charge_id=8_101,
        answer=operation("capture"),
    ),
    changed(
        "a charge is captured again",
        Sandbox.capture,
        DONE,
        captured(8_102),
        key="capture:2",
        charge_id=8_102,
        answer=operation("capture", "declined", code=exactly("already_captured")),
    ),
    changed(
        "an unknown charge is captured",
        Sandbox.capture,
        UNKNOWN,
        key="capture:3",
        charge_id=9_999_999,
        error=refusal(ChargeUnknown, charge_id=9_999_999),
    ),
    changed(
        "an authorization is voided",
        Sandbox.void,
        DONE,
        authorized(8_103),
        key="void:1",
        charge_id=8_103,
        answer=operation("void"),
    ),
    changed(
        "a charge is refunded",
        Sandbox.refund,
        DONE,
        captured(8_104),
        key="refund:1",
        charge_id=8_104,
        answer=operation("refund"),
    ),
)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda each: each.exchange.description)
async def test_the_adapter_knows_what_has_come_of_a_request(bank: Bank, example: Example):
    async with bank.stage.expects(example.exchange):
        found = await getattr(bank.provider, example.exchange.operation.name)([example.wanted])
    assert found == [example.result]


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
