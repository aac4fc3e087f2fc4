"""The HTTP server under abuse: raw bytes on real sockets, because a client library would not send them."""

import asyncio
import contextlib
import email.utils
import hashlib
import inspect
import socket
import sys
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from chassis.http.serving import BOUND_SECONDS, CHUNKED, GET, SHORT, App, Client, on_both_loops, serve
from mercato.chassis.http import (
    BoundedProtocol,
    CannotListen,
    HostUnknown,
    HttpServer,
    PortTaken,
    bind,
    protocol,
    translate,
)

# Half a minute of waiting for time-outs: not for the fast tests.
pytestmark = pytest.mark.slow

# The ordinary


@on_both_loops
async def test_requests_reuse_one_connection() -> None:
    async with serve() as serving:
        client = await serving.connect()
        for _ in range(3):
            assert (await client.ask(GET))[::2] == (200, b"/hello")
        assert serving.server.open_connections == 1
        client.close()
        await serving.until(lambda: serving.server.open_connections == 0)
        assert serving.refused == []


@on_both_loops
async def test_pipelined_requests_are_answered_in_order() -> None:
    async with serve() as serving:
        client = await serving.connect()
        await client.send(GET.replace(b"/hello", b"/wait") + GET.replace(b"/hello", b"/hello/2") + GET)
        await serving.app.entered.wait()
        assert serving.app.paths == ["/wait"]
        serving.app.release.set()
        assert [(await client.read())[2] for _ in range(3)] == [b"waited", b"/hello/2", b"/hello"]
        client.close()


@on_both_loops
async def test_bodies_up_to_the_limit_arrive_whole() -> None:
    async with serve(body_bytes=200_000) as serving:
        client = await serving.connect()
        body = b"b" * 200_000
        declared = b"POST /echo HTTP/1.1\r\nHost: shop\r\nContent-Length: 200000\r\n\r\n" + body
        assert (await client.ask(declared))[2] == body
        chunks = b"".join(b"%x\r\n%b\r\n" % (len(body) // 8, body[: len(body) // 8]) for _ in range(8))
        assert (await client.ask(CHUNKED + chunks + b"0\r\n\r\n"))[2] == body
        client.close()


@on_both_loops
async def test_many_small_chunks_are_not_taken_for_headers() -> None:
    async with serve(header_bytes=200) as serving:
        client = await serving.connect()
        await client.send(CHUNKED)
        for _ in range(150):
            await client.send(b"1\r\n")
            await asyncio.sleep(0)
            await client.send(b"c\r\n")
        assert (await client.ask(b"0\r\n\r\n"))[2] == b"c" * 150
        client.close()


@on_both_loops
async def test_date_is_sent_and_the_server_is_not_named() -> None:
    async with serve() as serving:
        client = await serving.connect()
        _, headers, _ = await client.ask(GET)
        assert email.utils.parsedate_to_datetime(headers["date"])
        assert "server" not in headers
        client.close()


@on_both_loops
async def test_expected_continue_is_sent_when_the_application_reads() -> None:
    async with serve() as serving:
        client = await serving.connect()
        head = b"POST /echo HTTP/1.1\r\nHost: shop\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n"
        assert (await client.ask(head))[0] == 100
        assert (await client.ask(b"body"))[2] == b"body"
        client.close()


@on_both_loops
async def test_trailers_never_become_headers_of_the_application() -> None:
    async with serve() as serving:
        client = await serving.connect()
        await client.send(CHUNKED)
        await serving.app.entered.wait()
        await client.ask(b"1\r\na\r\n0\r\nAuthorization: forged\r\n\r\n")
        assert b"authorization" not in dict(serving.app.headers)
        client.close()


@on_both_loops
async def test_upgrade_is_answered_as_usual_and_ends_the_connection() -> None:
    async with serve() as serving:
        client = await serving.connect()
        upgrade = GET.replace(b"\r\n\r\n", b"\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n")
        await client.send(upgrade.replace(b"/hello", b"/wait") + GET.replace(b"/hello", b"/hello/smuggled"))
        await serving.app.entered.wait()
        await client.send(b"\x00another protocol")
        assert await serving.is_usable()
        serving.app.release.set()
        status, headers, body = await client.read()
        assert (status, headers["connection"], body) == (200, "close", b"waited")
        assert await client.rest() == b""
        assert serving.app.paths == ["/wait", "/hello"]
        assert serving.refused == []
        client.close()


# Answers in one message


async def whole(client: Client, request: bytes) -> bytes:
    """What is written for one request, up to the end of its head, without the date."""
    await client.send(request.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
    lines = (await client.rest()).split(b"\r\n")
    client.close()
    return b"\r\n".join(line for line in lines if not line.startswith(b"date: "))


@on_both_loops
async def test_answer_in_one_message_is_written_as_one_response() -> None:
    async with serve() as serving:
        client = await serving.connect()
        got = await whole(client, GET.replace(b"/hello", b"/whole?201&yes"))
        assert got == (b"HTTP/1.1 201 Created\r\nx-answer: yes\r\nconnection: close\r\ncontent-length: 5\r\n\r\nwhole")
        client = await serving.connect()
        got = await whole(client, GET.replace(b"GET /hello", b"HEAD /whole?200&yes"))
        assert got == b"HTTP/1.1 200 OK\r\nx-answer: yes\r\nconnection: close\r\ncontent-length: 5\r\n\r\n"
        client = await serving.connect()
        got = await whole(client, GET.replace(b"/hello", b"/whole?204&yes"))
        assert got == b"HTTP/1.1 204 No Content\r\nx-answer: yes\r\nconnection: close\r\n\r\n"
        client = await serving.connect()
        for _ in range(2):
            status, headers, body = await client.ask(GET.replace(b"/hello", b"/whole?200&yes"))
            assert (status, headers["x-answer"], body, "connection" in headers) == (200, "yes", b"whole", False)
        client.close()


@pytest.mark.parametrize("value", ["a\r\nset-cookie: forged", "a\nb", "a\rb", "\0", "\x7f"])
@on_both_loops
async def test_control_character_in_a_header_of_an_answer_becomes_a_problem(value: str) -> None:
    async with serve() as serving:
        client = await serving.connect()
        await client.send(GET.replace(b"/hello", b"/whole?200&" + urllib.parse.quote(value).encode()))
        await client.problem(500, "internal_error")


@on_both_loops
async def test_second_answer_to_one_request_is_refused() -> None:
    async with serve() as serving:
        client = await serving.connect()
        await client.send(GET.replace(b"/hello", b"/twice?200&yes"))
        assert (await client.read())[2] == b"whole"
        assert await client.rest() == b""
        assert [type(error) for error in serving.app.failures] == [RuntimeError]
        client.close()


# Headers


@on_both_loops
async def test_header_that_is_too_large_is_refused_in_one_read() -> None:
    async with serve(header_bytes=1_000) as serving:
        for tail in (b"\r\n\r\n", b""):  # complete, and without an end
            client = await serving.connect()
            await client.send(b"GET /hello HTTP/1.1\r\nHost: shop\r\nX: " + b"x" * 1_000 + tail)
            await client.problem(431, "request_header_too_large")
        assert serving.app.paths == []
        assert serving.refused == ["request_header_too_large"] * 2
        assert await serving.is_usable()


@on_both_loops
async def test_endless_header_sent_a_byte_at_a_time_is_refused() -> None:
    async with serve(header_bytes=300) as serving:
        client = await serving.connect()
        await client.send(b"GET /hello HTTP/1.1\r\nHost: shop\r\nX: ")
        for _ in range(300):
            await client.send(b"x")
            await asyncio.sleep(0)
        await client.problem(431, "request_header_too_large")
        assert await serving.is_usable()


@on_both_loops
async def test_many_small_headers_are_refused() -> None:
    async with serve(header_bytes=1_000) as serving:
        client = await serving.connect()
        await client.send(b"GET /hello HTTP/1.1\r\nHost: shop\r\n" + b"a: b\r\n" * 500)
        await client.problem(431, "request_header_too_large")
        assert await serving.is_usable()


@on_both_loops
async def test_header_limit_holds_for_a_pipelined_request() -> None:
    async with serve(header_bytes=1_000) as serving:
        client = await serving.connect()
        await client.send(GET + b"GET /hello/2 HTTP/1.1\r\nHost: shop\r\nX: " + b"x" * 1_000 + b"\r\n\r\n")
        assert (await client.read())[2] == b"/hello"
        await client.problem(431, "request_header_too_large")
        assert serving.app.paths == ["/hello"]


@on_both_loops
async def test_large_body_in_the_same_read_does_not_count_as_header() -> None:
    async with serve(header_bytes=300) as serving:
        client = await serving.connect()
        post = b"POST /echo HTTP/1.1\r\nHost: shop\r\nContent-Length: 5000\r\n\r\n" + b"b" * 5_000
        await client.send(post + post)
        assert [len((await client.read())[2]) for _ in range(2)] == [5_000, 5_000]
        await client.send(post + GET[:-2])
        assert len((await client.read())[2]) == 5_000
        assert (await client.ask(GET[-2:]))[2] == b"/hello"
        client.close()


@on_both_loops
async def test_uri_that_is_too_long_is_refused() -> None:
    async with serve(header_bytes=1_000) as serving:
        for tail in (b" HTTP/1.1\r\nHost: shop\r\n\r\n", b""):
            client = await serving.connect()
            await client.send(b"GET /hello/" + b"a" * 1_500 + tail)
            await client.problem(414, "uri_too_long")
        assert await serving.is_usable()


@on_both_loops
async def test_endless_trailers_are_refused() -> None:
    async with serve(header_bytes=1_000) as serving:
        client = await serving.connect()
        await client.send(CHUNKED + b"1\r\na\r\n0\r\n")
        await serving.app.entered.wait()
        with contextlib.suppress(ConnectionError):
            for _ in range(300):
                await client.send(b"X: endless\r\n")
                await asyncio.sleep(0)
        await client.problem(431, "request_header_too_large")
        assert await serving.is_usable()


# Bodies


@on_both_loops
async def test_declared_body_that_is_too_large_is_refused_before_it_is_sent() -> None:
    async with serve(body_bytes=1_000) as serving:
        for expect in (b"", b"Expect: 100-continue\r\n"):
            client = await serving.connect()
            await client.send(b"POST /echo HTTP/1.1\r\nHost: shop\r\n" + expect + b"Content-Length: 1001\r\n\r\n")
            await client.problem(413, "body_too_large")
        assert serving.app.paths == []
        assert serving.refused == ["body_too_large"] * 2
        assert await serving.is_usable()


@on_both_loops
async def test_chunked_body_is_refused_as_soon_as_it_crosses_the_limit() -> None:
    async with serve(body_bytes=1_000) as serving:
        client = await serving.connect()
        await client.send(CHUNKED + b"258\r\n" + b"c" * 600 + b"\r\n")
        await serving.until(lambda: serving.app.body_bytes_seen == 600)
        await client.send(b"258\r\n" + b"c" * 600 + b"\r\n")
        await client.problem(413, "body_too_large")
        await serving.until(lambda: serving.app.disconnects == 1)
        assert serving.app.body_bytes_seen == 600
        assert await serving.is_usable()


@pytest.mark.parametrize("head", [CHUNKED, b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 3000000\r\n\r\n"])
@on_both_loops
async def test_client_that_goes_on_sending_can_read_why_it_was_refused(head: bytes) -> None:
    async with serve(body_bytes=1_000) as serving:
        client = await serving.connect()
        await client.send(head)
        for _ in range(46):  # 3 MB, many times what the kernel would buffer
            await client.send(b"10000\r\n" + b"c" * 65_536 + b"\r\n")
        await client.problem(413, "body_too_large")
        assert await serving.is_usable()


@on_both_loops
async def test_client_that_never_stops_sending_is_cut_off() -> None:
    async with serve(body_bytes=1_000) as serving:
        client = await serving.connect()
        await client.send(CHUNKED)

        sent_bytes = 0

        async def go_on() -> None:
            nonlocal sent_bytes
            while True:
                await client.send(b"10000\r\n" + b"c" * 65_536 + b"\r\n")
                sent_bytes += 65_536

        with pytest.raises(ConnectionError):
            await go_on()
        assert sent_bytes < protocol.LINGER_BYTES + 64_000_000  # what the kernel may buffer
        await serving.until(lambda: serving.server.open_connections == 0)
        assert await serving.is_usable()


@on_both_loops
async def test_too_large_body_of_a_pipelined_request_is_refused_after_the_earlier_answer() -> None:
    async with serve(body_bytes=1_000) as serving:
        client = await serving.connect()
        await client.send(GET.replace(b"/hello", b"/wait") + CHUNKED + b"7d0\r\n" + b"c" * 2_000 + b"\r\n")
        await serving.until(lambda: serving.refused == ["body_too_large"])
        serving.app.release.set()
        assert (await client.read())[2] == b"waited"
        await client.problem(413, "body_too_large")
        assert serving.app.paths == ["/wait"]


@on_both_loops
async def test_refusal_is_never_written_into_an_answer_that_has_begun() -> None:
    async with serve(body_bytes=1_000) as serving:
        client = await serving.connect()
        await client.send(CHUNKED.replace(b"/echo", b"/started"))
        async with asyncio.timeout(BOUND_SECONDS):
            begun = await client.reader.readuntil(b"half ")
        await client.send(b"7d0\r\n" + b"c" * 2_000 + b"\r\n")
        assert b"200" in begun
        assert await client.rest() == b""
        client.close()
        assert await serving.is_usable()


@on_both_loops
async def test_body_sent_after_an_early_answer_does_not_break_the_connection() -> None:
    async with serve() as serving:
        client = await serving.connect()
        head = b"POST /early HTTP/1.1\r\nHost: shop\r\nContent-Length: 100000\r\n\r\n"
        assert (await client.ask(head))[2] == b"early"
        assert (await client.ask(b"b" * 100_000 + GET))[2] == b"/hello"
        client.close()


# Malformed requests


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01",
        b"NONSENSE\r\n\r\n",
        b"GET / HTTP/1.10\r\nHost: a\r\n\r\n",
        b"GET  / HTTP/1.1\r\nHost : a\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: a\x00b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: a\r\n folded\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET http://a HTTP/1.1\r\nHost: a\r\n\r\n",
        b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET * HTTP/1.1\r\nHost: a\r\n\r\n",
        b"OPTIONS ** HTTP/1.1\r\nHost: a\r\n\r\n",
        b"OPTIONS *?a=b HTTP/1.1\r\nHost: a\r\n\r\n",
        b"OPTIONS http://a?b HTTP/1.1\r\nHost: a\r\n\r\n",
        CHUNKED + b"nonsense\r\n",
        CHUNKED + b"-1\r\na\r\n0\r\n\r\n",
        CHUNKED + b"fffffffffffffffff\r\na\r\n0\r\n\r\n",
    ],
)
@on_both_loops
async def test_malformed_request_gets_a_problem(request_bytes: bytes) -> None:
    async with serve() as serving:
        client = await serving.connect()
        await client.send(request_bytes)
        await client.problem(400, "malformed_request")
        assert await serving.is_usable()


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET http://evil.example/hello HTTP/1.1\r\nHost: shop\r\n\r\n",
        b"GET http://shop:81/hello HTTP/1.1\r\nHost: shop\r\n\r\n",
        b"GET http://shop@evil.example/hello HTTP/1.1\r\nHost: shop\r\n\r\n",
        b"GET http://a@shop/hello HTTP/1.1\r\nHost: a@shop\r\n\r\n",
        b"GET http://evil.example/hello HTTP/1.0\r\nHost: shop\r\n\r\n",
        b"GET ftp://shop/hello HTTP/1.1\r\nHost: shop\r\n\r\n",
    ],
)
@on_both_loops
async def test_target_with_another_host_than_that_of_the_request_is_refused(request_bytes: bytes) -> None:
    async with serve() as serving:
        client = await serving.connect()
        await client.send(request_bytes)
        await client.problem(400, "malformed_request")
        assert serving.app.paths == []


@pytest.mark.parametrize("version", [b"1.2", b"2.0", b"3.0", b"9.9"])
@on_both_loops
async def test_version_that_is_not_spoken_is_refused(version: bytes) -> None:
    async with serve() as serving:
        client = await serving.connect()
        await client.send(b"GET /hello HTTP/" + version + b"\r\nHost: a\r\n\r\n")
        await client.problem(505, "http_version_not_supported")
        assert serving.app.paths == []
        assert await serving.is_usable()


@on_both_loops
async def test_preface_of_http_2_is_refused() -> None:
    async with serve() as serving:
        client = await serving.connect()
        await client.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        await client.problem(505, "http_version_not_supported")
        assert serving.app.paths == []


@pytest.mark.parametrize(
    "head",
    [
        b"GET /hello\r\n",
        b"GET /hello\r\nHost: a\r\n",
        b"GET /hello\n!: HTTP/1.1\r\nHost: a\r\n",
        b"GET /hello \r\nHost: a\r\n",
        b"POST /hello\r\nHost: a\r\n",
        b"GET /hello HTTP/0.9\r\nHost: a\r\n",
    ],
)
@on_both_loops
async def test_request_without_a_version_is_malformed(head: bytes) -> None:
    async with serve() as serving:
        client = await serving.connect()
        await client.send(head + b"\r\n")
        await client.problem(400, "malformed_request")
        assert serving.app.paths == []
        assert await serving.is_usable()


@pytest.mark.parametrize("host", [b"", b"Host: SHOP:80\r\n"])
@on_both_loops
async def test_target_with_the_host_of_the_request_is_taken(host: bytes) -> None:
    async with serve() as serving:
        client = await serving.connect()
        version = b"1.1" if host else b"1.0"
        await client.send(b"GET http://shop:80/hello HTTP/" + version + b"\r\n" + host + b"\r\n")
        assert (await client.read())[2] == b"/hello"


@pytest.mark.parametrize(
    "framing",
    [
        b"Content-Length: 5\r\nTransfer-Encoding: chunked",
        b"Transfer-Encoding: chunked\r\nContent-Length: 5",
        b"Content-Length: 5\r\nContent-Length: 6",
        b"Content-Length: 5, 6",
        b"Content-Length: +5",
        b"Content-Length : 5",
        b"Content-Length: 99999999999999999999999",
        b"Transfer-Encoding: identity",
        b"Transfer-Encoding: xchunked",
        b"Transfer-Encoding: gzip, chunked",
        b"Transfer-Encoding: chunked, identity",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
        b"Transfer-Encoding:\x0bchunked",
        b"Transfer-Encoding : chunked",
        b"Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 5",
        b"Connection: Upgrade\r\nUpgrade: h2c\r\nTransfer-Encoding: chunked",
    ],
)
@on_both_loops
async def test_ambiguous_framing_reaches_no_application(framing: bytes) -> None:
    async with serve() as serving:
        client = await serving.connect()
        smuggled = b"0\r\n\r\n" + GET.replace(b"/hello", b"/hello/smuggled")
        await client.send(b"POST /echo HTTP/1.1\r\nHost: shop\r\n" + framing + b"\r\n\r\n" + smuggled)
        await client.problem(400, "malformed_request")
        assert serving.app.paths == []


@on_both_loops
async def test_transfer_encoding_in_http_1_0_is_refused() -> None:
    async with serve() as serving:
        client = await serving.connect()
        await client.send(CHUNKED.replace(b"HTTP/1.1", b"HTTP/1.0") + b"0\r\n\r\n")
        await client.problem(400, "malformed_request")
        assert serving.app.paths == []


@on_both_loops
async def test_malformed_pipelined_request_is_refused_after_the_earlier_answer() -> None:
    async with serve() as serving:
        client = await serving.connect()
        await client.send(GET.replace(b"/hello", b"/wait") + b"NONSENSE\r\n\r\n")
        await serving.until(lambda: serving.refused == ["malformed_request"])
        serving.app.release.set()
        assert (await client.read())[2] == b"waited"
        await client.problem(400, "malformed_request")


@on_both_loops
async def test_flood_of_pipelined_requests_is_refused_after_those_in_the_queue() -> None:
    async with serve() as serving:
        client = await serving.connect()
        await client.send(GET.replace(b"/hello", b"/wait") + GET * 500)
        await serving.until(lambda: serving.refused == ["too_many_pipelined"])
        serving.app.release.set()
        for _ in range(1 + protocol.PIPELINED_REQUESTS):
            assert (await client.read())[0] == 200
        await client.problem(503, "too_many_pipelined")


# Deadlines


@pytest.mark.parametrize(
    "beginning",
    [
        b"G",
        b"GET /hello HTTP/1.1\r\nHost: sh",
        b"POST /echo HTTP/1.1\r\nHost: shop\r\nContent-Length: 10\r\n\r\nhalf ",
        CHUNKED + b"a\r\nhalf ",
        b"POST /echo HTTP/1.1\r\nHost: shop\r\nContent-Length: 10\r\nExpect: 100-continue\r\n\r\n",
    ],
)
@on_both_loops
async def test_request_that_does_not_end_times_out(beginning: bytes) -> None:
    async with serve(**SHORT) as serving:
        client = await serving.connect()
        await client.send(beginning)
        if b"Expect" in beginning:
            assert (await client.read())[0] == 100
        await client.problem(408, "request_timeout")
        assert serving.refused == ["request_timeout"]
        assert await serving.is_usable()


@pytest.mark.parametrize(
    "beginning", [b"GET /hello HTTP/1.1\r\nX: ", b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 9999\r\n\r\n"]
)
@on_both_loops
async def test_request_that_trickles_in_times_out(beginning: bytes) -> None:
    async with serve(**SHORT) as serving:
        client = await serving.connect()
        await client.send(beginning)

        async def trickle() -> None:
            with contextlib.suppress(ConnectionError):
                while not client.writer.is_closing():
                    await client.send(b"x")
                    await asyncio.sleep(0.02)

        trickling = asyncio.create_task(trickle())
        await client.problem(408, "request_timeout")
        await trickling
        assert await serving.is_usable()


@on_both_loops
async def test_application_gets_the_disconnect_while_the_client_still_reads() -> None:
    async with serve(body_bytes=1_000) as serving:
        client = await serving.connect()
        await client.send(CHUNKED)
        await serving.app.entered.wait()
        assert (await client.ask(b"7d0\r\n" + b"c" * 2_000 + b"\r\n"))[0] == 413
        await serving.until(lambda: serving.app.disconnects == 1)
        assert serving.server.open_connections == 1
        client.close()


@on_both_loops
async def test_late_answer_of_the_application_is_dropped_without_an_error() -> None:
    async with serve(**SHORT) as serving:
        client = await serving.connect()
        head = b"POST /wait_and_echo HTTP/1.1\r\nHost: shop\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n"
        assert (await client.ask(head))[0] == 408
        serving.app.release.set()
        await serving.until(lambda: serving.app.disconnects == 1)
        assert await client.rest() == b""
        assert serving.app.failures == []
        client.close()


@on_both_loops
async def test_second_request_of_a_connection_times_out_too() -> None:
    async with serve(**SHORT) as serving:
        client = await serving.connect()
        assert (await client.ask(GET))[0] == 200
        await client.send(GET[:-2])
        await client.problem(408, "request_timeout")


@on_both_loops
async def test_idle_connection_is_not_a_request_that_is_late() -> None:
    async with serve(**SHORT, keep_alive_seconds=30.0) as serving:
        fresh, used, late = await serving.connect(), await serving.connect(), await serving.connect()
        assert (await used.ask(GET))[0] == 200
        await late.send(b"GET")
        await late.problem(408, "request_timeout")
        assert (await fresh.ask(GET))[0] == (await used.ask(GET))[0] == 200
        fresh.close()
        used.close()


@on_both_loops
async def test_idle_connections_are_closed_without_a_response() -> None:
    async with serve(keep_alive_seconds=0.1, first_byte_seconds=0.1) as serving:
        fresh, used = await serving.connect(), await serving.connect()
        assert (await used.ask(GET))[0] == 200
        assert await fresh.rest() == await used.rest() == b""
        fresh.close()
        used.close()
        assert serving.refused == []


@on_both_loops
async def test_application_that_hangs_loses_its_connection() -> None:
    async with serve(**SHORT) as serving:
        client = await serving.connect()
        await client.send(GET.replace(b"/hello", b"/wait"))
        with contextlib.suppress(ConnectionError):
            assert await client.rest() == b""
        assert serving.refused == ["response_timeout"]
        client.close()
        assert await serving.is_usable()


@pytest.mark.parametrize("path", [b"/large", b"/stream"])
@pytest.mark.parametrize("ending", [b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"])
@on_both_loops
async def test_client_that_does_not_read_is_aborted(path: bytes, ending: bytes) -> None:
    async with serve(**SHORT) as serving:
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            slow.connect(("127.0.0.1", serving.port))
            slow.sendall(GET.replace(b"/hello", path).replace(b"\r\n\r\n", ending))
            await serving.until(lambda: serving.refused == ["response_timeout"])
            await serving.until(lambda: serving.server.open_connections == 0)
        assert await serving.is_usable()


# Connections


@on_both_loops
async def test_connection_beyond_the_limit_is_turned_away() -> None:
    async with serve(connections=2) as serving:
        first, second = await serving.connect(), await serving.connect()
        for client in (first, second):
            await client.send(GET.replace(b"/hello", b"/wait"))
        await serving.until(lambda: serving.app.paths == ["/wait"] * 2)
        third = await serving.connect()
        await third.send(GET)
        headers = await third.problem(503, "too_many_connections")
        assert headers["retry-after"] == "1"
        assert serving.refused == ["too_many_connections"]
        assert serving.server.open_connections == 2
        serving.app.release.set()
        assert (await first.read())[0] == (await second.read())[0] == 200
        first.close()
        await serving.until(lambda: serving.server.open_connections == 1)
        assert await serving.is_usable()
        second.close()


@on_both_loops
async def test_turned_away_connections_cannot_pile_up() -> None:
    async with serve(connections=1) as serving:
        first = await serving.connect()
        await first.send(GET.replace(b"/hello", b"/wait"))
        await serving.until(lambda: serving.app.paths == ["/wait"])
        many = [await serving.connect() for _ in range(protocol.LINGERING_CONNECTIONS + 20)]
        await serving.until(lambda: len(serving.refused) == len(many))
        assert len(serving.server._table.rejected) <= protocol.LINGERING_CONNECTIONS + 1
        for client in many:
            await client.problem(503, "too_many_connections")
        serving.app.release.set()
        first.close()
        await serving.until(lambda: serving.server.open_connections == 0)
        assert await serving.is_usable()


# Applications that fail


@pytest.mark.parametrize("path", [b"/fail", b"/silent"])
@on_both_loops
async def test_application_that_does_not_answer_becomes_a_problem(path: bytes) -> None:
    async with serve() as serving:
        client = await serving.connect()
        await client.send(GET.replace(b"/hello", path) + GET)
        await client.problem(500, "internal_error")
        assert await serving.is_usable()


# The end


@on_both_loops
async def test_drain_finishes_what_runs_and_takes_nothing_new() -> None:
    async with serve(drain_seconds=BOUND_SECONDS) as serving:
        running, receiving, idle = [await serving.connect() for _ in range(3)]
        await running.send(GET.replace(b"/hello", b"/wait"))
        await receiving.send(GET[:-2])
        assert (await idle.ask(GET))[0] == 200
        await serving.app.entered.wait()
        serving.stop.set()
        assert await idle.rest() == b""
        with pytest.raises(ConnectionError):
            await serving.connect()
        status, headers, _ = await receiving.ask(GET[-2:])
        assert (status, headers["connection"]) == (200, "close")
        assert not serving.running.done()
        serving.app.release.set()
        status, headers, body = await running.read()
        assert (status, headers["connection"], body) == (200, "close", b"waited")
        async with asyncio.timeout(BOUND_SECONDS):
            await serving.running
        for client in (running, receiving, idle):
            client.close()


@on_both_loops
async def test_drain_ends_by_force_when_its_time_is_over(caplog: pytest.LogCaptureFixture) -> None:
    async with serve(drain_seconds=0.1) as serving:
        client = await serving.connect()
        await client.send(GET.replace(b"/hello", b"/wait"))
        await serving.app.entered.wait()
        serving.stop.set()
        async with asyncio.timeout(BOUND_SECONDS):
            await serving.running
        assert serving.server.open_connections == 0
        with contextlib.suppress(ConnectionError):
            assert await client.rest() == b""
        client.close()
    assert [(r.levelname, r.exc_info) for r in caplog.records if r.name != "asyncio"] == [("WARNING", None)]


@on_both_loops
async def test_server_that_is_cancelled_leaves_nothing_open() -> None:
    async with serve() as serving:
        client = await serving.connect()
        assert (await client.ask(GET))[0] == 200
        serving.running.cancel()
        await asyncio.wait([serving.running], timeout=BOUND_SECONDS)
        assert serving.running.cancelled()
        assert serving.server.open_connections == 0
        client.close()
        with pytest.raises(ConnectionError):
            await serving.connect()


@pytest.fixture
def sockets() -> Iterator[list[socket.socket]]:
    bound = [bind("127.0.0.1", 0), bind("localhost", 0)]
    yield bound
    for sock in bound:
        sock.close()


@on_both_loops
async def test_one_server_listens_on_several_sockets(sockets: list[socket.socket]) -> None:
    stop, ready = asyncio.Event(), asyncio.Event()
    ports = [sock.getsockname()[:2] for sock in sockets]
    server = HttpServer(App(), sockets=sockets, on_ready=ready.set)
    running = asyncio.create_task(server.run_until(stop))
    async with asyncio.timeout(BOUND_SECONDS):
        await ready.wait()
        for host, port in ports:
            client = Client(*await asyncio.open_connection(host, port))
            assert (await client.ask(GET))[0] == 200
            client.close()
        stop.set()
        await running


@pytest.mark.parametrize("good_first", [True, False])
@on_both_loops
async def test_server_that_cannot_listen_everywhere_listens_nowhere(good_first: bool) -> None:
    good, bad = bind("127.0.0.1", 0), bind("127.0.0.1", 0)
    port = good.getsockname()[1]
    bad.close()
    with pytest.raises((OSError, ValueError)):
        await HttpServer(App(), sockets=[good, bad] if good_first else [bad, good]).run_until(asyncio.Event())
    with pytest.raises(ConnectionError):
        await asyncio.open_connection("127.0.0.1", port)


INHERITOR = """
import asyncio, socket, sys
from mercato.chassis.http import HttpServer

async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    await send({"type": "http.response.body", "body": b"child"})

async def main():
    stop = asyncio.Event()
    asyncio.get_running_loop().add_reader(0, stop.set)  # the parent closes the pipe
    sock = socket.socket(fileno=int(sys.argv[1]))
    server = HttpServer(app, sockets=[sock], on_ready=lambda: print("ready", flush=True))
    await server.run_until(stop)

asyncio.run(main())
"""


@on_both_loops
async def test_process_that_inherited_the_socket_goes_on_when_this_one_stops() -> None:
    sock = bind("127.0.0.1", 0)
    port, stop, ready = sock.getsockname()[1], asyncio.Event(), asyncio.Event()
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", INHERITOR, str(sock.fileno()), pass_fds=[sock.fileno()], stdin=pipe, stdout=pipe
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        server = HttpServer(App(), sockets=[sock], on_ready=ready.set)
        running = asyncio.create_task(server.run_until(stop))
        async with asyncio.timeout(BOUND_SECONDS):
            await ready.wait()
            assert await child.stdout.readline() == b"ready\n"
            stop.set()
            await running
            client = Client(*await asyncio.open_connection("127.0.0.1", port))
            assert (await client.ask(GET))[2] == b"child"
            client.close()
            child.stdin.close()
            assert await child.wait() == 0
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()


# Sockets


def test_taken_port_names_itself_and_the_way_out() -> None:
    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(PortTaken, match=rf"127\.0\.0\.1:{port} is taken .* --port"):
            bind("127.0.0.1", port)


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a" * 300, "192.0.2.1"])
def test_unknown_host_is_a_sentence(host: str) -> None:
    with pytest.raises(HostUnknown, match="--host"):
        bind(host, 0)


def test_impossible_port_is_a_sentence() -> None:
    for port in (-1, 65_536):
        with pytest.raises(CannotListen, match="--port"):
            bind("127.0.0.1", port)


def test_privileged_port_names_the_way_out() -> None:
    error = translate(PermissionError(13, "Permission denied"), "0.0.0.0", 80)
    assert str(error) == "0.0.0.0:80 needs a privilege: choose a port from 1024 upwards with --port."


@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_ipv6_literal_is_bound(host: str) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    with bind(host, 0) as sock:
        assert sock.family == socket.AF_INET6
        with pytest.raises(PortTaken, match=r"\[::1\]:\d+ is taken"):
            bind(host, sock.getsockname()[1])


# What we lean on

# What BoundedProtocol extends, replaces or relies on. When one of these changes: read it again, adapt, and only then
# write down its new fingerprint.
READ_AND_UNDERSTOOD = {
    "connection_made": "6efb565ff3d3",
    "connection_lost": "c91a4c9bf2e2",
    "data_received": "010a7ae59a5d",
    "on_message_begin": "96d377fdc7c2",
    "on_headers_complete": "1ea8589acfad",
    "on_body": "dba9c32aeba3",
    "on_message_complete": "1fbad42dc31f",
    "on_response_complete": "64e254f28e38",
    "_start_asgi_task": "9c08c2571ae9",
    "shutdown": "d7351fa33f00",
    "run_asgi": "0f33f2449a44",
    "send_500_response": "37c64da40eed",
    "send": "abdd8601b326",
    "receive": "8124ae006be7",
}


def test_uvicorn_is_the_one_this_was_written_for() -> None:
    members = {**vars(HttpToolsProtocol), **vars(RequestResponseCycle)}
    found = {name: fingerprint(members[name]) for name in READ_AND_UNDERSTOOD}
    assert found == READ_AND_UNDERSTOOD


def fingerprint(function: Callable[..., Any]) -> str:
    return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:12]


def test_environment_does_not_change_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEB_CONCURRENCY", "not a number")
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "*")
    with bind("127.0.0.1", 0) as sock:
        HttpServer(App(), sockets=[sock])


def test_protocol_does_not_run_without_limits() -> None:
    config = uvicorn.Config(App(), http=BoundedProtocol, log_config=None)
    loop = asyncio.new_event_loop()
    with contextlib.closing(loop), pytest.raises(AssertionError, match="HttpServer"):
        BoundedProtocol(config, ServerState(), {}, loop)
