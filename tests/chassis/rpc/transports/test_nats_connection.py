"""Connections to NATS that are lost, refused or silent, and how they come back."""

from __future__ import annotations

import asyncio
import signal
import ssl
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, cast

import pytest
import pytest_asyncio
from nats.aio.msg import Msg
from structlog.testing import capture_logs

from embedded_nats.broker import PASSWORD, Broker, ScriptedBroker
from mercato.chassis.contract import OutcomeUnknown, Unavailable
from mercato.chassis.rpc.transports.nats import NatsConnection, NotConnected
from mercato.testing.certificates import certificate
from mercato.testing.waiting import until, until_true

from .conformance import Ask, Said, Things
from .test_nats import Instance, broker as broker, kinds, numbers, running, send

PING_SECONDS = 0.2


@pytest_asyncio.fixture
async def scripted() -> AsyncGenerator[ScriptedBroker]:
    broker = ScriptedBroker()
    await broker.open()
    yield broker
    await broker.close()


def connection(url: str, password: str = PASSWORD, **options: Any) -> NatsConnection:
    return NatsConnection(url, "service", password, "test", **options)


async def works_again(one: Instance) -> None:
    async def answers() -> bool:
        try:
            return kinds(await send(one, Ask(number=7), operation=Things.read)) == [Said]
        except Unavailable:
            return False

    await until(answers, "calls work again")


# ------------------------------------------------------------------------------------------------------------- losses


async def test_calls_in_flight_end_when_the_connection_is_lost(broker: Broker):
    async with running() as (one, service):
        calls = {
            operation.name: asyncio.create_task(send(one, Ask(number=1, do="hang"), operation=operation))
            for operation in (Things.read, Things.change)
        }
        await until_true(lambda: len(service.batches) == 2)
        await broker.kill()
        received = {name: kinds(await call) for name, call in calls.items()}
        assert received == {"read": [Unavailable], "change": [OutcomeUnknown]}
        await until_true(lambda: not one.own.is_connected)
        for _ in range(3):
            with pytest.raises(Unavailable):
                await send(one, Ask(number=2))
        await broker.start()
        await works_again(one)
        service.release.set()
        # The answers to the former calls reach no caller, and what was refused meanwhile is not sent later.
        assert kinds(await send(one, Ask(number=8))) == [Said]
        assert [number for number in numbers(service) if number != 7] == [1, 1, 8]


async def test_both_ends_come_back_each_time_the_server_is_killed(broker: Broker):
    async with running() as (one, _):
        for _ in range(3):
            await broker.kill()
            await until_true(lambda: not one.own.is_connected and not one.caller.is_connected)
            await broker.start()
            await works_again(one)


async def test_both_ends_come_back_after_the_server_was_silent(broker: Broker):
    async with running(ping_seconds=PING_SECONDS) as (one, service):
        call = asyncio.create_task(send(one, Ask(number=1, do="hang")))
        await until_true(lambda: len(service.batches) == 1)
        broker.signal(signal.SIGSTOP)
        assert kinds(await call) == [OutcomeUnknown]
        with pytest.raises(Unavailable):
            await send(one, Ask(number=2))
        await until_true(lambda: not one.own.is_connected)
        broker.signal(signal.SIGCONT)
        await works_again(one)
        service.release.set()
        assert 2 not in numbers(service)


async def test_an_error_of_the_protocol_does_not_end_the_connection_for_good(broker: Broker):
    async with running() as (one, _):
        for client in (one.own._client, one.caller._client):
            assert client is not None
            assert client._transport is not None
            client._transport.write(b"NONSENSE\r\n")
        await until_true(lambda: not one.own.is_connected)
        await works_again(one)
        await until_true(lambda: one.own.is_connected)


async def test_an_inbox_is_a_new_one_on_each_connection(broker: Broker):
    async with running() as (one, _):
        inbox = one.client._inbox
        assert inbox is not None
        first = inbox.subject
        await broker.kill()
        await broker.start()
        await works_again(one)
        assert inbox.subject != first
        assert inbox.subject.startswith("_INBOX.caller.")


# ----------------------------------------------------------------------------------------------------- open and close


async def test_an_address_without_a_server_is_named_and_the_password_is_not(scripted: ScriptedBroker):
    await scripted.close()
    opening = connection(scripted.url, "secret-password")
    with capture_logs() as logs, pytest.raises(Unavailable) as raised:
        await opening.open(seconds=0.3)
    assert str(raised.value) == f"NATS at {scripted.url.removeprefix('nats://')} is not available right now."
    assert "secret-password" not in f"{raised.value!r} {logs}"
    with pytest.raises(NotConnected):
        await opening.publish("subject", b"")
    await opening.close()


async def test_a_user_that_is_refused_is_named(broker: Broker):
    with pytest.raises(Unavailable, match=r"it refuses the user service\) is not available"):
        await connection(broker.url, "wrong").open(seconds=0.3)


async def test_open_waits_for_a_server_that_starts_later(broker: Broker):
    await broker.kill()
    late = connection(broker.url)
    opening = asyncio.create_task(late.open(seconds=60.0))
    with capture_logs() as logs:
        await until_true(lambda: logs)
    await broker.start()
    await opening
    await late.flush()
    await late.close()


async def test_a_connection_without_a_server_closes(broker: Broker):
    lost = connection(broker.url)
    await lost.open(seconds=60.0)
    await broker.kill()
    await until_true(lambda: not lost.is_connected)
    with pytest.raises(Unavailable):
        await lost.flush()
    await lost.close()
    await lost.close()


async def test_a_connection_to_a_silent_server_closes(broker: Broker):
    before = asyncio.all_tasks()
    silent = connection(broker.url)
    await silent.open(seconds=60.0)
    broker.signal(signal.SIGSTOP)
    for _ in range(64):  # more than the buffers of the sockets take
        await silent.publish("subject", b"x" * 500_000)
    client = silent._client
    assert client is not None
    socket = cast(Any, client._transport)._io_writer.transport
    await until_true(lambda: socket.get_write_buffer_size() > 0)
    await silent.close()
    assert socket.get_write_buffer_size() == 0, "nothing is sent later"
    await until_true(lambda: asyncio.all_tasks() <= before)


# ------------------------------------------------------------------------------------------------ order on the socket


async def ignore(_: Msg) -> None:
    """Of a message that a test does not need."""


async def test_a_flush_is_behind_all_that_was_subscribed_before(scripted: ScriptedBroker):
    subscribing = connection(scripted.url)
    await subscribing.open(seconds=60.0)
    for number in range(3):
        await subscribing.subscribe(f"subject.{number}", ignore)
    await subscribing.flush()
    words = [line.split()[0] for line in scripted.lines]
    assert words[-1] == "PING"
    assert words.count("SUB") == 3
    await subscribing.close()


async def test_what_arrives_until_the_server_has_unsubscribed_is_handled(scripted: ScriptedBroker):
    handled: list[bytes] = []
    begun: list[int] = []

    async def handle(message: Msg) -> None:
        handled.append(message.data)

    unsubscribing = connection(scripted.url)
    await unsubscribing.open(seconds=60.0)
    subscribed = await unsubscribing.subscribe("subject", handle)
    await unsubscribing.flush()
    scripted.pause_seconds = 0.05
    scripted.on["UNSUB"] = lambda line: f"MSG subject {line.split()[1]} 4\r\nlast\r\n".encode()
    await unsubscribing.unsubscribe(subscribed, begun=lambda: begun.append(len(handled)))
    assert (handled[:1], begun) == ([b"last"], [0])
    await unsubscribing.close()


async def test_an_answer_to_what_arrives_while_a_connection_is_made_is_sent(scripted: ScriptedBroker):
    """A server may send a request right after SUB, long before its PONG ends the attempt to connect."""
    answering = connection(scripted.url)
    failed: list[Exception] = []

    async def answer(message: Msg) -> None:
        try:
            await answering.publish(message.reply, b"")
        except NotConnected as error:
            failed.append(error)

    scripted.on["SUB"] = lambda line: f"MSG subject {line.split()[-1]} reply.to 1\r\nx\r\n".encode()
    scripted.pause_seconds = 0.05
    await answering.subscribe("subject", answer)
    await answering.open(seconds=60.0)
    await until_true(lambda: failed or [line for line in scripted.lines if line.startswith("PUB reply.to")])
    assert failed == []
    await answering.close()


# ---------------------------------------------------------------------------------------------------------------- TLS


@pytest_asyncio.fixture
async def encrypted(tmp_path: Path) -> AsyncGenerator[ScriptedBroker]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate(tmp_path))
    broker = ScriptedBroker(context)
    await broker.open()
    yield broker
    await broker.close()


async def test_a_tls_connection_trusts_the_named_authority_alone(encrypted: ScriptedBroker, tmp_path: Path):
    url = encrypted.url.replace("nats://", "tls://")
    trusting = connection(url, tls_ca=tmp_path / "certificate.pem")
    await trusting.open(seconds=60.0)
    await trusting.flush()
    await trusting.close()
    encrypted.lines.clear()
    with pytest.raises(Unavailable):
        await connection(url).open(seconds=0.3)
    assert encrypted.lines == []


async def test_a_tls_connection_sends_nothing_to_a_server_without_tls(scripted: ScriptedBroker):
    with pytest.raises(Unavailable):
        await connection(scripted.url.replace("nats://", "tls://")).open(seconds=0.3)
    assert scripted.lines == []
