"""What etcd and Consul have in common as registries: the same suite over a real etcd and over a stand-in for Consul.

Consul itself is not tried: `registries/consul.py` says what the stand-in is.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import socket
import sys
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Protocol

import pytest

from mercato.chassis.rpc.discovery import Instance
from mercato.chassis.rpc.discovery.leased import LeasedRegistry
from mercato.testing.served import free_address
from mercato.testing.waiting import BOUND_SECONDS, until_true
from registries.consul import FakeConsul
from registries.etcd import Etcd, needs_etcd
from registries.stores import registry

TTL_SECONDS = 2
"""The shortest that etcd grants."""
TESTS = Path(__file__).parents[3]


class Place(Protocol):
    """Where processes register."""

    kind: str
    url: str

    async def stop(self) -> None: ...

    async def start(self) -> None: ...

    async def empty(self) -> None:
        """Starts again, without anything that it has kept."""
        ...

    async def delete_all(self, shop: str) -> None: ...

    async def write_nonsense(self, shop: str) -> None: ...

    def registered(self, shop: str) -> int:
        """How many records of a shop there are."""
        ...

    def writes(self, shop: str) -> int:
        """How often the records of a shop were written."""
        ...


class EtcdPlace:
    kind = "etcd"

    def __init__(self, etcd: Etcd) -> None:
        self.etcd = etcd
        self.url = etcd.urls[0]

    async def stop(self) -> None:
        self.etcd.kill()

    async def start(self) -> None:
        self.etcd.start()
        await until_true(self.etcd.answers)

    async def empty(self) -> None:
        self.etcd.kill()
        self.etcd.forget()
        await self.start()

    async def delete_all(self, shop: str) -> None:
        self.etcd.delete_below(f"/tests/{shop}/")

    async def write_nonsense(self, shop: str) -> None:
        for key, value in (
            ("a", "no record"),
            ("b", '{"id": "b", "address": "http://127.0.0.1:1", "services": ["orders"]}'),
            ("c", '{"id": "", "address": "127.0.0.1:1", "services": ["orders"]}'),
            ("d", '{"id": "d", "address": "127.0.0.1:1", "services": ["no name"]}'),
        ):
            self.etcd.put(f"/tests/{shop}/{key}", value)

    def registered(self, shop: str) -> int:
        return len(self.etcd.keys_below(f"/tests/{shop}/"))

    def writes(self, shop: str) -> int:
        return sum(version for _, version in self.etcd.keys_below(f"/tests/{shop}/"))


class ConsulPlace:
    kind = "consul"

    def __init__(self, consul: FakeConsul) -> None:
        self.consul = consul
        self.url = consul.url

    async def stop(self) -> None:
        await self.consul.stop()

    async def start(self) -> None:
        await self.consul.start()

    async def empty(self) -> None:
        await self.consul.stop()
        self.consul.forget()
        await self.consul.start()

    async def delete_all(self, shop: str) -> None:
        self.consul.services.clear()
        self.consul._until.clear()

    async def write_nonsense(self, shop: str) -> None:
        made = {"Name": f"tests-{shop}", "Check": {"CheckID": "for ever", "TTL": "600s"}, "Port": 1}
        self.consul._until["for ever"] = float("inf")
        for id_, address, tags, meta in (
            ("a", "127.0.0.1", ["orders"], None),
            ("b", "http://127.0.0.1", ["orders"], {"id": "b"}),
            ("c", "", ["orders"], {"id": "c"}),
            ("d", "127.0.0.1", None, {"id": "d"}),
            ("e", "127.0.0.1", ["no name"], {"id": "e"}),
        ):
            self.consul.services[id_] = {"ID": id_, "Address": address, "Tags": tags, "Meta": meta, **made}
        self.consul.index += 1

    def registered(self, shop: str) -> int:
        return len(self.consul.services)

    def writes(self, shop: str) -> int:
        return self.consul.requests.count("PUT /v1/agent/service/register")


@pytest.fixture(scope="module")
def etcd():
    with Etcd() as running:
        yield running


@pytest.fixture(params=[pytest.param("etcd", marks=needs_etcd), "consul"])
async def place(request: pytest.FixtureRequest) -> AsyncGenerator[Place]:
    if request.param == "etcd":
        yield EtcdPlace(request.getfixturevalue("etcd"))
        return
    consul = FakeConsul()
    await consul.start()
    yield ConsulPlace(consul)
    await consul.stop()


@pytest.fixture
def shop() -> str:
    return secrets.token_hex(8)


@contextlib.asynccontextmanager
async def opened(
    place: Place, shop: str, *, urls: Sequence[str] = (), ttl_seconds: int = 10, first_seconds: float = 60
) -> AsyncGenerator[LeasedRegistry]:
    made = registry(place.kind, urls or [place.url], shop, ttl_seconds=ttl_seconds, first_seconds=first_seconds)
    await made.open()
    try:
        yield made
    finally:
        await made.close()


def instance(service: str = "orders", *, port: int = 9083, id_: str = "", host: str = "127.0.0.1") -> Instance:
    return Instance(service, f"{host}:{port}", id_ or secrets.token_hex(4), "1.2.3")


async def until_found(registry: LeasedRegistry, wanted: Sequence[Instance], service: str = "orders") -> None:
    def found() -> bool:
        return sorted(registry.instances(service), key=str) == sorted(wanted, key=str)

    await until_true(found, f"{wanted} are found, and no others")


@contextlib.asynccontextmanager
async def process(place: Place, shop: str, wanted: Instance) -> AsyncGenerator[int]:
    """One of its own that has registered `wanted`; its id."""
    made = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "registries.instance",
        place.kind, place.url, shop, str(TTL_SECONDS), wanted.address, wanted.id,
        env={**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"}, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        assert made.stdout is not None
        async with asyncio.timeout(BOUND_SECONDS):
            await made.stdout.readuntil(b"registered\n")
        yield made.pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            made.kill()
        await made.communicate()


async def test_a_registered_instance_is_found_by_others_until_it_is_removed(place: Place, shop: str):
    async with opened(place, shop) as one, opened(place, shop) as other:
        notified: list[str] = []
        end = other.watch(notified.append)
        orders = instance()
        feed = Instance("orders.log", orders.address, orders.id, orders.version)
        more = instance(port=9183, host="[::1]")
        await asyncio.gather(*map(one.register, (orders, feed, more)))
        await one.register(orders)
        await until_found(other, [orders, more])
        await until_found(other, [feed], "orders.log")
        await until_found(one, [orders, more])
        assert set(notified) == {"orders", "orders.log"}
        assert other.instances("users") == ()

        await one.deregister(orders)
        await one.deregister(orders)
        await until_found(other, [more])
        await until_found(other, [feed], "orders.log")
        end()
        notified.clear()
        await one.deregister(more)
        await until_found(other, [])
        assert notified == []
        assert (one.problem(), other.problem()) == ("", "")


async def test_all_contracts_of_a_process_are_registered_by_one_request(place: Place, shop: str):
    names = [f"service{number}" for number in range(20)]
    async with opened(place, shop) as one:
        await asyncio.gather(*(one.register(instance(name, id_="one")) for name in names))
        for name in names:
            await until_found(one, [instance(name, id_="one")], name)
        assert place.writes(shop) == 1


async def test_an_opened_registry_has_found_all_instances(place: Place, shop: str):
    async with opened(place, shop) as one:
        wanted = instance()
        await one.register(wanted)
        async with opened(place, shop) as later:
            assert list(later.instances("orders")) == [wanted]


async def test_a_closed_registry_has_removed_what_it_registered(place: Place, shop: str):
    """Its TTL is longer than the test."""
    async with opened(place, shop) as other:
        async with opened(place, shop, ttl_seconds=600) as one:
            wanted = instance()
            await one.register(wanted)
            await until_found(other, [wanted])
        await until_found(other, [])


async def test_records_of_another_shop_are_ignored(place: Place, shop: str):
    async with opened(place, shop) as one, opened(place, f"{shop}0") as elsewhere:
        theirs, ours = instance(), instance()
        await elsewhere.register(theirs)
        await until_found(elsewhere, [theirs])
        await one.register(ours)
        await until_found(one, [ours])
        assert list(elsewhere.instances("orders")) == [theirs]


async def test_records_of_others_are_validated(place: Place, shop: str):
    async with opened(place, shop) as one:
        await place.write_nonsense(shop)
        wanted = instance()
        await one.register(wanted)
        await until_found(one, [wanted])
        assert one.instances("no name") == ()
        assert one.problem() == ""


async def test_a_process_that_is_killed_disappears_when_its_ttl_is_over(place: Place, shop: str):
    async with opened(place, shop) as other:
        wanted = instance()
        async with process(place, shop, wanted) as pid:
            await until_found(other, [wanted])
            os.kill(pid, signal.SIGKILL)
            await until_found(other, [])


async def test_a_process_that_stood_still_for_longer_than_its_ttl_registers_again(place: Place, shop: str):
    async with opened(place, shop) as other:
        wanted = instance()
        async with process(place, shop, wanted) as pid:
            await until_found(other, [wanted])
            os.kill(pid, signal.SIGSTOP)
            await until_found(other, [])
            os.kill(pid, signal.SIGCONT)
            await until_found(other, [wanted])


@pytest.mark.long
async def test_a_process_that_renews_outlives_its_ttl(place: Place, shop: str):
    async with opened(place, shop) as other, opened(place, shop, ttl_seconds=3 * TTL_SECONDS) as one:
        notified: list[str] = []
        wanted, paused = instance(), instance()
        await one.register(wanted)
        async with process(place, shop, paused) as pid:
            await until_found(other, [wanted, paused])
            other.watch(notified.append)
            for _ in range(4):  # each takes a TTL of the process
                os.kill(pid, signal.SIGSTOP)
                await until_found(other, [wanted])
                os.kill(pid, signal.SIGCONT)
                await until_found(other, [wanted, paused])
        assert len(notified) == 8, "no change but those of the other"


async def test_an_unavailable_registry_removes_no_instance(place: Place, shop: str):
    async with opened(place, shop) as one, opened(place, shop) as other:
        wanted, more = instance(), instance()
        await one.register(wanted)
        await until_found(other, [wanted])
        await place.stop()
        await until_true(other.problem)
        assert other.problem().endswith("; the instances that were known last stay in use.")
        assert place.url.partition("://")[2] in other.problem()
        await one.register(more)  # arrives when the registry is back
        assert list(other.instances("orders")) == [wanted]

        await place.start()
        await until_found(other, [wanted, more])
        await until_true(lambda: not other.problem() and not one.problem())


async def test_instances_are_registered_again_after_a_registry_has_lost_its_data(place: Place, shop: str):
    async with opened(place, shop, ttl_seconds=TTL_SECONDS) as one, opened(place, shop) as other:
        wanted, more = instance(), instance()
        await one.register(wanted)
        await until_found(other, [wanted])
        await place.empty()
        await one.register(more)
        await until_found(other, [wanted, more])


async def test_a_record_that_was_deleted_by_hand_is_written_again(place: Place, shop: str):
    async with opened(place, shop, ttl_seconds=TTL_SECONDS) as one, opened(place, shop) as other:
        wanted = instance()
        await one.register(wanted)
        await until_found(other, [wanted])
        await place.delete_all(shop)
        await until_true(lambda: place.registered(shop) == 1)
        await until_found(other, [wanted])


async def test_a_process_opens_without_a_registry_and_finds_it_later(place: Place, shop: str):
    await place.stop()
    async with opened(place, shop, first_seconds=0.1) as one:
        wanted = instance()
        await one.register(wanted)
        assert one.instances("orders") == ()
        await until_true(one.problem)
        await place.start()
        await until_found(one, [wanted])


async def test_a_process_closes_without_a_registry(place: Place, shop: str):
    async with opened(place, shop, ttl_seconds=TTL_SECONDS) as one:
        await one.register(instance())
        await place.stop()
    await place.start()


@pytest.mark.parametrize("silent", [False, True], ids=["refuses", "does not answer"])
async def test_one_of_two_endpoints_is_enough(place: Place, shop: str, silent: bool):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        dead = f"http://127.0.0.1:{listener.getsockname()[1]}" if silent else f"http://{free_address()}"
        async with (
            opened(place, shop, urls=[dead, place.url]) as one,
            opened(place, shop, urls=[place.url, dead]) as two,
        ):
            wanted, more = instance(), instance()
            await one.register(wanted)
            await two.register(more)
            await until_found(one, [wanted, more])
            await until_found(two, [wanted, more])
            assert (one.problem(), two.problem()) == ("", "")
