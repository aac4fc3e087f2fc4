"""A key that belongs to another order, user or amount: refused, with the field that differs, counted, and logged.

The table has every operation that is done once for a key. A new one fails the first test until it is listed.
"""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec
import pytest
from structlog.testing import capture_logs

from mercato import topology
from mercato.chassis.contract import (
    SERVICE_ROLE,
    Actor,
    Batch,
    Contract,
    IdempotencyKeyReused,
    InvalidRequest,
    Message,
    Retry,
    ServiceError,
)
from mercato.contracts import inventory as stock, orders, payments as money
from mercato.contracts.inventory import Inventory, StockLine
from mercato.contracts.orders import Orders
from mercato.contracts.payments import Payments
from mercato.contracts.products import GetProduct, Product, Products
from mercato.simulators.bank import contract as bank
from mercato.simulators.bank.contract import Sandbox
from mercato.testing.actors import ALICE, BOB, STAFF
from mercato.testing.builders import product
from services.orders.harness import MUG, OrdersHarness, basket

pytestmark = pytest.mark.asyncio(loop_scope="session")

_numbers = itertools.count(700_001)
CONTRACTS: Final[Mapping[str, type[Any]]] = {
    contract.service: contract for contract in (Orders, Inventory, Payments, Sandbox)
}
NONCE: Final = 7
METHOD: Final = "sandbox:ok"


class Foreign(NamedTuple):
    """`first` gives a request whose key is known, once it was done; `changes` make another one with that key.

    `another` among them: the name of a field, and what makes its value.
    """

    operation: Any
    first: Callable[[OrdersHarness], Awaitable[Message]]
    changes: Mapping[str, Any]
    field: str
    refusal: type[ServiceError]


# ------------------------------------------------------------------------------------------------------------ requests


async def reserve(harness: OrdersHarness) -> stock.ReserveStock:
    order_id = next(_numbers)
    lines = (StockLine(product_id=await harness.new_product(10), quantity=2),)
    return stock.ReserveStock(
        order_id=order_id, order_nonce=NONCE, lines=lines, for_payment=True, idempotency_key=f"{order_id}"
    )


async def reserved(harness: OrdersHarness) -> stock.ReserveStock:
    request = await reserve(harness)
    await harness.client(Inventory).reserve(request)
    return request


async def commit(harness: OrdersHarness) -> stock.CommitStock:
    of = await reserved(harness)
    return stock.CommitStock(order_id=of.order_id, order_nonce=NONCE, idempotency_key="commit")


async def release(harness: OrdersHarness) -> stock.ReleaseStock:
    of = await reserved(harness)
    return stock.ReleaseStock(order_id=of.order_id, order_nonce=NONCE, idempotency_key="release")


async def restock(harness: OrdersHarness) -> stock.ReturnStock:
    of = await reserved(harness)
    sold = stock.CommitStock(order_id=of.order_id, order_nonce=NONCE, idempotency_key="commit")
    await harness.client(Inventory).commit(sold)
    lines = tuple(msgspec.structs.replace(line, quantity=1) for line in of.lines)
    return stock.ReturnStock(
        order_id=of.order_id, order_nonce=NONCE, lines=lines, reference="back", idempotency_key="restock"
    )


async def adjust(harness: OrdersHarness) -> stock.AdjustLevel:
    harness.host.servers["products"].register(Products.get, _products)
    return stock.AdjustLevel(product_id=MUG, delta=3, reason="delivery", idempotency_key=f"adjust-{next(_numbers)}")


async def _products(batch: Batch[GetProduct]) -> Sequence[Product]:
    return [product(request.id) for request in batch]


def opening(type_: type[Any]) -> Any:
    async def request(_: OrdersHarness) -> Any:
        return type_(
            order_id=next(_numbers),
            order_nonce=NONCE,
            attempt=1,
            user_id=ALICE.id,
            amount_minor=1_000,
            currency="USD",
            method=METHOD,
            idempotency_key="opening",
        )

    return request


authorize, charge = opening(money.AuthorizePayment), opening(money.ChargePayment)


async def void(harness: OrdersHarness) -> money.VoidPayment:
    of = await authorize(harness)
    await harness.client(Payments).authorize(of)
    fields: dict[str, Any] = {**msgspec.structs.asdict(of), "idempotency_key": "void"}
    return money.VoidPayment(**fields)


def of_payment(opens: Any, call: str, type_: type[Any], **fields: Any) -> Any:
    async def request(harness: OrdersHarness) -> Any:
        of = await opens(harness)
        await getattr(harness.client(Payments), call)(of)
        return type_(order_id=of.order_id, order_nonce=NONCE, attempt=1, idempotency_key="of", **fields)

    return request


capture = of_payment(authorize, "authorize", money.CapturePayment)
capture_part = of_payment(authorize, "authorize", money.CapturePart, amount_minor=400)
give_back = of_payment(charge, "charge", money.RefundPayment, amount_minor=400, reference="refund")


def at_the_bank(type_: type[Any], **fields: Any) -> Any:
    async def request(harness: OrdersHarness) -> Any:
        number = next(_numbers)
        if "order_id" in type_.__struct_fields__:
            wanted: dict[str, Any] = {"order_id": number, "currency": "USD", "method": METHOD}
            return type_(idempotency_key=f"bank-{number}", amount_minor=500, **wanted)
        client: Any = harness.client(Sandbox)
        opens, call = (
            (bank.ChargeCard, client.charge) if type_ is bank.RefundCharge else (bank.AuthorizeCharge, client.authorize)
        )
        card: dict[str, Any] = {"amount_minor": 500, "currency": "USD", "method": METHOD}
        opened = await call(opens(idempotency_key=f"open-{number}", order_id=number, **card))
        charge_id = opened.charge_id
        assert charge_id is not None
        return type_(idempotency_key=f"bank-{number}", charge_id=charge_id, **fields)

    return request


async def place(harness: OrdersHarness) -> orders.PlaceOrder:
    return basket((MUG, 1), idempotency_key=f"place-{next(_numbers)}")


async def pay(harness: OrdersHarness) -> orders.PayOrder:
    order = await harness.checked_out(None, (MUG, 1))
    return orders.PayOrder(id=order.id, method=METHOD, idempotency_key=f"pay-{next(_numbers)}")


async def refund(harness: OrdersHarness) -> orders.RefundOrder:
    order = await harness.checked_out(METHOD, (MUG, 2))
    [payment] = await harness.payments(order.id)
    return orders.RefundOrder(payment_id=payment.id, amount_minor=100, idempotency_key=f"refund-{next(_numbers)}")


async def take_back(harness: OrdersHarness) -> orders.ReturnOrder:
    order = await harness.delivered(METHOD, (MUG, 2))
    return orders.ReturnOrder(id=order.id, idempotency_key=f"return-{next(_numbers)}")


async def another_order(harness: OrdersHarness) -> int:
    return (await harness.checked_out(None, (MUG, 1))).id


async def another_payment(harness: OrdersHarness) -> int:
    order = await harness.checked_out(METHOD, (MUG, 2))
    return (await harness.payments(order.id))[0].id


OTHER_LINES: Final = (StockLine(product_id=MUG, quantity=1),)
THREE_MUGS: Final = (orders.PlaceLine(product_id=MUG, quantity=3),)
OTHER_NONCE: Final = {"order_nonce": 8}

FOREIGN: Final = [
    Foreign(Inventory.reserve, reserve, OTHER_NONCE, "order_nonce", stock.AnotherOrder),
    Foreign(Inventory.reserve, reserve, {"lines": OTHER_LINES}, "lines", InvalidRequest),
    Foreign(Inventory.commit, commit, OTHER_NONCE, "order_nonce", stock.AnotherOrder),
    Foreign(Inventory.release, release, OTHER_NONCE, "order_nonce", stock.AnotherOrder),
    Foreign(Inventory.restock, restock, OTHER_NONCE, "order_nonce", stock.AnotherOrder),
    Foreign(Inventory.restock, restock, {"lines": OTHER_LINES}, "lines", stock.ReturnReferenceReused),
    Foreign(Inventory.adjust, adjust, {"product_id": MUG + 1}, "product_id", IdempotencyKeyReused),
    Foreign(Inventory.adjust, adjust, {"fingerprint": b"other", "delta": 4}, "request", IdempotencyKeyReused),
    *(
        Foreign(operation, first, changes, field, refusal)
        for operation, first in ((Payments.authorize, authorize), (Payments.charge, charge))
        for changes, field, refusal in (
            (OTHER_NONCE, "order_nonce", money.AnotherOrder),
            ({"user_id": BOB.id}, "user_id", money.AttemptReused),
            ({"amount_minor": 2_000}, "amount_minor", money.AttemptReused),
            ({"currency": "EUR"}, "currency", money.AttemptReused),
            ({"method": "sandbox:declined"}, "method", money.AttemptReused),
        )
    ),
    Foreign(Payments.void, void, OTHER_NONCE, "order_nonce", money.AnotherOrder),
    Foreign(Payments.void, void, {"user_id": BOB.id}, "user_id", money.AttemptReused),
    Foreign(Payments.capture, capture, OTHER_NONCE, "order_nonce", money.AnotherOrder),
    Foreign(Payments.capture_part, capture_part, OTHER_NONCE, "order_nonce", money.AnotherOrder),
    Foreign(Payments.capture_part, capture_part, {"amount_minor": 300}, "amount_minor", money.CaptureAmountChanged),
    Foreign(Payments.refund, give_back, OTHER_NONCE, "order_nonce", money.AnotherOrder),
    Foreign(Payments.refund, give_back, {"amount_minor": 300}, "amount_minor", money.RefundReferenceReused),
    Foreign(Orders.place, place, {"user_id": BOB.id}, "user_id", IdempotencyKeyReused),
    Foreign(
        Orders.place, place, {"lines": (orders.PlaceLine(product_id=MUG, quantity=3),)}, "lines", IdempotencyKeyReused
    ),
    Foreign(Orders.place, place, {"fingerprint": b"other"}, "request", IdempotencyKeyReused),
    Foreign(Orders.pay, pay, {"another": ("id", another_order)}, "order_id", IdempotencyKeyReused),
    Foreign(Orders.pay, pay, {"fingerprint": b"other"}, "request", IdempotencyKeyReused),
    Foreign(Orders.refund, refund, {"another": ("payment_id", another_payment)}, "order_id", IdempotencyKeyReused),
    Foreign(Orders.refund, refund, {"amount_minor": 200}, "amount", IdempotencyKeyReused),
    Foreign(Orders.refund, refund, {"fingerprint": b"other"}, "request", IdempotencyKeyReused),
    Foreign(Orders.take_back, take_back, {"another": ("id", another_order)}, "order_id", IdempotencyKeyReused),
    Foreign(Orders.take_back, take_back, {"fingerprint": b"other"}, "request", IdempotencyKeyReused),
    *(
        Foreign(operation, at_the_bank(type_), {"amount_minor": 600}, "parameters", bank.SandboxKeyReused)
        for operation, type_ in ((Sandbox.authorize, bank.AuthorizeCharge), (Sandbox.charge, bank.ChargeCard))
    ),
    Foreign(Sandbox.capture, at_the_bank(bank.CaptureCharge), {"amount_minor": 1}, "parameters", bank.SandboxKeyReused),
    Foreign(
        Sandbox.refund,
        at_the_bank(bank.RefundCharge, amount_minor=2),
        {"amount_minor": 1},
        "parameters",
        bank.SandboxKeyReused,
    ),
    Foreign(Sandbox.void, at_the_bank(bank.VoidCharge), {"charge_id": 1}, "parameters", bank.SandboxKeyReused),
]


# --------------------------------------------------------------------------------------------------------------- tests


async def test_every_operation_with_a_key_is_in_the_table() -> None:
    contracts: list[type[Contract]] = list(topology.SERVICES.values())
    keyed = {
        operation.full_name
        for contract in contracts
        for operation in contract.operations.values()
        if operation.retry is Retry.KEYED
    }
    assert {each.operation.full_name for each in FOREIGN} == keyed


async def ask(harness: OrdersHarness, operation: Any, request: Message) -> Any:
    service = operation.full_name.partition(".")[0]
    with harness.acting(actor_of(operation)):
        return await getattr(harness.client(CONTRACTS[service]), operation.name)(request)


def actor_of(operation: Any) -> Actor:
    """Orders are placed and moved by staff; the rest is what services ask of each other."""
    return STAFF if operation.full_name.startswith("orders.") else Actor(SERVICE_ROLE)


def refused(harness: OrdersHarness, operation: Any, field: str) -> float:
    labels = {"operation": operation.full_name, "field": field}
    return harness.host.telemetry.registry.get_sample_value("mercato_keys_refused_total", labels) or 0.0


@pytest.mark.parametrize("each", FOREIGN, ids=lambda each: f"{each.operation.full_name}-{each.field}")
async def test_a_key_of_another_request_is_refused_counted_and_logged(
    shared_harness: OrdersHarness, each: Foreign
) -> None:
    harness = shared_harness
    with harness.acting(Actor(SERVICE_ROLE)):
        first: Any = await each.first(harness)
        changes: dict[str, Any] = dict(each.changes)
        if another := changes.pop("another", None):
            name, make = another
            changes[name] = await make(harness)
    done = await ask(harness, each.operation, first)
    assert not isinstance(done, ServiceError)
    before = refused(harness, each.operation, each.field)

    with capture_logs() as logs, pytest.raises(each.refusal) as refusal:
        _ = await ask(harness, each.operation, msgspec.structs.replace(first, **changes))

    if each.field in ("order_id", "user_id", "lines", "amount", "product_id", "currency", "method"):
        named = refusal.value.details.get("errors") or refusal.value.details["field"]
        assert each.field in str(named)
    assert refused(harness, each.operation, each.field) > before
    entry = next(log for log in logs if log["event"] == "key_refused")
    assert (entry["operation"], entry["field"]) == (each.operation.full_name, each.field)
    extra = entry.keys() - {"event", "log_level", "operation", "field", "code", "trace_id", "request_id"}
    assert all(name.endswith("_id") for name in extra)
    again = await ask(harness, each.operation, first)
    assert type(again) is type(done)
