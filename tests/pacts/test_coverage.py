"""The pacts cover every call between services, and every event that a service reads."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mercato import topology
from mercato.chassis.hosting.host import GATEWAY
from mercato.chassis.messaging.outbox import event_log
from mercato.gateway.routes import ROUTES
from mercato.services.events.app import SOURCES
from mercato.services.products.consumers import IN_STOCK
from mercato.services.users.consumers import SECURITY_LOG
from pacts.book import COMMITTED, path_of
from pacts.rpc import provider_of

CALLS: list[tuple[str, Any]] = [
    *((consumer, operation) for consumer, operations in topology.CALLS.items() for operation in operations),
    *((consumer, event_log(source).read) for consumer, sources in topology.READS.items() for source in sources),
]


def interactions(consumer: str, provider: str) -> list[dict[str, Any]]:
    file = path_of(consumer, provider)
    return json.loads(file.read_text())["interactions"] if file.exists() else []


OTHERWISE_TESTED = frozenset(
    {
        # Their requests have what no state can know before: tokens, links, sessions.
        *("users.refresh", "users.sign_out", "users.reset_password", "users.prove_email", "users.send_proof"),
        *("users.change_password", "users.sessions", "users.end_session", "users.end_other_sessions"),
        *("orders.claim", "orders.guest_payment"),
        # They succeed once, or leave nothing to ask again.
        *("users.register", "users.register_without_password", "users.forgot_password", "users.erase"),
        *("products.create", "inventory.adjust", "orders.take_back", "orders.refund", "orders.pay"),
        *("orders.capture_part", "orders.void", "orders.one_refund", "orders.payment_refunds"),
        # A fingerprint is of bytes, which JSON has not; a storefront places orders (`storefront-mercato.json`).
        "orders.place",
        # They wait, or are of the forms of a reference system (`tests/reference`).
        *("orders.settled", "events.follow", "users.sign_in_named", "products.find"),
        # Of the security log, which has what other tests have done.
        *("users.security_log", "users.own_security_log"),
    }
)
"""The operations of routes without a pact of the gateway: the tests of the gateway and the storefront have them."""


def test_an_operation_of_a_route_has_an_interaction_of_the_gateway_or_a_reason():
    routed = {operation.full_name: operation for route in ROUTES for operation in route.operations}
    stated = {
        name
        for name, operation in routed.items()
        if any(
            path_in(each) == f"/rpc/{operation.service}/{operation.name}"
            for each in interactions(GATEWAY, operation.service)
        )
    }
    assert stated.isdisjoint(OTHERWISE_TESTED)
    assert stated | OTHERWISE_TESTED == routed.keys()


def path_in(interaction: dict[str, Any]) -> str:
    """Of a call; empty for an event."""
    return interaction["request"]["path"] if "request" in interaction else ""


@pytest.mark.parametrize(("consumer", "operation"), CALLS, ids=lambda value: getattr(value, "full_name", value))
def test_a_call_between_services_has_an_interaction_that_succeeds(consumer: str, operation: Any):
    path = f"/rpc/{operation.service}/{operation.name}"
    found = [each for each in interactions(consumer, provider_of(operation.service)) if path_in(each) == path]
    succeed = [each for each in found if "body" in each["response"]["body"]["content"][0]]
    assert succeed, f"{consumer} calls {operation.full_name}: a test in tests/pacts states what it needs of the answer"


@pytest.mark.parametrize("subscription", [SECURITY_LOG, IN_STOCK], ids=lambda each: each.consumer)
def test_an_event_that_a_service_subscribes_to_has_a_message(subscription: Any):
    consumer = subscription.consumer.partition(".")[0]
    stated = {
        each["contents"]["content"]["type"]
        for source in subscription.sources
        for each in interactions(consumer, source)
        if each["type"] == "Asynchronous/Messages"
    }
    assert stated == subscription.types


def test_the_feed_has_a_message_of_each_source():
    assert {source for source in topology.READS["events"] if interactions("events", source)} == set(SOURCES)


def test_no_pact_is_of_a_consumer_that_calls_no_longer():
    services = {(consumer, provider_of(operation.service)) for consumer, operation in CALLS}
    gateway = {(GATEWAY, operation.service) for route in ROUTES for operation in route.operations}
    outside = {("storefront", "mercato"), ("warehouse", "mercato")}
    assert {tuple(file.stem.split("-")) for file in COMMITTED.glob("*.json")} == services | gateway | outside
