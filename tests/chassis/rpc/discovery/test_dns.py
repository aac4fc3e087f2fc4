"""The registry that is DNS: addresses come and go, the resolver fails, and listeners are notified of changes alone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence

from mercato.chassis.rpc.discovery.dns import DnsRegistry, resolve
from mercato.testing.waiting import until_true

NAMES = {"orders": "orders.shop:9083", "users": "users.shop:9081"}


class Resolver:
    """Answers from a table by host; what is an error it raises."""

    def __init__(self) -> None:
        self.answers: dict[str, list[str] | OSError] = {"orders.shop": ["10.0.0.1"], "users.shop": ["10.0.0.9"]}
        self.asked = 0
        self.waits: asyncio.Event | None = None

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked += 1
        if self.waits is not None:
            await self.waits.wait()
        answer = self.answers[host]
        if isinstance(answer, OSError):
            raise answer
        return [f"{address}:{port}" for address in answer]


@contextlib.asynccontextmanager
async def opened(resolver: Resolver) -> AsyncGenerator[DnsRegistry]:
    registry = DnsRegistry(NAMES, resolve=resolver, seconds=0.01)
    await registry.open()
    try:
        yield registry
    finally:
        await registry.close()


def addresses(registry: DnsRegistry, service: str) -> list[str]:
    return [instance.address for instance in registry.instances(service)]


async def test_the_addresses_of_a_name_are_its_instances():
    async with opened(Resolver()) as registry:
        assert addresses(registry, "orders") == ["10.0.0.1:9083"]
        assert addresses(registry, "users") == ["10.0.0.9:9081"]
        assert addresses(registry, "payments") == []
        assert [instance.name for instance in registry.instances("orders")] == ["orders.shop"]


async def test_instances_come_and_go_and_each_change_is_notified_once():
    resolver, notified = Resolver(), list[str]()
    async with opened(resolver) as registry:
        end = registry.watch(notified.append)
        resolver.answers["orders.shop"] = ["10.0.0.1", "10.0.0.2"]
        await until_true(lambda: len(addresses(registry, "orders")) == 2)
        resolver.answers["orders.shop"] = ["10.0.0.2"]
        await until_true(lambda: addresses(registry, "orders") == ["10.0.0.2:9083"])
        assert notified == ["orders", "orders"]
        end()
        resolver.answers["orders.shop"] = ["10.0.0.3"]
        await until_true(lambda: addresses(registry, "orders") == ["10.0.0.3:9083"])
        assert notified == ["orders", "orders"]


async def test_a_resolver_that_fails_takes_no_instance_away():
    resolver = Resolver()
    async with opened(resolver) as registry:
        resolver.answers["orders.shop"] = OSError("no such name")
        asked = resolver.asked
        await until_true(lambda: resolver.asked > asked + 6)
        assert addresses(registry, "orders") == ["10.0.0.1:9083"]
        assert "DNS gives no answer for orders;" in registry.problem()
        resolver.answers["orders.shop"] = ["10.0.0.7"]
        await until_true(lambda: addresses(registry, "orders") == ["10.0.0.7:9083"])
        assert registry.problem() == ""


async def test_it_opens_without_an_answer_and_closes_while_it_waits_for_one():
    resolver = Resolver()
    resolver.answers["orders.shop"] = OSError("no such name")
    async with opened(resolver) as registry:
        assert addresses(registry, "orders") == []
        resolver.waits = asyncio.Event()
        asked = resolver.asked
        await until_true(lambda: resolver.asked > asked)


async def test_the_resolver_of_the_system():
    assert "127.0.0.1:80" in await resolve("localhost", 80)
    assert await resolve("::1", 80) == ["[::1]:80"]
