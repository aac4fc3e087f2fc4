"""The transport over a real NATS server: what a network adds to the conformance of all transports."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

import pytest
import pytest_asyncio

from embedded_nats.broker import PASSWORD, Broker, started
from mercato.chassis.contract import (
    Context,
    DeadlineExceeded,
    InvalidRequest,
    Operation,
    Overloaded,
    Unavailable,
)
from mercato.chassis.observability.clock import Clock, SystemClock
from mercato.chassis.rpc.batching import Outcome
from mercato.chassis.rpc.codec import encode_requests
from mercato.chassis.rpc.server import Server
from mercato.chassis.rpc.transports import Transport
from mercato.chassis.rpc.transports.nats import (
    NatsConnection,
    NatsServer,
    NatsServerLimits,
    NatsTransport,
    permissions,
)
from mercato.chassis.rpc.transports.nats.client import NatsAnswer
from mercato.chassis.rpc.transports.nats.wire import header_block
from mercato.embedded_nats import NatsUser
from mercato.testing.waiting import until_true

from .conformance import CUSTOMER, SECRET, Ask, Conformance, Said, Things, ThingsService, server_of
from .served import signer, trust_of

SERVICE = permissions("service", serves=[Things])
CALLER = permissions("caller", calls=Things.operations.values(), watches=True)
USERS = [
    NatsUser("service", PASSWORD, SERVICE.publish, SERVICE.subscribe),
    NatsUser("caller", PASSWORD, CALLER.publish, CALLER.subscribe),
]

BROKERS: list[Broker] = []
"""The one of the test that runs: `Conformance` makes transports without a fixture."""


@pytest_asyncio.fixture(autouse=True)
async def broker() -> AsyncGenerator[Broker]:
    async with started(*USERS) as broker:
        BROKERS.append(broker)
        yield broker
        BROKERS.clear()


class StepClock(SystemClock):
    """Moves by hand."""

    def __init__(self) -> None:
        self.time = SystemClock.monotonic()

    def monotonic(self) -> float:  # pyright: ignore[reportIncompatibleMethodOverride]  # there it is static
        return self.time


class Instance:
    """A process of a service, and a client in another one."""

    def __init__(
        self,
        servers: Mapping[str, Server],
        clock: Clock,
        name: str = "one",
        *,
        limits: NatsServerLimits | None = None,
        server_clock: Clock | None = None,
        ping_seconds: float = 5.0,
    ) -> None:
        url = BROKERS[0].url
        self.own = NatsConnection(url, "service", PASSWORD, name, ping_seconds=ping_seconds)
        self.caller = NatsConnection(url, "caller", PASSWORD, name, ping_seconds=ping_seconds)
        self.server = NatsServer(
            self.own,
            servers,
            trust_of(servers),
            server_clock or SystemClock(),
            version="1.2.3",
            name=name,
            metadata={"pid": "4711"},
            limits=limits,
        )
        self.client = NatsTransport(self.caller, signer(), clock, version="1.2.3")

    async def open(self) -> None:
        await self.own.open(seconds=60.0)
        await self.caller.open(seconds=60.0)
        await self.server.open()
        await self.client.open()

    async def close(self) -> None:
        await self.server.close()
        await self.own.close()
        await self.caller.close()

    async def send(
        self, operation: Operation[Any, Any], requests: Sequence[Any], contexts: Sequence[Context]
    ) -> Sequence[Outcome]:
        return await self.client.send(operation, requests, contexts)


class TestNats(Conformance):
    def transport(self, servers: Mapping[str, Server], clock: Clock) -> Transport:
        return Instance(servers, clock)


@contextlib.asynccontextmanager
async def running(name: str = "one", **options: Any) -> AsyncGenerator[tuple[Instance, ThingsService]]:
    service = ThingsService()
    instance = Instance({"things": server_of(service, SystemClock())}, SystemClock(), name, **options)
    await instance.open()
    try:
        yield instance, service
    finally:
        service.release.set()
        await instance.close()


def context(seconds: float = 30.0) -> Context:
    return Context(CUSTOMER, SystemClock.monotonic() + seconds, "t", "r")


async def send(instance: Instance, *asks: Ask, operation: Operation[Any, Any] = Things.change) -> Sequence[Any]:
    return await instance.send(operation, asks, [context()] * len(asks))


def numbers(service: ThingsService) -> list[int]:
    return [request.number for batch in service.batches for request in batch]


def kinds(outcomes: Sequence[Any]) -> list[type[Any]]:
    return [type(outcome) for outcome in outcomes]


# -------------------------------------------------------------------------------------------------------------- sizes


async def test_a_batch_and_an_answer_beyond_a_message_travel_in_parts():
    async with running() as (one, service):
        text = "x" * 200_000
        outcomes = await send(one, *[Ask(number=n, text=text) for n in range(16)])
        assert kinds(outcomes) == [Said] * 16
        assert [outcome.echo.number for outcome in outcomes] == list(range(16))
        assert numbers(service) == list(range(16))
        assert len(service.batches) > 1


async def test_a_request_beyond_a_message_fails_alone():
    async with running() as (one, service):
        outcomes = await send(one, Ask(number=1), Ask(number=2, text="x" * 2_000_000), Ask(number=3))
        assert kinds(outcomes) == [Said, InvalidRequest, Said]
        assert sorted(numbers(service)) == [1, 3]


async def test_a_message_has_all_the_room_that_its_headers_leave():
    async with running() as (one, service):
        until = context()
        headers = one.client._headers_for(Things.change, [until], 29.0)
        lines = ["NATS/1.0", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        room = one.caller.max_payload - len("\r\n".join(lines))
        without_text = len(encode_requests([Ask(text="x" * 100_000)], [until], SystemClock.monotonic())) - 100_000
        text = "x" * (room - without_text)
        assert kinds(await one.send(Things.change, [Ask(text=text)], [until])) == [Said]
        assert kinds(await one.send(Things.change, [Ask(text=f"{text}x")], [until])) == [InvalidRequest]
        assert len(service.batches) == 1
        assert one.own.is_connected


# ---------------------------------------------------------------------------------------------------------- instances


async def test_a_service_without_an_instance_is_unavailable_at_once():
    async with running() as (one, _):
        await one.server.close()
        with pytest.raises(Unavailable, match="things is not available"):
            await send(one, Ask())


async def test_two_instances_share_the_work_and_lose_nothing_when_one_drains():
    async with running("one") as (one, first), running("two") as (two, second):
        calls = [asyncio.create_task(send(two, Ask(number=n, do="hang"))) for n in range(40)]
        await until_true(lambda: len(numbers(first)) + len(numbers(second)) == 40)
        taken = len(numbers(first))
        assert 0 < taken < 40
        draining = asyncio.create_task(one.server.close())
        await until_true(lambda: one.server.is_draining)
        calls += [asyncio.create_task(send(two, Ask(number=number))) for number in range(100, 140)]
        await until_true(lambda: len(numbers(second)) == 80 - taken)
        assert not draining.done()
        first.release.set()
        second.release.set()
        assert [kinds(await call) for call in calls] == [[Said]] * 80
        await draining
        assert sorted(numbers(first) + numbers(second)) == [*range(40), *range(100, 140)]
        assert len(numbers(first)) == taken


async def test_a_batch_that_arrives_at_a_draining_instance_is_sent_to_another():
    async with running("one") as (one, first), running("two") as (two, second):
        one.server.is_draining = True  # NATS does not know it yet, and sends it one batch of two
        for number in range(40):
            assert kinds(await send(two, Ask(number=number))) == [Said]
        assert numbers(first) == []
        assert numbers(second) == list(range(40))


async def test_rolling_restarts_fail_no_call():
    done, outcomes = asyncio.Event(), list[type[Any]]()

    async def call(instance: Instance) -> None:
        while not done.is_set():
            outcomes.extend(kinds(await send(instance, Ask())))

    async with contextlib.AsyncExitStack() as stack:
        caller, _ = await stack.enter_async_context(running("0"))
        calls = [asyncio.create_task(call(caller)) for _ in range(8)]
        former = caller
        for number in range(1, 6):
            instance, service = await stack.enter_async_context(running(str(number)))
            await former.server.close()
            await until_true(lambda service=service: len(service.batches) > 20)
            former = instance
        done.set()
        await asyncio.gather(*calls)
    assert set(outcomes) == {Said}


# ------------------------------------------------------------------------------------------------------------- limits

LANES = Things.change.lanes
"""As many batches run at once, where the limits say less."""


def taken(instance: Instance) -> int:
    """The batches that run or wait."""
    return sum(len(handler.tasks) for handler in instance.server._handlers)


async def test_beyond_its_limits_an_operation_refuses_at_once():
    async with running(limits=NatsServerLimits(running=1, waiting=0)) as (one, service):
        calls = [asyncio.create_task(send(one, Ask(number=n, do="hang"))) for n in range(LANES)]
        await until_true(lambda: len(service.batches) == LANES)
        with pytest.raises(Overloaded):
            await send(one, Ask(number=99))
        assert kinds(await send(one, Ask(number=1), operation=Things.read)) == [Said]
        service.release.set()
        assert [kinds(await call) for call in calls] == [[Said]] * LANES
        assert 99 not in numbers(service)


async def test_a_batch_whose_time_ends_before_its_turn_is_not_started():
    async with running(limits=NatsServerLimits(running=1, waiting=1)) as (one, service):
        calls = [asyncio.create_task(send(one, Ask(number=n, do="hang"))) for n in range(LANES)]
        await until_true(lambda: len(service.batches) == LANES)
        with pytest.raises(DeadlineExceeded):
            await one.send(Things.change, [Ask(number=99)], [context(seconds=0.2)])
        await until_true(lambda: taken(one) == LANES, "the time is over for the server, too")
        service.release.set()
        assert [kinds(await call) for call in calls] == [[Said]] * LANES
        assert kinds(await send(one, Ask(number=100))) == [Said]
        assert 99 not in numbers(service)


async def test_the_wait_for_a_slot_is_part_of_the_time_of_a_batch():
    clock = StepClock()
    async with running(limits=NatsServerLimits(running=1, waiting=1), server_clock=clock) as (one, service):
        calls = [asyncio.create_task(send(one, Ask(number=n, do="hang"))) for n in range(LANES)]
        await until_true(lambda: len(service.batches) == LANES)
        waits = asyncio.create_task(send(one, Ask(number=99)))
        await until_true(lambda: taken(one) == LANES + 1)
        clock.time += 31.0
        service.release.set()
        assert kinds(await waits) == [DeadlineExceeded]
        assert [kinds(await call) for call in calls] == [[Said]] * LANES
        assert 99 not in numbers(service)


# ------------------------------------------------------------------------------------------------------ trust and texts


async def test_a_caller_that_is_not_granted_an_operation_starts_nothing():
    async with running() as (one, service):
        one.client._signer = signer("products")
        assert [outcome.code for outcome in await send(one, Ask())] == ["forbidden"]
        assert numbers(service) == []


async def ask(instance: Instance, headers: Mapping[str, str], body: bytes) -> NatsAnswer:
    answer = await instance.client._ask(Things.change, header_block(headers), body)
    assert answer is not None
    return answer


@pytest.mark.parametrize("body", [b"", b"{}", b"\x91\x01", b"\x90", b"\xdd\xff\xff\xff\xff"])
async def test_what_is_no_batch_is_refused_and_leaves_the_server_at_work(body: bytes):
    async with running() as (one, service):
        headers = {"authorization": signer().token("things"), "mercato-remaining-ms": "30000"}
        refused = await ask(one, headers, body)
        assert refused.headers["mercato-not-started"] in ("malformed_body", "wrong_batch_size")
        refused = await ask(one, {"mercato-remaining-ms": "30000"}, body)
        assert refused.headers["mercato-not-started"] == "untrusted"
        assert numbers(service) == []
        assert kinds(await send(one, Ask())) == [Said]


async def test_the_text_of_an_unexpected_exception_does_not_reach_the_caller():
    async with running() as (one, _):
        (outcome,) = await send(one, Ask(do="poison"))
    assert SECRET not in f"{outcome!s} {outcome!r} {outcome.__cause__!r}"
