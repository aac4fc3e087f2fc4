"""The gRPC transport: conformance, what the end of a stream means, and connections that break or stand still."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc
import grpc.aio
import msgspec
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grpc_tools import protoc

from chassis.rpc.breakers import ManualClock
from mercato.chassis.contract import Context, Internal, Operation, OutcomeUnknown, Span, Unavailable
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
from mercato.chassis.rpc.transports.grpc import channels, server as serving, streams
from mercato.chassis.rpc.transports.grpc.client import GrpcTransport
from mercato.chassis.rpc.transports.grpc.server import RpcHandlers
from mercato.chassis.rpc.transports.grpc.wire import (
    ACCEPTED,
    ENVELOPE_BYTES,
    LARGE_BYTES,
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

from .conformance import CUSTOMER, Ask, Conformance, Said, Stage, Things, ThingsService, server_of
from .served import HOST, Listed, signer, trust_of

MIB = 1_048_576
DRAIN_SECONDS = 3.0


class Served:
    """`RpcHandlers` behind the gRPC server, on a free port. It counts the calls: each stream is one."""

    def __init__(self, servers: Mapping[str, Server], port: int = 0, tls: GrpcTls | None = None) -> None:
        self.handlers = RpcHandlers(servers, trust_of(servers), SystemClock())
        self.calls = 0
        self._server = GrpcServer(HOST, port, limits=RPC_LIMITS, tls=tls)

    @property
    def address(self) -> str:
        return self._server.address

    @property
    def port(self) -> int:
        return self._server.port

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        self.calls += 1
        return self.handlers.service(details)

    @property
    def running(self) -> int:
        """Calls, so streams."""
        return self._server.running

    async def open(self) -> None:
        await self._server.start([self])  # pyright: ignore[reportArgumentType]

    async def close(self) -> None:
        await self._server.stop(drain_seconds=0.0)
        await self.handlers.end()


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


class Process:
    """An instance of `Things`."""

    def __init__(self, port: int = 0, tls: GrpcTls | None = None) -> None:
        self.service = ThingsService()
        self.served = Served({"things": server_of(self.service, SystemClock())}, port, tls)

    @property
    def address(self) -> str:
        return self.served.address

    @property
    def numbers(self) -> list[int]:
        """Of the requests that its handlers got, in order."""
        return [request.number for batch in self.service.batches for request in batch]


@contextlib.asynccontextmanager
async def running(port: int = 0, tls: GrpcTls | None = None) -> AsyncGenerator[Process]:
    process = Process(port, tls)
    await process.served.open()
    try:
        yield process
    finally:
        process.service.release.set()
        await process.served.close()


class Caller:
    """A client of the instances that a registry names; its clock is moved by the test."""

    def __init__(self, *addresses: str, limits: ClientLimits | None = None, ca: bytes | None = None) -> None:
        self.clock = ManualClock()
        self.registry = Listed(*addresses)
        self.transport = GrpcTransport(
            self.registry, signer(), self.clock, version="1.2.3", limits=limits, chance=lambda: 0.0, ca=ca
        )

    def context(self, seconds: float = 240.0, span: Span | None = None) -> Context:
        return Context(CUSTOMER, self.clock.seconds + seconds, "t", "r", span)

    async def send(self, *asks: Ask, operation: Operation[Any, Any] = Things.change) -> Sequence[Any]:
        return await self.transport.send(operation, asks, [self.context()] * len(asks))

    def start(self, *asks: Ask) -> asyncio.Task[Sequence[Any]]:
        return asyncio.create_task(self.send(*asks))


@contextlib.asynccontextmanager
async def calling(
    *addresses: str, limits: ClientLimits | None = None, ca: bytes | None = None
) -> AsyncGenerator[Caller]:
    caller = Caller(*addresses, limits=limits, ca=ca)
    try:
        yield caller
    finally:
        await caller.transport.close()


def kinds(outcomes: Sequence[Any]) -> list[type[Any]]:
    return [type(outcome) for outcome in outcomes]


async def closed_address() -> str:
    """An address of loopback on which no process listens."""
    server = GrpcServer(HOST, 0)
    await server.start([])
    await server.stop()
    return server.address


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


# --------------------------------------------------------------------------------------- what the end of a stream means

KEYED = Ask(idempotency_key="a")
CLASSES = {
    "safe": (Things.read, Ask(), Unavailable),
    "keyed": (Things.put, KEYED, Unavailable),
    "keyed, without a key": (Things.put, Ask(), OutcomeUnknown),
    "never": (Things.change, KEYED, OutcomeUnknown),
    "never, single": (Things.move, KEYED, OutcomeUnknown),
}
FAILURES = [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK]


def answer_of(**fields: Any) -> Callable[[int], bytes]:
    """The answer to the batch of an id."""
    return lambda batch_id: answers([new_outcomes(id=batch_id, **fields)])


class Answering:
    """An instance that ends each stream with a status, at once or at its first batch, or answers each batch."""

    def __init__(self) -> None:
        self.accepts = True
        self.code = grpc.StatusCode.OK
        self.trailer: tuple[tuple[str, str], ...] = ()
        self.answer: Callable[[int], bytes] = lambda batch_id: b""
        self.ends_at_once = False
        self.streams = 0
        self.batches = 0

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        async def exchange(messages: Any, context: Any) -> None:
            self.streams += 1
            if self.accepts:
                await context.send_initial_metadata(((ACCEPTED, "1"),))
                await self._answer(context)
            if self.code is not grpc.StatusCode.OK:
                await context.abort(self.code, "of the test", self.trailer)

        return grpc.stream_stream_rpc_method_handler(exchange)

    async def _answer(self, context: Any) -> None:
        """Batches, until one ends the stream."""
        while (message := await context.read()) is not NOTHING:
            self.batches += 1
            if self.code is not grpc.StatusCode.OK:
                return
            [batch] = read_batches(message)
            await context.write(self.answer(batch.id))
            if self.ends_at_once:
                return


@contextlib.asynccontextmanager
async def answering() -> AsyncGenerator[tuple[Answering, str]]:
    handlers = Answering()
    server = GrpcServer(HOST, 0, limits=RPC_LIMITS)
    await server.start([handlers])  # pyright: ignore[reportArgumentType]
    try:
        yield handlers, server.address
    finally:
        await server.stop(drain_seconds=0.0)


async def test_no_status_says_that_a_batch_that_was_sent_was_not_started():
    async with answering() as (handlers, address), running() as other, calling(address, other.address) as caller:
        for code in FAILURES:
            handlers.code = code
            for operation, request, expected in CLASSES.values():
                caller.clock.seconds += 10.0  # after an ejection it is probed, and gets the batch
                before = handlers.batches
                assert kinds(await caller.send(request, operation=operation)) == [expected], code
                assert handlers.batches == before + 1
        assert other.numbers == []


async def test_nothing_was_sent_where_a_stream_is_not_accepted_whatever_its_status():
    async with answering() as (handlers, address), running() as other, calling(address, other.address) as caller:
        handlers.accepts = False
        for number, code in enumerate(grpc.StatusCode):
            handlers.code = code
            caller.clock.seconds += 10.0
            assert kinds(await caller.send(Ask(number=number))) == [Said], code
            assert handlers.streams == number + 1
        assert other.numbers == list(range(len(grpc.StatusCode)))


async def test_an_instance_that_refuses_a_stream_leaves_the_batch_to_another():
    async with answering() as (handlers, address), running() as other, calling(address, other.address) as caller:
        handlers.accepts = False
        handlers.code, handlers.trailer = grpc.StatusCode.RESOURCE_EXHAUSTED, ((NOT_STARTED, "too_many_calls"),)
        assert kinds(await caller.send(Ask(number=1))) == [Said]
        assert (handlers.streams, other.numbers) == (1, [1])


@pytest.mark.parametrize("greets", [True, False])
async def test_a_stream_that_is_not_accepted_in_time_leaves_the_batch_to_another(*, greets: bool):
    """Initial metadata without our word may be those of a proxy in between."""
    received = list[object]()

    async def silent(messages: Any, context: Any) -> None:
        if greets:
            await context.send_initial_metadata((("server", "a proxy"),))
        received.append(await context.read())

    handler = grpc.stream_stream_rpc_method_handler(silent)
    server = GrpcServer(HOST, 0, limits=RPC_LIMITS)
    await server.start([SimpleNamespace(service=lambda details: handler)])  # pyright: ignore[reportArgumentType]
    limits = ClientLimits(connect_seconds=0.2)
    async with running() as other, calling(server.address, other.address, limits=limits) as caller:
        assert kinds(await caller.send(Ask(number=1))) == [Said]
    await server.stop(drain_seconds=0.0)
    assert all(message is NOTHING for message in received)


@pytest.mark.parametrize("reason", ["unknown_operation", "too_many_batches", "of a newer release"])
async def test_a_batch_that_was_refused_unstarted_goes_to_another_instance(reason: str):
    async with answering() as (handlers, address), running() as other, calling(address, other.address) as caller:
        handlers.answer = answer_of(not_started=reason, another_may_start_it=True)
        assert kinds(await caller.send(Ask(number=1))) == [Said]
        assert (handlers.batches, other.numbers) == (1, [1])


async def test_a_batch_that_the_service_does_not_understand_is_a_bug_and_goes_nowhere_else():
    async with answering() as (handlers, address), running() as other, calling(address, other.address) as caller:
        handlers.answer = answer_of(not_started="malformed_body")
        assert kinds(await caller.send(Ask())) == [Internal]
        assert other.numbers == []


ODD_ANSWERS: dict[str, Callable[[int], bytes]] = {
    "no message": lambda batch_id: b"\xff\xff",
    "nothing": lambda batch_id: b"",
    "of another batch": lambda batch_id: answers([new_outcomes(id=batch_id + 1, outcomes=b"\x90")]),
    "of none": lambda batch_id: answers([new_outcomes(outcomes=b"\x90")]),
    "neither outcomes nor a refusal": answer_of(),
    "no MessagePack": answer_of(outcomes=b"{}"),
    "lists in lists": answer_of(outcomes=b"\x91" * 60_000),
    "two outcomes for one request": answer_of(outcomes=b"\x92\x80\x80"),
    "more than the bound": answer_of(outcomes=b"x" * MIB),
    "more than a message may have": answer_of(is_too_large=True),
}


@pytest.mark.parametrize("answer", ODD_ANSWERS.values(), ids=ODD_ANSWERS)
async def test_an_answer_that_does_not_say_what_was_done_leaves_it_unknown(answer: Callable[[int], bytes]):
    async with (
        answering() as (handlers, address),
    ):
        handlers.answer, handlers.ends_at_once = answer, True
        for operation, expected in ((Things.change, OutcomeUnknown), (Things.read, Unavailable)):
            async with calling(address, limits=ClientLimits(answer_bytes=MIB // 2)) as caller:
                assert kinds(await caller.send(Ask(), operation=operation)) == [expected]


# ------------------------------------------------------------------------------------------------------------- streams


async def test_batches_share_one_stream_and_end_in_their_own_order():
    async with running() as one, calling(one.address) as caller:
        slow = caller.start(Ask(number=1, do="hang"))
        await until_true(lambda: one.numbers == [1])
        for number in range(2, 6):
            assert kinds(await caller.send(Ask(number=number))) == [Said]
        assert not slow.done()
        one.service.release.set()
        assert kinds(await slow) == [Said]
        assert one.served.calls == 1


async def test_batches_that_wait_for_a_writer_share_a_message_up_to_a_size():
    async with running() as one, Link(one.served.port) as link, calling(link.address) as caller:
        assert kinds(await caller.send(Ask(number=0))) == [Said]
        link.passes.clear()
        calls = [caller.start(Ask(number=1, text="x" * (12 * MIB)))]  # more than sockets take
        stream = next(iter(caller.transport._channels._channels.values())).streams["things"]
        calls += [caller.start(Ask(number=n, text="x" * (LARGE_BYTES // 3))) for n in range(2, 8)]
        await until_true(lambda: len(stream._unsent) == 6)
        taken = [len(stream._next()) for _ in range(4)]
        assert taken == [2, 2, 2, 0]
        for call in calls:
            call.cancel()
        link.passes.set()


async def test_a_message_may_be_larger_than_a_batch_of_its_caller():
    limits = ClientLimits(batch_bytes=10_000, answer_bytes=30_000)
    async with running() as one, calling(one.address, limits=limits) as caller:
        hanging = [caller.start(Ask(number=n, text="x" * 9_000, do="hang")) for n in range(20)]
        await until_true(lambda: len(one.numbers) == 20)
        assert kinds(await caller.send(Ask(number=20, text="x" * 9_000))) == [Said]
        one.service.release.set()
        assert [kinds(await call) for call in hanging] == [[Said]] * 20
        assert one.served.calls == 1


async def test_a_batch_whose_callers_leave_before_it_is_written_is_not_sent():
    async with running() as one, Link(one.served.port) as link, calling(link.address) as caller:
        assert kinds(await caller.send(Ask(number=1))) == [Said]
        link.passes.clear()
        large = caller.start(Ask(number=2, text="x" * (12 * MIB)))  # more than sockets take
        leaving, staying = caller.start(Ask(number=3)), caller.start(Ask(number=4))
        held = next(iter(caller.transport._channels._channels.values()))
        await until_true(lambda: len(held.streams["things"]._unsent) == 2)
        leaving.cancel()
        link.passes.set()
        assert kinds(await large) + kinds(await staying) == [Said, Said]
        assert one.numbers == [1, 2, 4]


async def test_a_stream_without_batches_ends_and_the_next_batch_opens_another(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(streams, "IDLE_SECONDS", 0.05)
    async with running() as one, calling(one.address) as caller:
        hanging = caller.start(Ask(number=1, do="hang"))
        await until_true(lambda: one.numbers == [1])
        await asyncio.sleep(0.2)  # four times the bound: a stream with a batch stays
        assert kinds(await caller.send(Ask(number=2))) == [Said]
        assert one.served.calls == 1
        one.service.release.set()
        assert kinds(await hanging) == [Said]
        await until_true(lambda: one.served.running == 0)

        assert kinds(await caller.send(Ask(number=3))) == [Said]
        assert one.served.calls == 2


async def test_an_instance_that_drains_ends_its_streams_when_their_callers_know():
    """No batch is on its way when a stream ends, so that none is unknown."""
    async with running() as one, calling(one.address) as caller:
        calls = [caller.start(Ask(number=n)) for n in range(40)]
        hanging = caller.start(Ask(number=99, do="hang"))
        await until_true(lambda: 99 in one.numbers)
        one.served.handlers.drain(DRAIN_SECONDS)
        assert [kinds(await call) for call in calls] == [[Said]] * 40
        assert one.served.running == 1
        one.service.release.set()
        assert kinds(await hanging) == [Said]
        await until_true(lambda: one.served.running == 0)
        with pytest.raises(Unavailable):
            await caller.send(Ask(number=100))


async def test_an_answer_of_more_than_a_message_may_have_leaves_other_batches_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(serving, "LARGEST_ANSWER_BYTES", 10_000)
    async with running() as one, calling(one.address) as caller:
        hanging = caller.start(Ask(number=1, do="hang"))
        await until_true(lambda: one.numbers == [1])
        assert kinds(await caller.send(Ask(number=2, text="x" * 10_000))) == [OutcomeUnknown]
        one.service.release.set()
        assert kinds(await hanging) == [Said]


async def test_an_answer_beyond_the_bound_of_a_caller_leaves_other_batches_alone():
    async with running() as one, calling(one.address, limits=ClientLimits(answer_bytes=10_000)) as caller:
        hanging = caller.start(Ask(number=1, do="hang"))
        await until_true(lambda: one.numbers == [1])
        assert kinds(await caller.send(Ask(number=2, text="x" * 10_000))) == [OutcomeUnknown]
        one.service.release.set()
        assert kinds(await hanging) == [Said]


async def test_a_fault_at_the_instance_leaves_the_outcome_unknown_at_once(monkeypatch: pytest.MonkeyPatch):
    async def broken(*_: object, **__: object) -> bytes:
        raise RuntimeError("of the test")

    async with running() as one, calling(one.address) as caller:
        assert kinds(await caller.send(Ask(number=1))) == [Said]
        with monkeypatch.context() as broken_now:
            broken_now.setattr(one.served.handlers._receiver, "run", broken)
            async with asyncio.timeout(BOUND_SECONDS):
                assert kinds(await caller.send(Ask(number=2))) == [OutcomeUnknown]
        assert kinds(await caller.send(Ask(number=3))) == [Said]
        assert one.served.calls == 1


async def test_batches_beyond_the_bound_of_a_stream_are_refused_unstarted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(serving, "MOST_BATCHES", 2)
    async with running() as one, running() as other, calling(one.address) as caller:
        hanging = [caller.start(Ask(number=n, do="hang")) for n in range(2)]
        await until_true(lambda: len(one.numbers) == 2)
        with pytest.raises(Unavailable):
            await caller.send(Ask(number=2))
        caller.registry.list(one.address, other.address)
        assert kinds(await caller.send(Ask(number=3))) == [Said]
        one.service.release.set()
        assert [kinds(await call) for call in hanging] == [[Said]] * 2
        assert (sorted(one.numbers), other.numbers) == ([0, 1], [3])


# ----------------------------------------------------------------------------------------------- connections that break


class Link:
    """A TCP connection in between, which can be cut, or stand still."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._writers: list[asyncio.StreamWriter] = []
        self._pipes: set[asyncio.Task[None]] = set()
        self.passes = asyncio.Event()
        self.passes.set()
        self.connections = 0

    async def __aenter__(self) -> Link:
        self._server = await asyncio.start_server(self._serve, HOST, 0)
        self.address = f"{HOST}:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.cut()
        for pipe in self._pipes:
            pipe.cancel()

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        onward_reader, onward = await asyncio.open_connection(HOST, self._target)
        self._writers += [writer, onward]
        for pair in ((reader, onward), (onward_reader, writer)):
            self._pipes.add(asyncio.create_task(self._pipe(*pair)))

    async def _pipe(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65_536):
                await self.passes.wait()
                writer.write(data)
                await writer.drain()
        writer.close()


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
