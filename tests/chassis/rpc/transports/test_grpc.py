"""The gRPC transport: conformance, balancing and drain, connections that break or stand still, and trust."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import grpc
import grpc.aio
import msgspec
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grpc_tools import protoc

from mercato.chassis.contract import Context, Operation, OutcomeUnknown, Unavailable
from mercato.chassis.contract.context import KEPT, SAMPLED, Place
from mercato.chassis.contract.places import remote
from mercato.chassis.grpc import NOTHING, GrpcServer, GrpcTls
from mercato.chassis.observability.clock import Clock, SystemClock
from mercato.chassis.rpc.balancing import FIRST_PAUSE_SECONDS
from mercato.chassis.rpc.codec import encode_requests
from mercato.chassis.rpc.discovery import Instance
from mercato.chassis.rpc.discovery.static import StaticRegistry
from mercato.chassis.rpc.server import Server
from mercato.chassis.rpc.transports import Transport
from mercato.chassis.rpc.transports.direct.client import ClientLimits
from mercato.chassis.rpc.transports.direct.wire import NOT_STARTED
from mercato.chassis.rpc.transports.grpc import channels
from mercato.chassis.rpc.transports.grpc.client import GrpcTransport
from mercato.chassis.rpc.transports.grpc.wire import (
    ACCEPTED,
    ENVELOPE_BYTES,
    RPC_LIMITS,
    answers,
    batches,
    new_batch,
    new_outcomes,
    read_answers,
    read_batches,
)
from mercato.chassis.rpc.trust import TokenSigner
from mercato.testing.certificates import certificate
from mercato.testing.waiting import BOUND_SECONDS, until_true

from .conformance import CUSTOMER, Ask, Conformance, Said, Stage, Things
from .grpc_served import (
    CLASSES,
    Link,
    Served,
    calling,
    closed_address,
    kinds,
    running,
)
from .served import HOST, signer

MIB = 1_048_576
DRAIN_SECONDS = 3.0


class OverGrpc:
    """The transport that the conformance suite tests: one instance, and a client of it."""

    def __init__(self, servers: Mapping[str, Server], clock: Clock) -> None:
        self._servers = servers
        self._clock = clock
        self._served = Served(servers)

    async def open(self) -> None:
        await self._served.open()
        instances = [Instance(service, self._served.address, "1") for service in self._servers]
        self._client = GrpcTransport(StaticRegistry({i.service: [i] for i in instances}), signer(), self._clock)

    async def close(self) -> None:
        await self._client.close()
        await self._served.close()

    async def send(
        self, operation: Operation[Any, Any], requests: Sequence[Any], contexts: Sequence[Context]
    ) -> Sequence[Any]:
        return await self._client.send(operation, requests, contexts)


class TestGrpc(Conformance):
    def transport(self, servers: Mapping[str, Server], clock: Clock) -> Transport:
        return OverGrpc(servers, clock)

    async def test_a_message_really_travels(self, stage: Stage):
        request = Ask(number=1)
        with stage.acting(CUSTOMER):
            answer = await stage.things.change(request)
        assert answer.echo is not request


# ------------------------------------------------------------------------------------------------------------- envelope


BATCH = {
    "requests": b"x" * 300,
    "id": 2**63,
    "operation": "change",
    "remaining_ms": 0.5,
    "authorization": "Bearer x",
    "traceparent": "00-x",
}
OUTCOMES = {
    "outcomes": b"x" * 300,
    "id": 1,
    "not_started": "draining",
    "another_may_start_it": True,
    "draining_seconds": 2.5,
    "is_too_large": True,
}


def test_the_messages_are_what_their_proto_file_says(tmp_path: Path):
    folder = Path(__file__).parents[4] / "proto"
    into = tmp_path / "descriptors"
    assert protoc.main(["protoc", f"-I{folder}", f"--descriptor_set_out={into}", "mercato/rpc/v1/batch.proto"]) == 0
    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(into.read_bytes()).file:
        pool.Add(file)

    messages: list[tuple[str, str, Any, Any, Any, dict[str, Any]]] = [
        ("Batch", "Batches", new_batch, batches, read_batches, BATCH),
        ("Outcomes", "Answers", new_outcomes, answers, read_answers, OUTCOMES),
    ]
    for part, whole, new, write, read, fields in messages:
        kind = pool.FindMessageTypeByName(f"mercato.rpc.v1.{part}")
        assert [field.name for field in kind.fields] == list(fields)
        of_file = message_factory.GetMessageClass(kind)(**fields)
        ours = new(**fields)
        [field] = (outer := pool.FindMessageTypeByName(f"mercato.rpc.v1.{whole}")).fields
        two = message_factory.GetMessageClass(outer)(**{field.name: [of_file, of_file]}).SerializeToString()
        assert write([ours, ours]) == two
        assert list(read(two)) == [ours, ours]


def test_fields_of_a_newer_message_are_skipped():
    assert [batch.requests for batch in read_batches(batches([new_batch(requests=b"one")]) + b"\x7a\x03new")] == [
        b"one"
    ]


# ------------------------------------------------------------------------------------------------- balancing, and drain


async def test_two_instances_share_the_load():
    async with running() as one, running() as two, calling(one.address, two.address) as caller:
        calls = [caller.start(Ask(number=n, do="hang")) for n in range(20)]
        await until_true(lambda: len(one.numbers) + len(two.numbers) == 20)
        assert (len(one.numbers), len(two.numbers)) == (10, 10)
        one.service.release.set()
        two.service.release.set()
        assert [kinds(await call) for call in calls] == [[Said]] * 20


async def test_an_instance_without_a_listener_is_left_alone_and_comes_back():
    gone = await closed_address()
    async with running() as alive, calling(gone, alive.address) as caller:
        for number in range(3):
            assert kinds(await caller.send(Ask(number=number))) == [Said]
        assert alive.numbers == [0, 1, 2]
        async with running(int(gone.rpartition(":")[2])) as back:
            caller.clock.seconds += FIRST_PAUSE_SECONDS
            assert kinds(await caller.send(Ask(number=10))) == [Said]
            assert back.numbers == [10]


async def test_where_no_instance_can_be_reached_the_service_is_unavailable():
    async with calling(await closed_address(), await closed_address()) as caller:
        with pytest.raises(Unavailable, match="things is not available"):
            await caller.send(Ask())


@pytest.mark.parametrize("address", ["", "::", "[::1", "a b:1", "127.0.0.1:99999", "127.0.0.1:x"])
async def test_an_address_that_is_none_is_an_instance_that_cannot_be_reached(address: str):
    async with running() as alive, calling(address, alive.address) as caller:
        assert kinds(await caller.send(Ask())) == [Said]


async def test_a_draining_instance_gets_no_further_call_and_no_call_is_lost():
    async with running() as old, running() as new, calling(old.address, new.address) as caller:
        last = caller.start(Ask(number=1, do="hang"))
        await until_true(lambda: old.numbers == [1])
        busy = caller.start(Ask(number=2, do="hang"))  # else the new one would be chosen, as the less busy one
        await until_true(lambda: new.numbers == [2])
        old.served.handlers.drain(DRAIN_SECONDS)
        for number in range(3, 8):
            assert kinds(await caller.send(Ask(number=number))) == [Said]
        old.service.release.set()
        new.service.release.set()
        assert kinds(await last) + kinds(await busy) == [Said, Said]
    assert (old.numbers, new.numbers) == ([1], list(range(2, 8)))


async def test_an_instance_that_starts_again_at_its_address_gets_calls():
    async with running() as first, calling(first.address) as caller:
        assert kinds(await caller.send(Ask(number=1))) == [Said]
        await first.served.close()
        async with running(first.served.port) as again:
            assert kinds(await caller.send(Ask(number=2))) == [Said]
            assert again.numbers == [2]


async def test_the_list_of_the_registry_is_followed_and_channels_to_others_are_closed():
    async with running() as one, running() as two, calling(one.address) as caller:
        hanging = caller.start(Ask(number=1, do="hang"))
        await until_true(lambda: one.numbers == [1])
        caller.registry.list(two.address)
        assert kinds(await caller.send(Ask(number=2))) == [Said]
        one.service.release.set()
        assert kinds(await hanging) == [Said]
        assert [address for address, _ in caller.transport._channels._channels] == [two.address]
        await until_true(lambda: one.served.running == 0)


async def test_an_operation_that_one_instance_does_not_know_is_asked_of_another():
    older = Served({})
    await older.open()
    try:
        async with running() as newer, calling(older.address, newer.address) as caller:
            assert kinds(await caller.send(Ask())) == [Said]
            assert older.calls == 1
    finally:
        await older.close()


# ----------------------------------------------------------------------------------------------- connections that break


@pytest.mark.parametrize("name", ["safe", "keyed", "keyed, without a key", "never"])
async def test_a_connection_that_is_cut_leaves_the_outcome_unknown_and_nothing_is_repeated(name: str):
    operation, request, expected = CLASSES[name]
    async with running() as one, running() as other, Link(one.served.port) as link, calling(link.address) as caller:
        call = asyncio.create_task(caller.send(msgspec.structs.replace(request, do="hang"), operation=operation))
        await until_true(lambda: one.numbers == [0])
        caller.registry.list(link.address, other.address)
        link.cut()

        assert kinds(await call) == [expected]

        assert (one.numbers, other.numbers) == ([0], [])


async def test_a_connection_that_was_kept_and_broke_is_made_anew():
    async with running() as one, Link(one.served.port) as link, calling(link.address) as caller:
        assert kinds(await caller.send(Ask(number=1))) == [Said]
        channel = next(iter(caller.transport._channels._channels.values())).channel
        link.cut()
        async with asyncio.timeout(BOUND_SECONDS):
            await channel.wait_for_state_change(grpc.ChannelConnectivity.READY)

        assert kinds(await caller.send(Ask(number=2))) == [Said]
        assert (one.numbers, link.connections) == ([1, 2], 2)


async def test_a_peer_that_stands_still_is_found_by_probes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(channels, "PING_SECONDS", 0.2)
    monkeypatch.setattr(channels, "PING_ANSWER_SECONDS", 0.2)
    async with running() as one, Link(one.served.port) as link, calling(link.address) as caller:
        assert kinds(await caller.send(Ask(number=1))) == [Said]
        call = caller.start(Ask(number=2, do="hang"))
        await until_true(lambda: one.numbers == [1, 2])
        link.passes.clear()

        async with asyncio.timeout(BOUND_SECONDS / 4):
            assert kinds(await call) == [OutcomeUnknown]
        link.passes.set()


async def test_a_caller_that_leaves_does_not_cancel_its_batch():
    async with running() as one, calling(one.address) as caller:
        call = caller.start(Ask(number=1, do="hang"))
        await until_true(lambda: one.numbers == [1])
        call.cancel()
        assert kinds(await caller.send(Ask(number=2))) == [Said]
        await until_true(lambda: len(one.served.handlers._running) == 1)

        one.service.release.set()
        await until_true(lambda: not one.served.handlers._running)


# --------------------------------------------------------------------------------------------------------- large, many


async def test_large_batches_of_many_callers_arrive_whole():
    text = "x" * (MIB // 16)
    async with running() as one, calling(one.address) as caller:
        asks = [Ask(number=n, text=text) for n in range(16)]
        answers = await asyncio.gather(*(caller.send(*asks) for _ in range(16)))
        assert [len(answer) for answer in answers] == [16] * 16
        assert {said.echo.text for answer in answers for said in answer} == {text}


async def test_a_batch_beyond_the_bound_goes_in_parts_and_a_request_beyond_it_is_invalid():
    async with running() as one, calling(one.address, limits=ClientLimits(batch_bytes=10_000)) as caller:
        answers = await caller.send(*(Ask(number=n, text="x" * 3_000) for n in range(8)))
        assert kinds(answers) == [Said] * 8
        assert len(one.service.batches) == 4


# ------------------------------------------------------------------------------------------------------ trust, metadata


Metadata = tuple[tuple[str, str], ...]
PATH = "/mercato.rpc.v1.things/Exchange"


def token(service: str = "orders") -> str:
    """Valid for a minute from now: tests are collected long before they run."""
    return f"Bearer {signer(service).token('things')}"


async def refusal_of_stream(address: str, path: str, metadata: Metadata) -> tuple[grpc.StatusCode, str]:
    """The status, and the reason why nothing was started, of a stream of another program, which sends nothing."""
    async with grpc.aio.insecure_channel(address) as made:
        call = made.stream_stream(path)(metadata=metadata)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call.read()
    return raised.value.code(), str(dict(raised.value.trailing_metadata())[NOT_STARTED])


STREAMS = {
    "without a token": (PATH, lambda: "", grpc.StatusCode.UNAUTHENTICATED, "untrusted"),
    "a forged token": (PATH, lambda: "Bearer x", grpc.StatusCode.UNAUTHENTICATED, "untrusted"),
    "another service": (PATH.replace("things", "cars"), token, grpc.StatusCode.UNIMPLEMENTED, "unknown_operation"),
    "another method": (PATH + "x", token, grpc.StatusCode.UNIMPLEMENTED, "unknown_operation"),
}


@pytest.mark.parametrize(("path", "made", "code", "reason"), STREAMS.values(), ids=STREAMS)
async def test_a_stream_that_is_none_is_refused_before_a_message_is_received(
    path: str, made: Callable[[], str], code: grpc.StatusCode, reason: str
):
    async with running() as one:
        assert await refusal_of_stream(one.address, path, (("authorization", made()),)) == (code, reason)


GOOD = {"id": 7, "operation": "change", "remaining_ms": 30_000.0, "requests": b"\x90"}
BATCHES: dict[str, tuple[dict[str, Any], bool, str]] = {
    "without a token": ({"authorization": ""}, False, "untrusted"),
    "a forged token": ({"authorization": "Bearer x"}, False, "untrusted"),
    "no deadline": ({"remaining_ms": 0.0}, False, "malformed_header"),
    "a deadline in the past": ({"remaining_ms": -1.0}, False, "malformed_header"),
    "a deadline that is no number": ({"remaining_ms": float("nan")}, False, "malformed_header"),
    "no end": ({"remaining_ms": float("inf")}, False, "malformed_header"),
    "no batch": ({"requests": b"{}"}, False, "malformed_body"),
    "an empty batch": ({}, False, "wrong_batch_size"),
    "an unknown operation": ({"operation": "changes"}, True, "unknown_operation"),
    "no operation": ({"operation": ""}, True, "unknown_operation"),
}


@pytest.mark.parametrize(("fields", "is_for_another", "reason"), BATCHES.values(), ids=BATCHES)
async def test_what_is_no_batch_is_refused_unstarted_and_the_stream_goes_on(
    fields: dict[str, Any], is_for_another: bool, reason: str
):
    async with running() as one, grpc.aio.insecure_channel(one.address) as made:
        call = made.stream_stream(PATH)(metadata=(("authorization", token()),))
        for _ in range(2):
            await call.write(batches([new_batch(**{**GOOD, "authorization": token(), **fields})]))
            [answer] = read_answers(cast("bytes", await call.read()))
            assert (answer.id, answer.not_started, answer.another_may_start_it) == (7, reason, is_for_another)
        assert one.numbers == []


async def test_batches_that_end_together_share_a_message():
    async with running() as one, grpc.aio.insecure_channel(one.address) as made:
        call = made.stream_stream(PATH)(metadata=(("authorization", token()),))
        refused: list[Any] = [new_batch(**{**GOOD, "id": n, "authorization": token()}) for n in (1, 2, 3)]
        await call.write(batches(refused))
        assert [answer.id for answer in read_answers(cast("bytes", await call.read()))] == [1, 2, 3]


async def test_a_message_that_is_none_ends_the_stream():
    async with running() as one, grpc.aio.insecure_channel(one.address) as made:
        call = made.stream_stream(PATH)(metadata=(("authorization", token()),))
        await call.write(b"\xff\xff")
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call.read()
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_message_beyond_the_bound_of_the_server_ends_the_stream():
    async with running() as one, grpc.aio.insecure_channel(one.address) as made:
        call = made.stream_stream(PATH)(metadata=(("authorization", token()),))
        await call.write(batches([new_batch(requests=b"x" * RPC_LIMITS.message_bytes)]))
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call.read()
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert one.numbers == []


async def test_a_caller_without_a_grant_is_forbidden_each_request():
    async with running() as one, calling(one.address) as caller:
        caller.transport._signer = TokenSigner("products", b"3" * 32, SystemClock())
        assert [outcome.code for outcome in await caller.send(Ask(), Ask())] == ["forbidden", "forbidden"]
        assert one.numbers == []


class Recording:
    """An instance that keeps what it gets of each stream: its metadata, and its batches, which it does not answer."""

    def __init__(self) -> None:
        self.metadata: list[dict[str, Any]] = []
        self.batches: list[Any] = []

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        self.metadata.append(dict(details.invocation_metadata))

        async def exchange(messages: Any, context: Any) -> None:
            await context.send_initial_metadata(((ACCEPTED, "1"),))
            while (message := await context.read()) is not NOTHING:
                self.batches.extend(read_batches(message))

        return grpc.stream_stream_rpc_method_handler(exchange)


async def test_a_batch_has_the_deadline_the_token_and_the_trace_and_the_stream_the_release():
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    recorded = remote([Place(trace_id, SAMPLED | KEPT, 0xB7AD6B7169203331)])
    instance = Recording()
    server = GrpcServer(HOST, 0, limits=RPC_LIMITS)
    await server.start([instance])  # pyright: ignore[reportArgumentType]
    async with calling(server.address) as caller:
        spans = [[None, recorded], [None]]
        sent = [
            asyncio.create_task(caller.transport.send(Things.change, [Ask()] * len(some), contexts))
            for some in spans
            for contexts in [[caller.context(240.0, span) for span in some]]
        ]
        await until_true(lambda: len(instance.batches) == 2)
        for task in sent:
            task.cancel()
        [metadata] = instance.metadata
        first, second = instance.batches

        assert metadata["mercato-version"] == "1.2.3"
        assert metadata["authorization"].startswith("Bearer ")
        assert first.authorization == metadata["authorization"]
        assert (first.operation, first.remaining_ms) == ("change", 240_000.0)
        assert first.traceparent == f"00-{trace_id}-b7ad6b7169203331-01"
        assert second.traceparent == ""
    await server.stop(drain_seconds=0.0)


async def test_calls_are_encrypted_and_the_server_is_verified(tmp_path: Path):
    cert, key = certificate(tmp_path)
    (tmp_path / "other").mkdir()
    another = certificate(tmp_path / "other")[0].read_bytes()
    async with running(tls=GrpcTls.read(cert, key)) as one:
        async with calling(one.address, ca=cert.read_bytes()) as caller:
            assert kinds(await caller.send(Ask(number=1))) == [Said]
        for ca in (another, None):
            async with calling(one.address, ca=ca) as caller:
                with pytest.raises(Unavailable):
                    await caller.send(Ask(number=2))
        assert one.numbers == [1]


def test_a_message_of_a_whole_batch_fits_the_bounds():
    body = encode_requests([Ask(text="x" * 1_000)], [Context(CUSTOMER, 10.0, "t", "r")], 0.0)
    fields: dict[str, Any] = {"id": 2**63, "remaining_ms": 1.0, "authorization": token(), "traceparent": "x" * 55}
    message = batches([new_batch(requests=body, operation="x" * 100, **fields)])
    assert len(message) - len(body) < ENVELOPE_BYTES // 4
