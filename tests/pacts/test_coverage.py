"""The pacts cover every call between services, and every event that a service reads."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mercato import topology
from mercato.chassis.messaging.outbox import event_log
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
    outside = {("storefront", "mercato"), ("warehouse", "mercato")}
    assert {tuple(file.stem.split("-")) for file in COMMITTED.glob("*.json")} == services | outside
