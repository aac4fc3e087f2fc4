"""The refusals of the server itself have header fields that are made out of the request, as far as it was read."""

from collections.abc import Iterable

import pytest

from .serving import CHUNKED, SHORT, on_both_loops, serve

ORIGIN = b"Origin: https://pages.example\r\n"
POST = b"POST /echo HTTP/1.1\r\nHost: shop\r\n" + ORIGIN
SEEN = "https://pages.example"


def seen(headers: Iterable[tuple[bytes, bytes]]) -> list[bytes]:
    return [b"x-seen: " + b",".join(value for name, value in headers if name == b"origin")]


@pytest.mark.parametrize(
    ("request_bytes", "status", "code"),
    [
        (POST + b"Content-Length: 2000\r\n\r\n", 413, "body_too_large"),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n7d0\r\n" + b"c" * 2_000 + b"\r\n", 413, "body_too_large"),
        (POST + b"Transfer-Encoding: chunked\r\n\r\nnonsense\r\n", 400, "malformed_request"),
        (POST + b"Host: another\r\n\r\n", 400, "malformed_request"),
        (POST + b"X: a\x00b\r\n\r\n", 400, "malformed_request"),
        (POST + b"X-Large: " + b"a" * 2_000 + b"\r\n\r\n", 431, "request_header_too_large"),
        (b"GET /fail HTTP/1.1\r\nHost: shop\r\n" + ORIGIN + b"\r\n", 500, "internal_error"),
    ],
)
@on_both_loops
async def test_refusal_has_headers_made_of_those_of_the_request(request_bytes: bytes, status: int, code: str) -> None:
    async with serve(None, seen, body_bytes=1_000, header_bytes=1_000) as serving:
        client = await serving.connect()
        await client.send(request_bytes)
        assert (await client.problem(status, code))["x-seen"] == SEEN


@pytest.mark.parametrize("sent", [POST + b"X", POST + b"Content-Length: 5\r\n\r\nhal"])
@on_both_loops
async def test_request_that_is_late_is_refused_with_them(sent: bytes) -> None:
    async with serve(None, seen, **SHORT) as serving:
        client = await serving.connect()
        await client.send(sent)
        assert (await client.problem(408, "request_timeout"))["x-seen"] == SEEN


@on_both_loops
async def test_headers_are_those_of_the_request_that_is_refused() -> None:
    """Not of the one before it on the connection, whose answer comes first."""
    async with serve(None, seen, body_bytes=1_000) as serving:
        client = await serving.connect()
        before = b"GET /wait HTTP/1.1\r\nHost: shop\r\nOrigin: https://other.example\r\n\r\n"
        await client.send(before + POST + b"Content-Length: 2000\r\n\r\n")
        await serving.until(lambda: serving.refused == ["body_too_large"])
        serving.app.release.set()
        status, headers, body = await client.read()
        assert (status, body) == (200, b"waited")
        assert "x-seen" not in headers
        assert (await client.problem(413, "body_too_large"))["x-seen"] == SEEN


@on_both_loops
async def test_trailers_are_no_headers_of_a_request() -> None:
    async with serve(None, seen) as serving:
        client = await serving.connect()
        await client.send(CHUNKED.replace(b"/echo", b"/wait_and_echo") + b"0\r\n" + ORIGIN + b"X: a\x00b\r\n\r\n")
        assert (await client.problem(400, "malformed_request"))["x-seen"] == ""


@on_both_loops
async def test_refusal_of_a_connection_has_no_headers_made_of_a_request() -> None:
    async with serve(None, seen, connections_of_one=1) as serving:
        first, second = await serving.connect(), await serving.connect()
        assert "x-seen" not in await second.problem(503, "too_many_connections_of_one")
        first.close()
