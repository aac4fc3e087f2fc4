"""Multicast DNS as a registry, on loopback alone."""

from __future__ import annotations

import contextlib
import secrets
import socket
from collections.abc import AsyncGenerator, Sequence

import pytest
from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf

from mercato.chassis.rpc.discovery import Instance
from mercato.chassis.rpc.discovery.mdns import FIRST_SECONDS, TYPE, MdnsRegistry
from mercato.testing.waiting import until_true

LOOPBACK = ("127.0.0.1",)


@pytest.fixture
def shop() -> str:
    """Other tests announce at the same time."""
    return secrets.token_hex(8)


@contextlib.asynccontextmanager
async def opened(shop: str, *, check_seconds: float = 0.05, first_seconds: float = 0.0) -> AsyncGenerator[MdnsRegistry]:
    registry = MdnsRegistry(shop, LOOPBACK, check_seconds=check_seconds, first_seconds=first_seconds)
    await registry.open()
    try:
        yield registry
    finally:
        await registry.close()


@contextlib.contextmanager
def listening(port: int = 0):
    with socket.create_server(("127.0.0.1", port)) as listener:
        yield listener.getsockname()[1]


def made(port: int, service: str = "orders", id_: str = "") -> Instance:
    return Instance(service, f"127.0.0.1:{port}", id_ or secrets.token_hex(4), "1.2.3")


async def until_found(registry: MdnsRegistry, wanted: Sequence[Instance], service: str = "orders") -> None:
    def found() -> bool:
        return sorted(registry.instances(service), key=str) == sorted(wanted, key=str)

    await until_true(found, f"{wanted} are found, and no others")


async def test_a_registered_instance_is_found_by_others_until_it_is_removed(shop: str):
    async with opened(shop) as one, opened(shop) as other:
        notified: list[str] = []
        end = other.watch(notified.append)
        with listening() as first, listening() as second:
            orders, log, more = made(first), made(first, "orders.log"), made(second)
            for instance in (orders, log, more):
                await one.register(instance)
            await one.register(orders)
            await until_found(other, [orders, more])
            await until_found(other, [log], "orders.log")
            await until_found(one, [orders, more])
            assert set(notified) == {"orders", "orders.log"}

            await one.deregister(orders)
            await one.deregister(orders)
            await until_found(other, [more])
            end()
            notified.clear()
            await one.deregister(more)
            await until_found(other, [])
            assert notified == []


async def test_a_registry_that_opens_later_finds_the_registered_instances(shop: str):
    async with opened(shop) as one:
        with listening() as port:
            instance = made(port)
            await one.register(instance)
            async with opened(shop) as other:
                await until_found(other, [instance])


@pytest.mark.long
async def test_an_opened_registry_has_found_all_instances(shop: str):
    """Processes of one machine share the port of mDNS, and a packet to it that is not multicast reaches one of them."""
    async with contextlib.AsyncExitStack() as stack:
        port = stack.enter_context(listening())  # it has room for as many connections as are not accepted here
        wanted: list[Instance] = []
        for _ in range(4):
            registry = await stack.enter_async_context(opened(shop, check_seconds=5))
            wanted.append(made(port))
            await registry.register(wanted[-1])
        last = await stack.enter_async_context(opened(shop, check_seconds=5))
        await until_found(last, wanted)  # all records have been multicast
        for _ in range(3):
            async with opened(shop, check_seconds=5, first_seconds=FIRST_SECONDS) as later:
                assert sorted(later.instances("orders"), key=str) == sorted(wanted, key=str)


async def test_a_closed_registry_has_removed_what_it_registered(shop: str):
    async with opened(shop) as other:
        with listening() as port:
            async with opened(shop) as one:
                instance = made(port)
                await one.register(instance)
                await until_found(other, [instance])
            await until_found(other, [])


async def test_an_instance_that_accepts_no_connection_is_left_out_until_it_does(shop: str):
    """A process that is killed says no goodbye."""
    async with opened(shop) as one, opened(shop) as other:
        notified: list[str] = []
        with listening() as port:
            instance = made(port)
            await one.register(instance)
            await until_found(other, [instance])
            other.watch(notified.append)
        await until_found(other, [])
        assert notified == ["orders"]
        with listening(port):
            await until_found(other, [instance])
        assert notified[:2] == ["orders", "orders"]


async def test_records_of_another_shop_and_of_other_programs_are_ignored(shop: str):
    async with opened(shop) as one, opened(shop[::-1] + "x") as elsewhere:
        with listening() as port:
            foreign = AsyncZeroconf(interfaces=list(LOOPBACK))
            try:
                info = AsyncServiceInfo(
                    TYPE, f"printer-{shop}.{TYPE}", addresses=[b"\x7f\0\0\1"], port=port,
                    properties={"shop": shop, "service": "orders"}, server=f"p-{shop}.local.",
                )  # fmt: skip
                await (await foreign.async_register_service(info, cooperating_responders=True))
                theirs, ours = made(port), made(port)
                await elsewhere.register(theirs)
                await until_found(elsewhere, [theirs])
                await one.register(ours)  # is received last
                await until_found(one, [ours])
                assert list(elsewhere.instances("orders")) == [theirs]
            finally:
                await foreign.async_close()
