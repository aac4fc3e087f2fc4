"""A shop that is split, from outside: the official JavaScript client finds it, calls it, and takes its events."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from embedded_nats.subscriber import delete_store, subscriber_file
from mercato import topology
from mercato.chassis.hosting.keys import nats_password, service_secrets, signing_seed
from mercato.testing.caller import Buyers, everything
from mercato.testing.process import Process, used_folder
from mercato.testing.served import variables
from mercato.testing.waiting import BOUND_SECONDS, wait_until
from system.nats_js.client import MISSING, Script, is_missing

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(is_missing(), reason=MISSING),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it looks into /proc"),
]

EVENTS = 60
LIST_MS = 2_000


@pytest.fixture(scope="module")
def shop(packages: Path) -> Iterator[Process]:
    with used_folder() as data, Process(data, "--split", "--replicas", "events=2") as made:
        yield made.ready()
        made.stop()


def credentials(shop: Process, user: str) -> dict[str, str]:
    """What `subscriber.env` says, and for a caller what `mercato migrate` would write for it."""
    parts = urlsplit(variables(subscriber_file(shop.data))["NATS_URL"])
    url = f"nats://{parts.hostname}:{parts.port}"
    if user == topology.SUBSCRIBER:
        assert parts.username == user
        return {"url": url, "user": user, "password": parts.password or ""}
    secret = service_secrets((shop.data / "secret").read_bytes(), [user])[user]
    return {"url": url, "user": user, "password": nats_password(secret), "seed": signing_seed(secret).hex()}


def test_the_operator_lists_inspects_and_calls(shop: Process, packages: Path):
    requests = [{"id": 100}, {"id": 999_999}]
    given = {"listMs": LIST_MS, "operation": "products.get", "requests": requests}
    with Script("operator.cjs", packages, {**credentials(shop, topology.OPERATOR), **given}) as script:
        found: dict[str, Any] = json.loads(script.result())
    # The event logs of some services are services too: `orders-log`.
    services = [one["name"] for one in found["ping"] if not one["name"].endswith("-log")]
    assert sorted(services) == sorted([*topology.SERVICES, "events"])
    for verb in ("info", "stats"):
        assert sorted(one["id"] + one["name"] for one in found[verb]) == sorted(
            one["id"] + one["name"] for one in found["ping"]
        )
    subjects = {endpoint["subject"] for one in found["info"] for endpoint in one["endpoints"]}
    offered = [operation for contract in topology.SERVICES.values() for operation in contract.operations.values()]
    assert {f"mercato.{operation.full_name}" for operation in offered} <= subjects

    product, unknown = found["call"]["outcomes"]
    with shop.caller() as caller:
        shown = caller.get("/products/100").json
    assert (product["body"]["sku"], product["body"]["name"]) == (shown["sku"], shown["name"])
    assert unknown["error"]["code"] == "products.not_found"
    assert found["asAnother"] == {"refused": "untrusted"}


def test_a_subscriber_takes_each_event_once_and_in_order(shop: Process, packages: Path, tmp_path: Path):
    file = tmp_path / "taken.json"
    given = {**credentials(shop, topology.SUBSCRIBER), "file": str(file)}

    def taken() -> list[int]:
        return json.loads(file.read_text())["taken"] if file.exists() else []

    def until_more() -> None:
        before = len(taken())
        wait_until(lambda: len(taken()) >= before + EVENTS, BOUND_SECONDS, lambda: f"{len(taken())} of {before}")

    with Buyers(shop.caller) as buyers:
        with Script("subscriber.cjs", packages, given) as script:
            until_more()
            script.kill()
        with Script("subscriber.cjs", packages, given) as script:
            until_more()
            delete_store(shop)
            until_more()
            assert script.is_running
    with Script("subscriber.cjs", packages, given) as script:
        assert buyers.placed

        def has_all() -> bool:
            with shop.caller() as caller:
                feed = [entry["position"] for entry in everything(caller, "/events?limit=500")]
            return taken()[-1:] == feed[-1:]

        wait_until(has_all, BOUND_SECONDS)
        with shop.caller() as caller:
            assert taken() == [entry["position"] for entry in everything(caller, "/events?limit=500")]
        script.ask_to_stop()
        script.result()
    # The store was really deleted: what had been taken came once more, and was passed over.
    assert json.loads(file.read_text())["passedOver"] >= 2 * EVENTS
