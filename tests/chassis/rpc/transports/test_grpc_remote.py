"""Two processes over gRPC, from the start to the end: registry, stats, drain, encryption, and their settings."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from mercato.chassis.contract import Actor, Context, Unavailable
from mercato.chassis.grpc import GrpcTls
from mercato.chassis.hosting import settings as config
from mercato.chassis.observability.clock import SystemClock
from mercato.chassis.rpc.discovery.static import StaticRegistry
from mercato.chassis.rpc.stats import Stats
from mercato.chassis.rpc.transports.grpc.remote import GrpcRemote
from mercato.chassis.rpc.transports.server_names import server_name
from mercato.chassis.rpc.trust import TokenSigner
from mercato.cli import environment, over_grpc
from mercato.testing.certificates import certificate
from mercato.testing.split_hosts import RegisteredInstances
from mercato.testing.waiting import BOUND_SECONDS, until_true

from .conformance import Ask, Said, Things, ThingsService, server_of
from .served import signer
from .test_http_remote import trust_of

HOST = "127.0.0.1"


class Pair:
    """A process that serves `things`, and one that calls it."""

    def __init__(self, *, tls: GrpcTls | None = None, ca: bytes | None = None, setting: str = "") -> None:
        self.registry, clock = RegisteredInstances(), SystemClock()
        self.service = ThingsService()
        self.serving = GrpcRemote(
            self.registry, {"products": signer("products")}, trust_of, clock, Stats("one", "1.2.3"),
            registrar=self.registry, listen_at=(HOST, 0), tls=tls,
        )  # fmt: skip
        self.calling = GrpcRemote(
            self.registry, {"orders": signer()}, trust_of, clock, Stats("two", "1.2.3"),
            ca=ca, server_name=server_name(setting),
        )  # fmt: skip

    async def ask(self, do: str = "") -> Said:
        context = Context(Actor("customer", 1), SystemClock().monotonic() + BOUND_SECONDS, "0" * 32, "test")
        [outcome] = await self.calling.transport("orders").send(Things.read, [Ask(number=7, do=do)], [context])
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


@contextlib.asynccontextmanager
async def pair(**options: Any) -> AsyncGenerator[Pair]:
    made = Pair(**options)
    await made.serving.serve({"things": server_of(made.service, SystemClock())})
    try:
        yield made
    finally:
        made.service.release.set()
        await made.calling.close()
        await made.serving.close()


async def test_an_instance_registers_itself_and_says_what_it_has_done():
    async with pair() as both:
        [instance] = both.registry.instances("things")
        assert (instance.id, instance.version) == ("one", "1.2.3")
        await both.ask()
        await both.ask()
        [found] = (await both.calling.inspect(["things"]))["things"]
        assert found.where == instance.address
        assert found.stats is not None
        read = found.stats.operations["read"]
        assert (read.batches, read.requests, read.errors) == (2, 2, 0)


async def test_a_process_that_drains_finishes_its_batches_and_leaves_the_registry():
    async with pair() as both:
        [instance] = both.registry.instances("things")
        running = asyncio.create_task(both.ask("hang"))
        await until_true(lambda: both.service.batches)

        draining = asyncio.create_task(both.serving.drain())
        await until_true(lambda: not both.registry.instances("things"))
        await both.registry.register(instance)  # a caller that has not seen it yet
        with pytest.raises(Unavailable):
            await both.ask()
        both.service.release.set()

        assert (await running).echo.number == 7
        await draining
        assert len(both.service.batches) == 1
        assert await both.calling.unreachable(["things"]) == {"things": "no connection"}
        assert await both.calling.unreachable(["others"]) == {"others": "no instance is known"}


async def test_an_untrusted_caller_gets_no_details_of_an_instance():
    async with pair() as both:
        forged = GrpcRemote(
            StaticRegistry({"things": [*both.registry.instances("things")]}),
            {"orders": TokenSigner("orders", b"9" * 32, SystemClock())}, trust_of, SystemClock(), Stats("three", ""),
        )  # fmt: skip
        [found] = (await forged.inspect(["things"]))["things"]
        await forged.close()
        assert (found.stats, found.problem) == (None, "untrusted")


@pytest.mark.parametrize(
    ("names", "setting", "works"),
    [
        ((), "", True),
        (("things.shop.svc",), "{service}.shop.svc", True),
        (("things.shop.svc",), "", False),
        (("others.shop.svc",), "{service}.shop.svc", False),
    ],
)
async def test_a_server_is_verified_by_its_name(tmp_path: Path, names: tuple[str, ...], setting: str, *, works: bool):
    cert, key = certificate(tmp_path, *names)
    async with pair(tls=GrpcTls.read(cert, key), ca=cert.read_bytes(), setting=setting) as both:
        if works:
            assert (await both.ask()).echo.number == 7
            assert await both.calling.unreachable(["things"]) == {}
            return
        with pytest.raises(Unavailable):
            await both.ask()
        problem = (await both.calling.unreachable(["things"]))["things"]
        assert problem == "no connection: is it encrypted by a certificate that this process verifies?"
        assert both.service.batches == []


# ------------------------------------------------------------------------------------------------------------- settings


def connected(settings: config.ServeSettings) -> object:
    clock = SystemClock()
    return over_grpc.connected(settings, {"orders": signer()}, trust_of, clock, Stats("one", ""), serves=True)


def test_an_address_that_is_missing_is_named():
    with pytest.raises(config.SettingsError, match="MERCATO_RPC_ADDRESS is missing"):
        connected(config.ServeSettings(rpc_transport="grpc"))


def test_an_address_on_the_network_needs_encryption():
    with pytest.raises(config.SettingsError, match=r"MERCATO_RPC_ADDRESS names 10\.0\.0\.5 without encryption"):
        connected(config.ServeSettings(rpc_transport="grpc", rpc_address="10.0.0.5:9083"))


def test_the_extra_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch):
    def none(name: str) -> None:
        assert name in ("grpc", "google.protobuf")

    monkeypatch.setattr(importlib.util, "find_spec", none)
    with pytest.raises(config.SettingsError, match=r"pip install 'mercato\[grpc\]'"):
        environment.require_grpc("The setting MERCATO_RPC_TRANSPORT=grpc")


def test_nats_without_its_url_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MERCATO_RPC_TRANSPORT", "nats")
    monkeypatch.delenv("NATS_URL", raising=False)
    with pytest.raises(config.SettingsError, match="NATS_URL is missing"):
        config.load(config.ServeSettings)


def test_without_a_choice_it_is_nats_where_there_is_a_url(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("NATS_URL", raising=False)
    assert config.load(config.ServeSettings).carrier == "http"
    monkeypatch.setenv("NATS_URL", "nats://127.0.0.1:4222")
    assert config.load(config.ServeSettings).carrier == "nats"
    monkeypatch.setenv("MERCATO_RPC_TRANSPORT", "grpc")
    assert config.load(config.ServeSettings).carrier == "grpc"
