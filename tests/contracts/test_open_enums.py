"""A value that a newer service knows does not break an older reader; an unknown request is refused by its name."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from contracts import update_schemas
from contracts.exchange import event, for_each, same
from contracts.released_contract import CONTEXT, NEWER, ReleasedContract
from mercato.chassis.contract import (
    Actor,
    Batch,
    BatchOperation,
    Contract,
    ErrorMessage,
    InvalidRequest,
    Kind,
    Operation,
    RemoteError,
    ServiceError,
    current,
)
from mercato.chassis.contract.compatibility import breaks, errors_of, misplaced, schemas
from mercato.chassis.contract.messages import OPEN_VALUES
from mercato.chassis.messaging.events import decoder
from mercato.chassis.observability.clock import SystemClock
from mercato.chassis.observability.telemetry import Telemetry
from mercato.chassis.rpc import codec
from mercato.chassis.rpc.client import Connector
from mercato.chassis.rpc.server import LocalTransport, Server
from mercato.chassis.rpc.transports import Transport
from mercato.chassis.rpc.transports.loopback import LoopbackTransport
from mercato.contracts.inventory import StockTrace
from mercato.contracts.orders import Orders
from mercato.gateway import problems
from mercato.testing.waiting import BOUND_SECONDS

CONTRACTS = update_schemas.contracts()
OPERATIONS = {o.full_name: o for c in CONTRACTS.values() for o in c.operations.values()}
EVENTS = {type_: contract for contract in CONTRACTS.values() for type_ in contract.events}
SERVICE = Actor("service", 1)


def described(contract: type[Contract]) -> ReleasedContract:
    return ReleasedContract(schemas(contract))


def newest(contract: type[Contract], schema: dict[str, Any], check: Any) -> None:
    """Checks messages of a newer service: each open enumeration has a value that is not known here."""
    for_each(described(contract), schema, check, enums="unknown", examples=3)


# ------------------------------------------------------------------------------------------------------------ answers


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_answer_with_unknown_values_is_decoded(name: str):
    operation = OPERATIONS[name]
    contract = CONTRACTS[operation.service]

    def check(sent: Any) -> None:
        encoded = msgspec.msgpack.encode([codec.WireOutcome(msgspec.Raw(msgspec.msgpack.encode(sent)))])
        (read,) = codec.decode_outcomes(operation, encoded)
        same(sent, read)

    newest(contract, schemas(contract)["operations"][operation.name]["answer"], check)


@pytest.mark.parametrize("transport", ["local", "loopback"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_answer_with_unknown_values_arrives_over_a_transport(name: str, transport: str):
    operation = OPERATIONS[name]
    contract = CONTRACTS[operation.service]
    whole = schemas(contract)["operations"][operation.name]
    asked: list[Any] = []
    for_each(described(contract), whole["request"], asked.append, examples=1)

    def check(sent: Any) -> None:
        answer = msgspec.convert(sent, operation.answer)
        read = asyncio.run(call(operation, msgspec.convert(asked[0], operation.request), answer, transport))
        same(sent, read)

    newest(contract, whole["answer"], check)


async def call(operation: Operation[Any, Any], request: Any, answer: Any, transport: str) -> Any:
    """Calls a service that gives this answer to everything."""

    async def one(request: Any) -> Any:
        return answer

    async def many(batch: Batch[Any]) -> Sequence[Any]:
        return [answer for _ in batch]

    clock, contract = SystemClock(), CONTRACTS[operation.service]
    server = Server(contract, clock)
    for each in contract.operations.values():
        server.register(each, many if isinstance(each, BatchOperation) else one)  # pyright: ignore[reportArgumentType, reportCallIssue]  # one for all
    servers = {contract.service: server.complete()}
    carrier: Transport = LocalTransport(servers) if transport == "local" else LoopbackTransport(servers, clock)
    connector = Connector(clock, Telemetry())
    token = current.set(msgspec.structs.replace(CONTEXT, deadline=clock.monotonic() + BOUND_SECONDS))
    try:
        return await getattr(connector.client(contract, carrier), operation.name)(request)
    finally:
        current.reset(token)
        await connector.close()


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("service", sorted(CONTRACTS))
def test_details_of_errors_with_unknown_values_are_decoded(service: str):
    contract = CONTRACTS[service]
    for code, error in errors_of(contract).items():

        def check(sent: Any, code: str = code, error: type = error) -> None:
            message = ErrorMessage(code, Kind.CONFLICT, "A sentence.", msgspec.to_builtins(sent))
            encoded = msgspec.msgpack.encode([codec.WireOutcome(error=message)])
            (received,) = codec.decode_outcomes(Orders.get, encoded)
            assert type(received) is error
            assert isinstance(received, ServiceError)
            same(sent, received.details)

        newest(contract, schemas(contract)["errors"][code]["details"], check)


def test_an_unknown_kind_of_error_is_internal():
    newer = {"code": "orders.newer", "kind": "newer", "message": "A sentence.", "details": {}}
    (received,) = codec.decode_outcomes(Orders.get, msgspec.msgpack.encode([{"error": newer}]))

    assert isinstance(received, RemoteError)
    assert (received.code, received.kind, str(received)) == ("orders.newer", Kind.INTERNAL, "A sentence.")
    assert problems.status_of(received) == 500


def test_an_unknown_kind_does_not_change_an_error_that_is_known():
    newer = {"code": "orders.not_found", "kind": "newer", "message": "A sentence.", "details": {"order_id": 7}}
    (received,) = codec.decode_outcomes(Orders.get, msgspec.msgpack.encode([{"error": newer}]))

    assert isinstance(received, errors_of(Orders)["orders.not_found"])
    assert received.kind is Kind.NOT_FOUND


# ------------------------------------------------------------------------------------------------------------- events


@pytest.mark.parametrize("type_", EVENTS)
def test_an_event_with_unknown_values_is_decoded(type_: str):
    contract = EVENTS[type_]
    message = contract.events[type_]
    read = decoder(contract, message, type_)

    newest(
        contract, schemas(contract)["events"][type_], lambda sent: event(type_, msgspec.convert(sent, message), read)
    )


# -------------------------------------------------------------------------------------------------------- closed, open


def test_a_request_with_an_unknown_value_is_refused_with_the_name_of_the_field():
    asked = msgspec.msgpack.encode({"id": 1, "status": NEWER})
    sent = msgspec.msgpack.encode([codec.WireRequest(msgspec.Raw(asked), SERVICE, 1_000.0, "t", "r")])
    ((refused,), _) = codec.decode_requests(Orders.move, sent, 0.0)

    assert isinstance(refused, InvalidRequest)
    assert [(error.field, NEWER in error.message) for error in refused.errors] == [("status", True)]


@pytest.mark.parametrize("service", sorted(CONTRACTS))
def test_enumerations_are_open_where_they_are_read_and_closed_in_requests(service: str):
    assert misplaced(schemas(CONTRACTS[service])) == []


def test_misplaced_enumerations_are_found():
    made = schemas(CONTRACTS["orders"])
    order, request = (made["components"][name]["properties"] for name in ("Order", "MoveOrder"))
    order["status"], request["status"] = request["status"], order["status"]

    assert misplaced(made) == [
        "Order.status is read by callers or consumers: declare it Open[...]",
        "MoveOrder.status is a part of a request: declare it without Open",
    ]


def test_a_value_is_added_to_an_open_enumeration_and_never_removed():
    one = schemas(CONTRACTS["inventory"])
    two = schemas(CONTRACTS["inventory"])
    two["components"]["StockStep"]["properties"]["what"][OPEN_VALUES].insert(0, NEWER)

    assert breaks(one, two) == []
    assert breaks(two, one) == [f"StockStep.what no longer has {NEWER}"]


@pytest.mark.parametrize(("value", "fits"), [("", False), ("a" * 64, True), ("a" * 65, False)])
def test_an_unknown_value_has_a_bounded_length(value: str, fits: bool):
    encoded = msgspec.msgpack.encode({"steps": [{"what": value, "lines": [], "at": "2026-01-15T09:30:00Z"}]})
    try:
        read = msgspec.msgpack.decode(encoded, type=StockTrace)
    except msgspec.ValidationError:
        read = None
    assert (read is not None) is fits
