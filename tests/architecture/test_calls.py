"""What each service is known to call: that it calls no more, its client sees to; here, that it calls no less."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest

import mercato
from mercato import topology
from mercato.chassis.contract import Operation
from mercato.chassis.hosting.host import GATEWAY, Host
from mercato.chassis.messaging.events import Subscription
from mercato.chassis.observability.clock import SystemClock
from mercato.chassis.observability.telemetry import Telemetry
from mercato.gateway.app import Gateway
from mercato.gateway.routes import ROUTES

ROOT = Path(mercato.__file__).parent.parent


def attributes(service: str) -> set[str]:
    """The names of all attributes that the code of a service uses."""
    folder = ROOT / topology.package(service).replace(".", "/")
    trees = [ast.parse(path.read_text()) for path in folder.rglob("*.py")]
    return {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


@pytest.mark.parametrize("service", topology.SERVICES)
def test_a_service_calls_what_it_is_known_to_call(service: str):
    used = attributes(service)

    assert [operation.full_name for operation in topology.CALLS[service] if operation.name not in used] == []
    assert all(operation.service != service for operation in topology.CALLS[service]), "a service calls itself directly"


def test_no_two_services_call_each_other():
    """Such a pair cannot start, drain or fail apart; consumers pull the event log instead, which is no call back."""
    pairs = {(caller, operation.service) for caller, calls in topology.CALLS.items() for operation in calls}

    assert {(one, other) for one, other in pairs if (other, one) in pairs} == set()


def test_each_service_reads_the_logs_that_it_is_known_to_read():
    """A server refuses all other readers."""
    subscribed = {
        service: sorted({source for wanted in subscriptions(service) for source in wanted.sources})
        for service in topology.SERVICES
    }

    assert {service: sources for service, sources in subscribed.items() if sources} == {
        service: sorted(sources) for service, sources in topology.READS.items()
    }


def subscriptions(service: str) -> Sequence[Subscription]:
    secrets, dsns = {service: bytes(32)}, {service: "postgresql:///not_opened"}
    host = Host(topology.builds([service]), dsns, secrets=secrets)
    return host.services[service].subscriptions


def test_only_services_speak_for_the_shop_and_the_operator_is_staff():
    roles = {caller: grant.roles for caller, grant in topology.grants().items() if grant.roles is not None}

    assert roles == {"gateway": frozenset({"anonymous", "customer", "staff"}), "operator": frozenset({"staff"})}


def test_the_gateway_may_call_every_operation_of_its_routes() -> None:
    """The calls of a gateway in a process of its own are refused by the services, unless they are listed."""
    called: set[str] = set()

    def client(operation: Operation[Any, Any]) -> Any:
        called.add(operation.full_name)
        return operation

    Gateway(
        ROUTES,
        client=client,
        authenticator=cast(Any, None),
        telemetry=Telemetry(),
        clock=SystemClock(),
        fallback=cast(Any, None),
    )

    assert "orders.guest_payment" in called
    assert called <= {operation.full_name for operation in topology.called_by(GATEWAY)}
