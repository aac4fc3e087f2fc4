"""Every bound of the gRPC server, by a client that exceeds it; its errors, TLS, and its end."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from mercato.chassis.grpc import TOO_MANY_CALLS, GrpcLimits, GrpcServer, GrpcTls, Handlers
from mercato.chassis.grpc.limits import NOT_STARTED
from mercato.chassis.http import PortTaken
from mercato.testing.certificates import certificate
from mercato.testing.waiting import BOUND_SECONDS, until_true

from .serving import ACK, GOAWAY, HOST, PING, Echo, channel, failure, raw_client, serving

QUICK = GrpcLimits(drain_seconds=0.0)


def limits(**changed: float) -> GrpcLimits:
    return GrpcLimits(**{"drain_seconds": 0.0, **changed})  # pyright: ignore[reportArgumentType]


# ------------------------------------------------------------------------------------------------------------ messages


async def test_all_kinds_of_handlers_answer():
    async with serving() as running, channel(running) as calls:
        assert await calls.unary_unary("/echo/say")(b"one") == b"one"
        assert [part async for part in calls.unary_stream("/echo/all")(b"abc")] == [b"a", b"b", b"c"]
        assert [part async for part in calls.unary_stream("/echo/written")(b"abc")] == [b"a", b"b", b"c"]
        assert await calls.stream_unary("/echo/joined")(iter([b"a", b"b"])) == b"ab"
        assert running.server.running == 0


async def test_a_message_that_is_too_large_is_refused():
    async with serving(limits(message_bytes=1_000)) as running, channel(running) as calls:
        assert await calls.unary_unary("/echo/say")(b"x" * 1_000) == b"x" * 1_000

        error = await failure(calls.unary_unary("/echo/say")(b"x" * 1_001))

        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert len(running.echo.seen) == 1
        await until_true(lambda: running.server.running == 0)


async def test_an_answer_that_is_too_large_is_not_sent():
    async with serving(limits(answer_bytes=1_000)) as running, channel(running) as calls:
        error = await failure(calls.unary_unary("/echo/say")(b"x" * 1_001))

        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_metadata_that_are_too_large_are_refused_and_no_others():
    """By default gRPC refuses some of the calls that come near the limit, by chance."""
    async with serving(limits(metadata_bytes=16_384)) as running, channel(running) as calls:
        for _ in range(10):
            assert await calls.unary_unary("/echo/say")(b"", metadata=(("padding", "x" * 15_500),)) == b""

        error = await failure(calls.unary_unary("/echo/say")(b"", metadata=(("padding", "x" * 16_400),)))

        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert len(running.echo.seen) == 10


async def test_a_compressed_message_is_refused():
    async with serving() as running, channel(running) as calls:
        say = calls.unary_unary("/echo/say")

        error = await failure(say(b"x" * 100_000, compression=grpc.Compression.Gzip))

        assert error.code() is grpc.StatusCode.UNIMPLEMENTED
        assert running.echo.seen == []


async def test_a_message_that_does_not_arrive_ends_the_call():
    async with serving(limits(receive_seconds=0.2)) as running, channel(running) as calls:
        error = await failure(calls.stream_unary("/echo/say")())

        assert (error.code(), error.details()) == (
            grpc.StatusCode.DEADLINE_EXCEEDED,
            "The message of the call was not received completely within 0.2 seconds.",
        )
        assert running.echo.seen == []


# --------------------------------------------------------------------------------------------------- calls, connections


async def test_calls_beyond_the_limit_are_refused_before_a_handler():
    async with serving(limits(calls=2)) as running, channel(running) as calls:
        say = calls.unary_unary("/echo/say")
        running.echo.release.clear()
        first = [asyncio.ensure_future(say(text)) for text in (b"1", b"2")]
        await until_true(lambda: len(running.echo.seen) == 2)

        error = await failure(say(b"3"))

        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (NOT_STARTED, TOO_MANY_CALLS) in tuple(error.trailing_metadata())
        running.echo.release.set()
        assert await asyncio.gather(*first) == [b"1", b"2"]
        assert await say(b"4") == b"4"
        assert sorted(running.echo.seen) == [b"1", b"2", b"4"]


async def test_a_connection_has_no_more_calls_at_once_than_streams():
    async with serving(limits(streams=2)) as running, channel(running) as calls:
        say = calls.unary_unary("/echo/say")
        assert await say(b"0") == b"0"  # the client knows the settings of the server
        running.echo.release.clear()
        all_of_them = [asyncio.ensure_future(say(text)) for text in (b"1", b"2", b"3")]
        await until_true(lambda: len(running.echo.seen) == 3)

        async with channel(running) as other:
            another = asyncio.ensure_future(other.unary_unary("/echo/say")(b"4"))
            await until_true(lambda: b"4" in running.echo.seen)  # the server is not busy

            assert len(running.echo.seen) == 4
            assert running.server.running == 3
            running.echo.release.set()
            assert await asyncio.gather(*all_of_them, another) == [b"1", b"2", b"3", b"4"]


async def test_a_connection_beyond_the_limit_is_closed():
    async with serving(limits(connections=1)) as running, channel(running) as first:
        assert await first.unary_unary("/echo/say")(b"1") == b"1"
        async with raw_client(running.server.address) as second, asyncio.timeout(BOUND_SECONDS):
            await second.until_closed()

        assert second.frames == []
        assert await first.unary_unary("/echo/say")(b"2") == b"2"


async def test_a_connection_that_sends_nothing_is_closed():
    async with (
        serving(limits(handshake_seconds=0.2)) as running,
        raw_client(running.server.address, greets=False) as client,
    ):
        async with asyncio.timeout(BOUND_SECONDS):
            await client.until_closed()


async def test_an_idle_connection_is_closed():
    async with serving(limits(idle_seconds=0.2)) as running, raw_client(running.server.address) as client:
        async with asyncio.timeout(BOUND_SECONDS):
            await client.until_closed()

        assert GOAWAY in {kind for kind, _, _ in client.frames}


async def test_an_old_connection_takes_no_more_calls_and_finishes_those_that_run():
    async with serving(limits(age_seconds=0.3, idle_seconds=60.0)) as running, channel(running) as calls:
        running.echo.release.clear()
        call = asyncio.ensure_future(calls.unary_unary("/echo/say")(b"1"))
        await until_true(lambda: running.echo.seen == [b"1"])

        async with asyncio.timeout(BOUND_SECONDS):  # the client has been asked to connect anew
            await calls.wait_for_state_change(grpc.ChannelConnectivity.READY)

        running.echo.release.set()
        assert await call == b"1"


async def test_an_old_connection_is_closed_after_the_grace():
    async with serving(limits(age_seconds=0.2, age_grace_seconds=0.2)) as running, channel(running) as calls:
        running.echo.release.clear()

        async with asyncio.timeout(BOUND_SECONDS):
            error = await failure(calls.unary_unary("/echo/say")(b"1"))

        assert error.code() is grpc.StatusCode.UNAVAILABLE
        await until_true(lambda: running.echo.cancelled == 1)


async def test_a_connection_that_answers_no_probe_is_closed():
    async with serving(limits(ping_seconds=0.2, ping_answer_seconds=0.2, idle_seconds=600.0)) as running:
        async with raw_client(running.server.address) as client, asyncio.timeout(BOUND_SECONDS):
            await client.until_closed()

        assert PING in {kind for kind, flags, _ in client.frames if not flags & ACK}


async def test_a_client_that_probes_too_often_is_closed():
    async with serving(limits(client_ping_seconds=60.0, client_ping_strikes=2)) as running:
        async with raw_client(running.server.address) as client, asyncio.timeout(BOUND_SECONDS):
            client.ping(4)
            await client.until_closed()

        [reason] = [payload for kind, _, payload in client.frames if kind == GOAWAY and b"too_many_pings" in payload]
        assert reason


# -------------------------------------------------------------------------------------------------------------- errors


async def test_the_text_of_an_exception_stays_on_the_server():
    async with serving() as running, channel(running) as calls:
        error = await failure(calls.unary_unary("/echo/fail")(b""))

        assert (error.code(), error.details()) == (grpc.StatusCode.INTERNAL, "The call failed unexpectedly.")
        assert "own words" not in str(error)


async def test_a_message_that_the_method_does_not_take_is_an_invalid_argument():
    async with serving() as running, channel(running) as calls:
        error = await failure(calls.unary_unary("/echo/picky")(b"x"))

        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "own words" not in str(error)
        assert running.echo.seen == []


async def test_a_status_of_a_handler_reaches_the_client_with_its_metadata():
    async with serving() as running, channel(running) as calls:
        error = await failure(calls.unary_unary("/echo/refuse")(b""))

        assert (error.code(), error.details()) == (grpc.StatusCode.NOT_FOUND, "there is none")
        assert ("reason", "none") in tuple(error.trailing_metadata())


async def test_an_unknown_method_is_unimplemented():
    async with serving() as running, channel(running) as calls:
        error = await failure(calls.unary_unary("/echo/unknown")(b""))

        assert error.code() is grpc.StatusCode.UNIMPLEMENTED


# ------------------------------------------------------------------------------------------------------- start and stop


async def test_generated_functions_register_their_handlers():
    handlers = Handlers()
    servicer = HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, handlers)
    server = GrpcServer(HOST, 0, limits=QUICK)
    await server.start(handlers.all)
    try:
        async with grpc.aio.insecure_channel(server.address) as calls:
            check = calls.unary_unary("/grpc.health.v1.Health/Check")
            answer = health_pb2.HealthCheckResponse.FromString(await check(b""))
    finally:
        await server.stop()

    assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_a_port_that_is_taken_is_an_error_that_names_it():
    async with serving() as running:
        with pytest.raises(PortTaken, match=str(running.server.port)):
            await GrpcServer(HOST, running.server.port).start([Echo()])


async def test_processes_that_reuse_a_port_share_it():
    first = GrpcServer(HOST, 0, limits=QUICK, reuse_port=True)
    await first.start([Echo()])
    second = GrpcServer(HOST, first.port, limits=QUICK, reuse_port=True)
    try:
        await second.start([Echo()])

        assert second.address == first.address
    finally:
        await second.stop()
        await first.stop()


async def test_a_server_that_stops_finishes_running_calls():
    async with serving(limits(drain_seconds=BOUND_SECONDS)) as running, channel(running) as calls:
        running.echo.release.clear()
        call = asyncio.ensure_future(calls.unary_unary("/echo/say")(b"1"))
        await until_true(lambda: running.echo.seen == [b"1"])
        stopping = asyncio.create_task(running.server.stop())
        async with asyncio.timeout(BOUND_SECONDS):
            await calls.wait_for_state_change(grpc.ChannelConnectivity.READY)

        async with channel(running) as late:
            error = await failure(late.unary_unary("/echo/say")(b"2"))
        running.echo.release.set()

        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert await call == b"1"
        await stopping
        assert (running.echo.seen, running.echo.cancelled) == ([b"1"], 0)


async def test_a_server_that_stops_cancels_calls_that_do_not_end():
    async with serving(limits(drain_seconds=0.1)) as running, channel(running) as calls:
        running.echo.release.clear()
        call = asyncio.ensure_future(failure(calls.unary_unary("/echo/say")(b"1")))
        await until_true(lambda: running.echo.seen == [b"1"])

        await running.server.stop()

        assert running.echo.cancelled == 1
        assert (await call).code() in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)


# ----------------------------------------------------------------------------------------------------------------- TLS


async def test_a_client_verifies_the_certificate_and_another_one_is_refused(tmp_path: Path):
    files = certificate(tmp_path)
    trusted = grpc.ssl_channel_credentials(files[0].read_bytes())
    other = tmp_path / "other"
    other.mkdir()
    distrusting = grpc.ssl_channel_credentials(certificate(other)[0].read_bytes())
    async with serving(tls=GrpcTls.read(*files)) as running:
        async with channel(running, credentials=trusted) as calls:
            assert await calls.unary_unary("/echo/say")(b"1") == b"1"
        async with channel(running, credentials=distrusting) as calls:
            refused = await failure(calls.unary_unary("/echo/say")(b"2"))
        async with channel(running) as calls:
            plain = await failure(calls.unary_unary("/echo/say")(b"3"))

        assert {refused.code(), plain.code()} == {grpc.StatusCode.UNAVAILABLE}
        assert running.echo.seen == [b"1"]


async def test_a_server_with_an_authority_for_clients_wants_their_certificate(tmp_path: Path):
    cert, key = certificate(tmp_path)
    pem = cert.read_bytes()
    known = grpc.ssl_channel_credentials(pem, private_key=key.read_bytes(), certificate_chain=pem)
    unknown = grpc.ssl_channel_credentials(pem)
    async with serving(tls=GrpcTls.read(cert, key, client_ca=cert)) as running:
        async with channel(running, credentials=known) as calls:
            assert await calls.unary_unary("/echo/say")(b"1") == b"1"
        async with channel(running, credentials=unknown) as calls:
            error = await failure(calls.unary_unary("/echo/say")(b"2"))

        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert running.echo.seen == [b"1"]
