"""The transport between processes: over real sockets on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any, Final

import msgspec
import pytest

from chassis.rpc.breakers import ManualClock
from mercato import topology
from mercato.chassis.contract import (
    SERVICE_ROLE,
    Actor,
    Context,
    DeadlineExceeded,
    Forbidden,
    Internal,
    InvalidRequest,
    Operation,
    OutcomeUnknown,
    ServiceError,
    Unavailable,
)
from mercato.chassis.contract.context import KEPT, SAMPLED, Place
from mercato.chassis.contract.places import remote
from mercato.chassis.observability.clock import Clock, SystemClock
from mercato.chassis.rpc.balancing import FIRST_PAUSE_SECONDS
from mercato.chassis.rpc.codec import decode_outcomes, encode_outcomes, encode_requests
from mercato.chassis.rpc.server import Server
from mercato.chassis.rpc.transports import Transport
from mercato.chassis.rpc.transports.http.client import HttpClientLimits, HttpTransport
from mercato.chassis.rpc.transports.http.wire import RPC_LIMITS
from mercato.chassis.rpc.trust import TokenSigner
from mercato.testing.waiting import until_true

from .conformance import CUSTOMER, SECRET, Ask, Conformance, Refused, Said, Stage, Things
from .served import HOST, Listed, OverHttp, RawServer, Served, read_message, running, signer

DRAIN_SECONDS = 3.0
MIB = 1_048_576


class TestHttp(Conformance):
    def transport(self, servers: Mapping[str, Server], clock: Clock) -> Transport:
        return OverHttp(servers, clock)

    async def test_a_message_really_travels(self, stage: Stage):
        request = Ask(number=1)
        with stage.acting(CUSTOMER):
            answer = await stage.things.change(request)
        assert answer.echo is not request


class Caller:
    """A client of the instances that a registry names; its clock is moved by the test."""

    def __init__(self, *addresses: str, limits: HttpClientLimits | None = None) -> None:
        self.clock = ManualClock()
        self.registry = Listed(*addresses)
        # Of those that are available it names the first ones; jitter is none.
        self.transport = HttpTransport(
            self.registry, signer(), self.clock, version="1.2.3", limits=limits, chance=lambda: 0.0
        )

    def context(self, seconds: float = 30.0, trace_id: str = "t") -> Context:
        return Context(CUSTOMER, self.clock.seconds + seconds, trace_id, "r")

    async def send(self, *asks: Ask, operation: Operation[Any, Any] = Things.change) -> Sequence[Any]:
        return await self.transport.send(operation, asks, [self.context()] * len(asks))

    def start(self, *asks: Ask) -> asyncio.Task[Sequence[Any]]:
        return asyncio.create_task(self.send(*asks))


@contextlib.asynccontextmanager
async def calling(*addresses: str, limits: HttpClientLimits | None = None) -> AsyncGenerator[Caller]:
    caller = Caller(*addresses, limits=limits)
    try:
        yield caller
    finally:
        await caller.transport.close()


def kinds(outcomes: Sequence[Any]) -> list[type[Any]]:
    return [type(outcome) for outcome in outcomes]


async def closed_port() -> int:
    """A port of loopback on which no process listens."""
    server = RawServer(b"")
    await server.open()
    await server.close()
    return server.port


# ------------------------------------------------------------------------------------------------------------ balancing


async def test_two_instances_share_the_load():
    async with running() as one, running() as two, calling(one.address, two.address) as caller:
        calls = [caller.start(Ask(number=n, do="hang")) for n in range(20)]
        await until_true(lambda: len(one.numbers) + len(two.numbers) == 20)
        assert (len(one.numbers), len(two.numbers)) == (10, 10)
        one.service.release.set()
        two.service.release.set()
        assert [kinds(await call) for call in calls] == [[Said]] * 20


async def test_an_instance_without_a_listener_is_left_alone_and_comes_back_by_one_probe():
    port = await closed_port()
    async with running() as alive, calling(f"{HOST}:{port}", alive.address) as caller:
        assert kinds(await caller.send(Ask(number=0))) == [Said]
        watcher = RawServer(b"")
        await watcher.open(port)
        for number in range(1, 11):
            assert kinds(await caller.send(Ask(number=number))) == [Said]
        assert watcher.connections == 0
        await watcher.close()
        assert alive.numbers == list(range(11))

        async with running(port) as back:
            caller.clock.seconds += FIRST_PAUSE_SECONDS
            calls = [caller.start(Ask(number=n, do="hang")) for n in range(100, 105)]
            await until_true(lambda: len(back.numbers) + len(alive.numbers) == 16)
            assert len(back.numbers) == 1
            back.service.release.set()
            alive.service.release.set()
            assert [kinds(await call) for call in calls] == [[Said]] * 5
            assert kinds(await caller.send(Ask(number=200))) == [Said]
            assert back.numbers[1:] == [200]


async def test_where_no_instance_can_be_reached_the_service_is_unavailable():
    async with calling(f"{HOST}:{await closed_port()}", f"{HOST}:{await closed_port()}") as caller:
        with pytest.raises(Unavailable, match="things is not available"):
            await caller.send(Ask())
    async with calling() as caller:
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
        # As busy as the old one, which would therefore be chosen.
        busy = caller.start(Ask(number=2, do="hang"))
        await until_true(lambda: new.numbers == [2])
        old.served.app.drain(DRAIN_SECONDS)
        for number in range(3, 13):
            assert kinds(await caller.send(Ask(number=number))) == [Said]
        # Beside the one that hangs, one was refused unstarted, and went on to the new one; the next ones did not try.
        assert old.served.requests == 2
        old.service.release.set()
        new.service.release.set()
        assert kinds(await last) + kinds(await busy) == [Said, Said]
    assert (old.numbers, new.numbers) == ([1], list(range(2, 13)))


async def test_a_process_that_starts_again_after_a_drain_gets_calls_when_that_is_over():
    async with running() as old, running() as other, calling(old.address, other.address) as caller:
        old.served.app.drain(DRAIN_SECONDS)
        assert kinds(await caller.send(Ask(number=1))) == [Said]
        await old.served.close()
        async with running(old.served.port) as again:
            caller.clock.seconds += DRAIN_SECONDS
            assert kinds(await caller.send(Ask(number=2))) == [Said]
            assert again.numbers == [2]


async def test_the_next_instance_gets_the_time_that_is_left_then():
    draining = b"HTTP/1.1 503 Service Unavailable\r\nmercato-not-started: draining\r\ncontent-length: 0\r\n\r\n"
    first, second = RawServer(draining), RawServer(b"")
    await first.open()
    await second.open()
    async with calling(first.address, second.address) as caller:

        def pass_time() -> None:
            caller.clock.seconds += 10.0

        first.on_request = pass_time
        assert kinds(await caller.send(Ask(), operation=Things.read)) == [Unavailable]
    await first.close()
    await second.close()
    head, _, body = second.requests[0].partition(b"\r\n\r\n")
    assert b"mercato-remaining-ms: 20000.000" in head
    assert msgspec.msgpack.decode(body)[0]["remaining_ms"] == pytest.approx(20_000)


async def test_a_batch_that_the_service_does_not_understand_is_a_bug_and_goes_nowhere_else():
    refusal = b"HTTP/1.1 400 Bad Request\r\nmercato-not-started: malformed_body\r\ncontent-length: 0\r\n"
    raw = RawServer(refusal + b"connection: close\r\n\r\n")
    await raw.open()
    async with running() as other, calling(raw.address, other.address) as caller:
        for operation in (Things.read, Things.change):
            assert kinds(await caller.send(Ask(), operation=operation)) == [Internal]
        assert other.numbers == []
    await raw.close()
    assert len(raw.requests) == 2


async def test_the_list_of_the_registry_is_followed():
    async with running() as one, running() as two, calling(one.address) as caller:
        await caller.send(Ask(number=1))
        caller.registry.list(two.address)
        await caller.send(Ask(number=2))
        caller.registry.list()
        with pytest.raises(Unavailable):
            await caller.send(Ask(number=3))
    assert (one.numbers, two.numbers) == ([1], [2])


async def test_errors_that_the_service_answers_eject_no_instance():
    async with running() as one, calling(one.address) as caller:
        for do, kind in (("poison", Internal), ("down", Unavailable), ("down", Unavailable), ("", Said)):
            assert kinds(await caller.send(Ask(do=do))) == [kind]


async def test_an_operation_that_one_instance_does_not_know_is_asked_of_another():
    older = Served({})
    await older.open()
    try:
        async with running() as newer, calling(older.address, newer.address) as caller:
            assert kinds(await caller.send(Ask())) == [Said]
            caller.registry.list(older.address)
            with pytest.raises(Unavailable, match="things is not available"):
                await caller.send(Ask())
            assert older.requests == 2  # it is not ejected for it
    finally:
        await older.close()


# ----------------------------------------------------------------------------------------------- connections that break

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/vnd.msgpack\r\n"
CUTS = {
    "before the answer": RawServer(b""),
    "in its head": RawServer(HEAD[:20]),
    "in its body": RawServer(HEAD + b"content-length: 100\r\n\r\n\x91"),
    "in a chunk": RawServer(HEAD + b"transfer-encoding: chunked\r\n\r\n64\r\n\x91"),
    "by a reset": RawServer(HEAD + b"content-length: 100\r\n\r\n\x91", reset=True),
    "by what is no HTTP": RawServer(b"220 mail.example ESMTP\r\n\r\n"),
}
KEYED = Ask(idempotency_key="a")
CLASSES = {
    "safe": (Things.read, Ask(), Unavailable),
    "safe, single": (Things.look, Ask(), Unavailable),
    "keyed": (Things.put, KEYED, Unavailable),
    "keyed, without a key": (Things.put, Ask(), OutcomeUnknown),
    "never": (Things.change, KEYED, OutcomeUnknown),
    "never, single": (Things.move, KEYED, OutcomeUnknown),
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize(("operation", "request_", "expected"), CLASSES.values(), ids=CLASSES)
async def test_a_connection_that_is_cut_is_unavailability_only_where_repeating_is_safe(
    cut: RawServer, operation: Operation[Any, Any], request_: Ask, expected: type[ServiceError]
):
    raw = RawServer(cut.answer, reset=cut.reset)
    await raw.open()
    async with running() as other, calling(raw.address, other.address) as caller:
        assert kinds(await caller.send(request_, operation=operation)) == [expected]
        # It was not repeated, and the instance is left alone.
        assert (len(raw.requests), other.numbers, other.service.singles) == (1, [], [])
        assert kinds(await caller.send(request_, operation=operation)) == [Said]
        assert raw.connections == 1
    await raw.close()


async def test_a_connection_that_was_kept_and_breaks_at_the_next_batch_is_not_a_reason_to_repeat_it():
    """aiohttp repeats what is idempotent in HTTP, and a POST is not."""
    outcomes = encode_outcomes(Things.read, [Refused(number=1)])
    answer = HEAD + b"content-length: %d\r\n\r\n" % len(outcomes) + outcomes
    raw = RawServer(b"", earlier=[answer])
    await raw.open()
    async with calling(raw.address) as caller:
        assert kinds(await caller.send(Ask(number=1), operation=Things.read)) == [Refused]
        assert kinds(await caller.send(Ask(number=2))) == [OutcomeUnknown]
    await raw.close()
    assert (raw.connections, len(raw.requests)) == (1, 2)


async def test_each_request_of_a_batch_that_was_cut_has_its_own_outcome():
    raw = RawServer(b"")
    await raw.open()
    async with calling(raw.address) as caller:
        outcomes = await caller.send(KEYED, Ask(), KEYED, operation=Things.put)
    await raw.close()
    assert kinds(outcomes) == [Unavailable, OutcomeUnknown, Unavailable]


def compressed(body: bytes) -> bytes:
    sent = gzip.compress(body)
    return HEAD + b"content-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(sent) + sent


ODD_ANSWERS = {
    "an error of a proxy": b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 5\r\n\r\nEnvoy",
    "a redirect": b"HTTP/1.1 307 Temporary Redirect\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n",
    "no MessagePack": HEAD + b"content-length: 2\r\n\r\n{}",
    "nothing": HEAD + b"content-length: 0\r\n\r\n",
    "a list that is longer than it is": HEAD + b"content-length: 5\r\n\r\n\xdd\xff\xff\xff\xff",
    "lists in lists": HEAD + b"content-length: 60000\r\n\r\n" + b"\x91" * 60_000,
    "two outcomes for one request": HEAD + b"content-length: 3\r\n\r\n\x92\x80\x80",
    "a compressed one": compressed(b"\x91\x80"),
    "more than the bound": HEAD + b"content-length: 99999999999\r\n\r\n",
    "more than the bound, in chunks": HEAD
    + b"transfer-encoding: chunked\r\n\r\n100000\r\n" + b"x" * MIB + b"\r\n",
}  # fmt: skip


@pytest.mark.parametrize("answer", ODD_ANSWERS.values(), ids=ODD_ANSWERS)
async def test_an_answer_that_does_not_say_what_was_done_leaves_it_unknown_and_ejects_nothing(answer: bytes):
    raw = RawServer(answer.replace(b"\r\n", b"\r\nconnection: close\r\n", 1))
    await raw.open()
    async with calling(raw.address, limits=HttpClientLimits(answer_bytes=MIB // 2)) as caller:
        for operation, expected in ((Things.change, OutcomeUnknown), (Things.read, Unavailable)):
            assert kinds(await caller.send(Ask(), operation=operation)) == [expected]
    await raw.close()
    assert len(raw.requests) == 2


# ------------------------------------------------------------------------------------------------- bounds of the client


async def test_a_batch_beyond_the_bound_goes_in_parts_and_a_request_beyond_it_fails_alone():
    async with running() as one, calling(one.address, limits=HttpClientLimits(batch_bytes=3_000)) as caller:
        asks = [Ask(number=n, text="x" * (4_000 if n == 3 else 1_000)) for n in range(6)]
        outcomes = await caller.send(*asks)
    assert kinds(outcomes) == [Said, Said, Said, InvalidRequest, Said, Said]
    assert one.numbers == [0, 1, 2, 4, 5]
    assert max(map(len, one.service.batches)) == 2


async def test_calls_of_one_operation_that_wait_leave_room_for_others():
    async with running() as one, calling(one.address, limits=HttpClientLimits(calls=2)) as caller:
        waiting = [caller.start(Ask(number=n, do="hang")) for n in range(5)]
        await until_true(lambda: len(one.numbers) == 2)
        assert kinds(await caller.send(Ask(number=9), operation=Things.read)) == [Said]
        assert len(one.numbers) == 3
        one.service.release.set()
        assert [kinds(await call) for call in waiting] == [[Said]] * 5


async def test_a_batch_whose_time_is_over_is_not_sent():
    async with running() as one, calling(one.address) as caller:
        with pytest.raises(DeadlineExceeded):
            await caller.transport.send(Things.read, [Ask()], [caller.context(seconds=0.0)])
        assert one.served.requests == 0


async def test_a_batch_that_is_not_answered_ends_at_the_deadline_and_ejects_nothing():
    async with running() as one, calling(one.address) as caller:
        with pytest.raises(DeadlineExceeded):
            await caller.transport.send(Things.read, [Ask(do="hang")], [caller.context(seconds=0.05)])
        assert kinds(await caller.send(Ask())) == [Said]


async def test_waiting_for_a_free_connection_is_part_of_the_time_and_ejects_nothing():
    async with running() as one, calling(one.address, limits=HttpClientLimits(connections=1)) as caller:
        holding = caller.start(Ask(number=1, do="hang"))
        await until_true(lambda: one.numbers == [1])
        with pytest.raises(DeadlineExceeded):
            await caller.transport.send(Things.read, [Ask(number=2)], [caller.context(seconds=0.05)])
        one.service.release.set()
        assert kinds(await holding) == [Said]
        assert kinds(await caller.send(Ask(number=3))) == [Said]
    assert one.numbers == [1, 3]


async def test_a_proxy_of_the_environment_gets_no_batch(monkeypatch: pytest.MonkeyPatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://{HOST}:1")
    async with running() as one, calling(one.address) as caller:
        assert kinds(await caller.send(Ask())) == [Said]


async def test_the_head_has_the_place_in_the_trace_if_that_is_recorded_and_nothing_else_of_it():
    raw = RawServer(b"")
    await raw.open()
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    span = remote([Place(trace_id, SAMPLED | KEPT, 0xB7AD6B7169203331)])
    async with calling(raw.address) as caller:
        for context in (
            msgspec.structs.replace(caller.context(trace_id=trace_id), span=span),
            caller.context(trace_id="x\r\nhost: elsewhere"),
        ):
            caller.clock.seconds += 60.0
            later = msgspec.structs.replace(context, deadline=caller.clock.seconds + 30.0)
            await caller.transport.send(Things.read, [Ask()], [later])
    await raw.close()
    heads = [request.partition(b"\r\n\r\n")[0] for request in raw.requests]
    assert f"traceparent: 00-{trace_id}-b7ad6b7169203331-01".encode() in heads[0]
    assert b"mercato-version: 1.2.3" in heads[0]
    assert b"mercato-remaining-ms: 30000.000" in heads[0]
    assert b"traceparent" not in heads[1]
    assert b"elsewhere" not in heads[1]


# ------------------------------------------------------------------------------------------------------ hostile callers


def batch(*asks: Ask) -> bytes:
    now = SystemClock.monotonic()
    return encode_requests(asks, [Context(CUSTOMER, now + 30.0, "t", "r")] * len(asks), now)


TOKEN: Final = "TOKEN"


def with_token(sent: bytes) -> bytes:
    """With the token of a caller that may call everything here."""
    return sent.replace(b"Bearer TOKEN", b"Bearer " + signer().token("things").encode())


def request(
    body: bytes,
    path: str = "/rpc/things/change",
    *,
    method: str = "POST",
    content_type: str = "application/vnd.msgpack",
    remaining: str = "30000",
    token: str = TOKEN,
    more: str = "",
) -> bytes:
    """Without a token, if it is empty. `TOKEN` stands for one that `say` makes, which lives for a minute."""
    lines = [f"{method} {path} HTTP/1.1", "host: things", f"content-length: {len(body)}"]
    lines += [f"content-type: {content_type}"] if content_type else []
    lines += [f"mercato-remaining-ms: {remaining}"] if remaining else []
    lines += [f"authorization: Bearer {token}"] if token else []
    lines += [more] if more else []
    return "\r\n".join([*lines, "", ""]).encode() + body


async def say(address: str, sent: bytes) -> tuple[int, str, bytes]:
    """Status, reason of `mercato-not-started`, and body of the answer to raw bytes."""
    host, _, port = address.partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(with_token(sent))
        head, _, body = (await read_message(reader)).partition(b"\r\n\r\n")
    finally:
        writer.transport.abort()
    lines = head.decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines[1:])
    return int(lines[0].split(" ")[1]), headers.get("mercato-not-started", ""), body


def with_remaining(value: float) -> bytes:
    (sent,) = msgspec.msgpack.decode(batch(Ask()))
    return msgspec.msgpack.encode([{**sent, "remaining_ms": value}])


GOOD = batch(Ask(number=1))
UNTRUSTED: Mapping[str, Callable[[], bytes]] = {
    "no token": lambda: request(GOOD, token=""),
    "another scheme": lambda: with_token(request(GOOD)).replace(b"Bearer", b"Basic"),
    "what is no token": lambda: request(GOOD, token="x"),
    "a token for another service": lambda: request(GOOD, token=signer().token("stock")),
    "an altered token": lambda: request(GOOD, token=signer().token("things")[:-8] + "AAAAAAAA"),
}


@pytest.mark.parametrize("sent", UNTRUSTED.values(), ids=UNTRUSTED)
async def test_a_batch_without_a_valid_token_starts_nothing(sent: Callable[[], bytes]):
    async with running() as one:
        assert (await say(one.address, sent()))[:2] == (401, "untrusted")
        assert (one.numbers, one.service.singles) == ([], [])


async def test_an_operation_that_the_caller_is_not_granted_is_forbidden():
    async with running() as one:
        status, _, body = await say(one.address, request(GOOD, token=signer("products").token("things")))
        assert (status, kinds(decode_outcomes(Things.change, body))) == (200, [Forbidden])
        assert one.numbers == []


async def test_only_what_is_asked_in_the_name_of_another_role_is_forbidden():
    now = SystemClock.monotonic()
    contexts = [Context(actor, now + 30.0, "t", "r") for actor in (CUSTOMER, Actor(SERVICE_ROLE), CUSTOMER)]
    sent = encode_requests([Ask(number=n) for n in range(3)], contexts, now)
    async with running() as one:
        _, _, body = await say(one.address, request(sent, token=signer("gateway").token("things")))
        assert kinds(decode_outcomes(Things.change, body)) == [Said, Forbidden, Said]
        assert one.numbers == [0, 2]


async def test_a_caller_with_a_forged_token_gets_an_internal_error():
    async with running() as one, calling(one.address) as caller:
        caller.transport._signer = TokenSigner("orders", b"x" * 32, SystemClock())
        assert kinds(await caller.send(Ask())) == [Internal]
        assert one.numbers == []


REFUSED = {
    "nothing": (request(b""), 400, "malformed_body"),
    "half a batch": (request(GOOD[: len(GOOD) // 2]), 400, "malformed_body"),
    "a batch and more": (request(GOOD + b"\xc0"), 400, "malformed_body"),
    "JSON": (request(b"[{}]"), 400, "malformed_body"),
    "no list": (request(b"\x01"), 400, "malformed_body"),
    "a list of numbers": (request(b"\x91\x01"), 400, "malformed_body"),
    "a list that is longer than it is": (request(b"\xdd\xff\xff\xff\xff"), 400, "malformed_body"),
    "a text that is longer than it is": (request(b"\x91\x81\xdb\xff\xff\xff\xff"), 400, "malformed_body"),
    "lists in lists": (request(b"\x91\x81\xa4body" + b"\x91" * 100_000 + b"\xc0"), 400, "malformed_body"),
    "a time that is no number": (request(with_remaining(float("nan"))), 400, "malformed_body"),
    "a time without end": (request(with_remaining(float("inf"))), 400, "malformed_body"),
    "a time below zero": (request(with_remaining(-1.0)), 400, "malformed_body"),
    "no requests": (request(b"\x90"), 400, "wrong_batch_size"),
    "too many requests": (request(batch(*[Ask()] * 17)), 400, "wrong_batch_size"),
    "two requests for one": (request(batch(Ask(), Ask()), "/rpc/things/move"), 400, "wrong_batch_size"),
    "another content type": (request(GOOD, content_type="application/json"), 415, "wrong_content_type"),
    "no content type": (request(GOOD, content_type=""), 415, "wrong_content_type"),
    "an encoding": (request(GOOD, more="content-encoding: gzip"), 415, "wrong_content_type"),
    "no remaining time": (request(GOOD, remaining=""), 400, "malformed_header"),
    "a word for the time": (request(GOOD, remaining="soon"), 400, "malformed_header"),
    "NaN for the time": (request(GOOD, remaining="nan"), 400, "malformed_header"),
    "infinity for the time": (request(GOOD, remaining="inf"), 400, "malformed_header"),
    "a time that is over": (request(GOOD, remaining="0"), 400, "malformed_header"),
    "another method": (request(GOOD, method="PUT"), 405, "wrong_method"),
    "an unknown operation": (request(GOOD, "/rpc/things/nothing"), 404, "unknown_operation"),
    "what is no operation": (request(GOOD, "/rpc/things/__init__"), 404, "unknown_operation"),
    "an unknown service": (request(GOOD, "/rpc/others/change"), 404, "unknown_operation"),
    "no operation": (request(GOOD, "/rpc/things"), 404, "unknown_operation"),
    "a longer path": (request(GOOD, "/rpc/things/change/1"), 404, "unknown_operation"),
    "another path": (request(GOOD, "/things/change"), 404, "unknown_operation"),
    "a giant length": (
        request(b"").replace(b"content-length: 0", b"content-length: 999999999999999"), 413, ""
    ),
    "no HTTP": (b"\x91\x81\xa4body\r\n\r\n", 400, ""),
}  # fmt: skip


@pytest.mark.parametrize(("sent", "status", "reason"), REFUSED.values(), ids=REFUSED)
async def test_hostile_bytes_are_refused_start_nothing_and_leave_the_server_at_work(
    sent: bytes, status: int, reason: str
):
    async with running() as one:
        answered, said, body = await say(one.address, sent)
        assert (answered, said) == (status, reason)
        assert msgspec.json.decode(body)["detail"]
        assert (one.numbers, one.service.singles) == ([], [])
        answered, _, body = await say(one.address, request(GOOD))
        assert (answered, kinds(decode_outcomes(Things.change, body))) == (200, [Said])


async def test_a_caller_that_leaves_before_its_batch_has_ended_starts_nothing():
    head = with_token(request(b"")).replace(b"content-length: 0", b"transfer-encoding: chunked")
    async with running() as one:
        _, writer = await asyncio.open_connection(HOST, one.served.port)
        writer.write(head + b"%x\r\n" % len(GOOD) + GOOD + b"\r\n")  # without the chunk that says that it was the last
        await until_true(lambda: one.served.requests == 1)
        writer.transport.abort()
        assert (await say(one.address, request(GOOD)))[0] == 200
        assert one.numbers == [1]


async def test_a_batch_that_was_arriving_when_the_drain_began_is_refused_unstarted():
    async with running() as one:
        reader, writer = await asyncio.open_connection(HOST, one.served.port)
        sent = with_token(request(GOOD))
        writer.write(sent[:-1])
        await until_true(lambda: one.served.requests == 1)
        one.served.app.drain(DRAIN_SECONDS)
        writer.write(sent[-1:])
        assert b"mercato-not-started: draining\r\nmercato-draining-seconds: " in await read_message(reader)
        writer.transport.abort()
        assert one.numbers == []


async def test_a_batch_whose_caller_left_is_finished():
    """What was begun may be behind its commit."""
    finished = asyncio.Event()
    async with running() as one:

        async def wait_and_note(asked: Any) -> Sequence[Said | ServiceError]:
            answers = await one.service.run(asked)
            finished.set()
            return answers

        one.server.register(Things.change, wait_and_note)
        _, writer = await asyncio.open_connection(HOST, one.served.port)
        writer.write(with_token(request(batch(Ask(do="hang")))))
        await until_true(lambda: one.numbers == [0])
        writer.transport.abort()
        one.service.release.set()
        await until_true(finished.is_set)


async def test_a_batch_whose_callers_have_stopped_waiting_is_cancelled():
    async with running() as one:
        status, _, body = await say(one.address, request(batch(Ask(do="hang")), remaining="20"))
        assert (status, kinds(decode_outcomes(Things.change, body))) == (200, [DeadlineExceeded])


class BrokenServer(Server):
    """A bug in the chassis itself, where no handler's error is expected."""

    async def dispatch(
        self, operation: Operation[Any, Any], requests: Sequence[Any], contexts: Sequence[Context]
    ) -> Sequence[Any]:
        raise RuntimeError(SECRET)


async def test_the_text_of_an_unexpected_exception_does_not_reach_the_caller():
    broken = Served({"things": BrokenServer(Things, SystemClock())})
    await broken.open()
    try:
        status, reason, body = await say(broken.address, request(GOOD))
        assert (status, reason) == (500, "")
        assert SECRET.encode() not in body
        assert b"RuntimeError" not in body
        async with calling(broken.address) as caller:
            (outcome,) = await caller.send(Ask())
        assert isinstance(outcome, OutcomeUnknown)
        assert SECRET not in f"{outcome!s} {outcome!r} {outcome.__cause__!r}"
    finally:
        await broken.close()


def test_the_server_takes_whatever_the_client_sends():
    limits = HttpClientLimits()
    assert limits.batch_bytes <= RPC_LIMITS.body_bytes
    assert limits.keep_alive_seconds < RPC_LIMITS.keep_alive_seconds
    longest_s = max(operation.deadline_ms for operation in every_operation()) / 1_000
    assert longest_s < RPC_LIMITS.request_seconds + RPC_LIMITS.response_grace_seconds


def every_operation() -> list[Operation[Any, Any]]:
    return [operation for contract in topology.SERVICES.values() for operation in contract.operations.values()]
