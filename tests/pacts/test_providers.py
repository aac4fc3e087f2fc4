"""Every committed pact is verified against a real shop, and so are those of the last release. Each planted fault of the
provider is found."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import pytest_asyncio

from contracts.release import Releases
from mercato.testing.cluster import Cluster
from pacts.book import COMMITTED, path_of
from pacts.provider import Change, ProviderBridge, provider, unchanged

pytestmark = pytest.mark.asyncio(loop_scope="session")

PACTS = sorted(COMMITTED.glob("*.json"))
RELEASES = Releases()
RELEASED = [file for version in list(RELEASES.entries())[-1:] for file in RELEASES.pacts(version)]
"""Of the last release: 0.2.0 and those before have none."""


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def bridge(cluster: Cluster) -> AsyncGenerator[ProviderBridge]:
    async with provider(cluster) as made:
        yield made


@pytest.mark.parametrize("pact", PACTS, ids=lambda file: file.stem)
async def test_the_provider_keeps_the_pact(bridge: ProviderBridge, pact: Path):
    found = await bridge.verify(pact)
    assert found.is_kept, found.report


@pytest.mark.parametrize("pact", RELEASED, ids=lambda file: f"{file.parents[1].name}-{file.stem}")
async def test_the_provider_keeps_the_pact_of_the_last_release(bridge: ProviderBridge, pact: Path):
    found = await bridge.verify(pact)
    assert found.is_kept, found.report


# ------------------------------------------------------------------------------------------------------------- faults


def replaced(wanted: Any, change: Change) -> Change:
    """Changes every object that has the fields of `wanted`, wherever it is in an answer."""

    def changed(answer: Any) -> Any:
        if isinstance(answer, dict):
            found = {name: changed(value) for name, value in answer.items()}
            return change(found) if wanted <= found.keys() else found
        return [changed(each) for each in answer] if isinstance(answer, list) else answer

    return changed


def renamed(field: str, name: str) -> Change:
    return replaced({field}, lambda found: {name if key == field else key: value for key, value in found.items()})


def removed(field: str, beside: str) -> Change:
    return replaced({field, beside}, lambda found: {key: value for key, value in found.items() if key != field})


def with_value(field: str, value: Any) -> Change:
    return replaced({field}, lambda found: {**found, field: value})


class Fault(NamedTuple):
    consumer: str
    provider: str
    interaction: str
    change: Change


FAULTS = {
    "a field of an answer is renamed": Fault(
        "orders", "inventory", "stock is held until it is paid", renamed("state", "status")
    ),
    "a field of an answer has another type": Fault(
        "orders", "products", "a product is quoted", with_value("price_minor", "12.50")
    ),
    "a field of an answer is null": Fault(
        "orders", "payments", "an order is charged", with_value("captured_minor", None)
    ),
    "a value of an answer is another": Fault(
        "orders", "payments", "a charge is declined", with_value("status", "refused")
    ),
    "a field that is only decoded is gone": Fault(
        "inventory", "products", "a product is read", removed("category", "sku")
    ),
    "the code of an error is another": Fault(
        "orders", "inventory", "too little is in stock", with_value("code", "inventory.short")
    ),
    "the kind of an error is another": Fault(
        "orders", "users", "an unknown buyer is read", with_value("kind", "conflict")
    ),
    "a detail of an error is gone": Fault(
        "orders", "inventory", "too little is in stock", removed("available", "requested")
    ),
    "a field of an event is gone": Fault("products", "inventory", "stock.available", removed("product_id", "version")),
    "the type of an event is another": Fault("users", "orders", "refund.succeeded", with_value("type", "refund.done")),
    "a field that the gateway shows is renamed": Fault(
        "gateway", "inventory", "GET /products/7102/stock", renamed("reserved", "held")
    ),
    "a field that the gateway shows has another type": Fault(
        "gateway", "orders", "GET /orders/7601", with_value("total_minor", "25.00")
    ),
    "a field of a row of an event log is gone": Fault(
        "users", "orders", "a consumer goes on in the log", removed("at", "events")
    ),
    "an event log does not say that it is another": Fault(
        "events", "payments", "a consumer has read another log", with_value("code", "log.other")
    ),
    "a field of the API is renamed": Fault(
        "storefront", "mercato", "products are searched", renamed("in_stock", "available")
    ),
    "a problem of the API has another code": Fault(
        "storefront", "mercato", "a payment is declined", with_value("code", "payments.declined")
    ),
    "a field of the feed is gone": Fault(
        "warehouse", "mercato", "order.paid in the feed", removed("order_id", "user_id")
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_the_verification_finds_a_fault_of_the_provider(bridge: ProviderBridge, fault: str):
    planted = FAULTS[fault]
    bridge.change = planted.change
    try:
        found = await bridge.verify(path_of(planted.consumer, planted.provider), only=planted.interaction)
    finally:
        bridge.change = unchanged
    assert not found.is_kept
    assert not found.failed_states
    assert re.search(rf"\) Verifying a pact .* {re.escape(planted.interaction)}", found.output), found.output


async def test_a_state_that_the_provider_does_not_know_fails_and_is_named(
    bridge: ProviderBridge, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delitem(bridge.states.makers, "pieces in stock")
    found = await bridge.verify(path_of("orders", "inventory"), only="too little is in stock")
    assert not found.is_kept
    assert "'pieces in stock' is not in tests/pacts/states.py" in found.report


async def test_a_state_with_parameters_that_the_provider_does_not_know_fails(bridge: ProviderBridge):
    with pytest.raises(TypeError, match="colour"):
        await bridge.states.make("a product", {"product_id": 1, "price_minor": 1, "colour": "red"})


async def test_a_consumer_that_may_not_call_the_provider_is_refused(bridge: ProviderBridge, tmp_path: Path):
    pact = tmp_path / "pact.json"
    pact.write_text(path_of("orders", "inventory").read_text().replace('"name": "orders"', '"name": "users"'))
    found = await bridge.verify(pact, only="stock that was never held is released")
    assert not found.is_kept
    assert not found.failed_states
    assert "A caller with the role users may not call inventory.release." in found.output
