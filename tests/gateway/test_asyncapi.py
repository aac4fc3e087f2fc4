"""The description of the events: true, complete, and valid AsyncAPI 3."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from jsonschema import Draft202012Validator

from mercato import topology
from mercato.chassis.messaging.stream import SUBJECT
from mercato.gateway import asyncapi
from mercato.gateway.routes import ROUTES
from mercato.gateway.routes.events import KNOWN_TYPES
from mercato.testing.event_stream import event_stream
from mercato.testing.shop import Shop
from mercato.testing.shop_data import new_order, new_person
from system.clients.tools import EVENT_PACKAGES, HERE, INSTALL_SECONDS, event_tools, is_node_missing

DOCUMENT: Any = msgspec.json.decode(msgspec.json.encode(asyncapi.document()))


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for part in value.values():
            yield from references(part)
    elif isinstance(value, list):
        for part in value:
            yield from references(part)


def resolved(reference: str) -> Any:
    found = DOCUMENT
    for name in reference.removeprefix("#/").split("/"):
        found = found[name]
    return found


def validator(name: str) -> Draft202012Validator:
    schema = {**DOCUMENT["components"]["messages"][name]["payload"], "components": DOCUMENT["components"]}
    return Draft202012Validator(schema)


def test_every_reference_leads_somewhere():
    found = set(references(DOCUMENT))
    assert found
    assert all(resolved(reference) is not None for reference in found)


def test_every_event_of_every_contract_is_described_and_no_other():
    declared = {name for contract in topology.SERVICES.values() for name in contract.events}
    assert {one.type for one in asyncapi.events()} == declared == KNOWN_TYPES
    assert set(DOCUMENT["components"]["messages"]) == declared | {asyncapi.SNAPSHOT}
    assert set(DOCUMENT["channels"]["feed"]["messages"]) == declared


def test_the_channels_are_the_streams_of_the_api_and_the_subjects_of_the_bridge():
    addresses = {channel["address"] for channel in DOCUMENT["channels"].values()}
    streams = {route.path for route in ROUTES if route.stream}
    assert addresses == streams | {f"{SUBJECT}.{name}" for name in KNOWN_TYPES}
    assert set(DOCUMENT["operations"]) == set(DOCUMENT["channels"])


@pytest.mark.parametrize("name", sorted(DOCUMENT["components"]["messages"]))
def test_the_payload_of_a_message_has_a_valid_schema(name: str):
    Draft202012Validator.check_schema(DOCUMENT["components"]["messages"][name]["payload"])


@pytest.mark.asyncio(loop_scope="session")
async def test_what_a_stream_sends_is_as_described(open_shop: Shop):
    person = await new_person(open_shop)
    order_id = await new_order(open_shop, person.id)
    async with event_stream(open_shop.url, f"/orders/{order_id}/events") as stream:
        snapshot = await stream.event(asyncapi.SNAPSHOT)
    async with event_stream(open_shop.url, f"/orders/{order_id}/events?after=0") as stream:
        placed = await stream.event("order.placed")
    shown = (await open_shop.get("/asyncapi.json")).json

    assert shown == DOCUMENT
    for message in (snapshot, placed):
        assert list(validator(message.event).iter_errors(message.data)) == []
    assert list(validator("order.paid").iter_errors(placed.data)) != []


def found_by_the_validator(document: Any) -> list[str]:
    try:
        packages = event_tools()
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        pytest.skip(f"the document was not validated: this has failed: npm install {' '.join(EVENT_PACKAGES)}")
    done = subprocess.run(
        ["node", str(HERE / "asyncapi.cjs")],
        input=msgspec.json.encode(document),
        env={**os.environ, "NODE_PATH": str(packages)},
        stdout=subprocess.PIPE,
        timeout=INSTALL_SECONDS,
        check=True,
    )
    return done.stdout.decode().splitlines()


@pytest.mark.slow
@pytest.mark.skipif(is_node_missing(), reason="the document was not validated: Node and npm are missing")
def test_the_validator_of_asyncapi_finds_no_fault():
    assert found_by_the_validator(DOCUMENT) == []
    broken = {**DOCUMENT, "operations": {"feed": {"action": "tell", "channel": {"$ref": "#/channels/feed"}}}}
    assert found_by_the_validator(broken) != []
