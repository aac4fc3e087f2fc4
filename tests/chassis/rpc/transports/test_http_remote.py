"""The lifecycle of a process among others over HTTP: serving, encryption, draining, and saying how it is."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import AsyncGenerator, Collection
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from mercato.chassis.contract import Actor, Context, Unavailable
from mercato.chassis.http import bind
from mercato.chassis.observability.clock import SystemClock
from mercato.chassis.observability.telemetry import Telemetry
from mercato.chassis.rpc.discovery import Instance
from mercato.chassis.rpc.discovery.static import StaticRegistry
from mercato.chassis.rpc.signatures import public_key
from mercato.chassis.rpc.stats import Stats
from mercato.chassis.rpc.transports.http.remote import HttpRemote
from mercato.chassis.rpc.transports.server_names import MalformedName, server_name
from mercato.chassis.rpc.trust import Grant, TokenSigner, Trust
from mercato.testing.certificates import certificate

from .conformance import Ask, Said, Things, ThingsService, server_of
from .served import SEEDS, signer

HOST = "127.0.0.1"


def trust_of(services: Collection[str]) -> Trust:
    keys = {name: public_key(seed) for name, seed in SEEDS.items()}
    operations = frozenset(operation.full_name for operation in Things.operations.values())
    return Trust(list(services), keys, {"orders": Grant(operations)}, SystemClock(), Telemetry())


class Pair:
    """A process that serves `things`, and one that calls it."""

    def __init__(
        self,
        *,
        server_tls: ssl.SSLContext | None = None,
        tls: ssl.SSLContext | None = None,
        name: str = "",
        setting: str = "",
    ) -> None:
        listener = bind(HOST, 0)
        self.address = f"{HOST}:{listener.getsockname()[1]}"
        registry = StaticRegistry({"things": [Instance("things", self.address, "1", name=name)]})
        clock = SystemClock()
        self.serving = HttpRemote(
            registry, {"products": signer("products")}, trust_of, clock, Stats("one", "1.2.3"),
            listener=listener, server_tls=server_tls,
        )  # fmt: skip
        self.calling = HttpRemote(
            registry, {"orders": signer()}, trust_of, clock, Stats("two", "1.2.3"),
            tls=tls, server_name=server_name(setting),
        )  # fmt: skip

    async def ask(self) -> Said:
        context = Context(Actor("customer", 1), SystemClock().monotonic() + 30, "0" * 32, "test")
        [outcome] = await self.calling.transport("orders").send(Things.read, [Ask(number=7)], [context])
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


@contextlib.asynccontextmanager
async def pair(**options: Any) -> AsyncGenerator[Pair]:
    made = Pair(**options)
    await made.serving.serve({"things": server_of(ThingsService(), SystemClock())})
    try:
        yield made
    finally:
        await made.calling.close()
        await made.serving.close()


async def test_an_instance_says_what_it_has_done():
    async with pair() as both:
        await both.ask()
        await both.ask()
        [found] = (await both.calling.inspect(["things"]))["things"]
        assert found.where == both.address
        assert found.stats is not None
        assert (found.stats.id, found.stats.version) == ("one", "1.2.3")
        read = found.stats.operations["read"]
        assert (read.batches, read.requests, read.errors) == (2, 2, 0)
        assert read.p99_ms > 0


async def test_a_service_without_an_instance_is_unreachable_and_it_is_said_why():
    async with pair() as both:
        assert await both.calling.unreachable(["things"]) == {}
        assert await both.calling.unreachable(["others"]) == {"others": "no instance is known"}
        await both.serving.drain()
        assert await both.calling.unreachable(["things"]) == {"things": "no connection"}
        with pytest.raises(Unavailable):
            await both.ask()


async def test_an_untrusted_caller_gets_no_details_of_an_instance():
    async with pair() as both:
        forged = HttpRemote(
            StaticRegistry({"things": [Instance("things", both.address, "1")]}),
            {"orders": TokenSigner("orders", b"9" * 32, SystemClock())}, trust_of, SystemClock(), Stats("three", ""),
        )  # fmt: skip
        [found] = (await forged.inspect(["things"]))["things"]
        await forged.close()
        assert (found.stats, found.problem) == (None, "untrusted")


# --------------------------------------------------------------------------------------------------------- encryption


def contexts(folder: Path, *names: str, days: int = 1) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Of a caller that verifies, and of a server with that certificate."""
    folder.mkdir(exist_ok=True)
    cert, key = certificate(folder, *names, days=days)
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(cert, key)
    return ssl.create_default_context(cafile=cert), server


async def test_calls_are_encrypted_and_servers_verified(tmp_path: Path):
    tls, server_tls = contexts(tmp_path)
    async with pair(tls=tls, server_tls=server_tls) as both:
        assert (await both.ask()).echo.number == 7
        assert await both.calling.unreachable(["things"]) == {}


async def test_a_server_with_another_certificate_gets_no_call(tmp_path: Path):
    tls, _ = contexts(tmp_path / "ours")
    _, server_tls = contexts(tmp_path / "theirs")
    async with pair(tls=tls, server_tls=server_tls) as both:
        with pytest.raises(Unavailable):
            await both.ask()
        refused = "its certificate is refused: self-signed certificate"
        assert await both.calling.unreachable(["things"]) == {"things": refused}


async def test_a_caller_in_the_clear_is_not_answered_by_a_server_that_encrypts(tmp_path: Path):
    _, server_tls = contexts(tmp_path)
    async with pair(server_tls=server_tls) as both:
        with pytest.raises(Unavailable):
            await both.ask()
        assert await both.calling.unreachable(["things"]) == {
            "things": "it closes the connection without an answer; if it encrypts, set MERCATO_TLS_CA here too"
        }


NAMED = [
    ("things-rpc", "", "things-rpc"),
    ("things-rpc", "{service}.shop.svc", "things.shop.svc"),
    ("", "{service}.shop.svc", "things.shop.svc"),
    ("", "shop.internal", "shop.internal"),
]


@pytest.mark.parametrize(("found_by", "setting", "name"), NAMED)
async def test_a_server_is_verified_by_the_name_of_its_service(tmp_path: Path, found_by: str, setting: str, name: str):
    tls, server_tls = contexts(tmp_path, name)
    async with pair(tls=tls, server_tls=server_tls, name=found_by, setting=setting) as both:
        assert (await both.ask()).echo.number == 7
        assert await both.calling.unreachable(["things"]) == {}


@pytest.mark.parametrize(("found_by", "setting", "name"), NAMED)
async def test_a_certificate_of_another_name_is_refused_with_the_name(
    tmp_path: Path, found_by: str, setting: str, name: str
):
    tls, server_tls = contexts(tmp_path, "others-rpc", "others.shop.svc")
    async with pair(tls=tls, server_tls=server_tls, name=found_by, setting=setting) as both:
        with capture_logs() as lines, pytest.raises(Unavailable):
            await both.ask()
        refused = f"its certificate is not that of {name}, which MERCATO_TLS_NAME asks for"
        assert await both.calling.unreachable(["things"]) == {"things": refused}
    assert [line["reason"] for line in lines if line["event"] == "rpc_not_encrypted"] == [refused]


async def test_a_server_that_was_found_by_name_can_be_verified_by_its_address(tmp_path: Path):
    tls, server_tls = contexts(tmp_path)
    async with pair(tls=tls, server_tls=server_tls, name="things-rpc", setting="{address}") as both:
        assert (await both.ask()).echo.number == 7
        assert await both.calling.unreachable(["things"]) == {}


async def test_a_certificate_that_has_expired_is_refused(tmp_path: Path):
    tls, server_tls = contexts(tmp_path, "things-rpc", days=-1)
    async with pair(tls=tls, server_tls=server_tls, name="things-rpc") as both:
        with pytest.raises(Unavailable):
            await both.ask()
        refused = "its certificate is refused: certificate has expired"
        assert await both.calling.unreachable(["things"]) == {"things": refused}


async def test_a_server_in_the_clear_gets_no_call_of_a_caller_that_encrypts(tmp_path: Path):
    tls, _ = contexts(tmp_path)
    async with pair(tls=tls) as both:
        with pytest.raises(Unavailable):
            await both.ask()
        refused = "it answers without encryption: give it MERCATO_TLS_CERT and MERCATO_TLS_KEY"
        assert await both.calling.unreachable(["things"]) == {"things": refused}


@pytest.mark.parametrize("setting", ["{address}.shop", "{service}:9080", "https://orders", "*.shop.svc", "a..b", "-a"])
def test_a_name_that_no_certificate_has_is_refused(setting: str):
    with pytest.raises(MalformedName, match="is not a name in a certificate, such as"):
        server_name(setting)


def test_the_log_of_a_service_has_the_name_of_the_service():
    assert server_name("{service}.shop.svc")(Instance("orders.log", "10.0.0.5:9080", "1")) == "orders.shop.svc"
    assert server_name("")(Instance("orders.log", "[fd00::5]:9080", "1")) == "fd00::5"
