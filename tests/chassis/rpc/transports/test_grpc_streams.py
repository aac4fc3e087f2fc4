"""Streams of batches over gRPC: what their end means, when they end, and what their messages carry."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from mercato.chassis.contract import Internal, OutcomeUnknown, Unavailable
from mercato.chassis.grpc import NOTHING, GrpcServer
from mercato.chassis.rpc.transports.direct.client import ClientLimits
from mercato.chassis.rpc.transports.direct.wire import NOT_STARTED
from mercato.chassis.rpc.transports.grpc import server as serving, streams
from mercato.chassis.rpc.transports.grpc.wire import (
    ACCEPTED,
    LARGE_BYTES,
    RPC_LIMITS,
    answers,
    new_outcomes,
    read_batches,
)
from mercato.testing.waiting import BOUND_SECONDS, until_true

from .conformance import Ask, Said, Things
from .grpc_served import (
    CLASSES,
    Link,
    calling,
    kinds,
    running,
)
from .served import HOST

MIB = 1_048_576
DRAIN_SECONDS = 3.0

# --------------------------------------------------------------------------------------- what the end of a stream means

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


async def test_a_stream_that_is_admitted_just_before_its_instance_drains_is_refused(monkeypatch: pytest.MonkeyPatch):
    """It would get no goodbye, and stay open."""
    monkeypatch.setattr(streams, "IDLE_SECONDS", 1e9)
    async with running() as one, running() as two, calling(one.address, two.address) as caller:
        admit = one.served.service

        def admit_and_drain(details: grpc.HandlerCallDetails) -> Any:
            handler = admit(details)
            one.served.handlers.drain(DRAIN_SECONDS)
            return handler

        monkeypatch.setattr(one.served, "service", admit_and_drain)
        calls = [caller.start(Ask(number=n, do="hang")) for n in range(8)]
        await until_true(lambda: sorted(two.numbers) == list(range(8)))
        two.service.release.set()
        assert [kinds(await call) for call in calls] == [[Said]] * 8
        assert one.served.calls > 0
        await until_true(lambda: one.served.running == 0)


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
