"""What Consul alone has as a registry, by a stand-in (`registries/consul.py`): Consul itself is not tried."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from mercato.chassis.rpc.discovery import Instance
from mercato.chassis.rpc.discovery.consul import ConsulStore
from mercato.chassis.rpc.discovery.leased import LeasedRegistry, StoreRefused
from mercato.testing.waiting import until_true
from registries.consul import FakeConsul

NAME = "mercato-0123456789abcdef"
ONE = Instance("orders", "127.0.0.1:9083", "one", "1.2.3")
TOKEN = "a token"


@pytest.fixture
async def consul() -> AsyncGenerator[FakeConsul]:
    running = FakeConsul()
    await running.start()
    yield running
    await running.stop()


@contextlib.asynccontextmanager
async def opened(*urls: str, **options: Any) -> AsyncGenerator[LeasedRegistry]:
    registry = LeasedRegistry(ConsulStore(urls, NAME, wait_seconds=1, **options), ttl_seconds=2, first_seconds=60)
    try:
        await registry.open()
        yield registry
    finally:
        await registry.close()


async def test_what_is_registered_can_be_read_by_people_and_by_consul_s_dns(consul: FakeConsul):
    async with opened(consul.url) as registry:
        await registry.register(ONE)
        await registry.register(Instance("orders.log", ONE.address, ONE.id, ONE.version))
        (said,) = consul.services.values()
    assert said == {
        "ID": f"{NAME}-one-9083",
        "Name": NAME,
        "Address": "127.0.0.1",
        "Port": 9083,
        "Tags": ["orders", "orders.log"],
        "Meta": {"id": "one", "version": "1.2.3"},
        "Check": {
            "CheckID": f"service:{NAME}-one-9083",
            "TTL": "10s",
            "Status": "passing",
            "DeregisterCriticalServiceAfter": "1m",
        },
    }
    assert consul.services == {}


async def test_a_token_goes_along_and_a_wrong_one_is_refused(consul: FakeConsul):
    consul.token = TOKEN
    async with opened(consul.url, token=TOKEN) as registry:
        await registry.register(ONE)
        await until_true(lambda: list(registry.instances("orders")) == [ONE])
    with pytest.raises(StoreRefused, match="look at MERCATO_REGISTRY_TOKEN") as refused:
        async with opened(consul.url, token="hunter2"):
            pass
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    ("failure", "words"),
    [((500, "No cluster leader"), "answers 500: No cluster leader"), ((200, "<html>"), "is not the API of Consul")],
)
async def test_an_unusable_agent_is_named(consul: FakeConsul, failure: tuple[int, str], words: str):
    async with opened(consul.url) as registry:
        await registry.register(ONE)
        await until_true(lambda: list(registry.instances("orders")) == [ONE])
        consul.failure = failure
        await until_true(lambda: words in registry.problem())
        assert list(registry.instances("orders")) == [ONE]
        consul.failure = None
        await until_true(lambda: not registry.problem())


async def test_an_index_that_goes_back_begins_anew(consul: FakeConsul):
    async with opened(consul.url) as registry:
        await registry.register(ONE)
        await until_true(lambda: list(registry.instances("orders")) == [ONE])
        consul.forget()
        asked = len(consul.requests)
        await until_true(lambda: f"GET /v1/health/service/{NAME}?passing=true" in consul.requests[asked:])
        await until_true(lambda: list(registry.instances("orders")) == [ONE])


async def test_an_unusable_agent_is_replaced_by_the_next(consul: FakeConsul):
    other = FakeConsul()
    await other.start()
    try:
        consul.failure = (500, "No cluster leader")
        async with opened(consul.url, other.url) as registry:
            await registry.register(ONE)
            await until_true(lambda: list(registry.instances("orders")) == [ONE])
    finally:
        await other.stop()
