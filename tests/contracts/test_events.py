"""Events are contracts: each type is declared with its message, and nothing else is emitted or read."""

from __future__ import annotations

from typing import ClassVar, get_args

import pytest

from mercato import topology
from mercato.chassis.contract import Contract, Message
from mercato.chassis.messaging.events import Outgoing, declared_only, decoder
from mercato.chassis.postgres import outbox_row
from mercato.contracts.inventory import StockStepKind
from mercato.contracts.orders import Orders
from mercato.contracts.payments import Payments, Status
from mercato.services.orders import rules as orders
from mercato.services.payments import rules as payments
from mercato.testing.assertions import needs_assertions
from mercato.testing.shop import Shop as OpenShop


class Changed(Message):
    n: int


class Other(Message):
    n: int


class Shop(Contract, name="events_test"):
    events: ClassVar = {"thing.changed": Changed, "thing.gone": Changed}


def outgoing(type_: str, data: Message) -> Outgoing:
    return Outgoing(type_, "thing", 1, 1, data)


def test_declared_events_are_packed_as_always():
    events = [outgoing("thing.changed", Changed(n=1)), outgoing("thing.gone", Changed(n=2))]

    assert declared_only(Shop)(events) == outbox_row.pack(events)


@needs_assertions
@pytest.mark.parametrize(
    ("type_", "data", "sentence"),
    [
        ("thing.made", Changed(n=1), "events_test emits thing.made with Changed: its contract declares no such event"),
        ("thing.changed", Other(n=1), "events_test emits thing.changed with Other: its contract declares Changed"),
    ],
)
def test_an_undeclared_event_is_refused(type_: str, data: Message, sentence: str):
    with pytest.raises(AssertionError, match=sentence):
        declared_only(Shop)([outgoing("thing.gone", Changed(n=1)), outgoing(type_, data)])


def test_a_consumer_decodes_with_the_declared_message():
    assert decoder(Shop, Changed, "thing.changed", "thing.gone")('{"n": 7, "newer": 1}') == Changed(n=7)


@needs_assertions
@pytest.mark.parametrize(("message", "type_"), [(Other, "thing.changed"), (Changed, "thing.made")])
def test_a_consumer_of_another_message_or_type_is_refused_at_once(message: type[Message], type_: str):
    with pytest.raises(AssertionError, match="events_test emits thing"):
        decoder(Shop, message, type_)


@needs_assertions
@pytest.mark.parametrize("type_", ["thing", "Thing.changed", "thing.changed2", "thing.changed.again", "thing changed"])
def test_a_contract_refuses_what_is_no_type_of_an_event(type_: str):
    with pytest.raises(AssertionError, match="no types of events"):
        type("Wrong", (Contract,), {"events": {type_: Changed}}, name="wrong")


def test_a_type_is_declared_by_one_service():
    declared = [type_ for contract in topology.SERVICES.values() for type_ in contract.events]

    assert len(set(declared)) == len(declared)


# ------------------------------------------------------------------------- what services emit is what they declare


def test_every_state_of_an_order_has_its_event():
    states = {f"order.{state}" for moves in orders.AXES.values() for state in moves if state != "pending"}
    states -= {"order.unfulfilled"}  # every order begins so, and none returns to it

    others = {"order.placed", orders.PARTIALLY_RETURNED, orders.CLAIMED, "refund.succeeded"}
    assert states | others == Orders.events.keys()


def test_every_state_of_a_payment_has_its_event():
    assert set(payments.EVENTS.values()) == Payments.events.keys()
    assert set(payments.EVENTS) == set(get_args(Status)) - {"pending"}


def test_every_step_of_stock_has_its_event():
    declared = topology.SERVICES["inventory"].events

    assert {f"stock.{what}" for what in get_args(StockStepKind)} <= declared.keys()


@pytest.mark.asyncio(loop_scope="session")
async def test_a_service_has_an_outbox_where_its_contract_declares_events(open_shop: OpenShop):
    """Without an outbox events would be lost; without declared events there is nothing to put into one."""
    services = open_shop.harness.host.services
    declares = {name: bool(service.server.contract.events) for name, service in services.items()}

    assert {name: service.has_outbox for name, service in services.items()} == declares
    assert sum(declares.values()) >= 3
