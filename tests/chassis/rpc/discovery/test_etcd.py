"""What etcd alone has as a registry: users, TLS, several members."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

import pytest

from mercato.chassis.rpc.discovery import Instance
from mercato.chassis.rpc.discovery.etcd import EtcdStore
from mercato.chassis.rpc.discovery.leased import LeasedRegistry, StoreRefused
from mercato.testing.certificates import certificate
from mercato.testing.waiting import until_true
from registries.etcd import Etcd, needs_etcd

pytestmark = needs_etcd
PREFIX = "/mercato/0123456789abcdef/"
ONE = Instance("orders", "127.0.0.1:9083", "one", "1.2.3")
TWO = Instance("orders", "127.0.0.1:9084", "two", "1.2.3")


@contextlib.asynccontextmanager
async def opened(urls: Sequence[str], prefix: str = PREFIX, **options: Any) -> AsyncGenerator[LeasedRegistry]:
    registry = LeasedRegistry(EtcdStore(urls, prefix, check_seconds=1.0, **options), first_seconds=60)
    try:
        await registry.open()
        yield registry
    finally:
        await registry.close()


async def refusal(urls: Sequence[str], prefix: str = PREFIX, **options: Any) -> str:
    with pytest.raises(StoreRefused) as refused:
        async with opened(urls, prefix, **options):
            pass
    return str(refused.value)


async def test_users_and_passwords():
    with Etcd() as etcd:
        async with opened(etcd.urls, user="shop", password="of the shop") as before:
            await before.register(ONE)
            await until_true(lambda: list(before.instances("orders")) == [ONE])

            # It asks for a password from now on: that goes unseen by one that has it.
            etcd.require_passwords("shop", "of the shop", "/mercato/")
            await before.register(TWO)
            async with opened(etcd.urls, user="shop", password="of the shop") as registry:
                assert list(registry.instances("orders")) == [ONE, TWO]
                await registry.deregister(TWO)
            assert before.problem() == ""

        said = await refusal(etcd.urls, user="shop", password="hunter2")
        assert said == (
            "etcd does not accept the user 'shop' with this password: look at MERCATO_REGISTRY_USER and "
            "MERCATO_REGISTRY_PASSWORD"
        )
        assert "hunter2" not in said
        assert "etcd asks for a user: set MERCATO_REGISTRY_USER" in await refusal(etcd.urls)
        said = await refusal(etcd.urls, "/other/", user="shop", password="of the shop")
        assert "etcd does not let the user 'shop' read and write below /other/: `etcdctl role grant" in said


async def test_tls(tmp_path: Path):
    import ssl

    files = certificate(tmp_path)
    with Etcd(tls=files) as etcd:
        async with opened(etcd.urls, tls=ssl.create_default_context(cafile=files[0])) as registry:
            await registry.register(ONE)
            await until_true(lambda: list(registry.instances("orders")) == [ONE])
        async with opened(etcd.urls) as distrustful:
            assert "has a certificate that is not accepted" in distrustful.problem()


@pytest.mark.long
async def test_a_cluster_whose_members_die_one_after_the_other():
    with Etcd(members=3) as etcd:
        async with opened(etcd.urls) as one, opened(etcd.urls) as other:
            await one.register(ONE)
            await until_true(lambda: list(other.instances("orders")) == [ONE])
            etcd.kill(0)
            await one.register(TWO)
            await until_true(lambda: list(other.instances("orders")) == [ONE, TWO])
            await until_true(lambda: not other.problem() and not one.problem())

            # One alone is no majority: what it knows may be old.
            etcd.kill(1)
            await until_true(other.problem)
            assert list(other.instances("orders")) == [ONE, TWO]

            etcd.start(0)
            await one.deregister(TWO)
            await until_true(lambda: list(other.instances("orders")) == [ONE])
            await until_true(lambda: not other.problem() and not one.problem())


async def test_a_connection_that_is_dead_without_a_sign_is_noticed():
    with Etcd() as etcd:
        async with opened(etcd.urls) as registry:
            await registry.register(ONE)
            await until_true(lambda: list(registry.instances("orders")) == [ONE])
            etcd.pause()
            await until_true(lambda: "does not answer in time; the instances" in registry.problem())
            etcd.resume()
            await registry.register(TWO)
            await until_true(lambda: list(registry.instances("orders")) == [ONE, TWO])
            await until_true(lambda: not registry.problem())


async def test_a_server_that_is_not_etcd_is_named():
    from registries.consul import FakeConsul

    consul = FakeConsul()
    await consul.start()
    try:
        async with opened([consul.url]) as registry:
            assert "answers 404, as the API of etcd does not" in registry.problem()
    finally:
        await consul.stop()
